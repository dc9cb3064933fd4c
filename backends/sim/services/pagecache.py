"""Inodes and their page cache: which frame, or which swap slot, holds each page of a file.

An inode's *index* is the kernel's i_pages as arrays: one word a page, in the form of a PTE: PRESENT and a frame, SWAP
and a slot (shmem only), or 0 for a hole. A page in the cache owns its contents; the frame table names inode and page in
turn.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs
import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.physical.runs import runs
from pmcore.backends.sim.services import blocks
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT
from pmcore.backends.sim.virtual.tables import FEW
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = [
    "MANY",
    "NEW_SHMEM",
    "PIECE",
    "FileSystem",
    "Index",
    "Inode",
    "OpenFile",
    "add_at",
    "held",
    "make",
    "put",
    "remove",
    "remove_poisoned",
    "run",
    "uncache",
]

#: Pages of one piece of an index.
_SHIFT = 12
_PIECE = 1 << _SHIFT
_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
#: From so many whole pages on, system calls take them at once; at most so many.
MANY, PIECE = 8, 1 << 13
_HWPOISON = int(PageFlag.HWPOISON)
#: What a page of shmem shows when a fault has made it.
NEW_SHMEM = int(PageFlag.UPTODATE | PageFlag.LRU | PageFlag.SWAPBACKED) | CACHED


class FileSystem(enum.StrEnum):
    """What an inode lies on."""

    SHMEM = "shmem"
    #: On a disk, with buffer heads (ext4).
    EXT4 = "ext4"


class Index:
    """Words by page offset, in pieces that are there as far as something was stored in them."""

    def __init__(self) -> None:
        self.pieces: dict[int, U64Array] = {}

    def get(self, page: int) -> int:
        """The word of one page."""
        piece = self.pieces.get(page >> _SHIFT)
        return 0 if piece is None else piece.item(page & _PIECE - 1)

    def at(self, pages: Pfns) -> U64Array:
        """The words of pages, ascending, that need not be neighbours."""
        if len(pages) and int(pages[-1]) - int(pages[0]) == len(pages) - 1:
            return self.load(int(pages[0]), len(pages))
        words = np.zeros(len(pages), dtype=np.uint64)
        numbers = pages >> _SHIFT
        for number in np.unique(numbers).tolist():
            piece = self.pieces.get(number)
            if piece is not None:
                low, high = np.searchsorted(numbers, (number, number + 1)).tolist()
                words[low:high] = piece[pages[low:high] & (_PIECE - 1)]
        return words

    def set(self, page: int, word: int) -> None:
        """Store the word of one page."""
        self._piece(page >> _SHIFT)[page & _PIECE - 1] = word

    def _piece(self, number: int) -> U64Array:
        piece = self.pieces.get(number)
        if piece is None:
            piece = self.pieces[number] = np.zeros(_PIECE, dtype=np.uint64)
        return piece

    def load(self, first: int, count: int) -> U64Array:
        """A copy of the words of `count` pages."""
        words = np.zeros(count, dtype=np.uint64)
        for number, part, place in self._parts(first, count):
            piece = self.pieces.get(number)
            if piece is not None:
                words[place] = piece[part]
        return words

    def store(self, first: int, words: U64Array) -> None:
        """Store the words of neighbouring pages."""
        for number, part, place in self._parts(first, len(words)):
            self._piece(number)[part] = words[place]

    def put(self, pages: Pfns, words: U64Array) -> None:
        """Store the words of pages, ascending, that need not be neighbours."""
        if len(pages) and int(pages[-1]) - int(pages[0]) == len(pages) - 1:
            self.store(int(pages[0]), words)
            return
        numbers = pages >> _SHIFT
        for number in np.unique(numbers).tolist():
            low, high = np.searchsorted(numbers, (number, number + 1)).tolist()
            self._piece(number)[pages[low:high] & (_PIECE - 1)] = words[low:high]

    @staticmethod
    def _parts(first: int, count: int) -> Iterator[tuple[int, slice, slice]]:
        position = first
        while position < first + count:
            number, low = position >> _SHIFT, position & _PIECE - 1
            size = min(_PIECE - low, first + count - position)
            yield number, slice(low, low + size), slice(position - first, position - first + size)
            position += size

    def used(self, first: int = 0, end: int = 1 << 62) -> tuple[Pfns, U64Array]:
        """Offsets, ascending, and words of the pages from `first` to `end` that are no holes."""
        numbers = range(first >> _SHIFT, (end - 1 >> _SHIFT) + 1)
        there = list(numbers) if len(numbers) <= len(self.pieces) else sorted(self.pieces)
        pages, words = [], []
        for number in there:
            piece = self.pieces.get(number)
            if piece is None or number not in numbers:
                continue
            base = number << _SHIFT
            low, high = max(first - base, 0), min(end - base, _PIECE)
            places = piece[low:high].nonzero()[0] + low
            pages.append(places + base)
            words.append(piece[places])
        if len(pages) == 1:
            return pages[0], words[0]
        none = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
        return np.concatenate([none[0], *pages]), np.concatenate([none[1], *words])

    def clear(self, first: int, end: int) -> None:
        """Make holes of all pages from `first` to `end`."""
        self.cut(first, end)

    def cut(self, first: int, end: int) -> U64Array:
        """Make holes of all pages from `first` to `end`; the words, by offset, of those that were none."""
        if not self.pieces or (end == first + 1 and not self.get(first)):
            return np.zeros(0, dtype=np.uint64)
        numbers = range(first >> _SHIFT, (end - 1 >> _SHIFT) + 1)
        there = list(numbers) if len(numbers) <= len(self.pieces) else sorted(self.pieces)
        words = [np.zeros(0, dtype=np.uint64)]
        for number in there:
            piece = self.pieces.get(number)
            if piece is None or number not in numbers:
                continue
            base = number << _SHIFT
            low, high = max(first - base, 0), min(end - base, _PIECE)
            part = piece[low:high]
            words.append(part.copy() if part.all() else part[part != 0])
            part[:] = 0
            if high - low == _PIECE or not piece.any():
                del self.pieces[number]
        return np.concatenate(words) if len(words) != 2 else words[1]


@attrs.define(slots=True, eq=False)
class Inode:
    """A file: its size in bytes and its pages."""

    number: int
    kind: FileSystem
    #: As maps shows it.
    name: str
    size: int = 0
    #: Of shmem: behind which page nothing was set aside by fallocate.
    fallocend: int = 0
    index: Index = attrs.field(factory=Index)
    #: Of a file on a disk: what lies in its blocks, see `blocks.py`, and when pages were reclaimed (plus 1).
    blocks: Index = attrs.field(factory=Index)
    shadows: Index = attrs.field(factory=Index)

    @property
    def on_disk(self) -> bool:
        """Whether its pages have a home besides memory and swap."""
        return self.kind is not FileSystem.SHMEM


@attrs.define(slots=True, eq=False)
class OpenFile:
    """What a descriptor stands for; shared by the tasks that inherited it."""

    inode: Inode
    #: Where the last read(2) ended: the page before it is not noted as accessed again. -1: nothing was read.
    position: int = -1
    #: Pages that are read ahead at most; whether none are, because accesses are random.
    pages_ahead: int = 0
    random: bool = False
    #: What was read ahead last: the first page, how many, and how many of them nobody had asked for.
    window: tuple[int, int, int] = (0, 0, 0)


def make(core: Core, kind: FileSystem, name: str, size: int) -> Inode:
    """A new file, which is gone once nothing refers to it (`put`)."""
    inode = Inode(core.number("inode"), kind, name, size)
    core.inodes[inode.number] = inode
    return inode


def put(core: Core, inode: Inode) -> None:
    """Somebody refers to the file no more: without any mapping or descriptor left it is gone, with its pages."""
    for mm in core.spaces.values():
        if any(vma.file is inode for vma in mm.vmas):
            return
        if any(isinstance(file, OpenFile) and file.inode is inode for file in mm.files.values()):
            return
    if inode.number in core.names.values():
        return  # it has a name on the disk
    remove(core, inode, 0, 1 << 62)
    if inode.on_disk:
        blocks.clear(core, inode, 0, 1 << 62)
    core.inodes.pop(inode.number, None)


def run(words: U64Array) -> int:
    """How many of the words of an index, from the first on, are of its sort: holes, pages in memory, pages in swap."""
    sorts = words >> np.uint64(62)
    other = sorts != sorts[0]
    return int(np.argmax(other)) if other.any() else len(words)


def add_at(core: Core, inode: Inode, pages: Pfns, pfns: Pfns) -> None:
    """Put frames into the cache as these pages (ascending), which are holes. Their flags hold CACHED already."""
    frames = core.memory.frames
    for part, where in runs(pfns):
        frames.owner[where] = inode.number
        frames.index[where] = pages[part]
    inode.index.put(pages, pfns.view(np.uint64) | _PRESENT)


def held(core: Core, pfns: Pfns) -> bytes:
    """What whole pages hold."""
    out = np.empty(len(pfns) * core.geometry.page_size, dtype=np.uint8)
    core.memory.contents.read_pages(core.memory.frames.content[pfns], out)
    return out.tobytes()


def uncache(core: Core, pfns: Pfns) -> None:
    """Take frames out of their inode's cache; the words of the index are the caller's."""
    frames = core.memory.frames
    for _, where in runs(pfns):
        frames.owner[where] = 0
        frames.index[where] = 0
        frames.flags[where] &= np.uint64(~CACHED & (1 << 64) - 1)


def remove(core: Core, inode: Inode, first: int, end: int) -> None:
    """Make holes of the pages from `first` to `end`, none of which is mapped: frames and swap slots are freed."""
    words = inode.index.cut(first, end)
    if len(words) <= FEW and not core.memory.large:
        for word in words.tolist():
            _remove_one(core, word)
        return
    present = words if np.bitwise_and.reduce(words) & _PRESENT else words[(words & _PRESENT) != 0]
    pfns = (present & _FIELD).view(np.int64)
    if len(pfns):
        uncache(core, pfns)
        poisoned = (core.memory.frames.flags[pfns] & np.uint64(_HWPOISON)) != 0
        if poisoned.any():  # out of use for good
            core.memory.frames.flags[pfns[poisoned]] &= ~np.uint64(PageFlag.DIRTY)
        core.memory.free_any(pfns[~poisoned] if poisoned.any() else pfns)
    if len(pfns) < len(words):
        core.swap.release(words[(words & _PRESENT) == 0] & _FIELD)


def remove_poisoned(core: Core, pfn: int) -> None:
    """Make a hole of a page of a disk's file that nobody maps, without remembering it: its frame is out of use."""
    frames = core.memory.frames
    core.inodes[frames.owner_at[pfn]].index.set(frames.index_at[pfn], 0)
    frames.owner_at[pfn] = frames.index_at[pfn] = 0
    frames.flags_at[pfn] &= ~(CACHED | int(PageFlag.OWNER_2 | PageFlag.PRIVATE))


def _remove_one(core: Core, word: int) -> None:
    """Free the frame, or the slot, that was a page of a file."""
    if word & PRESENT:
        pfn, frames = word & FIELD, core.memory.frames
        frames.owner_at[pfn] = frames.index_at[pfn] = 0
        frames.flags_at[pfn] &= ~CACHED
        if frames.flags_at[pfn] & _HWPOISON:  # out of use for good
            frames.flags_at[pfn] &= ~int(PageFlag.DIRTY)
        else:
            core.memory.free(pfn)
    else:
        core.swap.release(np.array([word & FIELD], dtype=np.uint64))
