"""page-types' small languages: which flags (bits-spec) and which pages (addr-spec).

    anon,lru            any of them
    anon,lru=anon       of these two, exactly the first
    anon,~lru           the first and not the second
    =anon,lru           these and no others

A name is page-types' own, or any prefix of it (the lowest bit that fits wins, `compound` means both compound bits), or
a number. Unlike page-types, a name that fits nothing is an error and not a guess, and `bit_N` names any bit.
"""

from __future__ import annotations

import attrs
import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import FormatError
from pmcore.pagetypes import display_table
from pmcore.uapi import PageFlag

__all__ = ["BitFilter", "parse_addr", "parse_bits", "parse_flags"]

_COMPOUND = int(PageFlag.COMPOUND_HEAD | PageFlag.COMPOUND_TAIL)
_ALL = (1 << 64) - 1


@attrs.frozen(kw_only=True)
class BitFilter:
    """One bits-spec. `bits` None: any bit of `mask`; otherwise the bits of `mask` must be exactly `bits`."""

    mask: int
    bits: int | None

    def matches(self, words: U64Array) -> BoolArray:
        """Per word, whether it passes."""
        masked = words & np.uint64(self.mask)
        passed: BoolArray = masked != 0 if self.bits is None else masked == np.uint64(self.bits)
        return passed


def parse_bits(text: str) -> BitFilter:
    """The filter that `text` asks for. Raises FormatError with the position of what is wrong."""
    if "=" in text:
        left, _, right = text.partition("=")
        if "=" in right:
            raise FormatError("a second '='", source=f"bits-spec {text!r}, character {text.rindex('=') + 1}")
        bits = _names(right, text, len(left) + 1)[0]
        return BitFilter(mask=_names(left, text, 0)[0] if left else _ALL, bits=bits)
    wanted, unwanted = _names(text, text, 0, negation=True)
    if "~" in text:
        return BitFilter(mask=wanted | unwanted, bits=wanted)
    return BitFilter(mask=wanted, bits=None)


def parse_flags(text: str) -> int:
    """The word with all the flags that `text` names (page-types --describe). Raises FormatError."""
    return _names(text, text, 0)[0]


def parse_addr(text: str) -> tuple[int, int | None]:
    """First page and the page after the last (None: to the end) of an addr-spec: N, N+M, N,M, N, or ,M."""
    where = f"addr-spec {text!r}"
    separator = "," if "," in text else "+"
    first, found, second = text.partition(separator)
    start = 0 if found and not first else _number(first, where)
    if not found:
        return start, start + 1
    if not second:
        return start, None
    size = _number(second, where)
    if separator == "+" and first:
        return start, start + size
    if size < start:
        raise FormatError(f"the range ends at {size}, before its start", source=where)
    return start, size


def _names(text: str, whole: str, offset: int, *, negation: bool = False) -> tuple[int, int]:
    """(bits named, bits named with a ~ before them)."""
    wanted = unwanted = 0
    position = offset
    for name in text.split(","):
        where = f"bits-spec {whole!r}, character {position + 1}"
        bare = name.strip()
        if bare.startswith("~"):
            if not negation:
                raise FormatError("'~' has no place beside '='", source=where)
            unwanted |= _flag(bare[1:], where)
        elif bare:
            wanted |= _flag(bare, where)
        elif text.strip():
            raise FormatError("an empty name", source=where)
        position += len(name) + 1
    return wanted, unwanted


def _flag(name: str, where: str) -> int:
    lower = name.lower()
    if lower and "compound".startswith(lower):
        return _COMPOUND
    table = display_table()
    for bit in sorted(table):
        if lower and table[bit].page_types.startswith(lower):
            return 1 << bit
    if lower.startswith("bit_") and lower[4:].isdecimal() and int(lower[4:]) < 64:
        return 1 << int(lower[4:])
    try:
        number = int(name, 0)
    except ValueError:
        import difflib

        known = [row.page_types for row in table.values()]
        close = difflib.get_close_matches(lower, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"
        raise FormatError(f"{name!r} is no page flag", source=where, remedy=hint) from None
    if not 0 <= number <= _ALL:
        raise FormatError(f"{name} is no 64-bit number", source=where)
    return number


def _number(text: str, where: str) -> int:
    try:
        value = int(text.strip(), 0)
    except ValueError:
        raise FormatError(f"{text!r} is no number", source=where) from None
    if not 0 <= value <= _ALL:
        raise FormatError(f"{text} is no page number", source=where)
    return value
