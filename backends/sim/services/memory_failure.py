"""Memory failure: frames that are taken out of use because what they hold is, or soon may be, corrupted.

What maps a poisoned page are hwpoison entries from then on, and whoever accesses one is sent SIGBUS. What becomes of
a page by what it is lies in `poisoned_pages`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.services import poisoned_huge
from pmcore.backends.sim.services import poisoned_pages as pages
from pmcore.backends.sim.virtual import accessed, fault, hugetlb
from pmcore.backends.sim.virtual.pte import FIELD, LEAF, PRESENT, SPECIAL, SWAP
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import AddressSpaceFault, NotModelled
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["hwpoison", "inject", "unpoison"]

_BUDDY, _HWPOISON = int(PageFlag.BUDDY), int(PageFlag.HWPOISON)
_REFERENCED, _LRU = int(PageFlag.REFERENCED), int(PageFlag.LRU)
_KSM, _SWAPCACHE, _HUGE = int(PageFlag.KSM), int(PageFlag.SWAPCACHE), int(PageFlag.HUGE)
_KERNEL = int(PageFlag.RESERVED | PageFlag.SLAB | PageFlag.PGTABLE | PageFlag.ZERO_PAGE | PageFlag.OFFLINE)
#: What makes a page other than one of anonymous or of shared memory, single and mapped by PTEs.
_ODD = int(
    PageFlag.SWAPCACHE
    | PageFlag.KSM
    | PageFlag.HUGE
    | PageFlag.COMPOUND_HEAD
    | PageFlag.COMPOUND_TAIL
    | PageFlag.HWPOISON
)


def inject(core: Core, mm: AddressSpace, call: Call, start: int, end: int, *, soft: bool) -> None:
    """MADV_HWPOISON, or MADV_SOFT_OFFLINE, of the pages of the range, until one is refused (rules HW-001 to HW-016).

    Of a large folio the first page that is met stands for all that follow in as many bytes as the folio has (HW-004).
    Raises AddressSpaceFault, all being done, where whoever asks had a dirty page poisoned. Raises NotModelled, in its
    turn, at a dirty page of a disk's file, and where a page is to be moved away and there is no room.
    """
    if not core.privileged:
        refuse(Errno.EPERM, call, "memory is poisoned by the administrator only")
    size = core.geometry.page_size
    signal: AddressSpaceFault | None = None
    try:
        while start < end:
            run = _run(core, mm, start, end)
            if len(run) > 1:
                told, step = _many(core, mm, start, run, soft=soft), size
                start += (len(run) - 1) * size
            else:
                told, step = _one(core, mm, call, start, soft=soft)
            start += step
            if signal is None and told >= 0:
                huge = (vma := mm.vmas.at(told)) is not None and vma.flags & VmFlag.HUGETLB
                signal = _signal(told, step if huge else size)
    except _Told as already:
        if signal is None and already.address >= 0:
            signal = _signal(already.address, size)
        if signal is None:
            refuse(Errno.EHWPOISON, call, "the page was poisoned before")
    finally:
        if signal is not None:
            raise signal


class _Told(Exception):
    """A page that was poisoned before: who asks is told of it at this address, -1 for nobody; and refused."""

    def __init__(self, address: int) -> None:
        self.address = address


def _signal(address: int, size: int) -> AddressSpaceFault:
    lsb = size.bit_length() - 1
    return AddressSpaceFault("SIGBUS", address, "its page has been poisoned", lsb=lsb)


def _run(core: Core, mm: AddressSpace, start: int, end: int) -> Pfns:
    """Frames of the pages from `start` on, as far as they are present and plain: those that go in one piece."""
    none = np.zeros(0, dtype=np.int64)
    vma = mm.vmas.at(start)
    if vma is None or not vma.flags & VmFlag.ACCESS or vma.flags & VmFlag.HUGETLB:
        return none
    if vma.file is not None and (vma.file.on_disk or not core.caps.memory_failure_keeps_shmem):
        return none
    found: list[Pfns] = []
    for extent in mm.tables.extents(start, min(vma.end, end)):
        if extent.huge or extent.start > start:
            break
        entries = extent.entries
        pfns = (entries & np.uint64(FIELD)).view(np.int64)
        plain = (entries & np.uint64(PRESENT | SPECIAL)) == np.uint64(PRESENT)
        plain[plain] = (core.memory.frames.flags[pfns[plain]] & np.uint64(_ODD | _LRU)) == np.uint64(_LRU)
        count = len(plain) if plain.all() else int(np.argmin(plain))
        found.append(pfns[:count])
        start += count << core.geometry.page_shift
        if count < len(plain):
            break
    return np.concatenate(found) if found else none


def _many(core: Core, mm: AddressSpace, start: int, run: Pfns, *, soft: bool) -> int:
    """Poison, or move away, plain pages; the address that `mm` is told of, -1 for none."""
    core.memory.frames.flags[run] |= np.uint64(_REFERENCED)
    if soft:
        _check_room(core, len(run))
        pages.soft_offline_many(core, run)
        return -1
    dirty = pages.poison_many(core, run)
    if not dirty.any():
        return -1
    first = int(np.argmax(dirty))
    if core.memory.frames.flags_at[int(run[first])] & CACHED:
        return pages.first_mapping(core, mm, int(run[first]))
    return start + (first << core.geometry.page_shift)


def _check_room(core: Core, count: int) -> None:
    if core.memory.spare < count:
        raise NotModelled("soft-offlining pages of a machine that has no others")


def _one(core: Core, mm: AddressSpace, call: Call, addr: int, *, soft: bool) -> tuple[int, int]:
    """The same for one page, whatever it is: the address told, and how many bytes the folio has. May be refused."""
    pfn = _get(core, mm, call, addr)
    frames, small = core.memory.frames, core.geometry.page_size
    flags = frames.flags_at[pfn]
    if flags & _HUGE:
        size = core.hugetlb.folios[frames.head(pfn)].size
        if not soft:
            return poisoned_huge.poison(core, pfn, mm), size
        poisoned_huge.soft_offline(core, call, pfn)
        return -1, size
    folio = pages.folio_of(core, pfn)
    size = small if not flags & COMPOUND else core.geometry.pmd_size if folio is None else folio.pages * small
    if soft:
        if flags & _HWPOISON:
            return -1, size
        if flags & _KERNEL:
            refuse(Errno.EIO, call, "the zero page is none that can be moved")
        _check_room(core, 1)
        pages.soft_offline(core, pfn)
        return -1, size
    if flags & _HWPOISON:
        raise _Told(pages.first_mapping(core, mm, pfn))
    if flags & _KERNEL:  # the zero page, or one of the huge one: it stays what it was
        frames.flags_at[pfn] |= _HWPOISON
        core.count("memory_failure")
        refuse(Errno.EHWPOISON if flags & COMPOUND else Errno.EBUSY, call, "the zero page")
    if flags & _KSM and not core.caps.memory_failure_of_merged:
        raise NotModelled("poisoning merged pages on kernels that leave them mapped")
    return pages.poison(core, pfn, mm), size


def _get(core: Core, mm: AddressSpace, call: Call, addr: int) -> int:
    """The frame of the page at the address, faulted in for reading if need be, and marked as accessed."""
    vma = mm.vmas.at(addr)
    if vma is None or not vma.flags & VmFlag.ACCESS:
        refuse(Errno.EFAULT, call, f"no page can be had at {addr:#x}")
    if vma.flags & VmFlag.HUGETLB:
        return _get_huge(core, mm, call, vma, addr)
    pfn = _present(core, mm, addr)
    if pfn >= 0:
        _may(core, pfn)
        folio = pages.folio_of(core, pfn)
        if folio is not None:
            core.memory.frames.set_bits(folio.head, folio.pages, _REFERENCED)
        elif core.memory.frames.flags_at[pfn] & COMPOUND:  # the huge zero page
            head = core.memory.frames.head(pfn)
            core.memory.frames.set_bits(head, core.geometry.pmd_pages, _REFERENCED)
        else:
            core.memory.frames.flags_at[pfn] |= _REFERENCED
        return pfn
    pfn = _fault_in(core, mm, call, vma, addr)
    _may(core, pfn)
    slot = mm.tables.pmd_slot(addr)
    if slot >= 0 and core.pool.at[slot] & LEAF:
        return pfn
    if core.memory.frames.flags_at[pfn] & _LRU:
        accessed.mark_one(core, pfn)
    else:  # the zero page is on no list that it could be active on
        core.memory.frames.flags_at[pfn] ^= _REFERENCED
    return pfn


def _get_huge(core: Core, mm: AddressSpace, call: Call, vma: VmArea, addr: int) -> int:
    """The same in a mapping of hugetlb."""
    start = addr & -hugetlb.page_size(vma)
    [(_, slot)] = hugetlb.entries(mm, vma, start, start + 1)
    entry = core.pool.at[slot] if slot >= 0 else 0
    if not entry & PRESENT:
        return _fault_in(core, mm, call, vma, addr)
    head = entry & FIELD
    core.memory.frames.set_bits(head, core.hugetlb.folios[head].pages, _REFERENCED)
    return head + (addr - start >> core.geometry.page_shift)


def _fault_in(core: Core, mm: AddressSpace, call: Call, vma: VmArea, addr: int) -> int:
    """The frame that a read of the address reaches. Refused with EFAULT where it would be sent a signal."""
    if not vma.flags & VmFlag.READ:
        refuse(Errno.EFAULT, call, f"no page can be had at {addr:#x}")
    try:
        return fault.access(core, mm, addr, write=False, vma=vma)
    except AddressSpaceFault as error:
        if error.signal == "SIGSTOP":
            raise  # who is to answer does not
        refuse(Errno.EFAULT, call, f"no page can be had at {addr:#x}")
    except NoMemory:
        refuse(Errno.ENOMEM, call)


def _may(core: Core, pfn: int) -> None:
    """Raise NotModelled for huge pages of files in memory, and for pages that this kernel would take from such."""
    frames = core.memory.frames
    if not frames.flags_at[pfn] & CACHED:
        return
    if core.inodes[frames.owner_at[pfn]].on_disk:
        return
    if frames.flags_at[pfn] & COMPOUND:
        raise NotModelled("poisoning huge pages of shared memory")
    if not core.caps.memory_failure_keeps_shmem:
        raise NotModelled("poisoning shared memory on kernels that drop the page from its file")


def _present(core: Core, mm: AddressSpace, addr: int) -> int:
    """The frame that is mapped at the address, without asking for a fault; -1 for none, or the zero page."""
    slot = mm.tables.pmd_slot(addr)
    pmd = core.pool.at[slot] if slot >= 0 else 0
    if pmd & LEAF:
        within = addr >> core.geometry.page_shift & core.geometry.pmd_pages - 1
        return (pmd & FIELD) + within
    slot = mm.tables.leaf_slot(addr, 0)
    entry = core.pool.at[slot] if slot >= 0 else 0
    return entry & FIELD if entry & (PRESENT | SPECIAL) == PRESENT else -1


def hwpoison(core: Core, pfns: U64Array) -> None:
    """Write frame numbers to hwpoison/corrupt-pfn: nobody is sent a signal (rule HW-006). Refused with EBUSY."""
    for pfn in pfns.tolist():
        call = f"hwpoison({pfn:#x})"
        zone = next((zone for zone in core.memory.zones if zone.start <= pfn < zone.end), None)
        if zone is None:
            refuse(Errno.ENXIO, call, "no such memory")
        flags = core.memory.frames.flags_at[pfn] if pfn < zone.frontier else _BUDDY
        if flags & _HWPOISON:
            refuse(Errno.EBUSY, call, "it is poisoned already")
        if flags & _BUDDY:
            zone.take_off(pfn)
            core.memory.frames.flags_at[pfn] = _HWPOISON
            core.count("memory_failure")
            continue
        if flags & _KERNEL:
            raise NotModelled("poisoning what the kernel itself uses")
        if flags & int(PageFlag.HUGE) or not flags & _LRU:
            raise NotModelled("poisoning pages of hugetlb pools by their numbers")
        if flags & _KSM and not core.caps.memory_failure_of_merged:
            raise NotModelled("poisoning merged pages on kernels that leave them mapped")
        _may(core, pfn)
        pages.poison(core, pfn, None)


def unpoison(core: Core, pfns: U64Array) -> None:
    """Write frame numbers to hwpoison/unpoison-pfn: they are free (rule HW-012). Refused with EBUSY where they are not
    poisoned, in use as the zero page is, or kept by a cache.

    Raises NotModelled while there are hwpoison entries of it: they would stay.
    """
    frames = core.memory.frames
    for pfn in pfns.tolist():
        call = f"unpoison({pfn:#x})"
        if not 0 <= pfn < frames.rows or not frames.flags_at[pfn] & _HWPOISON:
            refuse(Errno.EBUSY, call, "it is not poisoned")
        flags = frames.flags_at[pfn]
        if flags & COMPOUND and flags & _KERNEL:
            refuse(Errno.EOPNOTSUPP, call, "the huge zero page")
        if flags & (_KERNEL | CACHED | _SWAPCACHE) or (flags & _HUGE and core.hugetlb.of_a_file(pfn)):
            refuse(Errno.EBUSY, call, "somebody has it")
        if flags & _HUGE:
            raise NotModelled("unpoisoning a huge page that its file has lost")
        word = np.uint64(SWAP | core.caps.hwpoison_type | pfn << 5)
        mask = np.uint64(PRESENT | SWAP | FIELD)
        for mm in core.spaces.values():
            for extent in mm.tables.extents(0, core.geometry.task_size):
                if ((extent.entries & mask) == word).any():
                    raise NotModelled("unpoisoning a page that entries still call poisoned")
        core.memory.free(pfn)
        core.count("unpoison")
