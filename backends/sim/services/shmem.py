"""shmem: memfd, tmpfs and shared anonymous memory. Its pages have no other home than memory and swap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services import pagecache, shmem_folio, swapping
from pmcore.backends.sim.services.pagecache import MANY, PIECE, Inode
from pmcore.backends.sim.virtual import accessed, zap
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns

__all__ = ["fallocate", "fill_holes", "get_page", "insert", "pread", "punch_hole", "pwrite", "truncate"]

_DIRTY, _UPTODATE = int(PageFlag.DIRTY), int(PageFlag.UPTODATE)
_REFERENCED, _HWPOISON = int(PageFlag.REFERENCED), int(PageFlag.HWPOISON)
_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)


def get_page(core: Core, inode: Inode, page: int, flags: int = pagecache.NEW_SHMEM) -> int:
    """The frame of a page of the file: there, swapped in, or made of zeros with `flags`. Raises NoMemory."""
    word = inode.index.get(page)
    if word & PRESENT:
        pfn = word & FIELD
        _set(core, pfn, _UPTODATE)  # set aside by fallocate: zeros from here on
        return pfn
    if word:
        return _swap_in(core, inode, page, word & FIELD)
    pfn = core.memory.page(flags)
    core.memory.on_lru(pfn)
    insert(core, inode, page, pfn)
    return pfn


def _set(core: Core, pfn: int, bits: int) -> None:
    """Set flags of the folio that a page belongs to."""
    frames = core.memory.frames
    if frames.flags_at[pfn] & COMPOUND:
        folio = core.memory.large[pfn - frames.behind_at[pfn]]
        frames.set_bits(folio.head, folio.pages, bits)
    else:
        frames.flags_at[pfn] |= bits


def _any_large(core: Core, words: U64Array) -> bool:
    """Whether large folios are among the pages of a run that are in memory."""
    if not core.memory.large or not words[0] & _PRESENT:
        return False
    pfns = (words & _FIELD).view(np.int64)
    return bool((core.memory.frames.flags[pfns] & np.uint64(COMPOUND)).any())


def insert(core: Core, inode: Inode, page: int, pfn: int) -> None:
    """The frame is that page of the file from here on."""
    frames = core.memory.frames
    frames.owner_at[pfn] = inode.number
    frames.index_at[pfn] = page
    inode.index.set(page, pfn | PRESENT)


def _swap_in(core: Core, inode: Inode, page: int, field: int) -> int:
    """Bring a page back: it is dirty, and its slot is free (shmem_swapin_folio)."""
    pfn = swapping.bring_in(core, field)
    core.swap.area(field).counts[field >> 5] -= 1
    core.swap.uncache(pfn)
    core.memory.frames.flags_at[pfn] |= CACHED | _DIRTY
    insert(core, inode, page, pfn)
    return pfn


def simple(core: Core, words: U64Array) -> bool:
    """Whether `swap_in_many` can take these swapped pages: slots of one area that nothing else names or caches."""
    if core.memory.grouped or core.ksm.nodes:
        return False
    fields = (words & _FIELD).view(np.int64)
    area, slots = core.swap.area(int(fields[0])), fields >> 5
    if ((fields & 0x1F) != area.number).any() or area.merged:
        return False
    return bool((area.counts[slots] == 1).all()) and not area.cached[slots].any()


def swap_in_many(core: Core, inode: Inode, pages: Pfns, words: U64Array) -> Pfns:
    """`get_page` for neighbouring pages that `simple` allows; fewer frames than asked for when memory runs out."""
    memory, fields = core.memory, (words & _FIELD).view(np.int64)
    area = core.swap.area(int(fields[0]))
    pfns = memory.pages(len(pages), pagecache.NEW_SHMEM | _DIRTY)
    slots, frames = fields[: len(pfns)] >> 5, memory.frames
    shadows, rows = area.shadow[slots], area.content[slots]
    recent = (shadows != 0) & (memory.age - (shadows - 1) <= memory.managed)
    frames.flags[pfns[recent]] |= np.uint64(PageFlag.ACTIVE)
    memory.on_lru_pages(pfns)
    frames.content[pfns] = rows
    area.shadow[slots] = area.content[slots] = area.counts[slots] = 0
    area.give_back(slots)
    pagecache.add_at(core, inode, pages[: len(pfns)], pfns)
    if len(pfns):
        core.count("swap_in", len(pfns))
    if not area.compressed:
        read = ~memory.contents.zero(rows) if core.caps.swap_zeromap else np.ones(len(pfns), dtype=np.bool_)
        if read.any():
            core.count("pswpin", int(np.count_nonzero(read)))
    return pfns


def fill_holes(core: Core, inode: Inode, pages: Pfns) -> Pfns:
    """Frames of zeros for pages of the file that are holes; fewer than asked for when memory runs out."""
    pfns = core.memory.pages(len(pages), pagecache.NEW_SHMEM)
    core.memory.on_lru_pages(pfns)
    pagecache.add_at(core, inode, pages[: len(pfns)], pfns)
    return pfns


# -- system calls ----------------------------------------------------------------------------------------


def pwrite(core: Core, inode: Inode, data: bytes, offset: int) -> int:
    """Write bytes through the cache; the file grows as far as they reach. Raises NoMemory with part of it done.

    How many were written: fewer than all before a poisoned page (rule HW-008).
    """
    size, frames, contents = core.geometry.page_size, core.memory.frames, core.memory.contents
    position, end = offset, offset + len(data)
    while position < end:
        page = position // size
        if not position & size - 1 and end - position >= MANY * size:
            done = _write_many(core, inode, page, memoryview(data)[position - offset :])
            if done:
                position += done * size
                continue
        stop = min(end, (position & -size) + size)
        there = inode.index.get(page)
        pfn = get_page(core, inode, page, pagecache.NEW_SHMEM | _REFERENCED)
        if frames.flags_at[pfn] & _HWPOISON:
            # Found, and so accessed, but on no list that it could be active on.
            frames.flags_at[pfn] = (frames.flags_at[pfn] ^ _REFERENCED) & ~int(PageFlag.IDLE)
            return position - offset
        if there:
            accessed.mark_one(core, pfn)
        row = frames.content_at[pfn]
        part = data[position - offset : stop - offset]
        frames.content_at[pfn] = contents.write(row, position & size - 1, part)
        _set(core, pfn, _DIRTY)
        inode.size = max(inode.size, stop)
        position = stop
    return len(data)


def _write_many(core: Core, inode: Inode, page: int, data: memoryview) -> int:
    """Write whole pages, as many as are of one sort from that one on. Raises NoMemory.

    0 where they lie in swap, are poisoned, or large folios are among them.
    """
    size, frames = core.geometry.page_size, core.memory.frames
    words = inode.index.load(page, min(len(data) // size, PIECE))
    count = pagecache.run(words)
    if _any_large(core, words[:count]):
        return 0
    pfns = (words[:count] & _FIELD).view(np.int64)
    if not words[0]:
        pfns = core.memory.pages(count, pagecache.NEW_SHMEM | _REFERENCED)
        core.memory.on_lru_pages(pfns)
        pagecache.add_at(core, inode, np.arange(page, page + len(pfns), dtype=np.int64), pfns)
    elif words[0] & _PRESENT:
        pfns = _sound(core, pfns)
        count = len(pfns)
        frames.flags[pfns] |= np.uint64(_UPTODATE)
        accessed.mark(core, pfns)
    else:
        return 0
    if len(pfns):
        rows = core.memory.contents.write_pages(frames.content[pfns], data[: len(pfns) * size])
        frames.content[pfns] = rows
        frames.flags[pfns] |= np.uint64(_DIRTY)
        inode.size = max(inode.size, (page + len(pfns)) * size)
    if len(pfns) < count:
        raise core.NoMemory
    return count


def _sound(core: Core, pfns: Pfns) -> Pfns:
    """Those before the first that is poisoned."""
    lost = (core.memory.frames.flags[pfns] & np.uint64(_HWPOISON)) != 0
    return pfns[: int(np.argmax(lost))] if lost.any() else pfns


def pread(core: Core, inode: Inode, length: int, offset: int) -> bytes | None:
    """Bytes of the file up to a poisoned page, None where there is one at once; holes read as zeros and stay holes."""
    size, frames = core.geometry.page_size, core.memory.frames
    end = min(offset + length, inode.size)
    pieces: list[bytes] = []
    position = offset
    while position < end:
        if not position & size - 1 and end - position >= MANY * size:
            words = inode.index.load(position // size, min((end - position) // size, PIECE))
            words = words[: pagecache.run(words)]
            if not words[0]:
                pieces.append(bytes(len(words) * size))
                position += len(words) * size
                continue
            pfns = (words & _FIELD).view(np.int64)
            whole = words[0] & _PRESENT and not _any_large(core, words)
            pfns = _sound(core, pfns) if whole else pfns[:0]
            if len(pfns):
                frames.flags[pfns] |= np.uint64(_UPTODATE)
                accessed.mark(core, pfns)
                pieces.append(pagecache.held(core, pfns))
                position += len(pfns) * size
                continue
        stop = min(end, (position & -size) + size)
        if inode.index.get(position // size):
            pfn = get_page(core, inode, position // size)
            if frames.flags_at[pfn] & _HWPOISON:
                return b"".join(pieces) if pieces else None
            behind = frames.behind_at[pfn] if core.caps.shmem_reads_folios else 0
            if not position & size - 1 and not behind:  # read from the beginning of the folio on
                accessed.mark_one(core, pfn)
            row = frames.content_at[pfn]
            pieces.append(core.memory.contents.read(row, position & size - 1, stop - position))
        else:
            pieces.append(bytes(stop - position))
        position = stop
    return b"".join(pieces)


def fallocate(core: Core, inode: Inode, offset: int, length: int, *, keep_size: bool) -> None:
    """Have pages for the range. Raises NoMemory with those that were made taken away again."""
    size = core.geometry.page_size
    made: list[tuple[int, int]] = []
    was, inode.fallocend = inode.fallocend, max(inode.fallocend, -(-(offset + length) // size))
    clock, count = core.memory.lru_clock, 0
    page, end = offset // size, -(-(offset + length) // size)
    while page < end:
        words = inode.index.load(page, min(end - page, PIECE))
        run = pagecache.run(words)
        if words[0] & _PRESENT:
            pfns = core.memory.whole_folios((words[:run] & _FIELD).view(np.int64))
            core.memory.frames.flags[pfns] |= np.uint64(
                _UPTODATE | _DIRTY
            )  # what was set aside before is zeros now
            page += run
            continue
        if words[0]:
            for place in range(page, page + run):
                get_page(core, inode, place)
            page += run
            continue
        got = _set_aside(core, inode, page, run)
        made.append((page, page + got))
        count += got
        if got < run:
            inode.fallocend = was
            for first, last in made:
                pagecache.remove(core, inode, first, last)
            if core.memory.lru_clock == clock + count:
                core.memory.lru_clock = clock  # nothing else has gone on a list meanwhile
            raise core.NoMemory
        page += run
    if not keep_size:
        inode.size = max(inode.size, offset + length)


def _set_aside(core: Core, inode: Inode, page: int, count: int) -> int:
    """Have frames for pages that are holes, which nobody has written; for how many memory sufficed."""
    memory, flags = core.memory, pagecache.NEW_SHMEM & ~_UPTODATE | _DIRTY
    if count == 1:
        try:
            get_page(core, inode, page, flags)
        except core.NoMemory:
            return 0
        return 1
    pfns = memory.pages(count, flags)
    memory.on_lru_pages(pfns)
    pagecache.add_at(core, inode, np.arange(page, page + len(pfns), dtype=np.int64), pfns)
    return len(pfns)


def truncate(core: Core, inode: Inode, length: int) -> None:
    """Change the size; what lay behind the new end is gone, and unmapped everywhere, private copies included."""
    size = core.geometry.page_size
    if length < inode.size:
        inode.size = length
        first = -(-length // size)
        zap.unmap_file(core, inode, first, 1 << 51, even_cows=True)
        inode.fallocend = min(inode.fallocend, first)
        shmem_folio.cut(core, inode, length, 1 << 63)
        pagecache.remove(core, inode, first, 1 << 51)
        if length % size:
            _zero(core, inode, length // size, length % size, size)
    inode.size = length


def punch_hole(core: Core, inode: Inode, offset: int, length: int) -> None:
    """Make a hole: whole pages are unmapped and freed, parts of pages zeroed; private copies stay."""
    size = core.geometry.page_size
    end = offset + length
    first, last = -(-offset // size), end // size
    if first < last:
        zap.unmap_file(core, inode, first, last, even_cows=False)
    if end < size:
        zap.unmap_file(core, inode, first, 1 << 51, even_cows=False)  # DV-029
    if first < inode.fallocend <= last:
        inode.fallocend = first
    shmem_folio.cut(core, inode, offset, end)
    if first < last:
        pagecache.remove(core, inode, first, last)
    if first > last:
        _zero(core, inode, last, offset % size, end % size)
        return
    if offset % size:
        _zero(core, inode, offset // size, offset % size, size)
    if end % size:
        _zero(core, inode, last, 0, end % size)


def _zero(core: Core, inode: Inode, page: int, low: int, high: int) -> None:
    """Zero part of a page, if there is one."""
    word = inode.index.get(page)
    if not word:
        return
    # What fallocate has set aside stays that; what lies in swap is brought back.
    pfn = word & FIELD if word & PRESENT else get_page(core, inode, page)
    frames = core.memory.frames
    if frames.content_at[pfn]:
        frames.content_at[pfn] = core.memory.contents.write(frames.content_at[pfn], low, bytes(high - low))
    _set(core, pfn, _DIRTY)
