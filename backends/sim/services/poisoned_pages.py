"""What becomes of pages that are poisoned, or moved away from frames that may fail, by what they are.

Anonymous pages, pages of shared memory, of the swap cache, merged ones; those of hugetlb pools are in `poisoned_huge`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import COMPOUND, LargeFolio
from pmcore.backends.sim.services import migrate, pagecache, thp
from pmcore.backends.sim.virtual import rmap
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    PRESENT,
    SOFT_DIRTY,
    SWAP,
    SWAP_EXCLUSIVE,
    UFFD_MARKER,
    UFFD_WP,
    WRITE,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import NotModelled
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["apart", "first_mapping", "folio_of", "poison", "poison_many", "soft_offline", "soft_offline_many"]

_ALL = (1 << 64) - 1
_BUDDY, _HWPOISON, _DIRTY = int(PageFlag.BUDDY), int(PageFlag.HWPOISON), int(PageFlag.DIRTY)
_WRITTEN = int(PageFlag.DIRTY | PageFlag.WRITEBACK)
_SWAPCACHE, _KSM, _UPTODATE = int(PageFlag.SWAPCACHE), int(PageFlag.KSM), int(PageFlag.UPTODATE)
#: What a page loses that is taken off its LRU list.
_LISTED = int(PageFlag.LRU | PageFlag.ACTIVE | PageFlag.UNEVICTABLE | PageFlag.MLOCKED)
#: In the swap cache; the kernel's bit for that is the one shown as OWNER_PRIVATE, too.
_CACHED_SWAP = int(PageFlag.SWAPCACHE | PageFlag.OWNER_PRIVATE)


def folio_of(core: Core, pfn: int) -> LargeFolio | None:
    """The large folio that the page belongs to."""
    frames = core.memory.frames
    return core.memory.large.get(pfn - frames.behind_at[pfn]) if frames.flags_at[pfn] & COMPOUND else None


def _mappings(core: Core, pfns: Pfns | range) -> rmap.Mappings:
    chosen = np.zeros(core.memory.frames.rows, dtype=np.bool_)
    chosen[slice(pfns.start, pfns.stop) if isinstance(pfns, range) else pfns] = True
    return rmap.find(core, core.spaces.values(), chosen)


def apart(core: Core, pfn: int, *, keep: bool) -> None:
    """Take the folio of the page apart (rule HW-004). `keep`: the page stays, though it may hold nothing but zeros."""
    folio = folio_of(core, pfn)
    if folio is None:
        return
    maps = _mappings(core, range(folio.head, folio.head + folio.pages))
    for place in np.flatnonzero(maps.huge).tolist():
        mm, addr = maps.mms[int(maps.owners[place])], int(maps.addresses[place])
        vma = mm.vmas.at(addr)
        assert vma is not None
        thp.split_pmd(core, mm, vma, addr, migrating=True)
    memory = core.memory
    if keep:  # what it holds is lost in any case
        memory.frames.content_at[pfn] = memory.contents.write(memory.frames.content_at[pfn], 0, b"\1")
    first, *others = (core.spaces[number] for number in sorted(folio.by_mm))
    thp.split_folio(core, first, folio, 0, others=others)


# -- poisoning -------------------------------------------------------------------------------------------


def poison(core: Core, pfn: int, mm: AddressSpace | None) -> int:
    """Poison a page (rules HW-002 to HW-010); the address that `mm` is told of at once, -1 for none."""
    frames = core.memory.frames
    if frames.flags_at[pfn] & CACHED and core.inodes[frames.owner_at[pfn]].on_disk:
        _drop(core, pfn)
        return -1
    folio = folio_of(core, pfn)
    by_pmd = folio is None
    if folio is not None:
        maps = _mappings(core, range(folio.head, folio.head + 1))
        by_pmd = any(maps.huge[i] and maps.mms[int(maps.owners[i])] is mm for i in range(len(maps.huge)))
        if not maps.huge.any():  # unmapped on the way already, as if it were to be moved
            frames.flags_at[pfn] &= ~ANON_EXCLUSIVE
        apart(core, pfn, keep=True)
    where = first_mapping(core, mm, pfn) if mm is not None and by_pmd else -1
    dirty = poison_many(core, np.array([pfn], dtype=np.int64))
    return where if dirty[0] else -1


def _drop(core: Core, pfn: int) -> None:
    """A clean page of a disk's file is dropped without harm: its entries are empty, and who comes next reads it anew.

    Raises NotModelled for one that is dirty, or being written (rule HW-016).
    """
    frames, flat = core.memory.frames, core.pool.flat
    maps = _mappings(core, range(pfn, pfn + 1))
    old = flat[maps.slots]
    if frames.flags_at[pfn] & _WRITTEN or (old & np.uint64(DIRTY | WRITE)).any():
        raise NotModelled(
            "poisoning dirty pages of a disk's files: what was written is lost, and fsync says so"
        )
    flat[maps.slots] = 0
    for place in np.flatnonzero((old & np.uint64(UFFD_WP)) != 0).tolist():
        vma = maps.mms[int(maps.owners[place])].vmas.at(int(maps.addresses[place]))
        if vma is not None and vma.flags & VmFlag.UFFD_WP:
            flat[maps.slots[place]] = UFFD_MARKER
    frames.mapcount_at[pfn] = 0
    pagecache.remove_poisoned(core, pfn)
    _out_of_use(core, np.array([pfn], dtype=np.int64))
    core.count("memory_failure")


def poison_many(core: Core, pfns: Pfns) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Poison single pages; by page whether it was dirty, so that who asked is told."""
    frames, flat = core.memory.frames, core.pool.flat
    maps = _mappings(core, pfns)
    frames.flags[maps.pfns[(flat[maps.slots] & np.uint64(DIRTY)) != 0]] |= np.uint64(_DIRTY)
    dirty: np.ndarray[tuple[int], np.dtype[np.bool_]] = (frames.flags[pfns] & np.uint64(_DIRTY)) != 0
    swapped = (frames.flags[maps.pfns] & np.uint64(_SWAPCACHE)) != 0
    if swapped.any():
        _to_slots(core, maps, swapped)
    mine = maps.slots[~swapped]
    flat[mine] = maps.pfns[~swapped].view(np.uint64) << np.uint64(5) | np.uint64(
        SWAP | core.caps.hwpoison_type
    )
    frames.mapcount[pfns] = 0
    for pfn in pfns[(frames.flags[pfns] & np.uint64(_SWAPCACHE)) != 0].tolist():
        _in_swap_cache(core, pfn)
    _out_of_use(core, pfns)
    core.count("memory_failure", len(pfns))
    return dirty


def _to_slots(core: Core, maps: rmap.Mappings, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
    """Have entries of pages of the swap cache name their slots (rule HW-010)."""
    frames, flat = core.memory.frames, core.pool.flat
    slots, pfns = maps.slots[chosen], maps.pfns[chosen]
    fields = frames.swap[pfns] - 1
    old = flat[slots]
    new = fields.view(np.uint64) | np.uint64(SWAP) | old & np.uint64(SOFT_DIRTY | UFFD_WP)
    new[(frames.flags[pfns] & np.uint64(ANON_EXCLUSIVE)) != 0] |= np.uint64(SWAP_EXCLUSIVE)
    flat[slots] = new
    frames.flags[pfns] &= np.uint64(~ANON_EXCLUSIVE & _ALL)
    core.swap.duplicate(fields.view(np.uint64))


def _in_swap_cache(core: Core, pfn: int) -> None:
    """A page of the swap cache that nobody maps any more: a clean one leaves it, its slot has all that it held.

    A dirty one stays for those to find who access it, and is no longer up to date.
    """
    frames = core.memory.frames
    if frames.flags_at[pfn] & _DIRTY:
        frames.flags_at[pfn] &= ~(_DIRTY | _UPTODATE)
        return
    field = frames.swap_at[pfn] - 1
    area, slot = core.swap.area(field), field >> 5
    if slot in area.merged or (frames.flags_at[pfn] & _KSM and area.counts[slot] > 1):
        area.merged[slot] = ()
    area.cached[slot], area.content[slot], area.shadow[slot] = 0, frames.content_at[pfn], 0
    frames.content_at[pfn] = frames.swap_at[pfn] = 0
    frames.flags_at[pfn] &= ~_CACHED_SWAP
    if core.memory.grouped:
        core.groups.swapped_out(area, slot, pfn)


def _out_of_use(core: Core, pfns: Pfns) -> None:
    """The frames are nobody's any more, and stay what they were but for that."""
    memory, frames = core.memory, core.memory.frames
    frames.flags[pfns] = frames.flags[pfns] & np.uint64(~_LISTED & _ALL) | np.uint64(_HWPOISON)
    if core.mlocks:
        for pfn in pfns.tolist():
            core.mlocks.pop(pfn, None)
    rows = frames.content[pfns]
    if rows.any():
        memory.contents.give_back(rows)
        frames.content[pfns] = 0
    frames.lru[pfns] = 0
    if memory.grouped:
        memory.charges.drop(pfns)


def first_mapping(core: Core, mm: AddressSpace, pfn: int) -> int:
    """Where the kernel takes the page to be in `mm`: the address that a signal names (rules HW-002, HW-008, HW-009).

    A page of a file is where the mapping that begins first in it covers it, whatever is mapped there.
    """
    frames, shift = core.memory.frames, core.geometry.page_shift
    if frames.flags_at[pfn] & CACHED:
        inode, index = frames.owner_at[pfn], frames.index_at[pfn]
        covering = [
            vma
            for vma in mm.vmas
            if vma.file is not None
            and vma.file.number == inode
            and vma.pgoff <= index < vma.pgoff + (vma.length >> shift)
        ]
        vma = min(covering, key=lambda vma: vma.pgoff)
        return vma.start + (index - vma.pgoff << shift)
    merged = frames.flags_at[pfn] & _KSM
    if merged and not core.caps.memory_failure_of_merged:
        return -1
    found = _among(core, mm, pfn)
    if not merged:
        return found[0]
    slot = core.ksm.by_mm.get(mm.number)
    if slot is not None:  # those that ksmd knows of, the last of them first
        known = slot.addresses[(slot.states == 2) & (slot.nodes == core.ksm.by_pfn.get(pfn, 0))]
        if len(known):
            return int(known[-1])
    return found[-1]


def _among(core: Core, mm: AddressSpace, pfn: int) -> list[int]:
    """Addresses in `mm` that map the page."""
    found: list[int] = []
    for extent in mm.tables.extents(0, core.geometry.task_size):
        entries = extent.entries
        fields = (entries & np.uint64(FIELD)).view(np.int64)
        there = (entries & np.uint64(PRESENT)) != 0
        if extent.huge:
            within = pfn - fields
            there &= (within >= 0) & (within < core.geometry.pmd_pages)
            found += [
                extent.start + index * extent.size + (int(within[index]) << core.geometry.page_shift)
                for index in np.flatnonzero(there).tolist()
            ]
        else:
            hits = np.flatnonzero(there & (fields == pfn))
            found += (hits * extent.size + extent.start).tolist()
    return found


# -- soft offline ----------------------------------------------------------------------------------------


def soft_offline(core: Core, pfn: int) -> None:
    """Move the page elsewhere, and take its frame out of use (rule HW-005)."""
    apart(core, pfn, keep=False)
    frames = core.memory.frames
    if frames.flags_at[pfn] & _BUDDY:  # it held nothing but zeros, and the zero page is mapped instead
        core.memory.zone_of(pfn).take_off(pfn)
        frames.flags_at[pfn] = 0
        _out_of_use(core, np.array([pfn], dtype=np.int64))
        core.count("soft_offline")
        return
    soft_offline_many(core, np.array([pfn], dtype=np.int64))


def soft_offline_many(core: Core, pfns: Pfns) -> None:
    """The same for single pages, for all of which there is room."""
    frames, flat = core.memory.frames, core.pool.flat
    maps = _mappings(core, pfns)
    frames.flags[maps.pfns[(flat[maps.slots] & np.uint64(DIRTY)) != 0]] |= np.uint64(_DIRTY)
    flags = frames.flags[pfns] & np.uint64(~(ANON_EXCLUSIVE | _CACHED_SWAP) & _ALL)
    cached = (flags & np.uint64(CACHED)) != 0
    flags[cached] &= np.uint64(~(CACHED | _DIRTY) & _ALL)  # the file's new page has it
    migrate.move(core, *migrate.take(core, core.memory.zones, pfns, np.zeros(len(pfns), dtype=np.int64)))
    frames.flags[pfns] = flags
    _out_of_use(core, pfns)
    core.count("soft_offline", len(pfns))
