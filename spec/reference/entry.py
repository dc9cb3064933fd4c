"""One 64-bit entry of /proc/PID/pagemap, taken apart and put together (rules PM)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """The fields of an entry. `pfn` and the swap fields are None where the entry has none or hides them."""

    present: bool = False
    swapped: bool = False
    file: bool = False
    guard: bool = False
    uffd_wp: bool = False
    exclusive: bool = False
    soft_dirty: bool = False
    page_shift: int | None = None
    pfn: int | None = None
    swap_type: int | None = None
    swap_offset: int | None = None
    unknown_bits: int = 0


def shift_layout(capabilities: Collection[str], *, soft_dirty_cleared: bool) -> bool:
    """Whether bits 55 to 60 are the page shift: before 4.2, from 3.11 on only until soft-dirty was cleared."""
    if "pagemap.page_shift" not in capabilities:
        return False
    return not (soft_dirty_cleared and "pagemap.page_shift_until_clear" in capabilities)


def decode(value: int, capabilities: Collection[str], *, soft_dirty_cleared: bool = False) -> Entry:
    """Take `value` apart as a kernel with `capabilities` means it."""
    present, swapped = bool(value >> 63 & 1), bool(value >> 62 & 1)
    old = shift_layout(capabilities, soft_dirty_cleared=soft_dirty_cleared)
    flags = {}
    defined = 1 << 63 | 1 << 62
    for name, bit, capability in (
        ("soft_dirty", 55, "pagemap.soft_dirty"),
        ("exclusive", 56, "pagemap.mmap_exclusive"),
        ("uffd_wp", 57, "pagemap.uffd_wp"),
        ("guard", 58, "pagemap.guard"),
        ("file", 61, "pagemap.file"),
    ):
        if capability in capabilities and not (old and bit < 61):
            flags[name] = bool(value >> bit & 1)
            defined |= 1 << bit
    if old:
        defined |= 0x3F << 55
    field = value & ((1 << 55) - 1)
    pfn = swap_type = swap_offset = None
    if present:
        pfn = field or None
    elif swapped and field:  # zero is hidden: no swap area gives out its first page
        swap_type, swap_offset = field & 31, field >> 5
    stray = field if not present and not swapped else 0
    return Entry(
        present=present,
        swapped=swapped,
        page_shift=value >> 55 & 0x3F if old else None,
        pfn=pfn,
        swap_type=swap_type,
        swap_offset=swap_offset,
        unknown_bits=value & ~defined & ~((1 << 55) - 1) | stray,
        **flags,
    )


def encode(entry: Entry) -> int:
    """Put an entry together again; decode(encode(x)) == x for every x that decode can give."""
    value = entry.present << 63 | entry.swapped << 62 | entry.file << 61
    value |= entry.guard << 58 | entry.uffd_wp << 57 | entry.exclusive << 56 | entry.soft_dirty << 55
    if entry.page_shift is not None:
        value |= entry.page_shift << 55
    value |= entry.pfn or 0
    value |= (entry.swap_type or 0) | (entry.swap_offset or 0) << 5
    return value | entry.unknown_bits
