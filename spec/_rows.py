"""The kinds of rows that spec/ holds, as plain frozen values (named tuples: the cheapest to define at start-up)."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """One numbered rule. `until` is exclusive; `capability` names what a kernel must have for it to hold."""

    id: str
    title: str
    text: str
    since: str
    source: tuple[str, ...]
    verified: tuple[str, ...]
    until: str | None = None
    capability: str | None = None


class Divergence(NamedTuple):
    """A numbered difference between document, kernel source and observed kernels."""

    id: str
    title: str
    text: str
    kernels: tuple[str, ...]
    rules: tuple[str, ...]
    reproduce: str
    document: str | None = None


class BitField(NamedTuple):
    """A field of the pagemap entry. `when`: always, present, swapped."""

    name: str
    first: int
    last: int
    kernel_name: str
    since: str
    when: str
    capability: str
    meaning: str
    rule: str
    until: str | None = None


class FlagRow(NamedTuple):
    """A bit of the kpageflags word, or one that page-types adds to it. `kind`: abi, raw, display."""

    name: str
    bit: int
    since: str
    letter: str
    page_types: str
    kind: str
    meaning: str
    rule: str
    until: str | None = None
    capability: str | None = None


class FlagProgram(NamedTuple):
    """How a flag is reached: one of a kept program, a test, or the reason why it is not."""

    name: str
    bit: int
    program: str = ""
    test: str = ""
    reason: str = ""


class CategoryRow(NamedTuple):
    """A PAGE_IS_* category or PM_SCAN_* flag."""

    name: str
    value: int
    since: str
    capability: str
    meaning: str
    rule: str


class StructField(NamedTuple):
    """A member of one of PAGEMAP_SCAN's structures; offset and size in bytes."""

    struct: str
    name: str
    offset: int
    size: int
    direction: str


class Permission(NamedTuple):
    """What an action on a file needs; `errno` is what a refusal says ("" where nothing is refused)."""

    file: str
    action: str
    since: str
    needs: str
    errno: str
    rule: str
    until: str | None = None


class Feature(NamedTuple):
    """A capability or quirk of kernels, by version, configuration and architecture."""

    name: str
    kind: str
    since: str
    meaning: str
    source: str
    rules: tuple[str, ...]
    until: str | None = None
    config: tuple[str, ...] = ()
    arch: tuple[str, ...] = ()
    verified: str = ""


class KernelRow(NamedTuple):
    """A release that is a preset."""

    version: str
    notes: str = ""


class Sentence(NamedTuple):
    """One sentence, heading or list item of a document, by its lines. `kind`: rule, heading, pointer."""

    lines: str
    digest: str
    rules: tuple[str, ...] = ()
    kind: str = "rule"
    part: int = 1

    @property
    def span(self) -> tuple[int, int]:
        """First and last line."""
        first, _, last = self.lines.partition("-")
        return int(first), int(last or first)
