"""Counting who maps what: a page's mapcount, a large folio's mappings, and what becomes of a page that nobody maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import COMPOUND, LargeFolio
from pmcore.backends.sim.physical.runs import at, runs
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = [
    "NEW_ANON",
    "add_page",
    "add_pages",
    "discard_folio",
    "remove_page",
    "remove_pages",
    "remove_pmd",
    "take_page",
]

#: What a fresh anonymous page shows.
NEW_ANON = int(PageFlag.UPTODATE | PageFlag.LRU | PageFlag.ANON | PageFlag.SWAPBACKED)
MLOCKED = int(PageFlag.UNEVICTABLE | PageFlag.MLOCKED)
_SWAPCACHE, _KSM = int(PageFlag.SWAPCACHE), int(PageFlag.KSM)
_COMPOUND = np.uint64(COMPOUND)


def munlock(core: Core, head: int, pages: int) -> None:
    """One locked mapping less; without any the folio is evictable again."""
    frames = core.memory.frames
    if frames.flags_at[head] & MLOCKED:
        count = core.mlocks.get(head, 1) - 1
        if count > 0:
            core.mlocks[head] = count
            return
        core.mlocks.pop(head, None)
        frames.clear_bits(head, pages, MLOCKED)
        core.memory.on_lru(head, pages)


def mlock(core: Core, head: int, pages: int) -> None:
    """One locked mapping more."""
    frames = core.memory.frames
    if frames.flags_at[head] & MLOCKED:
        core.mlocks[head] = core.mlocks.get(head, 1) + 1
    else:
        frames.clear_bits(head, pages, int(PageFlag.ACTIVE))
        frames.set_bits(head, pages, MLOCKED)


def take_page(core: Core, vma: VmArea, flags: int | None = None) -> int:
    """A frame of zeros for an anonymous page. Raises NoMemory."""
    if flags is None:
        flags = NEW_ANON | ANON_EXCLUSIVE
    pfn = core.memory.page(flags | MLOCKED if vma.flags & VmFlag.LOCKED else flags)
    core.memory.on_lru(pfn)
    return pfn


def add_pages(core: Core, mm: AddressSpace, pfns: Pfns) -> None:
    """One PTE more for each page."""
    frames = core.memory.frames
    if core.ksm.nodes:
        np.add.at(frames.mapcount, pfns, 1)  # a merged page may be there more than once
    else:
        for _, where in runs(pfns):
            frames.mapcount[where] += 1
    if core.memory.large:
        heads, counts = _by_head((pfns - frames.behind[pfns])[(frames.flags[pfns] & _COMPOUND) != 0])
        rest = ~core.memory.large.add_many(heads, counts, mm.number)
        for head, count in zip(heads[rest].tolist(), counts[rest].tolist(), strict=True):
            core.memory.large[head].add(mm.number, count)


def add_page(core: Core, mm: AddressSpace, pfn: int) -> None:
    """One PTE more for a page."""
    frames = core.memory.frames
    frames.mapcount_at[pfn] += 1
    if frames.flags_at[pfn] & COMPOUND:
        core.memory.large[pfn - frames.behind_at[pfn]].add(mm.number, 1)


def _by_head(heads: Pfns) -> tuple[Pfns, NDArray[np.int64]]:
    """Each of the heads once, ascending, and how often it is there."""
    begins = np.flatnonzero(np.diff(heads, prepend=-1))
    once = heads[begins]
    if (once[1:] < once[:-1]).any():
        return np.unique(heads, return_counts=True)
    return once, np.diff(begins, append=len(heads))


def remove_page(core: Core, mm: AddressSpace, vma: VmArea, pfn: int) -> None:
    """One PTE less for a page; an anonymous one that nobody maps any more is freed."""
    frames = core.memory.frames
    frames.mapcount_at[pfn] -= 1
    flags = frames.flags_at[pfn]
    if flags & COMPOUND:
        folio = core.memory.large[pfn - frames.behind_at[pfn]]
        folio.add(mm.number, -1)
        if vma.flags & VmFlag.LOCKED:
            munlock(
                core, folio.head, folio.pages
            )  # all of it: that it is locked by its other pages is not looked at
        if not folio.mapped:
            discard_folio(core, folio)
        return
    if flags & MLOCKED and vma.flags & VmFlag.LOCKED:
        munlock(core, pfn, 1)
    if not frames.mapcount_at[pfn]:
        if flags & CACHED:
            return  # its inode still has it
        if flags & _SWAPCACHE:
            core.swap.drop_if_unused(pfn)
        else:
            core.memory.free(pfn)


def remove_pages(core: Core, mm: AddressSpace, vma: VmArea, pfns: Pfns) -> None:
    """One PTE less for each of many pages (each named once, but for merged ones)."""
    memory, frames = core.memory, core.memory.frames
    flags = at(frames.flags, pfns)
    special = _COMPOUND | np.uint64(_SWAPCACHE | MLOCKED | _KSM)
    if np.bitwise_or.reduce(flags) & special:
        flags = flags.copy()  # as they were before anything is freed
        odd = (flags & special) != 0
        compound = pfns[(flags & _COMPOUND) != 0]
        if len(compound):
            frames.mapcount[compound] -= 1
            heads, counts = _by_head(compound - frames.behind[compound])
            heads, counts = _free_whole(core, mm, heads, counts)
            if not vma.flags & VmFlag.LOCKED:
                rest = ~memory.large.remove_many(heads, counts, mm.number)
                heads, counts = heads[rest], counts[rest]
            for head, count in zip(heads.tolist(), counts.tolist(), strict=True):
                folio = memory.large[head]
                folio.add(mm.number, -count)
                if vma.flags & VmFlag.LOCKED:
                    munlock(core, head, folio.pages)
                if not folio.mapped:
                    discard_folio(core, folio)
        for pfn in pfns[odd & ((flags & _COMPOUND) == 0)].tolist():
            remove_page(core, mm, vma, pfn)
        pfns = pfns[~odd]
        if len(pfns) == 0:
            return
    for _, where in runs(pfns):
        frames.mapcount[where] -= 1
    if vma.flags & VmFlag.SHARED:
        return  # their file still has them
    gone = at(frames.mapcount, pfns) == 0
    if vma.file is not None:
        gone &= (at(frames.flags, pfns) & np.uint64(CACHED)) == 0
    memory.free_pages(pfns if gone.all() else pfns[gone])


def _free_whole(
    core: Core, mm: AddressSpace, heads: Pfns, counts: NDArray[np.int64]
) -> tuple[Pfns, NDArray[np.int64]]:
    """Free those folios of which every page was mapped here alone and none is any more; the others are left over."""
    memory = core.memory
    orders = memory.large.whole_of(heads, mm.number)
    done = (orders > 0) & (counts == 1 << orders)
    done &= (memory.frames.flags[heads] & np.uint64(_SWAPCACHE | MLOCKED | CACHED)) == 0
    for order in np.unique(orders[done]).tolist():
        memory.free_whole(heads[done & (orders == order)], order)
    return heads[~done], counts[~done]


def remove_pmd(core: Core, mm: AddressSpace, vma: VmArea, folio: LargeFolio) -> None:
    """One PMD less for a huge page."""
    frames = core.memory.frames
    folio.entire -= 1
    frames.mapcount[folio.head : folio.head + folio.pages] -= 1
    folio.add(mm.number, -1)
    if vma.flags & VmFlag.LOCKED:
        munlock(core, folio.head, folio.pages)
    if not folio.mapped:
        discard_folio(core, folio)


def discard_folio(core: Core, folio: LargeFolio) -> None:
    """A large folio that nobody maps: freed, unless its file or the swap cache needs it."""
    if core.memory.frames.flags_at[folio.head] & CACHED:
        return
    core.mlocks.pop(folio.head, None)
    if core.memory.frames.flags_at[folio.head] & _SWAPCACHE and not core.swap.uncache(
        folio.head, folio.order
    ):
        return
    core.memory.free_folio(folio)


def set_exclusive(core: Core, pfn: int) -> None:
    """The page belongs to one process alone from here on."""
    core.memory.frames.flags_at[pfn] |= ANON_EXCLUSIVE
