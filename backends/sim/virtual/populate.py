"""Faulting ranges in without an access (MAP_POPULATE, mlock, MADV_POPULATE_*): the kernel walks, no processor does.

What is there already keeps its accessed and dirty bits; instead the page itself is marked as accessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.virtual import touch
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT, WRITE, YOUNG
from pmcore.errors import AddressSpaceFault
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["fault_in", "mark_accessed"]

_ALL = (1 << 64) - 1
_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_REFERENCED, _ACTIVE = int(PageFlag.REFERENCED), int(PageFlag.ACTIVE)
_KSM = int(PageFlag.KSM)
_UNEVICTABLE, _DIRTY = int(PageFlag.UNEVICTABLE), int(PageFlag.DIRTY)


def fault_in(core: Core, mm: AddressSpace, start: int, end: int, *, write: bool) -> None:
    """Fault in the pages of one VMA. Raises AddressSpaceFault at the first that cannot be."""
    before = [
        (extent.start, extent.huge, extent.size, extent.entries.copy())
        for extent in mm.tables.extents(start, end)
    ]
    try:
        touch.touch(core, mm, start, end, write=write)
    except AddressSpaceFault as fault:
        end = fault.address & -core.geometry.page_size
        raise
    finally:
        _put_back(core, mm, before, end, write=write)
        _mark(core, mm, start, end)


def _put_back(
    core: Core, mm: AddressSpace, before: list[tuple[int, bool, int, U64Array]], end: int, *, write: bool
) -> None:
    """Take off the accessed and dirty bits that entries got which were good enough before."""
    bits = YOUNG | DIRTY
    wanted = np.uint64(PRESENT | WRITE if write else PRESENT)
    for start, huge, size, old in before:
        stop = min(start + len(old) * size, end)
        if start >= stop or huge:
            continue  # a huge page's entry is marked as accessed like any other
        old = old[: stop - start >> core.geometry.page_shift]
        good = (old & wanted) == wanted
        if not good.any():
            continue
        position = 0
        for extent in mm.tables.extents(start, stop):
            part = slice(position, position + len(extent.entries))
            chosen = good[part]
            if write:
                clean = chosen & ((old[part] & np.uint64(DIRTY)) == 0)
                pfns = (extent.entries[clean] & _FIELD).view(np.int64)
                core.memory.frames.flags[pfns] |= np.uint64(_DIRTY)
            extent.entries[chosen] = extent.entries[chosen] & np.uint64(~bits & _ALL) | old[part][
                chosen
            ] & np.uint64(bits)
            position = part.stop


def _mark(core: Core, mm: AddressSpace, start: int, end: int) -> None:
    for extent in mm.tables.extents(start, end):
        if not extent.huge:
            present = (extent.entries & _PRESENT) != 0
            pfns = (extent.entries[present] & _FIELD).view(np.int64)
            mark_accessed(core, pfns[pfns != core.zero_pfn])


def mark_accessed(core: Core, pfns: Pfns) -> None:
    """folio_mark_accessed for each page: referenced at first, active the second time."""
    frames = core.memory.frames
    flags = frames.flags[pfns]
    compound = (flags & np.uint64(COMPOUND)) != 0
    if compound.any():
        heads, counts = np.unique(pfns[compound] - frames.behind[pfns[compound]], return_counts=True)
        for head, count in zip(heads.tolist(), counts.tolist(), strict=True):
            _mark_folio(core, head, count)
        pfns, flags = pfns[~compound], flags[~compound]
    merged = (flags & np.uint64(_KSM)) != 0
    if merged.any():  # the same page, as often as it is mapped
        for pfn in pfns[merged].tolist():
            _mark_folio(core, pfn, 1)
        pfns, flags = pfns[~merged], flags[~merged]
    referenced = (flags & np.uint64(_REFERENCED)) != 0
    frames.flags[pfns[~referenced]] |= np.uint64(_REFERENCED)
    again = pfns[referenced & ((flags & np.uint64(_UNEVICTABLE | _ACTIVE)) == 0)]
    frames.flags[again] = frames.flags[again] & np.uint64(~_REFERENCED & _ALL) | np.uint64(_ACTIVE)
    core.memory.on_lru_pages(again)


def _mark_folio(core: Core, head: int, times: int) -> None:
    frames = core.memory.frames
    pages = core.memory.large[head].pages if head in core.memory.large else 1
    for _ in range(min(times, 3)):
        flags = frames.flags_at[head]
        if not flags & _REFERENCED:
            frames.set_bits(head, pages, _REFERENCED)
        elif not flags & (_UNEVICTABLE | _ACTIVE):
            frames.clear_bits(head, pages, _REFERENCED)
            frames.set_bits(head, pages, _ACTIVE)
            core.memory.on_lru(head, pages)
