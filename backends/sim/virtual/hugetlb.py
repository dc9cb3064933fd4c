"""Entries of hugetlb mappings, one a huge page, in the table of its level: faults, and what calls do to ranges.

The kernel asks is_vm_hugetlb_page at its doors (fault, zap, fork, protect, move, split); so do those who call here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.services import userfaultfd
from pmcore.backends.sim.services.hugetlb import HugeFile, HugeMap, file_range
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    LEAF,
    POISON_MARKER,
    PRESENT,
    UFFD_MARKER,
    UFFD_WP,
    WRITE,
    YOUNG,
    is_hwpoison,
    poisoned,
)
from pmcore.backends.sim.virtual.vma import AnonVma, VmFlag
from pmcore.errors import AddressSpaceFault, NotModelled, syscall_error
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = [
    "HUGE_MARKER",
    "HUGE_POISON",
    "access",
    "copy_entries",
    "cut",
    "entries",
    "fault_in",
    "index_of",
    "move_entries",
    "moved",
    "prepare",
    "protect",
    "release",
    "touch",
    "uffd_wp",
    "unmap",
    "unmap_file",
    "zap",
]

#: A marker where a huge page's entry would be: told from a table by its leaf bit.
HUGE_MARKER = UFFD_MARKER | LEAF
HUGE_POISON = POISON_MARKER | LEAF
_ANON = int(PageFlag.ANON)

#: Heads of pages that lost their last mapping.
Gone = list[int]


def _file(vma: VmArea) -> HugeFile:
    assert vma.huge is not None
    return vma.huge.file


def page_size(vma: VmArea) -> int:
    """Bytes of the VMA's pages (vma_kernel_pagesize)."""
    return _file(vma).pool.size


def index_of(vma: VmArea, addr: int) -> int:
    """Which page of its file the address maps."""
    return file_range(vma)[0] + (addr - vma.start) // page_size(vma)


def entries(mm: AddressSpace, vma: VmArea, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Each huge page of the VMA that the range touches: its address, and where its entry is (-1: no table)."""
    pool = _file(vma).pool
    for addr in range(start & -pool.size, end, pool.size):
        yield addr, mm.tables.leaf_slot(addr, pool.level)


def cut(mm: AddressSpace, vma: VmArea, addr: int) -> None:
    """A boundary is about to be at the address: refused inside a huge page."""
    if addr & page_size(vma) - 1:
        raise syscall_error(int(Errno.EINVAL), f"split at {addr:#x}", reason="inside a hugetlb page")
    _file(vma).add_user(mm, 1)


# -- faults --------------------------------------------------------------------------------------------


def access(core: Core, mm: AddressSpace, vma: VmArea, addr: int, *, write: bool) -> int:
    """One access that the VMA allows; the PFN of the small page that it reached. Raises AddressSpaceFault."""
    pool = _file(vma).pool
    start = addr & -pool.size
    while True:
        slot = mm.tables.leaf_slot(start, pool.level, make=True)
        entry = core.pool.at[slot]
        if entry & PRESENT and (not write or entry & WRITE):
            core.pool.at[slot] = entry | (YOUNG | DIRTY if write else YOUNG)
            return (entry & FIELD) + (addr - start >> core.geometry.page_shift)
        if core.on_fault is not None:
            core.on_fault(mm, addr, write)
        if not entry & PRESENT:
            if entry and poisoned(entry):
                raise userfaultfd.poisoned_access(core, addr, pool.order + core.geometry.page_shift)
            if is_hwpoison(entry):
                raise _lost(core, vma, addr)
            _no_page(core, mm, vma, addr, start, slot, entry)
        else:
            _write_protected(core, mm, vma, addr, start, slot, entry)


def _no_page(core: Core, mm: AddressSpace, vma: VmArea, addr: int, start: int, slot: int, entry: int) -> None:
    """Nothing is there yet (hugetlb_no_page). There is no zero page: also a read takes one of the pool."""
    file, index = _file(vma), index_of(vma, start)
    if vma.flags & VmFlag.HUGE_TAKEN:
        raise _bus_error(addr, "its page was taken for the mapping's first owner, the pool being exhausted")
    head = file.pages.get(index, -1)
    if head >= 0 and core.memory.frames.flags_at[head] & int(PageFlag.HWPOISON):
        raise _lost(core, vma, addr)
    anonymous = head < 0 and not vma.shared
    if head < 0:
        if index >= file.length // file.pool.size:
            raise _bus_error(addr, "behind the end of the file")
        if vma.flags & VmFlag.UFFD_MISSING:
            raise userfaultfd.blocked(vma, addr)
        if anonymous:
            prepare(core, vma)
        head = core.hugetlb.take(vma, index)
        if head < 0:
            raise _bus_error(addr, "the pool of huge pages is exhausted")
        core.count("hugetlb_fault")
        if anonymous:
            core.hugetlb.anonymous(head)
        else:
            core.hugetlb.add_to_file(file, index, head)
    elif vma.flags & VmFlag.UFFD_MINOR:
        raise userfaultfd.blocked(vma, addr)
    core.hugetlb.map(head)
    new = head | PRESENT | LEAF | YOUNG
    if vma.flags & VmFlag.WRITE and vma.flags & VmFlag.SHARED:
        new |= WRITE | DIRTY | core.soft_dirty
    if entry & UFFD_WP:
        new = (new | UFFD_WP) & ~WRITE
    core.pool.at[slot] = new


def _write_protected(
    core: Core, mm: AddressSpace, vma: VmArea, addr: int, start: int, slot: int, entry: int
) -> None:
    """A write to a page that may not be written (hugetlb_wp)."""
    if entry & UFFD_WP and vma.flags & VmFlag.UFFD_WP:
        if not userfaultfd.resolves_itself(vma):
            raise userfaultfd.blocked(vma, addr)
        entry &= ~UFFD_WP
        core.pool.at[slot] = entry
        core.count("wp_async")
    head, frames = entry & FIELD, core.memory.frames
    writable = WRITE | DIRTY | YOUNG | core.soft_dirty
    anonymous = bool(frames.flags_at[head] & _ANON)
    if vma.shared or (anonymous and frames.mapcount_at[head] == 1):
        if anonymous:
            frames.flags_at[head] |= ANON_EXCLUSIVE
        core.pool.at[slot] = entry | writable
        return
    assert vma.huge is not None
    owner = vma.huge.promise is not None and anonymous
    copy = core.hugetlb.take(vma, index_of(vma, start), promised=not owner)
    if copy < 0:
        if not owner:
            raise _bus_error(addr, "the pool of huge pages is exhausted")
        _take_from_others(core, vma, start, head)
        return
    prepare(core, vma)
    core.hugetlb.copy(copy, head)
    core.hugetlb.anonymous(copy)
    core.hugetlb.map(head, -1)
    core.hugetlb.map(copy)
    core.pool.at[slot] = copy | PRESENT | LEAF | writable
    core.count("hugetlb_copy")


def _take_from_others(core: Core, vma: VmArea, start: int, head: int) -> None:
    """The first owner needs the page for itself: all others lose it (unmap_ref_private)."""
    pool, index = _file(vma).pool, index_of(vma, start)
    for mm in sorted(_file(vma).users, key=lambda mm: mm.number):
        for other in list(mm.vmas):
            if other is vma or other.huge is None or other.huge.file is not vma.huge.file:  # type: ignore[union-attr]
                continue
            first, last = file_range(other)
            if other.shared or other.huge.promise is not None or not first <= index < last:
                continue
            # The kernel looks at the owner's address, wherever the other has the page.
            slot = mm.tables.leaf_slot(start, pool.level)
            if slot < 0 or core.pool.at[slot] & (PRESENT | FIELD) != PRESENT | head:
                continue
            other.flags |= VmFlag.HUGE_TAKEN
            gone: Gone = []
            _zap_one(core, other, start, slot, gone, drop_markers=False)
            core.count("hugetlb_taken")
    if core.memory.frames.mapcount_at[head] != 1:
        raise NotModelled(
            "copying a hugetlb page with the pool exhausted that another task has moved elsewhere"
        )


def prepare(core: Core, vma: VmArea) -> None:
    """Have an anon_vma."""
    if vma.anon_vma is None:
        vma.anon_vma, vma.chain = AnonVma(core.number("anon_vma")), 1


def _lost(core: Core, vma: VmArea, addr: int) -> AddressSpaceFault:
    lsb = _file(vma).pool.order + core.geometry.page_shift
    return AddressSpaceFault("SIGBUS", addr, "the page is poisoned", lsb=lsb)


def _bus_error(addr: int, cause: str) -> AddressSpaceFault:
    return AddressSpaceFault("SIGBUS", addr, cause)


def touch(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, *, write: bool) -> None:
    """Accesses at `start`, and further ones up to `end`: of each huge page the first is as good as all."""
    size = page_size(vma)
    while start < end:
        access(core, mm, vma, start, write=write)
        # The next access in the next huge page keeps its place in the small page.
        small = core.geometry.page_size
        start = (start & -size) + size + (start & small - 1)


def fault_in(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, *, write: bool) -> None:
    """Fault in without an access (populate)."""
    size = page_size(vma)
    for addr in range(start & -size, end, size):
        access(core, mm, vma, max(addr, start), write=write)


# -- ranges --------------------------------------------------------------------------------------------


def zap(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, gone: Gone, *, drop_markers: bool
) -> None:
    """Empty the entries of whole huge pages. Pages that nobody has any more are noted in `gone`, for `release`.

    Without `drop_markers` markers of write protection stay, or are left where protected pages were.
    """
    for addr, slot in entries(mm, vma, start, end):
        if slot >= 0 and core.pool.at[slot]:
            _zap_one(core, vma, addr, slot, gone, drop_markers=drop_markers)


def _zap_one(core: Core, vma: VmArea, addr: int, slot: int, gone: Gone, *, drop_markers: bool) -> None:
    entry = core.pool.at[slot]
    core.pool.at[slot] = HUGE_MARKER if entry & UFFD_WP and not drop_markers else 0
    if not entry & PRESENT:
        return
    assert vma.huge is not None
    head, frames = entry & FIELD, core.memory.frames
    pool = vma.huge.file.pool
    if entry & DIRTY:
        frames.set_bits(head, pool.pages, int(PageFlag.DIRTY))
    anonymous, promise = frames.flags_at[head] & _ANON, vma.huge.promise
    mapped = core.hugetlb.map(head, -1)
    again = core.caps.hugetlb_promises_again and (not mapped or core.caps.hugetlb_promises_while_shared)
    if anonymous and promise is not None and again and not pool.surplus:
        # At once for the mapping, while the count waits for the page, which others may have yet (DV-028).
        promise.consumed.discard(index_of(vma, addr))
        core.hugetlb.restored.add(head)
    if not mapped and anonymous:
        gone.append(head)


def unmap(core: Core, mm: AddressSpace, vmas: list[VmArea]) -> None:
    """Take hugetlb VMAs away: all entries are emptied before pages and promises are given back."""
    gone: Gone = []
    for vma in vmas:
        zap(core, mm, vma, vma.start, vma.end, gone, drop_markers=True)
        mm.vmas.remove(vma)
    release(core, gone)
    for vma in vmas:
        core.hugetlb.close(mm, vma)


def release(core: Core, gone: Gone) -> None:
    """Give back what `zap` has noted."""
    for head in gone:
        core.hugetlb.give(head)
    gone.clear()


def unmap_file(core: Core, file: HugeFile, first: int, last: int, *, drop_markers: bool = False) -> None:
    """Unmap pages of the file from index `first` up to `last` wherever they are mapped (hugetlb_vmdelete_list)."""
    gone: Gone = []
    size = file.pool.size
    for mm in sorted(file.users, key=lambda mm: mm.number):
        for vma in list(mm.vmas):
            if vma.huge is None or vma.huge.file is not file:
                continue
            low, high = file_range(vma)
            start = vma.start + (max(first, low) - low) * size
            end = vma.start + (min(last, high) - low) * size
            if start < end:
                zap(core, mm, vma, start, end, gone, drop_markers=drop_markers)
    release(core, gone)


def copy_entries(core: Core, parent: AddressSpace, child: AddressSpace, vma: VmArea, copy: VmArea) -> None:
    """fork: the child maps the same pages; private ones may be written by neither without a copy."""
    level, frames = _file(vma).pool.level, core.memory.frames
    for addr, slot in entries(parent, vma, vma.start, vma.end):
        if slot < 0:
            continue
        mine = child.tables.leaf_slot(addr, level, make=True)
        entry = core.pool.at[slot]
        if not entry & PRESENT:
            if copy.flags & VmFlag.UFFD_WP or poisoned(entry) or is_hwpoison(entry):
                core.pool.at[mine] = entry
            continue
        head = entry & FIELD
        core.hugetlb.map(head)
        if frames.flags_at[head] & _ANON:
            frames.flags_at[head] &= ~ANON_EXCLUSIVE
        if not vma.shared:
            entry &= ~WRITE
            core.pool.at[slot] = entry
        keeps = copy.flags & VmFlag.UFFD_WP or core.caps.hugetlb_fork_keeps_wp
        core.pool.at[mine] = entry if keeps else entry & ~UFFD_WP


def duplicate(mm: AddressSpace, copy: VmArea) -> None:
    """fork: the child's VMA has the same file, and no promises."""
    copy.flags &= ~VmFlag.HUGE_TAKEN
    copy.huge = HugeMap(_file(copy))
    _file(copy).add_user(mm, 1)


def moved(mm: AddressSpace, old: VmArea) -> None:
    """mremap: another VMA has the file now, and the promises; the old one is about to go."""
    old.huge = HugeMap(_file(old))
    _file(old).add_user(mm, 1)


def _may_write(vma: VmArea) -> bool:
    """Whether entries of present pages can be writable without a fault (vm_page_prot)."""
    wanted = VmFlag.WRITE | VmFlag.SHARED
    return vma.flags & (wanted | VmFlag.UFFD_WP) == wanted


def protect(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> None:
    """Have the entries allow what the VMA allows now; private ones find out by a fault."""
    for _, slot in entries(mm, vma, start, end):
        if slot >= 0 and core.pool.at[slot] & PRESENT:
            core.pool.at[slot] = core.pool.at[slot] & ~WRITE | (WRITE if _may_write(vma) else 0)


def uffd_wp(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, *, protect: bool) -> None:
    """Set or take off userfaultfd's write protection; empty entries get markers, whatever the features."""
    level = _file(vma).pool.level
    for addr, place in list(entries(mm, vma, start, end)):
        slot = mm.tables.leaf_slot(addr, level, make=True) if protect else place
        if slot < 0:
            continue
        entry = core.pool.at[slot]
        if not entry & PRESENT:
            if not poisoned(entry) and not is_hwpoison(entry):
                core.pool.at[slot] = HUGE_MARKER if protect else 0
        elif protect:
            core.pool.at[slot] = (entry | UFFD_WP) & ~WRITE
        else:
            core.pool.at[slot] = entry & ~(UFFD_WP | WRITE) | (WRITE if _may_write(vma) else 0)


def move_entries(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, new_start: int, length: int, *, drop_uffd: bool
) -> None:
    """Move whole huge pages to where nothing is mapped. Raises NoMemory before anything has moved."""
    level = _file(vma).pool.level
    plan = []
    for addr, slot in entries(mm, vma, start, start + length):
        if slot >= 0 and core.pool.at[slot]:
            mm.tables.leaf_slot(new_start + addr - start, level, make=True)
            plan.append(addr)
    for addr in plan:
        slot = mm.tables.leaf_slot(addr, level)
        entry = core.pool.at[slot]
        core.pool.at[slot] = 0
        if drop_uffd:
            kept = entry & PRESENT or poisoned(entry) or is_hwpoison(entry)
            entry = entry & ~UFFD_WP if kept else 0
        core.pool.at[mm.tables.leaf_slot(new_start + addr - start, level)] = entry


def in_core(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, out: BoolArray) -> None:
    """mincore: what is mapped. Where there is no table at all, what the file has (HT-014)."""
    size, shift, file = page_size(vma), core.geometry.page_shift, _file(vma)
    for addr, slot in entries(mm, vma, start, end):
        low, high = max(addr, start), min(addr + size, end)
        part = out[low - start >> shift : high - start >> shift]
        if slot >= 0:
            part[:] = bool(core.pool.at[slot] & PRESENT) or is_hwpoison(core.pool.at[slot])
        elif core.caps.hugetlb_small_indices:
            part[:] = index_of(vma, addr) in file.pages
        else:  # counted on by small pages from the index of the huge one
            part[:] = [index_of(vma, addr) + number in file.pages for number in range(len(part))]


def flagged(mm: AddressSpace, start: int, end: int) -> list[VmArea]:
    """The hugetlb VMAs that overlap the range."""
    return [vma for vma in mm.vmas.within(start, end) if vma.flags & VmFlag.HUGETLB]
