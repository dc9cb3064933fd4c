"""Swapping in at a fault, and out on request."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.services import ksm_swap
from pmcore.backends.sim.virtual import mapping
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    PRESENT,
    SOFT_DIRTY,
    SWAP_EXCLUSIVE,
    UFFD_WP,
    WRITE,
    YOUNG,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import AddressSpaceFault
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["bring_in", "simple", "swap_in", "swap_in_many"]

_ANON, _ACTIVE, _MLOCKED = int(PageFlag.ANON), int(PageFlag.ACTIVE), int(PageFlag.MLOCKED)
_SWAPCACHE, _DIRTY = int(PageFlag.SWAPCACHE), int(PageFlag.DIRTY)
_KSM, _HWPOISON, _LOCKED = int(PageFlag.KSM), int(PageFlag.HWPOISON), int(PageFlag.LOCKED)


def bring_in(core: Core, field: int) -> int:
    """The page of a slot, in the swap cache: the one that is there, or one read anew. Raises NoMemory."""
    pfn = core.swap.cached(field)
    if pfn >= 0:
        return pfn
    area = core.swap.area(field)
    slot = field >> 5
    # It belongs to nobody before it is mapped.
    flags = mapping.NEW_ANON & ~_ANON
    row = int(area.content[slot])
    if area.compressed and not core.memory.contents.is_zero(row):
        flags |= _DIRTY  # read from compressed memory, which gives its copy away
    if core.memory.recently(int(area.shadow[slot])):
        flags |= _ACTIVE
    if core.memory.grouped:
        with core.groups.charging(int(core.groups.owners(area, slot))):
            pfn = core.memory.page(flags)
        core.groups.read_back(area, slot)
    else:
        pfn = core.memory.page(flags)
    core.memory.on_lru(pfn)
    area.shadow[slot] = 0
    core.memory.frames.content_at[pfn] = row
    area.content[slot] = 0
    core.swap.cache_one(pfn, field)
    core.count("swap_in")
    if not area.compressed and not (core.caps.swap_zeromap and core.memory.contents.is_zero(row)):
        core.count("pswpin")
    return pfn


def swap_in(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    slot: int,
    pte: int,
    *,
    write: bool,
    addr: int,
    whole: bool = True,
) -> None:
    """Map the page of a swap entry (do_swap_page). A write that still may not be is asked again by the caller.

    `addr` is where; unless `whole`, a large folio of the swap cache is not mapped at once.
    """
    field = pte & FIELD
    fresh_read = not write and core.swap.cached(field) < 0
    pfn = bring_in(core, field)
    if core.memory.frames.flags_at[pfn] & _LOCKED:
        raise AddressSpaceFault("SIGSTOP", addr, "the access waits for the end of a migration")
    if core.memory.frames.flags_at[pfn] & _HWPOISON:
        raise AddressSpaceFault("SIGBUS", addr, "the page is poisoned", lsb=core.geometry.page_shift)
    if core.memory.frames.flags_at[pfn] & COMPOUND:
        _large_in(core, mm, vma, slot, pte, pfn, write=write, addr=addr if whole else -1)
        return
    frames, area = core.memory.frames, core.swap.area(field)
    mm.prepare_anon(vma)
    if (area.merged or core.ksm.nodes) and ksm_swap.copied(core, vma, slot, pte, pfn, addr, write=write):
        return
    area.counts[field >> 5] -= 1
    flags = frames.flags_at[pfn]
    wanted = core.swap.half_full or vma.flags & VmFlag.LOCKED or flags & _MLOCKED
    if wanted or (write and frames.mapcount_at[pfn] == 0 and not flags & _KSM):
        core.swap.uncache(pfn)
    # A page just read lies in a processor's batch, which holds it too; a write has the batch emptied first.
    alone = frames.mapcount_at[pfn] == 0 and not frames.flags_at[pfn] & _SWAPCACHE
    exclusive = bool(pte & SWAP_EXCLUSIVE) or (alone and not fresh_read)
    entry = pfn | PRESENT | YOUNG | pte & (SOFT_DIRTY | UFFD_WP)
    if exclusive and not flags & _KSM:
        frames.flags_at[pfn] |= ANON_EXCLUSIVE
        protected = pte & UFFD_WP and vma.flags & VmFlag.UFFD_WP
        clean = core.soft_dirty and not vma.flags & VmFlag.SOFTDIRTY and not pte & SOFT_DIRTY
        may = vma.flags & VmFlag.WRITE and not protected and not clean
        if may and (write or core.caps.swapin_writable):
            entry |= WRITE
            if write:
                entry |= DIRTY | core.soft_dirty
    frames.mapcount_at[pfn] += 1
    fresh = not frames.flags_at[pfn] & _ANON
    frames.flags_at[pfn] |= _ANON
    if vma.flags & VmFlag.LOCKED and not (fresh and core.caps.swapin_not_mlocked):
        mapping.mlock(core, pfn, 1)
    core.pool.at[slot] = entry


def _large_in(
    core: Core, mm: AddressSpace, vma: VmArea, slot: int, pte: int, pfn: int, *, write: bool, addr: int
) -> None:
    """Map a page of a large folio that is still in the swap cache; all of them where all are swapped out alike."""
    frames, size = core.memory.frames, core.geometry.page_size
    folio = core.memory.large[frames.head(pfn)]
    field, count, skip = pte & FIELD, 1, pfn - folio.head
    start = addr - addr % size - skip * size
    inside = addr >= 0 and vma.start <= start and start + folio.pages * size <= vma.end
    first = slot - skip
    if inside and first >= 0 and first // core.pool.entries == (first + folio.pages - 1) // core.pool.entries:
        wanted = np.uint64(pte - (skip << 5)) + (np.arange(folio.pages, dtype=np.uint64) << np.uint64(5))
        if (core.pool.flat[first : first + folio.pages] == wanted).all():
            slot, count, pfn, field = first, folio.pages, folio.head, field - (skip << 5)
    area = core.swap.area(field)
    mm.prepare_anon(vma)
    area.counts[field >> 5 : (field >> 5) + count] -= 1
    flags = frames.flags_at[pfn]
    wanted_back = core.swap.half_full or vma.flags & VmFlag.LOCKED or flags & _MLOCKED
    if wanted_back or (write and not folio.mapped):
        core.swap.uncache(folio.head, folio.order)
    alone = not folio.mapped and not frames.flags_at[pfn] & _SWAPCACHE
    entry = PRESENT | YOUNG | pte & (SOFT_DIRTY | UFFD_WP)
    if pte & SWAP_EXCLUSIVE or alone:
        frames.set_bits(pfn, count, ANON_EXCLUSIVE)
        protected = pte & UFFD_WP and vma.flags & VmFlag.UFFD_WP
        clean = core.soft_dirty and not vma.flags & VmFlag.SOFTDIRTY and not pte & SOFT_DIRTY
        may = vma.flags & VmFlag.WRITE and not protected and not clean
        if may and (write or core.caps.swapin_writable):
            entry |= WRITE | (DIRTY | core.soft_dirty if write else 0)
    frames.set_bits(folio.head, folio.pages, _ANON)
    frames.mapcount[pfn : pfn + count] += 1
    folio.add(mm.number, count)
    core.pool.flat[slot : slot + count] = np.arange(pfn, pfn + count, dtype=np.uint64) | np.uint64(entry)


def simple(core: Core, vma: VmArea, entries: U64Array, swap: BoolArray) -> BoolArray:
    """Which swap entries `swap_in_many` can take: slots that one entry names and no page caches."""
    chosen = swap.copy()
    if vma.flags & VmFlag.LOCKED or not swap.any():
        chosen[:] = False
        return chosen
    fields = (entries[swap] & np.uint64(FIELD)).view(np.int64)
    good = np.zeros(len(fields), dtype=np.bool_)
    for area in core.swap.order:
        mine = (fields & 0x1F) == area.number
        slots = fields[mine] >> 5
        good[mine] = (area.counts[slots] == 1) & (area.cached[slots] == 0)
    chosen[swap] = good
    return chosen


def swap_in_many(core: Core, mm: AddressSpace, vma: VmArea, entries: U64Array, *, write: bool) -> None:
    """`swap_in` for a run of entries that `simple` allows, all of one area, in their order.

    Raises NoMemory with those before it done.
    """
    if core.memory.grouped:
        fields = (entries & np.uint64(FIELD)).view(np.int64)
        owners = core.groups.owners(core.swap.area(int(fields[0])), fields >> 5)
        cuts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
        if len(cuts) > 2:
            for low, high in itertools.pairwise(cuts):
                swap_in_many(core, mm, vma, entries[low:high], write=write)
            return
        with core.groups.charging(int(owners[0])):
            _swap_in_run(core, mm, vma, entries, write=write)
        return
    _swap_in_run(core, mm, vma, entries, write=write)


def _swap_in_run(core: Core, mm: AddressSpace, vma: VmArea, entries: U64Array, *, write: bool) -> None:
    """The same for pages that are charged to one group, the one that runs."""
    memory, frames = core.memory, core.memory.frames
    fields = (entries & np.uint64(FIELD)).view(np.int64)
    area, slots = core.swap.area(int(fields[0])), fields >> 5
    mm.prepare_anon(vma)
    # How many of them find more than half of the slots in use, and so give theirs back; a write always does.
    total, free = core.swap.total, core.swap.free
    kept_from = len(fields) if write else min(len(fields), max(0, -(-total // 2) - free))
    pfns = memory.pages(len(fields), mapping.NEW_ANON)
    got = len(pfns)
    fields, slots, done = fields[:got], slots[:got], entries[:got]
    rows = area.content[slots]
    flags = np.full(got, mapping.NEW_ANON, dtype=np.uint64)
    if area.compressed:
        flags[~memory.contents.zero(rows)] |= np.uint64(_DIRTY)
    shadow = area.shadow[slots]
    flags[(shadow != 0) & (memory.age - (shadow - 1) <= memory.managed)] |= np.uint64(PageFlag.ACTIVE)
    flags[:kept_from] |= np.uint64(_DIRTY)
    frames.content[pfns] = rows
    if memory.grouped:
        core.groups.read_back(area, slots)
    area.content[slots] = area.shadow[slots] = area.counts[slots] = 0
    exclusive = (done & np.uint64(SWAP_EXCLUSIVE)) != 0
    if write:  # read anew they lie in a batch, which holds them too
        exclusive[:] = True
    flags[exclusive] |= np.uint64(ANON_EXCLUSIVE)
    frames.flags[pfns] = flags
    memory.on_lru_pages(pfns)
    if kept_from < got:
        core.swap.cache(pfns[kept_from:], fields[kept_from:])
    area.give_back(slots[:kept_from])
    new = pfns.view(np.uint64) | np.uint64(PRESENT | YOUNG) | done & np.uint64(SOFT_DIRTY | UFFD_WP)
    if vma.flags & VmFlag.WRITE and (write or core.caps.swapin_writable):
        may = exclusive
        if vma.flags & VmFlag.UFFD_WP:
            may = may & ((done & np.uint64(UFFD_WP)) == 0)
        if core.soft_dirty and not vma.flags & VmFlag.SOFTDIRTY:
            may = may & ((done & np.uint64(SOFT_DIRTY)) != 0)
        new[may] |= np.uint64(WRITE | (DIRTY | core.soft_dirty if write else 0))
    frames.mapcount[pfns] = 1
    entries[:got] = new
    core.count("swap_in", got)
    if not area.compressed:
        read = ~memory.contents.zero(rows) if core.caps.swap_zeromap else np.ones(got, dtype=np.bool_)
        core.count("pswpin", int(read.sum()))
    if got < len(entries):
        raise NoMemory
