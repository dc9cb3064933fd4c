"""The page tables as the core's PAGEMAP_SCAN engine asks for them: leaves, write protection, splits."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.services import thp, userfaultfd
from pmcore.backends.sim.views import hugetlb as huge_view
from pmcore.backends.sim.virtual import hugetlb
from pmcore.backends.sim.virtual.filemap import cached_only
from pmcore.backends.sim.virtual.pte import PRESENT, SPECIAL, SWAP, UFFD_MARKER, UFFD_WP, WRITE
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.scan.tables import CodedLeaves, LeafBatch, LeafKind, ScanVma
from pmcore.uapi import PM_GUARD_REGION, PM_SOFT_DIRTY, PageCategory, UffdFeature

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["SimTables"]

_ALL = (1 << 64) - 1
_PRESENT, _SWAP = np.uint64(PRESENT), np.uint64(SWAP)
_UFFD_WP, _STATE = np.uint64(UFFD_WP), np.uint64(PRESENT | SWAP)
_WP_UNPOPULATED = int(UffdFeature.WP_UNPOPULATED)
_HOLE, _PMD = int(LeafKind.HOLE), int(LeafKind.PMD)
_SMALL = int(LeafKind.PTE), int(LeafKind.EMPTY)
#: From here on bits say what an entry is.
_CODE_SHIFT = 55
#: Bit of a code for pages of a file's cache.
_FILE = 9
#: Mappings of files.
_PRIVATE, _SHARED = 1, 2
#: Entries in a batch: as many as stay in a processor's cache.
_PIECE = 1 << 15


@functools.cache
def _palette(soft_dirty: bool, guard: bool, file: int = 0) -> LeafBatch:
    """What an entry is by its upper bits, which say all but which frame or slot it names, and that of a file.

    `file`: 0 for anonymous memory; _PRIVATE: one more bit says whether it is a file's; _SHARED: what is present is.
    """
    numbers = np.arange(1024 if file == _PRIVATE else 512, dtype=np.uint64)
    codes = (numbers & np.uint64(511)) << np.uint64(_CODE_SHIFT)
    present = (codes & _PRESENT) != 0
    swap = ((codes & _SWAP) != 0) & ~present
    written = (present | swap) & ((codes & _UFFD_WP) == 0)
    words: U64Array = present.astype(np.uint64) * np.uint64(PageCategory.PRESENT)
    words |= swap.astype(np.uint64) * np.uint64(PageCategory.SWAPPED)
    words |= written.astype(np.uint64) * np.uint64(PageCategory.WRITTEN)
    words[present & ((codes & np.uint64(SPECIAL)) != 0)] |= np.uint64(PageCategory.PFNZERO)
    words[present if file == _SHARED else numbers >> np.uint64(_FILE) != 0] |= np.uint64(PageCategory.FILE)
    if soft_dirty:
        words[(codes & np.uint64(PM_SOFT_DIRTY)) != 0] |= np.uint64(PageCategory.SOFT_DIRTY)
    if guard:
        words[(codes & np.uint64(PM_GUARD_REGION)) != 0] |= np.uint64(PageCategory.GUARD)
    kind = np.where(codes == 0, np.uint8(LeafKind.EMPTY), np.uint8(LeafKind.PTE))
    nowhere = np.zeros(len(numbers), dtype=np.uint64)
    return LeafBatch(start=nowhere, end=nowhere, kind=kind, categories=words)


class SimTables:
    """One address space, scanned."""

    def __init__(self, core: Core, mm: AddressSpace) -> None:
        self._core = core
        self._mm = mm

    def scan_vmas(self, start: int, end: int) -> Iterable[ScanVma]:
        """The VMAs of the range."""
        for vma in self._mm.vmas.within(start, end):
            features = getattr(vma.uffd, "features", 0)
            armed = bool(vma.flags & VmFlag.UFFD_WP)
            yield ScanVma(
                start=vma.start,
                end=vma.end,
                uffd_wp=armed,
                wp_async=armed
                and userfaultfd.resolves_itself(vma)
                and (vma.huge is not None or bool(features & _WP_UNPOPULATED)),
                hugetlb=vma.huge.file.pool.size if vma.huge else 0,
                pfnmap=bool(vma.flags & VmFlag.PFNMAP),
                soft_dirty=bool(vma.flags & VmFlag.SOFTDIRTY) and self._core.caps.soft_dirty,
            )

    def leaves(self, vma: ScanVma, start: int, end: int) -> Iterator[LeafBatch | CodedLeaves]:
        """What the walk stops at, in order."""
        if vma.hugetlb:
            yield huge_view.leaves(self._core, self._mm, self._area(start), start, end)
            return
        position = start
        area = self._mm.vmas.at(start)
        file = 0 if area is None or area.file is None else _SHARED if area.flags & VmFlag.SHARED else _PRIVATE
        core, shift = self._core, self._core.geometry.page_shift
        few = self._mm.tables.few(start, end)
        if few:
            yield self._ptes(start, core.pool.flat[few.start : few.stop], file=file)
            return
        for extent in list(self._mm.tables.extents(start, end)):
            low, high = max(extent.start, start), min(extent.end, end)
            if low > position:
                yield self._hole(position, low)
            if extent.huge:
                yield self._huge(extent.start, extent.entries, start, end, file=file != 0)
            else:
                for first in range(low, high, _PIECE << shift):
                    slot = self._mm.tables.pte_slot(first)
                    count = min(_PIECE, high - first >> shift)
                    yield self._ptes(first, core.pool.flat[slot : slot + count], file=file)
            position = high
        if position < end:
            yield self._hole(position, end)

    def _hole(self, start: int, end: int) -> LeafBatch:
        """No page tables: one stop, however long. (The kernel's walk stops at each missing table; the regions join.)"""
        return LeafBatch(
            start=np.array([start], dtype=np.uint64),
            end=np.array([end], dtype=np.uint64),
            kind=np.array([LeafKind.HOLE], dtype=np.uint8),
            categories=np.zeros(1, dtype=np.uint64),
        )

    def _ptes(self, start: int, entries: U64Array, *, file: int) -> CodedLeaves:
        if file == _SHARED and ((entries & _STATE) == _SWAP).any():
            file = _PRIVATE  # a page on its way is a file's as well, a marker is nobody's
        palette = _palette(self._core.caps.soft_dirty, self._core.caps.scan_guard, file)
        size, shift = self._core.geometry.page_size, _CODE_SHIFT
        if file == _PRIVATE:
            cached = cached_only(self._core, entries).astype(np.uint64) << np.uint64(_FILE)
            entries, shift = entries >> np.uint64(shift) | cached, 0
        return CodedLeaves(start, size, entries, shift, palette)

    def _huge(self, base: int, entries: U64Array, start: int, end: int, *, file: bool) -> LeafBatch:
        size = self._core.geometry.pmd_size
        first = np.arange(base, base + len(entries) * size, size, dtype=np.uint64)
        caps = self._core.caps
        codes = (entries >> np.uint64(_CODE_SHIFT)).view(np.int64)
        words = _palette(caps.soft_dirty, caps.scan_guard).categories[codes]
        words = words | np.uint64(PageCategory.HUGE | (PageCategory.FILE if file else 0))
        return LeafBatch(
            start=np.maximum(first, np.uint64(start)),
            end=np.minimum(first + np.uint64(size), np.uint64(end)),
            kind=np.full(len(entries), LeafKind.PMD, dtype=np.uint8),
            categories=words,
        )

    def _area(self, addr: int) -> VmArea:
        area = self._mm.vmas.at(addr)
        assert area is not None
        return area

    # -- write protection ------------------------------------------------------------------------------

    def write_protect(self, vma: ScanVma, leaves: LeafBatch) -> None:
        """Arm the leaves."""
        tables, pool = self._mm.tables, self._core.pool
        if vma.hugetlb:
            area = self._area(vma.start)
            for start, end in zip(leaves.start.tolist(), leaves.end.tolist(), strict=True):
                hugetlb.uffd_wp(self._core, self._mm, area, start, end, protect=True)
            return
        if len(leaves.kind) == 1 and leaves.kind.item() in _SMALL:
            slot = tables.pte_slot(leaves.start.item())
            pte = pool.at[slot]
            pool.at[slot] = (
                ((pte | UFFD_WP) & ~WRITE if pte & PRESENT else pte | UFFD_WP) if pte else UFFD_MARKER
            )
            return
        for kind in (_HOLE, _PMD):
            for index in np.flatnonzero(leaves.kind == kind).tolist():
                start, end = int(leaves.start[index]), int(leaves.end[index])
                if kind == _HOLE:
                    tables.make(start, end)
                    for extent in tables.extents(start, end):
                        extent.entries[extent.entries == 0] = UFFD_MARKER
                else:
                    slot = tables.pmd_slot(start)
                    pool.at[slot] = (pool.at[slot] | UFFD_WP) & ~WRITE
        small = (leaves.kind == _SMALL[0]) | (leaves.kind == _SMALL[1])
        if not small.any():
            return
        addresses = leaves.start[small]
        low, high = int(addresses[0]), int(leaves.end[small][-1])
        for extent in tables.extents(low, high):
            if extent.huge:
                continue
            inside = addresses[(addresses >= extent.start) & (addresses < extent.end)]
            index = ((inside - np.uint64(extent.start)) >> np.uint64(tables.page_shift)).astype(np.intp)
            old = extent.entries[index]
            new = np.where((old & _PRESENT) != 0, (old | _UFFD_WP) & np.uint64(~WRITE & _ALL), old | _UFFD_WP)
            extent.entries[index] = np.where(old == 0, np.uint64(UFFD_MARKER), new)

    def split_pmd(self, vma: ScanVma, start: int) -> None:
        """Map a huge page by PTEs."""
        area = self._area(start)
        thp.split_pmd(self._core, self._mm, area, start & -self._core.geometry.pmd_size)
