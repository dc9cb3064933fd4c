"""Taking folios out of memory, whoever maps them: lazily freed and files' ones are dropped, others go to swap."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.folios import LargeFolio
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.services import filereclaim, lru, thp
from pmcore.backends.sim.virtual import mapping, rmap
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    PRESENT,
    SOFT_DIRTY,
    SPECIAL,
    SWAP,
    SWAP_EXCLUSIVE,
    UFFD_WP,
    YOUNG,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pmcore.arrays import BoolArray
    from pmcore.backends.sim.machine import Core

__all__ = ["Evicted", "evict", "leave", "leave_one", "mlock_found", "take_apart"]

_ALL = (1 << 64) - 1
_ACTIVE, _DIRTY, _SWAPBACKED = int(PageFlag.ACTIVE), int(PageFlag.DIRTY), int(PageFlag.SWAPBACKED)
_SWAPCACHE, _KSM = int(PageFlag.SWAPCACHE), int(PageFlag.KSM)


class Evicted(NamedTuple):
    """Pages that were freed, that are written and wait in the swap cache, and that had to stay."""

    freed: int = 0
    written: int = 0
    kept: int = 0
    #: Of the freed ones those that were lazily free.
    discarded: int = 0
    #: Of the freed ones those of files.
    dropped: int = 0


def _among(core: Core, pfns: Pfns, maps: rmap.Mappings) -> rmap.Mappings:
    """Those of the mappings whose folio begins with one of the frames."""
    chosen = np.zeros(core.memory.frames.rows, dtype=np.bool_)
    chosen[pfns] = True
    keep = chosen[maps.pfns - core.memory.frames.behind[maps.pfns]]
    if keep.all():
        return maps
    return rmap.Mappings(
        slots=maps.slots[keep],
        pfns=maps.pfns[keep],
        addresses=maps.addresses[keep],
        owners=maps.owners[keep],
        huge=maps.huge[keep],
        mms=maps.mms,
    )


def evict(core: Core, heads: Pfns, maps: rmap.Mappings) -> Evicted:
    """Take the folios out of memory, in their order; `maps` holds all that maps them."""
    frames = core.memory.frames
    flags = frames.flags[heads]
    cached = (flags & np.uint64(CACHED | _SWAPBACKED)) == np.uint64(CACHED)
    lazy = ((flags & np.uint64(_SWAPBACKED)) == 0) & ~cached
    discarded = kept = 0
    if lazy.any():
        lazy_maps = _among(core, heads[lazy], maps)
        if not core.caps.lazyfree_discards_pmd:
            lazy_maps = _by_ptes(core, heads[lazy], lazy_maps)
        discarded, kept = _discard(core, heads[lazy], lazy_maps)
        heads, flags, cached = heads[~lazy], flags[~lazy], cached[~lazy]
    freed = written = dropped = 0
    if cached.any():
        dropped, left = filereclaim.evict(core, heads[cached], _among(core, heads[cached], maps))
        kept += left
        heads, flags = heads[~cached], flags[~cached]
    if (flags & np.uint64(COMPOUND)).any():
        heads, maps, (freed, written, left) = _large(core, heads, _among(core, heads, maps))
        kept += left
    if len(heads):
        more, waits, left = _swap_out(core, heads, _among(core, heads, maps))
        freed, written, kept = freed + more, written + waits, kept + left
    return Evicted(freed + discarded + dropped, written, kept, discarded, dropped)


# -- lazily freed ----------------------------------------------------------------------------------------


def _discard(core: Core, heads: Pfns, maps: rmap.Mappings) -> tuple[int, int]:
    """Drop what was not written since MADV_FREE; what was is ordinary memory again, and active: (freed, kept) pages."""
    frames, at = core.memory.frames, core.pool.at
    pages = lru.sizes(core, heads)
    dirty_entries = (core.pool.flat[maps.slots] & np.uint64(DIRTY)) != 0
    dirty = (frames.flags[heads] & np.uint64(_DIRTY)) != 0
    folio_of = maps.pfns - frames.behind[maps.pfns]
    for head in np.unique(folio_of[dirty_entries]).tolist():
        index = int(np.flatnonzero(heads == head)[0])
        mine = np.flatnonzero(folio_of == head)
        if not dirty[index]:
            # One entry after the other is emptied, up to the first that was written.
            for place in mine[: int(np.argmax(dirty_entries[mine]))].tolist():
                at[int(maps.slots[place])] = 0
                _unmap_one(core, maps, place)
        dirty[index] = True
    rescued = heads[dirty]
    if len(rescued):
        lru.set_flags(core, rescued, add=_SWAPBACKED | _DIRTY | _ACTIVE)
        lru.to_head(core, rescued)
        maps = _among(core, heads[~dirty], maps)
    gone = heads[~dirty]
    core.pool.flat[maps.slots] = 0
    frames.mapcount[lru.pages_of(core, gone)] = 0
    small = (frames.flags[gone] & np.uint64(COMPOUND)) == 0
    core.memory.free_pages(gone[small])
    for head in gone[~small].tolist():
        core.memory.free_folio(core.memory.large[head])
    core.count("lazyfree_discard", int(pages[~dirty].sum()))
    return int(pages[~dirty].sum()), int(pages[dirty].sum())


def _unmap_one(core: Core, maps: rmap.Mappings, place: int) -> None:
    """Uncount one mapping whose entry is empty by now (other mappings are left)."""
    frames, pfn = core.memory.frames, int(maps.pfns[place])
    folio = core.memory.large.get(pfn - int(frames.behind[pfn]))
    if folio is None:
        frames.mapcount_at[pfn] -= 1
        return
    huge = bool(maps.huge[place])
    frames.mapcount[pfn : pfn + (folio.pages if huge else 1)] -= 1
    folio.entire -= huge
    folio.add(maps.mms[int(maps.owners[place])].number, -1)


# -- large folios ----------------------------------------------------------------------------------------


def _large(core: Core, heads: Pfns, maps: rmap.Mappings) -> tuple[Pfns, rmap.Mappings, tuple[int, int, int]]:
    """Large folios among others: those that the first area can take whole are swapped out, the others taken apart.

    The single pages that are left, in order, what maps them, and (freed, written, kept) pages.
    """
    large = core.memory.large
    maps = _by_ptes(core, heads, maps)
    freed = written = kept = 0
    apart: list[LargeFolio] = []
    pieces = [heads[:0]]
    for head in heads.tolist():
        folio = large.get(head)
        part = np.arange(head, head + (folio.pages if folio else 1), dtype=np.int64)
        if folio is None:
            pieces.append(part)
        elif folio.entire:
            lru.set_flags(core, part[:1], add=_ACTIVE)
            kept += folio.pages
        elif _whole(core, folio):
            gone, waits, _ = _swap_out(core, part, _among(core, part[:1], maps), folio=folio)
            freed, written = freed + gone, written + waits
        else:
            apart.append(folio)
            pieces.append(part)
    singles = np.concatenate(pieces)
    left = take_apart(core, apart, maps)
    return singles[left[singles]], maps, (freed, written, kept)


def _by_ptes(core: Core, heads: Pfns, maps: rmap.Mappings) -> rmap.Mappings:
    """What maps the folios, once those that PMDs map are mapped by PTEs."""
    if not maps.huge.any():
        return maps
    for place in np.flatnonzero(maps.huge).tolist():
        mm, addr = maps.mms[int(maps.owners[place])], int(maps.addresses[place])
        vma = mm.vmas.at(addr)
        assert vma is not None
        try:
            thp.split_pmd(core, mm, vma, addr)
        except NoMemory:
            continue  # not even a page table is left: this one stays
    chosen = np.zeros(core.memory.frames.rows, dtype=np.bool_)
    chosen[lru.pages_of(core, heads)] = True
    return rmap.find(core, core.spaces.values(), chosen)


def _whole(core: Core, folio: LargeFolio) -> bool:
    """Whether the folio has neighbouring slots, or gets them."""
    frames, head = core.memory.frames, folio.head
    if frames.flags_at[head] & _SWAPCACHE:
        return True
    if not (frames.mapcount[head : head + folio.pages] > 0).all():
        return False  # mapped in part: taken apart at once
    field = core.swap.take_block(head, folio.order)
    if field < 0:
        return False
    frames.swap[head : head + folio.pages] = field + 1 + (np.arange(folio.pages, dtype=np.int64) << 5)
    frames.set_bits(head, folio.pages, _DIRTY)
    return True


def take_apart(core: Core, folios: list[LargeFolio], maps: rmap.Mappings) -> BoolArray:
    """Make single pages of folios that PTEs map, of one process or several; by PFN, which frames are not freed by it.

    What nobody maps is freed; pages of zeros become the zero page, on kernels that look.
    """
    frames, flat = core.memory.frames, core.pool.flat
    left = np.ones(frames.rows, dtype=np.bool_)
    if not folios:
        return left
    pages = np.concatenate([np.arange(f.head, f.head + f.pages, dtype=np.int64) for f in folios])
    maps = _among(core, np.array([folio.head for folio in folios], dtype=np.int64), maps)
    if core.caps.migration_makes_soft_dirty:
        written = maps.slots[(flat[maps.slots] & np.uint64(DIRTY)) != 0]
        flat[written] |= np.uint64(core.soft_dirty)
    old = flat[maps.slots]
    dirty = maps.pfns[(old & np.uint64(DIRTY)) != 0]
    for head in np.unique(dirty - frames.behind[dirty]).tolist():
        frames.set_bits(head, core.memory.large[head].pages, _DIRTY)
    cached = (frames.flags[pages] & np.uint64(_SWAPCACHE)) != 0
    for folio in folios:
        core.memory.dissolve(folio)
        core.mlocks.pop(folio.head, None)
    core.count("split_folio", len(folios))
    if huge := sum(folio.order == core.geometry.pmd_order for folio in folios):
        core.count("thp_split_page", huge)
    gone = np.zeros(frames.rows, dtype=np.bool_)
    if core.caps.split_maps_zero:
        gone[pages] = core.memory.contents.zero(frames.content[pages]) & ~cached
        gone[maps.pfns[_in_locked(maps)]] = False
        zero = gone[maps.pfns]
        flat[maps.slots[zero]] = old[zero] & np.uint64(UFFD_WP | SOFT_DIRTY) | np.uint64(
            PRESENT | SPECIAL | YOUNG | core.zero_pfn
        )
        frames.mapcount[maps.pfns[zero]] = 0
    freed = pages[gone[pages] | (frames.mapcount[pages] == 0)]
    core.memory.free_pages(freed)
    left[freed] = False
    return left


def _in_locked(maps: rmap.Mappings) -> BoolArray:
    """Which of the mappings lie in locked VMAs."""
    found = np.zeros(len(maps.slots), dtype=np.bool_)
    for owner, mm in enumerate(maps.mms):
        for vma in mm.vmas:
            if vma.flags & VmFlag.LOCKED:
                found |= (maps.owners == owner) & (maps.addresses >= vma.start) & (maps.addresses < vma.end)
    return found


# -- swap ------------------------------------------------------------------------------------------------


def _swap_out(
    core: Core, pfns: Pfns, maps: rmap.Mappings, *, folio: LargeFolio | None = None
) -> tuple[int, int, int]:
    """Replace all entries of pages by swap entries: (freed, written and cached, kept) pages.

    `folio`: the pages are all of this large folio, which has its slots already.
    """
    frames, flat = core.memory.frames, core.pool.flat
    fields = frames.swap[pfns] - 1
    fresh = np.flatnonzero(fields < 0)
    failed = 0
    if len(fresh):
        found = core.swap.take(len(fresh))
        fields[fresh[: len(found)]] = found
        failed = len(fresh) - len(found)
        if failed:
            lru.set_flags(core, pfns[fresh[len(found) :]], add=_ACTIVE)
            keep = fields >= 0
            pfns, fields = pfns[keep], fields[keep]
            maps = _among(core, pfns, maps)
        # What gets a slot has to be written, whatever its entries say (add_to_swap).
        frames.flags[pfns[frames.swap[pfns] == 0]] |= np.uint64(_DIRTY)
        frames.swap[pfns] = fields + 1
    if not len(pfns):
        return 0, 0, failed
    old = flat[maps.slots]
    frames.flags[maps.pfns[(old & np.uint64(DIRTY)) != 0]] |= np.uint64(_DIRTY)
    new = (frames.swap[maps.pfns] - 1).view(np.uint64) | np.uint64(SWAP)
    new |= old & np.uint64(SOFT_DIRTY | UFFD_WP)
    new[(frames.flags[maps.pfns] & np.uint64(ANON_EXCLUSIVE)) != 0] |= np.uint64(SWAP_EXCLUSIVE)
    flat[maps.slots] = new
    counts = frames.mapcount[pfns]
    frames.mapcount[pfns] = 0
    frames.flags[pfns] &= np.uint64(~(ANON_EXCLUSIVE | _ACTIVE) & _ALL)
    if folio is not None:
        folio.mapped = folio.entire = 0
        folio.by_mm.clear()
        folio.known.clear()
        folio.shared = False
        if (frames.flags[pfns] & np.uint64(_DIRTY)).any():  # a flag of the folio
            frames.flags[pfns] |= np.uint64(_DIRTY)
    for area in core.swap.there:
        mine = (fields & 0x1F) == area.number
        area.counts[fields[mine] >> 5] += counts[mine]
    core.count("swap_out", int(np.count_nonzero(counts)))
    gone = leave(core, pfns, fields, folio=folio)
    return int(gone.sum()), int((~gone).sum()), failed


def leave(core: Core, pfns: Pfns, fields: NDArray[np.int64], *, folio: LargeFolio | None = None) -> BoolArray:
    """Write pages that nobody maps any more to their slots; which of them were freed.

    The others stay in the swap cache, clean, next to go: their area completes a write only later. What was clean in the
    swap cache, or holds nothing but zeros (on kernels that note that instead of writing), goes at once.
    """
    memory, frames = core.memory, core.memory.frames
    areas = core.swap.there
    devices = [area.number for area in areas if not area.compressed]
    if devices:
        sent = np.isin(fields & 0x1F, devices) & ((frames.flags[pfns] & np.uint64(_DIRTY)) != 0)
        if core.caps.swap_zeromap:
            sent &= ~memory.contents.zero(frames.content[pfns])
        core.count("pswpout", int(sent.sum()))
    if memory.grouped:
        for area in areas:
            mine = slice(None) if len(areas) == 1 else (fields & 0x1F) == area.number
            core.groups.slots_given(area, fields[mine] >> 5, pfns[mine])
    now = [area.number for area in areas if area.immediate]
    if len(now) == len(areas):
        gone = np.ones(len(pfns), dtype=np.bool_)
    else:
        gone = np.isin(fields & 0x1F, now) | ((frames.flags[pfns] & np.uint64(_DIRTY)) == 0)
        if core.caps.swap_zeromap:
            gone |= memory.contents.zero(frames.content[pfns])
        if folio is not None:
            gone[:] = gone.all()
    left, there = (pfns, fields) if gone.all() else (pfns[gone], fields[gone])
    memory.age += len(left)
    if core.ksm.nodes or any(area.merged for area in areas):
        _note_merged(core, left, there)
    for area in areas:
        mine = slice(None) if len(areas) == 1 else (there & 0x1F) == area.number
        slots = there[mine] >> 5
        area.cached[slots] = 0
        area.content[slots] = frames.content[left[mine]]
        if memory.grouped:
            core.groups.swapped_out(area, slots, left[mine])
        # All of them left at one time: what lies between an eviction and a refault is counted from the last.
        area.shadow[slots] = memory.age + 1
    frames.content[left] = 0
    frames.swap[left] = 0
    if len(left) < len(pfns):
        stay = pfns[~gone]
        core.swap.cache(stay, fields[~gone])
        frames.flags[stay] &= np.uint64(~_DIRTY & _ALL)
        lru.to_tail(core, stay[:1] if folio is not None else stay)
    if folio is None:
        memory.free_pages(left)
    elif len(left):
        memory.free_folio(folio)
    return gone


def leave_one(core: Core, pfn: int, field: int) -> None:
    """`leave` for one page."""
    memory, frames = core.memory, core.memory.frames
    area, slot, row = core.swap.area(field), field >> 5, frames.content_at[pfn]
    if memory.grouped:
        core.groups.slots_given(area, np.array([slot]), np.array([pfn]))
    if not area.compressed and frames.flags_at[pfn] & _DIRTY:
        core.count("pswpout", not (core.caps.swap_zeromap and memory.contents.is_zero(row)))
    if (
        area.immediate
        or not frames.flags_at[pfn] & _DIRTY
        or (core.caps.swap_zeromap and memory.contents.is_zero(row))
    ):
        memory.age += 1
        if slot in area.merged or (frames.flags_at[pfn] & _KSM and area.counts[slot] > 1):
            area.merged[slot] = ()
        area.cached[slot], area.content[slot], area.shadow[slot] = 0, row, memory.age + 1
        frames.content_at[pfn] = frames.swap_at[pfn] = 0
        if memory.grouped:
            core.groups.swapped_out(area, slot, pfn)
        memory.free(pfn)
        return
    core.swap.cache_one(pfn, field)
    frames.flags_at[pfn] &= ~_DIRTY
    memory.lru_tail -= 1
    frames.lru_at[pfn] = memory.lru_tail


def _note_merged(core: Core, pfns: Pfns, fields: NDArray[np.int64]) -> None:
    """Remember slots that entries of several places name: those of merged pages, and of what was read back from one."""
    merged = (core.memory.frames.flags[pfns] & np.uint64(PageFlag.KSM)) != 0
    for field, is_merged in zip(fields.tolist(), merged.tolist(), strict=True):
        area, slot = core.swap.area(field), field >> 5
        if slot in area.merged or (is_merged and area.counts[slot] > 1):
            area.merged[slot] = ()


def mlock_found(core: Core, heads: Pfns) -> None:
    """Folios that reclaim came across in a locked VMA: unevictable from here on."""
    for head, pages in zip(heads.tolist(), lru.sizes(core, heads).tolist(), strict=True):
        mapping.mlock(core, head, pages)
