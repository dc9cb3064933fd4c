"""Emptying entries: what munmap, MADV_DONTNEED and exit do to a range of one VMA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.physical.runs import at, runs
from pmcore.backends.sim.services import thp
from pmcore.backends.sim.services.batches import large_runs
from pmcore.backends.sim.virtual import accessed
from pmcore.backends.sim.virtual.mapping import remove_page, remove_pages
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    GUARD,
    POISON_MARKER,
    PRESENT,
    SPECIAL,
    SWAP,
    UFFD_MARKER,
    UFFD_WP,
    YOUNG,
    is_hwpoison,
    is_marker,
    poisoned,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import MAX_SWAPFILES, SWP_PTE_MARKER, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.services.pagecache import Inode
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["hwpoison_entries", "swap_entries", "unmap_file", "zap"]

_FIELD, _PRESENT, _SWAP = np.uint64(FIELD), np.uint64(PRESENT), np.uint64(SWAP)
_STATE = _PRESENT | _SWAP
#: Entries taken at a time: as many as stay in a processor's cache.
_PIECE = 1 << 15
_DIRTY, _RECLAIM = int(PageFlag.DIRTY), int(PageFlag.RECLAIM)
#: Pages with none of these that are unmapped become dirty and referenced, and that is all.
_CLOSER = COMPOUND | int(
    PageFlag.RECLAIM | PageFlag.REFERENCED | PageFlag.KSM | PageFlag.SWAPCACHE | PageFlag.MLOCKED
)
_NOT_RECLAIM = np.uint64(~_RECLAIM & (1 << 64) - 1)


def swap_entries(entries: U64Array) -> BoolArray:
    """Which entries name a slot of a swap area (markers and those of poisoned pages do not)."""
    swap: BoolArray = (entries & _STATE) == _SWAP
    if swap.any():
        swap &= (entries & np.uint64(0x1F)) < MAX_SWAPFILES
    return swap


def hwpoison_entries(entries: U64Array) -> BoolArray:
    """Which entries are those of poisoned pages."""
    named: BoolArray = (entries & _STATE) == _SWAP
    if named.any():
        kind = entries & np.uint64(0x1F)
        named &= (kind >= MAX_SWAPFILES) & (kind != SWP_PTE_MARKER)
    return named


def zap(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    start: int,
    end: int,
    *,
    keep_guards: bool = False,
    drop_markers: bool = False,
    copies: bool = True,
) -> None:
    """Empty all entries of the range; anonymous pages that nobody maps any more are freed.

    A huge page that the range covers in part is mapped by PTEs first. `keep_guards`: guard markers stay. In a mapping
    of a file protected entries leave a uffd-wp marker behind, unless `drop_markers`; without `copies` private copies
    stay.
    """
    few = mm.tables.few(start, end)
    if few is not None and (len(few) <= 1 or not core.memory.large):
        if vma.file is not None:
            _zap_few_of_file(core, mm, vma, few, keep_guards, drop_markers, copies)
            return
        for slot in few:
            _zap_one(core, mm, vma, slot, keep_guards)
        return
    thp.split_at(core, mm, vma, start)
    thp.split_at(core, mm, vma, end)
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        if extent.huge:
            for entry in entries.tolist():
                thp.zap_pmd(core, mm, vma, entry)
            entries[:] = 0
            continue
        if vma.file is not None:
            _zap_file(core, mm, vma, extent.start, entries, keep_guards, drop_markers, copies)
            continue
        present = (entries & _PRESENT) != 0
        pfns = (entries[present] & _FIELD).view(np.int64)
        fields = None
        if len(pfns) != len(entries):
            swap = swap_entries(entries)
            if swap.any():
                fields = entries[swap] & _FIELD
        if keep_guards:
            entries[(entries & np.uint64(GUARD)) == 0] = 0
        else:
            entries[:] = 0
        if len(pfns):
            normal = pfns[pfns != core.zero_pfn]
            if len(normal):
                remove_pages(core, mm, vma, normal)
        if fields is not None:
            core.swap.release(fields)


def _zap_one(core: Core, mm: AddressSpace, vma: VmArea, slot: int, keep_guards: bool) -> None:
    entry = core.pool.at[slot]
    if not entry or (keep_guards and entry & GUARD):
        return
    core.pool.at[slot] = 0
    if entry & PRESENT:
        if entry & FIELD != core.zero_pfn:
            remove_page(core, mm, vma, entry & FIELD)
    elif entry & 0x1F < MAX_SWAPFILES:
        core.swap.release(np.array([entry & FIELD], dtype=np.uint64))


def _zap_few_of_file(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    few: range,
    keep_guards: bool,
    drop_markers: bool,
    copies: bool,
) -> None:
    """`_zap_mixed` for few entries."""
    at, flags_at = core.pool.at, core.memory.frames.flags_at
    young, mapped, fields = [], [], []
    for slot in few:
        old = at[slot]
        if not old:
            continue
        pfn = old & FIELD
        if old & PRESENT:
            cached = flags_at[pfn] & CACHED
            if not copies and not cached and pfn != core.zero_pfn:
                continue
            if cached and old & DIRTY:
                flags_at[pfn] = flags_at[pfn] & ~_RECLAIM | _DIRTY
            if cached and old & YOUNG:
                young.append(pfn)
            if pfn != core.zero_pfn:
                mapped.append(pfn)
        elif not is_marker(old):
            if not copies:
                continue
            if not is_hwpoison(old):
                fields.append(pfn)
        else:
            gone = not keep_guards if old & GUARD else drop_markers or (copies and poisoned(old))
            if gone:
                at[slot] = 0
            continue
        kept = old & UFFD_WP and vma.flags & VmFlag.UFFD_WP and not drop_markers
        at[slot] = UFFD_MARKER if kept else 0
    if not vma.flags & core.caps.no_recency:
        for pfn in young:
            accessed.mark_one(core, pfn)
    for pfn in mapped:
        remove_page(core, mm, vma, pfn)
    if fields:
        core.swap.release(np.array(fields, dtype=np.uint64))


def _zap_file(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    start: int,
    entries: U64Array,
    keep_guards: bool,
    drop_markers: bool,
    copies: bool,
) -> None:
    if vma.flags & VmFlag.SHARED and not vma.flags & VmFlag.LOCKED:
        for first in range(0, len(entries), _PIECE):
            part = entries[first : first + _PIECE]
            if not _zap_cached(core, mm, vma, part, drop_markers):
                rest = start + (first << core.geometry.page_shift)
                _zap_mixed(core, mm, vma, rest, entries[first:], keep_guards, drop_markers, copies)
                return
        return
    _zap_mixed(core, mm, vma, start, entries, keep_guards, drop_markers, copies)


def _zap_cached(core: Core, mm: AddressSpace, vma: VmArea, entries: U64Array, drop_markers: bool) -> bool:
    """`_zap_mixed` for entries of a shared mapping that are empty or map pages of the cache; else False, undone."""
    union = int(np.bitwise_or.reduce(entries))
    if union & (SWAP | SPECIAL) or (union & UFFD_WP and vma.flags & VmFlag.UFFD_WP and not drop_markers):
        return False
    common = int(np.bitwise_and.reduce(entries))
    old = entries.copy() if common & PRESENT else entries[(entries & _PRESENT) != 0]
    if not len(old):
        return True
    pfns = (old & _FIELD).view(np.int64)
    if core.memory.large and (at(core.memory.frames.flags, pfns) & np.uint64(COMPOUND)).any():
        return False
    entries[:] = 0
    if common & DIRTY and common & YOUNG and not vma.flags & core.caps.no_recency:
        pfns = _unmap_plain(core, pfns)
        if not len(pfns):
            return True
    if union & DIRTY:
        for _, where in runs(_with(pfns, old, DIRTY, common)):
            flags = core.memory.frames.flags[where]
            core.memory.frames.flags[where] = flags & _NOT_RECLAIM | np.uint64(PageFlag.DIRTY)
    if union & YOUNG and not vma.flags & core.caps.no_recency:
        accessed.mark(core, _with(pfns, old, YOUNG, common))
    remove_pages(core, mm, vma, pfns)
    return True


def _unmap_plain(core: Core, pfns: Pfns) -> Pfns:
    """Unmap pages of the cache whose entries were dirty and accessed, unless one needs a closer look: those left."""
    if "page_idle" in core.numbers:
        return pfns
    frames, pieces = core.memory.frames, runs(pfns)
    for _, where in pieces:
        if not isinstance(where, slice) or int(np.bitwise_or.reduce(frames.flags[where])) & _CLOSER:
            return pfns
    for _, where in pieces:
        flags = frames.flags[where]  # a view
        flags |= np.uint64(_DIRTY | int(PageFlag.REFERENCED))
        frames.mapcount[where] -= 1
    return pfns[:0]


def _with(pfns: Pfns, old: U64Array, bit: int, common: int) -> Pfns:
    """The pages whose entries have the bit; all, if it is among those `common` to them."""
    return pfns if common & bit else pfns[(old & np.uint64(bit)) != 0]


def _zap_mixed(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    start: int,
    entries: U64Array,
    keep_guards: bool,
    drop_markers: bool,
    copies: bool,
) -> None:
    frames, old = core.memory.frames, entries.copy()
    present, swap = (old & _PRESENT) != 0, swap_entries(old)
    pfns = (old & _FIELD).view(np.int64)
    cached = present.copy()
    cached[present] = (frames.flags[pfns[present]] & np.uint64(CACHED)) != 0
    poisoned = hwpoison_entries(old)
    zero = present & (pfns == core.zero_pfn)  # UFFDIO_ZEROPAGE maps it in private mappings
    gone = present | swap | poisoned if copies else cached | zero
    entries[gone] = 0
    other = (old != 0) & ~present & ~swap & ~poisoned
    guard = other & ((old & np.uint64(GUARD)) != 0)
    poison = other & ((old & _FIELD) == np.uint64(POISON_MARKER & FIELD))
    if not keep_guards:
        entries[guard] = 0
    if copies:
        entries[poison] = 0
    if drop_markers:
        entries[other & ~guard] = 0
    elif vma.flags & VmFlag.UFFD_WP:
        entries[gone & ((old & np.uint64(UFFD_WP)) != 0)] = UFFD_MARKER
    # What the entries knew of the pages of the file goes over to them.
    dirty = core.memory.whole_folios(pfns[cached & ((old & np.uint64(DIRTY)) != 0)])
    frames.flags[dirty] = frames.flags[dirty] & _NOT_RECLAIM | np.uint64(PageFlag.DIRTY)
    if not vma.flags & core.caps.no_recency:
        accessed.mark(core, pfns[_noted(core, start, old, cached)])
    mapped = pfns[gone & present & ~zero]
    if len(mapped):
        remove_pages(core, mm, vma, mapped)
    if (gone & swap).any():
        core.swap.release(old[gone & swap] & _FIELD)


def _noted(core: Core, start: int, old: U64Array, cached: BoolArray) -> BoolArray:
    """Which entries tell their page that it was accessed: of a run of a large folio one alone, if any was."""
    noted: BoolArray = cached & ((old & np.uint64(YOUNG)) != 0)
    if not core.memory.large or not core.caps.zap_batch:
        return noted
    runs = large_runs(core, start, np.where(cached, old, np.uint64(0)))
    if len(runs.first):
        index = runs.entries()
        begins = np.cumsum(runs.pages) - runs.pages
        any_young = np.add.reduceat(noted[index], begins) > 0
        noted[index] = False
        noted[runs.first[any_young]] = True
    return noted


def unmap_file(core: Core, inode: Inode, first: int, end: int, *, even_cows: bool) -> None:
    """Unmap the pages from `first` to `end` of a file wherever they are mapped, private copies too if `even_cows`."""
    shift = core.geometry.page_shift
    for mm in list(core.spaces.values()):
        for vma in mm.vmas:
            if vma.file is not inode:
                continue
            low = max(first - vma.pgoff, 0)
            high = min(end - vma.pgoff, vma.length >> shift)
            if low < high:
                zap(
                    core,
                    mm,
                    vma,
                    vma.start + (low << shift),
                    vma.start + (high << shift),
                    keep_guards=True,
                    copies=even_cows,
                )
