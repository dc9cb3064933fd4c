"""Taking memory back: MADV_COLD, MADV_FREE, MADV_PAGEOUT, and reclaim on request or under pressure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import COMPOUND, LargeFolio
from pmcore.backends.sim.services import pagecache, thp
from pmcore.backends.sim.services.pagecache import Inode
from pmcore.backends.sim.services.swap import SwapArea
from pmcore.backends.sim.virtual.filemap import cached_only
from pmcore.backends.sim.virtual.mapping import MLOCKED
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    PRESENT,
    SOFT_DIRTY,
    SWAP,
    SWAP_EXCLUSIVE,
    UFFD_MARKER,
    UFFD_WP,
    YOUNG,
)
from pmcore.backends.sim.virtual.tables import Extent
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import swap_entries
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["cold", "lazy_free", "pageout"]

_ALL = (1 << 64) - 1
_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_ACTIVE, _REFERENCED, _DIRTY = int(PageFlag.ACTIVE), int(PageFlag.REFERENCED), int(PageFlag.DIRTY)
_SWAPBACKED, _SWAPCACHE, _LRU = int(PageFlag.SWAPBACKED), int(PageFlag.SWAPCACHE), int(PageFlag.LRU)


# -- choosing pages --------------------------------------------------------------------------------------


def _huge_blocks(core: Core, extent: Extent, start: int, end: int) -> list[tuple[int, bool]]:
    """(address, whether the range covers it whole) of the huge pages of an extent, the huge zero page left out."""
    found = []
    for index, entry in enumerate(extent.entries.tolist()):
        addr = extent.start + index * extent.size
        if entry & FIELD != core.huge_zero_pfn:
            found.append((addr, start <= addr and addr + extent.size <= end))
    return found


def _split_partial(core: Core, mm: AddressSpace, start: int, end: int) -> None:
    """Take apart the large folios of this process alone that the range covers in part."""
    for extent in list(mm.tables.extents(start, end)):
        if extent.huge:
            for addr, whole in _huge_blocks(core, extent, start, end):
                slot = mm.tables.pmd_slot(addr)
                folio = core.memory.large[core.pool.at[slot] & FIELD]
                if not whole and folio.mapped == folio.entire == 1:
                    vma = mm.vmas.at(addr)
                    assert vma is not None
                    thp.split_pmd(core, mm, vma, addr, migrating=True)
                    thp.split_folio(core, mm, folio, addr)
            continue
        if not core.memory.large:
            continue
        present = (extent.entries & _PRESENT) != 0
        pfns = (extent.entries[present] & _FIELD).view(np.int64)
        frames = core.memory.frames
        compound = pfns[(frames.flags[pfns] & np.uint64(COMPOUND)) != 0]
        compound = compound[compound != core.huge_zero_pfn]
        heads, counts = np.unique(compound - frames.behind[compound], return_counts=True)
        for head, count in zip(heads.tolist(), counts.tolist(), strict=True):
            part = core.memory.large.get(head)
            if part is not None and count < part.pages and len(part.by_mm) == 1:
                thp.split_folio(core, mm, part, extent.start)


def _own_pages(core: Core, entries: U64Array) -> BoolArray:
    """Which present entries map a page that is mapped nowhere else, on an LRU list, not the zero page."""
    chosen: BoolArray = (entries & _PRESENT) != 0
    pfns = (entries[chosen] & _FIELD).view(np.int64)
    frames = core.memory.frames
    good = (frames.mapcount[pfns] == 1) & ((frames.flags[pfns] & np.uint64(_LRU)) != 0)
    chosen[chosen] = good
    if core.memory.large:
        pfns = (entries[chosen] & _FIELD).view(np.int64)
        compound = (frames.flags[pfns] & np.uint64(COMPOUND)) != 0
        keep = np.ones(len(pfns), dtype=np.bool_)
        for index in np.flatnonzero(compound).tolist():
            folio = core.memory.large[int(pfns[index]) - int(frames.behind[pfns[index]])]
            keep[index] = folio.mapped == folio.pages and not folio.entire
        chosen[chosen] = keep
    return chosen


# -- advice ----------------------------------------------------------------------------------------------


def cold(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """MADV_COLD: not accessed lately, on the inactive list."""
    _split_partial(core, mm, start, end)
    frames = core.memory.frames
    for extent in mm.tables.extents(start, end):
        if extent.huge:
            for addr, whole in _huge_blocks(core, extent, start, end):
                slot = mm.tables.pmd_slot(addr)
                folio = core.memory.large[core.pool.at[slot] & FIELD]
                if whole and folio.mapped == 1:
                    core.pool.at[slot] &= ~YOUNG
                    frames.clear_bits(folio.head, folio.pages, _REFERENCED | _ACTIVE)
                    core.memory.on_lru(folio.head, folio.pages)
            continue
        chosen = _own_pages(core, extent.entries)
        extent.entries[chosen] &= np.uint64(~YOUNG & _ALL)
        pfns = (extent.entries[chosen] & _FIELD).view(np.int64)
        evictable = pfns[(frames.flags[pfns] & np.uint64(MLOCKED)) == 0]
        frames.flags[pfns] &= np.uint64(~_REFERENCED & _ALL)
        frames.flags[evictable] &= np.uint64(~_ACTIVE & _ALL)
        core.memory.on_lru_pages(evictable)


def lazy_free(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """MADV_FREE: swap entries are emptied, pages may be discarded until they are written again."""
    _split_partial(core, mm, start, end)
    frames = core.memory.frames
    clean = np.uint64(~(YOUNG | DIRTY) & _ALL)
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        if extent.huge:
            for addr, whole in _huge_blocks(core, extent, start, end):
                slot = mm.tables.pmd_slot(addr)
                folio = core.memory.large[core.pool.at[slot] & FIELD]
                if whole and folio.mapped == 1:
                    core.pool.at[slot] &= ~(YOUNG | DIRTY)
                    _mark_lazy(core, np.arange(folio.head, folio.head + folio.pages, dtype=np.int64))
            continue
        swap = swap_entries(entries)
        if swap.any():
            fields = entries[swap] & _FIELD
            entries[swap] = 0
            core.swap.release(fields)
        present = (entries & _PRESENT) != 0
        pfns = (entries[present] & _FIELD).view(np.int64)
        normal = pfns != core.zero_pfn
        flags = frames.flags[pfns]
        # A dirty page, or one in the swap cache, is looked at more closely: only if it is mapped here alone.
        special = normal & ((flags & np.uint64(_SWAPCACHE | _DIRTY)) != 0)
        alone = _own_pages(core, entries)[present] if special.any() else normal
        good = normal & (~special | alone)
        for index in np.flatnonzero(good & ((flags & np.uint64(_SWAPCACHE)) != 0)).tolist():
            good[index] = core.swap.uncache(int(pfns[index]))
        touched = np.zeros(len(entries), dtype=np.bool_)
        touched[present] = good
        entries[touched] &= clean
        frames.flags[pfns[good]] &= np.uint64(~_DIRTY & _ALL)
        _mark_lazy(core, pfns[good])


def _mark_lazy(core: Core, pfns: Pfns) -> None:
    """folio_mark_lazyfree: anonymous, backed by swap, evictable, not in the swap cache."""
    frames = core.memory.frames
    flags = frames.flags[pfns]
    chosen = pfns[(flags & np.uint64(_SWAPBACKED | _SWAPCACHE | MLOCKED)) == np.uint64(_SWAPBACKED)]
    frames.flags[chosen] &= np.uint64(~(_SWAPBACKED | _ACTIVE | _REFERENCED | _DIRTY) & _ALL)
    core.memory.on_lru_pages(chosen)


def pageout(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """MADV_PAGEOUT: what this process alone maps is reclaimed now."""
    _split_partial(core, mm, start, end)
    for extent in list(mm.tables.extents(start, end)):
        if extent.huge:
            for addr, whole in _huge_blocks(core, extent, start, end):
                slot = mm.tables.pmd_slot(addr)
                folio = core.memory.large[core.pool.at[slot] & FIELD]
                if whole and folio.mapped == 1 and not core.memory.frames.flags_at[folio.head] & MLOCKED:
                    _huge_out(core, mm, vma, addr, folio)
            continue
        chosen = _own_pages(core, extent.entries)
        if vma.file is not None:
            cached = chosen & cached_only(core, extent.entries)
            if cached.any():
                _shmem_out(core, mm, vma, vma.file, extent.entries, np.flatnonzero(cached))
            chosen &= ~cached
        if chosen.any():
            _out(core, mm, extent.start, extent.entries, np.flatnonzero(chosen))


def _huge_out(core: Core, mm: AddressSpace, vma: VmArea, addr: int, folio: LargeFolio) -> None:
    frames = core.memory.frames
    frames.clear_bits(folio.head, folio.pages, _REFERENCED)
    slot = mm.tables.pmd_slot(addr)
    entry = core.pool.at[slot]
    lazy = not frames.flags_at[folio.head] & _SWAPBACKED
    if lazy:
        if entry & DIRTY:
            frames.set_bits(folio.head, folio.pages, _SWAPBACKED | _DIRTY | _ACTIVE)
        elif core.caps.lazyfree_discards_pmd:
            core.pool.at[slot] = 0
            thp.zap_pmd(core, mm, vma, entry)
            return
    whole = lazy or any(area.large_folios for area in core.swap.order)
    thp.split_pmd(core, mm, vma, addr, migrating=not whole)
    first = mm.tables.pte_slot(addr)
    _out(core, mm, addr, core.pool.flat[first : first + folio.pages], np.arange(folio.pages))


def _out(core: Core, mm: AddressSpace, start: int, entries: U64Array, index: NDArray[np.intp]) -> None:
    """Reclaim the pages that `entries[index]` map (`entries` from address `start` on); each is mapped there alone."""
    frames = core.memory.frames
    pfns = (entries[index] & _FIELD).view(np.int64)
    frames.flags[pfns] &= np.uint64(~_REFERENCED & _ALL)
    flags = frames.flags[pfns]
    evictable = (flags & np.uint64(MLOCKED)) == 0
    lazy = evictable & ((flags & np.uint64(_SWAPBACKED)) == 0)
    if lazy.any():
        dirty = lazy & (((entries[index] & np.uint64(DIRTY)) != 0) | ((flags & np.uint64(_DIRTY)) != 0))
        # Written since: an ordinary page again, and an active one.
        frames.flags[pfns[dirty]] |= np.uint64(_SWAPBACKED | _DIRTY | _ACTIVE)
        gone = lazy & ~dirty
        entries[index[gone]] = 0
        _drop(core, mm, pfns[gone])
    rest = np.flatnonzero(evictable & ~lazy)
    if len(rest):
        index, pfns = index[rest], pfns[rest]
        compound = (frames.flags[pfns] & np.uint64(COMPOUND)) != 0
        if compound.any() and not any(area.large_folios for area in core.swap.order):
            for head in np.unique(pfns[compound] - frames.behind[pfns[compound]]).tolist():
                thp.split_folio(core, mm, core.memory.large[head], start)
            # What was nothing but zeros is the zero page now.
            left = (entries[index] & _FIELD) != np.uint64(core.zero_pfn)
            index, pfns = index[left], pfns[left]
        _to_swap(core, mm, entries, index, pfns)


def _shmem_out(
    core: Core, mm: AddressSpace, vma: VmArea, inode: Inode, entries: U64Array, index: NDArray[np.intp]
) -> None:
    """Reclaim pages of a shmem file that `entries[index]` map, and nothing else: the entries are emptied.

    What was never written is dropped; the rest goes to swap, or stays in the cache where that is full.
    """
    frames = core.memory.frames
    pfns = (entries[index] & _FIELD).view(np.int64)
    frames.flags[pfns] &= np.uint64(~_REFERENCED & _ALL)
    evictable = (frames.flags[pfns] & np.uint64(MLOCKED)) == 0
    index, pfns = index[evictable], pfns[evictable]
    old = entries[index]
    frames.flags[pfns[(old & np.uint64(DIRTY)) != 0]] |= np.uint64(_DIRTY)
    armed = bool(vma.flags & VmFlag.UFFD_WP)
    entries[index] = np.where(armed & ((old & np.uint64(UFFD_WP)) != 0), np.uint64(UFFD_MARKER), np.uint64(0))
    dirty = (frames.flags[pfns] & np.uint64(_DIRTY)) != 0
    clean, pfns = pfns[~dirty], pfns[dirty]
    if len(clean):
        inode.index.put(frames.index[clean], np.zeros(len(clean), dtype=np.uint64))
        pagecache.uncache(core, clean)
        _drop(core, mm, clean)
    fields = core.swap.take(len(pfns))
    kept = pfns[fields < 0]
    if len(kept):
        frames.flags[kept] |= np.uint64(_ACTIVE)
        frames.mapcount[kept] -= 1
        pfns, fields = pfns[fields >= 0], fields[fields >= 0]
    if not len(pfns):
        return
    inode.index.put(frames.index[pfns], fields.astype(np.uint64) | np.uint64(SWAP))
    pagecache.uncache(core, pfns)
    frames.flags[pfns] &= np.uint64(~_ACTIVE & _ALL)
    for area in core.swap.order:
        mine = np.flatnonzero((fields & 0x1F) == area.number)
        if len(mine):
            _write(core, mm, area, fields[mine] >> 5, pfns[mine])
    core.count("swap_out", len(pfns))


def _to_swap(core: Core, mm: AddressSpace, entries: U64Array, index: NDArray[np.intp], pfns: Pfns) -> None:
    frames = core.memory.frames
    fields = frames.swap[pfns] - 1
    missing = np.flatnonzero(fields < 0)
    failed = missing
    for area in core.swap.order:
        if not len(failed):
            break
        slots = area.take(len(failed))
        fields[failed[: len(slots)]] = slots << 5 | area.number
        failed = failed[len(slots) :]
    if len(failed):
        frames.flags[pfns[failed]] |= np.uint64(_ACTIVE)
        keep = np.ones(len(pfns), dtype=np.bool_)
        keep[failed] = False
        index, pfns, fields = index[keep], pfns[keep], fields[keep]
        if not len(pfns):
            return
    old = entries[index]
    new = fields.astype(np.uint64) | np.uint64(SWAP) | old & np.uint64(SOFT_DIRTY | UFFD_WP)
    exclusive = (frames.flags[pfns] & np.uint64(ANON_EXCLUSIVE)) != 0
    new[exclusive] |= np.uint64(SWAP_EXCLUSIVE)
    entries[index] = new
    frames.flags[pfns] &= np.uint64(~(ANON_EXCLUSIVE | _ACTIVE) & _ALL)
    for area in core.swap.order:
        mine = np.flatnonzero((fields & 0x1F) == area.number)
        if len(mine):
            _write(core, mm, area, fields[mine] >> 5, pfns[mine])
    core.count("swap_out", len(pfns))


def _write(core: Core, mm: AddressSpace, area: SwapArea, slots: NDArray[np.int64], pfns: Pfns) -> None:
    """The pages' entries name the slots now; the pages go, or stay in the swap cache until they are reclaimed."""
    frames = core.memory.frames
    area.counts[slots] += 1
    if not area.immediate:
        core.swap.cache(pfns, slots << 5 | area.number)
        frames.flags[pfns] &= np.uint64(~_DIRTY & _ALL)
        _uncount(core, mm, pfns)
        return
    area.cached[slots] = 0
    core.memory.age += len(pfns)
    area.shadow[slots] = core.memory.age + 1
    area.content[slots] = frames.content[pfns]
    frames.content[pfns] = 0
    frames.swap[pfns] = 0
    _drop(core, mm, pfns)


def _uncount(core: Core, mm: AddressSpace, pfns: Pfns) -> list[LargeFolio]:
    """Uncount the one mapping of each page; large folios of which nothing is mapped any more."""
    frames = core.memory.frames
    frames.mapcount[pfns] -= 1
    if not core.memory.large:
        return []
    compound = pfns[(frames.flags[pfns] & np.uint64(COMPOUND)) != 0]
    done = []
    heads, counts = np.unique(compound - frames.behind[compound], return_counts=True)
    for head, count in zip(heads.tolist(), counts.tolist(), strict=True):
        folio = core.memory.large[head]
        folio.add(mm.number, -count)
        if not folio.mapped:
            done.append(folio)
    return done


def _drop(core: Core, mm: AddressSpace, pfns: Pfns) -> None:
    """Free pages whose one mapping is gone."""
    small = (core.memory.frames.flags[pfns] & np.uint64(COMPOUND)) == 0
    for folio in _uncount(core, mm, pfns):
        core.memory.free_folio(folio)
    if small.any():
        core.memory.free_pages(pfns[small])
