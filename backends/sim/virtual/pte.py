"""What an entry of a page table holds.

pagemap's own bits are where pagemap has them (frame or swap entry, soft-dirty, uffd-wp, guard, swap, present), so that
the view is a mask; between the frame number and those lie the bits that pagemap does not show.
"""

from __future__ import annotations

from pmcore.uapi import (
    MAX_SWAPFILES,
    PM_GUARD_REGION,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    PM_UFFD_WP,
    PTE_MARKER_GUARD,
    PTE_MARKER_POISONED,
    PTE_MARKER_UFFD_WP,
    SWP_PTE_MARKER,
)

__all__ = [
    "DIRTY",
    "FIELD",
    "GUARD_MARKER",
    "LEAF",
    "POISON_MARKER",
    "PRESENT",
    "SHOWN",
    "SOFT_DIRTY",
    "SPECIAL",
    "SWAP",
    "SWAP_EXCLUSIVE",
    "TABLE",
    "UFFD_MARKER",
    "UFFD_WP",
    "WRITE",
    "YOUNG",
    "is_hwpoison",
    "is_marker",
    "poisoned",
]

#: Frame number, or swap type (bits 0-4) and offset.
FIELD = (1 << 40) - 1
WRITE = 1 << 48
DIRTY = 1 << 49
YOUNG = 1 << 50
#: On swap entries: the page was exclusive when it was swapped out.
SWAP_EXCLUSIVE = 1 << 51
SOFT_DIRTY = PM_SOFT_DIRTY
UFFD_WP = PM_UFFD_WP
GUARD = PM_GUARD_REGION
#: The entry maps the zero page, or the huge one: nobody's page, nobody counts it.
SPECIAL = 1 << 59
#: On entries of upper levels: a table lies below; the field is its row.
TABLE = 1 << 61
#: On entries of PMDs: a huge page (the field is its first frame).
LEAF = 1 << 60
SWAP = PM_SWAP
PRESENT = PM_PRESENT
#: What pagemap shows of an entry.
SHOWN = FIELD | SOFT_DIRTY | UFFD_WP | GUARD | SWAP | PRESENT

_MARKERS = SWP_PTE_MARKER
UFFD_MARKER = SWAP | UFFD_WP | SWP_PTE_MARKER | PTE_MARKER_UFFD_WP << 5
#: What UFFDIO_POISON leaves.
POISON_MARKER = SWAP | SWP_PTE_MARKER | PTE_MARKER_POISONED << 5
GUARD_MARKER = SWAP | GUARD | SWP_PTE_MARKER | PTE_MARKER_GUARD << 5


def is_marker(pte: int) -> bool:
    """Whether the entry is a PTE marker."""
    return (pte & (PRESENT | SWAP)) == SWAP and (pte & 0x1F) == SWP_PTE_MARKER


def is_hwpoison(pte: int) -> bool:
    """Whether the entry is that of a poisoned page: its field is a type that is no swap area, and the frame."""
    return (pte & (PRESENT | SWAP)) == SWAP and MAX_SWAPFILES <= (pte & 0x1F) < _MARKERS


def poisoned(pte: int) -> bool:
    """Whether the entry is a marker of UFFDIO_POISON (a scan may have write-protected it)."""
    return (pte & (PRESENT | SWAP | FIELD)) == POISON_MARKER
