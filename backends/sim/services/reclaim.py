"""Taking memory back: MADV_COLD, MADV_FREE, MADV_PAGEOUT, and reclaim on request or under pressure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.folios import LargeFolio
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED, MOVED_YOUNG
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services import evict, filereclaim, pagecache, shmem_folio, thp
from pmcore.backends.sim.services.batches import Runs, large_runs
from pmcore.backends.sim.services.pagecache import Inode
from pmcore.backends.sim.virtual import filepmd
from pmcore.backends.sim.virtual.filemap import cached_only
from pmcore.backends.sim.virtual.mapping import MLOCKED
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    POISON_MARKER,
    PRESENT,
    SOFT_DIRTY,
    SPECIAL,
    SWAP,
    SWAP_EXCLUSIVE,
    UFFD_MARKER,
    UFFD_WP,
    YOUNG,
    is_hwpoison,
    is_marker,
    poisoned,
)
from pmcore.backends.sim.virtual.tables import Extent
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries, swap_entries
from pmcore.errors import NotModelled
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["cold", "lazy_free", "pageout"]

_ALL = (1 << 64) - 1
_FIELD, _PRESENT, _OLD = np.uint64(FIELD), np.uint64(PRESENT), np.uint64(~YOUNG & (1 << 64) - 1)
_ACTIVE, _REFERENCED, _DIRTY = int(PageFlag.ACTIVE), int(PageFlag.REFERENCED), int(PageFlag.DIRTY)
#: What a page knows of accesses.
_ACCESSED = _REFERENCED | MOVED_YOUNG
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
    """Take apart the large folios of this process alone of which no run in the range covers all (rule TH-006)."""
    if not core.memory.large:
        return
    plan = [(extent.start, len(extent.entries), extent.huge) for extent in mm.tables.extents(start, end)]
    for begin, count, huge in plan:
        if huge:
            for addr in range(begin, begin + count * core.geometry.pmd_size, core.geometry.pmd_size):
                head = core.pool.at[mm.tables.pmd_slot(addr)] & FIELD
                if head == core.huge_zero_pfn or (start <= addr and addr + core.geometry.pmd_size <= end):
                    continue
                folio = core.memory.large[head]
                if core.memory.frames.flags_at[head] & CACHED:
                    if not thp.maybe_shared(core, folio):
                        _split_cached(core, folio)
                    continue
                if folio.mapped == folio.entire == 1:
                    vma = mm.vmas.at(addr)
                    assert vma is not None
                    thp.split_pmd(core, mm, vma, addr, migrating=True)
                    thp.split_folio(core, mm, folio, addr)
            continue
        slot = mm.tables.pte_slot(begin)
        runs = large_runs(core, begin, core.pool.flat[slot : slot + count])
        runs = runs.take(~runs.whole)
        for head, first in zip(runs.head.tolist(), runs.first.tolist(), strict=True):
            part = core.memory.large.get(head)
            if part is None or thp.maybe_shared(core, part):
                continue
            if core.memory.frames.flags_at[head] & CACHED:
                _split_cached(core, part)
            else:
                thp.split_folio(core, mm, part, begin + first * core.geometry.page_size)


def _split_cached(core: Core, folio: LargeFolio) -> None:
    """Make single pages, which nobody maps, of a large folio of shared memory."""
    inode = core.inodes[int(core.memory.frames.owner[folio.head])]
    shmem_folio.split(core, inode, folio)


def _whole_runs(core: Core, start: int, entries: U64Array) -> tuple[Runs, BoolArray]:
    """The runs that cover their folio, and whether each of those is all that maps it."""
    runs = large_runs(core, start, entries)
    runs = runs.take(runs.whole)
    alone = core.memory.large.alone(runs.head)
    for index in np.flatnonzero(~alone).tolist():
        folio = core.memory.large[int(runs.head[index])]
        alone[index] = folio.mapped == folio.pages
    return runs, alone


def _small(core: Core, entries: U64Array) -> BoolArray:
    """Which entries map a single page, not the zero page."""
    chosen: BoolArray = (entries & (_PRESENT | np.uint64(SPECIAL))) == _PRESENT
    if core.memory.large:
        pfns = (entries[chosen] & _FIELD).view(np.int64)
        chosen[chosen] = (core.memory.frames.flags[pfns] & np.uint64(COMPOUND)) == 0
    return chosen


def _own_pages(core: Core, start: int, entries: U64Array) -> BoolArray:
    """Which entries map a page, or all of a large folio, that is mapped nowhere else and on an LRU list."""
    chosen = _small(core, entries)
    frames = core.memory.frames
    chosen[chosen] = frames.mapcount[(entries[chosen] & _FIELD).view(np.int64)] == 1
    if core.memory.large:
        runs, alone = _whole_runs(core, start, entries)
        chosen[runs.take(alone).entries()] = True
    pfns = (entries[chosen] & _FIELD).view(np.int64)
    chosen[chosen] = (frames.flags[pfns] & np.uint64(_LRU)) != 0
    return chosen


def _few(core: Core, mm: AddressSpace, start: int, end: int) -> range | None:
    """Places of the PTEs of a range that has so few that each is taken by itself; None where a large folio is there."""
    few = mm.tables.few(start, end)
    if few and core.memory.large:
        flags = core.memory.frames.flags_at
        for slot in few:
            pte = core.pool.at[slot]
            if pte & PRESENT and flags[pte & FIELD] & COMPOUND:
                return None
    return few


def _own_page(core: Core, pte: int) -> int:
    """`_own_pages` for one entry: its page; -1 where it is none."""
    if pte & (PRESENT | SPECIAL) != PRESENT:
        return -1
    pfn, frames = pte & FIELD, core.memory.frames
    return pfn if frames.mapcount_at[pfn] == 1 and frames.flags_at[pfn] & _LRU else -1


def _on_lru(core: Core, pfns: Pfns) -> None:
    """Put pages at the head of their LRU list, those of a large folio together."""
    frames = core.memory.frames
    core.memory.on_lru_pages(pfns)
    if core.memory.large:
        frames.lru[pfns] = frames.lru[pfns - frames.behind[pfns]]


# -- advice ----------------------------------------------------------------------------------------------


def cold(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """MADV_COLD: not accessed lately, on the inactive list."""
    _split_partial(core, mm, start, end)
    frames = core.memory.frames
    few = _few(core, mm, start, end)
    if few is not None:
        for slot in few:
            _cold_one(core, slot)
        return
    for extent in mm.tables.extents(start, end):
        if extent.huge:
            for addr, whole in _huge_blocks(core, extent, start, end):
                slot = mm.tables.pmd_slot(addr)
                folio = core.memory.large[core.pool.at[slot] & FIELD]
                if whole and not _others_map(core, folio):
                    core.pool.at[slot] &= ~YOUNG
                    frames.clear_bits(folio.head, folio.pages, _ACCESSED | _ACTIVE)
                    core.memory.on_lru(folio.head, folio.pages)
            continue
        chosen = _own_pages(core, extent.start, extent.entries)
        extent.entries[chosen] &= np.uint64(~YOUNG & _ALL)
        pfns = (extent.entries[chosen] & _FIELD).view(np.int64)
        evictable = pfns[(frames.flags[pfns] & np.uint64(MLOCKED)) == 0]
        frames.flags[pfns] &= np.uint64(~_ACCESSED & _ALL)
        frames.flags[evictable] &= np.uint64(~_ACTIVE & _ALL)
        _on_lru(core, evictable)


def _cold_one(core: Core, slot: int) -> None:
    """`cold` for one entry."""
    pte = core.pool.at[slot]
    pfn = _own_page(core, pte)
    if pfn < 0:
        return
    core.pool.at[slot] = pte & ~YOUNG
    flags = core.memory.frames.flags_at[pfn]
    evictable = not flags & MLOCKED
    core.memory.frames.flags_at[pfn] = flags & ~(_ACCESSED | (_ACTIVE if evictable else 0))
    if evictable:
        core.memory.on_lru(pfn)


def lazy_free(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """MADV_FREE: swap entries are emptied, pages may be discarded until they are written again."""
    _split_partial(core, mm, start, end)
    frames = core.memory.frames
    clean = np.uint64(~(YOUNG | DIRTY) & _ALL)
    few = _few(core, mm, start, end)
    if few is not None:
        _free_few(core, few)
        return
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
        if core.names_frames:
            entries[hwpoison_entries(entries)] = 0
        swap = swap_entries(entries)
        if swap.any():
            fields = entries[swap] & _FIELD
            entries[swap] = 0
            core.swap.release(fields)
        entries[(entries & np.uint64(PRESENT | SWAP | FIELD)) == np.uint64(POISON_MARKER)] = 0
        touched = _small(core, entries)
        pfns = (entries[touched] & _FIELD).view(np.int64)
        # A dirty page, or one in the swap cache, is looked at more closely: only if it is mapped here alone.
        closely = np.uint64(_SWAPCACHE | _DIRTY)
        good = ((frames.flags[pfns] & closely) == 0) | (frames.mapcount[pfns] == 1)
        for index in np.flatnonzero(good & ((frames.flags[pfns] & np.uint64(_SWAPCACHE)) != 0)).tolist():
            good[index] = core.swap.uncache(int(pfns[index]))
        touched[touched] = good
        if core.memory.large:
            runs, alone = _whole_runs(core, extent.start, entries)
            good = ((frames.flags[runs.head] & closely) == 0) | alone
            for index in np.flatnonzero(
                good & ((frames.flags[runs.head] & np.uint64(_SWAPCACHE)) != 0)
            ).tolist():
                good[index] = core.swap.uncache(int(runs.head[index]), int(runs.order[index]))
            touched[runs.take(good).entries()] = True
        entries[touched] &= clean
        pfns = (entries[touched] & _FIELD).view(np.int64)
        frames.flags[pfns] &= np.uint64(~_DIRTY & _ALL)
        _mark_lazy(core, pfns)


def _free_few(core: Core, few: range) -> None:
    """`lazy_free` for entries that map no large folios, one after the other."""
    at, frames, fields = core.pool.at, core.memory.frames, []
    for slot in few:
        pte = at[slot]
        if pte & (PRESENT | SWAP) == SWAP and not is_marker(pte):
            at[slot] = 0
            if not is_hwpoison(pte):
                fields.append(pte & FIELD)
        elif pte and poisoned(pte):
            at[slot] = 0
    if fields:
        core.swap.release(np.array(fields, dtype=np.uint64))
    for slot in few:
        pte = at[slot]
        if pte & (PRESENT | SPECIAL) != PRESENT:
            continue
        pfn = pte & FIELD
        flags = frames.flags_at[pfn]
        if flags & (_SWAPCACHE | _DIRTY) and frames.mapcount_at[pfn] != 1:
            continue
        if flags & _SWAPCACHE and not core.swap.uncache(pfn):
            continue
        at[slot] = pte & ~(YOUNG | DIRTY)
        flags = frames.flags_at[pfn] & ~_DIRTY
        if flags & (_SWAPBACKED | _SWAPCACHE | MLOCKED) == _SWAPBACKED:
            flags &= ~(_SWAPBACKED | _ACTIVE | _REFERENCED)
            core.memory.on_lru(pfn)
        frames.flags_at[pfn] = flags


def _mark_lazy(core: Core, pfns: Pfns) -> None:
    """folio_mark_lazyfree: anonymous, backed by swap, evictable, not in the swap cache."""
    frames = core.memory.frames
    flags = frames.flags[pfns]
    chosen = pfns[(flags & np.uint64(_SWAPBACKED | _SWAPCACHE | MLOCKED)) == np.uint64(_SWAPBACKED)]
    frames.flags[chosen] &= np.uint64(~(_SWAPBACKED | _ACTIVE | _REFERENCED | _DIRTY) & _ALL)
    _on_lru(core, chosen)


def pageout(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """MADV_PAGEOUT: what this process alone maps is reclaimed now."""
    _split_partial(core, mm, start, end)
    few = _few(core, mm, start, end) if vma.file is None else None
    if few is not None and len(few) <= 1:  # several leave at one time
        for slot in few:
            _page_out(core, slot)
        return
    large: list[int] = []
    # A huge page that is taken apart gets a table, for which the pool may move: extents are looked up one by one.
    for first, last in [(extent.start, extent.end) for extent in mm.tables.extents(start, end)]:
        [extent] = mm.tables.extents(first, last)
        if extent.huge:
            for addr, whole in _huge_blocks(core, extent, start, end):
                slot = mm.tables.pmd_slot(addr)
                folio = core.memory.large[core.pool.at[slot] & FIELD]
                if not whole or _others_map(core, folio):
                    continue
                if vma.file is not None:
                    core.pool.at[slot] &= ~YOUNG if not core.caps.pageout_keeps_young else _ALL
                    large.append(folio.head)
                elif not core.memory.frames.flags_at[folio.head] & MLOCKED:
                    _huge_out(core, mm, vma, addr, folio)
            continue
        chosen = _own_pages(core, extent.start, extent.entries)
        if not core.caps.pageout_keeps_young:
            extent.entries[chosen] &= _OLD
        if vma.file is not None:
            cached = chosen & cached_only(core, extent.entries)
            if cached.any() and vma.file.on_disk:
                filereclaim.page_out(core, vma, vma.file, extent.entries, np.flatnonzero(cached))
            elif cached.any():
                large += _large_heads(core, extent.entries[cached])
                _shmem_out(
                    core,
                    mm,
                    vma,
                    vma.file,
                    extent.entries,
                    np.flatnonzero(cached & _small(core, extent.entries)),
                )
            chosen &= ~cached
        if chosen.any():
            _out(core, mm, extent.start, extent.entries, np.flatnonzero(chosen))
    for head in large:
        _shmem_folio_out(core, head)


def _others_map(core: Core, folio: LargeFolio) -> bool:
    """Whether a huge page that a PMD maps is mapped by more than who asks; of a file also by him in another place."""
    if core.memory.frames.flags_at[folio.head] & CACHED:
        return thp.maybe_shared(core, folio)
    return folio.mapped != 1


def _large_heads(core: Core, entries: U64Array) -> list[int]:
    """Heads of the large folios that entries map, ascending."""
    frames, pfns = core.memory.frames, (entries & _FIELD).view(np.int64)
    pfns = pfns[(frames.flags[pfns] & np.uint64(COMPOUND)) != 0]
    heads: list[int] = np.unique(pfns - frames.behind[pfns]).tolist()
    return heads


def _page_out(core: Core, slot: int) -> None:
    """`pageout` for one entry."""
    frames, pte = core.memory.frames, core.pool.at[slot]
    pfn = _own_page(core, pte)
    if pfn < 0:
        return
    if not core.caps.pageout_keeps_young:
        pte = core.pool.at[slot] = pte & ~YOUNG
    flags = frames.flags_at[pfn] & ~_ACCESSED
    frames.flags_at[pfn] = flags
    if flags & MLOCKED:
        return
    if not flags & _SWAPBACKED:
        if pte & DIRTY or flags & _DIRTY:
            frames.flags_at[pfn] = flags | _SWAPBACKED | _DIRTY | _ACTIVE
        else:
            core.pool.at[slot] = 0
            frames.mapcount_at[pfn] = 0
            core.memory.free(pfn)
        return
    field = frames.swap_at[pfn] - 1
    if field < 0:
        field, pte = core.swap.take_one(), pte | DIRTY
        if field < 0:
            frames.flags_at[pfn] = flags | _ACTIVE
            return
    exclusive = SWAP_EXCLUSIVE if flags & ANON_EXCLUSIVE else 0
    core.pool.at[slot] = field | SWAP | exclusive | pte & (SOFT_DIRTY | UFFD_WP)
    frames.flags_at[pfn] = flags & ~(ANON_EXCLUSIVE | _ACTIVE) | (_DIRTY if pte & DIRTY else 0)
    core.swap.area(field).counts[field >> 5] += 1
    core.count("swap_out")
    frames.mapcount_at[pfn] = 0
    evict.leave_one(core, pfn, field)


def _huge_out(core: Core, mm: AddressSpace, vma: VmArea, addr: int, folio: LargeFolio) -> None:
    frames = core.memory.frames
    frames.clear_bits(folio.head, folio.pages, _ACCESSED)
    slot = mm.tables.pmd_slot(addr)
    entry = core.pool.at[slot]
    if not core.caps.pageout_keeps_young:
        entry = core.pool.at[slot] = entry & ~YOUNG
    lazy = not frames.flags_at[folio.head] & _SWAPBACKED
    if lazy and not entry & DIRTY and core.caps.lazyfree_discards_pmd:
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
    frames.flags[pfns] &= np.uint64(~_ACCESSED & _ALL)
    flags = frames.flags[pfns]
    evictable = (flags & np.uint64(MLOCKED)) == 0
    lazy = evictable & ((flags & np.uint64(_SWAPBACKED)) == 0)
    if lazy.any():
        dirty = lazy & (((entries[index] & np.uint64(DIRTY)) != 0) | ((flags & np.uint64(_DIRTY)) != 0))
        gone = lazy & ~dirty
        if core.memory.large:
            dirty, gone = _large_written(core, entries, index, pfns, lazy, dirty)
        # Written since: an ordinary page again, and an active one.
        frames.flags[pfns[dirty]] |= np.uint64(_SWAPBACKED | _DIRTY | _ACTIVE)
        entries[index[gone]] = 0
        _drop(core, mm, pfns[gone])
    rest = np.flatnonzero(evictable & ~lazy)
    if len(rest):
        index, pfns = index[rest], pfns[rest]
        compound = (frames.flags[pfns] & np.uint64(COMPOUND)) != 0
        blocks: dict[int, int] = {}
        if compound.any():
            heads = pfns - frames.behind[pfns]
            apart = compound.copy()
            for head in np.unique(heads[compound]).tolist() if core.swap.takes_folios(pfns) else ():
                field = int(frames.swap[head]) - 1
                if field < 0:
                    field = core.swap.take_block(head, core.memory.large[head].order)
                if field >= 0:
                    blocks[head] = field
                    apart &= heads != head
            thp.split_whole(core, entries, index[apart], pfns[apart])
            # What was nothing but zeros is the zero page now.
            left = (entries[index] & _FIELD) != np.uint64(core.zero_pfn)
            index, pfns = index[left], pfns[left]
        _to_swap(core, mm, entries, index, pfns, blocks)


def _large_written(
    core: Core, entries: U64Array, index: NDArray[np.intp], pfns: Pfns, lazy: BoolArray, dirty: BoolArray
) -> tuple[BoolArray, BoolArray]:
    """What was written since, and what goes, where pages may belong to large folios, which are all here.

    One page of a folio that was written keeps all of it, and its entries share their accessed and dirty bits; older
    kernels go page by page, and have emptied those before it.
    """
    frames = core.memory.frames
    heads, group = np.unique(pfns - frames.behind[pfns], return_inverse=True)
    written = np.zeros(len(heads), dtype=np.bool_)
    written[group[dirty]] = True
    kept = lazy & written[group]
    gone = lazy & ~kept
    if core.caps.lazyfree_batch:
        for bit in (DIRTY, YOUNG):
            with_bit = np.zeros(len(heads), dtype=np.bool_)
            with_bit[group[(entries[index] & np.uint64(bit)) != 0]] = True
            entries[index[kept & with_bit[group]]] |= np.uint64(bit)
        return kept, gone
    first = np.full(len(heads), len(pfns))
    np.minimum.at(first, group[dirty], np.flatnonzero(dirty))
    return kept, gone | (kept & (np.arange(len(pfns)) < first[group]))


def _shmem_out(
    core: Core, mm: AddressSpace, vma: VmArea, inode: Inode, entries: U64Array, index: NDArray[np.intp]
) -> None:
    """Reclaim pages of a shmem file that `entries[index]` map, and nothing else: the entries are emptied.

    What was never written is dropped; the rest goes to swap, or stays in the cache where that is full.
    """
    frames = core.memory.frames
    pfns = (entries[index] & _FIELD).view(np.int64)
    frames.flags[pfns] &= np.uint64(~_ACCESSED & _ALL)
    evictable = (frames.flags[pfns] & np.uint64(MLOCKED)) == 0
    index, pfns = index[evictable], pfns[evictable]
    old = entries[index]
    frames.flags[pfns[(old & np.uint64(DIRTY)) != 0]] |= np.uint64(_DIRTY)
    armed = bool(vma.flags & VmFlag.UFFD_WP)
    entries[index] = np.where(armed & ((old & np.uint64(UFFD_WP)) != 0), np.uint64(UFFD_MARKER), np.uint64(0))
    frames.mapcount[pfns] = 0
    _shmem_leaves(core, inode, pfns)


def _shmem_folio_out(core: Core, head: int) -> None:
    """Reclaim a large folio of shared memory, whoever maps it: a clean one is dropped, the others go page by page."""
    frames = core.memory.frames
    folio = core.memory.large.get(head)
    if folio is None:
        return
    frames.clear_bits(head, folio.pages, _ACCESSED)
    if frames.flags_at[head] & MLOCKED:
        return
    inode, first = core.inodes[int(frames.owner[head])], int(frames.index[head])
    filepmd.unmap(core, inode, first, first + folio.pages)
    if core.caps.shmem_swaps_folios and any(area.large_folios for area in core.swap.order):
        raise NotModelled(
            "swapping out a large folio of shared memory whole", remedy="a swap area without clusters"
        )
    folio = core.memory.large[head]
    if frames.flags_at[head] & _DIRTY or not core.caps.shmem_swaps_folios:
        shmem_folio.split(core, inode, folio)
    words = inode.index.load(first, folio.pages)
    _shmem_leaves(core, inode, (words[(words & _PRESENT) != 0] & _FIELD).view(np.int64))


def _shmem_leaves(core: Core, inode: Inode, pfns: Pfns) -> None:
    """Pages of a shmem file that nobody maps leave memory: dropped if never written, else to swap if there is room."""
    frames = core.memory.frames
    dirty = (frames.flags[pfns] & np.uint64(_DIRTY)) != 0
    clean, pfns = pfns[~dirty], pfns[dirty]
    if len(clean):
        inode.index.put(frames.index[clean], np.zeros(len(clean), dtype=np.uint64))
        pagecache.uncache(core, clean)
        core.memory.free_any(clean)
    fields = core.swap.take(len(pfns))
    pfns, kept = pfns[: len(fields)], pfns[len(fields) :]
    frames.flags[kept] |= np.uint64(_ACTIVE)
    if not len(pfns):
        return
    inode.index.put(frames.index[pfns], fields.astype(np.uint64) | np.uint64(SWAP))
    pagecache.uncache(core, pfns)
    frames.flags[pfns] &= np.uint64(~_ACTIVE & _ALL)
    for area in core.swap.there:
        area.counts[fields[(fields & 0x1F) == area.number] >> 5] += 1
    core.count("swap_out", len(pfns))
    evict.leave(core, pfns, fields)


def _to_swap(
    core: Core,
    mm: AddressSpace,
    entries: U64Array,
    index: NDArray[np.intp],
    pfns: Pfns,
    blocks: dict[int, int],
) -> None:
    """Give each page a slot, and write it. Those of a large folio lie together: `blocks` has its first, by head."""
    frames = core.memory.frames
    fields = frames.swap[pfns] - 1
    for place in np.flatnonzero((frames.flags[pfns] & np.uint64(COMPOUND)) != 0).tolist() if blocks else ():
        behind = frames.behind_at[int(pfns[place])]
        fields[place] = blocks[int(pfns[place]) - behind] + (behind << 5)
    missing = np.flatnonzero(fields < 0)
    found = core.swap.take(len(missing))
    fields[missing[: len(found)]] = found
    failed = missing[len(found) :]
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
    frames.flags[pfns[((old & np.uint64(DIRTY)) != 0) | (frames.swap[pfns] == 0)]] |= np.uint64(_DIRTY)
    for area in core.swap.there:
        slots = fields[(fields & 0x1F) == area.number] >> 5
        area.counts[slots] += 1
    core.count("swap_out", len(pfns))
    large = (frames.flags[pfns] & np.uint64(COMPOUND)) != 0
    if large.any():
        heads = pfns - frames.behind[pfns]
        for folio in _uncount(core, mm, pfns[large]):
            mine = heads == folio.head
            part = pfns[mine]
            if (frames.flags[part] & np.uint64(_DIRTY)).any():
                frames.flags[part] |= np.uint64(_DIRTY)
            evict.leave(core, part, fields[mine], folio=folio)
        pfns, fields = pfns[~large], fields[~large]
    frames.mapcount[pfns] = 0
    evict.leave(core, pfns, fields)


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
