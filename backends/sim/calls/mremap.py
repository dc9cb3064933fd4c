"""mremap: shrinking, growing in place, moving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmcore.backends.sim.calls import hugetlb as hugetlb_call
from pmcore.backends.sim.calls.mmap import populate, unmap
from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.services import ksm_merge
from pmcore.backends.sim.virtual import hugetlb, remap
from pmcore.backends.sim.virtual.vma import VmArea, VmFlag
from pmcore.geometry import align_up
from pmcore.uapi import Errno, MremapFlag, UffdFeature

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["mremap"]

_MAYMOVE, _FIXED, _DONTUNMAP = int(MremapFlag.MAYMOVE), int(MremapFlag.FIXED), int(MremapFlag.DONTUNMAP)
_EVENT_REMAP = int(UffdFeature.EVENT_REMAP)


def mremap(
    core: Core, mm: AddressSpace, addr: int, old_length: int, new_length: int, flags: int, new_addr: int
) -> int:
    """mremap(2); the new address."""
    size, task_size = core.geometry.page_size, core.geometry.task_size
    call = ("mremap({:#x}, {:#x}, {:#x}, {:#x}, {:#x})", addr, old_length, new_length, flags, new_addr)
    known = _MAYMOVE | _FIXED | (_DONTUNMAP if core.caps.mremap_dontunmap else 0)
    if flags & ~known or (flags & _FIXED and not flags & _MAYMOVE):
        refuse(Errno.EINVAL, call)
    old_length, new_length = align_up(old_length, size), align_up(new_length, size)
    if flags & _DONTUNMAP and (not flags & _MAYMOVE or old_length != new_length):
        refuse(Errno.EINVAL, call)
    if addr & size - 1 or not new_length:
        refuse(Errno.EINVAL, call)
    if new_length > task_size and core.caps.mremap_checks_early:
        refuse(Errno.EINVAL, call)
    moving = bool(flags & (_FIXED | _DONTUNMAP))
    if moving and core.caps.mremap_checks_early:
        _check_target(core, call, addr, old_length, new_addr, new_length, flags)
    vma = mm.vmas.at(addr)
    if core.caps.mremap_many and flags & _FIXED and old_length == new_length:
        if vma is not None and vma.end >= addr + old_length > addr:
            return _to(core, mm, call, addr, old_length, new_addr, new_length, flags)
        return _many(core, mm, call, addr, old_length, new_addr, flags)
    if vma is None:
        refuse(Errno.EFAULT, call, "nothing is mapped there")
    if vma.flags & VmFlag.HUGETLB:
        old_length, new_length = hugetlb_call.align_mremap(
            call, vma, addr, old_length, new_length, new_addr if moving else 0
        )
    if moving:
        if not core.caps.mremap_checks_early:
            _check_target(core, call, addr, old_length, new_addr, new_length, flags)
        return _to(core, mm, call, addr, old_length, new_addr, new_length, flags)
    if old_length >= new_length:
        if old_length > new_length:
            unmap(core, mm, addr + new_length, addr + old_length)
        return addr
    _resizable(core, mm, call, vma, addr, old_length, new_length)
    delta = new_length - old_length
    if (
        old_length == vma.end - addr
        and vma.end + delta <= task_size
        and not mm.vmas.within(vma.end, vma.end + delta)
    ):
        old_end = vma.end
        vma.end += delta
        mm.vmas.merge(
            vma.end, vma.end, moved=True
        )  # with what it now meets; what lies below it is not looked at
        if vma.flags & VmFlag.LOCKED:
            populate(core, mm, old_end, old_end + delta)
        return addr
    if not flags & _MAYMOVE:
        refuse(Errno.ENOMEM, call, "no room behind it, and MREMAP_MAYMOVE was not given")
    target = mm.vmas.gap_below(new_length, core.mmap_min, core.mmap_base)
    if target < 0:
        refuse(Errno.ENOMEM, call)
    return _move(core, mm, call, vma, addr, old_length, target, new_length, flags)


def _check_target(
    core: Core, call: Call, addr: int, old_length: int, new_addr: int, new_length: int, flags: int
) -> None:
    task_size = core.geometry.task_size
    if flags & _FIXED or not core.caps.mremap_checks_early:
        if (
            new_addr & core.geometry.page_size - 1
            or new_length > task_size
            or new_addr > task_size - new_length
        ):
            refuse(Errno.EINVAL, call)
        if addr + old_length > new_addr and new_addr + new_length > addr:
            refuse(Errno.EINVAL, call, "source and target overlap")


def _resizable(
    core: Core, mm: AddressSpace, call: Call, vma: VmArea, addr: int, old_length: int, new_length: int
) -> None:
    """The checks of vma_to_resize."""
    if not old_length and not vma.flags & VmFlag.MAYSHARE:
        refuse(Errno.EINVAL, call, "a private mapping cannot be duplicated")
    if old_length > vma.end - addr:
        refuse(Errno.EFAULT, call, "the range leaves its mapping")
    if new_length == old_length:
        return
    if vma.flags & (VmFlag.DONTEXPAND | VmFlag.PFNMAP):
        refuse(Errno.EFAULT, call)
    if vma.flags & VmFlag.LOCKED and not core.may_lock(mm, new_length - old_length):
        refuse(Errno.EAGAIN, call)


def _many(core: Core, mm: AddressSpace, call: Call, addr: int, length: int, new_addr: int, flags: int) -> int:
    """Move all mappings of the range, one after the other (remap_move)."""
    end, target, result, behind = addr + length, new_addr, -1, -1
    for vma in mm.vmas.within(addr, end):
        low, high = max(vma.start, addr), min(vma.end, end)
        if behind < 0 and vma.start > addr:
            refuse(Errno.EFAULT, call, "nothing is mapped there")
        alone = vma.uffd is not None  # whoever watches it can be told of one move only
        if alone and (behind >= 0 or vma.end < end):
            refuse(Errno.EFAULT, call, "a mapping with a userfaultfd cannot be moved together with others")
        target += vma.start - behind if behind >= 0 else 0
        behind = vma.end
        target = _to(core, mm, call, low, high - low, target, high - low, flags)
        result = target if result < 0 else result
        target += high - low
    if result < 0:
        refuse(Errno.EFAULT, call, "nothing is mapped there")
    return result


def _to(
    core: Core,
    mm: AddressSpace,
    call: Call,
    addr: int,
    old_length: int,
    new_addr: int,
    new_length: int,
    flags: int,
) -> int:
    """With MREMAP_FIXED or MREMAP_DONTUNMAP."""
    if core.caps.mremap_checks_early:
        first = mm.vmas.at(addr)
        if first is None:
            refuse(Errno.EFAULT, call, "nothing is mapped there")
        if first.flags & VmFlag.HUGETLB:
            old_length, new_length = hugetlb_call.align_mremap(
                call, first, addr, old_length, new_length, new_addr
            )
        if flags & _DONTUNMAP and first.flags & VmFlag.UNUSUAL:
            refuse(Errno.EINVAL, call, "this mapping may not be left behind")
        _resizable(core, mm, call, first, addr, min(old_length, new_length), new_length)
        if (
            flags & _FIXED
            and old_length <= new_length
            and not mm.vmas.within(new_addr, new_addr + new_length)
        ):
            return _move(core, mm, call, first, addr, old_length, new_addr, new_length, flags)
    if flags & _FIXED:
        unmap(core, mm, new_addr, new_addr + new_length)
    if old_length > new_length:
        unmap(core, mm, addr + new_length, addr + old_length)
        old_length = new_length
    vma = mm.vmas.at(addr)
    if vma is None:
        refuse(Errno.EFAULT, call, "nothing is mapped there")
    if flags & _DONTUNMAP and vma.flags & VmFlag.UNUSUAL:
        refuse(Errno.EINVAL, call, "this mapping may not be left behind")
    _resizable(core, mm, call, vma, addr, old_length, new_length)
    if not flags & _FIXED:
        hint = align_up(new_addr, core.geometry.page_size)
        free = (
            hint
            and hint + new_length <= core.geometry.task_size
            and not mm.vmas.within(hint, hint + new_length)
        )
        new_addr = hint if free else mm.vmas.gap_below(new_length, core.mmap_min, core.mmap_base)
        if new_addr < 0:
            refuse(Errno.ENOMEM, call)
    return _move(core, mm, call, vma, addr, old_length, new_addr, new_length, flags)


def _move(
    core: Core,
    mm: AddressSpace,
    call: Call,
    vma: VmArea,
    addr: int,
    old_length: int,
    new_addr: int,
    new_length: int,
    flags: int,
) -> int:
    shift = core.geometry.page_shift
    if flags & _DONTUNMAP and vma.flags & VmFlag.LOCKED and core.caps.dontunmap_splits_locked:
        mm.vmas.split(addr)
        mm.vmas.split(addr + old_length)
        part = mm.vmas.at(addr)
        assert part is not None
        vma = part
    if vma.flags & VmFlag.MERGEABLE:
        ksm_merge.unmerge(
            core, mm, vma, addr, addr + old_length
        )  # at another address nobody would look for them
    drop_uffd = vma.uffd is not None and not getattr(vma.uffd, "features", 0) & _EVENT_REMAP
    # A mapping that never held a page takes the address it moves to for its offset.
    keeps = vma.anon_vma is not None or vma.huge is not None or vma.file is not None
    pgoff = vma.pgoff + (addr - vma.start >> shift) if keeps else new_addr >> shift
    if vma.huge is not None:
        hugetlb_call.check_move(core, vma, addr, old_length)
    new = vma.copy(new_addr, new_addr + new_length, pgoff)
    mm.vmas.add(new)
    if drop_uffd:
        # It joins what the same userfaultfd watches, and all of that is watched no more.
        mm.vmas.merge(new_addr, new_addr + new_length, moved=True)
        joined = mm.vmas.at(new_addr)
        assert joined is not None
        joined.flags &= ~VmFlag.UFFD
        joined.uffd = None
    if vma.huge is not None:
        hugetlb.moved(mm, vma)
    remap.move_entries(core, mm, vma, addr, new_addr, old_length, drop_uffd=drop_uffd)
    locked = vma.flags & VmFlag.LOCKED
    if flags & _DONTUNMAP:
        # All of the old mapping is unlocked, on some kernels also what was not moved; nothing is merged for it.
        vma.flags &= ~VmFlag.LOCKS
        if vma.start == addr and vma.end == addr + old_length:
            vma.anon_vma, vma.chain = None, 0
            if core.caps.dontunmap_resets_offset and vma.file is None and vma.huge is None:
                vma.pgoff = vma.start >> shift
    elif old_length == vma.length and vma.file is None and vma.huge is None:
        floor, ceiling = mm.boundaries(vma, vma)  # what it mapped has moved: only the tables are left
        mm.vmas.remove(vma)
        mm.tables.free_range(addr, addr + old_length, floor, ceiling)
    elif old_length:
        unmap(core, mm, addr, addr + old_length)
    if not drop_uffd:
        mm.vmas.merge(new_addr, new_addr + new_length, moved=True)
    if locked:
        populate(core, mm, new_addr + old_length, new_addr + new_length)
    return new_addr
