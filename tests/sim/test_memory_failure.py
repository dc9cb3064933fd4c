"""Memory failure of the simulated machine: poisoned pages, pages moved away, frames out of use."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from pmcore.backends.sim.check import BrokenInvariant
from pmcore.errors import AddressSpaceFault, NotModelled, SyscallError
from pmcore.pagemap import PagemapEntry
from pmcore.profile import preset
from pmcore.protocols import FrameFile
from pmcore.registry import open_workbench
from pmcore.scan.request import ScanRequest
from pmcore.uapi import PM_PFRAME_MASK, Madvise, PageCategory, PageFlag, UffdFeature

PAGE, PMD = 4096, 2 << 20
POISON, AWAY = Madvise.HWPOISON, Madvise.SOFT_OFFLINE


def sim(**options):
    return open_workbench("sim", **{"memory": "64 MiB", "kernel": "6.12", **options})


def touched(pages=4, **options):
    machine = sim(**options)
    task = machine.spawn()
    start = task.mmap(pages * PAGE)
    task.touch(start, pages * PAGE)
    return machine, task, start


def words(task, start, pages):
    return task.process.pagemap(start, start + pages * PAGE).values


def pfn(task, addr):
    return int(words(task, addr, 1)[0]) & PM_PFRAME_MASK


def flags(machine, frame):
    return int(machine.frames_at(FrameFile.KPAGEFLAGS, np.array([frame], dtype=np.uint64))[0])


def corrupted(machine):
    lines = machine.pread("meminfo", 0, 1 << 16).decode().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("HardwareCorrupted"))


def poisoned(task, addr, length=PAGE):
    with pytest.raises(AddressSpaceFault) as caught:
        task.madvise(addr, length, POISON)
    assert (caught.value.signal, caught.value.lsb) == ("SIGBUS", 12)
    return caught.value.address


@pytest.mark.rule("HW-001")
def test_refusals():
    machine, task, start = touched()
    for addr in (start + 64 * PAGE, start + PAGE):
        task.mprotect(start + PAGE, PAGE, 0)
        for advice in (POISON, AWAY):
            with pytest.raises(SyscallError) as caught:
                task.madvise(addr, PAGE, advice)
            assert caught.value.errno == errno.EFAULT
    task.madvise(start, 0, POISON)
    assert (
        poisoned(task, start, 2 * PAGE) == start
    )  # the second has no access: EFAULT, which the signal hides
    with pytest.raises(SyscallError) as caught:
        task.madvise(start, PAGE, AWAY)
    assert caught.value.errno == errno.EFAULT
    assert machine.counters["memory_failure"] == 1
    machine.check()


@pytest.mark.rule("HW-001")
@pytest.mark.parametrize("length", [0, PAGE])
def test_kernels_without_it_and_users_without_privilege(length):
    for options, number in (
        ({"kernel": preset("6.12", config=["!CONFIG_MEMORY_FAILURE"])}, errno.EINVAL),
        ({"privileged": False}, errno.EPERM if length else 0),
    ):
        _, task, start = touched(**options)
        found = 0
        try:
            task.madvise(start, length, POISON)
        except SyscallError as error:
            found = error.errno
        assert found == number


@pytest.mark.rule("HW-002", "HW-003", "HW-006")
def test_a_poisoned_page():
    machine, task, start = touched()
    task.process.clear_refs(4)
    frame, free = pfn(task, start + PAGE), machine.core.memory.free_total
    assert poisoned(task, start + PAGE) == start + PAGE
    word = int(words(task, start, 2)[1])
    entry = PagemapEntry(word)
    assert entry.swapped
    assert (entry.present, entry.soft_dirty, entry.exclusive) == (False, False, False)
    assert (word & 31, (word & PM_PFRAME_MASK) >> 5) == (27, frame)
    assert flags(machine, frame) & int(PageFlag.HWPOISON | PageFlag.LRU | PageFlag.MMAP) == PageFlag.HWPOISON
    assert corrupted(machine) == 4
    assert task.mincore(start, 4 * PAGE).all()
    for write in (False, True):
        with pytest.raises(AddressSpaceFault) as caught:
            task.touch(start + PAGE + 7, 1, write=write)
        assert (caught.value.signal, caught.value.address, caught.value.lsb) == (
            "SIGBUS",
            start + PAGE + 7,
            12,
        )
    with pytest.raises(SyscallError) as refused:
        task.madvise(start, 4 * PAGE, Madvise.POPULATE_READ)
    assert refused.value.errno == 133
    result = task.process.pagemap_scan(
        ScanRequest(start=start, end=start + 4 * PAGE, vec_len=9, return_mask=0x7F)
    )
    assert result.regions["categories"][1] == PageCategory.SWAPPED | PageCategory.WRITTEN
    machine.check()
    task.madvise(start + PAGE, PAGE, Madvise.DONTNEED)
    task.touch(start + PAGE, PAGE)
    assert machine.core.memory.free_total == free - 1
    task.exit()
    assert flags(machine, frame) & PageFlag.HWPOISON
    machine.check()
    machine.unpoison(np.array([frame], dtype=np.uint64))
    assert flags(machine, frame) == PageFlag.BUDDY
    assert corrupted(machine) == 0
    machine.check()


@pytest.mark.rule("HW-002")
def test_clean_pages_and_other_processes_are_not_told():
    machine, task, start = touched()
    task.madvise(start, PAGE, Madvise.FREE)
    task.madvise(start, PAGE, POISON)
    child = task.fork()
    assert poisoned(child, start + PAGE, 2 * PAGE) == start + PAGE
    for who in (task, child):
        with pytest.raises(AddressSpaceFault):
            who.touch(start + 2 * PAGE, PAGE)
    machine.check()


@pytest.mark.rule("HW-003")
def test_hwpoison_entries_are_inherited_moved_and_emptied():
    machine, task, start = touched(8)
    poisoned(task, start + PAGE)
    before = int(words(task, start, 2)[1])
    child = task.fork()
    assert int(words(child, start, 2)[1]) == before
    child.madvise(start, 8 * PAGE, Madvise.PAGEOUT)
    moved = child.mremap(start, 8 * PAGE, 8 * PAGE, flags=3, new_addr=start + (1 << 30))
    assert int(words(child, moved, 2)[1]) & PM_PFRAME_MASK == before & PM_PFRAME_MASK
    with pytest.raises(AddressSpaceFault):
        child.read(moved + PAGE, 1)
    child.madvise(moved, 8 * PAGE, Madvise.FREE)
    child.touch(moved, 8 * PAGE)
    fd = task.userfaultfd(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED)
    task.uffd_register(fd, start, 8 * PAGE, 2)
    task.uffd_writeprotect(fd, start, 8 * PAGE, protect=True)
    assert PagemapEntry(int(words(task, start, 2)[1])).uffd_wp
    machine.check()
    task.munmap(start, 8 * PAGE)
    assert corrupted(machine) == 4
    machine.check()


@pytest.mark.rule("HW-004")
@pytest.mark.parametrize("by_ptes", [False, True])
def test_huge_pages_are_taken_apart(by_ptes):
    machine = sim()
    task = machine.spawn()
    start = (task.mmap(2 * PMD) + PMD - 1) & -PMD
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    task.write(start + 9 * PAGE, b"nine")
    if by_ptes:
        task.mprotect(start, PAGE, 1)
        task.madvise(start + 5 * PAGE, PAGE, POISON)
    else:
        assert poisoned(task, start + 5 * PAGE) == start + 5 * PAGE
    assert task.read(start + 9 * PAGE, 4) == b"nine"
    assert machine.counters["split_folio"] == 1
    seen = words(task, start, 512)
    assert PagemapEntry(int(seen[5])).swapped
    assert (
        len(set((seen & np.uint64(PM_PFRAME_MASK)).tolist())) == 3
    )  # the page of nine, the poisoned, the zero page
    machine.check()


@pytest.mark.rule("HW-005")
def test_soft_offline():
    machine, task, start = touched()
    task.write(start, b"here")
    child = task.fork()
    old = pfn(task, start)
    task.madvise(start, PAGE, AWAY)
    assert pfn(task, start) == pfn(child, start) != old
    assert (task.read(start, 4), child.read(start, 4)) == (b"here", b"here")
    assert flags(machine, old) & int(PageFlag.HWPOISON | PageFlag.LRU) == PageFlag.HWPOISON
    assert corrupted(machine) == 4
    machine.check()


@pytest.mark.rule("HW-006")
def test_frames_by_number():
    machine, task, start = touched()
    free = machine.core.memory.free_total
    spare = machine.frame_count() - 77
    mine = pfn(task, start)
    chosen = np.array([spare, mine], dtype=np.uint64)
    machine.hwpoison(chosen)
    assert flags(machine, spare) == PageFlag.HWPOISON
    assert machine.core.memory.free_total == free - 1
    assert corrupted(machine) == 8
    with pytest.raises(SyscallError):
        machine.hwpoison(chosen)
    with pytest.raises(NotModelled):  # an entry still calls it poisoned
        machine.unpoison(chosen[1:])
    machine.check()
    task.exit()
    machine.unpoison(chosen)
    with pytest.raises(SyscallError):
        machine.unpoison(chosen)
    assert corrupted(machine) == 0
    machine.check()


@pytest.mark.rule("HW-007")
def test_smaps_and_status():
    _, task, start = touched()
    poisoned(task, start)
    counters = task.process.smaps(start, start + 1)[0].counters
    wanted = {"Rss": 4, "Pss": 4, "Anonymous": 4, "Shared_Dirty": 1, "Private_Dirty": 3, "Swap": 0}
    assert {name: counters[name] // PAGE for name in wanted} == wanted
    status = task.process.pread("status", 0, 1 << 16).decode()
    assert f"VmRSS:\t{3 * 4:8d} kB" in status


@pytest.mark.rule("HW-003", "HW-006")
def test_a_checkpoint_remembers(tmp_path):
    machine, task, start = touched()
    poisoned(task, start)
    state, digest = machine.checkpoint(), machine.digest()
    task.munmap(start, PAGE)
    machine.restore(state)
    assert machine.digest() == digest
    with pytest.raises(AddressSpaceFault):
        task.touch(start, PAGE)
    machine.check()


@pytest.mark.rule("HW-003", "HW-006")
def test_planted_faults_are_found():
    machine, task, start = touched()
    poisoned(task, start)
    frames = machine.core.memory.frames
    frame = (pfn(task, start)) >> 5
    frames.lru[frame] = 7
    with pytest.raises(BrokenInvariant, match="poisoned frame"):
        machine.check()
    frames.lru[frame] = 0
    frames.flags[frame] = int(PageFlag.RESERVED)
    with pytest.raises(BrokenInvariant, match="names a poisoned frame"):
        machine.check()


@pytest.mark.rule("HW-001")
def test_what_is_not_modelled_says_so():
    machine = sim(memory="8 MiB", swap=0)
    task = machine.spawn()
    fd = task.open_file("f", pages=2)
    start = task.mmap(2 * PAGE, flags=1, fd=fd)
    task.touch(start, 2 * PAGE)
    own = task.mmap(1500 * PAGE)
    task.touch(own, 1500 * PAGE)
    before = machine.digest()
    for addr, length, advice in ((start, PAGE, POISON), (own, 1500 * PAGE, AWAY)):
        with pytest.raises(NotModelled):
            task.madvise(addr, length, advice)
    task.munmap(start, 2 * PAGE)
    assert machine.digest() != before
    machine.check()
