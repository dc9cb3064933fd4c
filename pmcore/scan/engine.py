"""PAGEMAP_SCAN over any tables: the walk, the selection, the output, the write protection (rules SC).

Whole batches of leaves are matched and merged as arrays. Only the leaf at which a limit strikes, and the huge page
that a write-protecting request covers in part, are looked at one by one, in the kernel's order of events.
"""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import BoolArray, U64Array
from pmcore.profile import KernelProfile
from pmcore.scan import match
from pmcore.scan._output import Output
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import ScanResult
from pmcore.scan.tables import CodedLeaves, LeafBatch, LeafKind, ScanTables, ScanVma
from pmcore.scan.validate import normalise, refusal
from pmcore.uapi import PageCategory, ScanFlag

__all__ = ["scan_tables"]

_WRITTEN = np.uint64(PageCategory.WRITTEN)
_WP_MATCHING, _CHECK_WPASYNC = int(ScanFlag.WP_MATCHING), int(ScanFlag.CHECK_WPASYNC)


def scan_tables(
    request: ScanRequest, tables: ScanTables, profile: KernelProfile, *, vec_address: int = 1 << 16
) -> ScanResult:
    """Answer `request` over `tables` as the profile's kernel does; a refusal is a result with its errno.

    `vec_address` is where the caller's buffer lies, for the check that it ends within the user addresses.
    """
    refused = refusal(request, profile, vec_address=vec_address)
    if refused:
        return ScanResult(errno=refused)
    walk = _Walk(normalise(request, profile), tables, profile)
    failed = walk.run() if walk.request.start < walk.request.end else 0
    regions = walk.output.regions()
    return ScanResult(regions=regions, walk_end=walk.output.walk_end or walk.request.end, errno=failed)


class _Walk:
    """One call: the state that its steps share."""

    def __init__(self, request: ScanRequest, tables: ScanTables, profile: KernelProfile) -> None:
        geometry = profile.geometry
        self.request = request
        self.tables = tables
        self.profile = profile
        self.protecting = bool(request.flags & _WP_MATCHING)
        self.pmd_size = geometry.pmd_size
        #: The last sorts of leaves, of which VMA, and what is to be done with each: they come again and again.
        self._judged: tuple[LeafBatch, ScanVma, U64Array, BoolArray, U64Array] | None = None
        self.output = Output(request, page_shift=geometry.page_shift, bounce_regions=geometry.bounce_regions)

    def run(self) -> int:
        """Walk all VMAs; the errno that ended it, or 0."""
        request = self.request
        for vma in self.tables.scan_vmas(request.start, request.end):
            if not vma.wp_async:
                if request.flags & _CHECK_WPASYNC:
                    return errno.EPERM
                if self.protecting:
                    continue
            if vma.pfnmap or not match.vma_interesting(vma, request):
                continue
            if self._vma(vma):
                break
        return 0

    def _vma(self, vma: ScanVma) -> bool:
        """Walk one VMA; whether the walk stops in it."""
        position, end = max(vma.start, self.request.start), min(vma.end, self.request.end)
        while position < end:
            for batch in self.tables.leaves(vma, position, end):
                resume, stop = self._batch(vma, batch)
                if stop:
                    return True
                if resume is not None:
                    position = resume  # a split has changed the tables: ask for them anew
                    break
            else:
                return False
        return False

    def _batch(self, vma: ScanVma, batch: LeafBatch | CodedLeaves) -> tuple[int | None, bool]:
        """Take one batch: (where to ask for the leaves anew, or None; whether the walk stops)."""
        sorts = batch.palette if isinstance(batch, CodedLeaves) else batch
        if self._judged is None or self._judged[0] is not sorts or self._judged[1] is not vma:
            self._judged = (sorts, vma, *self._judge(sorts, vma))
        _, _, categories, selected, reported = self._judged
        if isinstance(batch, CodedLeaves):
            index = selected.take(batch.codes, mode="clip").nonzero()[0]
            if not self.protecting:
                return None, self._push_pages(batch, index, reported)
            codes = batch.codes[index]
            return self._protect_batch(vma, batch.take(index), categories[codes], reported[codes])
        index = selected.nonzero()[0]
        reported = reported[index]
        if self.protecting:
            return self._protect_batch(vma, batch.take(index), categories[index], reported)
        start, end = batch.places(index)
        taken = self.output.push_whole(start, end, reported)
        if taken < len(index):
            # The limit strikes at this leaf; a region that no longer fits, or the part that still does.
            _, stop = self.output.push_one(int(start[taken]), int(end[taken]), int(reported[taken]))
            return None, stop
        return None, False

    def _judge(self, sorts: LeafBatch, vma: ScanVma) -> tuple[U64Array, BoolArray, U64Array]:
        """Categories of each sort of leaf, whether it is selected, and what is reported of it."""
        categories = match.leaf_categories(sorts, vma, self.request, self.profile)
        selected = match.matches(categories, self.request)
        if self.protecting and not self.output.wanted:
            # With no output the kernel arms every PTE that is not armed, whatever the masks say.
            small = (sorts.kind == LeafKind.PTE) | (sorts.kind == LeafKind.EMPTY)
            selected[small] = (categories[small] & _WRITTEN) != 0
        return categories, selected, categories & np.uint64(self.request.return_mask)

    def _push_pages(self, batch: CodedLeaves, index: NDArray[np.intp], reported: U64Array) -> bool:
        """Report the leaves at `index`; whether the walk stops at one of them."""
        taken = self.output.push_pages(batch.base, batch.size, index, batch.codes, reported)
        if taken == len(index):
            return False
        start, end = batch.places(index[taken : taken + 1])
        return self.output.push_one(int(start[0]), int(end[0]), int(reported[batch.codes[index[taken]]]))[1]

    def _protect_batch(
        self, vma: ScanVma, leaves: LeafBatch, categories: U64Array, reported: U64Array
    ) -> tuple[int | None, bool]:
        kind = leaves.kind
        written = (categories & _WRITTEN) != 0
        arm = written | (kind == LeafKind.HOLE)
        size = np.where(kind == LeafKind.HUGETLB, np.uint64(vma.hugetlb), np.uint64(self.pmd_size))
        huge = (kind == LeafKind.PMD) | (kind == LeafKind.HUGETLB)
        partial = np.flatnonzero(huge & written & (leaves.end - leaves.start != size))
        position = 0
        while position < len(leaves):
            cut = np.searchsorted(partial, position)
            run = slice(position, int(partial[cut]) if cut < len(partial) else len(leaves))
            taken = position + self.output.push_whole(leaves.start[run], leaves.end[run], reported[run])
            chosen = np.flatnonzero(arm[position:taken]) + position
            if len(chosen):
                self.tables.write_protect(vma, leaves.take(chosen))
            if taken == len(leaves):
                break
            # Either a limit strikes at this leaf, or it is a huge page that the request covers in part.
            one = leaves.take(slice(taken, taken + 1))
            resume, stop = self._one(vma, one, int(reported[taken]), bool(arm[taken]))
            if stop or resume is not None:
                return resume, stop
            position = taken + 1
        return None, False

    def _one(self, vma: ScanVma, leaf: LeafBatch, reported: int, arm: bool) -> tuple[int | None, bool]:
        """One leaf of a protecting request, in the kernel's order of events."""
        start, whole_end, kind = int(leaf.start[0]), int(leaf.end[0]), int(leaf.kind[0])
        end, stop = self.output.push_one(start, whole_end, reported)
        if end == start or not arm:
            return None, stop
        if kind == LeafKind.PMD and end - start != self.pmd_size:
            self.tables.split_pmd(vma, start)
            self.output.back_out(start, end)
            return start, False
        if kind == LeafKind.HUGETLB and end - start != vma.hugetlb:
            # A hugetlb page is protected whole or not at all; the kernel goes on behind it.
            self.output.back_out(start, end)
            self.output.walk_end = start
            return None, False
        part = LeafBatch(
            start=leaf.start, end=np.array([end], dtype=np.uint64), kind=leaf.kind, categories=leaf.categories
        )
        self.tables.write_protect(vma, part)
        return None, stop
