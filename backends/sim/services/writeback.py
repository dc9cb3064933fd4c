"""Writing pages of files back to their disk, and dropping from the cache what is clean and unmapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services import blocks, lru, pagecache
from pmcore.backends.sim.services.pagecache import Inode
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT, WRITE
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns

__all__ = ["drop_caches", "invalidate", "sync", "write_out"]

_ALL = (1 << 64) - 1
_END = 1 << 51
#: So many pages without arrays.
_FEW = 1
_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_DIRTY, _ACTIVE, _RECLAIM = int(PageFlag.DIRTY), int(PageFlag.ACTIVE), int(PageFlag.RECLAIM)
_HWPOISON = int(PageFlag.HWPOISON)
_UNEVICTABLE, _REFERENCED = int(PageFlag.UNEVICTABLE), int(PageFlag.REFERENCED)


def _cached(core: Core, inode: Inode, first: int, end: int) -> tuple[Pfns, Pfns]:
    """Pages of a range that are in the cache, ascending, and their frames; none lie behind the end of the file."""
    end = min(end, -(-inode.size // core.geometry.page_size))
    pages, words = inode.index.used(first, max(first, end))
    present = (words & _PRESENT) != 0
    return pages[present], (words[present] & _FIELD).view(np.int64)


def write_out(core: Core, inode: Inode, first: int = 0, end: int = _END) -> int:
    """Write the dirty pages of a range to their blocks, and wait: clean afterwards, write-protected; how many."""
    if not inode.on_disk:
        return 0
    frames = core.memory.frames
    pages, pfns = _cached(core, inode, first, end)
    dirty = (frames.flags[pfns] & np.uint64(_DIRTY)) != 0
    pages, pfns = pages[dirty], pfns[dirty]
    if not len(pfns):
        return 0
    if len(pfns) <= _FEW:
        _write_one(core, inode, int(pages[0]), int(pfns[0]))
        return 1
    told = _clean_entries(core, inode, pages, pfns)
    frames.flags[pfns[told]] &= np.uint64(~_RECLAIM & _ALL)
    size = core.geometry.page_size
    if inode.size % size and int(pages[-1]) == inode.size // size:
        pfn = int(pfns[-1])  # what was written behind the end of the file stays behind
        if frames.content_at[pfn]:
            tail = bytes(size - inode.size % size)
            frames.content_at[pfn] = core.memory.contents.write(
                frames.content_at[pfn], inode.size % size, tail
            )
    blocks.store(core, inode, pages, pfns)
    flags = frames.flags[pfns]
    rotated = (flags & np.uint64(_RECLAIM)) != 0
    frames.flags[pfns] = flags & np.uint64(~(_DIRTY | _RECLAIM) & _ALL)
    rotated &= (flags & np.uint64(_UNEVICTABLE)) == 0
    if rotated.any():
        frames.flags[pfns[rotated]] &= np.uint64(~_ACTIVE & _ALL)
        lru.to_tail(core, pfns[rotated])
    core.count("written", len(pfns))
    return len(pfns)


def _write_one(core: Core, inode: Inode, page: int, pfn: int) -> None:
    """`write_out` of one page that is dirty."""
    frames, at, shift, told = core.memory.frames, core.pool.at, core.geometry.page_shift, False
    for mm in core.spaces.values():
        for vma in mm.vmas:
            if vma.file is not inode or not vma.flags & VmFlag.SHARED:
                continue
            addr = vma.start + (page - vma.pgoff << shift)
            slot = mm.tables.pte_slot(addr) if vma.start <= addr < vma.end else -1
            pte = at[slot] if slot >= 0 else 0
            if pte & PRESENT and pte & FIELD == pfn and pte & (DIRTY | WRITE):
                at[slot] = pte & ~(DIRTY | WRITE)
                told = True
    size = core.geometry.page_size
    if inode.size % size and page == inode.size // size and frames.content_at[pfn]:
        tail = bytes(size - inode.size % size)  # what was written behind the end of the file stays behind
        frames.content_at[pfn] = core.memory.contents.write(frames.content_at[pfn], inode.size % size, tail)
    blocks.store_one(core, inode, page, pfn)
    flags = frames.flags_at[pfn]
    frames.flags_at[pfn] = flags & ~(_DIRTY | _RECLAIM)
    if flags & _RECLAIM and not told and not flags & _UNEVICTABLE:
        frames.flags_at[pfn] &= ~_ACTIVE
        lru.to_tail(core, np.array([pfn], dtype=np.int64))
    core.count("written", 1)


def _clean_entries(core: Core, inode: Inode, pages: Pfns, pfns: Pfns) -> BoolArray:
    """Take dirty and write bits off all entries of shared mappings of these pages; which pages had any."""
    told: BoolArray = np.zeros(len(pages), dtype=np.bool_)
    shift, low, high = core.geometry.page_shift, int(pages[0]), int(pages[-1]) + 1
    for mm in core.spaces.values():
        for vma in mm.vmas:
            if vma.file is not inode or not vma.flags & VmFlag.SHARED:
                continue
            first, last = max(low - vma.pgoff, 0), min(high - vma.pgoff, vma.length >> shift)
            if first >= last:
                continue
            for extent in mm.tables.extents(vma.start + (first << shift), vma.start + (last << shift)):
                entries = extent.entries
                here = vma.pgoff + (extent.start - vma.start >> shift)
                lead, stop = np.searchsorted(pages, (here, here + len(entries))).tolist()
                place = pages[lead:stop] - here
                old = entries[place]
                mine = (old & _PRESENT) != 0
                mine &= (old & _FIELD).view(np.int64) == pfns[lead:stop]
                mine &= (old & np.uint64(DIRTY | WRITE)) != 0
                entries[place[mine]] &= np.uint64(~(DIRTY | WRITE) & _ALL)
                told[lead:stop] |= mine
    return told


def invalidate(core: Core, inode: Inode, first: int = 0, end: int = _END, *, keep: Pfns | None = None) -> int:
    """Drop what is clean and mapped nowhere of a range; how many pages. `keep`: frames that stay.

    What was reclaimed of the range is forgotten, what is dirty and mapped nowhere is marked to go once it is written.
    """
    frames = core.memory.frames
    if inode.on_disk:
        inode.shadows.clear(first, end)
        pages, pfns = _cached(core, inode, first, end)
    else:
        pages, words = inode.index.used(first, end)
        present = (words & _PRESENT) != 0
        pages, pfns = pages[present], (words[present] & _FIELD).view(np.int64)
    loose = (frames.mapcount[pfns] == 0) & ((frames.flags[pfns] & np.uint64(_HWPOISON)) == 0)
    for head in np.unique(
        (pfns - frames.behind[pfns])[(frames.flags[pfns] & np.uint64(COMPOUND)) != 0]
    ).tolist():
        folio = core.memory.large[head]
        if folio.mapped:
            loose[(pfns >= head) & (pfns < head + folio.pages)] = False
    dirty = (frames.flags[pfns] & np.uint64(_DIRTY)) != 0
    late = pfns[loose & dirty & ((frames.flags[pfns] & np.uint64(_UNEVICTABLE)) == 0)]
    if len(late):
        frames.flags[late] = frames.flags[late] & np.uint64(~(_ACTIVE | _REFERENCED) & _ALL) | np.uint64(
            _RECLAIM
        )
        core.memory.on_lru_pages(late[frames.behind[late] == 0])
    gone = loose & ~dirty
    if keep is not None:
        gone &= ~np.isin(pfns, keep)
    pages, pfns = pages[gone], pfns[gone]
    if len(pfns):
        inode.index.put(pages, np.zeros(len(pages), dtype=np.uint64))
        pagecache.uncache(core, pfns)
        core.memory.free_pages(pfns)
    return len(pfns)


def sync(core: Core) -> int:
    """sync(2): write out all files of the disk; how many pages."""
    return sum(write_out(core, inode) for inode in list(core.inodes.values()))


def drop_caches(core: Core) -> int:
    """Write 1 to drop_caches: what is clean and unmapped of all files goes, in memory, too; how many pages."""
    return sum(invalidate(core, inode) for inode in list(core.inodes.values()))


def dirty_pages(core: Core, inode: Inode, first: int, end: int) -> Pfns:
    """Frames of dirty pages of a range."""
    pfns = _cached(core, inode, first, end)[1]
    found: Pfns = pfns[(core.memory.frames.flags[pfns] & np.uint64(_DIRTY)) != 0]
    return found


__all__ += ["dirty_pages"]
