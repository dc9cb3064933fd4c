"""PAGEMAP_SCAN over any tables: the walk, the selection, the output, the write protection (rules SC).

Whole batches of leaves are matched and merged as arrays. Only the leaf at which a limit strikes, and the huge page
that a write-protecting request covers in part, are looked at one by one, in the kernel's order of events.
"""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

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
_HOLE, _PMD, _HUGETLB = int(LeafKind.HOLE), int(LeafKind.PMD), int(LeafKind.HUGETLB)
#: Up to this many leaves are taken one by one: faster than arrays.
_FEW = 8


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


class _Verdict(NamedTuple):
    """What is to be done with each sort of leaf, by code."""

    categories: U64Array
    selected: BoolArray
    reported: U64Array
    #: 0 where it is not selected, else 1 + which of `words` is reported.
    saying: NDArray[np.unsignedinteger[Any]]
    words: U64Array
    #: What is reported, None where it is not selected.
    said: tuple[int | None, ...]
    #: Whether it is there to be armed: it is written.
    arms: tuple[bool, ...]
    #: Where only one word is reported, and a look at some bits tells of whom: the bits, what they are, and whether
    #: those are the leaves that are selected, or all others.
    test: tuple[int, int, bool] | None

    @classmethod
    def of(cls, categories: U64Array, selected: BoolArray, reported: U64Array) -> _Verdict:
        """From what is said of each sort."""
        words, which = np.unique(reported[selected], return_inverse=True)
        saying = np.zeros(len(selected), dtype=np.min_scalar_type(len(words)))
        saying[selected] = which + 1
        said = tuple(
            word if chosen else None
            for word, chosen in zip(reported.tolist(), selected.tolist(), strict=True)
        )
        test = (_test(selected) or _test(~selected, equal=False)) if len(words) == 1 else None
        arms = tuple(((categories & _WRITTEN) != 0).tolist())
        return cls(categories, selected, reported, saying, words, said, arms, test)

    def sayings(self, leaves: CodedLeaves) -> NDArray[Any]:
        """What is said of each leaf: as in `saying`, or, where there is but one word, whether it is said."""
        if self.test is None:
            return self.saying.take(leaves.codes, mode="clip")
        mask, value, equal = self.test
        part, value = leaves.words & np.uint64(mask << leaves.shift), value << leaves.shift
        said: BoolArray = part == value if equal else part != value
        return said


def _test(chosen: BoolArray, *, equal: bool = True) -> tuple[int, int, bool] | None:
    """Bits of a code, and what they are in the chosen ones and in no others; None if there are no such bits."""
    codes = np.flatnonzero(chosen)
    if not len(codes) or len(chosen) & (len(chosen) - 1):
        return None
    alike, value = len(chosen) - 1, int(codes[0])
    alike &= ~int(np.bitwise_or.reduce(codes ^ value))
    return (alike, value & alike, equal) if len(codes) << alike.bit_count() == len(chosen) else None


#: Verdicts by all that they depend on, and how many are kept.
_verdicts: dict[tuple[Any, ...], _Verdict] = {}
_VERDICTS = 64


class _Walk:
    """One call: the state that its steps share."""

    def __init__(self, request: ScanRequest, tables: ScanTables, profile: KernelProfile) -> None:
        geometry = profile.geometry
        self.request = request
        self.tables = tables
        self.profile = profile
        self.protecting = bool(request.flags & _WP_MATCHING)
        self.pmd_size = geometry.pmd_size
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
        if isinstance(batch, CodedLeaves):
            verdict = self._judge(vma, batch.palette)
            if len(batch.words) <= _FEW:
                return None, self._take_few(vma, batch, verdict)
            if not self.protecting:
                return None, self._push_coded(batch, verdict)
            codes = batch.codes
            index = verdict.selected.take(codes, mode="clip").nonzero()[0]
            codes = codes[index]
            return self._protect_batch(
                vma, batch.take(index, codes), verdict.categories[codes], verdict.reported[codes]
            )
        categories, selected, reported = self._select(vma, batch)
        index = selected.nonzero()[0]
        reported = reported[index]
        if self.protecting:
            return self._protect_batch(vma, batch.take(index), categories[index], reported)
        start, end = batch.start[index], batch.end[index]
        taken = self.output.push_whole(start, end, reported)
        if taken < len(index):
            # The limit strikes at this leaf; a region that no longer fits, or the part that still does.
            _, stop = self.output.push_one(int(start[taken]), int(end[taken]), int(reported[taken]))
            return None, stop
        return None, False

    def _select(self, vma: ScanVma, leaves: LeafBatch) -> tuple[U64Array, BoolArray, U64Array]:
        """Categories of each leaf, whether it is selected, and what is reported of it."""
        categories = match.leaf_categories(leaves, vma, self.request, self.profile)
        selected = match.matches(categories, self.request)
        if self.protecting and not self.output.wanted:
            # With no output the kernel arms every PTE that is not armed, whatever the masks say.
            small = (leaves.kind == LeafKind.PTE) | (leaves.kind == LeafKind.EMPTY)
            selected[small] = (categories[small] & _WRITTEN) != 0
        return categories, selected, categories & np.uint64(self.request.return_mask)

    def _judge(self, vma: ScanVma, palette: LeafBatch) -> _Verdict:
        """What is to be done with each sort of leaf: the same for all calls that ask the same of such VMAs."""
        request = self.request
        key = (
            palette,
            self.profile.capabilities,
            vma.wp_async,
            vma.uffd_wp,
            vma.soft_dirty,
            request.category_inverted,
            request.category_mask,
            request.category_anyof_mask,
            request.return_mask,
            self.protecting,
            request.vec_len > 0,
        )
        verdict = _verdicts.get(key)
        if verdict is None:
            if len(_verdicts) >= _VERDICTS:
                _verdicts.clear()
            verdict = _verdicts[key] = _Verdict.of(*self._select(vma, palette))
        return verdict

    def _take_few(self, vma: ScanVma, batch: CodedLeaves, verdict: _Verdict) -> bool:
        """Take the selected ones of small leaves one by one; whether the walk stops at one of them."""
        start, size = batch.base, batch.size
        for word in batch.words.tolist():
            code = word >> batch.shift
            said = verdict.said[code]
            if said is not None:
                if self.protecting:
                    stop = self._one(vma, start, start + size, code, batch.palette, said, verdict.arms[code])[
                        1
                    ]
                else:
                    stop = self.output.push_one(start, start + size, said)[1]
                if stop:
                    return True
            start += size
        return False

    def _push_coded(self, batch: CodedLeaves, verdict: _Verdict) -> bool:
        """Report the selected leaves; whether the walk stops at one of them."""
        output, size = self.output, batch.size
        if not len(verdict.words):
            return False
        # Runs of leaves of which the same is said; what is not selected is a run, too.
        sayings = verdict.sayings(batch)
        edge = np.empty(len(sayings) + 1, dtype=np.bool_)
        edge[0] = edge[-1] = True
        np.not_equal(sayings[1:], sayings[:-1], out=edge[1:-1])
        bounds = edge.nonzero()[0]
        first = 0 if sayings[0] else 1
        runs: Any = slice(first, len(bounds) - 1, 2)  # as a rule selected ones and others take turns
        reported = verdict.words
        if len(reported) > 1:
            saying = sayings.take(bounds[:-1])
            if saying[1 - first :: 2].any():
                runs = (saying != 0).nonzero()[0]
            reported = reported.take(saying[runs] - np.uint8(1))
        places = bounds.view(np.uint64)
        places <<= np.uint64(size.bit_length() - 1)
        places += np.uint64(batch.base)
        starts, ends = places[:-1][runs], places[1:][runs]
        taken = output.push_runs(starts, ends, reported)
        if taken == len(starts):
            return False
        # The limit strikes in this run: it no longer fits, or a part of it.
        said = int(reported[taken if len(reported) > 1 else 0])
        return output.push_one(int(starts[taken]), int(ends[taken]), said)[1]

    def _protect_batch(
        self, vma: ScanVma, leaves: LeafBatch, categories: U64Array, reported: U64Array
    ) -> tuple[int | None, bool]:
        kind = leaves.kind
        written = (categories & _WRITTEN) != 0
        arm = written | (kind == _HOLE)
        size = np.where(kind == _HUGETLB, np.uint64(vma.hugetlb), np.uint64(self.pmd_size))
        huge = (kind == _PMD) | (kind == _HUGETLB)
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
            start, end = int(leaves.start[taken]), int(leaves.end[taken])
            resume, stop = self._one(vma, start, end, taken, leaves, int(reported[taken]), bool(arm[taken]))
            if stop or resume is not None:
                return resume, stop
            position = taken + 1
        return None, False

    def _one(
        self, vma: ScanVma, start: int, end: int, row: int, leaves: LeafBatch, reported: int, arm: bool
    ) -> tuple[int | None, bool]:
        """One leaf of a protecting request, in the kernel's order of events: of the sort of that row of `leaves`."""
        end, stop = self.output.push_one(start, end, reported)
        if end == start or not arm:
            return None, stop
        kind = int(leaves.kind[row])
        if kind == _PMD and end - start != self.pmd_size:
            self.tables.split_pmd(vma, start)
            self.output.back_out(start, end)
            return start, False
        if kind == _HUGETLB and end - start != vma.hugetlb:
            # A hugetlb page is protected whole or not at all; the kernel goes on behind it.
            self.output.back_out(start, end)
            self.output.walk_end = start
            return None, False
        part = LeafBatch(
            start=np.array([start], dtype=np.uint64),
            end=np.array([end], dtype=np.uint64),
            kind=leaves.kind[row : row + 1],
            categories=leaves.categories[row : row + 1],
        )
        self.tables.write_protect(vma, part)
        return None, stop
