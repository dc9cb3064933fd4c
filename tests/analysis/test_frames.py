"""Survey, rows and ranges agree with counting page by page."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmcore.analysis import rows as rows_module
from pmcore.analysis import survey as survey_module
from pmcore.analysis.bits import parse_bits
from pmcore.analysis.listing import page_ranges
from pmcore.analysis.rows import RowOptions, file_rows, frame_rows, process_rows
from pmcore.analysis.survey import summarise, survey
from pmcore.errors import ArgumentError, HiddenPfn, InvalidArgument
from pmcore.spec.reference import flags as reference
from pmcore.testing.snapshot import SnapshotKernel
from pmcore.vma import Vma

SOME = [
    0,
    0x400,
    0x586C,
    0x1080,
    1 << 15 | 0x80,
    1 << 16 | 0x80,
    1 << 17 | 1 << 15,
    1 << 34 | 1 << 12,
    1 << 60,
]
RUNS = st.lists(st.tuples(st.sampled_from(SOME), st.integers(1, 7)), max_size=20)
FILTERS = st.lists(st.sampled_from(["anon", "lru,~slab", "=buddy", "compound", "slab,anon=slab"]), max_size=2)


def frames(runs):
    return np.array([word for word, count in runs for _ in range(count)], dtype=np.uint64)


def shown(word, *, raw, pagemap=0):
    return reference.expand_overloaded(word, pagemap) if raw else reference.well_known(word)


def passes(word, filters):
    return all(parse_bits(f).matches(np.array([word], dtype=np.uint64))[0] for f in filters)


@settings(deadline=None)
@given(
    RUNS, st.booleans(), FILTERS, st.integers(1, 3), st.sampled_from([(0, None), (3, 20), (5, 6), (90, None)])
)
def test_survey_counts_every_frame_once(runs, raw, filters, threads, span):
    words = frames(runs)
    kernel = SnapshotKernel(kpageflags=words)
    start, end = span
    expected = collections.Counter(shown(int(w), raw=raw) for w in words[start:end])
    expected = {word: count for word, count in expected.items() if passes(word, filters)}
    old, survey_module._CHUNK = survey_module._CHUNK, 4
    try:
        found = survey(
            kernel, raw=raw, filters=[parse_bits(f) for f in filters], ranges=[span], threads=threads
        )
    finally:
        survey_module._CHUNK = old
    assert dict(zip(found.flags.tolist(), found.pages.tolist(), strict=True)) == expected
    assert found.total_pages == sum(expected.values())
    assert found.total_bytes == found.total_pages * 4096
    rows = frame_rows(kernel, RowOptions(raw=raw, filters=[parse_bits(f) for f in filters]), ranges=[span])
    again = summarise(rows, page_size=4096)
    assert again.flags.tolist() == found.flags.tolist()
    assert again.pages.tolist() == found.pages.tolist()


def test_survey_of_a_cgroup():
    words = np.array([1, 1, 2, 2, 2], dtype=np.uint64)
    owner = np.array([7, 0, 7, 7, 8], dtype=np.uint64)
    found = survey(SnapshotKernel(kpageflags=words, kpagecgroup=owner), cgroup=7)
    assert dict(zip(found.flags.tolist(), found.pages.tolist(), strict=True)) == {1: 1, 2: 2}
    assert found.pages_with(2) == 2


def test_a_failure_in_any_thread_is_raised():
    class Failing(SnapshotKernel):
        concurrency = 3

        def read_frames(self, file, start_pfn, out):
            raise InvalidArgument(22, "read")

    with pytest.raises(InvalidArgument):
        survey(Failing(kpageflags=np.zeros(1 << 20, dtype=np.uint64)))


def test_survey_reports_progress_and_refuses_no_threads():
    seen = []
    kernel = SnapshotKernel(kpageflags=np.zeros(10, dtype=np.uint64))
    survey(kernel, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 10)]
    with pytest.raises(ArgumentError):
        survey(kernel, threads=0)


@settings(deadline=None)
@given(
    RUNS,
    st.lists(st.integers(0, 2), min_size=140, max_size=140),
    st.lists(st.integers(0, 2), min_size=140, max_size=140),
    FILTERS,
    st.integers(1, 9),
)
def test_ranges_are_joined_as_page_types_joins_them(runs, counts, owners, filters, batch):
    words = frames(runs)
    size = len(words)
    kernel = SnapshotKernel(
        kpageflags=words,
        kpagecount=np.array(counts[:size], dtype=np.uint64),
        kpagecgroup=np.array(owners[:size], dtype=np.uint64),
    )
    options = RowOptions(filters=[parse_bits(f) for f in filters], show_cgroup=True, show_mapcount=True)
    old, rows_module.BATCH = rows_module.BATCH, batch
    try:
        found = [row for part in page_ranges(frame_rows(kernel, options)) for row in part.tolist()]
    finally:
        rows_module.BATCH = old
    pages = []
    for pfn, word in enumerate(words.tolist()):
        if passes(shown(word, raw=False), filters):
            pages.append((pfn, shown(word, raw=False), owners[pfn], counts[pfn]))
    expected = []
    for page in pages:
        last = expected[-1] if expected else None
        if last and last[0] + last[2] == page[0] and last[3:] == page[1:]:
            expected[-1] = (*last[:2], last[2] + 1, *last[3:])
        else:
            expected.append((page[0], page[0], 1, *page[1:]))
    assert found == expected


VMA = Vma(start=0x10000, end=0x18000)


def test_rows_of_a_process_show_frames_and_swap():
    words = np.array(
        [1 << 63 | 5, 0, 1 << 62 | 9 << 5, 1 << 63 | 1 << 61 | 6, 1 << 63 | 1 << 56 | 7, 0, 0, 0],
        dtype=np.uint64,
    )
    flags = np.zeros(10, dtype=np.uint64)
    flags[5:8] = [0x10, 0x20, 0x40]
    kernel = SnapshotKernel(kpageflags=flags, kpagecount=np.arange(10, dtype=np.uint64))
    process = kernel.add_process(1, {VMA: words})
    [batch] = process_rows(process, RowOptions(raw=True, show_mapcount=True))
    assert batch.voffset.tolist() == [16, 18, 19, 20]
    assert batch.offset.tolist() == [5, 9, 6, 7]
    assert batch.flags.tolist() == [0x10, 1 << 62, 0x20 | 1 << 61, 0x40 | 1 << 63]
    assert batch.mapcount.tolist() == [5, 0, 6, 7]
    [part] = process_rows(process, RowOptions(), ranges=[(19, 20)])
    assert part.voffset.tolist() == [19]


def test_hidden_frames_are_no_frames():
    kernel = SnapshotKernel(kpageflags=np.zeros(4, dtype=np.uint64), pfn_visible=False)
    process = kernel.add_process(1, {VMA: np.full(8, 1 << 63 | 3, dtype=np.uint64)})
    with pytest.raises(HiddenPfn, match="CAP_SYS_ADMIN"):
        list(process_rows(process, RowOptions()))


def test_files_need_a_backend_that_maps_them():
    with pytest.raises(ArgumentError, match="snapshot"):
        list(file_rows(SnapshotKernel(), "/x", RowOptions()))


def test_no_rows_no_ranges():
    assert list(page_ranges([])) == []
    assert summarise([], page_size=4096).total_pages == 0
    kernel = SnapshotKernel(kpageflags=np.zeros(0, dtype=np.uint64))
    assert list(itertools.chain.from_iterable(page_ranges(frame_rows(kernel, RowOptions())))) == []
