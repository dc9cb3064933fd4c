"""What merging does to entries and frames: one page in the place of another, and a page of one's own again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.services import thp
from pmcore.backends.sim.virtual import accessed, mapping
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    LEAF,
    PRESENT,
    SOFT_DIRTY,
    SPECIAL,
    TABLE,
    UFFD_WP,
    WRITE,
    YOUNG,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["compatible", "merge", "mergeable", "page_at", "split", "unmerge", "unshare"]

_KSM, _DIRTY = int(PageFlag.KSM), int(PageFlag.DIRTY)
_REFUSED = VmFlag.SHARED | VmFlag.MAYSHARE | VmFlag.PFNMAP | VmFlag.IO | VmFlag.DONTEXPAND | VmFlag.HUGETLB


#: Folios in a batch (PAGEVEC_SIZE).
_BATCH = 31


def compatible(vma: VmArea) -> bool:
    """Whether a mapping can be merged at all; the advice is without effect on others."""
    return not vma.flags & _REFUSED


def mergeable(vma: VmArea) -> bool:
    """Whether ksmd looks at the mapping."""
    return bool(vma.flags & VmFlag.MERGEABLE) and vma.anon_vma is not None


def page_at(core: Core, mm: AddressSpace, address: int) -> int:
    """The frame of the anonymous page at an address; -1 where there is none: the zero page and a file's are none."""
    slot = mm.tables.pmd_slot(address)
    entry = core.pool.at[slot] if slot >= 0 else 0
    if entry & LEAF:
        if entry & FIELD == core.huge_zero_pfn or core.memory.frames.flags_at[entry & FIELD] & CACHED:
            return -1
        return (entry & FIELD) + (address >> core.geometry.page_shift & core.geometry.pmd_pages - 1)
    if not entry & TABLE:
        return -1
    pte = core.pool.at[mm.tables.pte_slot(address)]
    pfn = pte & FIELD
    if not pte & PRESENT or pfn == core.zero_pfn or core.memory.frames.flags_at[pfn] & CACHED:
        return -1
    return pfn


def split(core: Core, mm: AddressSpace, address: int, pfn: int) -> bool:
    """Take the folio of a page apart, whoever maps it; whether a locked mapping does.

    Raises NoMemory with nothing but PMDs split.
    """
    frames = core.memory.frames
    folio = core.memory.large[frames.head(pfn)]
    mappers = [other for other in core.spaces.values() if other.number in folio.by_mm]
    for other in mappers if folio.entire else ():
        for extent in list(other.tables.extents(0, core.geometry.task_size)):
            if extent.huge:
                for index in np.flatnonzero((extent.entries & np.uint64(FIELD)) == folio.head).tolist():
                    start = extent.start + index * extent.size
                    vma = other.vmas.at(start)
                    assert vma is not None
                    thp.split_pmd(core, other, vma, start)
    return thp.split_folio(core, mm, folio, address, others=[other for other in mappers if other is not mm])


def merge(core: Core, mm: AddressSpace, vma: VmArea, address: int, pfn: int, kept: int | None) -> bool:
    """Map `kept` (a merged page, or the zero page) in the place of `pfn`, or make `pfn` a merged page (None).

    Whether that could be done: not where the page is not mapped there any more, nor while a batch holds it (KS-017).
    """
    frames = core.memory.frames
    if pfn == kept:
        return True
    if frames.flags_at[pfn] & COMPOUND:
        try:
            if split(core, mm, address, pfn):
                core.ksm.batch.clear()  # of a large folio locks are not put off, nor are others any longer
        except NoMemory:
            return False
    if page_at(core, mm, address) != pfn:
        return False
    slot, at = mm.tables.pte_slot(address), core.pool.at
    pte = at[slot]
    if pfn in core.ksm.batch and (pte & (WRITE | DIRTY) or frames.flags_at[pfn] & ANON_EXCLUSIVE):
        return False  # not write-protected, because somebody else holds it
    if pte & DIRTY:
        frames.flags_at[pfn] |= _DIRTY
    at[slot] = pte & ~(WRITE | DIRTY)
    frames.flags_at[pfn] &= ~ANON_EXCLUSIVE
    if kept is None:
        frames.flags_at[pfn] |= _KSM | _DIRTY
        accessed.mark(core, np.array([pfn], dtype=np.int64))
        return True
    if kept == core.zero_pfn:
        # Dirty, so that it is known for one of ours.
        at[slot] = kept | PRESENT | SPECIAL | YOUNG | (DIRTY if core.caps.ksm_unmerges_zero else 0)
    else:
        frames.mapcount_at[kept] += 1
        at[slot] = kept | PRESENT | YOUNG
        if vma.flags & VmFlag.LOCKED:
            mapping.mlock(core, kept, 1)
            _put_off(core, kept)
    mapping.remove_page(core, mm, vma, pfn)
    if vma.flags & VmFlag.LOCKED:
        _put_off(core, pfn)
    core.count("ksm_merged")
    return True


def _put_off(core: Core, pfn: int) -> None:
    """A page is locked or unlocked: its batch holds it until it is full."""
    core.ksm.batch.append(pfn)
    if len(core.ksm.batch) == _BATCH:
        core.ksm.batch.clear()


def unshare(core: Core, mm: AddressSpace, vma: VmArea, address: int) -> None:
    """A page of its own for an entry that maps a merged one, or the zero page for one: not writable yet, clean.

    On kernels before 6.2 as if it had been written (KX-016).
    """
    slot = mm.tables.pte_slot(address)
    pte = core.pool.at[slot]
    pfn = pte & FIELD
    copy = mapping.take_page(core, vma)
    frames = core.memory.frames
    if frames.content_at[pfn]:
        frames.content_at[copy] = core.memory.contents.copy_one(frames.content_at[pfn])
    frames.mapcount_at[copy] = 1
    new = copy | PRESENT | YOUNG | pte & (SOFT_DIRTY | UFFD_WP)
    if not core.caps.ksm_unshares:
        new |= DIRTY | core.soft_dirty | (WRITE if vma.flags & VmFlag.WRITE and not pte & UFFD_WP else 0)
    core.pool.at[slot] = new
    core.count("ksm_unshared")
    if pfn != core.zero_pfn:
        mapping.remove_page(core, mm, vma, pfn)


def unmerge(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """Pages of their own for all merged ones of a range. Raises NoMemory with those before it done."""
    frames, size = core.memory.frames, core.geometry.page_size
    core.memory.charging = mm.group
    places: list[int] = []
    for extent in mm.tables.extents(start, end):
        if extent.huge:
            continue
        entries = extent.entries
        pfns = (entries & np.uint64(FIELD)).view(np.int64)
        present = (entries & np.uint64(PRESENT)) != 0
        ours = present & (pfns == core.zero_pfn) & ((entries & np.uint64(DIRTY)) != 0)
        index = np.flatnonzero(present)
        ours[index] |= (frames.flags[pfns[index]] & np.uint64(_KSM)) != 0
        places += (extent.start + np.flatnonzero(ours) * size).tolist()
    for address in places:
        while True:
            try:
                unshare(core, mm, vma, address)
                break
            except NoMemory:
                if not core.relieve(1):
                    raise
            pte = core.pool.at[mm.tables.pte_slot(address)]
            if not pte & PRESENT:
                break  # reclaimed meanwhile
