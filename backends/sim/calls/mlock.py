"""mlock, mlock2, munlock, mlockall, munlockall."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.mmap import breaks_cow, populate
from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.services.batches import large_runs
from pmcore.backends.sim.virtual import mapping
from pmcore.backends.sim.virtual.populate import fault_in_anew
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT
from pmcore.backends.sim.virtual.vma import VmArea, VmFlag
from pmcore.errors import AddressSpaceFault
from pmcore.geometry import align_up
from pmcore.uapi import Errno

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["mlock", "mlockall", "munlock", "munlockall"]


def mlock(core: Core, mm: AddressSpace, start: int, length: int, *, onfault: bool) -> None:
    """mlock(2), mlock2(2)."""
    call, size = ("mlock({:#x}, {:#x}, onfault={})", start, length, onfault), core.geometry.page_size
    length = align_up(length + (start & size - 1), size)
    start &= -size
    if not core.may_lock(mm, length):
        refuse(Errno.ENOMEM, call, "more than RLIMIT_MEMLOCK")
    flags = VmFlag.LOCKED | (VmFlag.LOCKONFAULT if onfault else 0)
    _apply(core, mm, call, start, length, flags)
    _populate(core, mm, call, start, start + length)  # not what is locked on fault; hugetlb never is


def munlock(core: Core, mm: AddressSpace, start: int, length: int) -> None:
    """munlock(2)."""
    size = core.geometry.page_size
    length = align_up(length + (start & size - 1), size)
    _apply(core, mm, f"munlock({start:#x}, {length:#x})", start & -size, length, 0)


def _apply(core: Core, mm: AddressSpace, call: Call, start: int, length: int, flags: int) -> None:
    end = start + length
    if end < start or end > 1 << 64:
        refuse(Errno.EINVAL, call)
    if end == start:
        return
    vma = mm.vmas.at(start)
    if vma is None:
        refuse(Errno.ENOMEM, call, "nothing is mapped there")
    position = start
    while position < end:
        vma = mm.vmas.at(position)
        if vma is None:
            refuse(Errno.ENOMEM, call, f"nothing is mapped at {position:#x}")
        stop = min(vma.end, end)
        set_lock(core, mm, vma, position, stop, flags)
        position = stop


def set_lock(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, flags: int) -> None:
    """Give a part of a VMA these lock flags, and its pages what follows from them."""
    if vma.flags & VmFlag.LOCKS == flags or vma.flags & VmFlag.UNUSUAL:
        return
    was = vma.flags & VmFlag.LOCKED
    mm.vmas.change(vma, start, end, vma.flags & ~VmFlag.LOCKS | flags)
    mm.vmas.merge(start, end)
    if bool(was) == bool(flags & VmFlag.LOCKED):
        return
    change = mapping.mlock if flags & VmFlag.LOCKED else mapping.munlock
    frames = core.memory.frames
    few = mm.tables.few(start, end) if not core.memory.large else None
    if few is not None:
        for slot in few:
            pte = core.pool.at[slot]
            if pte & PRESENT and pte & FIELD != core.zero_pfn:
                change(core, pte & FIELD, 1)
        return
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        pfns = (entries[(entries & np.uint64(PRESENT)) != 0] & np.uint64(FIELD)).view(np.int64)
        if extent.huge:
            for head in pfns.tolist():
                if head != core.huge_zero_pfn:
                    change(core, head, core.geometry.pmd_pages)
            continue
        pfns = pfns[pfns != core.zero_pfn]
        for pfn in pfns[(frames.flags[pfns] & np.uint64(COMPOUND)) == 0].tolist():
            change(core, pfn, 1)
        runs = large_runs(core, extent.start, entries)
        if flags:
            # A large folio is locked where one run maps all of it; unlocked by any.
            runs = runs.take(runs.whole)
        for head, order in zip(runs.head.tolist(), runs.order.tolist(), strict=True):
            change(core, head, 1 << order)


def _populate(core: Core, mm: AddressSpace, call: Call, start: int, end: int) -> None:
    for vma in mm.vmas.within(start, end):
        if vma.flags & VmFlag.LOCKONFAULT:
            continue
        if not vma.flags & VmFlag.ACCESS:
            refuse(Errno.ENOMEM, call, "a mapping in it may not be accessed")
        low, high = max(start, vma.start), min(end, vma.end)
        try:
            fault_in_anew(core, mm, low, high, write=breaks_cow(vma))
        except AddressSpaceFault:
            refuse(Errno.ENOMEM, call, "a page in it cannot be faulted in")
        except NoMemory:
            refuse(Errno.EAGAIN, call, "out of memory")


def mlockall(core: Core, mm: AddressSpace, flags: int) -> None:
    """mlockall(2): 1 current, 2 future, 4 on fault."""
    call = f"mlockall({flags:#x})"
    if not flags or flags & ~7 or flags == 4:
        refuse(Errno.EINVAL, call)
    total = sum(vma.length for vma in mm.vmas)
    if flags & 1 and not core.may_lock(mm, total - mm.locked):
        refuse(Errno.ENOMEM, call)
    locks = VmFlag.LOCKED | (VmFlag.LOCKONFAULT if flags & 4 else 0)
    mm.def_flags = mm.def_flags & ~VmFlag.LOCKS | (locks if flags & 2 else 0)
    if flags & 1:
        for vma in list(mm.vmas):
            set_lock(core, mm, vma, vma.start, vma.end, locks)
        for vma in list(mm.vmas):
            populate(core, mm, vma.start, vma.end)


def munlockall(core: Core, mm: AddressSpace) -> None:
    """munlockall(2)."""
    mm.def_flags &= ~VmFlag.LOCKS
    for vma in list(mm.vmas):
        set_lock(core, mm, vma, vma.start, vma.end, 0)
