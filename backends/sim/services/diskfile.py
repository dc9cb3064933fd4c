"""Files on a disk: pages of the cache are read from blocks, and written back to them (see `writeback.py`).

What ext4 does without large folios: a page that was read in shows OWNER_2 (mapped to disk), one that was written, or
whose part was zeroed, has buffer heads (PRIVATE). A page that was written for the first time is delayed: it gets its
block when it is written back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.services import blocks, pagecache
from pmcore.backends.sim.services.blocks import DELAYED, KIND, UNWRITTEN, WRITTEN
from pmcore.backends.sim.services.pagecache import MANY, PIECE, Inode, OpenFile
from pmcore.backends.sim.virtual import accessed, zap
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns

__all__ = [
    "MAX_SIZE",
    "data_pages",
    "fallocate",
    "fill",
    "get_page",
    "pread",
    "punch_hole",
    "pwrite",
    "read_in",
    "truncate",
    "written",
    "written_one",
]

_ALL = (1 << 64) - 1
_DIRTY, _UPTODATE, _LRU = int(PageFlag.DIRTY), int(PageFlag.UPTODATE), int(PageFlag.LRU)
_ACTIVE, _REFERENCED, _RECLAIM = int(PageFlag.ACTIVE), int(PageFlag.REFERENCED), int(PageFlag.RECLAIM)
_PRIVATE, _ON_DISK, _IDLE = int(PageFlag.PRIVATE), int(PageFlag.OWNER_2), int(PageFlag.IDLE)
_FIELD, _PRESENT, _KIND = np.uint64(FIELD), np.uint64(PRESENT), np.uint64(KIND)
#: The greatest size of a file: 2**32 - 1 blocks.
MAX_SIZE = ((1 << 32) - 1) << 12


# -- pages of the cache ----------------------------------------------------------------------------------


def get_page(core: Core, inode: Inode, page: int) -> int:
    """The frame of a page of the file, up to date: there, or read from its block. Raises NoMemory."""
    word = inode.index.get(page)
    if word & PRESENT:
        pfn = word & FIELD
        if not core.memory.frames.flags_at[pfn] & _UPTODATE:
            _complete(core, inode, page, pfn)
        return pfn
    pages = np.array([page], dtype=np.int64)
    pfns = read_in(core, inode, pages)
    if not len(pfns):
        raise core.NoMemory
    return int(pfns[0])


def _complete(core: Core, inode: Inode, page: int, pfn: int) -> None:
    """Make a page up to date of which a part was zeroed before anybody had read it: its contents are right already."""
    kind = inode.blocks.get(page) & KIND
    core.memory.frames.flags_at[pfn] |= _UPTODATE | (_ON_DISK if kind in (WRITTEN, DELAYED) else 0)


def read_in(core: Core, inode: Inode, pages: Pfns) -> Pfns:
    """Frames for pages (ascending) that are not in the cache, with what their blocks hold; fewer without memory.

    What was reclaimed not long ago is active (rule DF-010).
    """
    memory = core.memory
    frames = memory.frames
    pfns = memory.pages(len(pages), _UPTODATE | _LRU | CACHED)
    pages = pages[: len(pfns)]
    words = inode.blocks.at(pages)
    there = (words & _KIND) == np.uint64(WRITTEN)
    frames = memory.frames
    if there.any():
        frames.flags[pfns[there]] |= np.uint64(_ON_DISK)
        rows = blocks.rows(words[there])
        if rows.any():
            frames.content[pfns[there]] = memory.contents.copies(rows)
    shadows = inode.shadows.at(pages) if inode.shadows.pieces else None
    if shadows is not None and shadows.any():
        recent = (shadows != 0) & (memory.age + 1 - shadows.astype(np.int64) <= memory.managed)
        frames.flags[pfns[recent]] |= np.uint64(_ACTIVE)
        memory.age += int(recent.sum())
        inode.shadows.put(pages, np.zeros(len(pages), dtype=np.uint64))
        core.count("refault", int(recent.sum()))
    memory.on_lru_pages(pfns)
    pagecache.add_at(core, inode, pages, pfns)
    core.count("read_in", len(pfns))
    return pfns


def fill(core: Core, inode: Inode, first: int, words: object) -> None:
    """Put a new file's contents into its blocks: one row of contents a page, none of it cached."""
    inode.blocks.store(first, np.asarray(words, dtype=np.uint64) | np.uint64(WRITTEN))


def _new(core: Core, inode: Inode, page: int, flags: int) -> int:
    """A frame for a page that is to be written, not up to date: its block's data, or zeros. Raises NoMemory."""
    memory = core.memory
    pfn = memory.page(flags | _LRU | CACHED)
    frames = memory.frames
    word = inode.blocks.get(page)
    row = word & blocks.ROW
    if row:
        frames.content_at[pfn] = memory.contents.copy_one(row)
    memory.on_lru(pfn)
    frames.owner_at[pfn] = inode.number
    frames.index_at[pfn] = page
    inode.index.set(page, pfn | PRESENT)
    if inode.shadows.pieces:
        inode.shadows.set(page, 0)
    return pfn


def written(core: Core, inode: Inode, pages: Pfns, pfns: Pfns) -> None:
    """Pages of a shared mapping become writable (page_mkwrite): DIRTY, with buffers, and with room on the disk."""
    frames = core.memory.frames
    flags = frames.flags[pfns]
    frames.flags[pfns] = flags & np.uint64(~_RECLAIM & _ALL) | np.uint64(_DIRTY | _PRIVATE)
    _delay(inode, pages)


def written_one(core: Core, inode: Inode, page: int, pfn: int) -> None:
    """`written` for one page."""
    flags_at = core.memory.frames.flags_at
    flags_at[pfn] = flags_at[pfn] & ~_RECLAIM | _DIRTY | _PRIVATE
    if not inode.blocks.get(page):
        inode.blocks.set(page, DELAYED)


def _delay(inode: Inode, pages: Pfns) -> None:
    holes = pages[inode.blocks.at(pages) == 0]
    if len(holes):
        inode.blocks.put(holes, np.full(len(holes), DELAYED, dtype=np.uint64))


def data_pages(core: Core, inode: Inode, pages: Pfns) -> BoolArray:
    """Which pages (ascending) hold data: written or to be written; set aside, those that the cache has up to date."""
    kinds = inode.blocks.at(pages) & _KIND
    found: BoolArray = (kinds == np.uint64(WRITTEN)) | (kinds == np.uint64(DELAYED))
    aside = np.flatnonzero(kinds == np.uint64(UNWRITTEN))
    if len(aside):
        words = inode.index.at(pages[aside])
        cached = (words & _PRESENT) != 0
        pfns = (words[cached] & _FIELD).view(np.int64)
        cached[cached] = (core.memory.frames.flags[pfns] & np.uint64(_UPTODATE)) != 0
        found[aside] = cached
    return found


# -- system calls ----------------------------------------------------------------------------------------


def pwrite(core: Core, inode: Inode, data: bytes, offset: int) -> None:
    """Write bytes into the cache; the file grows as far as they reach. Raises NoMemory with part of it done."""
    size, contents = core.geometry.page_size, core.memory.contents
    position, end, old = offset, offset + len(data), inode.size
    while position < end:
        page = position // size
        if offset < position and not position & size - 1 and end - position >= MANY * size:
            position += size * _write_many(core, inode, page, memoryview(data)[position - offset :])
            continue
        stop = min(end, (position & -size) + size)
        word = inode.index.get(page)
        pfn = word & FIELD if word & PRESENT else _new(core, inode, page, 0)
        frames = core.memory.frames
        part = data[position - offset : stop - offset]
        frames.content_at[pfn] = contents.write(frames.content_at[pfn], position & size - 1, part)
        frames.flags_at[pfn] = frames.flags_at[pfn] & ~_IDLE | _DIRTY | _PRIVATE | _UPTODATE
        if not inode.blocks.get(page):
            inode.blocks.set(page, DELAYED)
        inode.size = max(inode.size, stop)
        if position == offset > old and core.caps.extending_zeroes:
            _zero_parts(core, inode, old, offset)
        position = stop


def _write_many(core: Core, inode: Inode, page: int, data: memoryview) -> int:
    """Write whole pages, as many as are in the cache from that one on, or are not. Raises NoMemory."""
    size, memory = core.geometry.page_size, core.memory
    words = inode.index.load(page, min(len(data) // size, PIECE))
    count = pagecache.run(words)
    pfns = (words[:count] & _FIELD).view(np.int64)
    if not words[0]:
        pfns = memory.pages(count, _LRU | CACHED)
        memory.on_lru_pages(pfns)
        pages = np.arange(page, page + len(pfns), dtype=np.int64)
        memory.frames.content[pfns] = memory.contents.copies(blocks.rows(inode.blocks.at(pages)))
        pagecache.add_at(core, inode, pages, pfns)
        if inode.shadows.pieces:
            inode.shadows.put(pages, np.zeros(len(pages), dtype=np.uint64))
    frames = memory.frames
    if len(pfns):
        frames.content[pfns] = memory.contents.write_pages(frames.content[pfns], data[: len(pfns) * size])
        kept = frames.flags[pfns] & np.uint64(~_IDLE & _ALL)
        frames.flags[pfns] = kept | np.uint64(_DIRTY | _PRIVATE | _UPTODATE)
        _delay(inode, np.arange(page, page + len(pfns), dtype=np.int64))
        inode.size = max(inode.size, (page + len(pfns)) * size)
    if len(pfns) < count:
        raise core.NoMemory
    return count


def pread(
    core: Core,
    file: OpenFile,
    length: int,
    offset: int,
    ahead: Callable[[Core, OpenFile, int, int], object],
) -> bytes:
    """Bytes of the file; what is read is in the cache afterwards, holes too. `ahead`: see `readahead.for_read`."""
    inode, size = file.inode, core.geometry.page_size
    end, wanted = min(offset + length, inode.size), -(-(offset + length) // size)
    pieces, position, last = [], offset, file.position
    while position < end:
        page = position // size
        many = page != (last - 1) // size and not position & size - 1 and end - position >= MANY * size
        if file.pages_ahead or not many:
            ahead(core, file, page, wanted)
        if many:
            pfns = _read_many(core, file, page, (end - position) // size)
            if len(pfns):
                accessed.mark(core, pfns)
                pieces.append(pagecache.held(core, pfns))
                position = last = position + len(pfns) * size
                continue
        stop = min(end, (position & -size) + size)
        pfn = get_page(core, inode, page)
        if page != (last - 1) // size:
            accessed.mark_one(core, pfn)
        row = core.memory.frames.content_at[pfn]
        pieces.append(core.memory.contents.read(row, position & size - 1, stop - position))
        position = last = stop
    file.position = last
    return b"".join(pieces)


def _read_many(core: Core, file: OpenFile, page: int, count: int) -> Pfns:
    """Frames of pages from that one on that are all up to date, or not in the cache and read now: none reads ahead."""
    inode, flags = file.inode, core.memory.frames.flags
    words = inode.index.load(page, min(count, PIECE))
    words = words[: pagecache.run(words)]
    if not words[0]:
        if file.pages_ahead:
            return np.zeros(0, dtype=np.int64)
        pages = np.arange(page, page + len(words), dtype=np.int64)
        pfns = read_in(core, inode, pages)
        if len(pfns) < len(pages):
            raise core.NoMemory
        return pfns
    pfns = (words & _FIELD).view(np.int64)
    odd = (flags[pfns] & np.uint64(_UPTODATE | _RECLAIM)) != np.uint64(_UPTODATE)
    return pfns[: int(np.argmax(odd))] if odd.any() else pfns


def fallocate(core: Core, inode: Inode, offset: int, length: int, *, keep_size: bool) -> None:
    """Set blocks aside for the range, one run of blocks of a sort after the other.

    Where the file grows, with each run the rest of the block where it ended is zeroed, and the start of its last one.
    """
    size, old = core.geometry.page_size, inode.size
    first, end = offset // size, -(-(offset + length) // size)
    words = inode.blocks.load(first, end - first)
    kinds = words & _KIND
    missing = (kinds == 0) | (kinds == np.uint64(DELAYED))
    words[missing] = UNWRITTEN
    inode.blocks.store(first, words)
    if keep_size or offset + length <= old:
        return
    kinds[missing] = 0
    for stop in (*(np.flatnonzero(np.diff(kinds)) + first + 1).tolist(), end):
        reached = min(stop * size, offset + length)
        inode.size = max(inode.size, reached)
        if reached > old and core.caps.extending_zeroes:
            _zero_parts(core, inode, old, reached)


def truncate(core: Core, inode: Inode, length: int) -> None:
    """Change the size; what lay behind the new end is gone, and unmapped everywhere, private copies included."""
    size, old = core.geometry.page_size, inode.size
    if length > old:
        if old % size and core.caps.extending_zeroes:
            _zero_block(core, inode, old // size, old % size, size)
        inode.size = length
        return
    inode.size = length
    first = -(-length // size)
    zap.unmap_file(core, inode, first, 1 << 51, even_cows=True)
    pagecache.remove(core, inode, first, 1 << 51)
    if length % size:
        _cut(core, inode, length // size, length % size, size)
    blocks.clear(core, inode, first, 1 << 51)
    if length % size:
        _zero_block(core, inode, length // size, length % size, size)


def punch_hole(core: Core, inode: Inode, offset: int, length: int) -> None:
    """Make a hole: whole pages are unmapped and freed, parts of pages zeroed; private copies stay."""
    size = core.geometry.page_size
    if offset >= inode.size:
        return
    end = min(offset + length, -(-inode.size // size) * size)
    first, last = -(-offset // size), end // size
    if first < last:
        zap.unmap_file(core, inode, first, last, even_cows=False)
        pagecache.remove(core, inode, first, last)
    if core.caps.punch_cuts_pages:
        _cut_hole(core, inode, offset, end)
    _zero_parts(core, inode, offset, end)
    if first < last:
        blocks.clear(core, inode, first, last)


# -- parts of pages --------------------------------------------------------------------------------------


def _cut_hole(core: Core, inode: Inode, offset: int, end: int) -> None:
    """Take the parts of pages at both ends of a hole out of the cache (truncate_pagecache_range)."""
    size = core.geometry.page_size
    first, last = -(-offset // size), end // size
    if end < size:
        zap.unmap_file(core, inode, first, 1 << 51, even_cows=False)  # DV-029
    if first > last:
        _cut(core, inode, last, offset % size, end % size)
        return
    if offset % size:
        _cut(core, inode, offset // size, offset % size, size)
    if end % size:
        _cut(core, inode, last, 0, end % size)


def _cut(core: Core, inode: Inode, page: int, low: int, high: int) -> None:
    """Zero part of a page if it is in the cache (truncate_inode_partial_folio)."""
    word = inode.index.get(page)
    if not word & PRESENT:
        return
    pfn, frames = word & FIELD, core.memory.frames
    _zero(core, pfn, low, high)
    if frames.flags_at[pfn] & _PRIVATE and core.caps.partial_invalidate_unmaps:
        frames.flags_at[pfn] &= ~_ON_DISK


def _zero(core: Core, pfn: int, low: int, high: int) -> None:
    frames = core.memory.frames
    if frames.content_at[pfn]:
        frames.content_at[pfn] = core.memory.contents.write(frames.content_at[pfn], low, bytes(high - low))


def _zero_parts(core: Core, inode: Inode, start: int, end: int) -> None:
    """Zero the parts of blocks at both ends of a range (ext4_zero_partial_blocks)."""
    size = core.geometry.page_size
    if start // size == (end - 1) // size:
        if start % size or end % size:
            _zero_block(core, inode, start // size, start % size, (end - 1) % size + 1)
        return
    if start % size:
        _zero_block(core, inode, start // size, start % size, size)
    if end % size:
        _zero_block(core, inode, end // size, 0, end % size)


def _zero_block(core: Core, inode: Inode, page: int, low: int, high: int) -> None:
    """Zero part of a block by way of the cache: the page is there afterwards, accessed, and DIRTY unless it is a hole.

    A page that was not there is read as far as needed, and not up to date.
    """
    word = inode.index.get(page)
    if word & PRESENT:
        pfn = word & FIELD
        accessed.mark_one(core, pfn)
    else:
        pfn = _new(core, inode, page, _REFERENCED)
    frames = core.memory.frames
    frames.flags_at[pfn] |= _PRIVATE
    kind = inode.blocks.get(page) & KIND
    if kind in (WRITTEN, DELAYED) or (kind == UNWRITTEN and frames.flags_at[pfn] & _DIRTY):
        _zero(core, pfn, low, high)
        frames.flags_at[pfn] |= _DIRTY
