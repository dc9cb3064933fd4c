"""page-types' way of showing flag words: which bits it hides, moves and adds, and the names it prints.

The kernel's tool prints one letter a bit and long names; its table is in `spec/tables/kpageflags.toml`. Where it aborts
on a bit that it does not know, the bit is shown here as bit_N.
"""

from __future__ import annotations

import functools

import numpy as np

from pmcore import spec
from pmcore.arrays import U64Array
from pmcore.uapi import PageFlag, PagemapFlag

__all__ = ["display_names", "display_table", "expand_overloaded", "long_names", "symbolic", "well_known"]

_COMPOUND = PageFlag.COMPOUND_HEAD | PageFlag.COMPOUND_TAIL
_HACKERS = 0xFFFF << 32
_ANON_EXCLUSIVE, _READAHEAD, _SLUB_FROZEN, _SLUB_DEBUG = 1 << 47, 1 << 48, 1 << 50, 1 << 51
#: Bits that page-types' table does not name, though the kernel has them (6.12): it aborts on them.
_UNNAMED = frozenset({39, 42})


@functools.cache
def display_table() -> dict[int, spec.FlagRow]:
    """page-types' own table (that of 6.12) by bit: abi, raw and display bits."""
    return {row.bit: row for row in spec.kpageflags() if row.name != "BALLOON" and row.bit not in _UNNAMED}


def well_known(words: U64Array) -> U64Array:
    """The default view: bits for kernel developers hidden, compound bits shown for hugetlb only."""
    shown = words & np.uint64(~_HACKERS & (1 << 64) - 1)
    hide = (shown & np.uint64(PageFlag.HUGE)) == 0
    shown[hide] &= np.uint64(~int(_COMPOUND) & (1 << 64) - 1)
    return shown


def expand_overloaded(words: U64Array, pagemap: U64Array | None = None) -> U64Array:
    """The raw view: bits with two meanings moved apart; `pagemap` words (one a frame) add their own flags."""
    shown = words.copy()
    for needed, absent, old, new in (
        (PageFlag.ANON | PageFlag.OWNER_2, 0, PageFlag.OWNER_2, _ANON_EXCLUSIVE),
        (PageFlag.SLAB | PageFlag.ACTIVE, 0, PageFlag.ACTIVE, _SLUB_FROZEN),
        (PageFlag.SLAB | PageFlag.ERROR, 0, PageFlag.ERROR, _SLUB_DEBUG),
        (PageFlag.RECLAIM, PageFlag.WRITEBACK, PageFlag.RECLAIM, _READAHEAD),
    ):
        where = (shown & np.uint64(needed | absent)) == np.uint64(needed)
        shown[where] ^= np.uint64(int(old) | new)
    if pagemap is not None:
        for flag, target in (
            (PagemapFlag.SOFT_DIRTY, 1 << 40),
            (PagemapFlag.FILE, 1 << 61),
            (PagemapFlag.SWAP, 1 << 62),
            (PagemapFlag.MMAP_EXCLUSIVE, 1 << 63),
        ):
            shown[(pagemap & np.uint64(flag)) != 0] |= np.uint64(target)
    return shown


def symbolic(word: int) -> str:
    """One letter a bit of page-types' table, "_" where it is not set."""
    table = display_table()
    return "".join(table[bit].letter if word >> bit & 1 else "_" for bit in sorted(table))


def display_names(word: int) -> tuple[str, ...]:
    """page-types' long names of the bits that are set; bit_N for one that its table has not."""
    table = display_table()
    return tuple(
        table[bit].page_types if bit in table else f"bit_{bit}" for bit in range(64) if word >> bit & 1
    )


def long_names(word: int) -> str:
    """`display_names`, joined by commas as page-types prints them."""
    return ",".join(display_names(word))
