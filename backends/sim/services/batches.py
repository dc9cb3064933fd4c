"""Runs of PTEs that map consecutive pages of a large folio: what the kernel's walks take in one piece.

A run ends where the pages are not consecutive, the folio ends, userfaultfd's write protection differs, or a page table
ends (folio_pte_batch). Advice takes a folio whole where one run covers all of it, and splits or skips it otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SPECIAL, UFFD_WP

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core

__all__ = ["Runs", "large_runs"]

_FIELD, _PRESENT, _SPECIAL = (np.uint64(bits) for bits in (FIELD, PRESENT, SPECIAL))
_COMPOUND = np.uint64(COMPOUND)


class Runs(NamedTuple):
    """The runs among some PTEs, ascending: first index, number of entries, head and order of the folio."""

    first: NDArray[np.int64]
    pages: NDArray[np.int64]
    head: Pfns
    order: NDArray[np.int64]

    @property
    def whole(self) -> BoolArray:
        """Which of them cover their folio."""
        covers: BoolArray = self.pages == 1 << self.order
        return covers

    def take(self, chosen: BoolArray) -> Runs:
        """Some of them."""
        return Runs(*(column[chosen] for column in self))

    def entries(self) -> NDArray[np.int64]:
        """The indexes of all their entries."""
        if not len(self.first):
            return self.first
        ends = np.cumsum(self.pages)
        gaps = np.repeat(self.first - (ends - self.pages), self.pages)
        every: NDArray[np.int64] = np.arange(int(ends[-1]), dtype=np.int64) + gaps
        return every


def large_runs(core: Core, start: int, entries: U64Array, *, differ: int = UFFD_WP) -> Runs:
    """The runs among PTEs from the address `start` on; a run ends also where one of the bits `differ` does."""
    none = np.zeros(0, dtype=np.int64)
    if not core.memory.large:
        return Runs(none, none, none, none)
    frames = core.memory.frames
    index = np.flatnonzero((entries & (_PRESENT | _SPECIAL)) == _PRESENT)
    pfns = (entries[index] & _FIELD).view(np.int64)
    large = (frames.flags[pfns] & _COMPOUND) != 0
    index, pfns = index[large], pfns[large]
    if not len(index):
        return Runs(none, none, none, none)
    heads = pfns - frames.behind[pfns]
    bits = entries[index] & np.uint64(differ)
    table = (start >> core.geometry.page_shift) + index >> core.geometry.pmd_order
    breaks = (
        (np.diff(index) != 1)
        | (np.diff(pfns) != 1)
        | (heads[1:] != heads[:-1])
        | (bits[1:] != bits[:-1])
        | (table[1:] != table[:-1])
    )
    begins = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    counts = np.diff(np.append(begins, len(index)))
    heads = heads[begins]
    return Runs(index[begins], counts, heads, core.memory.large.orders(heads))
