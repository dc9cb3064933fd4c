"""Rules PM-, KC- and AC- shown on the running kernel."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pmcore.errors import AddressSpaceFault, InvalidArgument, NotPermitted, ProcessGone
from pmcore.uapi import PageFlag

from .conftest import PAGE, PMD


@pytest.mark.rule("PM-001", "PM-014", "VM-001")
def test_fresh_mapping_and_no_mapping_read_zero(task, area):
    start = area(4)
    entries = task.process.pagemap(start - 4 * PAGE, start + 8 * PAGE)
    soft_dirty = np.uint64(1 << 55)
    assert (entries.values & ~soft_dirty).tolist() == [0] * 12
    assert entries.values[:4].tolist() == [0] * 4


@pytest.mark.rule(
    "PM-013", "PM-002", "PM-007", "VM-003", "KC-001", "KF-013", "KF-015", "KF-004", "KF-012", "KF-006"
)
def test_write_gives_a_frame_of_its_own(task, area, look):
    start = area(2)
    task.write(start, b"a")
    entries, flags, counts = look(task, start, 2)
    assert entries.present.tolist() == [True, False]
    assert entries.exclusive.tolist() == [True, False]
    assert entries.has_pfn.tolist() == [True, False]
    assert not entries.file.any()
    assert counts[0] == 1
    expected = PageFlag.ANON | PageFlag.SWAPBACKED | PageFlag.UPTODATE | PageFlag.MMAP | PageFlag.LRU
    assert flags.has(expected)[0]
    assert task.read(start, 3) == b"a\0\0"


@pytest.mark.rule("PM-020", "VM-002", "KC-003", "KF-025")
def test_read_maps_the_zero_page(task, area, look):
    start = area(3)
    task.touch(start, 3 * PAGE, write=False)
    entries, flags, counts = look(task, start, 3)
    assert entries.present.all()
    assert not entries.exclusive.any()
    assert not entries.file.any()
    assert len(set(entries.pfn.tolist())) == 1
    assert flags.has(PageFlag.ZERO_PAGE).all()
    assert counts.tolist() == [0, 0, 0]
    [entry] = [e for e in task.process.smaps() if e.vma.start == start]
    assert entry.counters["Rss"] == 0


@pytest.mark.rule("VM-004")
def test_write_replaces_the_zero_page(task, area, look):
    start = area(1)
    task.touch(start, PAGE, write=False)
    zero = int(task.process.pagemap(start, start + PAGE).pfn[0])
    task.write(start, b"x")
    entries, flags, _ = look(task, start, 1)
    assert int(entries.pfn[0]) != zero
    assert entries.exclusive[0]
    assert flags.has(PageFlag.ANON)[0]


@pytest.mark.rule("PM-023", "PM-007", "VM-005", "KC-001")
def test_fork_shares_frames(task, area, look):
    start = area(4)
    task.touch(start, 4 * PAGE)
    child = task.fork()
    try:
        ours, _, counts = look(task, start, 4)
        theirs, _, _ = look(child, start, 4)
        assert ours.pfn.tolist() == theirs.pfn.tolist()
        assert counts.tolist() == [2] * 4
        assert not ours.exclusive.any()
        assert not theirs.exclusive.any()
    finally:
        child.exit()
    entries, _, counts = look(task, start, 4)
    assert counts.tolist() == [1] * 4
    assert entries.exclusive.all()


@pytest.mark.rule("VM-006")
def test_writer_gets_the_copy(task, area, look):
    start = area(1)
    task.write(start, b"parent")
    before = int(task.process.pagemap(start, start + PAGE).pfn[0])
    child = task.fork()
    try:
        child.write(start, b"CHILD")
        ours, _, our_count = look(task, start, 1)
        theirs, _, their_count = look(child, start, 1)
        assert int(ours.pfn[0]) == before != int(theirs.pfn[0])
        assert ours.exclusive[0]
        assert theirs.exclusive[0]
        assert our_count[0] == their_count[0] == 1
        assert task.read(start, 6) == b"parent"
        assert child.read(start, 6) == b"CHILDt"
    finally:
        child.exit()


@pytest.mark.rule("VM-007")
def test_dontneed_empties(task, area):
    start = area(4)
    task.write(start + PAGE, b"data")
    task.madvise(start, 4 * PAGE, 4)
    assert not task.process.pagemap(start, start + 4 * PAGE).present.any()
    assert task.read(start + PAGE, 4) == bytes(4)


@pytest.mark.rule("VM-008", "PM-014")
def test_munmap_takes_pages_out(task, area):
    start = area(6)
    task.touch(start, 6 * PAGE)
    task.munmap(start + 2 * PAGE, 2 * PAGE)
    present = task.process.pagemap(start, start + 6 * PAGE).present
    assert present.tolist() == [True, True, False, False, True, True]
    covering = [v for v in task.process.maps() if v.start < start + 6 * PAGE and v.end > start]
    assert [(v.start, v.end) for v in covering] == [
        (start, start + 2 * PAGE),
        (start + 4 * PAGE, start + 6 * PAGE),
    ]
    with pytest.raises(AddressSpaceFault) as caught:
        task.read(start + 2 * PAGE, 1)
    assert caught.value.signal == "SIGSEGV"
    assert caught.value.address == start + 2 * PAGE


@pytest.mark.rule("VM-009")
def test_mremap_moves_entries(task, area):
    start = area(4)
    task.write(start + PAGE, b"moved")
    before = task.process.pagemap(start, start + 4 * PAGE).values.tolist()
    target = start + (1 << 29)
    assert task.mremap(start, 4 * PAGE, 4 * PAGE, flags=3, new_addr=target) == target
    after = task.process.pagemap(target, target + 4 * PAGE).values.tolist()
    assert before == after
    assert not task.process.pagemap(start, start + 4 * PAGE).present.any()
    assert task.read(target + PAGE, 5) == b"moved"


@pytest.mark.rule("VM-014")
def test_mprotect_keeps_frames(task, area):
    start = area(3)
    task.touch(start, 3 * PAGE)
    before = task.process.pagemap(start, start + 3 * PAGE).pfn.tolist()
    task.mprotect(start, 3 * PAGE, 1)
    assert task.process.pagemap(start, start + 3 * PAGE).pfn.tolist() == before
    with pytest.raises(AddressSpaceFault):
        task.write(start, b"x")
    task.mprotect(start, 3 * PAGE, 3)
    task.write(start, b"x")
    assert task.process.pagemap(start, start + 3 * PAGE).pfn.tolist() == before


@pytest.mark.rule("VM-010", "KF-019", "KF-029")
def test_mlock_fills_and_makes_unevictable(task, area, look):
    start = area(4)
    task.mlock(start, 4 * PAGE)
    entries, flags, _ = look(task, start, 4)
    assert entries.present.all()
    assert flags.has(PageFlag.UNEVICTABLE | PageFlag.MLOCKED).all()
    task.munlock(start, 4 * PAGE)
    _, flags, _ = look(task, start, 4)
    assert not flags.any(PageFlag.UNEVICTABLE | PageFlag.MLOCKED).any()


@pytest.mark.rule("VM-011", "KF-015")
def test_madv_free_takes_swapbacked_off(task, area, look):
    start = area(4)
    task.touch(start, 4 * PAGE)
    look(task, start, 4)
    task.madvise(start, 4 * PAGE, 8)
    entries, flags, _ = look(task, start, 4)
    assert entries.present.all()
    assert not flags.has(PageFlag.SWAPBACKED).any()
    assert flags.has(PageFlag.ANON).all()


@pytest.mark.rule("PM-018", "VM-012", "KC-002", "KF-016", "KF-017", "KF-023", "KF-047")
def test_huge_page(task, area, look, needs):
    needs("mm.thp")
    start = area(512, huge=True)
    task.write(start + 5 * PAGE, b"huge")
    entries, flags, counts = look(task, start, 512)
    if not entries.present.all():
        pytest.skip("the kernel had no huge page to give")
    first = int(entries.pfn[0])
    assert first % 512 == 0
    assert entries.pfn.tolist() == list(range(first, first + 512))
    assert entries.exclusive.all()
    assert counts.tolist() == [1] * 512
    assert flags.has(PageFlag.THP).all()
    assert flags.has(PageFlag.COMPOUND_HEAD).tolist() == [True] + [False] * 511
    assert flags.has(PageFlag.COMPOUND_TAIL).tolist() == [False] + [True] * 511
    assert flags.has(PageFlag.ANON | PageFlag.SWAPBACKED | PageFlag.UPTODATE).all()


@pytest.mark.rule("VM-013")
def test_unmapping_a_part_splits_the_pmd(task, area, needs):
    needs("mm.thp")
    start = area(512, huge=True)
    task.touch(start, PAGE)
    before = task.process.pagemap(start, start + PMD)
    if not before.present.all():
        pytest.skip("the kernel had no huge page to give")
    task.munmap(start, PAGE)
    after = task.process.pagemap(start, start + PMD)
    assert after.present.tolist() == [False] + [True] * 511
    assert after.pfn[1:].tolist() == before.pfn[1:].tolist()
    [entry] = [e for e in task.process.smaps() if e.vma.start == start + PAGE]
    assert entry.counters["AnonHugePages"] == 0


@pytest.mark.rule("PM-009", "PM-010", "PM-012", "PM-024", "VM-015")
def test_guard_region(task, area, needs):
    needs("mm.guard_regions", "pagemap.guard")
    start = area(3)
    task.touch(start, 3 * PAGE)
    task.madvise(start + PAGE, PAGE, 102)
    entries = task.process.pagemap(start, start + 3 * PAGE)
    assert entries.guard.tolist() == [False, True, False]
    assert int(entries.values[1]) == 0x440000000000009F
    assert entries[1].swap_entry == (31, 4)
    with pytest.raises(AddressSpaceFault) as caught:
        task.read(start + PAGE, 1)
    assert caught.value.signal == "SIGSEGV"
    task.madvise(start + PAGE, PAGE, 103)
    assert int(task.process.pagemap(start, start + 3 * PAGE).values[1]) == 0
    assert task.read(start + PAGE, 1) == b"\0"


@pytest.mark.rule("PM-011", "VM-017", "PM-023", "KC-005", "PM-007")
def test_file_page_mapped_twice(task, area, look):
    fd = task.memfd_create("twice")
    task.ftruncate(fd, 2 * PAGE)
    first, second = area(2, flags=1, fd=fd), area(2, flags=1, fd=fd)
    task.write(first, b"seen")
    assert task.read(second, 4) == b"seen"
    one, flags, counts = look(task, first, 1)
    two, _, _ = look(task, second, 1)
    assert one.pfn.tolist() == two.pfn.tolist()
    assert one.file.all()
    assert not one.exclusive.any()
    assert counts[0] == 2
    assert not flags.has(PageFlag.ANON).any()
    assert flags.has(PageFlag.SWAPBACKED).all()


@pytest.mark.rule("VM-018", "PM-011", "KF-005")
def test_private_file_mapping_copies_on_write(task, area, look):
    fd = task.open_file("private")
    task.pwrite(fd, b"on disk" + bytes(PAGE), 0)
    start = area(1, flags=2, fd=fd)
    assert task.read(start, 7) == b"on disk"
    before, flags, _ = look(task, start, 1)
    assert before.file[0]
    assert not flags.has(PageFlag.ANON)[0]
    task.write(start, b"in core")
    after, flags, _ = look(task, start, 1)
    assert not after.file[0]
    assert flags.has(PageFlag.ANON)[0]
    assert int(before.pfn[0]) != int(after.pfn[0])
    assert task.pread(fd, 7, 0) == b"on disk"


@pytest.mark.rule("PM-015", "PM-016", "AC-010", "PM-017")
def test_reads_are_whole_words(task, area):
    process, start = task.process, area(2)
    place = start // PAGE * 8
    for offset, length in ((place + 1, 8), (place, 7), (place + 4, 8), (3, 0)):
        with pytest.raises(InvalidArgument) as caught:
            process.pread("pagemap", offset, length)
        assert caught.value.errno == 22
    assert process.pread("pagemap", place, 0) == b""
    assert len(process.pread("pagemap", place, 24)) == 24
    end = task.process.kernel.profile.geometry.task_size // PAGE * 8
    assert process.pread("pagemap", end, 8) == b""
    assert len(process.pread("pagemap", end - 8, 16)) == 8
    assert process.pread("pagemap", 1 << 60, 8) == b""
    assert process.pread("pagemap", (1 << 64) - 8, 8) == b""


@pytest.mark.rule("PM-025", "AC-009")
@pytest.mark.procfs_only
def test_dead_process_reads_as_nothing(bench):
    task = bench.spawn()
    process = bench.kernel.process(task.pid)
    [stack] = [v for v in process.maps() if v.name == "[stack]"]
    assert process.pagemap(stack.start, stack.end).present.any()
    task.exit()
    assert process.read_pagemap(stack.start // PAGE, np.zeros(4, dtype=np.uint64)) == 0
    with pytest.raises(ProcessGone):
        process.pagemap(stack.start, stack.end)
    with pytest.raises(ProcessGone):
        process.maps()


@pytest.mark.rule("PM-021", "PM-022")
@pytest.mark.procfs_only
def test_only_what_maps_says_is_populated(task, kernel):
    shown = sum(v.length // PAGE for v in task.process.maps() if v.end <= kernel.profile.geometry.task_size)
    present = sum(
        int(task.process.pagemap(v.start, v.end).present.sum())
        for v in task.process.maps()
        if v.end <= kernel.profile.geometry.task_size
    )
    assert 0 < present <= shown
    assert len(kernel.kpageflags(0, 64)) == len(kernel.kpagecount(0, 64)) == 64


@pytest.mark.rule("PM-019", "KF-018", "PM-012")
def test_hugetlb_page(task, area, look, needs):
    needs("mm.hugetlb")
    if int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text()) < 1:
        pytest.skip("needs a free hugetlb page (/proc/sys/vm/nr_hugepages)")
    start = area(512, flags=0x22 | 0x40000)
    task.write(start, b"x")
    entries, flags, _ = look(task, start, 512)
    first = int(entries.pfn[0])
    assert entries.pfn.tolist() == list(range(first, first + 512))
    assert flags.has(PageFlag.HUGE).all()
    assert not flags.any(PageFlag.THP).any()


_UNPRIVILEGED = """
import ctypes, mmap, os, struct, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
area = mmap.mmap(-1, 4096)
area[0] = 1
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
with open("/proc/self/pagemap", "rb", buffering=0) as file:
    print(hex(struct.unpack("=Q", os.pread(file.fileno(), 8, address // 4096 * 8))[0]))
for path in ("/proc/kpageflags", "/proc/kpagecount", "/proc/1/pagemap"):
    try:
        open(path, "rb").close()
        print("opened")
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.rule("AC-001", "AC-003", "AC-004", "AC-007")
@pytest.mark.procfs_only
def test_unprivileged_user(kernel):
    """Without privilege: own pagemap without frame numbers, no frame files, nobody else's pagemap."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become nobody")
    done = subprocess.run(
        [sys.executable, "-I", "-c", _UNPRIVILEGED], capture_output=True, text=True, check=True
    )
    word, *errors = done.stdout.split()
    assert int(word, 16) & (1 << 63)
    assert int(word, 16) & ((1 << 55) - 1) == 0
    assert errors == ["13", "13", "13"]


@pytest.mark.rule("AC-003")
@pytest.mark.procfs_only
def test_it_is_the_openers_privilege_that_counts(task, area):
    """A descriptor opened by root shows frame numbers also to one who has dropped his privilege since."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become nobody")
    start = area(1)
    task.write(start, b"x")
    script = (
        "import os, struct, sys\nfd = os.open(sys.argv[1], os.O_RDONLY)\nos.setuid(65534)\n"
        "print(struct.unpack('=Q', os.pread(fd, 8, int(sys.argv[2])))[0])"
    )
    place = str(start // PAGE * 8)
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, f"/proc/{task.pid}/pagemap", place],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == int(task.process.pagemap(start, start + PAGE).values[0])


@pytest.mark.rule("AC-004")
def test_frame_files_are_roots():
    for name in ("kpageflags", "kpagecount"):
        status = Path("/proc", name).stat()
        assert stat.S_IMODE(status.st_mode) == 0o400
        assert status.st_uid == 0


@pytest.mark.rule("AC-005")
def test_clear_refs(task, area, kernel):
    start = area(2)
    task.touch(start, 2 * PAGE)

    def referenced() -> int:
        [entry] = [e for e in task.process.smaps() if e.vma.start == start]
        return int(entry.counters["Referenced"])

    assert referenced() == 2 * PAGE
    task.process.clear_refs(1)
    assert referenced() == 0
    task.process.clear_refs(5)
    for number in (0, 6, 99):
        with pytest.raises(InvalidArgument):
            task.process.clear_refs(number)


@pytest.mark.rule("AC-008", "AC-013")
@pytest.mark.procfs_only
def test_vsyscall_is_in_maps_and_not_in_pagemap(task, kernel, needs):
    from pmcore.backends.procfs import open_kernel

    [vsyscall] = [v for v in task.process.maps() if v.name == "[vsyscall]"] or [None]
    if vsyscall is None:
        pytest.skip("this kernel maps no vsyscall page")
    assert vsyscall.start >= kernel.profile.geometry.task_size
    assert task.process.pread("pagemap", vsyscall.start // PAGE * 8, 8) == b""
    needs("maps.procmap_query")
    with open_kernel(maps="query") as asking:
        queried = asking.process(task.pid).maps()
    assert queried == tuple(v for v in task.process.maps() if v != vsyscall)


@pytest.mark.rule("AC-001", "AC-006")
@pytest.mark.procfs_only
def test_another_users_process(kernel):
    if os.getuid() != 0:
        pytest.skip("needs root, to become nobody")
    script = (
        "import os, pmcore\nfrom pmcore.errors import NotPermitted\n"
        "kernel = pmcore.open('procfs')\nprocess = kernel.process(int(os.environ['TARGET']))\nos.setuid(65534)\n"
        "for look in (process.maps, process.smaps, lambda: process.pread('pagemap', 0, 8)):\n"
        "    try:\n        look()\n        print('seen')\n"
        "    except NotPermitted as error:\n        print(error.errno, bool(error.remedy))\n"
    )
    environment = {**os.environ, "TARGET": str(os.getpid())}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["13", "True"] * 3, done.stderr
    assert issubclass(NotPermitted, PermissionError)


@pytest.mark.rule("AC-011")
@pytest.mark.procfs_only
def test_threads_share_a_descriptor(kernel):
    import threading

    from pmcore.protocols import FrameFile

    expected = kernel.kpagecount(0, 4096)
    failures = []

    def read(start: int) -> None:
        out = np.zeros(64, dtype=np.uint64)
        for _ in range(50):
            kernel.read_frames(FrameFile.KPAGECGROUP, start, out)
            kernel.read_frames(FrameFile.KPAGEFLAGS, start, out)
        if not (out == kernel.kpageflags(start, 64).values).all():
            failures.append(start)

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 64, 128, 192)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(expected) == 4096
