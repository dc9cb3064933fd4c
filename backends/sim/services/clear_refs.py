"""/proc/PID/clear_refs: forgetting accesses, and soft-dirty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.physical.frames import MOVED_YOUNG
from pmcore.backends.sim.services.batches import large_runs
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SOFT_DIRTY, WRITE, YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import ClearRefs, Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["write"]

_ALL = (1 << 64) - 1
#: What a page knows of accesses.
_REFERENCED = int(PageFlag.REFERENCED) | MOVED_YOUNG
_KNOWN, _FORGET_DIRTY = frozenset(map(int, ClearRefs)), int(ClearRefs.SOFT_DIRTY)
#: Which VMAs: those of anonymous memory, or of files, or all.
_ACCESSED = {int(ClearRefs.ALL): None, int(ClearRefs.ANON): True, int(ClearRefs.MAPPED): False}


def write(core: Core, mm: AddressSpace, what: int) -> None:
    """What writing that number does. Refused with EINVAL where the kernel knows no such number."""
    if what not in _KNOWN or not core.profile.has("clear_refs"):
        refuse(Errno.EINVAL, f"write(clear_refs, {what})")
    if what == _FORGET_DIRTY:
        if core.caps.soft_dirty:
            _soft_dirty(core, mm)
        return
    if what in _ACCESSED:
        _accessed(core, mm, _ACCESSED[what])


def _soft_dirty(core: Core, mm: AddressSpace) -> None:
    mm.soft_dirty_cleared = True
    if core.caps.page_shift:
        core.numbers["soft_dirty_cleared"] = (
            1  # of the whole machine: bits 55 to 60 are flags from here on (PM-005)
        )
    for vma in mm.vmas:
        vma.flags &= ~VmFlag.SOFTDIRTY
        if vma.flags & VmFlag.HUGETLB:
            continue  # its pages are not walked
        for extent in mm.tables.extents(vma.start, vma.end):
            entries = extent.entries
            present = (entries & np.uint64(PRESENT)) != 0
            entries[present] &= np.uint64(~(SOFT_DIRTY | WRITE) & _ALL)
            entries[~present] &= np.uint64(~SOFT_DIRTY & _ALL)


def _accessed(core: Core, mm: AddressSpace, passed: bool | None) -> None:
    """Forget accesses to anonymous memory alone (`passed`), to files alone (False), or to all (None)."""
    frames = core.memory.frames
    for vma in mm.vmas:
        if vma.flags & VmFlag.HUGETLB:
            continue
        if passed is not None and (vma.file is None) != passed:
            continue
        few = mm.tables.few(vma.start, vma.end) if not core.memory.large else None
        if few is not None:
            for slot in few:
                pte = core.pool.at[slot]
                if pte & PRESENT and pte & FIELD != core.zero_pfn:
                    core.pool.at[slot] = pte & ~YOUNG
                    frames.flags_at[pte & FIELD] &= ~_REFERENCED
            continue
        for extent in mm.tables.extents(vma.start, vma.end):
            entries = extent.entries
            present = ((entries & np.uint64(PRESENT)) != 0) & (
                (entries & np.uint64(FIELD)) != np.uint64(core.zero_pfn)
            )
            if core.huge_zero_pfn:
                present &= (entries & np.uint64(FIELD)) != np.uint64(core.huge_zero_pfn)
            entries[present] &= np.uint64(~YOUNG & _ALL)
            pfns = (entries[present] & np.uint64(FIELD)).view(np.int64)
            if extent.huge:
                for head in pfns.tolist():
                    frames.clear_bits(head, core.geometry.pmd_pages, _REFERENCED)
            else:
                frames.flags[pfns] &= np.uint64(~_REFERENCED & _ALL)
                runs = large_runs(core, extent.start, entries)
                for head, order in zip(runs.head.tolist(), runs.order.tolist(), strict=True):
                    frames.clear_bits(head, 1 << order, _REFERENCED)
