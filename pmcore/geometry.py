"""Address arithmetic: page sizes, levels, alignment. Everything that depends on the page size asks here."""

from __future__ import annotations

import functools
import re

import attrs

from pmcore.errors import ArgumentError

__all__ = ["X86_64", "Geometry", "align_down", "align_up", "parse_size"]

_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", "K", "M", "G", "T"))}


def align_down(value: int, alignment: int) -> int:
    """`value` rounded down to a multiple of `alignment` (a power of two)."""
    return value & -alignment


def align_up(value: int, alignment: int) -> int:
    """`value` rounded up to a multiple of `alignment` (a power of two)."""
    return (value + alignment - 1) & -alignment


def parse_size(text: int | str) -> int:
    """Bytes: a number, or text like "64 MiB", "512K", "1GB" (all powers of 1024). Raises ArgumentError."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = (
        re.fullmatch(r"\s*(\d{1,18})\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
        if isinstance(text, str)
        else None
    )
    if match is None:
        raise ArgumentError(f"{text!r} is not a size", remedy='bytes, or a number and a unit, as "64 MiB"')
    return int(match[1]) * _UNITS[match[2].upper()]


@attrs.frozen(kw_only=True)
class Geometry:
    """Page size and page-table shape of a machine. Sizes in bytes, `*_order` as powers of two in pages."""

    page_shift: int = attrs.field(default=12, validator=attrs.validators.in_((12, 14, 16)))
    levels: int = attrs.field(default=4, validator=attrs.validators.in_((2, 3, 4, 5)))
    #: First address that no process can map (x86-64, four levels: 47 bits less one page).
    task_size: int = attrs.field(default=(1 << 47) - 4096)

    @task_size.validator
    def _check_task_size(self, _attribute: object, value: int) -> None:
        if value <= 0 or value % self.page_size:
            raise ArgumentError(f"task_size {value:#x} is not a positive multiple of the page size")

    @functools.cached_property
    def page_size(self) -> int:
        """Bytes in a page."""
        return 1 << self.page_shift

    @functools.cached_property
    def pmd_order(self) -> int:
        """Order of a PMD-mapped huge page: one page-table page full of 8-byte entries."""
        return self.page_shift - 3

    @functools.cached_property
    def pmd_size(self) -> int:
        """Bytes that one PMD entry maps."""
        return 1 << (self.page_shift + self.pmd_order)

    @functools.cached_property
    def pmd_pages(self) -> int:
        """Pages that one PMD entry maps."""
        return 1 << self.pmd_order

    @functools.cached_property
    def pud_size(self) -> int:
        """Bytes that one PUD entry maps."""
        return 1 << (self.page_shift + 2 * self.pmd_order)

    @functools.cached_property
    def bounce_regions(self) -> int:
        """Regions that PAGEMAP_SCAN collects before it copies them out: PMD size by page size (SC)."""
        return self.pmd_pages

    def page_align(self, length: int) -> int:
        """`length` rounded up to whole pages."""
        return align_up(length, self.page_size)

    def pages(self, start: int, end: int) -> int:
        """Number of pages from `start` up to `end`, both page-aligned."""
        if (start | end) & (self.page_size - 1) or end < start:
            raise ArgumentError(
                f"{start:#x}-{end:#x} is not a page-aligned range",
                remedy=f"pages are {self.page_size} bytes here",
            )
        return (end - start) >> self.page_shift


#: x86-64 with four levels, what this machine and most others are.
X86_64 = Geometry()
