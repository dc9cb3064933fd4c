"""PAGEMAP_SCAN for kernels that have none: the engine over what pagemap, maps and kpageflags show.

What those files do not show cannot be answered, and the result says which categories that are (`unknown`): always
WPALLOWED (no file tells the mode of a userfaultfd), HUGE where PTE-mapped and PMD-mapped huge pages cannot be told
apart, PFNZERO where frame numbers are hidden, WRITTEN before bit 57. Write protection needs the real call.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator

import attrs
import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import InvalidArgument, Missing, NotPermitted
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
        self._huge: dict[int, int] = {}
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
        raise InvalidArgument(errno.ENOTTY, "write protection over pagemap")

    def split_pmd(self, vma: ScanVma, start: int) -> None:
        raise InvalidArgument(errno.ENOTTY, "splitting a huge page over pagemap")

    # -- inside ----------------------------------------------------------------------------------------

    def _batch(self, vma: ScanVma, entries: PagemapEntries, position: int) -> LeafBatch:
        size = np.uint64(self._geometry.page_size)
        first = np.uint64(position) + np.arange(len(entries), dtype=np.uint64) * size
        flags = self._flags(entries)
        categories = self._categories(entries, flags)
        huge = self._pmd_mapped(vma, entries, flags, first)
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
        try:
            if entries.hidden.any():
                raise NotPermitted(errno.EPERM, "frame numbers")
            words = np.zeros(len(entries), dtype=np.uint64)
            present = entries.has_pfn
            words[present] = self._process.kernel.frames_at(FrameFile.KPAGEFLAGS, entries.pfn[present])
        except (NotPermitted, Missing):
            self.unknown |= PageCategory.PFNZERO | PageCategory.HUGE
            return None
        return PageFlagsArray(words, profile=self._profile)

    def _pmd_mapped(
        self, vma: ScanVma, entries: PagemapEntries, flags: PageFlagsArray | None, first: U64Array
    ) -> BoolArray:
        """Pages of blocks that a PMD may map; HUGE becomes unknown where smaps counts fewer than there are."""
        none: BoolArray = np.zeros(len(entries), dtype=np.bool_)
        if self._huge.get(vma.start, 0) == 0:
            return none
        if flags is None:
            self.unknown |= PageCategory.HUGE
            return none
        pages = self._geometry.pmd_pages
        lead = int(-(int(first[0]) >> self._geometry.page_shift) % pages)
        blocks = (len(entries) - lead) // pages
        candidates = none
        if blocks > 0:
            body = slice(lead, lead + blocks * pages)
            offset = entries.pfn[body].reshape(blocks, pages) - np.arange(pages, dtype=np.uint64)
            huge = flags.any(PageFlag.THP)[body].reshape(blocks, pages)
            whole = (offset == offset[:, :1]).all(axis=1) & (offset[:, 0] % pages == 0) & huge.all(axis=1)
            candidates = none.copy()
            candidates[body] = np.repeat(whole, pages)
        if int(candidates.sum()) << self._geometry.page_shift != self._huge[vma.start]:
            self.unknown |= PageCategory.HUGE
        return candidates


def _huge_bytes(entry: SmapsEntry) -> int:
    """Bytes of the VMA that PMDs map, as smaps counts them."""
    names = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")
    return sum(entry.counters.get(name, 0) for name in names)
