"""mmap, munmap, mprotect, brk: system calls on VMAs, with the kernel's checks in the kernel's order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmcore.backends.sim.calls import hugefiles
from pmcore.backends.sim.calls import hugetlb as hugetlb_call
from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.services import pagecache
from pmcore.backends.sim.services.hugetlb import HugeFile
from pmcore.backends.sim.services.pagecache import FileSystem, OpenFile
from pmcore.backends.sim.virtual import hugetlb, protect, zap
from pmcore.backends.sim.virtual.populate import fault_in_anew
from pmcore.backends.sim.virtual.vma import VmArea, VmFlag
from pmcore.errors import AddressSpaceFault, SyscallError
from pmcore.geometry import align_up
from pmcore.protocols import HEAP
from pmcore.uapi import Errno, MapFlag, Prot

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["breaks_cow", "brk", "mmap", "mprotect", "munmap", "populate"]

_PROT = int(Prot.READ | Prot.WRITE | Prot.EXEC)
#: Kept free below a mapping that grows downwards (stack_guard_gap).
_GUARD_PAGES = 256
_GROWSDOWN, _GROWSUP = 0x01000000, 0x02000000
#: Flags as plain numbers: those of the enumeration take a microsecond each.
_SHARED, _PRIVATE, _VALIDATE = int(MapFlag.SHARED), int(MapFlag.PRIVATE), int(MapFlag.SHARED_VALIDATE)
_ANONYMOUS, _HUGETLB, _DOWN = int(MapFlag.ANONYMOUS), int(MapFlag.HUGETLB), int(MapFlag.GROWSDOWN)
_FIXED, _NOREPLACE = int(MapFlag.FIXED), int(MapFlag.FIXED_NOREPLACE)
_LOCKED, _POPULATE, _NORESERVE = int(MapFlag.LOCKED), int(MapFlag.POPULATE), int(MapFlag.NORESERVE)
_KNOWN = _SHARED | _PRIVATE | _FIXED | _ANONYMOUS | _DOWN | _LOCKED | _NORESERVE | _POPULATE | _NOREPLACE
_KNOWN |= int(MapFlag.STACK)
_MMAP = "mmap({:#x}, {:#x}, {:#x}, {:#x}, {}, {:#x})"
_IGNORED = 0x0800 | 0x1000 | 0x10000  # MAP_DENYWRITE, MAP_EXECUTABLE, MAP_NONBLOCK


def mmap(
    core: Core, mm: AddressSpace, addr: int, length: int, prot: int, flags: int, fd: int, offset: int
) -> int:
    """mmap(2); the address."""
    geometry = core.geometry
    size, call = geometry.page_size, (_MMAP, addr, length, prot, flags, fd, offset)
    if offset & size - 1:
        refuse(Errno.EINVAL, call, "the offset is not page-aligned")
    if not flags & _ANONYMOUS and fd not in mm.files:
        refuse(Errno.EBADF, call)
    if not flags & _ANONYMOUS and isinstance(huge := mm.files[fd], HugeFile):
        return hugefiles.mmap(core, mm, huge, addr, length, prot, flags, offset)
    if flags & _HUGETLB:
        if not flags & _ANONYMOUS:
            refuse(Errno.EINVAL, call, "that file has no huge pages")
        return hugetlb_call.mmap(core, mm, addr, length, prot, flags, offset)
    if not length:
        refuse(Errno.EINVAL, call, "no length")
    if flags & _NOREPLACE:
        flags |= _FIXED
    length = align_up(length, size)
    if length >= 1 << 64 or length > geometry.task_size:
        refuse(Errno.ENOMEM, call)
    if flags & _FIXED:
        if addr > geometry.task_size - length:
            refuse(Errno.ENOMEM, call)
        if addr & size - 1:
            refuse(Errno.EINVAL, call, "MAP_FIXED at an address inside a page")
    else:
        addr = _place(core, mm, addr, length)
        if addr < 0:
            refuse(Errno.ENOMEM, call, "no place in the address space")
    if flags & _NOREPLACE and mm.vmas.within(addr, addr + length):
        refuse(Errno.EEXIST, call)
    if flags & _LOCKED and not core.may_lock(mm, length):
        refuse(Errno.EAGAIN, call)
    kind = flags & 0x0F
    inode, pgoff = None, addr >> geometry.page_shift
    if not flags & _ANONYMOUS:
        file = mm.files[fd]
        pgoff = offset >> geometry.page_shift
        if kind == _VALIDATE and flags & ~(_KNOWN | _IGNORED | _HUGETLB):
            refuse(Errno.EOPNOTSUPP, call)
        if kind in (_SHARED, _PRIVATE, _VALIDATE):
            if not isinstance(file, OpenFile):
                refuse(Errno.ENODEV, call, "that descriptor cannot be mapped")
            if flags & _DOWN:
                refuse(Errno.EINVAL, call, "a file does not grow down")
            inode = file.inode
            kind = _SHARED if kind == _VALIDATE else kind
    if kind not in (_SHARED, _PRIVATE):
        refuse(Errno.EINVAL, call, "neither MAP_PRIVATE nor MAP_SHARED")
    vm_flags = prot & _PROT | VmFlag.MAY_ALL | mm.def_flags
    if kind == _SHARED:
        if flags & _DOWN:
            refuse(Errno.EINVAL, call, "shared memory does not grow down")
        vm_flags |= VmFlag.SHARED | VmFlag.MAYSHARE
    if flags & _LOCKED:
        vm_flags |= VmFlag.LOCKED
    if flags & _DOWN:
        vm_flags |= VmFlag.GROWSDOWN
    if flags & _NORESERVE and core.policy.overcommit != "never":
        vm_flags |= VmFlag.NORESERVE
    if vm_flags & (VmFlag.WRITE | VmFlag.SHARED | VmFlag.NORESERVE) == VmFlag.WRITE:
        vm_flags |= VmFlag.ACCOUNT
    if core.caps.soft_dirty:
        vm_flags |= VmFlag.SOFTDIRTY
    if flags & _FIXED:
        make_room(core, mm, call, addr, addr + length)
    if kind == _SHARED and inode is None:
        inode, pgoff = pagecache.make(core, FileSystem.SHMEM, "/dev/zero (deleted)", length), 0
    name = "" if inode is None else inode.name
    by = mm.files[fd] if inode is not None and inode.on_disk else None
    opened = by if isinstance(by, OpenFile) else None
    mm.vmas.add(VmArea(addr, addr + length, vm_flags, pgoff, name=name, file=inode, opened=opened))
    mm.vmas.merge(addr, addr + length)  # the whole of it is soft-dirty then
    if flags & _POPULATE or (vm_flags & (VmFlag.LOCKED | VmFlag.LOCKONFAULT)) == VmFlag.LOCKED:
        populate(core, mm, addr, addr + length)
    return addr


def _place(core: Core, mm: AddressSpace, hint: int, length: int) -> int:
    """Where the kernel puts a mapping: at the hint if that is free, else top-down below the stack."""
    geometry = core.geometry
    if hint:
        hint = align_up(hint, geometry.page_size)
        above = mm.vmas.first(hint)
        gap = _GUARD_PAGES * geometry.page_size if above is not None and above.flags & VmFlag.GROWSDOWN else 0
        room = geometry.task_size if above is None else above.start - gap
        if core.mmap_min <= hint and hint + length <= min(room, geometry.task_size):
            return hint
    align = 1
    if (
        not hint
        and core.caps.thp
        and core.caps.thp_aligned_mmap
        and length >= geometry.pmd_size
        and not length % geometry.pmd_size
    ):
        align = geometry.pmd_size
    found = mm.vmas.gap_below(length, core.mmap_min, core.mmap_base, align=align)
    if found < 0 and align > 1:
        found = mm.vmas.gap_below(length, core.mmap_min, core.mmap_base)
    return found


def populate(core: Core, mm: AddressSpace, start: int, end: int) -> None:
    """Fault the range in as far as that goes: for writing where that is allowed, else for reading."""
    for vma in mm.vmas.within(start, end):
        low, high = max(start, vma.start), min(end, vma.end)
        if not vma.flags & VmFlag.ACCESS:
            continue
        if vma.flags & VmFlag.LOCKONFAULT:
            continue
        try:
            fault_in_anew(core, mm, low, high, write=breaks_cow(vma))
        except (AddressSpaceFault, core.NoMemory):
            continue


def breaks_cow(vma: VmArea) -> bool:
    """Whether populating a VMA writes to its pages: what is shared is only read."""
    return vma.flags & (VmFlag.WRITE | VmFlag.SHARED) == VmFlag.WRITE


def munmap(core: Core, mm: AddressSpace, start: int, length: int) -> None:
    """munmap(2)."""
    call, size = ("munmap({:#x}, {:#x})", start, length), core.geometry.page_size
    task_size = core.geometry.task_size
    if start & size - 1 or start > task_size or length > task_size - start:
        refuse(Errno.EINVAL, call)
    length = align_up(length, size)
    if not length:
        refuse(Errno.EINVAL, call, "no length")
    _unmap(core, mm, start, start + length)


def _unmap(core: Core, mm: AddressSpace, start: int, end: int) -> None:
    """Take away whatever is mapped in the range."""
    gone = mm.vmas.within(start, end)
    if not gone:
        return
    if gone[0].start < start or gone[-1].end > end:
        mm.vmas.split(start)
        mm.vmas.split(end)
        gone = mm.vmas.within(start, end)
    floor, ceiling = mm.boundaries(gone[0], gone[-1])
    huge = []
    for vma in gone:
        if vma.huge is not None:
            huge.append(vma)
            continue
        zap.zap(core, mm, vma, vma.start, vma.end, drop_markers=True)
        mm.vmas.remove(vma)
    if huge:
        hugetlb.unmap(core, mm, huge)
    mm.tables.free_range(start, end, floor, ceiling)
    for inode in {vma.file.number: vma.file for vma in gone if vma.file is not None}.values():
        pagecache.put(core, inode)


def make_room(core: Core, mm: AddressSpace, call: Call, start: int, end: int) -> None:
    """Take away what a new mapping replaces. Before 6.12 a boundary that cannot be is ENOMEM (HT-003)."""
    try:
        _unmap(core, mm, start, end)
    except SyscallError as error:
        if core.caps.mmap_says_why:
            raise
        refuse(Errno.ENOMEM, call, str(error))


unmap = _unmap
__all__ += ["make_room", "unmap"]


def mprotect(core: Core, mm: AddressSpace, start: int, length: int, prot: int) -> None:
    """mprotect(2)."""
    call, size = ("mprotect({:#x}, {:#x}, {:#x})", start, length, prot), core.geometry.page_size
    grows = prot & (_GROWSDOWN | _GROWSUP)
    if grows == _GROWSDOWN | _GROWSUP or start & size - 1:
        refuse(Errno.EINVAL, call)
    if not length:
        return
    length = align_up(length, size)
    end = start + length
    if end <= start or end >= 1 << 64:
        refuse(Errno.ENOMEM, call)
    if prot & ~(_PROT | 0x8 | _GROWSDOWN | _GROWSUP):  # PROT_SEM is allowed
        refuse(Errno.EINVAL, call)
    vma = mm.vmas.first(start)
    if vma is None:
        refuse(Errno.ENOMEM, call, "nothing is mapped there")
    if grows == _GROWSDOWN:
        if vma.start >= end:
            refuse(Errno.ENOMEM, call, "nothing is mapped there")
        start = vma.start
        if not vma.flags & VmFlag.GROWSDOWN:
            refuse(Errno.EINVAL, call, "the mapping does not grow downwards")
    else:
        if vma.start > start:
            refuse(Errno.ENOMEM, call, "nothing is mapped there")
        if grows:
            refuse(Errno.EINVAL, call, "no mapping grows upwards here")
    position = start
    while True:
        assert vma is not None
        stop = min(vma.end, end)
        _fix(core, mm, vma, position, stop, prot & _PROT)
        position = stop
        if position >= end:
            break
        vma = mm.vmas.at(position)
        if vma is None:
            refuse(Errno.ENOMEM, call, f"nothing is mapped at {position:#x}")


def _fix(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, prot: int) -> None:
    """Change the part of one VMA; neighbours that it then could be one with join it."""
    flags = vma.flags & ~VmFlag.ACCESS | prot
    if flags == vma.flags:
        return
    if flags & VmFlag.WRITE and not flags & (
        VmFlag.ACCOUNT | VmFlag.NORESERVE | VmFlag.HUGETLB | VmFlag.SHARED
    ):
        flags |= VmFlag.ACCOUNT
    elif (
        core.caps.mprotect_unaccounts
        and not flags & VmFlag.WRITE
        and vma.anon_vma is None
        and vma.file is None
    ):
        flags &= ~VmFlag.ACCOUNT  # nothing was ever in it
    became_writable = flags & VmFlag.WRITE and not vma.flags & VmFlag.WRITE
    part = mm.vmas.change(vma, start, end, flags)
    protect.change_protection(core, mm, part, start, end)
    mm.vmas.merge(start, end)
    # Private, locked and writable now: what will be copied is copied at once.
    if became_writable and (flags & (VmFlag.LOCKS | VmFlag.SHARED)) == VmFlag.LOCKED:
        populate(core, mm, start, end)


def brk(core: Core, mm: AddressSpace, addr: int) -> int:
    """brk(2) as the system call: the break after it, moved or not."""
    size = core.geometry.page_size
    if not mm.brk_start:
        mm.brk_start = mm.brk = HEAP
    if addr < mm.brk_start or addr > core.geometry.task_size:
        return mm.brk
    old, new = align_up(mm.brk, size), align_up(addr, size)
    if new < old:
        if not mm.vmas.within(new, old):
            return mm.brk  # it has been moved away
        try:
            _unmap(core, mm, new, old)
        except OSError:
            return mm.brk  # a hugetlb mapping was made there, and would be cut
    elif new > old:
        above = mm.vmas.first(old)  # a page is left free, below what grows downwards more
        grows = above is not None and above.flags & VmFlag.GROWSDOWN
        if above is not None and above.start - (_GUARD_PAGES * size if grows else 0) < new + size:
            return mm.brk
        flags = VmFlag.READ | VmFlag.WRITE | VmFlag.MAY_ALL | VmFlag.ACCOUNT | mm.def_flags
        if core.caps.soft_dirty:
            flags |= VmFlag.SOFTDIRTY
        if flags & VmFlag.LOCKED and not core.may_lock(mm, new - old):
            return mm.brk
        mm.vmas.add(VmArea(old, new, flags, old >> core.geometry.page_shift))
        mm.vmas.merge(old, new)
        if flags & VmFlag.LOCKED:
            populate(core, mm, old, new)
    mm.brk = addr
    return addr
