"""The buddy allocator of one zone: free blocks of 1 to 1024 pages, split and merged, the lowest address first.

Memory that was never touched is not written down anywhere: it is the blocks of the greatest order from `frontier` on.
"""

from __future__ import annotations

import heapq
import itertools

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.frames import Frames
from pmcore.backends.sim.physical.runs import runs
from pmcore.uapi import PageFlag

__all__ = ["MAX_ORDER", "Zone"]

#: The greatest order of a free block (MAX_PAGE_ORDER).
MAX_ORDER = 10
_BLOCK = 1 << MAX_ORDER
_BUDDY = int(PageFlag.BUDDY)

Pfns = NDArray[np.int64]


class Zone:
    """Frames `start` to `end` (both multiples of 1024 pages), of one node."""

    def __init__(self, frames: Frames, start: int, end: int, *, name: str = "Normal", node: int = 0) -> None:
        self.frames = frames
        self.start, self.end = start, end
        self.name, self.node = name, node
        #: Never touched from here on.
        self.frontier = start
        self.free_pages = end - start
        #: By order: a heap of the first frames of free blocks; entries that are none any more are skipped.
        self._heaps: list[list[int]] = [[] for _ in range(MAX_ORDER + 1)]

    # -- taking ----------------------------------------------------------------------------------------

    def take(self, order: int) -> int:
        """The first frame of a block of 2**order pages; -1 if there is none."""
        free_order = self.frames.free_order_at
        for have in range(order, MAX_ORDER + 1):
            heap = self._heaps[have]
            while heap:
                pfn = heapq.heappop(heap)
                if free_order[pfn] == have + 1:
                    free_order[pfn] = 0
                    self.free_pages -= 1 << order
                    self._put_back_rest(pfn, order, have)
                    return pfn
        if self.frontier >= self.end:
            return -1
        pfn = self.frontier
        self._advance(1)
        self.free_pages -= 1 << order
        self._put_back_rest(pfn, order, MAX_ORDER)
        return pfn

    def take_one(self) -> int:
        """`take` of a single page."""
        heap, free_order = self._heaps[0], self.frames.free_order_at
        while heap:
            pfn = heapq.heappop(heap)
            if free_order[pfn] == 1:
                free_order[pfn] = 0
                self.free_pages -= 1
                return pfn
        return self.take(0)

    def _advance(self, blocks: int) -> None:
        first = self.frontier
        self.frontier += blocks * _BLOCK
        self.frames.reach(self.start, self.frontier)
        self.frames.flags[first : self.frontier] = _BUDDY

    def _put_back_rest(self, pfn: int, order: int, have: int) -> None:
        """Of a block of order `have` keep the first 2**order pages."""
        free_order = self.frames.free_order_at
        while have > order:
            have -= 1
            rest = pfn + (1 << have)
            free_order[rest] = have + 1
            heapq.heappush(self._heaps[have], rest)

    def take_off(self, pfn: int) -> None:
        """Take this frame, which is free, out of the block that it lies in; the rest of the block stays free."""
        while self.frontier <= pfn:
            block = self.frontier
            self._advance(1)
            self.frames.free_order_at[block] = MAX_ORDER + 1
            heapq.heappush(self._heaps[MAX_ORDER], block)
        free_order = self.frames.free_order_at
        order = next(o for o in range(MAX_ORDER + 1) if free_order[pfn & -(1 << o)] == o + 1)
        head = pfn & -(1 << order)
        free_order[head] = 0
        while order:
            order -= 1
            low, high = head, head + (1 << order)
            head, rest = (high, low) if pfn >= high else (low, high)
            free_order[rest] = order + 1
            heapq.heappush(self._heaps[order], rest)
        self.free_pages -= 1

    def take_pages(self, count: int) -> Pfns:
        """Up to `count` single pages, as the same number of single requests would get them."""
        pieces: list[Pfns] = []
        left = count
        while left:
            # What is left of small blocks first, then whole blocks as long as more than one is needed.
            order = self._smallest_order(left)
            if order < 0:
                whole = min(left // _BLOCK, (self.end - self.frontier) // _BLOCK)
                if whole:
                    first = self.frontier
                    self._advance(whole)
                    self.free_pages -= whole * _BLOCK
                    pieces.append(np.arange(first, self.frontier, dtype=np.int64))
                    left -= whole * _BLOCK
                    continue
                order = 0 if left < _BLOCK else MAX_ORDER
                order = min(order, left.bit_length() - 1)
            first = self.take(order)
            if first < 0:
                break
            pieces.append(np.arange(first, first + (1 << order), dtype=np.int64))
            left -= 1 << order
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def take_run(self, pages: int) -> int:
        """The first frame of so many neighbouring ones, aligned, all free: more than a block; -1 if there is none."""
        free_order = self.frames.free_order_at
        for first in range(-(-self.start // pages) * pages, self.end - pages + 1, pages):
            touched = range(first, min(first + pages, self.frontier), _BLOCK)
            if all(free_order[pfn] == MAX_ORDER + 1 for pfn in touched):
                break
        else:
            return -1
        while self.frontier < first + pages:
            pfn = self.frontier
            self._advance(1)
            if pfn < first:
                free_order = self.frames.free_order_at  # the table has grown
                free_order[pfn] = MAX_ORDER + 1
                heapq.heappush(self._heaps[MAX_ORDER], pfn)
        self.frames.free_order[first : first + pages] = 0
        self.free_pages -= pages
        return first

    def take_blocks(self, order: int, count: int) -> Pfns:
        """The first frames of up to `count` blocks of 2**order pages, as the same number of single requests."""
        pieces: list[Pfns] = []
        left, step = count, 1 << order
        while left:
            have = self._smallest_order(left << order, order)
            if have < 0:
                whole = min((left << order) // _BLOCK, (self.end - self.frontier) // _BLOCK)
                if whole:
                    first = self.frontier
                    self._advance(whole)
                    self.free_pages -= whole * _BLOCK
                    pieces.append(np.arange(first, self.frontier, step, dtype=np.int64))
                    left -= whole * _BLOCK >> order
                    continue
                have = min(MAX_ORDER, (left << order).bit_length() - 1)
            first = self.take(have)
            if first < 0:
                break
            pieces.append(np.arange(first, first + (1 << have), step, dtype=np.int64))
            left -= 1 << have - order
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def _smallest_order(self, limit: int, least: int = 0) -> int:
        """The order of the smallest free block of `least` or more, of no more than `limit` pages.

        -1 if only untouched is left.
        """
        free_order = self.frames.free_order_at
        for order in range(least, MAX_ORDER + 1):
            heap = self._heaps[order]
            while heap and free_order[heap[0]] != order + 1:
                heapq.heappop(heap)
            if heap:
                return min(order, limit.bit_length() - 1)
        return -1

    # -- giving back -----------------------------------------------------------------------------------

    def give(self, pfn: int, order: int) -> None:
        """Free one block, merging it with its buddies."""
        frames, free_order = self.frames, self.frames.free_order_at
        if order:
            frames.flags[pfn : pfn + (1 << order)] = _BUDDY
        else:
            frames.flags_at[pfn] = _BUDDY
        self.free_pages += 1 << order
        while order < MAX_ORDER:
            buddy = pfn ^ 1 << order
            if buddy >= self.frontier or buddy < self.start or free_order[buddy] != order + 1:
                break
            free_order[buddy] = 0
            pfn &= ~(1 << order)
            order += 1
        free_order[pfn] = order + 1
        heapq.heappush(self._heaps[order], pfn)

    def give_one(self, pfn: int) -> None:
        """`give` of a single page."""
        buddy, free_order = pfn ^ 1, self.frames.free_order_at
        if self.start <= buddy < self.frontier and free_order[buddy] == 1:
            self.give(pfn, 0)
            return
        self.frames.flags_at[pfn] = _BUDDY
        self.free_pages += 1
        free_order[pfn] = 1
        heapq.heappush(self._heaps[0], pfn)

    def give_pages(self, pfns: Pfns, order: int = 0) -> None:
        """Free single pages (or blocks of 2**order), each once, in any order."""
        if len(pfns) < 8:
            for pfn in pfns.tolist():
                self.give(pfn, order)
            return
        if not order:
            pieces = [where for _, where in runs(pfns) if isinstance(where, slice)]
            for where in pieces:
                self._give_run(where.start, where.stop)
            if pieces:
                return
        blocks, step = np.sort(pfns, kind="stable"), 1 << order  # as a rule nearly in order
        breaks = np.flatnonzero(np.diff(blocks) != step) + 1
        if len(breaks) * 16 < len(blocks):
            bounds = [0, *breaks.tolist(), len(blocks)]
            for first, last in itertools.pairwise(bounds):
                self._give_run(int(blocks[first]), int(blocks[last - 1]) + step)
            return
        every = blocks if not order else (blocks[:, None] + np.arange(step, dtype=np.int64)).reshape(-1)
        self.frames.flags[every] = _BUDDY
        self.free_pages += len(every)
        free_order = self.frames.free_order
        for have in range(order, MAX_ORDER + 1):
            free_order[blocks] = have + 1
            if have == MAX_ORDER:
                self._keep(have, blocks)
                return
            buddies = blocks ^ np.int64(1 << have)
            inside = buddies < min(self.frontier, len(free_order))
            merges = np.zeros(len(blocks), dtype=np.bool_)
            merges[inside] = free_order[buddies[inside]] == have + 1
            self._keep(have, blocks[~merges])
            pairs = blocks[merges]
            if len(pairs) == 0:
                return
            free_order[pairs] = 0
            free_order[buddies[merges]] = 0
            blocks = pairs & ~np.int64(1 << have)
            blocks = blocks[np.append(True, blocks[1:] != blocks[:-1])]

    def _give_run(self, first: int, end: int) -> None:
        """Free neighbouring pages as the largest aligned blocks that they make up."""
        while first < end:
            aligned = (first & -first).bit_length() - 1 if first else MAX_ORDER
            order = min(MAX_ORDER, aligned, (end - first).bit_length() - 1)
            self.give(first, order)
            first += 1 << order

    def _keep(self, order: int, blocks: Pfns) -> None:
        if len(blocks) == 0:
            return
        heap = self._heaps[order]
        if len(blocks) < 16:
            for pfn in blocks.tolist():
                heapq.heappush(heap, pfn)
        else:
            heap += blocks.tolist()
            heapq.heapify(heap)

    def find_blocks(self) -> None:
        """Make the heaps anew from the frame table."""
        orders = self.frames.free_order[self.start : min(self.frontier, len(self.frames.free_order))]
        for order in range(MAX_ORDER + 1):
            self._heaps[order] = (np.flatnonzero(orders == order + 1) + self.start).tolist()

    # -- looking ---------------------------------------------------------------------------------------

    def free_counts(self) -> list[int]:
        """Free blocks by order, as /proc/buddyinfo has them."""
        touched = self.frames.free_order[self.start : self.frontier]
        counts = np.bincount(touched, minlength=MAX_ORDER + 2)[1:].tolist()
        counts[MAX_ORDER] += (self.end - self.frontier) // _BLOCK
        return [int(count) for count in counts]
