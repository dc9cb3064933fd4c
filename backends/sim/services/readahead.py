"""Readahead: pages of a file on a disk that are read because others near them were asked for.

How far is read is the disk's when a file is opened; each open file notes the window that it read last. The page that
begins the part of a window which nobody asked for is marked (RECLAIM, the same bit): who meets it has the next window
read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import numpy as np

from pmcore.backends.sim.services import diskfile
from pmcore.backends.sim.services.blocks import KIND, WRITTEN
from pmcore.backends.sim.services.pagecache import Inode, OpenFile
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["DISKS", "Disk", "for_fault", "for_read", "force", "met", "stops"]


@attrs.frozen
class Disk:
    """A disk, as readahead shows it."""

    #: Whether all has been read by the time that it was asked for; else a window that nobody waits for comes later.
    immediate: bool
    #: Pages that it takes in one request (max_sectors_kb).
    request: int


#: By their names: compressed memory (zram, max_sectors_kb is 124), and a disk (a loop device over a file: 1280).
DISKS = {"compressed": Disk(immediate=True, request=31), "disk": Disk(immediate=False, request=320)}
_MARK = int(PageFlag.RECLAIM)
#: Pages that the end of a window is a multiple of, where kernels see to that: one order for each window is two more.
_ALIGN = 4


def _read(
    core: Core,
    inode: Inode,
    first: int,
    count: int,
    ahead: int,
    around: Callable[[], object] | None = None,
    *,
    waits: bool = True,
) -> None:
    """Read what is missing of `count` pages, clipped to the file, and mark the one that the last `ahead` begin with.

    `around` is called when the pages are there that do not need the disk, and if who asks `waits`, also the others.
    """
    size = core.geometry.page_size
    count = min(count, -(-inode.size // size) - first)
    marked = first + count - ahead if 0 < ahead <= count else -1
    missing = np.flatnonzero(inode.index.load(first, max(count, 0)) == 0) + first
    parts = [missing]
    if not waits and not core.disk.immediate:
        slow = (inode.blocks.at(missing) & np.uint64(KIND)) == np.uint64(WRITTEN)
        parts = [missing[~slow], missing[slow]]
    for part in parts:
        pfns = diskfile.read_in(core, inode, part) if len(part) else part
        place = int(np.searchsorted(part, marked))
        if place < len(pfns) and part[place] == marked:
            core.memory.frames.flags_at[int(pfns[place])] |= _MARK
        if around is not None:
            around()
            around = None


def force(core: Core, inode: Inode, first: int, end: int, *, pages_ahead: int = 0) -> None:
    """Read a range, as far as one request reaches (MADV_WILLNEED, force_page_cache_ra)."""
    _read(core, inode, first, min(end - first, max(core.disk.request, pages_ahead)), 0)


# -- the window of an open file --------------------------------------------------------------------------


def _next_size(size: int, most: int) -> int:
    """How large the next window is (get_next_ra_size)."""
    if size < most // 16:
        return 4 * size
    return 2 * size if size <= most // 2 else most


def _first_size(asked: int, most: int) -> int:
    """How large the first window is (get_init_ra_size)."""
    size = 1 << (asked - 1).bit_length()
    if size <= most // 32:
        return size * 4
    return size * 2 if size <= most // 4 else most


def _most(core: Core, file: OpenFile, asked: int) -> int:
    if asked > file.pages_ahead and file.pages_ahead < core.disk.request:
        return min(asked, core.disk.request)
    return file.pages_ahead


def _missed(core: Core, file: OpenFile, page: int, asked: int) -> None:
    """Something sequential or not asks for `asked` pages, the first of which is not there (page_cache_sync_ra)."""
    inode = file.inode
    if not file.pages_ahead:
        _read(core, inode, page, 1, 0)
        return
    if file.random:
        force(core, inode, page, page + asked, pages_ahead=file.pages_ahead)
        return
    most = _most(core, file, asked)
    before = file.position >> core.geometry.page_shift  # -1: the page before the first
    if page == 0 or asked > most or 0 <= page - before <= 1:
        size = _first_size(asked, most)
        file.window = (page, size, size - asked if size > asked else size >> 1)
    else:
        known = inode.index.load(max(0, page - most), page - max(0, page - most)) != 0
        gaps = np.flatnonzero(~known[::-1])
        run = int(gaps[0]) if len(gaps) else len(known)
        if run == most:
            run -= 1
        if run <= asked:
            _read(core, inode, page, asked, 0)
            return
        if run == page:
            run *= 2  # cached from its start on
        file.window = (page, min(run + asked, most), 1)
    _read(core, inode, *file.window)


def met(
    core: Core,
    file: OpenFile,
    page: int,
    pfn: int,
    asked: int,
    around: Callable[[], object] = lambda: None,
) -> None:
    """Somebody met a marked page: the mark goes, the next window is read (page_cache_async_ra).

    `around` is called when of that those pages are there which do not need the disk.
    """
    if not file.pages_ahead:
        return
    core.memory.frames.flags_at[pfn] &= ~_MARK
    start, size, ahead = file.window
    most = _most(core, file, asked)
    if page == start + size - ahead:
        start, size = start + size, max(size, _next_size(size, most))
    else:
        words = file.inode.index.load(page + 1, most)
        gaps = np.flatnonzero(words == 0)
        if not len(gaps):
            around()
            return
        start = page + 1 + int(gaps[0])
        size = _next_size(start - page + asked, most)
    if core.caps.readahead_ends_aligned:
        align = min(_ALIGN, most & -most)
        if (start + size) & -align > start:
            size -= (start + size) % align
    file.window = (start, size, size)
    _read(core, file.inode, start, size, size, around, waits=False)


# -- who asks --------------------------------------------------------------------------------------------


def for_fault(
    core: Core, vma: VmArea, page: int, around: Callable[[], object], *, anew: bool = False
) -> None:
    """A fault at a page of the file: what it has read ahead. Then it is tried again: `around` maps what is there.

    A window beyond what was asked for is not there yet when that happens. `anew`: it is tried as if for the first time,
    and so meets a mark that it has put there itself.
    """
    file = vma.opened
    if file is None or not (file.pages_ahead or vma.flags & VmFlag.HUGEPAGE):
        return
    inode = file.inode
    if inode.index.get(page) & PRESENT:
        _meets(core, file, vma, page, around)
        return
    waits = inode.blocks.get(page) & KIND == WRITTEN
    if vma.flags & VmFlag.HUGEPAGE and core.caps.thp:
        block = core.geometry.pmd_pages
        size = block if vma.flags & VmFlag.RAND_READ else 2 * block
        file.window = (file.window[0], size, block)
        _read(core, inode, page & -block, size, block, around, waits=waits)
    elif vma.flags & VmFlag.RAND_READ:
        return
    elif vma.flags & VmFlag.SEQ_READ:
        _missed(core, file, page, file.pages_ahead)
        around()
    else:
        most = file.pages_ahead
        start = max(0, page - most // 2)
        file.window = (start, most, most // 4)
        _read(core, inode, *file.window, around, waits=waits)
    if waits and anew:
        _meets(core, file, vma, page, around)


def _meets(core: Core, file: OpenFile, vma: VmArea, page: int, around: Callable[[], object]) -> None:
    """A fault finds the page in the cache."""
    word = file.inode.index.get(page)
    pfn = word & FIELD
    if (
        word & PRESENT
        and file.pages_ahead
        and core.memory.frames.flags_at[pfn] & _MARK
        and not vma.flags & VmFlag.RAND_READ
    ):
        met(core, file, page, pfn, file.pages_ahead, around)


def for_read(core: Core, file: OpenFile, page: int, end: int) -> None:
    """read(2) wants the pages from `page` to `end`, and has come to the first: what that has read ahead."""
    at = file.inode.index
    word = at.get(page)
    if not word:
        _missed(core, file, page, end - page)
        word = at.get(page)
    if word & PRESENT and core.memory.frames.flags_at[word & FIELD] & _MARK:
        met(core, file, page, word & FIELD, end - page)


def stops(core: Core, vma: VmArea) -> bool:
    """Whether faults in the mapping may read ahead, so that one has to be handled after the other."""
    return vma.opened is not None and bool(vma.opened.pages_ahead or vma.flags & VmFlag.HUGEPAGE)
