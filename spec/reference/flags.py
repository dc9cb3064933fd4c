"""One 64-bit word of /proc/kpageflags, named bit by bit, and page-types' two ways of showing it (rules KF)."""

from __future__ import annotations

ANON, SLAB, ACTIVE, ERROR, RECLAIM, WRITEBACK = 1 << 12, 1 << 7, 1 << 6, 1 << 1, 1 << 9, 1 << 8
OWNER_2, ANON_EXCLUSIVE, SLUB_FROZEN, SLUB_DEBUG, READAHEAD = 1 << 34, 1 << 47, 1 << 50, 1 << 51, 1 << 48
COMPOUND, HUGE, HACKERS = 1 << 15 | 1 << 16, 1 << 17, 0xFFFF << 32


def names(word: int, table: dict[int, str]) -> list[str]:
    """The names of the bits that are set, ascending; a bit that `table` has not is bit_N."""
    return [table.get(bit, f"bit_{bit}") for bit in range(64) if word >> bit & 1]


def well_known(word: int) -> int:
    """What page-types shows by default: no bits for kernel developers, compound pages only of hugetlb."""
    word &= ~HACKERS
    if word & COMPOUND and not word & HUGE:
        word &= ~COMPOUND
    return word


def expand_overloaded(word: int, pagemap: int = 0) -> int:
    """What page-types shows in its raw mode: overloaded bits moved to slots of their own, pagemap's added."""
    if word & ANON and word & OWNER_2:
        word ^= OWNER_2 | ANON_EXCLUSIVE
    if word & SLAB:
        if word & ACTIVE:
            word ^= ACTIVE | SLUB_FROZEN
        if word & ERROR:
            word ^= ERROR | SLUB_DEBUG
    if word & RECLAIM and not word & WRITEBACK:
        word ^= RECLAIM | READAHEAD
    for source, target in ((55, 40), (61, 61), (62, 62), (56, 63)):
        if pagemap >> source & 1:
            word |= 1 << target
    return word
