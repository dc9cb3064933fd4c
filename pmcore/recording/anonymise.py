"""Frame numbers made strangers: a permutation of all frames that keeps compound pages together, in order and aligned.

Frames are taken in blocks of up to 2^18 (1 GiB of 4 KiB pages). Blocks change places, and within a block the two halves
of each aligned power of two change places or not, down to single frames, wherever no compound page spans both. Frame 0
stays, so that no other becomes it (a pagemap entry cannot name it), and so do the first block as a whole, what is left
behind the last whole block, and numbers past the end of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import U64Array
from pmcore.protocols import FrameFile, Kernel
from pmcore.uapi import PM_PFRAME_MASK, PM_PRESENT, PageFlag

__all__ = ["FrameShuffle"]

_BLOCK_ORDER = 18
#: Attempts at a first block in which a single frame comes to stand at 0.
_TRIES = 64
_HEAD, _TAIL = np.uint64(PageFlag.COMPOUND_HEAD), np.uint64(PageFlag.COMPOUND_TAIL)
_FIELD = np.uint64(PM_PFRAME_MASK)
_Index = NDArray[np.int64]


class FrameShuffle:
    """The permutation. It is made while `blocks` is read for the first time, which comes before all else.

    Takes 4 bytes a frame, 8 on machines of 2^32 frames and more.
    """

    def __init__(self, frames: int, rng: np.random.Generator) -> None:
        self.frames = frames
        self._rng = rng
        self._sources = self._places()
        self._made = False
        #: New number of each frame.
        self._new = np.arange(frames, dtype=np.uint32 if frames < 1 << 32 else np.uint64)

    def _places(self) -> list[tuple[int, int]]:
        """(first frame, order) of the block that comes to stand at each place, by place."""
        whole = self.frames >> _BLOCK_ORDER
        firsts = np.arange(whole)
        firsts[1:] = 1 + self._rng.permutation(max(whole - 1, 0))
        blocks = [(int(first) << _BLOCK_ORDER, _BLOCK_ORDER) for first in firsts]
        position = whole << _BLOCK_ORDER
        for order in range(_BLOCK_ORDER - 1, -1, -1):
            if (self.frames - position) >> order:
                blocks.append((position, order))
                position += 1 << order
        return blocks

    def blocks(self, kernel: Kernel, files: Sequence[FrameFile]) -> Iterator[dict[FrameFile, U64Array]]:
        """The words of `files` (kpageflags first, the first time) in the new order, block by block."""
        place = 0
        for first, order in self._sources:
            found = {}
            for file in files:
                words = np.zeros(1 << order, dtype=np.uint64)
                kernel.read_frames(file, first, words)
                part = slice(first, first + len(words))
                if not self._made and file is FrameFile.KPAGEFLAGS:
                    inside = self._block(words, order) if first else self._first_block(words, order)
                    self._new[part] = (place + inside).astype(self._new.dtype)
                out = np.empty_like(words)
                out[self._new[part].astype(np.int64) - place] = words
                found[file] = out
            place += 1 << order
            yield found
        self._made = True

    def entries(self, words: U64Array) -> None:
        """Give the present entries among pagemap `words` their new frame numbers, in place."""
        present = np.flatnonzero((words & np.uint64(PM_PRESENT)) != 0)
        pfns = words[present] & _FIELD
        inside = pfns < np.uint64(self.frames)
        present, pfns = present[inside], pfns[inside]
        words[present] = (words[present] & ~_FIELD) | self._new[pfns.astype(np.int64)].astype(np.uint64)

    def _block(self, words: U64Array, order: int) -> _Index:
        """Where in its block each frame goes."""
        spans = _orders(words)
        moved = np.zeros(len(words), dtype=np.int64)
        for level in range(1, order + 1):
            spans = spans.reshape(-1, 2).max(axis=1)
            flip = (spans < level) & self._rng.integers(0, 2, len(spans)).astype(np.bool_)
            moved |= np.repeat(flip.astype(np.int64) << (level - 1), 1 << level)
        found: _Index = np.arange(len(words), dtype=np.int64) ^ moved
        return found

    def _first_block(self, words: U64Array, order: int) -> _Index:
        """As `_block`, with frame 0 where it was."""
        if not words[0] & (_HEAD | _TAIL):
            for _ in range(_TRIES):
                inside = self._block(words, order)
                there = int(np.flatnonzero(inside == 0)[0])
                if not words[there] & (_HEAD | _TAIL):  # two single frames can change places freely
                    inside[there], inside[0] = inside[0], 0
                    return inside
        return np.arange(len(words), dtype=np.int64)


def _orders(words: U64Array) -> NDArray[np.uint8]:
    """Per frame, the order of the smallest aligned block that holds all of its compound page; 0 for a single one."""
    orders = np.zeros(len(words), dtype=np.uint8)
    tail = (words & _TAIL) != 0
    part = tail | ((words & _HEAD) != 0)
    # A compound page is a head and the tails behind it; tails without a head (a torn look) stay together, too.
    first = np.flatnonzero(part & ~(tail & np.append(False, part[:-1])))
    if not len(first):
        return orders
    end = np.flatnonzero(np.append(~(tail), True))
    last = end[np.searchsorted(end, first, side="right")] - 1
    order = np.frexp((first ^ last).astype(np.float64))[1]
    sizes = last - first + 1
    index = np.repeat(first - np.append(0, np.cumsum(sizes)[:-1]), sizes) + np.arange(int(sizes.sum()))
    orders[index] = np.repeat(order, sizes).astype(np.uint8)
    return orders
