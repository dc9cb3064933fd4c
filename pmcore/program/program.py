"""A program as a value, and its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from pmcore.errors import ArgumentError, FormatError
from pmcore.program.steps import STEPS, Step

__all__ = ["Program", "load_program", "program_from_json", "program_to_json", "save_program"]

_VERSION = 1


_THP_SIZES = ("always", "inherit", "madvise", "never")
_THP_ENABLED = ("always", "madvise", "never")


def _settings(value: Mapping[str, str] | Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Pairs of what is set and how, sorted. Raises ArgumentError."""
    pairs = dict(value)
    for what, how in pairs.items():
        allowed = _THP_ENABLED if what == "enabled" else _THP_SIZES
        if not re.fullmatch(r"enabled|[1-9]\d{0,9}kB", str(what)):
            raise ArgumentError(f"thp: {what!r} is no size", remedy='a size such as "64kB", or "enabled"')
        if how not in allowed:
            raise ArgumentError(f"thp: {what}={how!r}", remedy=f"one of {', '.join(allowed)}")
    return tuple(sorted(pairs.items()))


@attrs.frozen(kw_only=True)
class Program:
    """Steps in order, with a name, a note for readers, and the rules that it makes visible."""

    name: str
    steps: tuple[Step, ...]
    note: str = ""
    rules: tuple[str, ...] = ()
    #: What the administrator has set of transparent huge pages before the first step: pairs of a size ("64kB") and
    #: "always", "inherit", "madvise" or "never"; "enabled" is what "inherit" refers to. What is not named is as the
    #: workbench was opened. In JSON an object: {"thp": {"64kB": "always"}}.
    thp: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=_settings)


def program_to_json(program: Program) -> str:
    """The program's text: defaults are left out, so that it reads well."""
    steps = []
    for step in program.steps:
        defaults = {field.name: field.default for field in attrs.fields(type(step))}
        values = attrs.asdict(step)
        kept = {key: value for key, value in values.items() if value != defaults[key]}
        steps.append({"step": type(step).__name__.lower(), **kept})
    head: dict[str, Any] = {
        "pmcore_program": _VERSION,
        "name": program.name,
        "note": program.note,
        "rules": list(program.rules),
    }
    if program.thp:
        head["thp"] = dict(program.thp)
    return json.dumps({**head, "steps": steps}, indent=1)


def program_from_json(text: str, *, source: str = "program") -> Program:
    """The program of that text. Raises FormatError that names the field."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}", source=source) from None
    if not isinstance(data, dict) or data.get("pmcore_program") != _VERSION:
        raise FormatError(f"not a program of version {_VERSION}", source=source)
    unknown = data.keys() - {"pmcore_program", "name", "note", "rules", "thp", "steps"}
    if unknown:
        raise FormatError(f"unknown fields {sorted(unknown)}", source=source)
    rules = data.get("rules", [])
    if not isinstance(data.get("steps"), list) or not isinstance(rules, list):
        raise FormatError("steps and rules are lists", source=source)
    steps = tuple(_step(item, f"{source}: steps[{i}]") for i, item in enumerate(data["steps"]))
    strings = (data.get("name", ""), data.get("note", ""), *rules)
    if not all(isinstance(value, str) for value in strings):
        raise FormatError("name, note and rules are text", source=source)
    thp = data.get("thp", {})
    if not isinstance(thp, dict):
        raise FormatError("thp is an object of sizes and settings", source=source)
    try:
        return Program(name=strings[0], note=strings[1], rules=tuple(rules), thp=thp, steps=steps)
    except ArgumentError as error:
        raise FormatError(str(error), source=source) from None


def save_program(program: Program, path: str | Path) -> None:
    """Write the program's JSON to a file."""
    Path(path).write_text(program_to_json(program) + "\n", encoding="utf-8")


def load_program(path: str | Path) -> Program:
    """Read a program from a file. Raises FormatError, OSError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8: {error}", source=str(path)) from None
    return program_from_json(text, source=str(path))


def _step(item: Any, where: str) -> Step:
    if not isinstance(item, dict):
        raise FormatError("a step is an object", source=where)
    values = dict(item)
    kind = STEPS.get(values.pop("step", None))
    if kind is None:
        raise FormatError(
            f"unknown step {item.get('step')!r}", source=where, remedy=f"known: {', '.join(STEPS)}"
        )
    fields = {field.name: field for field in attrs.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            raise FormatError(f"{item['step']} has no field {key!r}", source=where)
        wanted = {"str": str, "int": int, "bool": bool}[str(fields[key].type)]
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise FormatError(f"{key}={value!r} is not {wanted.__name__}", source=where)
    try:
        return kind(**values)
    except (ArgumentError, TypeError) as error:
        raise FormatError(str(error), source=where) from None
