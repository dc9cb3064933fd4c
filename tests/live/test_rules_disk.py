"""Rules DF-: files on a disk, on the running kernel (an ext4 of the workbench's own) and on the simulated machine."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pmcore.errors import AddressSpaceFault, BackendUnavailable, SyscallError
from pmcore.procmap import MapQuery
from pmcore.registry import open_workbench
from pmcore.uapi import Errno, Madvise, PageFlag, UffdFeature

from .conftest import PAGE

SHARED, PRIVATE = 0x01, 0x02
DATA, HOLE = 3, 4
WILLNEED, DONTNEED = 3, 4
DIRTY, RECLAIM, ACTIVE = PageFlag.DIRTY, PageFlag.RECLAIM, PageFlag.ACTIVE
BUFFERS, ON_DISK = PageFlag.PRIVATE, PageFlag.OWNER_2


@pytest.fixture(
    scope="module",
    params=[("procfs", "compressed"), ("procfs", "disk"), ("sim", "compressed"), ("sim", "disk")],
    ids="-".join,
)
def bench(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each rule is tried on the running kernel and on the simulated machine, with both kinds of disks."""
    backend, kind = request.param
    if backend == "procfs" and not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    try:
        if backend == "procfs":
            opened = open_workbench("procfs", disk="64 MiB", disk_kind=kind)
        else:
            opened = open_workbench(
                "sim", memory="64 MiB", kernel="6.18", config=["!CONFIG_MEM_SOFT_DIRTY"], disk_kind=kind
            )
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with opened as workbench:
        if not workbench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        yield workbench


@pytest.fixture(scope="module")
def kernel(bench: Any) -> Any:
    return bench.kernel


@pytest.fixture
def disk(task, area, bench):
    """A new file of `pages` pages, none of them cached, and a shared mapping of it; `ahead` pages are read ahead."""

    def make(pages: int, *, flags: int = SHARED, prot: int = 3, ahead: int = 0) -> tuple[int, int]:
        bench.set_readahead(ahead * PAGE)
        fd = task.open_file("rule", pages=pages)
        return fd, area(pages, flags=flags, fd=fd, prot=prot)

    return make


def cached(bench, task, start, pages):
    """Numbers of the pages that are in the cache, once nothing is being read any more."""
    bench.settle()
    return np.flatnonzero(task.mincore(start, pages * PAGE)).tolist()


def refused(call, *arguments):
    with pytest.raises(SyscallError) as caught:
        call(*arguments)
    return caught.value.errno


@pytest.mark.rule("DF-001")
def test_a_page_that_was_read(task, disk, look):
    fd, start = disk(8)
    assert not task.mincore(start, 8 * PAGE).any()
    assert task.read(start + 2 * PAGE, 8) == b"rule:2\n\0"
    entries, flags, counts = look(task, start, 8)
    assert np.flatnonzero(entries.present).tolist() == [2]
    assert entries.file[2]
    assert entries.exclusive[2]
    assert counts[2] == 1
    assert flags.has(PageFlag.UPTODATE | PageFlag.LRU | ON_DISK)[2]
    assert not flags.any(DIRTY | BUFFERS | PageFlag.SWAPBACKED | PageFlag.ANON)[2]
    task.ftruncate(fd, 12 * PAGE)
    hole = task.mmap(PAGE, addr=start + (1 << 29), flags=SHARED | 0x100000, fd=fd, offset=10 * PAGE)
    assert task.read(hole, 4) == bytes(4)
    flags = look(task, hole, 1)[1]
    assert flags.has(PageFlag.UPTODATE)[0]
    assert not flags.any(ON_DISK | DIRTY | BUFFERS)[0]
    # It stays when it is unmapped and the file closed.
    task.munmap(start, 8 * PAGE)
    task.munmap(hole, PAGE)
    task.close(fd)
    fd = task.open_file("rule")
    start = task.mmap(8 * PAGE, addr=start, flags=SHARED | 0x100000, fd=fd)
    assert np.flatnonzero(task.mincore(start, 8 * PAGE)).tolist() == [2]


@pytest.mark.rule("DF-002")
def test_the_first_write_is_told(task, disk, look):
    fd, start = disk(4)
    task.touch(start, 2 * PAGE, write=False)
    task.touch(start, PAGE, write=True)
    flags = look(task, start, 2)[1]
    assert flags.has(DIRTY | BUFFERS | ON_DISK).tolist() == [True, False]
    assert not flags.any(DIRTY | BUFFERS)[1]
    # mprotect there and back lets only the dirty entry be written: the other's write is told.
    task.mprotect(start, 2 * PAGE, 1)
    task.mprotect(start, 2 * PAGE, 3)
    assert not look(task, start, 2)[1].any(DIRTY)[1]
    task.touch(start + PAGE, PAGE, write=True)
    assert look(task, start, 2)[1].has(DIRTY | BUFFERS).all()
    # A hole gets a block.
    task.ftruncate(fd, 8 * PAGE)
    assert refused(task.lseek, fd, 6 * PAGE, DATA) == Errno.ENXIO
    more = task.mmap(8 * PAGE, addr=start + (1 << 29), flags=SHARED | 0x100000, fd=fd)
    task.touch(more + 6 * PAGE, PAGE, write=True)
    assert task.lseek(fd, 5 * PAGE, DATA) == 6 * PAGE


@pytest.mark.rule("DF-002", "DF-001")
def test_a_private_copy_leaves_the_page_clean(task, disk, look):
    fd, start = disk(4, flags=PRIVATE)
    task.write(start + PAGE, b"mine")
    entries, flags, _ = look(task, start, 4)
    assert flags.has(PageFlag.ANON)[1]
    assert not entries.file[1]
    assert task.pread(fd, 4, PAGE) == b"rule"
    assert task.process.smaps(start, start + PAGE)[0].counters["Private_Dirty"] == PAGE


@pytest.mark.rule("DF-003")
def test_fault_around_leaves_marked_pages_alone(task, disk, area, look):
    fd, start = disk(16)
    task.touch(start, 8 * PAGE, write=False)
    task.touch(start + 3 * PAGE, PAGE, write=True)
    task.madvise(start + 3 * PAGE, PAGE, Madvise.PAGEOUT)
    other = area(16, flags=SHARED, fd=fd)
    task.touch(other, PAGE, write=False)
    assert np.flatnonzero(look(task, other, 16)[0].present).tolist() == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.rule("DF-003")
@pytest.mark.parametrize(("pages", "mapped"), [(1, []), (2, [0, 1])])
def test_fault_around_behind_the_end(task, disk, area, look, pages, mapped):
    fd, start = disk(pages)
    task.touch(start, pages * PAGE, write=False)
    other = area(8, flags=SHARED, fd=fd)
    with pytest.raises(AddressSpaceFault):
        task.touch(other + 4 * PAGE, PAGE, write=False)
    assert np.flatnonzero(look(task, other, 8)[0].present).tolist() == mapped


@pytest.mark.rule("DF-004")
@pytest.mark.parametrize("way", ["fsync", "sync", "msync"])
def test_writing_back(task, disk, area, look, way):
    fd, start = disk(8)
    other = area(8, flags=SHARED, fd=fd)
    task.touch(start, 4 * PAGE, write=True)
    task.touch(other, 4 * PAGE, write=True)
    smaps = task.process.smaps(start, start + PAGE)[0].counters
    assert (smaps["Shared_Dirty"], smaps["Shared_Clean"]) == (4 * PAGE, 0)
    if way == "msync":
        task.msync(start + PAGE, 2 * PAGE, 4)
        clean = [False, True, True, False]
    else:
        task.fsync(fd) if way == "fsync" else task.sync()
        clean = [True] * 4
    entries, flags, counts = look(task, start, 4)
    assert (~flags.has(DIRTY)).tolist() == clean
    assert flags.has(BUFFERS | ON_DISK).all()
    assert entries.present.all()
    assert counts.tolist() == [2] * 4
    smaps = task.process.smaps(start, start + PAGE)[0].counters
    assert smaps["Shared_Clean"] == sum(clean) * PAGE
    # Read-only again: the next write is told, through either mapping.
    task.touch(other + PAGE, PAGE, write=True)
    assert look(task, start, 4)[1].has(DIRTY)[1]


@pytest.mark.rule("DF-004")
def test_what_lies_behind_the_end_becomes_zeros(task, disk):
    fd, start = disk(2)
    task.ftruncate(fd, PAGE + 100)
    task.write(start + PAGE + 98, b"abcd")
    task.fsync(fd)
    assert task.read(start + PAGE + 98, 4) == b"ab\0\0"


@pytest.mark.rule("DF-005")
def test_write_to_a_disk(task, disk, look):
    fd, start = disk(4)
    task.pwrite(fd, b"hello", PAGE + 2)
    task.touch(start, 2 * PAGE, write=False)
    flags = look(task, start, 2)[1]
    assert flags.has(DIRTY | BUFFERS | PageFlag.UPTODATE)[1]
    assert not flags.any(ON_DISK | PageFlag.REFERENCED | ACTIVE)[1]
    assert task.read(start + PAGE, 9) == b"ruhello\0\0"
    task.pwrite(fd, b"again", 2)
    flags = look(task, start, 1)[1]
    assert flags.has(DIRTY | BUFFERS | ON_DISK)[0]
    assert not flags.any(PageFlag.REFERENCED | ACTIVE)[0]


@pytest.mark.rule("DF-005", "DF-008")
def test_a_write_behind_the_end_zeroes_both_blocks_in_part(task, disk, area, look):
    fd, _ = disk(2)
    task.ftruncate(fd, PAGE + 100)
    task.fsync(fd)
    task.fadvise(fd, 0, 0, DONTNEED)
    task.pwrite(fd, b"x", 4 * PAGE + 7)
    start = area(8, flags=SHARED, fd=fd)
    task.touch(start, 5 * PAGE, write=False)
    flags = look(task, start, 5)[1]
    assert flags.has(DIRTY | BUFFERS | PageFlag.REFERENCED).tolist() == [False, True, False, False, True]


@pytest.mark.rule("DF-006")
def test_read_from_a_disk(task, disk, look):
    fd, start = disk(8)
    assert task.pread(fd, 8, 0) == b"rule:0\n\0"
    task.pread(fd, 10, 8)  # where the last one ended: no access
    task.pread(fd, PAGE, PAGE)
    task.pread(fd, 10, 0)
    task.pread(fd, 4, 2 * PAGE)
    task.touch(start, PAGE, write=False)
    flags = look(task, start, 3)[1]
    assert flags.has(ACTIVE).tolist() == [True, False, False]
    assert flags.has(PageFlag.REFERENCED).tolist() == [False, True, True]
    task.ftruncate(fd, 10 * PAGE)
    assert task.pread(fd, 4, 9 * PAGE) == bytes(4)
    assert refused(task.lseek, fd, 9 * PAGE, DATA) == Errno.ENXIO


@pytest.mark.rule("DF-007")
def test_where_a_disk_has_data(task, disk, area):
    fd, _ = disk(4)
    task.fallocate(fd, 0, 8 * PAGE, 4 * PAGE)
    assert refused(task.lseek, fd, 4 * PAGE, DATA) == Errno.ENXIO
    start = area(12, flags=SHARED, fd=fd)
    task.touch(start + 9 * PAGE, PAGE, write=False)  # set aside, and cached now
    task.touch(start + 5 * PAGE, PAGE, write=False)  # a hole
    assert task.lseek(fd, 4 * PAGE, DATA) == 9 * PAGE
    assert task.lseek(fd, 9 * PAGE, HOLE) == 10 * PAGE
    task.touch(start + 10 * PAGE, PAGE, write=True)
    task.fsync(fd)
    task.fallocate(fd, 3, PAGE, PAGE)
    assert [task.lseek(fd, page * PAGE, HOLE) // PAGE for page in (0, 1, 2, 9)] == [1, 1, 4, 11]
    assert task.lseek(fd, PAGE, DATA) == 2 * PAGE


@pytest.mark.rule("DF-008")
def test_part_of_a_block_by_way_of_the_cache(task, disk, look):
    fd, start = disk(8)
    task.ftruncate(fd, 5 * PAGE + 100)
    assert not task.mincore(start, 8 * PAGE).any()  # there, and not up to date
    assert task.read(start + 5 * PAGE, 8) == b"rule:5\n\0"
    flags = look(task, start, 6)[1]
    assert flags.has(DIRTY | BUFFERS | ON_DISK | PageFlag.REFERENCED)[5]
    task.fallocate(fd, 3, PAGE - 10, 2 * PAGE + 20)
    task.touch(start, 4 * PAGE, write=False)
    flags = look(task, start, 4)[1]
    assert flags.has(DIRTY | BUFFERS).tolist() == [True, False, False, True]
    assert task.lseek(fd, PAGE, DATA) == 3 * PAGE
    # It had buffers: not mapped to disk any more. A hole is not dirty.
    task.fallocate(fd, 3, 5, 5)
    task.fallocate(fd, 3, PAGE + 5, 5)
    task.touch(start, 4 * PAGE, write=False)
    flags = look(task, start, 4)[1]
    assert flags.has(ON_DISK).tolist() == [False, False, False, True]
    assert flags.has(BUFFERS).tolist() == [True, True, False, True]
    assert not flags.any(DIRTY)[1]
    assert task.read(start, 12) == b"rule:\0\0\0\0\0\0\0"


@pytest.mark.rule("DF-009")
def test_dropping_the_cache(task, disk, bench, look):
    fd, start = disk(8)
    task.pread(fd, 8 * PAGE, 0)
    task.touch(start + 2 * PAGE, 8, write=False)
    task.munmap(start, 8 * PAGE)
    start = task.mmap(8 * PAGE, addr=start, flags=SHARED | 0x100000, fd=fd)
    task.touch(start + 2 * PAGE, 8, write=True)
    assert task.mincore(start, 8 * PAGE).all()
    task.fsync(fd)
    task.fadvise(fd, 0, 5 * PAGE + 10, DONTNEED)
    assert task.mincore(start, 8 * PAGE).astype(int).tolist() == [0, 0, 1, 0, 0, 1, 1, 1]
    task.pwrite(fd, b"x", 7 * PAGE)
    bench.drop_caches()
    assert task.mincore(start, 8 * PAGE).astype(int).tolist() == [0, 0, 1, 0, 0, 0, 0, 1]
    assert look(task, start, 8)[1].has(BUFFERS)[2]


@pytest.mark.rule("DF-009", "DF-010")
def test_dropping_forgets_what_was_reclaimed(task, disk, look):
    fd, start = disk(8)
    task.touch(start, 4 * PAGE, write=False)
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
    assert not task.mincore(start, 4 * PAGE).any()
    task.fadvise(fd, 0, 2 * PAGE, DONTNEED)
    task.pwrite(fd, b"x", 2 * PAGE)
    task.touch(start, 4 * PAGE, write=False)
    flags = look(task, start, 4)[1]
    assert flags.has(ACTIVE).tolist() == [False, False, False, True]
    assert flags.has(ON_DISK).tolist() == [True, True, False, True]


@pytest.mark.rule("DF-011", "DF-012")
def test_reclaiming_a_dirty_page(task, disk, area, look):
    fd, start = disk(8)
    task.touch(start, 4 * PAGE, write=False)
    task.touch(start + PAGE, 2 * PAGE, write=True)
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
    assert task.mincore(start, 4 * PAGE).astype(int).tolist() == [0, 1, 1, 0]
    assert not look(task, start, 4)[0].present.any()
    task.touch(start + PAGE, 2 * PAGE, write=False)
    assert look(task, start, 4)[1].has(DIRTY | RECLAIM | ACTIVE).tolist() == [False, True, True, False]
    task.pwrite(fd, b"x", PAGE)  # leaves the mark
    task.touch(start + 2 * PAGE, PAGE, write=True)  # takes it off
    flags = look(task, start, 4)[1]
    assert flags.has(RECLAIM).tolist() == [False, True, False, False]
    task.fsync(fd)
    flags = look(task, start, 4)[1]
    assert not flags.any(RECLAIM | DIRTY).any()
    assert flags.has(ACTIVE).tolist() == [False, False, True, False]


@pytest.mark.rule("DF-013")
def test_userfaultfd_over_a_disk(task, disk, look, needs):
    needs("uffd.wp_async")
    fd, start = disk(4)
    plain = task.userfaultfd(UffdFeature.PAGEFAULT_FLAG_WP)
    assert refused(task.uffd_register, plain, start, 4 * PAGE, 2) == Errno.EINVAL
    watched = task.userfaultfd(UffdFeature.WP_ASYNC)
    assert refused(task.uffd_register, watched, start, 4 * PAGE, 1) == Errno.EINVAL
    assert refused(task.uffd_unregister, watched, start, 4 * PAGE) == Errno.EINVAL
    task.touch(start, PAGE, write=True)
    task.uffd_register(watched, start, 4 * PAGE, 2)
    task.uffd_writeprotect(watched, start, 4 * PAGE, protect=True)
    assert look(task, start, 4)[0].uffd_wp.all()
    task.touch(start, 2 * PAGE, write=True)
    entries, flags, _ = look(task, start, 4)
    assert entries.uffd_wp.tolist() == [False, False, True, True]
    assert flags.has(DIRTY | BUFFERS).tolist() == [True, True, False, False]
    task.fsync(fd)
    assert not look(task, start, 2)[1].any(DIRTY).any()
    task.uffd_unregister(watched, start, 4 * PAGE)


@pytest.mark.rule("DF-014")
def test_advice_to_a_mapping_of_a_disk(task, disk, look):
    _, start = disk(8)
    task.madvise(start + PAGE, 3 * PAGE, Madvise.WILLNEED)
    assert not look(task, start, 8)[0].present.any()
    assert task.mincore(start, 8 * PAGE).astype(int).tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert refused(task.madvise, start, 8 * PAGE, Madvise.COLLAPSE) == Errno.EINVAL
    assert refused(task.madvise, start, PAGE, Madvise.FREE) == Errno.EINVAL


@pytest.mark.rule("DF-015", "FM-006")
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_hole_in_the_first_page_unmaps_what_follows(task, disk, area, look, where):
    if where == "disk":
        fd, start = disk(6)
    else:
        fd = task.memfd_create("rule")
        task.ftruncate(fd, 6 * PAGE)
        start = area(6, flags=SHARED, fd=fd)
    copies = area(6, flags=PRIVATE, fd=fd)
    task.touch(start, 6 * PAGE, write=True)
    task.touch(copies + 2 * PAGE, PAGE, write=True)
    task.touch(copies + 3 * PAGE, PAGE, write=False)
    task.fallocate(fd, 3, 5, 5)
    assert look(task, start, 6)[0].present.tolist() == [True] + [False] * 5
    assert np.flatnonzero(look(task, copies, 6)[0].present).tolist() == [0, 2]
    assert task.mincore(start, 6 * PAGE).all()
    task.fallocate(fd, 3, 0, 5)
    assert not look(task, start, 6)[0].present.any()
    task.touch(start, 6 * PAGE, write=False)
    task.fallocate(fd, 3, PAGE, 5)
    assert look(task, start, 6)[0].present.all()


@pytest.mark.rule("DF-017")
def test_reading_around_a_fault(task, disk, bench, look):
    _, start = disk(100, ahead=32)
    task.touch(start + 40 * PAGE, PAGE, write=False)
    assert cached(bench, task, start, 100) == list(range(24, 56))
    assert np.flatnonzero(look(task, start, 100)[0].present).tolist() == list(range(32, 48))
    task.touch(start + 90 * PAGE, PAGE, write=True)
    assert cached(bench, task, start, 100) == [*range(24, 56), *range(74, 100)]
    entries = look(task, start, 100)[0]
    assert np.flatnonzero(entries.present).tolist() == [*range(32, 48), 90]


@pytest.mark.rule("DF-017")
@pytest.mark.parametrize(
    ("advice", "expected"),
    [
        (Madvise.RANDOM, [600]),
        (Madvise.SEQUENTIAL, [*range(600, 616)]),
        (Madvise.HUGEPAGE, [*range(512, 1300)]),
    ],
)
def test_advice_says_how_far_a_fault_reads(task, disk, bench, advice, expected):
    _, start = disk(1300, ahead=16)
    task.madvise(start, 1300 * PAGE, advice)
    task.touch(start + 600 * PAGE, PAGE, write=False)
    assert cached(bench, task, start, 1300) == expected


@pytest.mark.rule("DF-018")
def test_the_next_window(task, disk, bench, look):
    _, start = disk(200, ahead=32)
    task.touch(start + 40 * PAGE, PAGE, write=False)
    task.touch(start + 48 * PAGE, PAGE, write=False)  # marked: the last quarter of 24 to 55 begins there
    entries, flags, _ = look(task, start, 200)
    there = [
        *range(32, 56),
        *(range(57, 64) if bench.disk_kind == "compressed" else ()),
    ]  # 56 is the next that is marked
    assert np.flatnonzero(entries.present).tolist() == there
    assert not flags.any(RECLAIM).any()
    assert cached(bench, task, start, 200) == list(range(24, 88))
    task.touch(start + 57 * PAGE, PAGE, write=False)
    assert np.flatnonzero(look(task, start, 200)[0].present).tolist() == [*range(32, 56), *range(57, 64)]


@pytest.mark.rule("DF-019")
def test_read_reads_ahead(task, disk, bench, needs):
    needs("disk.readahead_ends_aligned")
    fd, start = disk(200, ahead=32)
    seen = []
    for offset, length in ((0, 10), (PAGE, 10), (50 * PAGE, PAGE), (51 * PAGE, PAGE), (52 * PAGE, 3 * PAGE)):
        before = set(cached(bench, task, start, 200))
        task.pread(fd, length, offset)
        more = sorted(set(cached(bench, task, start, 200)) - before)
        seen.append((more[0], more[-1], len(more)) if more else None)
    assert seen == [(0, 3, 4), (4, 11, 8), (50, 50, 1), (51, 54, 4), (55, 59, 5)]
    task.fadvise(fd, 0, 0, 1)
    task.pread(fd, 3 * PAGE, 100 * PAGE)
    assert cached(bench, task, start, 200)[-3:] == [100, 101, 102]
    task.fadvise(fd, 0, 0, 0)
    task.fadvise(fd, 0, 0, 2)
    task.touch(start + 150 * PAGE, PAGE, write=False)
    assert cached(bench, task, start, 200)[-64:] == list(range(118, 182))


@pytest.mark.rule("DF-014")
def test_will_need_reads_as_much_as_one_request_takes(task, disk, bench):
    _, start = disk(800)
    task.madvise(start + 5 * PAGE, 700 * PAGE, Madvise.WILLNEED)
    request = {"compressed": 31, "disk": 320}[bench.disk_kind]
    assert cached(bench, task, start, 800) == list(range(5, 5 + request))


@pytest.mark.rule("AC-017")
def test_a_build_id_is_asked_by_reading_the_file(bench, task, disk, look):
    """The first page is in the cache then, and referenced; once, as by one reader. A refusal before reads nothing."""
    if not bench.kernel.profile.has("maps.procmap_query"):
        pytest.skip("the running kernel has no PROCMAP_QUERY")
    _fd, start = disk(4)
    with pytest.raises(SyscallError) as refused:
        task.process.query_maps(MapQuery(address=start + PAGE, name_room=1, build_id_room=20))
    assert refused.value.errno == errno.ENAMETOOLONG
    assert cached(bench, task, start, 4) == []
    for room, there in ((0, []), (1, [0])):
        found = task.process.query_maps(MapQuery(address=start + PAGE, build_id_room=room))
        assert found.build_id_size == 0
        assert cached(bench, task, start, 4) == there
    task.process.query_maps(MapQuery(address=start, build_id_room=20))
    task.touch(start, PAGE, write=False)
    flags = look(task, start, 1)[1]
    assert flags.has(PageFlag.REFERENCED | PageFlag.UPTODATE).all()
    assert not flags.any(PageFlag.ACTIVE).any()
