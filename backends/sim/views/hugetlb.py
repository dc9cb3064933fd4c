"""What is shown of hugetlb mappings: pagemap, smaps, the leaves of a scan, and the pools in meminfo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.sim.virtual.hugetlb import entries, page_size
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SOFT_DIRTY, UFFD_WP, is_hwpoison
from pmcore.scan.tables import LeafBatch, LeafKind
from pmcore.uapi import PM_FILE, PM_MMAP_EXCLUSIVE, PM_UFFD_WP, PageCategory, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["counters", "leaves", "meminfo", "pagemap"]

_ANON = int(PageFlag.ANON)


def pagemap(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, out: U64Array, bits: int
) -> None:
    """Entries of the pages from `start` to `end`, inside the VMA: those of `bits` that are shown.

    A page that is not there shows nothing but its marker's bit 57, without bit 62.
    """
    size, shift, frames = page_size(vma), core.geometry.page_shift, core.memory.frames
    for addr, slot in entries(mm, vma, start, end):
        low, high = max(addr, start), min(addr + size, end)
        part = out[low - start >> shift : high - start >> shift]
        entry = core.pool.at[slot] if slot >= 0 else 0
        word = entry & PM_UFFD_WP
        if entry & PRESENT:
            head = entry & FIELD
            word |= PRESENT | head
            if not frames.flags_at[head] & _ANON:
                word |= PM_FILE
            if frames.mapcount_at[head] == 1 and core.caps.mmap_exclusive:
                word |= PM_MMAP_EXCLUSIVE
        word &= bits
        part[:] = word
        if word & PRESENT and bits & FIELD:
            part += np.arange(low - addr >> shift, high - addr >> shift, dtype=np.uint64)


def counters(core: Core, mm: AddressSpace, vma: VmArea) -> dict[str, int]:
    """What smaps counts: nothing of it is resident set."""
    size = page_size(vma)
    found = {"KernelPageSize": size, "MMUPageSize": size, "Shared_Hugetlb": 0, "Private_Hugetlb": 0}
    for _, slot in entries(mm, vma, vma.start, vma.end):
        if slot >= 0 and is_hwpoison(core.pool.at[slot]):
            found["Shared_Hugetlb"] += size
        elif slot >= 0 and core.pool.at[slot] & PRESENT:
            once = core.memory.frames.mapcount_at[core.pool.at[slot] & FIELD] == 1
            found["Private_Hugetlb" if once else "Shared_Hugetlb"] += size
    return found


def leaves(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> LeafBatch:
    """One leaf a huge page, empty or not; a hole where its table is missing."""
    starts, ends, kinds, words = [], [], [], []
    size = page_size(vma)
    for addr, slot in entries(mm, vma, start, end):
        starts.append(max(addr, start))
        ends.append(min(addr + size, end))
        if slot < 0:
            kinds.append(LeafKind.HOLE)
            words.append(0)
            continue
        kinds.append(LeafKind.HUGETLB)
        words.append(_categories(core, core.pool.at[slot]))
    return LeafBatch(
        start=np.array(starts, dtype=np.uint64),
        end=np.array(ends, dtype=np.uint64),
        kind=np.array(kinds, dtype=np.uint8),
        categories=np.array(words, dtype=np.uint64),
    )


def _categories(core: Core, entry: int) -> int:
    found = PageCategory.HUGE
    if not entry:
        return int(found)
    found |= PageCategory.PRESENT if entry & PRESENT else PageCategory.SWAPPED
    if not entry & UFFD_WP:
        found |= PageCategory.WRITTEN
    if entry & PRESENT and not core.memory.frames.flags_at[entry & FIELD] & _ANON:
        found |= PageCategory.FILE
    if entry & SOFT_DIRTY and core.caps.soft_dirty:
        found |= PageCategory.SOFT_DIRTY
    return int(found)


def meminfo(core: Core) -> str:
    """The lines of /proc/meminfo about the default pool, and all pools together."""
    pool = core.hugetlb.default
    lines = [
        f"HugePages_Total:   {pool.total:5d}",
        f"HugePages_Free:    {len(pool.free):5d}",
        f"HugePages_Rsvd:    {pool.reserved & (1 << 64) - 1:5d}",
        f"HugePages_Surp:    {pool.surplus:5d}",
        f"Hugepagesize:   {pool.size >> 10:8d} kB",
        f"Hugetlb:        {sum(p.total * p.size for p in core.hugetlb.pools.values()) >> 10:8d} kB",
    ]
    return "".join(f"{line}\n" for line in lines)
