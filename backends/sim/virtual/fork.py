"""fork: the child's VMAs and page tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.services.userfaultfd import Userfaultfd
from pmcore.backends.sim.virtual import hugetlb, mapping
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    GUARD,
    POISON_MARKER,
    PRESENT,
    SOFT_DIRTY,
    SWAP,
    SWAP_EXCLUSIVE,
    UFFD_WP,
    WRITE,
    YOUNG,
    is_hwpoison,
    is_marker,
    poisoned,
)
from pmcore.backends.sim.virtual.vma import AnonVma, VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries, swap_entries
from pmcore.uapi import UffdFeature

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["fork"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_EVENT_FORK = int(UffdFeature.EVENT_FORK)
_NOT_EXCLUSIVE = np.uint64(~ANON_EXCLUSIVE & (1 << 64) - 1)


def _without(bits: int) -> np.uint64:
    return np.uint64(~bits & (1 << 64) - 1)


def fork(core: Core, parent: AddressSpace, child: AddressSpace) -> dict[Userfaultfd, Userfaultfd]:
    """Fill `child`, which is empty, from `parent`.

    By userfaultfd that watches the parent and tells of forks: a new one that watches the child (rule VM-033).
    """
    watching: dict[Userfaultfd, Userfaultfd] = {}
    child.brk_start, child.brk = parent.brk_start, parent.brk
    child.soft_dirty_cleared = parent.soft_dirty_cleared
    if core.ksm.by_mm:
        core.ksm.forked(parent, child)
    for vma in parent.vmas:
        if vma.flags & VmFlag.DONTCOPY:
            continue
        copy = vma.copy(vma.start, vma.end, vma.pgoff)
        copy.flags &= ~VmFlag.LOCKS
        if isinstance(vma.uffd, Userfaultfd) and vma.uffd.features & _EVENT_FORK:
            if vma.uffd not in watching:
                watching[vma.uffd] = Userfaultfd(child, vma.uffd.features)
            copy.uffd = watching[vma.uffd]
        else:
            copy.flags &= ~VmFlag.UFFD
            copy.uffd = None
        if vma.flags & VmFlag.WIPEONFORK:
            copy.anon_vma, copy.chain = None, 0
        elif vma.anon_vma is not None:
            # The parent's chain and one of its own, which new pages of the child belong to.
            copy.anon_vma, copy.chain = (
                AnonVma(core.number("anon_vma"), vma.anon_vma.root),
                vma.chain + 1,
            )
        if vma.huge is not None:
            hugetlb.duplicate(child, copy)
        child.vmas.add(copy)
        if not vma.flags & VmFlag.WIPEONFORK and (
            vma.anon_vma is not None or copy.flags & (VmFlag.UFFD_WP | VmFlag.MAYBE_GUARD)
        ):
            _copy_entries(core, parent, child, vma, copy)
    return watching


def _copy_entries(core: Core, parent: AddressSpace, child: AddressSpace, vma: VmArea, copy: VmArea) -> None:
    if vma.flags & VmFlag.HUGETLB:
        hugetlb.copy_entries(core, parent, child, vma, copy)
        return
    drop = UFFD_WP if not copy.flags & VmFlag.UFFD_WP else 0
    shared = bool(vma.flags & VmFlag.SHARED)
    few = parent.tables.few(vma.start, vma.end) if not core.memory.large else None
    if few is not None:
        if few:
            child.tables.make(vma.start, vma.end)
            _copy_few(core, few, child.tables.pte_slot(vma.start), drop, shared=shared)
        return
    # All tables first: the pool moves when it grows.
    extents = parent.tables.extents(vma.start, vma.end)
    # Faults find again what PMDs map of a file.
    plan = [(e.start, e.end, e.huge) for e in extents if not (e.huge and vma.file is not None)]
    for start, end, huge in plan:
        if huge:
            for _ in child.tables.pmd_tables(start, end, make=True):
                pass
        else:
            child.tables.make(start, end)
    keep = _without(0 if shared else WRITE)
    for extent in parent.tables.extents(vma.start, vma.end):
        if extent.huge and vma.file is not None:
            continue
        if extent.huge:
            _copy_pmds(core, child, extent.start, extent.entries, drop)
            continue
        entries = extent.entries
        present = (entries & _PRESENT) != 0
        pfns = (entries[present] & _FIELD).view(np.int64)
        fields = None
        if len(pfns) == len(entries):
            entries &= keep
            new = entries & _without(YOUNG | drop)
        else:
            swap = swap_entries(entries)
            if swap.any():
                fields = entries[swap] & _FIELD
            entries &= keep & _without(SWAP_EXCLUSIVE)
            new = entries & _without(YOUNG | drop)
            marker = ~present & ~swap & ~hwpoison_entries(entries) & (entries != 0)
            if marker.any():
                own = marker & ((entries & np.uint64(GUARD)) != 0)
                own |= marker & ((entries & _FIELD) == np.uint64(POISON_MARKER & FIELD))
                new[own] &= _without(UFFD_WP | SOFT_DIRTY)  # made anew
                if drop:
                    new[marker & ~own] = 0  # a marker is nothing without what it marks
        if shared:
            new &= _without(DIRTY)
        if len(pfns):
            normal = pfns[pfns != core.zero_pfn]
            mapping.add_pages(core, child, normal)
            core.memory.frames.flags[normal] &= _NOT_EXCLUSIVE
        if fields is not None:
            core.swap.duplicate(fields)
        position = 0
        for mine in child.tables.extents(extent.start, extent.end):
            mine.entries[:] = new[position : position + len(mine.entries)]
            position += len(mine.entries)


def _copy_few(core: Core, slots: range, first: int, drop: int, *, shared: bool) -> None:
    """Copy few entries, where there are no large folios, to those from the place `first` on."""
    at, frames, fields = core.pool.at, core.memory.frames, []
    for place, slot in enumerate(slots, first):
        pte = at[slot]
        pfn, gone = pte & FIELD, drop
        if pte & PRESENT:
            if pfn != core.zero_pfn:
                frames.mapcount_at[pfn] += 1
                frames.flags_at[pfn] &= ~ANON_EXCLUSIVE
        elif pte & SWAP and not is_marker(pte):
            if not is_hwpoison(pte):
                fields.append(pfn)
        elif pte & SWAP:
            own = pte & GUARD or poisoned(pte)
            # Made anew, but a marker is nothing without what it marks.
            gone = UFFD_WP | SOFT_DIRTY if own else (pte if drop else 0)
        at[slot] = pte = pte & ~SWAP_EXCLUSIVE & ~(0 if shared else WRITE)
        at[place] = pte & ~(YOUNG | gone | (DIRTY if shared else 0))
    if fields:
        core.swap.duplicate(np.array(fields, dtype=np.uint64))


def _copy_pmds(core: Core, child: AddressSpace, start: int, entries: U64Array, drop: int) -> None:
    pages = core.geometry.pmd_pages
    frames = core.memory.frames
    for index, entry in enumerate(entries.tolist()):
        if entry & FIELD != core.huge_zero_pfn:
            folio = core.memory.large[entry & FIELD]
            folio.entire += 1
            folio.add(child.number, 1)
            part = slice(folio.head, folio.head + pages)
            frames.mapcount[part] += 1
            frames.flags[part] &= _NOT_EXCLUSIVE
        slot = child.tables.make_pmd_slot(start + index * core.geometry.pmd_size)
        core.pool.at[slot] = entry & ~(WRITE | YOUNG | drop)
    entries &= _without(WRITE)
