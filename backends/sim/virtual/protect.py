"""Changing what entries allow: mprotect, and userfaultfd's write protection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.services import thp
from pmcore.backends.sim.virtual import hugetlb
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT, SOFT_DIRTY, UFFD_MARKER, UFFD_WP, WRITE
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import swap_entries
from pmcore.uapi import UffdFeature

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["change_protection", "uffd_wp"]

_PRESENT = np.uint64(PRESENT)
_ALL = (1 << 64) - 1


def _may_write(core: Core, vma: VmArea, entries: U64Array) -> BoolArray:
    """Which present entries may be written at once, without a fault (can_change_pte_writable)."""
    may: BoolArray = (entries & np.uint64(DIRTY)) != 0
    if vma.flags & VmFlag.SHARED:
        if not vma.flags & VmFlag.UFFD_WP:
            may[:] = True  # nobody has to be told of the first write
    elif core.caps.mprotect_makes_clean_writable:
        may[:] = True
    if core.soft_dirty and not vma.flags & VmFlag.SOFTDIRTY:
        may &= (entries & np.uint64(SOFT_DIRTY)) != 0
    if vma.flags & VmFlag.UFFD_WP:
        may &= (entries & np.uint64(UFFD_WP)) == 0
    if vma.flags & VmFlag.SHARED:
        return may
    pfns = (entries & np.uint64(FIELD)).view(np.int64)
    may[may] = (core.memory.frames.flags[pfns[may]] & np.uint64(ANON_EXCLUSIVE)) != 0
    return may


def change_protection(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """Have the entries of the range allow what the VMA allows now."""
    if vma.flags & VmFlag.HUGETLB:
        hugetlb.protect(core, mm, vma, start, end)
        return
    thp.split_at(core, mm, vma, start)
    thp.split_at(core, mm, vma, end)
    writable = bool(vma.flags & VmFlag.WRITE)
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        present = (entries & _PRESENT) != 0
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


def uffd_wp(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, *, protect: bool) -> None:
    """Set or take off userfaultfd's write protection on the entries of the range."""
    if vma.flags & VmFlag.HUGETLB:
        hugetlb.uffd_wp(core, mm, vma, start, end, protect=protect)
        return
    thp.split_at(core, mm, vma, start)
    thp.split_at(core, mm, vma, end)
    features = getattr(vma.uffd, "features", 0)
    markers = bool(features & UffdFeature.WP_UNPOPULATED) or vma.file is not None
    if protect and markers:
        mm.tables.make(start, end)
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        present = (entries & _PRESENT) != 0
        swap = swap_entries(entries) if not extent.huge else np.zeros(len(entries), np.bool_)
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
