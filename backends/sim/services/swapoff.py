"""Switching swap areas on and off: swapoff brings every page of the area back, and replaces its entries everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services import ksm_swap, lru, pagecache, shrink
from pmcore.backends.sim.services.memcg import ROOT
from pmcore.backends.sim.services.swap import SwapArea
from pmcore.backends.sim.virtual import mapping
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SOFT_DIRTY, SWAP, SWAP_EXCLUSIVE, UFFD_WP
from pmcore.backends.sim.virtual.zap import swap_entries
from pmcore.errors import ArgumentError, syscall_error
from pmcore.uapi import MAX_SWAPFILES, Errno, PageFlag

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pmcore.backends.sim.machine import Core

__all__ = ["swapoff", "swapon"]

_ACTIVE, _DIRTY = int(PageFlag.ACTIVE), int(PageFlag.DIRTY)
#: The highest priority (SWAP_FLAG_PRIO_MASK).
_MAX_PRIORITY = 32767


def swapon(
    core: Core, length: int, *, priority: int | None, immediate: bool, large_folios: bool, compressed: bool
) -> SwapArea:
    """A new area. Refused with EINVAL for one without room for a page, EPERM when there are too many."""
    if priority is not None and (isinstance(priority, bool) or not -1 <= priority <= _MAX_PRIORITY):
        raise ArgumentError(
            f"priority={priority!r}", remedy=f"0 to {_MAX_PRIORITY}, or None for the kernel's choice"
        )
    slots = length // core.geometry.page_size
    if slots < 2:
        refuse(Errno.EINVAL, f"swapon({length} bytes)", "two pages are needed: one for the header")
    if sum(area is not None for area in core.swap.areas) >= MAX_SWAPFILES:
        refuse(Errno.EPERM, f"swapon({length} bytes)", f"there are {MAX_SWAPFILES} areas")
    return core.swap.on(
        slots,
        priority=None if priority == -1 else priority,
        immediate=immediate,
        large_folios=large_folios,
        compressed=compressed,
    )


def swapoff(core: Core, number: int) -> int:
    """Switch an area off; the pages that came back. Refused with EINVAL, or ENOMEM where they do not fit.

    Raises NotModelled for merged pages that several processes have there.
    """
    areas = core.swap.areas
    area = areas[number] if isinstance(number, int) and 0 <= number < len(areas) else None
    if area is None:
        refuse(Errno.EINVAL, f"swapoff({number})", "no such area: see swap_areas()")
    copies = ksm_swap.copies(core, area)
    if core.memory.grouped:
        core.groups.may_bring_back(area)
    _make_room(core, area, len(copies))
    back = _bring_back(core, area)
    ksm_swap.copy_back(core, area, copies)
    _replace(core, area, back)
    cached = area.cached[area.cached != 0] - 1
    if core.memory.large:
        compound = (core.memory.frames.flags[cached] & np.uint64(COMPOUND)) != 0
        for pfn in cached[compound].tolist():
            folio = core.memory.large[core.memory.frames.head(pfn)]
            if folio.head == pfn:
                core.swap.uncache(pfn, folio.order)
        cached = cached[~compound]
    core.swap.uncache_many(area, cached)
    assert area.used == 0
    areas[number] = None
    count = int(np.count_nonzero(back))
    core.count("swap_in", count)
    core.count("swapoff")
    return count


def _missing(area: SwapArea) -> NDArray[np.int64]:
    """Slots whose page is not in memory."""
    return np.flatnonzero((area.counts != 0) & (area.cached == 0))


def _make_room(core: Core, area: SwapArea, copies: int) -> None:
    """See that all pages and `copies` more fit above the watermark; other areas may take what is in memory for them."""
    memory = core.memory
    area.closing = True
    try:
        while True:
            lacking = len(_missing(area)) + copies - (memory.free_total - memory.reserve)
            if lacking <= 0:
                return
            evictable = len(lru.inactive(core, swapbacked=True)) + len(lru.active(core))
            if core.swap.free < lacking or evictable < lacking or not shrink.reclaim(core, lacking).pages:
                raise syscall_error(
                    int(Errno.ENOMEM),
                    f"swapoff({area.number})",
                    remedy=f"{lacking} pages too many: free memory, or switch on another area first",
                )
    finally:
        area.closing = False


def _bring_back(core: Core, area: SwapArea) -> NDArray[np.int64]:
    """Read what is not in memory; by slot the frame, 0 for those that nothing names or that were there."""
    memory, frames = core.memory, core.memory.frames
    slots = _missing(area)
    pfns = memory.pages(len(slots), mapping.NEW_ANON | _DIRTY)
    assert len(pfns) == len(slots)
    shadow = area.shadow[slots]
    frames.flags[pfns[(shadow != 0) & (memory.age - (shadow - 1) <= memory.managed)]] |= np.uint64(_ACTIVE)
    frames.content[pfns] = area.content[slots]
    memory.on_lru_pages(pfns)
    if memory.grouped:
        core.groups.bring_back(area, slots, pfns)
    area.content[slots] = area.shadow[slots] = 0
    core.swap.cache(pfns, slots << 5 | area.number)
    back = np.zeros(area.slots, dtype=np.int64)
    back[slots] = pfns
    return back


def _replace(core: Core, area: SwapArea, back: NDArray[np.int64]) -> None:
    """Have every entry that names the area map its page: not accessed, not writable, all else as it was."""
    frames, large, grouped = core.memory.frames, core.memory.large, core.memory.grouped
    _replace_files(core, area)
    for mm in core.spaces.values():
        for extent in mm.tables.extents(0, core.geometry.task_size):
            if extent.huge:
                continue
            entries = extent.entries
            index = np.flatnonzero(swap_entries(entries) & ((entries & np.uint64(0x1F)) == area.number))
            if not len(index):
                continue
            old = entries[index]
            pfns = area.cached[(old & np.uint64(FIELD)).view(np.int64) >> 5] - 1
            lost = (frames.flags[pfns] & np.uint64(PageFlag.HWPOISON)) != 0
            if lost.any():  # poisoned while it was in the swap cache, and dirty
                entries[index[lost]] = pfns[lost].view(np.uint64) << np.uint64(5) | np.uint64(
                    SWAP | core.caps.hwpoison_type
                )
                index, old, pfns = index[~lost], old[~lost], pfns[~lost]
            exclusive = (old & np.uint64(SWAP_EXCLUSIVE)) != 0
            frames.flags[pfns[exclusive]] |= np.uint64(ANON_EXCLUSIVE)
            frames.flags[pfns] |= np.uint64(PageFlag.ANON)
            np.add.at(frames.mapcount, pfns, 1)
            if grouped:  # of a group that is gone: charged to who has it
                core.groups.adopt(pfns, mm.group)
            entries[index] = pfns.view(np.uint64) | np.uint64(PRESENT) | old & np.uint64(SOFT_DIRTY | UFFD_WP)
            if large:
                compound = pfns[(frames.flags[pfns] & np.uint64(COMPOUND)) != 0]
                heads, counts = np.unique(compound - frames.behind[compound], return_counts=True)
                for head, count in zip(heads.tolist(), counts.tolist(), strict=True):
                    large[head].add(mm.number, count)
    area.counts[:] = 0


def _replace_files(core: Core, area: SwapArea) -> None:
    """Pages of shared memory go back into the caches of their files, dirty."""
    frames = core.memory.frames
    for inode in core.inodes.values():
        pages, words = inode.index.used()
        mine = swap_entries(words) & ((words & np.uint64(0x1F)) == area.number)
        if not mine.any():
            continue
        pfns = area.cached[(words[mine] & np.uint64(FIELD)).view(np.int64) >> 5] - 1
        if core.memory.grouped:
            core.groups.adopt(pfns, ROOT)  # who switches the area off is there
        frames.flags[pfns] = frames.flags[pfns] & ~np.uint64(PageFlag.ANON) | np.uint64(CACHED | _DIRTY)
        pagecache.add_at(core, inode, pages[mine], pfns)
