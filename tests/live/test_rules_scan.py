"""Rules SC- shown one by one on the running kernel (random requests are in tests/scan/test_live_engine.py)."""

from __future__ import annotations

import ctypes
import errno
import struct

import numpy as np
import pytest

import pmcore
from pmcore import ScanRequest
from pmcore.scan import join_regions, scan_all, scan_chunks
from pmcore.uapi import PAGEMAP_SCAN, PageCategory, ScanFlag, UffdFeature

from .conftest import PAGE, PMD

WPALLOWED, WRITTEN, FILE, PRESENT = (PageCategory[n] for n in ("WPALLOWED", "WRITTEN", "FILE", "PRESENT"))
SWAPPED, PFNZERO, HUGE, GUARD = (PageCategory[n] for n in ("SWAPPED", "PFNZERO", "HUGE", "GUARD"))
TRACKING = UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED


@pytest.fixture(autouse=True)
def _has_scan(needs):
    needs("scan", "uffd.wp_async", "uffd.wp_unpopulated")


@pytest.fixture
def tracked(task, area):
    """An area under asynchronous write protection, every page armed; and how to arm it again."""

    def make(pages: int, **how):
        start = area(pages, **how)
        fd = task.userfaultfd(TRACKING)
        task.uffd_register(fd, start, pages * PAGE, 2)
        return start, fd

    return make


def categories(task, start: int, pages: int) -> list[int]:
    """Of each page, by one scan."""
    result = task.process.pagemap_scan(
        ScanRequest(start=start, end=start + pages * PAGE, vec_len=pages + 1, return_mask=0xFF)
    )
    found = [0] * pages
    for low, high, word in result.regions.tolist():
        for page in range((low - start) // PAGE, (high - start) // PAGE):
            found[page] = word
    return found


def refused(task, **fields) -> int:
    """The errno of a request over nothing else wrong."""
    return task.process.pagemap_scan_raw(ScanRequest(**{"start": 0, "end": 0, **fields})).errno


@pytest.mark.rule("SC-003", "SC-004", "SC-005", "SC-006", "SC-007", "SC-008", "SC-013")
def test_checks_and_their_errnos(task, kernel):
    limit = kernel.profile.geometry.task_size
    assert refused(task) == 0
    for fields, expected in (
        ({"size": 0}, errno.EINVAL),
        ({"size": 104}, errno.EINVAL),
        ({"flags": 4}, errno.EINVAL),
        ({"category_mask": 1 << 40}, errno.EINVAL),
        ({"category_inverted": 1 << 40}, errno.EINVAL),
        ({"category_anyof_mask": 1 << 40}, errno.EINVAL),
        ({"return_mask": 1 << 40}, errno.EINVAL),
        ({"start": 1, "end": PAGE}, errno.EINVAL),
        ({"start": PAGE, "end": 0}, errno.EFAULT),
        ({"end": limit + 1}, errno.EFAULT),
        ({"start": limit + PAGE, "end": limit + PAGE}, errno.EFAULT),
        ({"vec": False, "vec_len": 1}, errno.EINVAL),
        ({"vec": True, "vec_len": 1 << 60}, errno.EFAULT),
        ({"vec": False, "vec_len": 1, "flags": 8}, errno.EINVAL),
        ({"start": 1, "end": 1 << 63, "size": 1}, errno.EINVAL),
        ({"start": 0, "end": 1 << 63, "vec": False, "vec_len": 1}, errno.EFAULT),
    ):
        assert refused(task, **fields) == expected, fields
    raw = task.process.pagemap_scan_raw(ScanRequest(start=1, end=PAGE))
    assert raw.walk_end == 0
    with pytest.raises(pmcore.SyscallError) as caught:
        task.process.pagemap_scan(ScanRequest(start=1, end=PAGE))
    assert caught.value.errno == errno.EINVAL
    assert caught.value.remedy


@pytest.mark.rule("SC-002")
def test_unknown_ioctl(needs):
    needs("quirk.scan_unknown_ioctl_einval")
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/pagemap", "rb") as file:  # noqa: PTH123
        buffer = ctypes.create_string_buffer(struct.pack("=12Q", 96, *[0] * 11))
        assert libc.ioctl(file.fileno(), ctypes.c_ulong(PAGEMAP_SCAN + 1), buffer) == -1
        assert ctypes.get_errno() == errno.EINVAL


@pytest.mark.rule("SC-009", "SC-010", "SC-011", "SC-028")
def test_end_is_rounded_up_and_regions_are_joined(task, area):
    start = area(4)
    task.touch(start, 4 * PAGE)
    result = task.process.pagemap_scan(
        ScanRequest(start=start, end=start + PAGE + 1, vec_len=8, category_mask=PRESENT, return_mask=PRESENT)
    )
    assert result.regions.tolist() == [(start, start + 2 * PAGE, PRESENT)]
    assert result.walk_end == start + 2 * PAGE


@pytest.mark.rule("SC-015", "SC-017", "SC-019", "SC-016")
def test_never_protected_pages_are_written(task, area, needs):
    start = area(4)
    task.write(start, b"x")
    task.touch(start + PAGE, PAGE, write=False)
    fd = task.memfd_create("file")
    task.ftruncate(fd, PAGE)
    file = area(1, flags=1, fd=fd)
    task.write(file, b"x")
    first, second, *_ = categories(task, start, 4)
    assert first & ~PageCategory.SOFT_DIRTY == PRESENT | WRITTEN
    assert second & ~PageCategory.SOFT_DIRTY == PRESENT | WRITTEN | PFNZERO
    assert categories(task, file, 1)[0] & ~PageCategory.SOFT_DIRTY == PRESENT | WRITTEN | FILE


@pytest.mark.rule("SC-014", "SC-026", "SC-034", "SC-037", "VM-020", "PM-008")
def test_tracking_from_marker_to_written(task, tracked):
    """Empty pages get markers; a write takes the protection off without stopping the writer."""
    start, fd = tracked(4)
    assert categories(task, start, 4) == [WPALLOWED | WRITTEN] * 4
    task.uffd_writeprotect(fd, start, 4 * PAGE, protect=True)
    assert categories(task, start, 4) == [WPALLOWED | SWAPPED] * 4
    entries = task.process.pagemap(start, start + 4 * PAGE)
    assert entries.values.tolist() == [0x420000000000003F] * 4
    task.write(start + PAGE, b"x")
    assert categories(task, start, 4) == [
        WPALLOWED | SWAPPED,
        WPALLOWED | PRESENT | WRITTEN,
        WPALLOWED | SWAPPED,
        WPALLOWED | SWAPPED,
    ]
    assert task.process.pagemap(start, start + 4 * PAGE).uffd_wp.tolist() == [True, False, True, True]


@pytest.mark.rule("SC-037", "PM-012", "PM-024", "SC-018")
def test_marker_is_swapped_without_a_swap_entry(task, tracked):
    start, fd = tracked(1)
    task.uffd_writeprotect(fd, start, PAGE, protect=True)
    entry = task.process.pagemap(start, start + PAGE)[0]
    assert entry.swapped
    assert entry.uffd_wp
    assert entry.swap_entry == (31, 1)


@pytest.mark.rule("SC-030", "SC-032", "SC-034", "SC-001")
def test_get_and_protect_in_one_step(task, tracked):
    start, _ = tracked(4)
    task.touch(start, 4 * PAGE)
    request = ScanRequest(
        start=start,
        end=start + 4 * PAGE,
        vec_len=4,
        flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC,
        category_mask=WRITTEN,
        return_mask=WRITTEN,
    )
    assert task.process.pagemap_scan(request).regions.tolist() == [(start, start + 4 * PAGE, WRITTEN)]
    assert task.process.pagemap_scan(request).regions.tolist() == []
    task.write(start + 2 * PAGE, b"again")
    expected = [(start + 2 * PAGE, start + 3 * PAGE, WRITTEN)]
    assert task.process.pagemap_scan(request).regions.tolist() == expected
    assert task.process.pagemap_scan(request).regions.tolist() == []


@pytest.mark.rule("SC-031", "SC-030")
def test_flag_named_twice_protects_nothing(task, tracked):
    """The document's first example as it stands: CHECK_WPASYNC twice."""
    start, _ = tracked(2)
    task.touch(start, 2 * PAGE)
    fields = {
        "start": start,
        "end": start + 2 * PAGE,
        "vec_len": 2,
        "category_mask": WRITTEN,
        "return_mask": WRITTEN,
    }
    twice = ScanRequest(flags=ScanFlag.CHECK_WPASYNC | ScanFlag.CHECK_WPASYNC, **fields)
    assert len(task.process.pagemap_scan(twice).regions) == 1
    assert not task.process.pagemap(start, start + 2 * PAGE).uffd_wp.any()
    meant = ScanRequest(flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC, **fields)
    assert len(task.process.pagemap_scan(meant).regions) == 1
    assert task.process.pagemap(start, start + 2 * PAGE).uffd_wp.all()


@pytest.mark.rule("SC-023")
def test_second_example_matches_anonymous_pages_too(task, area):
    start = area(2)
    task.write(start, b"x")
    example = ScanRequest(
        start=start,
        end=start + 2 * PAGE,
        vec_len=4,
        category_mask=WRITTEN | SWAPPED,
        category_inverted=SWAPPED,
        category_anyof_mask=PRESENT | HUGE,
        return_mask=WRITTEN | SWAPPED | PRESENT | HUGE,
    )
    assert task.process.pagemap_scan(example).regions.tolist() == [(start, start + PAGE, WRITTEN | PRESENT)]


@pytest.mark.rule("SC-031")
def test_check_wpasync_refuses_other_memory(task, area, tracked):
    plain, (start, _) = area(1), tracked(1)
    task.touch(plain, PAGE)
    fields = {"flags": ScanFlag.CHECK_WPASYNC, "vec_len": 4, "return_mask": PRESENT}
    assert refused(task, start=plain, end=plain + PAGE, **fields) == errno.EPERM
    assert refused(task, start=start, end=start + PAGE, **fields) == 0


@pytest.mark.rule("SC-033", "SC-041")
def test_protecting_without_output_arms_everything(task, tracked, needs):
    needs("quirk.scan_protect_ignores_masks")
    start, _ = tracked(4)
    task.touch(start, 2 * PAGE)
    request = ScanRequest(start=start, end=start + 4 * PAGE, flags=ScanFlag.WP_MATCHING, category_mask=FILE)
    result = task.process.pagemap_scan(request)
    assert len(result.regions) == 0
    assert result.walk_end == start + 4 * PAGE
    assert task.process.pagemap(start, start + 4 * PAGE).uffd_wp.all()


@pytest.mark.rule("SC-012", "SC-042", "SC-039")
def test_stale_walk_end_and_scan_all(task, area, needs):
    needs("quirk.scan_walk_end_stale")
    pages = 1300
    start = area(pages)
    task.touch(start, pages * PAGE, step=2 * PAGE)
    end = start + pages * PAGE
    fields = {"start": start, "end": end, "category_mask": PRESENT, "return_mask": PRESENT}
    result = task.process.pagemap_scan(ScanRequest(vec_len=5000, **fields))
    assert len(result.regions) == 650
    assert result.walk_end == start + 1024 * PAGE < int(result.regions["end"][-1])
    for vec_len in (1, 3, 512, 513, 650, 0):
        found = scan_all(task.process, ScanRequest(vec_len=vec_len, **fields))
        assert found.regions.tolist() == result.regions.tolist()
        assert found.walk_end == end
        streamed = np.concatenate(list(scan_chunks(task.process, ScanRequest(vec_len=vec_len, **fields))))
        assert streamed.tolist() == result.regions.tolist()


@pytest.mark.rule("SC-029", "SC-011", "SC-039")
def test_max_pages(task, area):
    start = area(8)
    task.touch(start, 8 * PAGE)
    fields = {"start": start, "end": start + 8 * PAGE, "category_mask": PRESENT, "return_mask": PRESENT}
    result = task.process.pagemap_scan(ScanRequest(vec_len=8, max_pages=3, **fields))
    assert result.regions.tolist() == [(start, start + 3 * PAGE, PRESENT)]
    assert result.walk_end == start + 3 * PAGE
    limited = scan_all(task.process, ScanRequest(vec_len=1, max_pages=5, **fields))
    assert limited.regions.tolist() == [(start, start + 5 * PAGE, PRESENT)]
    assert limited.walk_end == start + 5 * PAGE


@pytest.mark.rule("SC-020", "SC-035", "SC-038", "SC-040")
def test_huge_page_is_split_where_a_part_is_protected(task, tracked, needs):
    needs("mm.thp")
    start, _ = tracked(512, huge=True)
    task.touch(start, PAGE)
    if categories(task, start, 512) != [WPALLOWED | PRESENT | WRITTEN | HUGE] * 512:
        pytest.skip("the kernel had no huge page to give")
    request = ScanRequest(
        start=start,
        end=start + 8 * PAGE,
        vec_len=4,
        flags=ScanFlag.WP_MATCHING,
        category_mask=WRITTEN,
        return_mask=WRITTEN | HUGE,
    )
    assert task.process.pagemap_scan(request).regions.tolist() == [(start, start + 8 * PAGE, WRITTEN)]
    after = categories(task, start, 512)
    assert after[:8] == [WPALLOWED | PRESENT] * 8
    assert after[8:] == [WPALLOWED | PRESENT | WRITTEN] * 504
    assert task.process.pagemap(start, start + PMD).present.all()


@pytest.mark.rule("SC-036", "SC-020")
def test_hugetlb_page_is_not_protected_in_part(task, area, needs):
    needs("uffd.wp_hugetlbfs_shmem")
    from pathlib import Path

    if int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text()) < 1:
        pytest.skip("needs a free hugetlb page (/proc/sys/vm/nr_hugepages)")
    start = area(512, flags=0x22 | 0x40000)
    fd = task.userfaultfd(TRACKING | UffdFeature.WP_HUGETLBFS_SHMEM)
    task.uffd_register(fd, start, PMD, 2)
    task.write(start, b"x")
    request = ScanRequest(
        start=start, end=start + 8 * PAGE, vec_len=4, flags=1, category_mask=WRITTEN, return_mask=WRITTEN
    )
    result = task.process.pagemap_scan(request)
    assert result.regions.tolist() == []
    assert result.walk_end == start
    assert not task.process.pagemap(start, start + PMD).uffd_wp.any()


@pytest.mark.rule("SC-024", "SC-023")
def test_reported_categories_are_not_flipped(task, area):
    start = area(2)
    task.write(start, b"x")
    request = ScanRequest(
        start=start, end=start + PAGE, vec_len=2, category_inverted=FILE, category_mask=FILE, return_mask=FILE
    )
    assert task.process.pagemap_scan(request).regions.tolist() == [(start, start + PAGE, 0)]


@pytest.mark.rule("SC-025")
def test_empty_entries_beside_a_touched_page(task, area, kernel):
    start = area(2)
    task.write(start, b"x")
    only = ScanRequest(
        start=start, end=start + 2 * PAGE, vec_len=2, category_mask=WRITTEN, return_mask=WRITTEN
    )
    assert task.process.pagemap_scan(only).regions.tolist() == [(start, start + 2 * PAGE, WRITTEN)]
    generic = categories(task, start, 2)[1] & WRITTEN
    assert bool(generic) == kernel.profile.has("scan.empty_pte_written")


@pytest.mark.rule("SC-027")
def test_pages_outside_vmas_and_of_pfnmap_are_not_reported(task, area):
    start = area(2)
    task.munmap(start, PAGE)
    result = task.process.pagemap_scan(
        ScanRequest(start=start, end=start + PAGE, vec_len=2, return_mask=0xFF)
    )
    assert len(result.regions) == 0
    for vma in task.process.maps():
        if vma.name == "[vvar]":
            request = ScanRequest(start=vma.start, end=vma.end, vec_len=9, return_mask=0xFF)
            assert len(task.process.pagemap_scan(request).regions) == 0
    unmatched = ScanRequest(
        start=start + PAGE, end=start + 2 * PAGE, vec_len=2, category_mask=WPALLOWED, return_mask=WPALLOWED
    )
    assert len(task.process.pagemap_scan(unmatched).regions) == 0


@pytest.mark.rule("SC-022")
def test_guard_category(task, area, needs):
    needs("mm.guard_regions", "scan.guard")
    start = area(1)
    task.madvise(start, PAGE, 102)
    request = ScanRequest(start=start, end=start + PAGE, vec_len=1, return_mask=0x1FF)
    [(_, _, word)] = task.process.pagemap_scan(request).regions.tolist()
    assert word & ~PageCategory.SOFT_DIRTY == SWAPPED | WRITTEN | GUARD


@pytest.mark.rule("SC-021", "PM-006", "AC-012")
def test_soft_dirty_agrees_between_interfaces(task, area, kernel):
    """Where it is configured a fresh page is soft-dirty until cleared; where it is not it never is."""
    start = area(2)
    task.write(start, b"x")
    configured = kernel.profile.has("pagemap.soft_dirty")
    assert (
        bool(task.process.pagemap(start, start + PAGE).values[0] >> np.uint64(55) & np.uint64(1))
        == configured
    )
    if kernel.profile.has("scan.soft_dirty"):
        assert bool(categories(task, start, 1)[0] & PageCategory.SOFT_DIRTY) == configured
    if kernel.profile.has("clear_refs.soft_dirty"):
        task.process.clear_refs(4)
        assert not task.process.pagemap(start, start + PAGE).soft_dirty[0]


@pytest.mark.rule("VM-019")
def test_zapping_takes_the_marker_away(task, tracked):
    start, fd = tracked(2)
    task.touch(start, PAGE)
    task.uffd_writeprotect(fd, start, 2 * PAGE, protect=True)
    task.madvise(start, 2 * PAGE, 4)
    assert task.process.pagemap(start, start + 2 * PAGE).values.tolist() == [0, 0]


@pytest.mark.rule("SC-038", "SC-028")
def test_written_survives_vma_merging(task, bench):
    """Two neighbours that merge into one VMA: what was protected stays so."""
    start = 0x3000_0000_0000
    fd = task.userfaultfd(TRACKING)
    for half in (0, 2):
        task.mmap(2 * PAGE, addr=start + half * PAGE, flags=0x100022)
        task.uffd_register(fd, start + half * PAGE, 2 * PAGE, 2)
        task.touch(start + half * PAGE, 2 * PAGE)
        task.uffd_writeprotect(fd, start + half * PAGE, 2 * PAGE, protect=True)
    assert [v.length for v in task.process.maps() if v.start == start] == [4 * PAGE]
    assert categories(task, start, 4) == [WPALLOWED | PRESENT] * 4


@pytest.mark.rule("SC-028", "SC-040")
def test_joining_what_came_back_split():
    from pmcore.scan import REGION_DTYPE

    rows = [(0, 1, 5), (1, 2, 5), (2, 3, 6), (4, 5, 6), (5, 6, 6)]
    joined = join_regions(np.array(rows, dtype=REGION_DTYPE))
    assert joined.tolist() == [(0, 2, 5), (2, 3, 6), (4, 6, 6)]
