"""Reclaiming pages of files on a disk: clean ones are dropped and remembered, dirty ones wait to be written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import CACHED, MOVED_YOUNG
from pmcore.backends.sim.services import pagecache, writeback
from pmcore.backends.sim.services.pagecache import Inode
from pmcore.backends.sim.virtual.mapping import MLOCKED
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, UFFD_MARKER, UFFD_WP
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.rmap import Mappings
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["drop", "evict", "page_out", "write_marked"]

_ALL = (1 << 64) - 1
_FIELD = np.uint64(FIELD)
_DIRTY, _ACTIVE, _REFERENCED = int(PageFlag.DIRTY), int(PageFlag.ACTIVE), int(PageFlag.REFERENCED)
_RECLAIM = int(PageFlag.RECLAIM)


def page_out(core: Core, vma: VmArea, inode: Inode, entries: U64Array, index: NDArray[np.intp]) -> None:
    """MADV_PAGEOUT of pages that `entries[index]` map, and nothing else.

    Every entry is emptied. Clean pages leave the cache; dirty ones stay, active, and marked to be reclaimed once they
    are written (rule DF-011).
    """
    frames = core.memory.frames
    pfns = (entries[index] & _FIELD).view(np.int64)
    frames.flags[pfns] &= np.uint64(~(_REFERENCED | MOVED_YOUNG) & _ALL)
    evictable = (frames.flags[pfns] & np.uint64(MLOCKED)) == 0
    index, pfns = index[evictable], pfns[evictable]
    old = entries[index]
    armed = bool(vma.flags & VmFlag.UFFD_WP)
    entries[index] = np.where(armed & ((old & np.uint64(UFFD_WP)) != 0), np.uint64(UFFD_MARKER), np.uint64(0))
    frames.mapcount[pfns] = 0
    told = pfns[(old & np.uint64(DIRTY)) != 0]
    frames.flags[told] = frames.flags[told] & np.uint64(~_RECLAIM & _ALL) | np.uint64(_DIRTY)
    dirty = (frames.flags[pfns] & np.uint64(_DIRTY)) != 0
    frames.flags[pfns[dirty]] |= np.uint64(_RECLAIM | _ACTIVE)
    core.memory.on_lru_pages(pfns[dirty])
    drop(core, inode, pfns[~dirty])


def evict(core: Core, pfns: Pfns, maps: Mappings) -> tuple[int, int]:
    """Take pages of files, whoever maps them, out of memory: (freed, kept) pages. `maps` holds all that maps them.

    As for `page_out`: the dirty ones lose their entries and stay.
    """
    frames, flat = core.memory.frames, core.pool.flat
    old = flat[maps.slots]
    flat[maps.slots] = 0
    for place in np.flatnonzero((old & np.uint64(UFFD_WP)) != 0).tolist():
        vma = maps.mms[int(maps.owners[place])].vmas.at(int(maps.addresses[place]))
        if vma is not None and vma.flags & VmFlag.UFFD_WP:
            flat[maps.slots[place]] = UFFD_MARKER
    frames.mapcount[pfns] = 0
    told = np.unique(maps.pfns[(old & np.uint64(DIRTY)) != 0])
    frames.flags[told] = frames.flags[told] & np.uint64(~_RECLAIM & _ALL) | np.uint64(_DIRTY)
    dirty = (frames.flags[pfns] & np.uint64(_DIRTY)) != 0
    frames.flags[pfns[dirty]] |= np.uint64(_RECLAIM | _ACTIVE)
    core.memory.on_lru_pages(pfns[dirty])
    clean = pfns[~dirty]
    owners = frames.owner[clean]
    for number in np.unique(owners).tolist():
        drop(core, core.inodes[number], clean[owners == number])
    return len(clean), int(dirty.sum())


def write_marked(core: Core) -> int:
    """Write out the dirty pages of all files that reclaim has marked, so that it finds them clean; how many."""
    frames = core.memory.frames
    want = np.uint64(CACHED | _DIRTY | _RECLAIM)
    marked = np.flatnonzero((frames.flags & want) == want)
    owners, done = frames.owner[marked], 0
    for number in np.unique(owners).tolist():
        pages = np.sort(frames.index[marked[owners == number]])
        for run in np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1):
            done += writeback.write_out(core, core.inodes[number], int(run[0]), int(run[-1]) + 1)
    return done


def drop(core: Core, inode: Inode, pfns: Pfns) -> None:
    """Take clean pages of one file, which nobody maps, out of the cache and free them; they are remembered."""
    if not len(pfns):
        return
    memory = core.memory
    pages = memory.frames.index[pfns]
    order = np.argsort(pages, kind="stable")
    pages, pfns = pages[order], pfns[order]
    inode.index.put(pages, np.zeros(len(pages), dtype=np.uint64))
    memory.age += len(pages)
    inode.shadows.put(pages, np.full(len(pages), memory.age + 1, dtype=np.uint64))
    pagecache.uncache(core, pfns)
    memory.free_pages(pfns)
    core.count("file_dropped", len(pfns))
