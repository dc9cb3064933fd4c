"""Which pages of a process were written: by soft-dirty, or by userfaultfd write protection, as the kernel offers.

Soft-dirty works on any process that may be looked at, but clearing it concerns everybody who watches that process.
Write protection works where the process itself has registered its memory for it (PAGE_IS_WPALLOWED).
"""

from __future__ import annotations

import enum
import errno

import numpy as np

from pmcore.errors import ArgumentError, syscall_error
from pmcore.protocols import Process
from pmcore.scan.loop import scan_all
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import RegionArray
from pmcore.uapi import ClearRefs, PageCategory, ScanFlag

__all__ = ["DirtyMethod", "DirtyTracker", "dirty_methods"]


class DirtyMethod(enum.StrEnum):
    """How written pages are known."""

    SOFT_DIRTY = "soft-dirty"
    UFFD_WP = "uffd-wp"


def dirty_methods(process: Process) -> tuple[DirtyMethod, ...]:
    """The methods that work for `process` now, the preferred one first. Looks, and changes nothing."""
    profile, found = process.kernel.profile, []
    if profile.has("scan"):
        request = ScanRequest(
            start=0,
            end=profile.geometry.task_size,
            vec_len=1,
            max_pages=1,
            category_mask=int(PageCategory.WPALLOWED),
            return_mask=int(PageCategory.WPALLOWED),
        )
        if len(process.pagemap_scan(request).regions):
            found.append(DirtyMethod.UFFD_WP)
    if profile.has("clear_refs.soft_dirty") and profile.has("pagemap.soft_dirty"):
        found.append(DirtyMethod.SOFT_DIRTY)
    return tuple(found)


class DirtyTracker:
    """Tracks one process. `reset` begins an interval, `dirty` says what was written since.

    Raises NotSupported where neither method works for the process, saying what would be needed; ArgumentError for a
    method asked for that does not.
    """

    def __init__(self, process: Process, method: DirtyMethod | str | None = None) -> None:
        self.process = process
        possible = dirty_methods(process)
        if not possible:
            raise syscall_error(
                errno.EOPNOTSUPP,
                f"tracking writes of process {process.pid}",
                reason="the kernel has no soft-dirty bits, and the process has no memory under asynchronous write "
                "protection",
                remedy="use a kernel with CONFIG_MEM_SOFT_DIRTY, or have the process register its memory with "
                "userfaultfd WP_ASYNC",
            )
        self.method = possible[0] if method is None else DirtyMethod(method)
        if self.method not in possible:
            raise ArgumentError(
                f"{self.method} does not work for process {process.pid}", remedy=f"use {', '.join(possible)}"
            )

    def reset(self) -> None:
        """Begin a new interval: from now on nothing has been written."""
        if self.method is DirtyMethod.SOFT_DIRTY:
            self.process.clear_refs(ClearRefs.SOFT_DIRTY)
            return
        self.process.pagemap_scan(
            ScanRequest(
                start=0, end=self.process.kernel.profile.geometry.task_size, flags=int(ScanFlag.WP_MATCHING)
            )
        )

    def dirty(self) -> RegionArray:
        """Regions written since `reset` (REGION_DTYPE), ascending, none touching with equal categories.

        Categories say whether a page is present or swapped out; both count.
        """
        end = self.process.kernel.profile.geometry.task_size
        shown = int(PageCategory.PRESENT | PageCategory.SWAPPED)
        if self.method is DirtyMethod.UFFD_WP:
            wanted = int(PageCategory.WPALLOWED | PageCategory.WRITTEN)
        elif self.process.kernel.profile.has("scan") and not self.process.kernel.profile.has(
            "scan.soft_dirty"
        ):
            return self._by_pagemap()  # 6.7: the call, but not the category
        else:
            wanted = int(PageCategory.SOFT_DIRTY)
        request = ScanRequest(
            start=0, end=end, category_mask=wanted, category_anyof_mask=shown, return_mask=wanted | shown
        )
        return scan_all(self.process, request).regions

    def pages(self) -> int:
        """Number of pages that `dirty` finds."""
        regions = self.dirty()
        return (
            int((regions["end"] - regions["start"]).sum()) >> self.process.kernel.profile.geometry.page_shift
        )

    def _by_pagemap(self) -> RegionArray:
        from pmcore.scan.loop import join_regions
        from pmcore.scan.result import empty_regions

        geometry, pieces = self.process.kernel.profile.geometry, [empty_regions()]
        for vma in self.process.maps():
            if vma.end > geometry.task_size:
                continue
            fields = self.process.pagemap(vma.start, vma.end).decode()
            where = np.flatnonzero(fields.soft_dirty & (fields.present | fields.swapped))
            regions = empty_regions(len(where))
            regions["start"] = np.uint64(vma.start) + (
                where.astype(np.uint64) << np.uint64(geometry.page_shift)
            )
            regions["end"] = regions["start"] + np.uint64(geometry.page_size)
            state = np.where(fields.present[where], PageCategory.PRESENT, PageCategory.SWAPPED)
            regions["categories"] = state.astype(np.uint64) | np.uint64(PageCategory.SOFT_DIRTY)
            pieces.append(join_regions(regions))
        return np.concatenate(pieces)
