"""System calls where hugetlb mappings have rules of their own: mmap, madvise, mremap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.services.hugetlb import HugeFile, HugeMap, Pool, Promise
from pmcore.backends.sim.virtual import hugetlb
from pmcore.backends.sim.virtual.vma import VmArea, VmFlag
from pmcore.errors import NotModelled
from pmcore.geometry import align_up
from pmcore.uapi import Errno, MapFlag, Prot

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["align_mremap", "check_advice", "dontneed", "mmap", "pool_of", "remove"]

_PROT = int(Prot.READ | Prot.WRITE | Prot.EXEC)
_SIZE_SHIFT, _SIZE_MASK = 26, 63
_SHARED_VALIDATE = 3


def pool_of(core: Core, flags: int, shift: int = _SIZE_SHIFT) -> Pool | None:
    """The pool that the size bits of flags name (0: the default)."""
    log = flags >> shift & _SIZE_MASK
    return core.hugetlb.pools.get(1 << log) if log else core.hugetlb.default


def mmap(core: Core, mm: AddressSpace, addr: int, length: int, prot: int, flags: int, offset: int) -> int:
    """mmap(2) with MAP_ANONYMOUS and MAP_HUGETLB: a file of its own, private or shared; the address."""
    call = f"mmap({addr:#x}, {length:#x}, {prot:#x}, {flags:#x}, -1, {offset:#x})"
    pool = pool_of(core, flags)
    if pool is None or not core.caps.hugetlb:
        refuse(Errno.EINVAL, call, "no huge pages of that size")
    length = align_up(length, pool.size)
    if not length:
        refuse(Errno.EINVAL, call, "no length")
    file = HugeFile(pool, length, "/anon_hugepage (deleted)")
    with core.hugetlb.files_go_later():
        return map_file(core, mm, call, file, addr, length, prot, flags, offset)


def map_file(
    core: Core,
    mm: AddressSpace,
    call: Call,
    file: HugeFile,
    addr: int,
    length: int,
    prot: int,
    flags: int,
    offset: int,
) -> int:
    """Map a file of hugetlbfs; `length` is a multiple of its page size."""
    from pmcore.backends.sim.calls.mmap import make_room, populate

    task_size, size = core.geometry.task_size, file.pool.size
    if length > task_size:
        refuse(Errno.ENOMEM, call)
    if flags & MapFlag.FIXED_NOREPLACE:
        flags |= MapFlag.FIXED
    if flags & MapFlag.FIXED:
        if addr & size - 1:
            refuse(Errno.EINVAL, call, "MAP_FIXED inside a huge page")
        if addr > task_size - length:
            refuse(Errno.ENOMEM, call)
    else:
        addr = _place(core, mm, addr, length, size)
        if addr < 0:
            refuse(Errno.ENOMEM, call, "no place in the address space")
    if flags & MapFlag.FIXED_NOREPLACE and mm.vmas.within(addr, addr + length):
        refuse(Errno.EEXIST, call)
    locked = bool(flags & MapFlag.LOCKED or mm.def_flags & VmFlag.LOCKED)
    if locked and not core.may_lock(mm, length):
        refuse(Errno.EAGAIN, call)
    kind = flags & 0x0F
    if kind not in (MapFlag.SHARED, MapFlag.PRIVATE, _SHARED_VALIDATE):
        refuse(Errno.EINVAL, call, "neither MAP_PRIVATE nor MAP_SHARED")
    if flags & MapFlag.GROWSDOWN:
        refuse(Errno.EINVAL, call, "a file does not grow down")
    shared = kind != MapFlag.PRIVATE
    if shared and file.pool.level == 1 and _covers_table(core, addr, length):
        raise NotModelled("shared page tables of hugetlb mappings of 1 GiB", remedy="smaller mappings")
    vm_flags = prot & _PROT | VmFlag.MAY_ALL | VmFlag.HUGETLB | VmFlag.DONTEXPAND
    vm_flags |= mm.def_flags & ~VmFlag.LOCKS
    if shared:
        vm_flags |= VmFlag.SHARED | VmFlag.MAYSHARE
    if flags & MapFlag.NORESERVE:
        vm_flags |= VmFlag.NORESERVE  # also where overcommit is never allowed
    if core.caps.soft_dirty:
        vm_flags |= VmFlag.SOFTDIRTY
    # What was there is gone before the file is asked, which may still refuse.
    make_room(core, mm, call, addr, addr + length)
    if offset & size - 1:
        refuse(Errno.EINVAL, call, "an offset inside a huge page")
    if not _reserve(core, file, offset // size, (offset + length) // size, vm_flags):
        refuse(Errno.ENOMEM, call, "not as many huge pages are left")
    promise = None if shared or vm_flags & VmFlag.NORESERVE else Promise()
    file.inode = file.inode or core.number("huge_file")
    if vm_flags & VmFlag.WRITE:
        file.length = max(file.length, offset + length)
    vma = VmArea(addr, addr + length, vm_flags, offset >> core.geometry.page_shift, name=file.name)
    vma.huge = HugeMap(file, promise)
    file.add_user(mm, 1)
    mm.vmas.add(vma)
    if flags & MapFlag.POPULATE or locked:  # also where locks wait for faults: nothing is locked here
        populate(core, mm, addr, addr + length)
    return addr


def _place(core: Core, mm: AddressSpace, hint: int, length: int, size: int) -> int:
    if hint:
        hint = align_up(hint, size) if core.caps.hugetlb_hint_rounds_up else hint & -size
        if core.mmap_min <= hint <= core.geometry.task_size - length and not mm.vmas.within(
            hint, hint + length
        ):
            return hint
    return mm.vmas.gap_below(length, core.mmap_min, core.mmap_base, align=size)


def _covers_table(core: Core, addr: int, length: int) -> bool:
    """Whether a whole table of PMDs is the mapping's: two such mappings of a file share it."""
    span = core.geometry.pmd_size << core.geometry.pmd_order
    return align_up(addr, span) + span <= addr + length


def _reserve(core: Core, file: HugeFile, first: int, last: int, flags: int) -> bool:
    """Promise the pages of a new mapping (hugetlb_reserve_pages); False if that cannot be."""
    if flags & VmFlag.NORESERVE:
        return True
    if flags & VmFlag.MAYSHARE:
        fresh = [index for index in range(first, last) if index not in file.reserved]
        if not core.hugetlb.reserve(file.pool, len(fresh)):
            return False
        file.reserved.update(fresh)
        return True
    return core.hugetlb.reserve(file.pool, last - first)


def dontneed(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    """MADV_DONTNEED: from the start of a huge page; a part at the end is left alone."""
    size = hugetlb.page_size(vma)
    if low & size - 1 or not core.caps.hugetlb_dontneed:
        refuse(Errno.EINVAL, call, "the range begins inside a hugetlb page")
    gone: hugetlb.Gone = []
    hugetlb.zap(core, mm, vma, low, max(low, high & -size), gone, drop_markers=False)
    hugetlb.release(core, gone)


def remove(core: Core, mm: AddressSpace, call: Call, vma: VmArea, low: int, high: int) -> None:
    """MADV_REMOVE: a hole in the file; pages in part are filled with zeros."""
    wanted = VmFlag.SHARED | VmFlag.MAYWRITE
    if vma.flags & wanted != wanted:
        refuse(Errno.EACCES, call, "only shared mappings")
    assert vma.huge is not None
    base = (vma.pgoff << core.geometry.page_shift) - vma.start
    punch(core, vma.huge.file, base + low, base + high)


def punch(core: Core, file: HugeFile, start: int, end: int) -> None:
    """Punch a hole (hugetlbfs_punch_hole)."""
    size = file.pool.size
    inner, outer = align_up(start, size), end & -size
    if start < inner:
        _zero(core, file, start, min(inner, end))
    if outer > inner:
        first, last = inner // size, outer // size
        hugetlb.unmap_file(core, file, first, last)
        file.reserved -= {index for index in file.pages if first <= index < last}
        core.hugetlb.forget_pages(file, first, last)
    if end > outer and outer >= inner:
        _zero(core, file, outer, end)


def _zero(core: Core, file: HugeFile, start: int, end: int) -> None:
    """Zeros in a part of one huge page, if it is there."""
    head = file.pages.get(start // file.pool.size)
    if head is None:
        return
    small, frames = core.geometry.page_size, core.memory.frames
    for place in range(start, end, small):
        pfn = head + (place % file.pool.size) // small
        if frames.content_at[pfn]:
            core.memory.contents.give_back(frames.content[pfn : pfn + 1])
            frames.content_at[pfn] = 0


def align_mremap(call: Call, vma: VmArea, addr: int, old: int, new: int, new_addr: int) -> tuple[int, int]:
    """Lengths rounded to huge pages. Refuses addresses inside one, and growing."""
    size = hugetlb.page_size(vma)
    old, new = align_up(old, size), align_up(new, size)
    if addr & size - 1 or new_addr & size - 1 or new > old:
        refuse(Errno.EINVAL, call, "a hugetlb mapping moves by whole pages, and never grows")
    return old, new


def check_move(core: Core, vma: VmArea, addr: int, length: int) -> None:
    """Before a move: what is promised to the rest of a mapping would be lost by the kernel."""
    assert vma.huge is not None
    if vma.huge.promise is not None and (vma.start != addr or vma.length != length):
        raise NotModelled("moving a part of a private hugetlb mapping: its promises are lost for good")


def check_advice(call: Call, vma: VmArea, *, wipe: bool) -> None:
    """Advice that only changes flags: what a mapping of a file refuses."""
    if wipe and vma.flags & VmFlag.HUGETLB:
        refuse(Errno.EINVAL, call, "WIPEONFORK is for private anonymous memory")
