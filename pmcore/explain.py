"""Saying in words what a word means: each bit or field, its meaning on that kernel, and the rule that states it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from pmcore import spec

if TYPE_CHECKING:
    from pmcore.pageflags import FrameFlags
    from pmcore.pagemap import PagemapEntry
    from pmcore.profile import KernelProfile

__all__ = ["BitExplanation", "Explanation", "explain_categories", "explain_flags", "explain_pagemap"]


@attrs.frozen(kw_only=True)
class BitExplanation:
    """One bit or field: its bits (first, last), name, value, meaning, and rule number (None: no rule knows it)."""

    bits: tuple[int, int]
    name: str
    value: int
    meaning: str
    rule: str | None

    def __str__(self) -> str:
        first, last = self.bits
        where = f"bit {first}" if first == last else f"bits {first}-{last}"
        value = "" if first == last else f" = {self.value:#x}"
        return f"{where:>10}  {self.name}{value}: {self.meaning}" + (f" [{self.rule}]" if self.rule else "")


@attrs.frozen(kw_only=True)
class Explanation:
    """All that is set in a word, lowest bit first."""

    what: str
    value: int
    kernel: str
    lines: tuple[BitExplanation, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "what": self.what,
            "value": self.value,
            "kernel": self.kernel,
            "bits": [attrs.asdict(line) for line in self.lines],
        }

    def __str__(self) -> str:
        head = f"{self.what} {self.value:#018x} (Linux {self.kernel})"
        return "\n".join([head, *(str(line) for line in self.lines)]) if self.lines else f"{head}: empty"


def explain_pagemap(entry: PagemapEntry) -> Explanation:
    """Every field of one pagemap entry."""
    lines: list[BitExplanation] = []
    shift = entry.page_shift
    states = {"present": entry.present, "swapped": entry.swapped and not entry.present, "always": True}
    for row in spec.pagemap_bits():
        if not entry.profile.has(row.capability) or (not states[row.when] and row.last > row.first):
            continue
        overlaid = shift is not None and row.name != "page-shift" and row.first >= 55 and row.last <= 60
        if overlaid or (row.name == "page-shift" and shift is None):
            continue
        value = entry.value >> row.first & (1 << row.last - row.first + 1) - 1
        wide = row.last > row.first
        if entry.hidden and row.last <= 54:
            if row.first == 0:
                what, not_this = (
                    ("pfn", "frame 0") if row.name == "pfn" else ("swap entry", "type 0, offset 0")
                )
                meaning = f"hidden from this opener, not {not_this}"
                lines.append(BitExplanation(bits=(0, 54), name=what, value=0, meaning=meaning, rule="AC-003"))
        elif value or wide:
            lines.append(
                BitExplanation(
                    bits=(row.first, row.last), name=row.name, value=value, meaning=row.meaning, rule=row.rule
                )
            )
    lines += _unknown(entry.unknown_bits)
    return Explanation(
        what="pagemap entry",
        value=entry.value,
        kernel=entry.profile.name,
        lines=tuple(sorted(lines, key=_by_bits)),
    )


def explain_flags(word: FrameFlags) -> Explanation:
    """Every bit of one kpageflags word."""
    from pmcore.pageflags import flag_rows

    rows = flag_rows(word.profile)
    lines = [
        BitExplanation(bits=(bit, bit), name=row.name, value=1, meaning=row.meaning, rule=row.rule)
        for bit, row in rows.items()
        if word.value >> bit & 1
    ]
    lines += _unknown(word.value & ~sum(1 << bit for bit in rows))
    return Explanation(
        what="kpageflags",
        value=word.value,
        kernel=word.profile.name,
        lines=tuple(sorted(lines, key=_by_bits)),
    )


def explain_categories(value: int, *, profile: KernelProfile) -> Explanation:
    """Every PAGE_IS_* bit of a region's categories; one that this kernel has not is `bit_N`."""
    rows = {row.value: row for row in spec.scan_categories() if profile.has(row.capability)}
    lines = []
    for bit in range(64):
        row = rows.get(1 << bit)
        if value >> bit & 1 and row is not None:
            lines.append(
                BitExplanation(bits=(bit, bit), name=row.name, value=1, meaning=row.meaning, rule=row.rule)
            )
    lines += _unknown(value & ~sum(rows))
    return Explanation(
        what="categories", value=value, kernel=profile.name, lines=tuple(sorted(lines, key=_by_bits))
    )


def _unknown(bits: int) -> list[BitExplanation]:
    return [
        BitExplanation(
            bits=(bit, bit), name=f"bit_{bit}", value=1, meaning="not defined on this kernel", rule=None
        )
        for bit in range(64)
        if bits >> bit & 1
    ]


def _by_bits(line: BitExplanation) -> tuple[int, int]:
    return line.bits
