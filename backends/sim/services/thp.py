"""Transparent huge pages: mapping one at a fault, mapping it by PTEs instead, taking the folio apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import LargeFolio, NoMemory
from pmcore.backends.sim.virtual import mapping, rmap
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
    from pmcore.arrays import BoolArray
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["fault", "huge_zero", "order_allowed", "split_at", "split_pmd", "wp_fault", "zap_pmd"]

THP = int(PageFlag.THP)


def order_allowed(core: Core, vma: VmArea, addr: int) -> bool:
    """Whether policy lets a fault at the address map a huge page."""
    if not core.caps.thp or vma.flags & VmFlag.NOHUGEPAGE:
        return False
    policy = core.policy.pmd
    if policy == "never" or (policy == "madvise" and not vma.flags & VmFlag.HUGEPAGE):
        return False
    start = addr & -core.geometry.pmd_size
    return vma.start <= start and start + core.geometry.pmd_size <= vma.end


def huge_zero(core: Core) -> int:
    """The first frame of the huge zero page. Raises NoMemory."""
    if not core.huge_zero_pfn:
        core.huge_zero_pfn = core.memory.kernel_folio(core.geometry.pmd_order, core.caps.huge_zero_flags)
    return core.huge_zero_pfn


def fault(core: Core, mm: AddressSpace, vma: VmArea, addr: int, slot: int, *, write: bool) -> bool:
    """Map a huge page at an empty PMD; whether that could be done (else: a small page)."""
    mm.prepare_anon(vma)
    try:
        if not write and core.policy.use_zero_page:
            core.pool.at[slot] = huge_zero(core) | PRESENT | SPECIAL | LEAF | YOUNG
            return True
        folio = core.memory.folio(core.geometry.pmd_order, mapping.NEW_ANON | THP | ANON_EXCLUSIVE)
    except NoMemory:
        return False
    map_huge(core, mm, vma, folio, slot, write=write)
    return True


def map_huge(core: Core, mm: AddressSpace, vma: VmArea, folio: LargeFolio, slot: int, *, write: bool) -> None:
    """Map a fresh huge page."""
    frames = core.memory.frames
    folio.entire = 1
    folio.add(mm.number, 1)
    frames.mapcount[folio.head : folio.head + folio.pages] = 1
    core.memory.on_lru(folio.head, folio.pages)
    if vma.flags & VmFlag.LOCKED:
        frames.set_bits(folio.head, folio.pages, mapping.MLOCKED)
    entry = folio.head | PRESENT | LEAF | YOUNG
    if vma.flags & VmFlag.WRITE:
        entry |= WRITE | DIRTY | core.soft_dirty
    core.pool.at[slot] = entry


def wp_fault(core: Core, mm: AddressSpace, vma: VmArea, addr: int, slot: int) -> bool:
    """A write to a huge page that may not be written: whether it may now (else PTEs map it, and it is asked again)."""
    entry = core.pool.at[slot]
    frames, head = core.memory.frames, entry & FIELD
    if head == core.huge_zero_pfn:
        if core.caps.huge_zero_write_gives_huge:
            try:
                folio = core.memory.folio(core.geometry.pmd_order, mapping.NEW_ANON | THP | ANON_EXCLUSIVE)
            except NoMemory:
                pass
            else:
                mm.prepare_anon(vma)
                map_huge(core, mm, vma, folio, slot, write=True)
                return True
        split_pmd(core, mm, vma, addr & -core.geometry.pmd_size)
        return False
    folio = core.memory.large[head]
    exclusive = bool(frames.flags_at[head] & ANON_EXCLUSIVE)
    if not exclusive and folio.mapped == 1 and not frames.flags_at[head] & int(PageFlag.SWAPCACHE):
        frames.set_bits(head, folio.pages, ANON_EXCLUSIVE)
        exclusive = True
    if exclusive:
        core.pool.at[slot] = entry | WRITE | DIRTY | YOUNG | core.soft_dirty
        return True
    split_pmd(core, mm, vma, addr & -core.geometry.pmd_size)
    return False


def split_at(core: Core, mm: AddressSpace, vma: VmArea, addr: int) -> None:
    """Map by PTEs the huge page that the address lies inside of, if there is one."""
    start = addr & -core.geometry.pmd_size
    if start != addr and core.caps.thp:
        slot = mm.tables.pmd_slot(addr)
        if slot >= 0 and core.pool.at[slot] & LEAF:
            split_pmd(core, mm, vma, start)


def split_pmd(core: Core, mm: AddressSpace, vma: VmArea, start: int) -> None:
    """Map the huge page at `start` by PTEs; the folio stays as it is. Raises NoMemory."""
    [row] = core.pool.take(1)
    mm.tables.tables[0] += 1
    slot = mm.tables.pmd_slot(start)
    entry = core.pool.at[slot]
    pages, head = core.geometry.pmd_pages, entry & FIELD
    entries = core.pool.rows[row]
    if head == core.huge_zero_pfn:
        entries[:] = core.zero_pfn | PRESENT | SPECIAL | entry & (UFFD_WP | SOFT_DIRTY)
    else:
        keep = entry & (WRITE | DIRTY | YOUNG | UFFD_WP | SOFT_DIRTY) | PRESENT
        entries[:] = np.arange(head, head + pages, dtype=np.uint64) | np.uint64(keep)
        folio = core.memory.large[head]
        folio.entire -= 1
        folio.add(mm.number, pages - 1)
        if entry & DIRTY:
            core.memory.frames.set_bits(head, pages, int(PageFlag.DIRTY))
    core.pool.at[slot] = TABLE | row
    core.count("split_pmd")


def zap_pmd(core: Core, mm: AddressSpace, vma: VmArea, entry: int) -> None:
    """Uncount a huge page whose PMD is being emptied."""
    if entry & FIELD != core.huge_zero_pfn:
        mapping.remove_pmd(core, mm, vma, core.memory.large[entry & FIELD])


def _locked(mm: AddressSpace, addresses: Pfns) -> BoolArray:
    """Which addresses lie in locked mappings."""
    locked: BoolArray = np.zeros(len(addresses), dtype=np.bool_)
    for vma in mm.vmas:
        if vma.flags & VmFlag.LOCKED:
            locked |= (addresses >= vma.start) & (addresses < vma.end)
    return locked


def split_folio(
    core: Core, mm: AddressSpace, folio: LargeFolio, near: int, *, others: Iterable[AddressSpace] = ()
) -> None:
    """Take a folio that only `mm` and `others` map, by PTEs, apart into single pages; what is not mapped is freed.

    Pages of nothing but zeros become the zero page, on kernels that look.
    """
    frames = core.memory.frames
    head, pages = folio.head, folio.pages
    slots, addresses = rmap.pte_slots(core, mm, folio, near)
    locked = _locked(mm, addresses)
    for other in others:
        more, places = rmap.pte_slots(core, other, folio, near)
        slots, locked = np.append(slots, more), np.append(locked, _locked(other, places))
    old = core.pool.flat[slots]
    if (old & np.uint64(DIRTY)).any():
        frames.set_bits(head, pages, int(PageFlag.DIRTY))
    mlocked = frames.flags_at[head] & mapping.MLOCKED
    core.memory.dissolve(folio)
    core.mlocks.pop(head, None)
    for index in np.flatnonzero(frames.mapcount[head : head + pages] == 0).tolist():
        core.memory.free(head + index)
    if core.caps.split_maps_zero and not mlocked:
        pfns = (old & np.uint64(FIELD)).view(np.int64)
        zero = core.memory.contents.zero(frames.content[pfns])
        zero &= ~locked
        core.pool.flat[slots[zero]] = old[zero] & np.uint64(UFFD_WP | SOFT_DIRTY) | np.uint64(
            PRESENT | SPECIAL | YOUNG | core.zero_pfn
        )
        np.subtract.at(frames.mapcount, pfns[zero], 1)
        gone = np.unique(pfns[zero])
        core.memory.free_pages(gone[frames.mapcount[gone] == 0])
    if not mlocked:
        # Mapped anew, as small pages: those of a locked mapping are locked now.
        for pfn in (old[locked] & np.uint64(FIELD)).tolist():
            mapping.mlock(core, pfn, 1)
    core.count("split_folio")
