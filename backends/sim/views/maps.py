"""/proc/PID/maps and smaps: VMAs, and what is counted of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import MOVED_YOUNG
from pmcore.backends.sim.services import thp
from pmcore.backends.sim.views import hugetlb as huge_view
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT, YOUNG
from pmcore.backends.sim.virtual.vma import VM_FLAG_CODES, VmArea, VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries, swap_entries
from pmcore.smaps import SmapsEntry
from pmcore.uapi import MAX_SWAPFILES_SHIFT, PageFlag
from pmcore.vma import Vma

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["maps", "rollup", "smaps"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
#: What a page knows of accesses.
_ACCESSED = np.uint64(int(PageFlag.REFERENCED) | MOVED_YOUNG)
_PSS_SHIFT = 12
#: Device number of the mount that shmem files lie on.
_SHMEM_MINOR = 1
#: Device number of the disk.
_DISK_MAJOR = 7


def _vma(mm: AddressSpace, vma: VmArea, page_shift: int) -> Vma:
    # The heap is no property of a mapping: whatever lies there is called so (rule VM-030).
    heap = mm.brk_start and vma.start < mm.brk and vma.end > mm.brk_start and not vma.file and not vma.huge
    return Vma(
        start=vma.start,
        end=vma.end,
        readable=bool(vma.flags & VmFlag.READ),
        writable=bool(vma.flags & VmFlag.WRITE),
        executable=bool(vma.flags & VmFlag.EXEC),
        shared=vma.shared,
        offset=vma.pgoff << page_shift if vma.huge or vma.file else 0,
        inode=vma.huge.file.inode if vma.huge else vma.file.number if vma.file else 0,
        name=vma.name or ("[heap]" if heap else ""),
        dev_major=_DISK_MAJOR if vma.file is not None and vma.file.on_disk else 0,
        dev_minor=_SHMEM_MINOR if vma.file is not None and not vma.file.on_disk else 0,
    )


def maps(mm: AddressSpace) -> tuple[Vma, ...]:
    """All VMAs."""
    return tuple(_vma(mm, vma, mm.core.geometry.page_shift) for vma in mm.vmas)


def smaps(core: Core, mm: AddressSpace, start: int, end: int) -> tuple[SmapsEntry, ...]:
    """The VMAs that overlap the range, with their counters."""
    return tuple(_entry(core, mm, vma) for vma in mm.vmas.within(start, end))


def rollup(core: Core, mm: AddressSpace) -> SmapsEntry:
    """smaps_rollup: all VMAs together, Pss without each one's rounding."""
    sums, vmas = _Counters(), list(mm.vmas)
    for vma in vmas:
        _gather(core, mm, vma, sums)
    counters = _shown(core, sums, rollup=True)
    for vma in vmas:
        if vma.flags & VmFlag.HUGETLB:
            found = huge_view.counters(core, mm, vma)
            for name in ("Shared_Hugetlb", "Private_Hugetlb"):
                counters[name] += found[name]
    # Without a VMA the kernel shows 0 to 0, which is no range: the end is put right by whoever formats it.
    start, end = (vmas[0].start, vmas[-1].end) if vmas else (0, 1)
    return SmapsEntry(
        vma=Vma(start=start, end=end, readable=False, writable=False, name="[rollup]"), counters=counters
    )


class _Counters:
    def __init__(self) -> None:
        self.ksm = self.rss = self.anonymous = self.lazyfree = self.huge = self.referenced = 0
        self.shmem_huge = 0
        self.swap = self.swap_pss = self.pss = self.pss_dirty = self.pss_anon = self.pss_locked = 0
        self.kinds = [0, 0, 0, 0]  # shared clean, shared dirty, private clean, private dirty


def _entry(core: Core, mm: AddressSpace, vma: VmArea) -> SmapsEntry:
    size = core.geometry.page_size
    sums = _Counters()
    _gather(core, mm, vma, sums)
    counters = {"Size": vma.length, "KernelPageSize": size, "MMUPageSize": size, **_shown(core, sums)}
    if vma.flags & VmFlag.HUGETLB:
        counters |= huge_view.counters(core, mm, vma)
    return SmapsEntry(
        vma=_vma(mm, vma, core.geometry.page_shift),
        counters=counters,
        plain={"THPeligible": int(thp.eligible(core, vma)), **_protection_key(mm, vma)},
        vm_flags=tuple(
            code if core.knows_vm_flag(code) else "??" for flag, code in VM_FLAG_CODES if vma.flags & flag
        ),
    )


def _protection_key(mm: AddressSpace, vma: VmArea) -> dict[str, int]:
    """The key of the mapping, where the processor has keys: the first one goes to what may only be executed."""
    return {"ProtectionKey": int(mm.has_key(vma))} if mm.core.caps.protection_keys else {}


def _gather(core: Core, mm: AddressSpace, vma: VmArea, sums: _Counters) -> None:
    size, before = core.geometry.page_size, sums.pss
    huge = bool(vma.flags & VmFlag.HUGETLB)
    for extent in mm.tables.extents(vma.start, vma.end) if not huge else ():
        entries = extent.entries
        if extent.huge:
            entries = entries[(entries & _FIELD) != np.uint64(core.huge_zero_pfn)]
            if vma.file is None:
                sums.huge += len(entries) * extent.size
            else:
                sums.shmem_huge += len(entries) * extent.size
            # The offset of a migration entry is what counts the pages.
            step = np.where((entries & _PRESENT) != 0, np.uint64(1), np.uint64(1 << MAX_SWAPFILES_SHIFT))
            pages = np.arange(core.geometry.pmd_pages, dtype=np.uint64)
            entries = (entries[:, None] + step[:, None] * pages).reshape(-1)
        else:
            _swap(core, sums, entries, size)
        _present(core, sums, entries, size)
    if vma.file is not None:
        _shmem_swap(core, mm, vma, sums, size)
    if vma.flags & VmFlag.LOCKED:
        sums.pss_locked += sums.pss - before


def _shown(core: Core, sums: _Counters, *, rollup: bool = False) -> dict[str, int]:
    """The counters under their names, in the kernel's order."""
    scale = _PSS_SHIFT
    counters = {
        "Rss": sums.rss,
        "Pss": _kb(sums.pss >> scale),
        "Pss_Dirty": _kb(sums.pss_dirty >> scale),
        "Pss_Anon": _kb(sums.pss_anon >> scale),
        "Pss_File": 0,
        "Pss_Shmem": _kb(sums.pss - sums.pss_anon >> scale),
        "Shared_Clean": sums.kinds[0],
        "Shared_Dirty": sums.kinds[1],
        "Private_Clean": sums.kinds[2],
        "Private_Dirty": sums.kinds[3],
        "Referenced": sums.referenced,
        "Anonymous": sums.anonymous,
        "KSM": sums.ksm,
        "LazyFree": sums.lazyfree,
        "AnonHugePages": sums.huge,
        "ShmemPmdMapped": sums.shmem_huge,
        "FilePmdMapped": 0,
        "Shared_Hugetlb": 0,
        "Private_Hugetlb": 0,
        "Swap": sums.swap,
        "SwapPss": _kb(sums.swap_pss >> scale),
        "Locked": _kb(sums.pss_locked >> scale),
    }
    left_out = [] if core.caps.smaps_ksm else ["KSM"]
    if not rollup:
        left_out += ["Pss_Anon", "Pss_File", "Pss_Shmem"]
    return {name: value for name, value in counters.items() if name not in left_out}


def _kb(value: int) -> int:
    """What is left of a number of bytes shown in kB."""
    return value >> 10 << 10


def _swap(core: Core, sums: _Counters, entries: U64Array, size: int) -> None:
    swap = swap_entries(entries)
    if not swap.any():
        return
    fields = entries[swap] & _FIELD
    sums.swap += len(fields) * size
    for kind in np.unique(fields & np.uint64(0x1F)).tolist():
        area = core.swap.area(kind)
        slots = (fields[(fields & np.uint64(0x1F)) == kind] >> np.uint64(5)).astype(np.int64)
        counts = np.maximum(area.counts[slots], 1)
        sums.swap_pss += int(((size << _PSS_SHIFT) // counts).sum())


def _shmem_swap(core: Core, mm: AddressSpace, vma: VmArea, sums: _Counters, size: int) -> None:
    """Pages of a shmem file that lie in swap count for the mapping: where no entry of it says otherwise."""
    assert vma.file is not None
    pages = vma.length >> core.geometry.page_shift
    words = vma.file.index.load(vma.pgoff, pages)
    there = swap_entries(words)
    if not there.any():
        return
    if vma.flags & VmFlag.WRITE and not vma.flags & VmFlag.SHARED:
        for extent in mm.tables.extents(vma.start, vma.end):
            first = extent.start - vma.start >> core.geometry.page_shift
            if not extent.huge:
                there[first : first + len(extent.entries)] &= extent.entries == 0
    sums.swap += int(there.sum()) * size


def _present(core: Core, sums: _Counters, entries: U64Array, size: int) -> None:
    poisoned = entries[hwpoison_entries(entries)] if core.names_frames else entries[:0]
    entries = entries[((entries & _PRESENT) != 0) & ((entries & _FIELD) != np.uint64(core.zero_pfn))]
    if len(poisoned):  # counted like pages that are mapped once, but as shared (rule HW-007)
        entries = np.concatenate([entries, (poisoned & _FIELD) >> np.uint64(5)])
    if not len(entries):
        return
    frames = core.memory.frames
    pfns = (entries & _FIELD).view(np.int64)
    flags = frames.flags[pfns]
    counts = np.maximum(frames.mapcount[pfns], 1)
    dirty = ((entries & np.uint64(DIRTY)) != 0) | ((flags & np.uint64(PageFlag.DIRTY)) != 0)
    young = ((entries & np.uint64(YOUNG)) != 0) | ((flags & _ACCESSED) != 0)
    anon = (flags & np.uint64(PageFlag.ANON)) != 0
    pss = (size << _PSS_SHIFT) // counts
    sums.rss += len(pfns) * size
    sums.anonymous += int(anon.sum()) * size
    sums.ksm += int(((flags & np.uint64(PageFlag.KSM)) != 0).sum()) * size
    sums.lazyfree += int((anon & ((flags & np.uint64(PageFlag.SWAPBACKED)) == 0) & ~dirty).sum()) * size
    sums.referenced += int(young.sum()) * size
    sums.pss += int(pss.sum())
    sums.pss_dirty += int(pss[dirty].sum())
    sums.pss_anon += int(pss[anon].sum())
    private = (counts == 1) & ((entries & _PRESENT) != 0)
    for index, chosen in enumerate((~private & ~dirty, ~private & dirty, private & ~dirty, private & dirty)):
        sums.kinds[index] += int(chosen.sum()) * size
