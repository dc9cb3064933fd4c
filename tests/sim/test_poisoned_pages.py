"""What becomes of poisoned pages by what they are: shared memory, merged, in the swap cache, hugetlb, the zero page."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from pmcore.errors import AddressSpaceFault, NotModelled, SyscallError
from pmcore.pagemap import PagemapEntry
from pmcore.profile import preset
from pmcore.protocols import FrameFile
from pmcore.registry import open_workbench
from pmcore.scan.request import ScanRequest
from pmcore.uapi import PM_PFRAME_MASK, Errno, Madvise, PageCategory, PageFlag, UffdFeature

PAGE, PMD = 4096, 2 << 20
POISON, AWAY = Madvise.HWPOISON, Madvise.SOFT_OFFLINE
SHARED, PRIVATE = 1, 2


def sim(**options):
    return open_workbench("sim", **{"memory": "64 MiB", "kernel": "6.12", **options})


def words(task, start, pages=1):
    return task.process.pagemap(start, start + pages * PAGE).values


def pfn(task, addr):
    return int(words(task, addr)[0]) & PM_PFRAME_MASK


def flags(machine, frame):
    return int(machine.frames_at(FrameFile.KPAGEFLAGS, np.array([frame], dtype=np.uint64))[0])


def meminfo(machine, name):
    lines = machine.pread("meminfo", 0, 1 << 16).decode().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def refused(call, *arguments, **named):
    with pytest.raises(SyscallError) as caught:
        call(*arguments, **named)
    return caught.value.errno


def told(call, *arguments, **named):
    """The address and the bits that say nothing of the SIGBUS that the call ends with."""
    with pytest.raises(AddressSpaceFault) as caught:
        call(*arguments, **named)
    assert caught.value.signal == "SIGBUS"
    return caught.value.address, caught.value.lsb


def memfd(machine, pages=8):
    task = machine.spawn()
    fd = task.memfd_create("m")
    task.ftruncate(fd, pages * PAGE)
    start = task.mmap(pages * PAGE, flags=SHARED, fd=fd)
    task.touch(start, pages * PAGE)
    return task, fd, start


@pytest.mark.rule("HW-008")
def test_shared_memory_keeps_its_poisoned_page():
    machine = sim()
    task, fd, start = memfd(machine)
    task.write(start + PAGE, b"next")
    other = machine.spawn()
    frame = pfn(task, start + 2 * PAGE)
    assert told(task.madvise, start + 2 * PAGE, PAGE, POISON) == (start + 2 * PAGE, 12)
    entry = PagemapEntry(int(words(task, start + 2 * PAGE)[0]))
    assert (entry.swapped, entry.file, entry.present) == (True, True, False)
    assert flags(machine, frame) & int(PageFlag.HWPOISON | PageFlag.LRU) == PageFlag.HWPOISON
    child = task.fork()
    child.touch(start, 2 * PAGE, write=False)  # and what lies around, but for that page
    assert not words(child, start + 2 * PAGE)[0] & np.uint64(1 << 63 | 1 << 62)
    assert told(child.touch, start + 2 * PAGE + 5, 1) == (start + 2 * PAGE + 5, 12)
    assert refused(task.pread, fd, 4, 2 * PAGE) == errno.EIO
    assert task.pread(fd, 2 * PAGE, PAGE) == b"next" + bytes(PAGE - 4)
    assert refused(task.pwrite, fd, b"x", 2 * PAGE) == errno.EIO
    assert task.pwrite(fd, b"0123456789", 2 * PAGE - 4) == 4
    scanned = task.process.pagemap_scan(
        ScanRequest(start=start + 2 * PAGE, end=start + 3 * PAGE, vec_len=2, return_mask=0x7F)
    )
    assert scanned.regions["categories"][0] == (
        PageCategory.SWAPPED | PageCategory.WRITTEN | PageCategory.FILE
    )
    machine.check()
    # A hole makes room, and leaves the entries; truncation empties them.
    task.fallocate(fd, 3, 2 * PAGE, PAGE)
    child.touch(start + 2 * PAGE, PAGE)
    assert told(task.touch, start + 2 * PAGE, PAGE) == (start + 2 * PAGE, 12)
    task.ftruncate(fd, PAGE)
    task.ftruncate(fd, 8 * PAGE)
    task.touch(start, 8 * PAGE)
    assert meminfo(machine, "HardwareCorrupted") == 4
    assert flags(machine, frame) & int(PageFlag.HWPOISON | PageFlag.DIRTY) == PageFlag.HWPOISON
    other.exit()
    machine.check()


@pytest.mark.rule("HW-008")
def test_clean_shared_pages_are_lost_silently_and_the_first_mapping_is_told_of():
    machine = sim()
    task = machine.spawn()
    fd = task.memfd_create("m")
    task.ftruncate(fd, 8 * PAGE)
    part = task.mmap(4 * PAGE, flags=SHARED, fd=fd, offset=2 * PAGE)
    whole = task.mmap(8 * PAGE, flags=SHARED, fd=fd)
    task.madvise(part, PAGE, POISON)  # faulted in, and never written
    assert told(task.touch, part, 1, write=False) == (part, 12)
    task.write(part + PAGE, b"x")
    assert told(task.madvise, part + PAGE, PAGE, POISON) == (whole + 3 * PAGE, 12)
    machine.check()


@pytest.mark.rule("HW-008")
def test_userfaultfd_does_not_continue_a_poisoned_page():
    machine = sim()
    task, fd, start = memfd(machine)
    again = task.mmap(8 * PAGE, flags=SHARED, fd=fd)
    told(task.madvise, start, PAGE, POISON)
    watch = task.userfaultfd(UffdFeature.SIGBUS | UffdFeature.MINOR_SHMEM)
    task.uffd_register(watch, again, 8 * PAGE, 4)
    assert refused(task.uffd_continue, watch, again, PAGE) == errno.EIO
    task.uffd_continue(watch, again + PAGE, PAGE)
    machine.check()


@pytest.mark.rule("HW-008", "HW-011", "HW-009")
def test_older_kernels_are_not_modelled():
    for kernel in ("5.15", "6.1"):
        profile = preset(kernel, config=["CONFIG_MEMORY_FAILURE"])
        machine = sim(kernel=profile, hugepages={"2 MiB": 2})
        task, _, start = memfd(machine)
        if kernel == "5.15":
            with pytest.raises(NotModelled):
                task.madvise(start, 2 * PAGE, POISON)
        huge = task.mmap(PMD, flags=0x40021)
        task.touch(huge, PAGE)
        with pytest.raises(NotModelled):
            task.madvise(huge, PAGE, POISON)
        same = task.mmap(2 * PAGE)
        task.madvise(same, 2 * PAGE, Madvise.MERGEABLE)
        for page in range(2):
            task.write(same + page * PAGE, b"same")
        machine.ksm_scan(2)
        with pytest.raises(NotModelled):
            task.madvise(same, PAGE, POISON)


@pytest.mark.rule("HW-009")
def test_merged_pages():
    machine = sim()
    task = machine.spawn()
    start = task.mmap(6 * PAGE)
    task.madvise(start, 6 * PAGE, Madvise.MERGEABLE)
    for page in range(6):
        task.write(start + page * PAGE, b"same")
    machine.ksm_scan(2)
    child = task.fork()
    assert told(task.madvise, start + PAGE, PAGE, POISON) == (start + 5 * PAGE, 12)
    for who in (task, child):
        for page in range(6):
            assert told(who.read, start + page * PAGE, 1) == (start + page * PAGE, 12)
    machine.check()
    task.madvise(start, 6 * PAGE, Madvise.DONTNEED)
    for page in range(6):
        task.write(start + page * PAGE, b"same")
    with pytest.raises(NotModelled):  # seen before, and equal: the kernel merges it with what is poisoned
        machine.ksm_scan(1)


@pytest.mark.rule("HW-009")
def test_the_next_scan_forgets_a_poisoned_merged_page():
    machine = sim()
    task = machine.spawn()
    start = task.mmap(6 * PAGE)
    task.madvise(start, 6 * PAGE, Madvise.MERGEABLE)
    for page in range(2, 6):
        task.write(start + page * PAGE, b"same")
    machine.ksm_scan(2)
    told(task.madvise, start + 3 * PAGE, PAGE, POISON)
    assert machine.ksm_scan(1)["pages_shared"] == 0
    for page in range(2):
        task.write(start + page * PAGE, b"same")
    assert machine.ksm_scan(2)["pages_sharing"] == 1
    assert task.read(start, 4) == b"same"
    machine.check()


def cached(machine, write):
    """A task with eight pages in swap that have been read back into the swap cache, the third one written perhaps."""
    task = machine.spawn()
    start = task.mmap(8 * PAGE)
    for page in range(8):
        task.write(start + page * PAGE, b"data")
    task.madvise(start, 8 * PAGE, Madvise.PAGEOUT)
    task.touch(start, 4 * PAGE, write=False)
    if write:
        task.touch(start + 2 * PAGE, PAGE)
    assert flags(machine, pfn(task, start + 2 * PAGE)) & PageFlag.SWAPCACHE
    return task, start


DEVICE = {"swap": "16 MiB", "swap_kind": "device"}


@pytest.mark.rule("HW-010")
def test_clean_pages_of_the_swap_cache_are_lost_without_harm():
    machine = sim(**DEVICE)
    task, start = cached(machine, write=False)
    frame = pfn(task, start + 2 * PAGE)
    task.madvise(start + 2 * PAGE, PAGE, POISON)
    assert PagemapEntry(int(words(task, start + 2 * PAGE)[0])).swapped
    assert flags(machine, frame) & int(PageFlag.SWAPCACHE | PageFlag.HWPOISON) == PageFlag.HWPOISON
    machine.check()
    assert task.read(start + 2 * PAGE, 4) == b"data"
    task.madvise(start + 6 * PAGE, PAGE, POISON)  # read back for it
    assert task.read(start + 6 * PAGE, 4) == b"data"
    assert meminfo(machine, "HardwareCorrupted") == 8
    task.exit()
    machine.unpoison(np.array([frame], dtype=np.uint64))
    machine.check()


@pytest.mark.rule("HW-010", "HW-015", "HW-012")
def test_dirty_pages_of_the_swap_cache_wait_for_who_accesses_them():
    machine = sim(**DEVICE)
    task, start = cached(machine, write=True)
    frame = pfn(task, start + 2 * PAGE)
    assert told(task.madvise, start + 2 * PAGE, PAGE, POISON) == (start + 2 * PAGE, 12)
    child = task.fork()
    for who in (task, child):
        assert told(who.touch, start + 2 * PAGE, 1, write=False) == (start + 2 * PAGE, 12)
    assert task.mincore(start, 4 * PAGE).tolist() == [True, True, False, True]
    assert refused(task.madvise, start, 4 * PAGE, Madvise.POPULATE_READ) == Errno.EHWPOISON
    assert not flags(machine, frame) & (PageFlag.DIRTY | PageFlag.UPTODATE)
    assert refused(machine.unpoison, np.array([frame], dtype=np.uint64)) == errno.EBUSY
    machine.check()
    machine.swapoff(0)
    for who in (task, child):
        assert int(words(who, start + 2 * PAGE)[0]) & PM_PFRAME_MASK == 27 | frame << 5
    machine.check()
    task.exit()
    child.exit()
    assert flags(machine, frame) & PageFlag.HWPOISON
    machine.check()


@pytest.mark.rule("HW-010")
def test_a_slot_that_nobody_names_any_more_gives_no_poisoned_frame_back():
    machine = sim(**DEVICE)
    task, start = cached(machine, write=True)
    frame, free = pfn(task, start + 2 * PAGE), machine.core.memory.free_total
    told(task.madvise, start + 2 * PAGE, PAGE, POISON)
    task.madvise(start + 2 * PAGE, PAGE, Madvise.DONTNEED)
    assert machine.core.memory.free_total == free
    assert flags(machine, frame) & int(PageFlag.HWPOISON | PageFlag.SWAPCACHE) == PageFlag.HWPOISON
    machine.check()


@pytest.mark.rule("HW-015")
@pytest.mark.parametrize("swapped", [False, True])
def test_a_block_with_a_poisoned_page_is_not_collapsed(swapped):
    machine = sim(**DEVICE)
    task = machine.spawn()
    start = (task.mmap(2 * PMD) + PMD - 1) & -PMD
    task.touch(start, PMD)
    if swapped:
        task.madvise(start + 9 * PAGE, PAGE, Madvise.PAGEOUT)
        task.touch(start + 9 * PAGE, PAGE, write=False)
        task.touch(start + 9 * PAGE, PAGE)
    told(task.madvise, start + 9 * PAGE, PAGE, POISON)
    assert refused(task.madvise, start, PMD, Madvise.COLLAPSE) == errno.EINVAL
    machine.check()
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    machine.khugepaged.step()
    assert machine.counters["collapse"] == 0
    task.madvise(start + 9 * PAGE, PAGE, Madvise.DONTNEED)
    task.madvise(start, PMD, Madvise.COLLAPSE)
    assert machine.counters["collapse"] == 1
    machine.check()


@pytest.mark.rule("HW-012")
def test_the_zero_page():
    machine = sim()
    task = machine.spawn()
    start = task.mmap(8 * PAGE)
    assert refused(task.madvise, start + PAGE, PAGE, AWAY) == errno.EIO
    assert refused(task.madvise, start + 2 * PAGE, PAGE, POISON) == errno.EBUSY
    assert meminfo(machine, "HardwareCorrupted") == 4
    zero = pfn(task, start + 2 * PAGE)
    assert flags(machine, zero) & int(PageFlag.HWPOISON | PageFlag.ZERO_PAGE) == (
        PageFlag.HWPOISON | PageFlag.ZERO_PAGE
    )
    assert task.read(start + 2 * PAGE, 2) == bytes(2)
    assert told(task.madvise, start + 3 * PAGE, PAGE, POISON) == (start + PAGE, 12)
    assert meminfo(machine, "HardwareCorrupted") == 4
    task.madvise(start + 3 * PAGE, PAGE, AWAY)
    assert refused(machine.unpoison, np.array([zero], dtype=np.uint64)) == errno.EBUSY
    machine.check()


@pytest.mark.rule("HW-012")
def test_the_huge_zero_page():
    machine = sim()
    task = machine.spawn()
    start = (task.mmap(2 * PMD) + PMD - 1) & -PMD
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    task.touch(start, PAGE, write=False)
    assert refused(task.madvise, start + 3 * PAGE, PAGE, POISON) == Errno.EHWPOISON
    frame = pfn(task, start + 3 * PAGE)
    assert [bool(flags(machine, frame + way) & PageFlag.HWPOISON) for way in (-1, 0, 1)] == [0, 1, 0]
    assert told(task.madvise, start + 3 * PAGE, PAGE, POISON) == (start + 3 * PAGE, 12)
    assert refused(task.madvise, start + 4 * PAGE, PAGE, AWAY) == errno.EIO
    assert refused(machine.unpoison, np.array([frame], dtype=np.uint64)) == errno.EOPNOTSUPP
    machine.check()


@pytest.mark.rule("HW-004")
def test_a_range_reaches_one_page_of_each_huge_page():
    machine = sim()
    task = machine.spawn()
    start = (task.mmap(4 * PMD) + PMD - 1) & -PMD
    task.madvise(start, 2 * PMD, Madvise.HUGEPAGE)
    task.touch(start, 2 * PMD)
    assert told(task.madvise, start + 5 * PAGE, PMD // 2, POISON) == (start + 5 * PAGE, 12)
    assert machine.counters["memory_failure"] == 1
    task.touch(start + 6 * PAGE, PAGE)
    assert told(task.madvise, start + 6 * PAGE, PAGE, POISON)[0] == start + 6 * PAGE
    machine.check()


@pytest.mark.rule("HW-001", "HW-002")
def test_ranges_go_in_one_piece_up_to_what_cannot_be_had():
    machine = sim()
    task = machine.spawn()
    start = task.mmap(64 * PAGE)
    task.touch(start, 40 * PAGE)
    task.madvise(start + 3 * PAGE, 2 * PAGE, Madvise.FREE)  # clean: not told of
    task.mprotect(start + 20 * PAGE, PAGE, 0)
    assert told(task.madvise, start + 3 * PAGE, 37 * PAGE, POISON) == (start + 5 * PAGE, 12)
    assert machine.counters["memory_failure"] == 17
    assert refused(task.madvise, start + 3 * PAGE, 37 * PAGE, POISON) == errno.EFAULT
    assert refused(task.madvise, start + 19 * PAGE, PAGE, AWAY) == errno.EFAULT
    task.madvise(start + 21 * PAGE, 19 * PAGE, AWAY)
    assert machine.counters["soft_offline"] == 19
    task.touch(start + 21 * PAGE, 19 * PAGE)
    machine.check()


def hugetlb(**options):
    machine = sim(hugepages={"2 MiB": (4, 1)}, **options)
    return machine, machine.spawn()


def pool(machine):
    return meminfo(machine, "HugePages_Total"), meminfo(machine, "HugePages_Free")


@pytest.mark.rule("HW-011")
def test_an_anonymous_hugetlb_page_leaves_its_pool():
    machine, task = hugetlb()
    start = task.mmap(2 * PMD, flags=0x40022)
    task.touch(start, 2 * PMD)
    child = task.fork()
    frame, free = pfn(task, start + 5 * PAGE), machine.core.memory.free_total
    assert told(task.madvise, start + 5 * PAGE, 512 * PAGE, POISON) == (start + 5 * PAGE, 21)
    assert pool(machine) == (3, 2)
    assert machine.core.memory.free_total == free + 511
    assert flags(machine, frame) == PageFlag.HWPOISON
    assert meminfo(machine, "HardwareCorrupted") == 4
    assert not (words(task, start, 512) & np.uint64(1 << 63 | 1 << 62)).any()
    grandchild = child.fork()
    for who in (task, child, grandchild):
        assert told(who.touch, start + 9 * PAGE, 1) == (start + 9 * PAGE, 21)
        assert who.mincore(start, PMD).all()
        assert who.process.smaps(start, start + 1)[0].counters["Shared_Hugetlb"] >= PMD
    scanned = task.process.pagemap_scan(
        ScanRequest(start=start, end=start + PMD, vec_len=2, return_mask=0x7F)
    )
    assert scanned.regions["categories"][0] == (
        PageCategory.SWAPPED | PageCategory.WRITTEN | PageCategory.HUGE
    )
    assert refused(task.madvise, start, PAGE, POISON) == errno.EFAULT
    machine.check()
    task.madvise(start, PMD, Madvise.DONTNEED_LOCKED)
    task.touch(start, PAGE)
    moved = child.mremap(start, PMD, PMD, flags=3, new_addr=start + (1 << 30))
    assert told(child.read, moved, 1) == (moved, 21)
    machine.check()
    for who in (task, child, grandchild):
        who.exit()
    assert pool(machine) == (3, 3)
    machine.unpoison(np.array([frame], dtype=np.uint64))
    machine.check()


@pytest.mark.rule("HW-011", "HW-012")
def test_a_huge_page_of_a_file_stays_the_files():
    machine, task = hugetlb()
    fd = task.memfd_create("h", flags=4)
    start = task.mmap(2 * PMD, flags=SHARED, fd=fd)
    task.write(start, b"abc")
    head = pfn(task, start)
    assert told(task.madvise, start + 3 * PAGE, PAGE, POISON) == (start + 3 * PAGE, 21)
    assert (pool(machine), meminfo(machine, "HardwareCorrupted")) == ((4, 3), 4)
    assert all(flags(machine, head + page) & PageFlag.HWPOISON for page in (0, 3, 511))
    assert task.pread(fd, 4, 0) == b"abc\0"
    assert task.pread(fd, 4 * PAGE, 2 * PAGE) == bytes(PAGE)
    assert refused(task.pread, fd, 4, 3 * PAGE) == errno.EIO
    child = task.fork()
    assert told(child.touch, start, 1) == (start, 21)
    assert refused(machine.unpoison, np.array([head], dtype=np.uint64)) == errno.EBUSY
    watch = task.userfaultfd(UffdFeature.WP_ASYNC)
    task.uffd_register(watch, start, 2 * PMD, 2)
    task.uffd_writeprotect(watch, start, 2 * PMD, protect=True)
    task.uffd_writeprotect(watch, start, 2 * PMD, protect=False)
    assert told(task.touch, start, 1) == (start, 21)
    state = machine.checkpoint()
    machine.check()
    task.fallocate(fd, 3, 0, PMD)
    task.touch(start, PAGE)
    assert pool(machine) == (4, 2)  # one is nobody's any more
    machine.check()
    task.exit()
    child.exit()
    assert pool(machine) == (4, 3)
    machine.check()
    machine.restore(state)
    assert refused(task.pread, fd, 4, 3 * PAGE) == errno.EIO
    machine.check()


@pytest.mark.rule("HW-011")
def test_a_hugetlb_page_that_would_have_to_stay_in_its_pool():
    machine, task = hugetlb()
    start = task.mmap(PMD, flags=0x40022)
    task.touch(start, PAGE)
    other = machine.spawn()
    other.mmap(3 * PMD, flags=0x40022)
    third = machine.spawn().mmap(PMD, flags=0x40022)  # promised a surplus page
    assert third
    with pytest.raises(AddressSpaceFault):
        task.madvise(start, PAGE, POISON)  # that one goes
    machine.check()
    machine, task = hugetlb()
    machine.core.hugetlb.default.overcommit = 0
    start = task.mmap(PMD, flags=0x40022 | 0x4000)
    task.touch(start, PAGE)
    machine.spawn().mmap(3 * PMD, flags=0x40022)
    machine.core.hugetlb.default.reserved += 1  # as if one more were promised
    with pytest.raises(NotModelled):
        task.madvise(start, PAGE, POISON)


@pytest.mark.rule("HW-013")
@pytest.mark.parametrize("spare", [True, False])
def test_soft_offline_of_hugetlb_pages(spare):
    machine, task = hugetlb()
    start = task.mmap((2 if spare else 4) * PMD, flags=0x40022)
    task.touch(start, (2 if spare else 4) * PMD)
    task.write(start + PMD, b"here")
    frame = pfn(task, start + PMD + 7 * PAGE)
    before = pool(machine)
    task.madvise(start + PMD + 7 * PAGE, PMD // 2, AWAY)
    assert pool(machine) == ((3, 1) if spare else before)
    assert pfn(task, start + PMD + 7 * PAGE) != frame
    assert task.read(start + PMD, 4) == b"here"
    assert flags(machine, frame) == PageFlag.HWPOISON
    assert flags(machine, frame + 1) == PageFlag.BUDDY
    machine.check()
    task.exit()
    machine.check()


@pytest.mark.rule("HW-013")
def test_soft_offline_of_a_hugetlb_file_that_is_mapped_nowhere_else():
    machine, task = hugetlb()
    fd = task.memfd_create("h", flags=4)
    start = task.mmap(PMD, flags=SHARED, fd=fd)
    task.write(start, b"abc")
    task.madvise(start, PAGE, AWAY)
    task.munmap(start, PMD)
    assert task.pread(fd, 3, 0) == b"abc"
    machine.check()


@pytest.mark.rule("HW-014")
def test_memory_blocks_with_poisoned_frames():
    machine = sim(memory="64 MiB", block_size="8 MiB")
    task = machine.spawn()
    number = machine.block_size // PAGE  # frames of a block
    start = task.mmap(PAGE)
    task.touch(start, PAGE)
    frame = 5 * number + 3
    machine.hwpoison(np.array([frame], dtype=np.uint64))
    machine.offline_block(5)
    machine.check()
    assert refused(machine.online_block, 5) == Errno.EHWPOISON
    assert machine.memory_blocks()[5].state == "offline"
    fd = task.memfd_create("m")
    task.ftruncate(fd, PAGE)
    shared = task.mmap(PAGE, flags=SHARED, fd=fd)
    task.touch(shared, PAGE)
    block = pfn(task, shared) // number
    told(task.madvise, shared, PAGE, POISON)
    with pytest.raises((NotModelled, SyscallError)):
        machine.offline_block(block)
    machine.check()


@pytest.mark.rule("HW-016")
def test_clean_pages_of_a_disks_file_are_read_anew():
    machine = sim()
    task = machine.spawn()
    fd = task.open_file("f", pages=8)
    start = task.mmap(8 * PAGE, flags=SHARED, fd=fd)
    task.touch(start, 8 * PAGE, write=False)
    child = task.fork()
    child.touch(start, 8 * PAGE, write=False)
    text, frame = task.read(start + 2 * PAGE, 16), pfn(task, start + 2 * PAGE)
    task.madvise(start + 2 * PAGE, 2 * PAGE, POISON)
    for who in (task, child):
        assert not words(who, start + 2 * PAGE)[0] & np.uint64(1 << 63 | 1 << 62)
    assert flags(machine, frame) & int(PageFlag.HWPOISON | PageFlag.LRU | PageFlag.MMAP) == PageFlag.HWPOISON
    assert meminfo(machine, "HardwareCorrupted") == 8
    machine.check()
    assert child.read(start + 2 * PAGE, 16) == text
    task.write(start + 2 * PAGE, b"x")
    with pytest.raises(NotModelled):
        task.madvise(start + 2 * PAGE, PAGE, POISON)
    task.madvise(start + 2 * PAGE, PAGE, AWAY)
    task.fsync(fd)
    task.madvise(start + 2 * PAGE, PAGE, POISON)
    assert child.read(start + 2 * PAGE, 16) == b"x" + text[1:]
    machine.check()
