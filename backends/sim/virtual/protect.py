"""Changing what entries allow: mprotect, and userfaultfd's write protection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.services import migrating, thp
from pmcore.backends.sim.services.batches import large_runs
from pmcore.backends.sim.virtual import filepmd, hugetlb
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    PRESENT,
    SOFT_DIRTY,
    SWAP,
    UFFD_MARKER,
    UFFD_WP,
    WRITE,
    YOUNG,
    is_marker,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries, swap_entries
from pmcore.uapi import UffdFeature

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["change_protection", "uffd_wp"]

_PRESENT = np.uint64(PRESENT)
_ALL = (1 << 64) - 1
_WP_UNPOPULATED = int(UffdFeature.WP_UNPOPULATED)


def _all_may(core: Core, vma: VmArea) -> bool | None:
    """Of a shared mapping: whether all pages may be written without a fault, or none. None: the dirty ones may.

    Who tracks writes is told of each first one, also to what is dirty; a disk's file system of those to clean pages.
    """
    if vma.file is not None and vma.file.on_disk:
        return None
    return not vma.flags & VmFlag.UFFD_WP and (not core.soft_dirty or bool(vma.flags & VmFlag.SOFTDIRTY))


def _may_write(core: Core, vma: VmArea, entries: U64Array) -> BoolArray:
    """Which present entries may be written at once, without a fault (can_change_pte_writable)."""
    may: BoolArray = (entries & np.uint64(DIRTY)) != 0
    if vma.flags & VmFlag.SHARED:
        every = _all_may(core, vma)
        if every is not None:
            may[:] = every
            return may
    elif core.caps.mprotect_makes_clean_writable:
        may[:] = True
    if core.soft_dirty and not vma.flags & VmFlag.SOFTDIRTY:
        may &= (entries & np.uint64(SOFT_DIRTY)) != 0
    if vma.flags & VmFlag.UFFD_WP:
        may &= (entries & np.uint64(UFFD_WP)) == 0
    if not vma.flags & VmFlag.SHARED:
        pfns = (entries & np.uint64(FIELD)).view(np.int64)
        may[may] = (core.memory.frames.flags[pfns[may]] & np.uint64(ANON_EXCLUSIVE)) != 0
    return may


def _may_write_one(core: Core, vma: VmArea, pte: int) -> bool:
    """`_may_write` for one entry."""
    flags = vma.flags
    if flags & VmFlag.SHARED:
        every = _all_may(core, vma)
        if every is not None:
            return every
        clean = False
    else:
        clean = core.caps.mprotect_makes_clean_writable
    if not pte & DIRTY and not clean:
        return False
    if core.soft_dirty and not flags & VmFlag.SOFTDIRTY and not pte & SOFT_DIRTY:
        return False
    if flags & VmFlag.UFFD_WP and pte & UFFD_WP:
        return False
    return bool(core.memory.frames.flags_at[pte & FIELD] & ANON_EXCLUSIVE)


def change_protection(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """Have the entries of the range allow what the VMA allows now."""
    if vma.flags & VmFlag.HUGETLB:
        hugetlb.protect(core, mm, vma, start, end)
        return
    thp.split_at(core, mm, vma, start)
    thp.split_at(core, mm, vma, end)
    writable = bool(vma.flags & VmFlag.WRITE)
    few = mm.tables.few(start, end) if not core.memory.large and core.migration is None else None
    if few is not None:
        for slot in few:
            _change_one(core, vma, slot, writable=writable)
        return
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        present = (entries & _PRESENT) != 0
        if core.memory.large and not extent.huge:
            _share_marks(core, extent.start, entries)
        if writable:
            if vma.flags & VmFlag.SHARED:
                entries[present] &= np.uint64(~WRITE & _ALL)
            # What is dirty and exclusive may be written from here on; the rest finds out by a fault.
            index = np.flatnonzero(present & ((entries & np.uint64(WRITE)) == 0))
            chosen = entries[index]
            may = (
                _may_write(core, vma, chosen)
                if core.caps.mprotect_makes_writable
                else np.zeros(len(index), np.bool_)
            )
            entries[index[may]] |= np.uint64(WRITE)
        else:
            entries[present] &= np.uint64(~WRITE & _ALL)
        migrating.may_write(core, entries)


def _share_marks(core: Core, start: int, entries: U64Array) -> None:
    """Entries of a large folio that are changed in one piece share their accessed and dirty marks."""
    if not core.caps.mprotect_batch:
        return
    runs = large_runs(core, start, entries, differ=WRITE | SOFT_DIRTY | UFFD_WP)
    runs = runs.take(runs.pages > 1)
    if not len(runs.first):
        return
    index = runs.entries()
    begins = np.cumsum(runs.pages) - runs.pages
    marks = np.bitwise_or.reduceat(entries[index] & np.uint64(YOUNG | DIRTY), begins)
    entries[index] |= np.repeat(marks, runs.pages)


def _change_one(core: Core, vma: VmArea, slot: int, *, writable: bool) -> None:
    """`change_protection` for one entry."""
    pte = core.pool.at[slot]
    if not pte & PRESENT:
        return
    if not writable or vma.flags & VmFlag.SHARED:
        pte &= ~WRITE
    if writable and not pte & WRITE and core.caps.mprotect_makes_writable and _may_write_one(core, vma, pte):
        pte |= WRITE
    core.pool.at[slot] = pte


def uffd_wp(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, *, protect: bool) -> None:
    """Set or take off userfaultfd's write protection on the entries of the range."""
    if vma.flags & VmFlag.HUGETLB:
        hugetlb.uffd_wp(core, mm, vma, start, end, protect=protect)
        return
    thp.split_at(core, mm, vma, start)
    thp.split_at(core, mm, vma, end)
    features = getattr(vma.uffd, "features", 0)
    markers = bool(features & _WP_UNPOPULATED) or vma.file is not None
    if protect and vma.file is not None:
        filepmd.drop_range(core, mm, vma, start, end)  # markers are PTEs
    if protect and markers:
        mm.tables.make(start, end)
    few = mm.tables.few(start, end) if not core.memory.large else None
    if few is not None:
        for slot in few:
            _wp_one(core, vma, slot, protect=protect, markers=markers)
        return
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        present = (entries & _PRESENT) != 0
        if core.memory.large and not extent.huge:
            _share_marks(core, extent.start, entries)
        none = np.zeros(len(entries), np.bool_)
        swap = none if extent.huge else swap_entries(entries)
        if core.names_frames:
            swap = swap | hwpoison_entries(entries)
        if protect:
            entries[present] = (entries[present] | np.uint64(UFFD_WP)) & np.uint64(~WRITE & _ALL)
            entries[swap] |= np.uint64(UFFD_WP)
            if markers:
                entries[entries == 0] = UFFD_MARKER
        else:
            entries[(entries & np.uint64(~SOFT_DIRTY & _ALL)) == np.uint64(UFFD_MARKER)] = 0
            entries[present | swap] &= np.uint64(~UFFD_WP & _ALL)
            if vma.flags & VmFlag.SHARED:  # as registered it asks to be told of each first write
                entries[present] &= np.uint64(~WRITE & _ALL)
            if vma.flags & VmFlag.WRITE:
                index = np.flatnonzero(present & ((entries & np.uint64(WRITE)) == 0))
                may = _may_write(core, vma, entries[index])
                entries[index[may]] |= np.uint64(WRITE)


def _wp_one(core: Core, vma: VmArea, slot: int, *, protect: bool, markers: bool) -> None:
    """`uffd_wp` for one entry."""
    pte = core.pool.at[slot]
    present = pte & PRESENT
    swap = pte & SWAP and not present and not is_marker(pte)
    if protect:
        if present:
            pte = (pte | UFFD_WP) & ~WRITE
        elif swap:
            pte |= UFFD_WP
        elif not pte and markers:
            pte = UFFD_MARKER
    elif present or swap:
        pte &= ~UFFD_WP
        if present and vma.flags & VmFlag.SHARED:
            pte &= ~WRITE
        if vma.flags & VmFlag.WRITE and present and not pte & WRITE and _may_write_one(core, vma, pte):
            pte |= WRITE
    elif pte & ~SOFT_DIRTY == UFFD_MARKER:
        pte = 0
    core.pool.at[slot] = pte
