"""Operations on files of any file system: which room does them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.runs import runs
from pmcore.backends.sim.services import diskfile, readahead, shmem
from pmcore.backends.sim.services.pagecache import Inode, OpenFile
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns

__all__ = [
    "data_pages",
    "fallocate",
    "fill_holes",
    "get_page",
    "pread",
    "punch_hole",
    "pwrite",
    "truncate",
    "written",
]


def get_page(core: Core, inode: Inode, page: int) -> int:
    """The frame of a page of the file, up to date. Raises NoMemory."""
    return diskfile.get_page(core, inode, page) if inode.on_disk else shmem.get_page(core, inode, page)


def fill_holes(core: Core, inode: Inode, pages: Pfns) -> Pfns:
    """Frames for pages (ascending) that neither memory nor swap has; fewer than asked for when memory runs out."""
    return diskfile.read_in(core, inode, pages) if inode.on_disk else shmem.fill_holes(core, inode, pages)


def written(core: Core, inode: Inode, pages: Pfns, pfns: Pfns) -> None:
    """Pages of a file are about to be written through a shared mapping."""
    if inode.on_disk:
        diskfile.written(core, inode, pages, pfns)
    else:
        for _, where in runs(core.memory.whole_folios(pfns)):
            core.memory.frames.flags[where] |= np.uint64(PageFlag.DIRTY)


def data_pages(core: Core, inode: Inode, pages: Pfns) -> BoolArray:
    """Which pages (ascending) of a file hold data; those that fallocate only set aside do not."""
    if inode.on_disk:
        return diskfile.data_pages(core, inode, pages)
    words = inode.index.at(pages)
    found: BoolArray = words != 0
    present = (words & np.uint64(PRESENT)) != 0
    pfns = (words[present] & np.uint64(FIELD)).view(np.int64)
    found[present] = (core.memory.frames.flags[pfns] & np.uint64(PageFlag.UPTODATE)) != 0
    return found


def truncate(core: Core, inode: Inode, length: int) -> None:
    """Change the size."""
    (diskfile if inode.on_disk else shmem).truncate(core, inode, length)


def punch_hole(core: Core, inode: Inode, offset: int, length: int) -> None:
    """Make a hole."""
    (diskfile if inode.on_disk else shmem).punch_hole(core, inode, offset, length)


def fallocate(core: Core, inode: Inode, offset: int, length: int, *, keep_size: bool) -> None:
    """Set pages or blocks aside. Raises NoMemory."""
    (diskfile if inode.on_disk else shmem).fallocate(core, inode, offset, length, keep_size=keep_size)


def pwrite(core: Core, inode: Inode, data: bytes, offset: int) -> int:
    """Write bytes through the cache; how many: fewer than all before a poisoned page. Raises NoMemory."""
    if inode.on_disk:
        diskfile.pwrite(core, inode, data, offset)
        return len(data)
    return shmem.pwrite(core, inode, data, offset)


def pread(core: Core, file: OpenFile, length: int, offset: int) -> bytes | None:
    """Bytes of the file up to a poisoned page; None for one at once. Raises NoMemory."""
    if file.inode.on_disk:
        return diskfile.pread(core, file, length, offset, readahead.for_read)
    return shmem.pread(core, file.inode, length, offset)
