"""Huge pages of a file's cache in page tables: mapping one by a PMD, letting go of that PMD, many PTEs at one fault.

A PMD that maps a file's huge page is never made PTEs of: what needs those drops the PMD, for faults find it all again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.virtual import mapping
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, LEAF, PRESENT, UFFD_MARKER, UFFD_WP, WRITE, YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.folios import LargeFolio
    from pmcore.backends.sim.services.pagecache import Inode
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = [
    "any_large",
    "drop",
    "drop_range",
    "folio_at",
    "map_pmd",
    "may_write",
    "place_of",
    "suits",
    "unmap",
]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)


def suits(core: Core, vma: VmArea, addr: int) -> bool:
    """Whether a PMD may map the block around the address: it lies in the VMA, and where blocks of the file begin."""
    size, shift = core.geometry.pmd_size, core.geometry.page_shift
    start = addr & -size
    if (
        not core.caps.thp
        or (vma.flags & VmFlag.NOHUGEPAGE and core.caps.pmd_asks_advice)
        or ((vma.start >> shift) - vma.pgoff) % (size >> shift)
    ):
        return False
    return vma.start <= start and start + size <= vma.end


def may_write(core: Core, vma: VmArea) -> bool:
    """Whether a page that is mapped without having been written may be written without a fault."""
    if not vma.flags & VmFlag.WRITE or not vma.flags & VmFlag.SHARED:
        return False
    if vma.file is not None and vma.file.on_disk:
        return False  # the file system is told of the first write
    return not vma.flags & VmFlag.UFFD_WP and (not core.soft_dirty or bool(vma.flags & VmFlag.SOFTDIRTY))


def any_large(core: Core, vma: VmArea, start: int, end: int) -> bool:
    """Whether a large folio holds any page of the file that the range maps."""
    if not core.memory.large or vma.file is None or vma.file.on_disk:
        return False
    shift = core.geometry.page_shift
    words = vma.file.index.load(vma.pgoff + (start - vma.start >> shift), end - start >> shift)
    pfns = (words[(words & _PRESENT) != 0] & _FIELD).view(np.int64)
    return bool((core.memory.frames.flags[pfns] & np.uint64(COMPOUND)).any())


def folio_at(core: Core, vma: VmArea, page: int) -> LargeFolio | None:
    """The large folio of the cache that holds that page of the file, if one does."""
    assert vma.file is not None
    if not core.memory.large:
        return None
    word = vma.file.index.get(page)
    frames, pfn = core.memory.frames, word & FIELD
    if not word & PRESENT or not frames.flags_at[pfn] & COMPOUND:
        return None
    return core.memory.large[pfn - frames.behind_at[pfn]]


def map_pmd(
    core: Core, mm: AddressSpace, vma: VmArea, addr: int, folio: LargeFolio, *, write: bool, writable: bool
) -> bool:
    """Map a huge page at an empty PMD (do_set_pmd); whether that can be done. `writable`: also without a write."""
    if folio.order != core.geometry.pmd_order or not suits(core, vma, addr):
        return False
    slot = mm.tables.make_pmd_slot(addr)
    if core.pool.at[slot]:
        return False
    folio.entire += 1
    folio.add(mm.number, 1)
    core.memory.frames.mapcount[folio.head : folio.head + folio.pages] += 1
    if vma.flags & VmFlag.LOCKED and core.caps.mlock_by_pmd:
        mapping.mlock(core, folio.head, folio.pages)
    entry = folio.head | PRESENT | LEAF | YOUNG
    if write:
        entry |= DIRTY | WRITE | core.soft_dirty
    elif writable:
        entry |= WRITE
    core.pool.at[slot] = entry
    core.count("thp_file_mapped")
    return True


def drop(core: Core, mm: AddressSpace, vma: VmArea, start: int) -> None:
    """Let go of the PMD at `start`: what it knew goes over to the page, and faults map it again."""
    slot = mm.tables.pmd_slot(start)
    entry = core.pool.at[slot]
    core.pool.at[slot] = 0
    core.count("split_pmd")
    folio = core.memory.large[entry & FIELD]
    told = (int(PageFlag.DIRTY) if entry & DIRTY else 0) | (int(PageFlag.REFERENCED) if entry & YOUNG else 0)
    core.memory.frames.set_bits(folio.head, folio.pages, told)
    mapping.remove_pmd(core, mm, vma, folio)


def drop_range(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """The same for all PMDs of a mapping of a file that map any of the range."""
    if not core.memory.large:
        return
    blocks = [(extent.start, len(extent.entries)) for extent in mm.tables.extents(start, end) if extent.huge]
    for first, count in blocks:
        for number in range(count):
            drop(core, mm, vma, first + number * core.geometry.pmd_size)


def place_of(core: Core, vma: VmArea, addr: int, folio: LargeFolio) -> int:
    """Where a large folio of the file begins that is mapped at the address; -1 where a PTE of it could not be.

    That is where not all of it lies in the VMA and below one PMD.
    """
    shift, size = core.geometry.page_shift, core.geometry.pmd_size
    start = vma.start + (int(core.memory.frames.index[folio.head]) - vma.pgoff << shift)
    end = start + (folio.pages << shift)
    fits = vma.start <= start <= addr < end <= vma.end and start // size == (end - 1) // size
    return start if fits else -1


def unmap(core: Core, inode: Inode, first: int, end: int) -> None:
    """Empty all entries that map pages from `first` to `end` of the cache (try_to_unmap); private copies stay.

    Protected entries leave markers behind; accesses are forgotten.
    """
    shift = core.geometry.page_shift
    for mm in list(core.spaces.values()):
        for vma in mm.vmas:
            if vma.file is not inode:
                continue
            low, high = max(first - vma.pgoff, 0), min(end - vma.pgoff, vma.length >> shift)
            if low < high:
                _unmap_range(core, mm, vma, vma.start + (low << shift), vma.start + (high << shift))


def _unmap_range(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    drop_range(core, mm, vma, start, end)
    frames = core.memory.frames
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        index = np.flatnonzero(entries & _PRESENT)
        pfns = (entries[index] & _FIELD).view(np.int64)
        mine = (frames.flags[pfns] & np.uint64(CACHED)) != 0
        index, pfns = index[mine], pfns[mine]
        if not len(index):
            continue
        old = entries[index]
        kept = (old & np.uint64(UFFD_WP)) != 0 if vma.flags & VmFlag.UFFD_WP else np.zeros(len(old), np.bool_)
        entries[index] = np.where(kept, np.uint64(UFFD_MARKER), np.uint64(0))
        dirty = core.memory.whole_folios(pfns[(old & np.uint64(DIRTY)) != 0])
        frames.flags[dirty] |= np.uint64(PageFlag.DIRTY)
        mapping.remove_pages(core, mm, vma, pfns)
