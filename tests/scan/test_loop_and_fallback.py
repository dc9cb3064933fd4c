"""Going on after a full buffer, joining, and PAGEMAP_SCAN over pagemap where the kernel has no such call."""

from __future__ import annotations

import itertools

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmcore.errors import ArgumentError, NotSupported
from pmcore.profile import preset
from pmcore.protocols import Process
from pmcore.scan import (
    REGION_DTYPE,
    ScanRequest,
    ScanResult,
    join_regions,
    scan_all,
    scan_chunks,
    scan_tables,
)
from pmcore.scan.over_pagemap import scan_pagemap
from pmcore.smaps import SmapsEntry
from pmcore.testing.snapshot import SnapshotKernel
from pmcore.uapi import PageCategory, PageFlag
from pmcore.vma import Vma

from .test_engine_against_reference import BLOCKS, NEW, PMD, requests, tables
from .toy import PAGE, ToyTables

PRESENT, WRITTEN, SWAPPED = PageCategory.PRESENT, PageCategory.WRITTEN, PageCategory.SWAPPED


class ToyProcess(Process):
    """A process whose PAGEMAP_SCAN is the engine over toy tables."""

    pid = 1

    def __init__(self, toy: ToyTables) -> None:
        self.toy = toy
        self.calls = 0
        self._kernel = attrs.make_class("K", {"profile": attrs.field(default=NEW)})()

    @property
    def kernel(self):
        return self._kernel

    def pagemap_scan_raw(self, request: ScanRequest) -> ScanResult:
        self.calls += 1
        return scan_tables(request, self.toy, NEW)


@pytest.mark.rule("SC-039", "SC-029")
@given(st.randoms(use_true_random=False), st.integers(1, 30))
def test_small_buffers_give_what_a_large_one_gives(rng, vec_len):
    toy, request = tables(rng), attrs.evolve(requests(rng), flags=0, vec=True, vec_len=100_000)
    if scan_tables(request, toy, NEW).errno:
        return
    process = ToyProcess(toy)
    whole = join_regions(scan_tables(request, toy, NEW).regions).tolist()
    small = attrs.evolve(request, vec_len=vec_len)
    found = scan_all(process, small)
    assert found.regions.tolist() == whole
    chunks = list(scan_chunks(process, small))
    assert np.concatenate([found.regions[:0], *chunks]).tolist() == whole
    if not request.max_pages:
        assert found.walk_end == -(-request.end // PAGE) * PAGE


@pytest.mark.rule("SC-028")
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(0, 2)), max_size=20))
def test_joined_regions_cover_the_same_pages(parts):
    rows, position = [], 0
    for length, gap, categories in parts:
        position += gap
        rows.append((position, position + length, categories))
        position += length
    regions = np.array(rows, dtype=REGION_DTYPE)
    joined = join_regions(regions)

    def pages(array):
        return [(page, c) for a, b, c in array.tolist() for page in range(a, b)]

    assert pages(joined) == pages(regions)
    for one, two in itertools.pairwise(joined):
        assert one["end"] != two["start"] or one["categories"] != two["categories"]


def test_resuming_needs_a_buffer():
    process = ToyProcess(ToyTables([], {}, set()))
    with pytest.raises(ArgumentError, match="buffer"):
        scan_all(process, ScanRequest(start=0, end=PMD, vec=False, vec_len=3))


def test_an_empty_range_is_one_call():
    process = ToyProcess(ToyTables([], {}, set()))
    assert len(scan_all(process, ScanRequest(start=0, end=0)).regions) == 0
    assert process.calls == 1
    assert BLOCKS > 0


@pytest.mark.parametrize("value", [-1, 1 << 64, "1", 1.0, True, None])
def test_a_request_holds_64_bit_numbers(value):
    with pytest.raises(ArgumentError):
        ScanRequest(start=value, end=0)


# -- over pagemap ----------------------------------------------------------------------------------------

VMA = Vma(start=1 << 21, end=(1 << 21) + 8 * PAGE)
WORDS = np.array(
    [
        1 << 63 | 10,  # present
        1 << 63 | 11,  # the zero page
        0,
        1 << 63 | 1 << 61 | 12,  # file
        1 << 62 | 3 << 5,  # swapped
        1 << 63 | 1 << 57 | 13,  # write-protected
        1 << 62 | 1 << 57 | 31 | 1 << 5,  # a marker
        1 << 63 | 1 << 55 | 14,  # soft-dirty
    ],
    dtype=np.uint64,
)


def snapshot(flags=(), *, version="6.1", visible=True, counters=None):
    frames = np.zeros(64, dtype=np.uint64)
    frames[11] = int(PageFlag.ZERO_PAGE)
    kernel = SnapshotKernel(kpageflags=frames, profile=preset(version), pfn_visible=visible)
    entry = SmapsEntry(vma=VMA, vm_flags=tuple(flags), counters=counters or {})
    return kernel.add_process(7, {VMA: WORDS}, smaps=[entry])


def test_categories_from_pagemap():
    request = ScanRequest(start=VMA.start, end=VMA.end, vec_len=20, return_mask=0xFF)
    result = snapshot(["uw"]).pagemap_scan(request)
    shown = {(low - VMA.start) // PAGE: PageCategory(word) for low, _, word in result.regions.tolist()}
    assert shown == {
        0: PRESENT | WRITTEN,
        1: PRESENT | WRITTEN | PageCategory.PFNZERO,
        2: WRITTEN,
        3: PRESENT | WRITTEN | PageCategory.FILE,
        4: SWAPPED | WRITTEN,
        5: PRESENT,
        6: SWAPPED,
        7: PRESENT | WRITTEN | PageCategory.SOFT_DIRTY,
    }
    assert result.unknown == PageCategory.WPALLOWED | WRITTEN  # of the empty page


def test_what_cannot_be_known_is_said():
    request = ScanRequest(start=VMA.start, end=VMA.end, vec_len=20, return_mask=0xFF)
    assert snapshot().pagemap_scan(request).unknown == PageCategory.WPALLOWED | WRITTEN
    hidden = snapshot(["uw"], version="6.18", visible=False).pagemap_scan(request).unknown
    assert hidden == PageCategory.WPALLOWED | PageCategory.PFNZERO | PageCategory.HUGE
    huge = snapshot(["uw"], counters={"AnonHugePages": 2 << 20}).pagemap_scan(request).unknown
    assert PageCategory.HUGE in huge
    old = snapshot(["uw"], version="5.4").pagemap_scan(request).unknown
    assert WRITTEN in old


def test_protection_needs_the_call_itself():
    with pytest.raises(NotSupported) as caught:
        snapshot().pagemap_scan(ScanRequest(start=VMA.start, end=VMA.end, flags=1))
    assert caught.value.remedy
    assert scan_pagemap(snapshot(), ScanRequest(start=1, end=VMA.end)).errno == 22


def test_huge_blocks_are_seen_where_smaps_agrees():
    vma = Vma(start=1 << 21, end=(1 << 21) + (1 << 21))
    words = (np.arange(512, dtype=np.uint64) + np.uint64(512)) | np.uint64(1 << 63)
    frames = np.full(2048, int(PageFlag.THP), dtype=np.uint64)
    kernel = SnapshotKernel(kpageflags=frames, profile=preset("6.12"))
    entry = SmapsEntry(vma=vma, vm_flags=(), counters={"AnonHugePages": 2 << 20})
    process = kernel.add_process(1, {vma: words}, smaps=[entry])
    result = process.pagemap_scan(ScanRequest(start=vma.start, end=vma.end, vec_len=9, return_mask=0x7F))
    assert result.regions.tolist() == [(vma.start, vma.end, PRESENT | WRITTEN | PageCategory.HUGE)]
    assert PageCategory.HUGE not in result.unknown


def test_huge_is_not_claimed_for_a_part_that_happens_to_count_right():
    """Two folios in order, one mapped by a PMD: looking at one block alone does not tell which."""
    size = 1 << 21
    vma = Vma(start=size, end=3 * size)
    words = (np.arange(1024, dtype=np.uint64) + np.uint64(512)) | np.uint64(1 << 63)
    frames = np.full(2048, int(PageFlag.THP), dtype=np.uint64)
    kernel = SnapshotKernel(kpageflags=frames, profile=preset("6.12"))
    for huge, shown in ((size, 0), (2 * size, int(PageCategory.HUGE))):
        entry = SmapsEntry(vma=vma, vm_flags=(), counters={"AnonHugePages": huge})
        process = kernel.add_process(1, {vma: words}, smaps=[entry])
        for start in (vma.start, vma.start + size, vma.start + 5 * PAGE):
            request = ScanRequest(start=start, end=start + 8 * PAGE, vec_len=9, return_mask=0x40)
            result = process.pagemap_scan(request)
            assert result.regions["categories"].tolist() == [shown]
            assert bool(result.unknown & PageCategory.HUGE) == (not shown)
