"""What populating a locked mapping of a file does to pages that were in its cache before.

A page that becomes locked goes to the unevictable list with the next full batch of them. Until then the access that
populating notes (folio_mark_accessed) still finds it evictable: a referenced page is activated, which is then undone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.virtual import accessed
from pmcore.backends.sim.virtual.filemap import window
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["Batch"]

#: Folios in a batch (PAGEVEC_SIZE).
_BATCH = 31
#: Pages that fault-around maps at once.
_AROUND = 1 << 16
Pages = NDArray[np.int64]
_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_REFERENCED, _ACTIVE, _MLOCKED = PageFlag.REFERENCED, PageFlag.ACTIVE, PageFlag.MLOCKED


class Batch:
    """Pages from `start` to `end` of a locked VMA, as they are before they are populated."""

    def __init__(
        self, core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, *, around: bool
    ) -> None:
        assert vma.file is not None
        self.core, self.mm, self.vma, self.start, self.around = core, mm, vma, start, around
        shift = core.geometry.page_shift
        words = vma.file.index.load(vma.pgoff + (start - vma.start >> shift), end - start >> shift)
        self.cached: BoolArray = (words & _PRESENT) != 0
        flags = np.zeros(len(words), dtype=np.uint64)
        flags[self.cached] = core.memory.frames.flags[(words[self.cached] & _FIELD).view(np.int64)]
        self.active = (flags & np.uint64(_ACTIVE)) != 0
        self.locked = (flags & np.uint64(_MLOCKED)) != 0
        self.mapped = self._mapped(end)[0]

    def _mapped(self, end: int) -> tuple[BoolArray, Pages]:
        """Which pages up to `end` are mapped, and their frames."""
        shift = self.core.geometry.page_shift
        found: BoolArray = np.zeros(len(self.cached), dtype=np.bool_)
        pfns = np.zeros(len(self.cached), dtype=np.int64)
        if end > self.start:
            for extent in self.mm.tables.extents(self.start, end):
                if extent.huge:
                    continue  # what a PMD maps is not marked
                part = slice(extent.start - self.start >> shift, extent.end - self.start >> shift)
                found[part] = (extent.entries & _PRESENT) != 0
                pfns[part] = (extent.entries & _FIELD).view(np.int64)
        return found, pfns

    def mark(self, end: int) -> None:
        """Note one access to each page up to `end`, now that they are mapped."""
        found, pfns = self._mapped(end)
        new = np.flatnonzero(found & ~self.mapped)
        when = self._when(new) if self.around else new
        order = np.lexsort((new, ~self.cached[new], when))
        # How many had been mapped when the page was accessed.
        done = np.searchsorted(when[order], new, side="right")
        flushed = np.empty(len(new), dtype=np.int64)
        flushed[order] = self._flushed(pfns[new[order]])
        waiting = new[(flushed >= done) & ~self.locked[new]]
        frames = self.core.memory.frames
        flags = frames.flags[pfns[waiting]]
        again = pfns[waiting[((flags & np.uint64(_REFERENCED)) != 0) & ~self.active[waiting]]]
        there = found.copy()
        there[waiting] = False
        frames.flags[pfns[waiting]] |= np.uint64(_REFERENCED)
        frames.flags[again] &= np.uint64(~int(_REFERENCED) & (1 << 64) - 1)
        frames.flags[pfns[waiting]] &= np.uint64(~int(PageFlag.IDLE) & (1 << 64) - 1)
        accessed.mark(self.core, pfns[there])

    def _flushed(self, pfns: Pages) -> Pages:
        """Of pages in the order in which they were mapped: with which of them each left the batch.

        A full batch goes with its last page, any batch with a large folio that is locked; -1: never in one.
        """
        memory, count = self.core.memory, len(pfns)
        large = (memory.frames.flags[pfns] & np.uint64(COMPOUND)) != 0
        if not large.any():
            return (np.arange(count) // _BATCH + 1) * _BATCH - 1
        heads = pfns[large] - memory.frames.behind[pfns[large]]
        once, first, counts = np.unique(heads, return_index=True, return_counts=True)
        whole = [
            memory.large[head].pages == n for head, n in zip(once.tolist(), counts.tolist(), strict=True)
        ]
        ends = np.flatnonzero(large)[first[np.array(whole, dtype=np.bool_)]]
        ends = np.sort(ends) if self.core.caps.mlock_whole_folios else ends[:0]
        single = np.flatnonzero(~large)
        # Runs of single pages between two large folios that are locked.
        run = np.searchsorted(ends, single)
        begins = np.searchsorted(run, run)
        full = begins + ((np.arange(len(single)) - begins) // _BATCH + 1) * _BATCH - 1
        next_end = np.append(ends, count)[run]
        inside = full < np.searchsorted(run, run, side="right")
        flushed = np.full(count, -1, dtype=np.int64)
        flushed[single] = np.where(inside, single[np.minimum(full, len(single) - 1)], next_end)
        return flushed

    def _when(self, new: Pages) -> Pages:
        """At the access to which page each new one was mapped: its own, or the one that it lies around."""
        shift = self.core.geometry.page_shift
        first_end = window(self.core, self.vma, self.start)[1] - self.start >> shift
        blocks = (self.start + (new << shift)) // _AROUND
        known = self.cached[new]
        when = new.copy()
        when[known & (new < first_end)] = 0
        later = known & (new >= first_end)
        for block in np.unique(blocks[later]).tolist():
            mine = blocks == block
            faults = new[mine & ((new >= first_end) | ~known)]
            when[mine & later] = faults.min()
        return when
