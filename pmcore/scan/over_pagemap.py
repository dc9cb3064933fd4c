"""PAGEMAP_SCAN for kernels that have none: the engine over what pagemap, maps and kpageflags show.

What those files do not show cannot be answered, and the result says which categories that are (`unknown`): always
WPALLOWED (no file tells the mode of a userfaultfd), HUGE where PTE-mapped and PMD-mapped huge pages cannot be told
apart, PFNZERO where frame numbers are hidden, WRITTEN before bit 57. Write protection needs the real call.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import suppress

import attrs
import numpy as np

from pmcore.arrays import U64Array
from pmcore.errors import Missing, NotPermitted, syscall_error
from pmcore.geometry import align_down, align_up
from pmcore.pageflags import PageFlagsArray
from pmcore.pagemap import PagemapEntries
from pmcore.profile import KernelProfile
from pmcore.protocols import FrameFile, Process
from pmcore.scan.engine import scan_tables
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import ScanResult
from pmcore.scan.tables import LeafBatch, LeafKind, ScanVma
from pmcore.scan.validate import refusal
from pmcore.smaps import SmapsEntry
from pmcore.uapi import PageCategory, PageFlag, ScanFlag

__all__ = ["scan_pagemap"]

#: Pages looked at in one batch: bounded memory, whatever the range.
_BATCH_PAGES = 1 << 16


def scan_pagemap(process: Process, request: ScanRequest) -> ScanResult:
    """Answer `request` from pagemap, smaps and kpageflags; a refusal is a result with its errno.

    A request that write-protects is refused with ENOTTY, as a kernel without PAGEMAP_SCAN refuses every one.
    """
    profile = process.kernel.profile
    if not profile.has("scan"):
        # An older kernel is asked for what the first one with the call understood, and for soft-dirty.
        add = {"scan"} | ({"scan.soft_dirty"} if profile.has("pagemap.soft_dirty") else set())
        add |= {"scan.guard"} if profile.has("pagemap.guard") else set()
        profile = profile.changed(add=add)
    refused = refusal(request, profile)
    if refused:
        return ScanResult(errno=refused)
    if request.flags & (ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC):
        return ScanResult(errno=errno.ENOTTY)
    tables = _ProcessTables(process, profile)
    result = scan_tables(request, tables, profile)
    return attrs.evolve(result, unknown=tables.unknown)


class _ProcessTables:
    """A process's tables as its files show them (read-only)."""

    def __init__(self, process: Process, profile: KernelProfile) -> None:
        self._process = process
        self._profile = profile
        self._geometry = profile.geometry
        #: By start of the VMA: bytes that PMDs map, and where, once that was needed.
        self._huge: dict[int, int] = {}
        self._blocks: dict[int, U64Array] = {}
        self.unknown = PageCategory.WPALLOWED
        if not profile.has("pagemap.uffd_wp"):
            self.unknown |= PageCategory.WRITTEN

    def scan_vmas(self, start: int, end: int) -> Iterable[ScanVma]:
        for entry in self._process.smaps():
            vma = entry.vma
            if vma.end <= start or vma.start >= min(end, self._geometry.task_size):
                continue
            flags = entry.vm_flags or ()
            hugetlb = entry.counters.get("KernelPageSize", 0) if "ht" in flags else 0
            self._huge[vma.start] = _huge_bytes(entry)
            yield ScanVma(
                start=vma.start,
                end=vma.end,
                uffd_wp="uw" in flags,
                pfnmap="pf" in flags,
                soft_dirty="sd" in flags,
                hugetlb=hugetlb,
            )

    def leaves(self, vma: ScanVma, start: int, end: int) -> Iterator[LeafBatch]:
        step = max(vma.hugetlb, _BATCH_PAGES << self._geometry.page_shift)
        position = start
        while position < end:
            stop = min(end, (position // step + 1) * step)
            entries = self._process.pagemap(position, stop)
            if len(entries) == 0:
                return
            if vma.hugetlb:
                yield self._hugetlb_batch(vma, entries, position, stop)
            else:
                yield self._batch(vma, entries, position)
            position = stop

    def write_protect(self, vma: ScanVma, leaves: LeafBatch) -> None:
        raise syscall_error(errno.ENOTTY, "write protection over pagemap")

    def split_pmd(self, vma: ScanVma, start: int) -> None:
        raise syscall_error(errno.ENOTTY, "splitting a huge page over pagemap")

    # -- inside ----------------------------------------------------------------------------------------

    def _batch(self, vma: ScanVma, entries: PagemapEntries, position: int) -> LeafBatch:
        size = np.uint64(self._geometry.page_size)
        first = np.uint64(position) + np.arange(len(entries), dtype=np.uint64) * size
        flags = self._flags(entries)
        categories = self._categories(entries, flags)
        huge = np.isin(first & np.uint64(-self._geometry.pmd_size & (1 << 64) - 1), self._pmd_blocks(vma))
        categories[huge] |= np.uint64(PageCategory.HUGE)
        # An entry of 0 is an empty PTE or a hole: which of the two, pagemap does not say. They count alike only under
        # write protection, on kernels for which every empty PTE is written.
        empty = ~(entries.present | entries.swapped)
        if empty.any() and not (vma.uffd_wp and self._profile.has("scan.empty_pte_written")):
            self.unknown |= PageCategory.WRITTEN
        kind = np.where(empty, LeafKind.HOLE, LeafKind.PTE).astype(np.uint8)
        return LeafBatch(start=first, end=first + size, kind=kind, categories=categories)

    def _hugetlb_batch(self, vma: ScanVma, entries: PagemapEntries, position: int, stop: int) -> LeafBatch:
        start = np.arange(position - position % vma.hugetlb, stop, vma.hugetlb, dtype=np.uint64)
        start[0] = position
        pages = ((start - np.uint64(position)) >> np.uint64(self._geometry.page_shift)).astype(np.intp)
        heads = PagemapEntries(entries.values[pages], start=position, profile=self._profile)
        categories = self._categories(heads, None) & ~np.uint64(
            PageCategory.SWAPPED | PageCategory.SOFT_DIRTY
        )
        # An entry that no page table holds has no categories, an empty one is HUGE: pagemap shows 0 for both.
        empty = ~(heads.present | heads.uffd_wp)
        if empty.any():
            self.unknown |= PageCategory.HUGE
        categories[~empty] |= np.uint64(PageCategory.HUGE)
        marker = heads.uffd_wp & ~heads.present
        categories[marker] |= np.uint64(PageCategory.SWAPPED)
        end = np.append(start[1:], np.uint64(stop))
        return LeafBatch(
            start=start, end=end, kind=np.full(len(start), LeafKind.HUGETLB, np.uint8), categories=categories
        )

    def _categories(self, entries: PagemapEntries, flags: PageFlagsArray | None) -> U64Array:
        categories = np.zeros(len(entries), dtype=np.uint64)
        filled = entries.present | entries.swapped
        for category, where in (
            (PageCategory.PRESENT, entries.present),
            (PageCategory.SWAPPED, entries.swapped & ~entries.present),
            (PageCategory.FILE, entries.file),
            (PageCategory.WRITTEN, filled & ~entries.uffd_wp),
            (PageCategory.SOFT_DIRTY, entries.soft_dirty & filled),
            (PageCategory.GUARD, entries.guard),
        ):
            categories[where] |= np.uint64(category)
        if flags is not None:
            zero = entries.present & flags.has(PageFlag.ZERO_PAGE)
            categories[zero] |= np.uint64(PageCategory.PFNZERO)
        return categories

    def _flags(self, entries: PagemapEntries) -> PageFlagsArray | None:
        """kpageflags of the frames, one a page (0 where not present); None where they cannot be seen."""
        words = np.zeros(len(entries), dtype=np.uint64)
        present = entries.has_pfn
        if not entries.hidden.any():
            with suppress(NotPermitted, Missing):
                words[present] = self._process.kernel.frames_at(FrameFile.KPAGEFLAGS, entries.pfn[present])
                return PageFlagsArray(words, profile=self._profile)
        self.unknown |= PageCategory.PFNZERO | PageCategory.HUGE
        return None

    def _pmd_blocks(self, vma: ScanVma) -> U64Array:
        """Start addresses of the blocks that PMDs map, over the whole VMA; none, and HUGE unknown, if in doubt.

        Pages of a huge folio in order, in an aligned block, may be mapped by a PMD or by PTEs: that all of them are
        mapped by PMDs is sure only if they are as many as smaps counts for the VMA, never for a part of it.
        """
        if vma.start not in self._blocks:
            self._blocks[vma.start] = np.zeros(0, dtype=np.uint64)
            wanted = self._huge.get(vma.start, 0)
            found = self._candidates(vma) if wanted else None
            if found is not None and len(found) * self._geometry.pmd_size == wanted:
                self._blocks[vma.start] = found
            elif wanted:
                self.unknown |= PageCategory.HUGE
        return self._blocks[vma.start]

    def _candidates(self, vma: ScanVma) -> U64Array | None:
        """Aligned blocks of the VMA that hold one huge folio in order; None where frames cannot be seen."""
        size, pages = self._geometry.pmd_size, self._geometry.pmd_pages
        low, high = align_up(vma.start, size), align_down(vma.end, size)
        step = max(_BATCH_PAGES << self._geometry.page_shift, size)
        found = [np.zeros(0, dtype=np.uint64)]
        for position in range(low, high, step):
            entries = self._process.pagemap(position, min(high, position + step))
            flags = self._flags(entries)
            if flags is None:
                return None
            offset = entries.pfn.reshape(-1, pages) - np.arange(pages, dtype=np.uint64)
            whole = flags.has(PageFlag.THP).reshape(-1, pages).all(axis=1)
            whole &= (offset == offset[:, :1]).all(axis=1) & (offset[:, 0] % np.uint64(pages) == 0)
            found.append(np.uint64(position) + np.flatnonzero(whole).astype(np.uint64) * np.uint64(size))
        return np.concatenate(found)


def _huge_bytes(entry: SmapsEntry) -> int:
    """Bytes of the VMA that PMDs map, as smaps counts them."""
    names = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")
    return sum(entry.counters.get(name, 0) for name in names)
