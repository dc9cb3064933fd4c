"""/proc/PID/maps and smaps: VMAs, and what is counted of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.services import thp
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT, YOUNG
from pmcore.backends.sim.virtual.vma import VM_FLAG_CODES, VmArea, VmFlag
from pmcore.backends.sim.virtual.zap import swap_entries
from pmcore.smaps import SmapsEntry
from pmcore.uapi import PageFlag
from pmcore.vma import Vma

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["maps", "smaps"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_PSS_SHIFT = 12


def _vma(vma: VmArea) -> Vma:
    return Vma(
        start=vma.start,
        end=vma.end,
        readable=bool(vma.flags & VmFlag.READ),
        writable=bool(vma.flags & VmFlag.WRITE),
        executable=bool(vma.flags & VmFlag.EXEC),
        shared=bool(vma.flags & VmFlag.MAYSHARE),
        name=vma.name,
    )


def maps(mm: AddressSpace) -> tuple[Vma, ...]:
    """All VMAs."""
    return tuple(_vma(vma) for vma in mm.vmas)


def smaps(core: Core, mm: AddressSpace, start: int, end: int) -> tuple[SmapsEntry, ...]:
    """The VMAs that overlap the range, with their counters."""
    return tuple(_entry(core, mm, vma) for vma in mm.vmas.within(start, end))


class _Counters:
    def __init__(self) -> None:
        self.ksm = self.rss = self.anonymous = self.lazyfree = self.huge = self.referenced = 0
        self.swap = self.swap_pss = self.pss = self.pss_dirty = 0
        self.kinds = [0, 0, 0, 0]  # shared clean, shared dirty, private clean, private dirty


def _entry(core: Core, mm: AddressSpace, vma: VmArea) -> SmapsEntry:
    size = core.geometry.page_size
    sums = _Counters()
    for extent in mm.tables.extents(vma.start, vma.end):
        entries = extent.entries
        if extent.huge:
            entries = entries[(entries & _FIELD) != np.uint64(core.huge_zero_pfn)]
            sums.huge += len(entries) * extent.size
            entries = np.repeat(entries, core.geometry.pmd_pages) + np.tile(
                np.arange(core.geometry.pmd_pages, dtype=np.uint64), len(entries)
            )
        else:
            _swap(core, sums, entries, size)
        _present(core, sums, entries, size)
    locked = sums.pss if vma.flags & VmFlag.LOCKED else 0
    scale = _PSS_SHIFT
    counters = {
        "Size": vma.length,
        "KernelPageSize": size,
        "MMUPageSize": size,
        "Rss": sums.rss,
        "Pss": _kb(sums.pss >> scale),
        "Pss_Dirty": _kb(sums.pss_dirty >> scale),
        "Shared_Clean": sums.kinds[0],
        "Shared_Dirty": sums.kinds[1],
        "Private_Clean": sums.kinds[2],
        "Private_Dirty": sums.kinds[3],
        "Referenced": sums.referenced,
        "Anonymous": sums.anonymous,
        "KSM": sums.ksm,
        "LazyFree": sums.lazyfree,
        "AnonHugePages": sums.huge,
        "ShmemPmdMapped": 0,
        "FilePmdMapped": 0,
        "Shared_Hugetlb": 0,
        "Private_Hugetlb": 0,
        "Swap": sums.swap,
        "SwapPss": _kb(sums.swap_pss >> scale),
        "Locked": _kb(locked >> scale),
    }
    eligible = core.caps.thp and _thp_eligible(core, vma)
    return SmapsEntry(
        vma=_vma(vma),
        counters=counters,
        plain={"THPeligible": int(eligible)},
        vm_flags=tuple(code for flag, code in VM_FLAG_CODES if vma.flags & flag and core.knows_vm_flag(code)),
    )


def _kb(value: int) -> int:
    """What is left of a number of bytes shown in kB."""
    return value >> 10 << 10


def _thp_eligible(core: Core, vma: VmArea) -> bool:
    size = core.geometry.pmd_size
    low = -(-vma.start // size) * size
    return low + size <= vma.end and thp.order_allowed(core, vma, low)


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


def _present(core: Core, sums: _Counters, entries: U64Array, size: int) -> None:
    entries = entries[((entries & _PRESENT) != 0) & ((entries & _FIELD) != np.uint64(core.zero_pfn))]
    if not len(entries):
        return
    frames = core.memory.frames
    pfns = (entries & _FIELD).view(np.int64)
    flags = frames.flags[pfns]
    counts = np.maximum(frames.mapcount[pfns], 1)
    dirty = ((entries & np.uint64(DIRTY)) != 0) | ((flags & np.uint64(PageFlag.DIRTY)) != 0)
    young = ((entries & np.uint64(YOUNG)) != 0) | ((flags & np.uint64(PageFlag.REFERENCED)) != 0)
    anon = (flags & np.uint64(PageFlag.ANON)) != 0
    pss = (size << _PSS_SHIFT) // counts
    sums.rss += len(pfns) * size
    sums.anonymous += int(anon.sum()) * size
    sums.ksm += int(((flags & np.uint64(PageFlag.KSM)) != 0).sum()) * size
    sums.lazyfree += int((anon & ((flags & np.uint64(PageFlag.SWAPBACKED)) == 0) & ~dirty).sum()) * size
    sums.referenced += int(young.sum()) * size
    sums.pss += int(pss.sum())
    sums.pss_dirty += int(pss[dirty].sum())
    private = counts == 1
    for index, chosen in enumerate((~private & ~dirty, ~private & dirty, private & ~dirty, private & dirty)):
        sums.kinds[index] += int(chosen.sum()) * size
