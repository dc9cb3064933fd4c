"""The userfaultfd ioctls: UFFDIO_API, REGISTER, UNREGISTER, WRITEPROTECT, with the kernel's checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.calls.uffd_common import context_of, range_of
from pmcore.backends.sim.services.userfaultfd import Userfaultfd
from pmcore.backends.sim.virtual import hugetlb, protect
from pmcore.backends.sim.virtual.vma import VmArea, VmFlag
from pmcore.uapi import Errno, UffdFeature

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.task import SimTask
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["api", "close", "register", "unregister", "writeprotect"]

_MISSING, _WP, _MINOR = 1, 2, 4
_WP_FEATURES_FILES = UffdFeature.WP_HUGETLBFS_SHMEM


def api(core: Core, mm: AddressSpace, features: int) -> Userfaultfd:
    """UFFDIO_API."""
    call = f"UFFDIO_API({features:#x})"
    known = core.caps.uffd_features
    if features & ~known:
        refuse(Errno.EINVAL, call, "this kernel does not know a feature")
    if features & UffdFeature.WP_ASYNC:
        features |= UffdFeature.WP_UNPOPULATED
    if features & UffdFeature.EVENT_FORK and not core.privileged:
        refuse(Errno.EPERM, call, "UFFD_FEATURE_EVENT_FORK needs CAP_SYS_PTRACE")
    return Userfaultfd(mm, int(features))  # a plain number: it is asked at each fault


def register(core: Core, mm: AddressSpace, fd: int, start: int, length: int, mode: int) -> int:
    """UFFDIO_REGISTER; the bits of the ioctls that then work on the range."""
    call = f"UFFDIO_REGISTER({start:#x}, {length:#x}, mode {mode:#x})"
    context = context_of(mm, fd, call)
    if not mode or mode & ~(_MISSING | _WP | _MINOR):
        refuse(Errno.EINVAL, call)
    if mode & _WP and not core.caps.uffd_wp:
        refuse(Errno.EINVAL, call, "this kernel has no write protection")
    if mode & _MINOR and not core.caps.uffd_minor:
        refuse(Errno.EINVAL, call, "this kernel has no minor faults")
    range_of(core, call, start, length)
    end = start + length
    mm = context.mm
    if not mm.alive:
        refuse(Errno.ENOMEM, call, "the process that it watched is gone")
    first = mm.vmas.first(start)
    if first is None or first.start >= end:
        refuse(Errno.EINVAL, call, "nothing is mapped there")
    flags = (VmFlag.UFFD_MISSING if mode & _MISSING else 0) | (VmFlag.UFFD_WP if mode & _WP else 0)
    flags |= VmFlag.UFFD_MINOR if mode & _MINOR else 0
    _check_huge_start(call, first, start)
    basic, asynchronous = False, bool(context.features & UffdFeature.WP_ASYNC)
    for vma in mm.vmas.within(start, end):
        huge = bool(vma.flags & VmFlag.HUGETLB)
        shmem = vma.file is not None and not vma.file.on_disk
        minor = mode & _MINOR and not (shmem and core.caps.uffd_features & UffdFeature.MINOR_SHMEM)
        if not huge and (minor or vma.flags & (VmFlag.IO | VmFlag.PFNMAP)):
            refuse(Errno.EINVAL, call, "a mapping in the range cannot be registered so")
        files = bool(_WP_FEATURES_FILES & core.caps.uffd_features)
        if mode & _WP and (huge or vma.file is not None) and not files:
            refuse(Errno.EINVAL, call, "this kernel protects anonymous memory only")
        if vma.file is not None and vma.file.on_disk and not (flags == VmFlag.UFFD_WP and asynchronous):
            refuse(Errno.EINVAL, call, "a file on a disk is protected by WP_ASYNC alone")
        if not vma.flags & VmFlag.MAYWRITE:
            refuse(Errno.EPERM, call)
        if huge and end <= vma.end and end & hugetlb.page_size(vma) - 1:
            refuse(Errno.EINVAL, call, "the range ends inside a hugetlb page")
        basic |= huge
        if vma.uffd is not None and vma.uffd is not context:
            refuse(Errno.EBUSY, call, "another userfaultfd has it")
    for vma in mm.vmas.within(start, end):
        if vma.uffd is context and vma.flags & flags == flags:
            continue
        low, high = max(vma.start, start), min(vma.end, end)
        if vma.flags & VmFlag.UFFD_WP and not flags & VmFlag.UFFD_WP and "uffd_wp_left" not in core.numbers:
            core.number("uffd_wp_left")  # entries stay as they are (UF-011)
        part = mm.vmas.change(vma, low, high, vma.flags & ~VmFlag.UFFD | flags)
        part.uffd = context
        mm.vmas.merge(low, high)
    return _ioctls(core, mode, basic=basic)


def _ioctls(core: Core, mode: int, *, basic: bool) -> int:
    """Which ioctls work on a range, as bits of their numbers; `basic`: some of it is hugetlb."""
    wake, copy, zeropage, move, protect, minor, poison = (1 << number for number in range(2, 9))
    found = wake | copy | (0 if basic else zeropage)
    found |= move if core.caps.uffd_move and not basic else 0
    found |= protect if mode & _WP else 0
    found |= minor if mode & _MINOR else 0
    return found | (poison if core.caps.uffd_poison else 0)


def _check_huge_start(call: str, first: VmArea, start: int) -> None:
    """A range may not begin inside a hugetlb page, also where it begins below the first mapping."""
    if first.flags & VmFlag.HUGETLB and start & hugetlb.page_size(first) - 1:
        refuse(Errno.EINVAL, call, "the range begins inside a hugetlb page")


def unregister(core: Core, mm: AddressSpace, fd: int, start: int, length: int) -> None:
    """UFFDIO_UNREGISTER."""
    call = f"UFFDIO_UNREGISTER({start:#x}, {length:#x})"
    context = context_of(mm, fd, call)
    mm = context.mm
    range_of(core, call, start, length)
    if not mm.alive:
        refuse(Errno.ENOMEM, call, "the process that it watched is gone")
    end = start + length
    first = mm.vmas.first(start)
    if first is None or first.start >= end:
        refuse(Errno.EINVAL, call, "nothing is mapped there")
    _check_huge_start(call, first, start)
    if core.caps.uffd_unregister_own and any(
        v.uffd not in (None, context) for v in mm.vmas.within(start, end)
    ):
        refuse(Errno.EINVAL, call, "another userfaultfd has it")
    asynchronous = bool(context.features & UffdFeature.WP_ASYNC)
    for vma in mm.vmas.within(start, end):
        wp_alone = vma.flags & VmFlag.UFFD == VmFlag.UFFD_WP
        if vma.file is not None and vma.file.on_disk and not (wp_alone and asynchronous):
            refuse(Errno.EINVAL, call, "a file on a disk is protected by WP_ASYNC alone")
    for vma in mm.vmas.within(start, end):
        if vma.uffd is None:
            continue
        low, high = max(vma.start, start), min(vma.end, end)
        if vma.flags & VmFlag.UFFD_WP:
            protect.uffd_wp(core, mm, vma, low, high, protect=False)
        part = mm.vmas.change(vma, low, high, vma.flags & ~VmFlag.UFFD)
        part.uffd = None
        mm.vmas.merge(low, high)


def writeprotect(core: Core, mm: AddressSpace, fd: int, start: int, length: int, *, protect_it: bool) -> None:
    """UFFDIO_WRITEPROTECT."""
    call = f"UFFDIO_WRITEPROTECT({start:#x}, {length:#x}, {protect_it})"
    context = context_of(mm, fd, call)
    mm = context.mm
    range_of(core, call, start, length)
    if not mm.alive:
        refuse(Errno.ESRCH, call, "the process that it watched is gone")
    end, position = start + length, start
    vmas = mm.vmas.within(start, end)
    if not vmas:
        refuse(Errno.ENOENT, call, "nothing is mapped there")
    if not core.caps.uffd_wp_many and not (vmas[0].start <= start and end <= vmas[0].end):
        refuse(Errno.ENOENT, call, "the range does not lie in one mapping")
    for vma in vmas:
        if not vma.flags & VmFlag.UFFD_WP:
            refuse(Errno.ENOENT, call, "part of the range is not registered for write protection")
        if vma.flags & VmFlag.HUGETLB and (start | length) & hugetlb.page_size(vma) - 1:
            refuse(Errno.EINVAL, call, "a part of a hugetlb page")
        low, high = max(vma.start, position), min(vma.end, end)
        protect.uffd_wp(core, mm, vma, low, high, protect=protect_it)


def close(core: Core, mm: AddressSpace, fd: int, tasks: Iterable[SimTask]) -> None:
    """Close a descriptor; the last one of a userfaultfd unregisters everything."""
    context = mm.files.pop(fd)
    if not isinstance(context, Userfaultfd):
        return
    if any(context in task.mm.files.values() for task in tasks):
        return
    for task in tasks:
        for vma in list(task.mm.vmas):
            if vma.uffd is context:
                if vma.flags & VmFlag.UFFD_WP:
                    protect.uffd_wp(core, task.mm, vma, vma.start, vma.end, protect=False)
                vma.flags &= ~VmFlag.UFFD
                vma.uffd = None
                task.mm.vmas.merge(vma.start, vma.end)
