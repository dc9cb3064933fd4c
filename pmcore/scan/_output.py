"""The regions of one scan as the kernel collects them: slots of a bounce buffer, filled, merged, backed out.

The kernel gathers regions in a buffer of PMD-size by page-size slots, copies it out when a new region finds it full,
and starts the walk again. Which regions come out does not depend on that, but `walk_end` does: it keeps the
address at which the walk was last restarted (rule SC, quirk scan_walk_end_stale).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import BoolArray, U64Array
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import REGION_DTYPE, RegionArray, empty_regions

__all__ = ["Output"]

#: Rows to begin with, where there is room for so many: memory that is not written costs nothing.
_FIRST_ROWS = 1 << 18
Index = Any
#: Words of the leaves at an index, or at many.
Column = Callable[[Index], Any]


class Output:
    """Collects regions under `vec_len` and `max_pages`. Leaves are pushed in ascending order."""

    def __init__(self, request: ScanRequest, *, page_shift: int, bounce_regions: int) -> None:
        self._page_shift = page_shift
        self._limit = request.vec_len
        self._buffer = min(bounce_regions, request.vec_len)
        self._max_pages = request.max_pages or (1 << 64) - 1  # 0 means no limit
        self._pages = 0
        #: Rows of start, end, categories: plain words are joined faster than records.
        self._rows = np.empty((min(request.vec_len, _FIRST_ROWS), 3), dtype="<u8")
        self._count = 0
        #: Regions before the current slot, all buffers together.
        self._slot = 0
        #: The current slot; `_end` 0 says that it is empty (as in the kernel).
        self._start = self._end = self._categories = 0
        #: Where the walk was last stopped or restarted; 0 while it never was.
        self.walk_end = 0

    @property
    def wanted(self) -> bool:
        """Whether the request asked for regions at all."""
        return self._limit > 0

    def push_whole(self, start: U64Array, end: U64Array, categories: U64Array) -> int:
        """Push as many of these leaves as fit unclipped; how many did. The rest is for `push_one`."""
        if not self.wanted or len(start) == 0:
            return len(start)
        fresh = np.empty(len(start), dtype=np.bool_)
        np.not_equal(start[1:], end[:-1], out=fresh[1:])
        fresh[1:] |= categories[1:] != categories[:-1]
        fits = self._first_over_pages(start, end)
        taken = self._push(fresh, fits, start.__getitem__, end.__getitem__, categories.__getitem__)
        if self._max_pages < 1 << 63:
            self._pages += int((end[:taken] - start[:taken]).sum()) >> self._page_shift
        return taken

    def push_pages(
        self, base: int, size: int, index: NDArray[np.intp], codes: NDArray[np.int64], reported: U64Array
    ) -> int:
        """`push_whole` for leaves of one size: those at `index`, counted from `base`; `reported` by code."""
        if not self.wanted or len(index) == 0:
            return len(index)
        fresh = np.empty(len(index), dtype=np.bool_)
        np.not_equal(index[1:] - index[:-1], 1, out=fresh[1:])
        words = reported[codes[index]]
        fresh[1:] |= words[1:] != words[:-1]

        def start(chosen: Index) -> U64Array:
            return index[chosen].astype(np.uint64) * np.uint64(size) + np.uint64(base)

        def end(chosen: Index) -> U64Array:
            return start(chosen) + np.uint64(size)

        pages = size >> self._page_shift
        fits = min(len(index), (self._max_pages - self._pages) // pages)
        taken = self._push(fresh, fits, start, end, words.__getitem__)
        self._pages += taken * pages
        return taken

    def _push(self, fresh: BoolArray, fits: int, start: Column, end: Column, categories: Column) -> int:
        """Take the first `fits` leaves, or those before the region for which there is no room; how many."""
        fresh[0] = not self._continues(int(start(0)), int(categories(0)))
        # The first new region takes the current slot where that is empty.
        first_slot = self._slot - (self._end == 0)
        heads = np.flatnonzero(fresh[:fits])
        room = self._limit - 1 - first_slot
        if len(heads) > room:
            fits = int(heads[room])
            heads = heads[:room]
        if fits == 0:
            return 0
        self._note_restart(first_slot, heads, start)
        self._append(heads, start, end, categories, fits)
        return fits

    def push_one(self, start: int, end: int, categories: int) -> tuple[int, bool]:
        """Push one leaf, clipped where it must be: (end of what was taken, whether the walk stops here)."""
        if not self.wanted:
            return end, False
        pages = (end - start) >> self._page_shift
        left = self._max_pages - self._pages
        stop = pages > left
        if stop:
            end = start + (left << self._page_shift)
        if self._continues(start, categories):
            self._end = end
        else:
            if self._end:
                if self._slot + 1 >= self._limit:
                    self.walk_end = start
                    return start, True
                self._flush_slot()
                if self._slot % self._buffer == 0:
                    self.walk_end = start  # the buffer was full: copied out, and the walk begins again here
            if end > start:
                self._start, self._end, self._categories = start, end, categories
        self._pages += (end - start) >> self._page_shift
        if stop:
            self.walk_end = end
        return end, stop

    def back_out(self, start: int, end: int) -> None:
        """Take the pages `start` to `end`, the last ones pushed, out of the current slot again."""
        if not self.wanted:
            return
        if self._start != start:
            self._end = start
        else:
            self._start = self._end = 0
        self._pages -= (end - start) >> self._page_shift

    def regions(self) -> RegionArray:
        """All regions collected, as one array."""
        if self._end:
            self._flush_slot()
        if not self._count:
            return empty_regions()
        return self._rows[: self._count].view(REGION_DTYPE).reshape(-1)

    # -- inside ----------------------------------------------------------------------------------------

    def _continues(self, start: int, categories: int) -> bool:
        return self._end != 0 and start == self._end and categories == self._categories

    def _flush_slot(self) -> None:
        [row] = self._more(1)
        row[:] = self._start, self._end, self._categories
        self._slot += 1
        self._start = self._end = self._categories = 0

    def _more(self, count: int) -> U64Array:
        """Rows for so many regions more."""
        need = self._count + count
        if need > len(self._rows):
            grown = np.empty((max(need, 2 * len(self._rows)), 3), dtype="<u8")
            grown[: self._count] = self._rows[: self._count]
            self._rows = grown
        self._count = need
        return self._rows[need - count : need]

    def _first_over_pages(self, start: U64Array, end: U64Array) -> int:
        """Index of the first leaf with which `max_pages` would be exceeded; their number if none."""
        left = self._max_pages - self._pages
        if left >= 1 << 52:
            return len(start)
        total = np.cumsum((end - start) >> np.uint64(self._page_shift))
        return int(np.searchsorted(total, left, side="right"))

    def _note_restart(self, first_slot: int, heads: NDArray[np.intp], start: Column) -> None:
        """Remember the last restart among the regions that begin at leaves `heads`."""
        last = first_slot + len(heads)
        boundary = last - last % self._buffer
        if boundary > self._slot:  # the current slot, also an empty one, belongs to the buffer that is open
            self.walk_end = int(start(heads[boundary - first_slot - 1]))

    def _append(
        self, heads: NDArray[np.intp], start: Column, end: Column, categories: Column, fits: int
    ) -> None:
        """Take the first `fits` leaves; their new regions begin at the indexes `heads`."""
        if len(heads) == 0:
            self._end = int(end(fits - 1))
            return
        if heads[0] > 0:
            self._end = int(end(heads[0] - 1))
        if self._end:
            self._flush_slot()
        last = int(heads[-1])
        if len(heads) > 1:
            chunk = self._more(len(heads) - 1)
            chunk[:, 0] = start(heads[:-1])
            chunk[:, 1] = end(heads[1:] - 1)
            chunk[:, 2] = categories(heads[:-1])
            self._slot += len(chunk)
        self._start, self._end, self._categories = int(start(last)), int(end(fits - 1)), int(categories(last))
