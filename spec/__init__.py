"""The law: numbered rules, tables by kernel version, divergences, and an executable reference.

Everything is read from the TOML files beside this module, once, and checked while it is read. Nothing of the rest of
pmcore is imported here.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

from pmcore.spec._rows import (
    BitField,
    CategoryRow,
    Divergence,
    Feature,
    FlagProgram,
    FlagRow,
    KernelRow,
    Permission,
    Rule,
    Sentence,
    StructField,
)

__all__ = [
    "BitField",
    "CategoryRow",
    "Divergence",
    "Feature",
    "FlagProgram",
    "FlagRow",
    "KernelRow",
    "Permission",
    "Rule",
    "Sentence",
    "SpecError",
    "StructField",
    "UnknownRule",
    "coverage",
    "default_config",
    "divergences",
    "document_digest",
    "document_lines",
    "documents",
    "features",
    "flag_programs",
    "kernels",
    "kpageflags",
    "pagemap_bits",
    "parse_version",
    "permissions",
    "rule",
    "rules",
    "scan_categories",
    "scan_fields",
    "scan_flags",
    "version_in",
]

_HERE = Path(__file__).parent
#: Families of rules in the order in which they read best; the other files of rules/ follow by name.
_FIRST = ("pagemap", "kpagecount", "kpageflags", "kpagecgroup", "scan", "shared", "access", "memory")
_Row = TypeVar("_Row", bound=NamedTuple)


class SpecError(Exception):
    """A file of spec/ that contradicts itself: a bug of ours, never of a caller."""


class UnknownRule(KeyError):
    """No rule or divergence of that number; `close` holds numbers that look like it."""

    def __init__(self, name: str, close: Iterable[str]) -> None:
        super().__init__(name)
        self.name = name
        self.close = tuple(close)

    def __str__(self) -> str:
        hint = f"; did you mean {', '.join(self.close)}?" if self.close else ""
        return f"spec/ has no rule {self.name!r}{hint}"


@functools.cache
def rules() -> Mapping[str, Rule]:
    """All rules by number, in the order of the files."""
    there = {path.stem for path in (_HERE / "rules").glob("*.toml")}
    families = (*_FIRST, *sorted(there - {*_FIRST}))
    rows = [row for family in families for row in _rows(Rule, f"rules/{family}.toml", "rule")]
    return _by_key(rows, "id", "rules")


def rule(number: str) -> Rule:
    """The rule of that number ("PM-001"). Raises UnknownRule."""
    try:
        return rules()[number]
    except KeyError:
        import difflib

        known = [*rules(), *divergences()]
        raise UnknownRule(number, difflib.get_close_matches(number.upper(), known, n=3)) from None


@functools.cache
def divergences() -> Mapping[str, Divergence]:
    """All divergences by number."""
    return _by_key(_rows(Divergence, "divergences.toml", "divergence"), "id", "divergences")


@functools.cache
def features() -> Mapping[str, Feature]:
    """Capabilities and quirks by name."""
    return _by_key(_rows(Feature, "tables/features.toml", "feature"), "name", "features")


@functools.cache
def pagemap_bits() -> tuple[BitField, ...]:
    """The fields of a pagemap entry, of all versions."""
    return tuple(_rows(BitField, "tables/pagemap_bits.toml", "bit"))


@functools.cache
def kpageflags() -> tuple[FlagRow, ...]:
    """The bits of a kpageflags word, of all versions, and page-types' display bits."""
    return tuple(_rows(FlagRow, "tables/kpageflags.toml", "flag"))


@functools.cache
def flag_programs() -> tuple[FlagProgram, ...]:
    """How each of those bits is reached."""
    return tuple(_rows(FlagProgram, "tables/flag_programs.toml", "flag"))


@functools.cache
def scan_categories() -> tuple[CategoryRow, ...]:
    """PAGE_IS_*."""
    return tuple(_rows(CategoryRow, "tables/scan.toml", "category"))


@functools.cache
def scan_flags() -> tuple[CategoryRow, ...]:
    """PM_SCAN_*."""
    return tuple(_rows(CategoryRow, "tables/scan.toml", "flag"))


@functools.cache
def scan_fields() -> tuple[StructField, ...]:
    """The members of struct pm_scan_arg and struct page_region."""
    return tuple(_rows(StructField, "tables/scan.toml", "field"))


@functools.cache
def permissions() -> tuple[Permission, ...]:
    """Who may do what with which file."""
    return tuple(_rows(Permission, "tables/permissions.toml", "permission"))


@functools.cache
def kernels() -> tuple[KernelRow, ...]:
    """The releases that are presets, ascending."""
    return tuple(_rows(KernelRow, "tables/kernels.toml", "kernel"))


@functools.cache
def default_config() -> tuple[str, ...]:
    """The options that a preset takes as set."""
    return tuple(_read("tables/kernels.toml")["defaults"]["config"])


@functools.cache
def coverage(document: str = "pagemap") -> tuple[Sentence, ...]:
    """Every sentence of a document, by its lines, with the rules that state it."""
    return tuple(_rows(Sentence, f"coverage/{document}.toml", "sentence"))


def documents() -> tuple[str, ...]:
    """The documents that `coverage` knows, pagemap first."""
    there = sorted(path.stem for path in (_HERE / "coverage").glob("*.toml"))
    return ("pagemap", *(name for name in there if name != "pagemap"))


@functools.cache
def document_lines(document: str = "pagemap") -> int:
    """How many lines the document has that `coverage` was made from."""
    return int(_read(f"coverage/{document}.toml")["lines"])


@functools.cache
def document_digest(document: str = "pagemap") -> str:
    """SHA-256 of the document that `coverage` was made from."""
    return str(_read(f"coverage/{document}.toml")["sha256"])


def parse_version(version: str) -> tuple[int, ...]:
    """ "6.12" as (6, 12). Raises ValueError for what is no version."""
    return tuple(int(part) for part in version.split("."))


def version_in(version: str, since: str | None, until: str | None) -> bool:
    """Whether `since` <= `version` < `until`; None is no bound."""
    number = parse_version(version)
    return (since is None or parse_version(since) <= number) and (
        until is None or number < parse_version(until)
    )


# -- reading ---------------------------------------------------------------------------------------------


@functools.cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((_HERE / name).read_text(encoding="utf-8"))


def _rows(kind: type[_Row], name: str, key: str) -> list[_Row]:
    known, make = set(kind._fields), cast("Callable[..., _Row]", kind)
    made: list[_Row] = []
    for number, row in enumerate(_read(name).get(key, []), start=1):
        unknown = row.keys() - known
        if unknown:
            raise SpecError(f"{name}: {key} {number} has unknown keys {sorted(unknown)}")
        try:
            made.append(make(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}))
        except TypeError as error:
            raise SpecError(f"{name}: {key} {number}: {error}") from error
    return made


def _by_key(rows: Iterable[_Row], key: str, what: str) -> Mapping[str, _Row]:
    table: dict[str, _Row] = {}
    for row in rows:
        name = getattr(row, key)
        if name in table:
            raise SpecError(f"{what}: {name} stands there twice")
        table[name] = row
    return MappingProxyType(table)
