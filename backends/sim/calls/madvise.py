"""madvise: the checks, and which room does what was advised."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls import hugetlb as hugetlb_call
from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.backends.sim.services import (
    collapse,
    collapse_file,
    filesystem,
    ksm_merge,
    memory_failure,
    readahead,
    reclaim,
    swapping,
)
from pmcore.backends.sim.services.userfaultfd import Poisoned
from pmcore.backends.sim.virtual import zap
from pmcore.backends.sim.virtual.populate import fault_in, fault_in_anew
from pmcore.backends.sim.virtual.pte import (
    FIELD,
    GUARD,
    GUARD_MARKER,
    PRESENT,
    SWAP,
    UFFD_WP,
    is_hwpoison,
    is_marker,
)
from pmcore.backends.sim.virtual.vma import VmArea, VmFlag
from pmcore.errors import AddressSpaceFault, NotModelled
from pmcore.geometry import align_up
from pmcore.uapi import Errno, Madvise

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["madvise"]

_SPECIAL = VmFlag.IO | VmFlag.DONTEXPAND | VmFlag.PFNMAP
#: Advice that only changes flags of the VMA: (set, clear).
_FLAGS = {
    int(Madvise.NORMAL): (0, VmFlag.RAND_READ | VmFlag.SEQ_READ),
    int(Madvise.SEQUENTIAL): (VmFlag.SEQ_READ, VmFlag.RAND_READ),
    int(Madvise.RANDOM): (VmFlag.RAND_READ, VmFlag.SEQ_READ),
    int(Madvise.DONTFORK): (VmFlag.DONTCOPY, 0),
    int(Madvise.DOFORK): (0, VmFlag.DONTCOPY),
    int(Madvise.WIPEONFORK): (VmFlag.WIPEONFORK, 0),
    int(Madvise.KEEPONFORK): (0, VmFlag.WIPEONFORK),
    int(Madvise.DONTDUMP): (VmFlag.DONTDUMP, 0),
    int(Madvise.DODUMP): (0, VmFlag.DONTDUMP),
    int(Madvise.HUGEPAGE): (VmFlag.HUGEPAGE, VmFlag.NOHUGEPAGE),
    int(Madvise.NOHUGEPAGE): (VmFlag.NOHUGEPAGE, VmFlag.HUGEPAGE),
}
#: Faulting in: whether for writing.
_POPULATE = {int(Madvise.POPULATE_READ): False, int(Madvise.POPULATE_WRITE): True}
_INJECT = {int(Madvise.HWPOISON): False, int(Madvise.SOFT_OFFLINE): True}


def madvise(core: Core, mm: AddressSpace, start: int, length: int, advice: int) -> None:
    """madvise(2)."""
    size = core.geometry.page_size
    call = ("madvise({:#x}, {:#x}, {})", start, length, advice)
    if not core.knows_advice(advice):
        refuse(Errno.EINVAL, call, "this kernel does not know the advice")
    if start & size - 1 or align_up(length, size) >= 1 << 64:
        refuse(Errno.EINVAL, call)
    end = start + align_up(length, size)
    if end >= 1 << 64:
        refuse(Errno.EINVAL, call)
    if end == start:
        return
    do = _DO.get(advice)
    if do is not None:
        _walk(mm, call, start, end, lambda vma, low, high: do(core, mm, call, vma, low, high))
        return
    if advice in _INJECT:
        memory_failure.inject(core, mm, call, start, end, soft=_INJECT[advice])
        return
    if advice in _POPULATE:
        _populate(core, mm, call, start, end, write=_POPULATE[advice])
        return
    wipe = advice == Madvise.WIPEONFORK

    def set_flags(vma: VmArea, low: int, high: int) -> None:
        hugetlb_call.check_advice(call, vma, wipe=wipe)
        _set_flags(mm, call, vma, low, high, *_FLAGS[advice])

    _walk(mm, call, start, end, set_flags)


def _walk(
    mm: AddressSpace, call: Call, start: int, end: int, do: Callable[[VmArea, int, int], object]
) -> None:
    """Apply to all that is mapped in the range; holes are ENOMEM in the end."""
    position, holes = start, False
    for vma in mm.vmas.within(start, end):
        holes |= vma.start > position
        low, high = max(vma.start, start), min(vma.end, end)
        do(vma, low, high)
        position = high
    if holes or position < end:
        refuse(Errno.ENOMEM, call, "part of the range is not mapped")


def _set_flags(mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int, add: int, remove: int) -> None:
    if add & VmFlag.WIPEONFORK and (vma.file is not None or vma.flags & VmFlag.SHARED):
        refuse(Errno.EINVAL, call, "only private anonymous memory can be wiped")
    if vma.flags & ~remove | add == vma.flags:
        return
    mm.vmas.change(vma, low, high, vma.flags & ~remove | add)
    mm.vmas.merge(low, high)


def _populate(core: Core, mm: AddressSpace, call: Call, start: int, end: int, *, write: bool) -> None:
    populate = fault_in if core.caps.populate_stops_at_hole else fault_in_anew
    position, holes = start, False
    while position < end:
        vma = mm.vmas.at(position)
        if vma is None:
            behind = mm.vmas.first(position)
            if core.caps.populate_stops_at_hole or behind is None or behind.start >= end:
                refuse(Errno.ENOMEM, call, f"nothing is mapped at {position:#x}")
            position, holes = behind.start, True
            continue
        if vma.flags & (VmFlag.IO | VmFlag.PFNMAP):
            refuse(Errno.EINVAL, call)
        if not vma.flags & (VmFlag.WRITE if write else VmFlag.READ):
            refuse(Errno.EINVAL, call, "the mapping does not allow the access")
        stop = min(vma.end, end)
        try:
            populate(core, mm, position, stop, write=write)
        except AddressSpaceFault as fault:
            if fault.signal == "SIGSTOP":
                raise  # whoever faults in waits, as an access would
            refuse(Errno.EHWPOISON if fault.lsb or isinstance(fault, Poisoned) else Errno.EFAULT, call)
        except NoMemory:
            refuse(Errno.ENOMEM, call)
        position = stop
    if holes:
        refuse(Errno.ENOMEM, call, "part of the range is not mapped")


def _dontneed(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if vma.flags & VmFlag.HUGETLB:
        hugetlb_call.dontneed(core, mm, call, vma, low, high)
        return
    if vma.flags & (VmFlag.LOCKED | VmFlag.PFNMAP):
        refuse(Errno.EINVAL, call, "the range is locked")
    zap.zap(core, mm, vma, low, high, keep_guards=True)
    if core.caps.pt_reclaim:
        mm.tables.free_empty(low, high)


def _dontneed_locked(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if vma.flags & VmFlag.HUGETLB:
        hugetlb_call.dontneed(core, mm, call, vma, low, high)
        return
    if vma.flags & VmFlag.PFNMAP:
        refuse(Errno.EINVAL, call)
    zap.zap(core, mm, vma, low, high, keep_guards=True)
    if core.caps.pt_reclaim:
        mm.tables.free_empty(low, high)


def _free(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if vma.flags & (VmFlag.LOCKED | VmFlag.PFNMAP | VmFlag.HUGETLB):
        refuse(Errno.EINVAL, call, "the range is locked")
    if vma.file is not None:
        refuse(Errno.EINVAL, call, "only private anonymous memory can be freed lazily")
    reclaim.lazy_free(core, mm, vma, low, high)


def _cold(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if vma.flags & (VmFlag.LOCKED | VmFlag.PFNMAP | VmFlag.HUGETLB):
        refuse(Errno.EINVAL, call, "the range is locked")
    reclaim.cold(core, mm, vma, low, high)


def _pageout(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if vma.flags & (VmFlag.LOCKED | VmFlag.PFNMAP | VmFlag.HUGETLB):
        refuse(Errno.EINVAL, call, "the range is locked")
    reclaim.pageout(core, mm, vma, low, high)


def _willneed(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if vma.flags & VmFlag.HUGETLB:
        return
    few = mm.tables.few(low, high) if vma.file is None else None
    if few is not None:
        with contextlib.suppress(NoMemory):
            for slot in few:
                pte = core.pool.at[slot]
                if pte & (PRESENT | SWAP) == SWAP and not is_marker(pte) and not is_hwpoison(pte):
                    swapping.bring_in(core, pte & FIELD)
        return
    # In a mapping of a file only the file's pages are read, not private copies that lie in swap.
    wanted = [
        extent.entries[zap.swap_entries(extent.entries)]
        for extent in (mm.tables.extents(low, high) if vma.file is None else ())
        if not extent.huge
    ]
    if vma.file is not None and vma.file.on_disk:
        first = vma.pgoff + (low - vma.start >> core.geometry.page_shift)
        ahead = vma.opened.pages_ahead if vma.opened is not None else 0
        end = first + (high - low >> core.geometry.page_shift)
        readahead.force(core, vma.file, first, end, pages_ahead=ahead)
    elif vma.file is not None:
        first = vma.pgoff + (low - vma.start >> core.geometry.page_shift)
        words = vma.file.index.load(first, high - low >> core.geometry.page_shift)
        wanted.append(words[zap.swap_entries(words)])
    with contextlib.suppress(NoMemory):  # reading ahead is done as far as there is room
        for fields in wanted:
            for field in (fields & np.uint64(FIELD)).tolist():
                swapping.bring_in(core, field)


def _mergeable(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if not vma.flags & VmFlag.MERGEABLE and ksm_merge.compatible(vma):
        core.ksm.enter(mm)
        _set_flags(mm, call, vma, low, high, VmFlag.MERGEABLE, 0)


def _unmergeable(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if vma.flags & VmFlag.MERGEABLE:
        try:
            ksm_merge.unmerge(core, mm, vma, low, high)
        except NoMemory:
            refuse(Errno.EAGAIN, call, "out of memory")
        _set_flags(mm, call, vma, low, high, 0, VmFlag.MERGEABLE)


def _remove(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if vma.flags & VmFlag.HUGETLB:
        hugetlb_call.remove(core, mm, call, vma, low, high)
        return
    if vma.flags & VmFlag.LOCKED:
        refuse(Errno.EINVAL, call, "the range is locked")
    if vma.file is None:
        refuse(Errno.EINVAL, call, "no file is mapped there")
    needed = VmFlag.SHARED | (VmFlag.MAYWRITE if core.caps.remove_needs_maywrite else VmFlag.WRITE)
    if vma.flags & needed != needed:
        refuse(Errno.EACCES, call, "only what is shared and may be written can be removed")
    first = vma.pgoff + (low - vma.start >> core.geometry.page_shift) << core.geometry.page_shift
    filesystem.punch_hole(core, vma.file, first, high - low)


def _collapse(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    if vma.flags & VmFlag.HUGETLB:
        refuse(Errno.EINVAL, call, "hugetlb")
    if vma.file is not None and vma.file.on_disk:
        refuse(Errno.EINVAL, call, "pages of that file system are single pages")
    collapsing = collapse if vma.file is None else collapse_file
    errno = collapsing.collapse_range(core, mm, vma, low, high)
    if errno:
        refuse(errno, call)


def _guardable(core: Core, call: Call, vma: VmArea, *, locked: bool) -> None:
    forbidden = VmFlag.HUGETLB | _SPECIAL | (0 if locked else VmFlag.LOCKED)
    if vma.file is not None and not core.caps.guard_files:
        refuse(Errno.EINVAL, call, "this kernel guards private anonymous memory only")
    if vma.flags & forbidden or not vma.flags & VmFlag.MAYWRITE:
        refuse(Errno.EINVAL, call, "no guard region may be there")


def _guard_install(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    _guardable(core, call, vma, locked=False)
    if core.caps.maybe_guard:
        vma.flags |= VmFlag.MAYBE_GUARD
    if vma.file is not None and vma.flags & VmFlag.UFFD_WP:
        for extent in mm.tables.extents(low, high):
            if (extent.entries & np.uint64(UFFD_WP)).any():
                raise NotModelled(
                    "MADV_GUARD_INSTALL over write-protected pages of a file",
                    remedy="the kernel never returns: emptying them leaves markers, and it tries again",
                )
    if vma.file is None or not core.caps.guard_files_keep_sharing:
        mm.prepare_anon(vma)
    zap.zap(core, mm, vma, low, high, keep_guards=True)
    if core.caps.pt_reclaim:
        mm.tables.free_empty(low, high)
    mm.tables.make(low, high)
    for extent in mm.tables.extents(low, high):
        entries = extent.entries  # a marker that is there stays as it is, with its bits
        entries[(entries & np.uint64(GUARD)) == 0] = GUARD_MARKER


def _guard_remove(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    _guardable(core, call, vma, locked=True)
    for extent in mm.tables.extents(low, high):
        if not extent.huge:
            extent.entries[(extent.entries & np.uint64(GUARD)) != 0] = 0


_DO = {
    int(Madvise.DONTNEED): _dontneed,
    int(Madvise.DONTNEED_LOCKED): _dontneed_locked,
    int(Madvise.FREE): _free,
    int(Madvise.COLD): _cold,
    int(Madvise.PAGEOUT): _pageout,
    int(Madvise.WILLNEED): _willneed,
    int(Madvise.REMOVE): _remove,
    int(Madvise.COLLAPSE): _collapse,
    int(Madvise.MERGEABLE): _mergeable,
    int(Madvise.UNMERGEABLE): _unmergeable,
    int(Madvise.GUARD_INSTALL): _guard_install,
    int(Madvise.GUARD_REMOVE): _guard_remove,
}
