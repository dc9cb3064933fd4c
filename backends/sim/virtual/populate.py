"""Faulting ranges in without an access (MAP_POPULATE, mlock, MADV_POPULATE_*): the kernel walks, no processor does.

What is there already keeps its accessed and dirty bits; instead the page itself is marked as accessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.sim.virtual import accessed, fault, hugetlb, mlock_batch, touch
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT, WRITE, YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import AddressSpaceFault
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["fault_in", "fault_in_anew"]

_ALL = (1 << 64) - 1
_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_DIRTY = int(PageFlag.DIRTY)


def fault_in(core: Core, mm: AddressSpace, start: int, end: int, *, write: bool) -> None:
    """Fault in the pages of one VMA. Raises AddressSpaceFault at the first that cannot be."""
    vma = mm.vmas.at(start)
    if vma is not None and mm.has_key(vma):
        raise fault.segfault(start, "its protection key forbids to read it")
    if vma is not None and vma.flags & VmFlag.HUGETLB:
        hugetlb.fault_in(core, mm, vma, start, end, write=write)
        return
    few = (
        mm.tables.few(start, end)
        if vma is not None
        and not core.memory.large
        and not (vma.file is not None and vma.flags & VmFlag.LOCKED)
        else None
    )
    if few is not None:
        _few_in(core, mm, vma, start, end, few, write=write)
        return
    before = [
        (extent.start, extent.huge, extent.size, extent.entries.copy())
        for extent in mm.tables.extents(start, end)
    ]
    late = None
    if vma is not None and vma.file is not None and vma.flags & VmFlag.LOCKED:
        late = mlock_batch.Batch(core, mm, vma, start, end, around=not write)
    try:
        touch.touch(core, mm, start, end, write=write)
    except AddressSpaceFault as failed:
        end = failed.address & -core.geometry.page_size
        raise
    finally:
        _put_back(core, mm, before, end, write=write)
        if late is not None:
            late.mark(end)
        else:
            _mark(core, mm, start, end)


def fault_in_anew(core: Core, mm: AddressSpace, start: int, end: int, *, write: bool) -> None:
    """`fault_in` as MAP_POPULATE and mlock do it: a fault that had to wait for a disk begins anew (rule DF-018)."""
    mm.populating = True
    try:
        fault_in(core, mm, start, end, write=write)
    finally:
        mm.populating = False


def _few_in(
    core: Core, mm: AddressSpace, vma: VmArea | None, start: int, end: int, few: range, *, write: bool
) -> None:
    """`fault_in` for few pages, where there are no large folios; `few`: their entries' places, if they have a table."""
    size = core.geometry.page_size
    if write and end - start == size and not (few and core.pool.at[few[0]]) and not core.ksm.nodes:
        pfn = fault.access(core, mm, start, write=True, vma=vma)
        if not core.memory.large or mm.tables.pte_slot(start) >= 0:  # what a PMD maps is not marked
            accessed.mark_one(core, pfn)
        return
    before = [core.pool.at[slot] for slot in few]
    try:
        for addr in range(start, end, size):
            fault.access(core, mm, addr, write=write, vma=vma)
    except AddressSpaceFault as failed:
        end = failed.address & -core.geometry.page_size
        raise
    finally:
        at, flags, wanted = core.pool.at, core.memory.frames.flags_at, PRESENT | WRITE if write else PRESENT
        # A huge page's entry, if there is one now, is marked as accessed like any other.
        few = (
            few[: end - start >> core.geometry.page_shift]
            if few
            else mm.tables.few(start, max(start, end)) or few
        )
        for slot, old in zip(few, before, strict=False):
            if old & wanted == wanted and at[slot] & PRESENT:
                at[slot] = at[slot] & ~(YOUNG | DIRTY) | old & (YOUNG | DIRTY)
                if write and not old & DIRTY:
                    flags[at[slot] & FIELD] |= _DIRTY
        if core.ksm.nodes:  # several of them may be one merged page
            _mark(core, mm, start, max(start, end))
            few = few[:0]
        for slot in few:
            pte = at[slot]
            if pte & PRESENT and pte & FIELD != core.zero_pfn:
                accessed.mark_one(core, pte & FIELD)


def _put_back(
    core: Core, mm: AddressSpace, before: list[tuple[int, bool, int, U64Array]], end: int, *, write: bool
) -> None:
    """Take off the accessed and dirty bits that entries got which were good enough before."""
    bits = YOUNG | DIRTY
    wanted = np.uint64(PRESENT | WRITE if write else PRESENT)
    for start, huge, size, old in before:
        stop = min(start + len(old) * size, end)
        if start >= stop:
            continue
        if huge:
            if not write:  # for writing a huge page's entry is marked like any other
                _put_back_huge(mm, start, stop, size, old)
            continue
        old = old[: stop - start >> core.geometry.page_shift]
        good = (old & wanted) == wanted
        if not good.any():
            continue
        position = 0
        for extent in mm.tables.extents(start, stop):
            part = slice(position, position + len(extent.entries))
            # What was reclaimed meanwhile has no bits to be put back.
            chosen = good[part] & ((extent.entries & _PRESENT) != 0)
            if write:
                clean = chosen & ((old[part] & np.uint64(DIRTY)) == 0)
                pfns = (extent.entries[clean] & _FIELD).view(np.int64)
                frames = core.memory.frames
                frames.flags[pfns] |= np.uint64(_DIRTY)
                for head in np.unique(pfns - frames.behind[pfns]).tolist() if core.memory.large else ():
                    folio = core.memory.large.get(head)
                    if folio is not None:
                        frames.set_bits(head, folio.pages, _DIRTY)
            extent.entries[chosen] = extent.entries[chosen] & np.uint64(~bits & _ALL) | old[part][
                chosen
            ] & np.uint64(bits)
            position = part.stop


def _put_back_huge(mm: AddressSpace, start: int, stop: int, size: int, old: U64Array) -> None:
    """Populating for reading leaves the entries of huge pages that are there as they are (touch_pmd on x86)."""
    young = np.uint64(YOUNG)
    for extent in mm.tables.extents(start, stop):
        if extent.huge:
            first = (extent.start - start) // size
            was = old[first : first + len(extent.entries)]
            same = ((extent.entries ^ was) & ~young) == 0
            extent.entries[same] = was[same]


def _mark(core: Core, mm: AddressSpace, start: int, end: int) -> None:
    for extent in mm.tables.extents(start, end):
        if not extent.huge:
            present = (extent.entries & _PRESENT) != 0
            pfns = (extent.entries[present] & _FIELD).view(np.int64)
            accessed.mark(core, pfns[pfns != core.zero_pfn])
