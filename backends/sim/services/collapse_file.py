"""Collapsing pages of shared memory: one huge page in the cache in place of them, whoever maps them (collapse_file)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.backends.sim.services import pagecache, shmem, thp
from pmcore.backends.sim.virtual import filepmd, mapping
from pmcore.backends.sim.virtual.pte import FIELD, LEAF, PRESENT, TABLE
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries, swap_entries
from pmcore.errors import NotModelled
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.services.pagecache import Inode
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["collapse_range"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_UPTODATE = np.uint64(PageFlag.UPTODATE)


class _Failed(NamedTuple):
    """Why a block is not collapsed, and whether the blocks behind it are not tried."""

    errno: Errno
    stop: bool


def collapse_range(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> Errno | None:
    """MADV_COLLAPSE of whole blocks of a mapping of shared memory; the errno of the last that failed, or None."""
    size = core.geometry.pmd_size
    first, last = -(-start // size) * size, end // size * size
    if not _allowed(core, vma) or first > last:
        return Errno.EINVAL
    failed: Errno | None = None
    for addr in range(first, last, size):
        result = _one(core, mm, vma, addr)
        if result is not None:
            failed = result.errno
            if result.stop:
                break
    return failed


def _allowed(core: Core, vma: VmArea) -> bool:
    """Whether huge pages may be in the mapping at all: its last block is whole, and lies as the file's blocks do."""
    if vma.flags & VmFlag.NOHUGEPAGE:
        return False
    return vma.end >= core.geometry.pmd_size and filepmd.suits(core, vma, vma.end - core.geometry.pmd_size)


def _one(core: Core, mm: AddressSpace, vma: VmArea, addr: int) -> _Failed | None:
    """Collapse one block of the file, and map it here by a PMD."""
    assert vma.file is not None
    inode, pages = vma.file, core.geometry.pmd_pages
    first = vma.pgoff + (addr - vma.start >> core.geometry.page_shift)
    folio = filepmd.folio_at(core, vma, first)
    if folio is None or folio.pages != pages:
        failed = _gather(core, inode, first)
        if failed is not None:
            return failed
        if core.caps.collapse_retracts_all:
            _retract(core, inode, first)
        elif mm.tables.pte_slot(addr) < 0:
            return _Failed(Errno.EINVAL, stop=True)  # a page table is looked for in vain
    return _install(core, mm, vma, addr, first)


def _gather(core: Core, inode: Inode, first: int) -> _Failed | None:
    """One huge page in the cache instead of the block's pages, which nobody maps any more."""
    pages, frames = core.geometry.pmd_pages, core.memory.frames
    try:
        new = core.memory.folio(core.geometry.pmd_order, pagecache.NEW_SHMEM | thp.THP | int(PageFlag.DIRTY))
    except NoMemory:
        return _Failed(Errno.ENOMEM, stop=True)
    core.count("thp_collapse_alloc")
    failed = _read_back(core, inode, first)
    holes = inode.index.load(first, pages) == 0
    if failed is None and holes.all():
        failed = _Failed(Errno.EINVAL, stop=True)
    if failed is None and holes.any() and _missed(core, inode, first):
        failed = _Failed(Errno.EBUSY if core.caps.collapse_empty_busy else Errno.EINVAL, stop=True)
    if failed is not None:
        core.memory.free_folio(new)
        return failed
    words = inode.index.load(first, pages)
    old = (words[~holes] & _FIELD).view(np.int64)
    place = np.flatnonzero(~holes)
    frames.content[new.head + place] = frames.content[old]
    frames.content[old] = 0
    pagecache.remove(core, inode, first, first + pages)
    fresh = np.arange(new.head, new.head + pages, dtype=np.int64)
    pagecache.add_at(core, inode, np.arange(first, first + pages, dtype=np.int64), fresh)
    core.memory.on_lru(new.head, pages)
    core.count("collapse")
    return None


def _read_back(core: Core, inode: Inode, first: int) -> _Failed | None:
    """Have in memory, up to date and unmapped what the file has in the block: in its order, up to what cannot be."""
    pages, size = core.geometry.pmd_pages, core.geometry.page_size
    end = -(-inode.size // size)
    words = inode.index.load(first, pages)
    ready = (words & _PRESENT) != 0
    pfns = (words[ready] & _FIELD).view(np.int64)
    ready[ready] = (core.memory.frames.flags[pfns] & _UPTODATE) != 0
    swapped = swap_entries(words)
    for index in np.flatnonzero(~ready & (words != 0)).tolist():
        read = swapped[index] and core.swap.cached(int(words[index]) & FIELD) < 0
        try:
            there = first + index < end and _brought_in(core, inode, first + index)
        except NoMemory:
            there = False
        if not there:
            filepmd.unmap(core, inode, first, first + index)
            return _Failed(Errno.EINVAL, stop=True)
        if read and not core.caps.collapse_takes_swapped:
            filepmd.unmap(core, inode, first, first + index)
            return _Failed(Errno.EAGAIN, stop=False)
    filepmd.unmap(core, inode, first, first + pages)
    return None


def _brought_in(core: Core, inode: Inode, page: int) -> bool:
    while True:
        try:
            shmem.get_page(core, inode, page)
        except NoMemory:
            if not core.relieve(1):
                return False
        else:
            return True


def _mapped_by(core: Core, inode: Inode) -> list[tuple[AddressSpace, VmArea]]:
    return [(mm, vma) for mm in core.spaces.values() for vma in mm.vmas if vma.file is inode]


def _missed(core: Core, inode: Inode, first: int) -> bool:
    """Whether somebody is told of missing pages of the block, or of the one behind it."""
    if not core.caps.collapse_asks_userfaultfd:
        return False
    shift, end = core.geometry.page_shift, first + core.geometry.pmd_pages
    return any(
        vma.flags & VmFlag.UFFD_MISSING and vma.pgoff <= end and first < vma.pgoff + (vma.length >> shift)
        for _, vma in _mapped_by(core, inode)
    )


def _retract(core: Core, inode: Inode, first: int) -> None:
    """Free the empty page tables of the block, where it lies whole and there are no private copies, watches, guards."""
    size = core.geometry.pmd_size
    for mm, vma in _mapped_by(core, inode):
        addr = vma.start + (first - vma.pgoff << core.geometry.page_shift)
        if vma.anon_vma is not None or vma.flags & (VmFlag.UFFD_WP | VmFlag.MAYBE_GUARD) or addr % size:
            continue
        if vma.start <= addr and addr + size <= vma.end:
            _free_table(core, mm, addr)


def _free_table(core: Core, mm: AddressSpace, addr: int) -> None:
    slot = mm.tables.pmd_slot(addr)
    entry = core.pool.at[slot] if slot >= 0 else 0
    if entry & TABLE:
        core.pool.at[slot] = 0
        mm.tables.tables[0] -= 1
        core.pool.give_back([entry & FIELD])


def _install(core: Core, mm: AddressSpace, vma: VmArea, addr: int, first: int) -> _Failed | None:
    """Map the huge page of the cache by a PMD, instead of a page table that maps nothing else."""
    slot = mm.tables.pmd_slot(addr)
    entry = core.pool.at[slot] if slot >= 0 else 0
    if entry & LEAF:
        return None
    folio = filepmd.folio_at(core, vma, first)
    if vma.flags & VmFlag.UFFD_WP or folio is None:
        return _Failed(Errno.EINVAL, stop=False)
    if entry & TABLE:
        place = mm.tables.pte_slot(addr)
        entries = core.pool.flat[place : place + folio.pages]
        failed = _other(entries, folio.head)
        if failed is not None:
            return failed
        pfns = (entries[entries != 0] & _FIELD).view(np.int64)
        entries[:] = 0
        mapping.remove_pages(core, mm, vma, pfns)
        _free_table(core, mm, addr)
        folio = core.memory.large[folio.head]
    filepmd.map_pmd(core, mm, vma, addr, folio, write=False, writable=filepmd.may_write(core, vma))
    return None


def _other(entries: U64Array, head: int) -> _Failed | None:
    """What the table has that is not the page of the folio for that place; the first such entry decides."""
    if hwpoison_entries(entries).any():
        raise NotModelled("collapsing a block with poisoned pages")
    absent = (entries != 0) & ((entries & _PRESENT) == 0)
    wanted = np.arange(head, head + len(entries), dtype=np.uint64)
    others = ((entries & _PRESENT) != 0) & ((entries & _FIELD) != wanted)
    if not (absent | others).any():
        return None
    return _Failed(Errno.EINVAL, stop=bool(others[int(np.argmax(absent | others))]))
