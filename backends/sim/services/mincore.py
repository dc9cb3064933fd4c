"""mincore and msync."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import BoolArray
from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.services import writeback
from pmcore.backends.sim.virtual import hugetlb
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SWAP, is_hwpoison, is_marker
from pmcore.backends.sim.virtual.tables import FEW
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries, swap_entries
from pmcore.geometry import align_up
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.services.pagecache import Inode
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["in_core", "mincore", "msync"]

_UPTODATE = int(PageFlag.UPTODATE)


def mincore(core: Core, mm: AddressSpace, start: int, length: int) -> BoolArray:
    """mincore(2): present, or in the swap cache."""
    geometry, call = core.geometry, f"mincore({start:#x}, {length:#x})"
    if start & geometry.page_size - 1:
        refuse(Errno.EINVAL, call)
    if start + length > geometry.task_size + geometry.page_size:
        refuse(Errno.ENOMEM, call)
    end = start + align_up(length, geometry.page_size)
    if not mm.vmas.covers(start, end):
        refuse(Errno.ENOMEM, call, "part of the range is not mapped")
    shift = geometry.page_shift
    found: BoolArray = np.zeros(end - start >> shift, dtype=np.bool_)
    for vma in mm.vmas.within(start, end):
        if vma.file is not None:
            low, high = max(vma.start, start), min(vma.end, end)
            first = vma.pgoff + (low - vma.start >> shift)
            found[low - start >> shift : high - start >> shift] = in_core(
                core, vma.file, first, high - low >> shift
            )
    few = mm.tables.few(start, end)
    for index, slot in enumerate(few or ()):
        pte = core.pool.at[slot]
        if pte & PRESENT or is_hwpoison(pte):
            found[index] = True
        elif pte & SWAP and not is_marker(pte):
            found[index] = _cached(core, pte & FIELD)  # whatever the file has there
    for extent in mm.tables.extents(start, end) if few is None else ():
        low, high = max(extent.start, start), min(extent.end, end)
        part = found[low - start >> shift : high - start >> shift]
        if extent.huge:
            part[:] = True
            continue
        part |= (extent.entries & np.uint64(PRESENT)) != 0
        if core.names_frames:
            part |= hwpoison_entries(extent.entries)
        swap = swap_entries(extent.entries)
        if swap.any():
            fields = extent.entries[swap] & np.uint64(FIELD)
            part[swap] = [_cached(core, field) for field in fields.tolist()]
    if core.hugetlb.used:
        for vma in hugetlb.flagged(mm, start, end):
            low, high = max(vma.start, start), min(vma.end, end)
            hugetlb.in_core(core, mm, vma, low, high, found[low - start >> shift : high - start >> shift])
    return found


def _cached(core: Core, field: int) -> bool:
    """Whether the swap cache has the slot's page, up to date (a poisoned one is not)."""
    pfn = core.swap.cached(field)
    return pfn >= 0 and bool(core.memory.frames.flags_at[pfn] & int(PageFlag.UPTODATE))


def in_core(core: Core, inode: Inode, first: int, count: int) -> BoolArray:
    """Which pages of a file are in memory: in its cache and up to date, or in the swap cache."""
    words = inode.index.load(first, count)
    if count <= FEW:
        flags_at = core.memory.frames.flags_at
        return np.array(
            [
                bool(flags_at[word & FIELD] & _UPTODATE)
                if word & PRESENT
                else bool(word) and core.swap.cached(word & FIELD) >= 0
                for word in words.tolist()
            ],
            dtype=np.bool_,
        )
    found: BoolArray = (words & np.uint64(PRESENT)) != 0
    pfns = (words[found] & np.uint64(FIELD)).view(np.int64)
    found[found] = (core.memory.frames.flags[pfns] & np.uint64(_UPTODATE)) != 0
    swap = swap_entries(words)
    if swap.any():
        fields = words[swap] & np.uint64(FIELD)
        found[swap] = [core.swap.cached(field) >= 0 for field in fields.tolist()]
    return found


def msync(core: Core, mm: AddressSpace, start: int, length: int, flags: int) -> None:
    """msync(2): MS_SYNC writes out what shared mappings of the range map of files; a later refusal undoes nothing."""
    size, call = core.geometry.page_size, f"msync({start:#x}, {length:#x}, {flags:#x})"
    if flags & ~7 or start & size - 1 or flags & 5 == 5:
        refuse(Errno.EINVAL, call)
    end = start + align_up(length, size)
    if end >= 1 << 64:
        refuse(Errno.ENOMEM, call)
    for vma in mm.vmas.within(start, end):
        if flags & 2 and vma.flags & VmFlag.LOCKED:
            refuse(Errno.EBUSY, call)
        if flags & 4 and vma.file is not None and vma.flags & VmFlag.SHARED:
            low, high = max(start, vma.start), min(end, vma.end)
            first = vma.pgoff + (low - vma.start >> core.geometry.page_shift)
            writeback.write_out(core, vma.file, first, first + (high - low >> core.geometry.page_shift))
    if not mm.vmas.covers(start, end):
        refuse(Errno.ENOMEM, call, "part of the range is not mapped")
