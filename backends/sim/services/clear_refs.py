"""/proc/PID/clear_refs: forgetting accesses, and soft-dirty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.services.batches import large_runs
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SOFT_DIRTY, WRITE, YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import ClearRefs, Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["write"]

_ALL = (1 << 64) - 1
_REFERENCED = np.uint64(~int(PageFlag.REFERENCED) & _ALL)


def write(core: Core, mm: AddressSpace, what: int) -> None:
    """What writing that number does. Refused with EINVAL where the kernel knows no such number."""
    if what not in tuple(ClearRefs) or not core.profile.has("clear_refs"):
        refuse(Errno.EINVAL, f"write(clear_refs, {what})")
    if what == ClearRefs.SOFT_DIRTY:
        if core.caps.soft_dirty:
            _soft_dirty(core, mm)
        return
    if what in (ClearRefs.ALL, ClearRefs.ANON, ClearRefs.MAPPED):
        _accessed(core, mm, what)


def _soft_dirty(core: Core, mm: AddressSpace) -> None:
    mm.soft_dirty_cleared = True
    for vma in mm.vmas:
        vma.flags &= ~VmFlag.SOFTDIRTY
        if vma.flags & VmFlag.HUGETLB:
            continue  # its pages are not walked
        for extent in mm.tables.extents(vma.start, vma.end):
            entries = extent.entries
            present = (entries & np.uint64(PRESENT)) != 0
            entries[present] &= np.uint64(~(SOFT_DIRTY | WRITE) & _ALL)
            entries[~present] &= np.uint64(~SOFT_DIRTY & _ALL)


def _accessed(core: Core, mm: AddressSpace, what: int) -> None:
    frames = core.memory.frames
    passed = {ClearRefs.ANON: True, ClearRefs.MAPPED: False}.get(ClearRefs(what))
    for vma in mm.vmas:
        if vma.flags & VmFlag.HUGETLB:
            continue
        if passed is not None and (vma.file is None) != passed:
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
                    frames.clear_bits(head, core.geometry.pmd_pages, int(PageFlag.REFERENCED))
            else:
                frames.flags[pfns] &= _REFERENCED
                runs = large_runs(core, extent.start, entries)
                for head, order in zip(runs.head.tolist(), runs.order.tolist(), strict=True):
                    frames.clear_bits(head, 1 << order, int(PageFlag.REFERENCED))
