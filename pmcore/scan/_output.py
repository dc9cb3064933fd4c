"""The regions of one scan as the kernel collects them: slots of a bounce buffer, filled, merged, backed out.

The kernel gathers regions in a buffer of PMD-size by page-size slots, copies it out when a new region finds it full,
and starts the walk again. Which regions come out does not depend on that, but `walk_end` does: it keeps the
address at which the walk was last restarted (rule SC, quirk scan_walk_end_stale).
"""

from __future__ import annotations

import numpy as np

from pmcore.arrays import U64Array
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import REGION_DTYPE, RegionArray, empty_regions

__all__ = ["Output"]

#: Rows to begin with, where there is room for so many: memory that is not written costs nothing.
_FIRST_ROWS = 1 << 18
_NO_ROWS = np.empty((0, 3), dtype="<u8")
#: What `max_pages` 0 means.
_NO_LIMIT = (1 << 64) - 1


class Output:
    """Collects regions under `vec_len` and `max_pages`. Leaves are pushed in ascending order."""

    def __init__(self, request: ScanRequest, *, page_shift: int, bounce_regions: int) -> None:
        self._page_shift = page_shift
        self._limit = request.vec_len
        self._buffer = min(bounce_regions, request.vec_len)
        self._max_pages = request.max_pages or _NO_LIMIT
        self._pages = 0
        #: Rows of start, end, categories: plain words are joined faster than records.
        self._rows = _NO_ROWS
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
        fits = self._first_over_pages(start, end)
        if fits == 0:
            return 0
        fresh = np.empty(fits, dtype=np.bool_)
        fresh[0] = True
        np.not_equal(start[1:fits], end[: fits - 1], out=fresh[1:])
        fresh[1:] |= categories[1:fits] != categories[: fits - 1]
        heads = np.flatnonzero(fresh)
        taken = self.push_runs(start[heads], end[np.append(heads[1:], fits) - 1], categories[heads])
        return fits if taken == len(heads) else int(heads[taken])

    def push_runs(self, start: U64Array, end: U64Array, categories: U64Array) -> int:
        """Push as many of these runs of leaves as fit whole, no two of which are one region; how many did.

        `categories`: one a run, or a single one for all.
        """
        count = len(start)
        if not self.wanted or count == 0:
            return count
        joins = self._continues(int(start[0]), int(categories[0]))
        # The first new region takes the current slot where that is empty.
        first_slot = self._slot - (self._end == 0)
        count = min(self._first_over_pages(start, end), self._limit - 1 - first_slot + joins)
        if count == 0:
            return 0
        if self._max_pages < _NO_LIMIT:
            self._pages += int((end[:count] - start[:count]).sum()) >> self._page_shift
        if joins:
            self._end = int(end[0])
        if count > joins:
            self._note_restart(first_slot, start[joins:count])
            self._append(
                start[joins:count],
                end[joins:count],
                categories[joins:count] if len(categories) > 1 else categories,
            )
        return count

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
        if not self._count:
            slot = (self._start, self._end, self._categories)
            return np.array([slot], dtype=REGION_DTYPE) if self._end else empty_regions()
        if self._end:
            self._flush_slot()
        return self._rows[: self._count].view(REGION_DTYPE).reshape(-1)

    # -- inside ----------------------------------------------------------------------------------------

    def _continues(self, start: int, categories: int) -> bool:
        return self._end != 0 and start == self._end and categories == self._categories

    def _flush_slot(self) -> None:
        row = self._more(1)
        row[0, 0], row[0, 1], row[0, 2] = self._start, self._end, self._categories
        self._slot += 1
        self._start = self._end = self._categories = 0

    def _more(self, count: int) -> U64Array:
        """Rows for so many regions more."""
        need = self._count + count
        if need > len(self._rows):
            room = max(need, 2 * len(self._rows), min(self._limit, _FIRST_ROWS))
            grown = np.empty((room, 3), dtype="<u8")
            grown[: self._count] = self._rows[: self._count]
            self._rows = grown
        self._count = need
        return self._rows[need - count : need]

    def _first_over_pages(self, start: U64Array, end: U64Array) -> int:
        """Index of the first leaf with which `max_pages` would be exceeded; their number if none."""
        left = self._max_pages - self._pages
        if left >= 1 << 52:  # more than there are addresses
            return len(start)
        total = np.cumsum((end - start) >> np.uint64(self._page_shift))
        return int(np.searchsorted(total, left, side="right"))

    def _note_restart(self, first_slot: int, start: U64Array) -> None:
        """Remember the last restart among new regions that begin there."""
        last = first_slot + len(start)
        boundary = last - last % self._buffer
        if boundary > self._slot:  # the current slot, also an empty one, belongs to the buffer that is open
            self.walk_end = int(start[boundary - first_slot - 1])

    def _append(self, start: U64Array, end: U64Array, categories: U64Array) -> None:
        """Take new regions; the last of them is the current slot then."""
        if self._end:
            self._flush_slot()
        new = self._more(len(start) - 1)
        new[:, 0], new[:, 1], new[:, 2] = (
            start[:-1],
            end[:-1],
            categories[:-1] if len(categories) > 1 else categories,
        )
        self._slot += len(new)
        self._start, self._end, self._categories = int(start[-1]), int(end[-1]), int(categories[-1])
