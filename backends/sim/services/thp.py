"""Transparent huge pages: mapping one at a fault, mapping it by PTEs instead, taking the folio apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import LargeFolio, NoMemory
from pmcore.backends.sim.virtual import accessed, filepmd, mapping, rmap
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
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = [
    "eligible",
    "fault",
    "huge_zero",
    "maybe_shared",
    "order_allowed",
    "orders",
    "split_at",
    "split_pmd",
    "split_whole",
    "wp_fault",
    "zap_pmd",
]

THP = int(PageFlag.THP)


def orders(core: Core, vma: VmArea) -> int:
    """Bits of the orders of huge pages that policy gives the VMA."""
    if not core.caps.thp or vma.flags & (VmFlag.NOHUGEPAGE | VmFlag.HUGETLB) or vma.file is not None:
        return 0
    always, advised = core.thp_orders()
    return advised if vma.flags & VmFlag.HUGEPAGE else always


def order_allowed(core: Core, vma: VmArea, addr: int) -> bool:
    """Whether policy lets a fault at the address map a huge page by a PMD."""
    if not orders(core, vma) >> core.geometry.pmd_order & 1:
        return False
    start = addr & -core.geometry.pmd_size
    return vma.start <= start and start + core.geometry.pmd_size <= vma.end


def eligible(core: Core, vma: VmArea) -> bool:
    """Whether the VMA has room for a huge page of any size that policy gives it."""
    allowed, shift = orders(core, vma), core.geometry.page_shift
    return any(
        allowed >> order & 1 and (vma.end >> shift + order) > (vma.start - 1 >> shift + order) + 1
        for order in range(allowed.bit_length())
    )


def maybe_shared(core: Core, folio: LargeFolio) -> bool:
    """Whether the kernel takes a mapped folio to be mapped by more than one process."""
    if folio.mapped <= 1:
        return False
    if core.caps.folio_mm_ids:
        return folio.shared
    if core.memory.frames.flags_at[folio.head] & CACHED:
        once = core.memory.frames.mapcount_at[folio.head] <= 1
        return bool(folio.entire) or folio.mapped > folio.pages or not once
    # Older kernels guess: mapped too often for one process, or its first page is mapped twice.
    # They are right here where they take one for unshared: taking a shared one apart is not modelled.
    first = core.memory.frames.mapcount_at[folio.head]
    return bool(folio.entire or folio.mapped > folio.pages or first > 1 or len(folio.by_mm) > 1)


def huge_zero(core: Core) -> int:
    """The first frame of the huge zero page. Raises NoMemory."""
    if not core.huge_zero_pfn:
        core.count("thp_zero_page_alloc")
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
    core.count("thp_fault_alloc")
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
                core.count("thp_fault_alloc")
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
    if start != addr and (core.memory.large or core.huge_zero_pfn):
        slot = mm.tables.pmd_slot(addr)
        if slot >= 0 and core.pool.at[slot] & LEAF:
            split_pmd(core, mm, vma, start)


def split_pmd(core: Core, mm: AddressSpace, vma: VmArea, start: int, *, migrating: bool = False) -> None:
    """Map the huge page at `start` by PTEs; the folio stays as it is. Raises NoMemory.

    `migrating`: on the way to being taken apart; then soft-dirty stays as it was. In a mapping of a file no PTE is
    made: faults find the page again.
    """
    if vma.file is not None:
        filepmd.drop(core, mm, vma, start)
        return
    row = core.pool.take_one()
    mm.tables.tables[0] += 1
    slot = mm.tables.pmd_slot(start)
    entry = core.pool.at[slot]
    pages, head = core.geometry.pmd_pages, entry & FIELD
    entries = core.pool.rows[row]
    if head == core.huge_zero_pfn:
        entries[:] = core.zero_pfn | PRESENT | SPECIAL | entry & (UFFD_WP | SOFT_DIRTY)
    else:
        keep = entry & (WRITE | DIRTY | YOUNG | UFFD_WP | SOFT_DIRTY) | PRESENT
        if entry & UFFD_WP and core.caps.split_wrprotects:
            keep &= ~WRITE  # which a PMD may have beside it once nobody watched it (UF-011)
        if entry & DIRTY and not migrating and not core.caps.pmd_split_keeps_dirty:
            keep &= ~DIRTY  # it is the folio's from here on
        elif entry & DIRTY and (not migrating or core.caps.migration_makes_soft_dirty):
            keep |= core.soft_dirty  # who makes an entry dirty makes it soft-dirty
        entries[:] = np.arange(head, head + pages, dtype=np.uint64) | np.uint64(keep)
        folio = core.memory.large[head]
        folio.entire -= 1
        folio.add(mm.number, pages)
        folio.add(mm.number, -1)
        if entry & DIRTY:
            core.memory.frames.set_bits(head, pages, int(PageFlag.DIRTY))
        if core.caps.pmd_split_munlocks and vma.flags & VmFlag.LOCKED:
            mapping.munlock(core, head, pages)
    core.pool.at[slot] = TABLE | row
    core.count("split_pmd")


def zap_pmd(core: Core, mm: AddressSpace, vma: VmArea, entry: int) -> None:
    """Uncount a huge page whose PMD is being emptied; a file's is told what the PMD knew of it."""
    if entry & FIELD == core.huge_zero_pfn:
        return
    folio = core.memory.large[entry & FIELD]
    if vma.file is not None and entry & DIRTY:
        core.memory.frames.set_bits(folio.head, folio.pages, int(PageFlag.DIRTY))
    mapping.remove_pmd(core, mm, vma, folio)
    if (
        vma.file is not None
        and entry & YOUNG
        and core.caps.zap_pmd_notes_access
        and not vma.flags & core.caps.no_recency
    ):
        accessed.mark_one(core, folio.head)


def _locked(mm: AddressSpace, addresses: Pfns) -> BoolArray:
    """Which addresses lie in locked mappings."""
    locked: BoolArray = np.zeros(len(addresses), dtype=np.bool_)
    for vma in mm.vmas:
        if vma.flags & VmFlag.LOCKED:
            locked |= (addresses >= vma.start) & (addresses < vma.end)
    return locked


def split_folio(
    core: Core, mm: AddressSpace, folio: LargeFolio, near: int, *, others: Iterable[AddressSpace] = ()
) -> bool:
    """Take a folio that only `mm` and `others` map, by PTEs, apart into single pages; what is not mapped is freed.

    Pages of nothing but zeros become the zero page, on kernels that look. Whether a locked mapping had any of it.
    """
    frames = core.memory.frames
    head, pages = folio.head, folio.pages
    slots, addresses = rmap.pte_slots(core, mm, folio, near)
    locked = _locked(mm, addresses)
    for other in others:
        more, places = rmap.pte_slots(core, other, folio, near)
        slots, locked = np.append(slots, more), np.append(locked, _locked(other, places))
    if core.caps.migration_makes_soft_dirty:
        dirty = (core.pool.flat[slots] & np.uint64(DIRTY)) != 0
        core.pool.flat[slots[dirty]] |= np.uint64(core.soft_dirty)
    old = core.pool.flat[slots]
    if (old & np.uint64(DIRTY)).any():
        frames.set_bits(head, pages, int(PageFlag.DIRTY))
    # Unmapped first, page by page, each from a locked mapping one lock less; what locks are left stay with the head.
    locks = core.mlocks.pop(head, 1) if frames.flags_at[head] & mapping.MLOCKED else 0
    left = locks - int(np.count_nonzero(locked))
    mlocked = left > 0
    if locks and not mlocked:
        frames.clear_bits(head, pages, mapping.MLOCKED)
    if folio.order == core.geometry.pmd_order:
        core.count("thp_split_page")
    core.memory.dissolve(folio)
    if left > 1:
        core.mlocks[head] = left
    for index in np.flatnonzero(frames.mapcount[head : head + pages] == 0).tolist():
        core.memory.free(head + index)
    if core.caps.split_maps_zero and not mlocked:
        # One after the other: once a locked mapping has a page again, it is locked for all that come after.
        within, turn = (old & np.uint64(FIELD)).view(np.int64) - head, np.arange(len(slots))
        first = np.full(pages, len(slots))
        np.minimum.at(first, within[locked], turn[locked])
        _map_zeros(core, core.pool.flat, slots[turn < first[within]])
    # Mapped anew, as small pages: those of a locked mapping are locked now.
    for pfn in (old[locked] & np.uint64(FIELD)).tolist():
        mapping.mlock(core, pfn, 1)
    core.count("split_folio")
    return bool(locked.any())


def split_whole(core: Core, entries: U64Array, index: NDArray[np.intp], pfns: Pfns) -> None:
    """`split_folio` for many at once: `entries[index]` map `pfns`, all pages of folios that nobody else maps."""
    if not len(pfns):
        return
    frames = core.memory.frames
    written = (entries[index] & np.uint64(DIRTY)) != 0
    if core.caps.migration_makes_soft_dirty:
        entries[index[written]] |= np.uint64(core.soft_dirty)
    dirty = np.unique((pfns - frames.behind[pfns])[written])
    frames.flags[pfns[np.isin(pfns - frames.behind[pfns], dirty)]] |= np.uint64(PageFlag.DIRTY)
    orders = core.memory.large.orders(pfns[frames.behind[pfns] == 0])
    if huge := int((orders == core.geometry.pmd_order).sum()):
        core.count("thp_split_page", huge)
    core.count("split_folio", core.memory.dissolve_many(pfns))
    if core.caps.split_maps_zero:
        _map_zeros(core, entries, index)


def _map_zeros(core: Core, entries: U64Array, index: NDArray[np.intp]) -> None:
    """Of the single pages that `entries[index]` map, map the zero page instead of those that hold only zeros."""
    frames = core.memory.frames
    pfns = (entries[index] & np.uint64(FIELD)).view(np.int64)
    zero = core.memory.contents.zero(frames.content[pfns])
    index, pfns = index[zero], pfns[zero]
    entries[index] = entries[index] & np.uint64(UFFD_WP | SOFT_DIRTY) | np.uint64(
        PRESENT | SPECIAL | YOUNG | core.zero_pfn
    )
    np.subtract.at(frames.mapcount, pfns, 1)
    gone = np.unique(pfns)
    core.memory.free_pages(gone[frames.mapcount[gone] == 0])
