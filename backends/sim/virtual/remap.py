"""Moving entries from one range to another (move_page_tables)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.services import thp
from pmcore.backends.sim.virtual import hugetlb
from pmcore.backends.sim.virtual.pte import LEAF, PRESENT, SOFT_DIRTY, SWAP, TABLE, UFFD_MARKER, UFFD_WP
from pmcore.backends.sim.virtual.vma import VmFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["move_entries"]


def move_entries(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, new_start: int, length: int, *, drop_uffd: bool
) -> None:
    """Move the entries of `length` bytes from `start` to `new_start`, where nothing is mapped.

    `drop_uffd`: the target is not registered, so write protection and its markers are left behind. Raises NoMemory
    before anything has moved.
    """
    if vma.flags & VmFlag.HUGETLB:
        hugetlb.move_entries(core, mm, vma, start, new_start, length, drop_uffd=drop_uffd)
        return
    pmd_size = core.geometry.pmd_size
    aligned = (start - new_start) % pmd_size == 0
    thp.split_at(core, mm, vma, start)
    thp.split_at(core, mm, vma, start + length)
    few = mm.tables.few(start, start + length) if (start + length) % pmd_size else None
    if few is not None:
        if few:
            _move_few(core, mm, few, new_start, drop_uffd=drop_uffd)
        return
    plan: list[tuple[int, int]] = []
    whole = aligned and not drop_uffd
    for extent in list(mm.tables.extents(start, start + length)):
        if not extent.huge:
            plan += _pieces(core, extent.start, extent.end, whole=whole)
            continue
        for addr in range(extent.start, extent.end, pmd_size):
            if aligned:
                slot = mm.tables.make_pmd_slot(new_start + addr - start)
                if core.pool.at[slot] & TABLE:
                    place = new_start + addr - start
                    mm.tables.free_range(place, place + pmd_size, place, place + pmd_size)
                plan.append((addr, addr + pmd_size))
            else:
                thp.split_pmd(core, mm, vma, addr)
                if vma.file is None:
                    plan.append((addr, addr + pmd_size))
    tables = set()
    for low, high in plan:
        slot = mm.tables.pmd_slot(low)
        if core.pool.at[slot] & LEAF:
            continue
        place = new_start + low - start
        target = mm.tables.make_pmd_slot(place)
        covers = whole and low + pmd_size - low % pmd_size == high and not core.pool.at[target]
        if covers and (low % pmd_size == 0 or _realigned(core, mm, vma, low, place)):
            tables.add(low)
            continue
        mm.tables.make(place, place + high - low)
    soft_dirty = core.soft_dirty
    for low, high in plan:
        slot = mm.tables.pmd_slot(low)
        entry = core.pool.at[slot]
        if entry & LEAF:
            target = mm.tables.make_pmd_slot(new_start + low - start)
            core.pool.at[target] = (entry | soft_dirty) & ~(UFFD_WP if drop_uffd else 0)
            core.pool.at[slot] = 0
            continue
        if low in tables:  # the page table itself is moved, and nobody looks into it
            core.pool.at[mm.tables.make_pmd_slot(new_start + low - start)] = entry
            core.pool.at[slot] = 0
            continue
        words = np.concatenate([extent.entries for extent in mm.tables.extents(low, high)])
        if soft_dirty:
            words[(words & np.uint64(PRESENT | SWAP)) != 0] |= np.uint64(soft_dirty)
        if drop_uffd:
            words[(words & ~np.uint64(SOFT_DIRTY)) == np.uint64(UFFD_MARKER)] = 0
            words &= np.uint64(~UFFD_WP & (1 << 64) - 1)
        position = 0
        for mine in mm.tables.extents(new_start + low - start, new_start + high - start):
            mine.entries[:] = words[position : position + len(mine.entries)]
            position += len(mine.entries)
        for extent in mm.tables.extents(low, high):
            extent.entries[:] = 0


def _move_few(core: Core, mm: AddressSpace, slots: range, new_start: int, *, drop_uffd: bool) -> None:
    """Move few entries, no whole page table."""
    size = core.geometry.page_size
    target = mm.tables.make_pte_slot(new_start)
    targets = [target]
    for place in range(1, len(slots)):
        targets.append(mm.tables.make_pte_slot(new_start + place * size))
    at = core.pool.at
    for slot, target in zip(slots, targets, strict=True):
        pte = at[slot]
        if pte & (PRESENT | SWAP):
            pte |= core.soft_dirty
        if drop_uffd:
            pte = 0 if pte & ~SOFT_DIRTY == UFFD_MARKER else pte & ~UFFD_WP
        at[target] = pte
        at[slot] = 0


def _pieces(core: Core, low: int, high: int, *, whole: bool) -> list[tuple[int, int]]:
    """What is moved at a time: whole page tables one by one where they can be, the rest together."""
    if not whole:
        return [(low, high)]
    size = core.geometry.pmd_size
    cuts = [low, *range(low + size - low % size, high, size), high]
    return list(itertools.pairwise(cuts))


def _realigned(core: Core, mm: AddressSpace, vma: VmArea, start: int, new_start: int) -> bool:
    """Whether a move that begins inside a block takes the table of the block: nothing else is mapped by it."""
    size = core.geometry.pmd_size
    return (
        core.caps.mremap_realigns
        and vma.start == start
        and not mm.vmas.within(start & -size, start)
        and not mm.vmas.within(new_start & -size, new_start)
    )
