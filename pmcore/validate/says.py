"""What a tool says, page by page, and its comparison with the truth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import FormatError
from pmcore.uapi import PageFlag
from pmcore.validate.case import Case
from pmcore.validate.report import Finding
from pmcore.validate.truth import BOOLEANS, KEYS, NO_VMA, NUMBERS, RULES, Truth, rule_of_flags

__all__ = ["Says", "compare", "read_says"]

#: Of a key that cannot be known, these are wrong to be told at all: 0 is not "no frame", clean is not "not dirty".
_NEVER = frozenset({"written", "pfn"})
_FIELD_OF_FLAGS = (1 << 64) - 1


@attrs.frozen(kw_only=True)
class Says:
    """Ranges with what is told of them. Pages that a tool leaves out have none of the booleans that it tells."""

    #: The keys that the tool tells, whether or not any page has them.
    keys: tuple[str, ...]
    #: (start, end, key -> value; None: it cannot be known).
    spans: Sequence[tuple[int, int, Mapping[str, int | None]]]
    #: Of these, nothing is told of a page that is left out.
    of_listed_alone: frozenset[str] = frozenset()
    #: Flag bits that the tool shows; others are not compared.
    flag_bits: int = _FIELD_OF_FLAGS


def read_says(data: Any) -> Says:
    """A tool's answer in the protocol: {"pages": [{"start":, "end":, KEY: value, ...}, ...]}. Raises FormatError."""
    if isinstance(data, list):
        data = {"pages": data}
    if not isinstance(data, Mapping) or not isinstance(data.get("pages"), list):
        raise FormatError('not what a tool says: an object with "pages", a list')
    unknown = data.keys() - {"pages", "keys", "flag_bits"}
    if unknown:
        raise FormatError(f"unknown fields {sorted(map(str, unknown))}")
    spans = [_span(item, f"pages[{number}]") for number, item in enumerate(data["pages"])]
    told = {key for _, _, values in spans for key in values} | set(data.get("keys", ()))
    if told - set(KEYS):
        raise FormatError(f"unknown keys {sorted(told - set(KEYS))}", remedy=f"known: {', '.join(KEYS)}")
    bits = data.get("flag_bits", _FIELD_OF_FLAGS)
    return Says(
        keys=tuple(key for key in KEYS if key in told), spans=spans, flag_bits=_number(bits, "flag_bits")
    )


def _span(item: Any, where: str) -> tuple[int, int, dict[str, int | None]]:
    if not isinstance(item, Mapping):
        raise FormatError("a range is an object", source=where)
    values = dict(item)
    try:
        start, end = (_number(values.pop(name), f"{where}: {name}") for name in ("start", "end"))
    except KeyError as error:
        raise FormatError(f"no {error}", source=where) from None
    found: dict[str, int | None] = {}
    for key, value in values.items():
        if value is None:
            found[key] = None
        elif key in BOOLEANS:
            if not isinstance(value, bool):
                raise FormatError(f"{key}={value!r} is not true, false or null", source=where)
            found[key] = int(value)
        elif key == "flags" and isinstance(value, list):
            found[key] = sum(int(_flag(name, where)) for name in set(value))
        else:
            found[key] = _number(value, f"{where}: {key}")
    return start, end, found


def _flag(name: Any, where: str) -> PageFlag:
    try:
        return PageFlag[str(name).upper()]
    except KeyError:
        raise FormatError(f"no flag {name!r}", source=where) from None


def _number(value: Any, where: str) -> int:
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            raise FormatError(f"{value!r} is no number", source=where) from None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise FormatError(f"{value!r} is no unsigned 64-bit number", source=where)
    return value


def compare(says: Says, truth: Truth, case: Case) -> tuple[Finding, ...]:
    """What is said and not so: one finding a key (of flags, a rule), with the first page of it."""
    pages = len(truth.addresses)
    stated = {key: np.zeros(pages, dtype=np.bool_) for key in says.keys}
    unsure = {key: np.zeros(pages, dtype=np.bool_) for key in says.keys}
    values = {key: np.zeros(pages, dtype=np.uint64) for key in says.keys}
    findings: list[Finding] = []
    outside: list[tuple[int, int]] = []
    for start, end, told in says.spans:
        first, last = np.searchsorted(truth.addresses, np.array([start, max(start, end)], dtype=np.uint64))
        if last - first != math.ceil((end - start) / truth.page_size) and any(told.values()):
            outside.append((start, end))
        for key, value in told.items():
            stated[key][first:last] = True
            unsure[key][first:last] = value is None
            values[key][first:last] = value or 0
            if key == "pfn" and value is not None and last - first > 1:
                values[key][first:last] += np.arange(last - first, dtype=np.uint64)
    if outside:
        start, end = outside[0]
        findings.append(
            Finding(
                rule=NO_VMA,
                key="pages",
                count=len(outside),
                start=start,
                end=end,
                said="mapped",
                true="not mapped",
            )
        )
    for key in says.keys:
        findings += _of_key(key, says, truth, case, stated[key], unsure[key], values[key])
    return tuple(findings)


def _of_key(
    key: str, says: Says, truth: Truth, case: Case, stated: BoolArray, unsure: BoolArray, values: U64Array
) -> Iterator[Finding]:
    known, true = truth.known[key], truth.values[key]
    rule = case.rule_of.get(key, RULES[key])
    sure = stated & ~unsure
    if key in NUMBERS:
        bits = np.uint64(says.flag_bits) if key == "flags" else np.uint64(_FIELD_OF_FLAGS)
        wrong = sure & known & (((values ^ true) & bits) != 0)
    else:
        # A page that is left out is said to be without.
        told = stated if key in says.of_listed_alone else np.ones(len(known), dtype=np.bool_)
        wrong = told & known & ~unsure & ((values != 0) != (true != 0))
    # What nobody can know: said all the same. A no is no claim, where a no and "unknown" are written alike.
    claimed = sure & ~known & ((values != 0) | (key in _NEVER))
    if key in NUMBERS and key not in _NEVER:
        claimed &= False
    if key == "flags":
        yield from _of_flags(truth, case, wrong, values, true, says.flag_bits)
    elif wrong.any():
        yield _finding(truth, rule, key, wrong, values, true)
    if claimed.any():
        yield _finding(truth, case.rule_of.get(key, RULES[key]), key, claimed, values, None)


def _of_flags(
    truth: Truth, case: Case, wrong: BoolArray, values: U64Array, true: U64Array, bits: int
) -> Iterator[Finding]:
    differing = (values ^ true) & np.uint64(bits)
    left = wrong.copy()
    while left.any():
        index = int(np.flatnonzero(left)[0])
        word = int(differing[index])
        lowest = word & -word
        same = left & ((differing & np.uint64(lowest)) != 0)
        rule = case.rule_of.get("flags", rule_of_flags(word))
        yield _finding(truth, rule, "flags", same, values, true)
        left &= ~same


def _finding(
    truth: Truth, rule: str, key: str, where: BoolArray, values: U64Array, true: U64Array | None
) -> Finding:
    indexes = np.flatnonzero(where)
    first = int(indexes[0])
    run = 1
    while run < len(indexes) and indexes[run] == first + run:
        run += 1
    start = int(truth.addresses[first])
    return Finding(
        rule=rule,
        key=key,
        count=len(indexes),
        start=start,
        end=start + run * truth.page_size,
        said=_word(key, int(values[first])),
        true="not to be known" if true is None else _word(key, int(true[first])),
    )


def _word(key: str, value: int) -> str:
    if key in BOOLEANS:
        return key if value else f"not {key}"
    return hex(value) if key in ("flags", "pfn") else str(value)
