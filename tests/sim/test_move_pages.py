"""move_pages of the simulated machine: what its errors are, and what moves along."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from pmcore.errors import NotModelled, PmcoreError, SyscallError
from pmcore.protocols import FrameFile
from pmcore.registry import open_workbench
from pmcore.uapi import PM_PFRAME_MASK, Madvise, PageFlag, UffdFeature

PAGE, PMD = 4096, 2 << 20


def sim(**options):
    return open_workbench("sim", **{"memory": "64 MiB", "nodes": 2, "kernel": "6.12", **options})


def pages(start, count, step=PAGE):
    return [start + index * step for index in range(count)]


def move(task, addresses, node, **options):
    left, status = task.move_pages(addresses, [node] * len(addresses), **options)
    assert left == 0
    return status


@pytest.mark.rule("MG-001")
def test_refusals():
    machine = sim()
    task = machine.spawn()
    start = task.mmap(4 * PAGE)
    task.touch(start, 4 * PAGE)
    for flags, nodes, number in ((8, [0], errno.EINVAL), (2, [2], errno.ENODEV), (2, [-1], errno.ENODEV)):
        with pytest.raises(SyscallError) as caught:
            task.move_pages([start], nodes, flags=flags)
        assert caught.value.errno == number
    with pytest.raises(SyscallError) as caught:
        task.move_pages([start], [0], pid=99)
    assert caught.value.errno == errno.ESRCH
    assert task.move_pages([], [], flags=2) == (0, [])
    with pytest.raises(PmcoreError):
        task.move_pages([-1], None)
    with pytest.raises(SyscallError) as caught:  # the first two pages have moved by then
        task.move_pages(pages(start, 3), [1, 1, 5])
    assert caught.value.errno == errno.ENODEV
    assert task.move_pages(pages(start, 3), None)[1] == [1, 1, 0]
    machine.check()


@pytest.mark.rule("MG-001")
def test_what_others_map_is_the_administrators():
    task = sim(privileged=False).spawn()
    start = task.mmap(PAGE)
    with pytest.raises(SyscallError) as caught:
        task.move_pages([start], [0], flags=4)
    assert caught.value.errno == errno.EPERM


@pytest.mark.rule("MG-002")
@pytest.mark.parametrize(("kernel", "empty", "hidden"), [("6.12", "ENOENT", 0), ("6.1", "EFAULT", -2)])
def test_where_pages_are(kernel, empty, hidden):
    machine = sim(kernel=kernel, swap="1 MiB")
    task = machine.spawn()
    start = task.mmap(6 * PAGE)
    task.touch(start, PAGE)
    task.touch(start + PAGE, PAGE, write=False)
    task.touch(start + 2 * PAGE, 2 * PAGE)
    task.madvise(start + 2 * PAGE, PAGE, Madvise.PAGEOUT)
    task.mprotect(start + 3 * PAGE, PAGE, 0)
    task.munmap(start + 5 * PAGE, PAGE)
    absent = -errno.ENOENT
    wanted = [0, -errno.EFAULT, absent, hidden, -getattr(errno, empty), -errno.EFAULT]
    assert task.move_pages(pages(start, 6), None)[1] == wanted
    assert move(task, pages(start, 6), 0) == wanted
    fd = task.memfd_create("m")
    task.ftruncate(fd, PAGE)
    there = task.mmap(PAGE, flags=1, fd=fd)
    assert task.move_pages([there], None)[1] == [absent]


@pytest.mark.rule("MG-003")
def test_what_several_map_stays():
    machine = sim()
    task = machine.spawn()
    start = task.mmap(2 * PAGE)
    task.touch(start, 2 * PAGE)
    child = task.fork()
    child.touch(start, PAGE)
    assert move(task, pages(start, 2), 1) == [1, -errno.EACCES]
    assert move(task, pages(start, 2), 0, pid=child.pid, flags=4) == [0, 0]
    assert move(task, pages(start, 2), 0) == [0, 0]
    assert task.move_pages(pages(start, 2), None)[1] == [0, 0]
    machine.check()


@pytest.mark.rule("MG-004")
def test_all_bits_move_along():
    machine = sim(swap="1 MiB")
    task = machine.spawn()
    start = task.mmap(16 * PAGE)
    task.touch(start, 16 * PAGE)
    task.write(start, b"here")
    task.process.clear_refs(4)
    task.touch(start, 8 * PAGE)
    fd = task.userfaultfd(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED)
    task.uffd_register(fd, start, 16 * PAGE, 2)
    task.uffd_writeprotect(fd, start + 4 * PAGE, 8 * PAGE, protect=True)
    task.mprotect(start + 12 * PAGE, PAGE, 1)
    before = task.process.pagemap(start, start + 16 * PAGE).values
    free = machine.core.memory.free_total
    old = before & np.uint64(PM_PFRAME_MASK)
    flags = machine.frames_at(FrameFile.KPAGEFLAGS, old)
    assert move(task, pages(start, 16), 1) == [1] * 16
    after = task.process.pagemap(start, start + 16 * PAGE).values
    new = after & np.uint64(PM_PFRAME_MASK)
    assert not set(new.tolist()) & set(old.tolist())
    assert ((before ^ after) & ~np.uint64(PM_PFRAME_MASK)).max() == 0
    moved = machine.frames_at(FrameFile.KPAGEFLAGS, new)
    assert set((flags ^ moved).tolist()) == {int(PageFlag.DIRTY)}
    assert set(machine.frames_at(FrameFile.KPAGEFLAGS, old).tolist()) == {int(PageFlag.BUDDY)}
    assert machine.core.memory.free_total == free
    assert task.read(start, 4) == b"here"
    machine.check()


@pytest.mark.rule("MG-003", "MG-005")
def test_a_huge_page_moves_once():
    machine = sim()
    task = machine.spawn()
    start = task.mmap(2 * PMD)
    start = (start + PMD - 1) & -PMD
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    task.write(start, b"huge")
    assert move(task, pages(start, 4), 1) == [1, -errno.EBUSY, 1, 1]
    assert task.read(start, 4) == b"huge"
    assert machine.counters["migrate"] == 512
    assert task.process.smaps(start, start + 1)[0].counters["AnonHugePages"] == PMD
    machine.check()
    task.munmap(start + 8 * PAGE, 8 * PAGE)
    assert move(task, [start], 0) == [0]
    # Taken apart: what holds nothing but zeros is the zero page now.
    assert task.move_pages(pages(start, 9), None)[1] == [0, *[-errno.EFAULT] * 8]
    assert task.read(start, 4) == b"huge"
    machine.check()


@pytest.mark.rule("MG-005")
def test_what_would_be_marked_for_later_is_not_modelled():
    """A huge page that a PMD maps, and a child by PTEs in part: the kernel notes on the way that it may be split."""
    machine = sim()
    task = machine.spawn()
    start = (task.mmap(2 * PMD) + PMD - 1) & -PMD
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    task.touch(start, PAGE)
    child = task.fork()
    child.touch(start, PAGE)
    before = machine.digest()
    with pytest.raises(NotModelled):
        task.move_pages([start], [1], flags=4)
    assert machine.digest() == before


@pytest.mark.rule("MG-004")
def test_a_node_without_room_is_not_modelled():
    machine = sim(memory="16 MiB")
    task = machine.spawn()
    start = task.mmap(6 << 20)
    task.touch(start, 6 << 20)
    assert set(task.move_pages(pages(start, 1536), None)[1]) == {0}
    other = machine.spawn()
    there = other.mmap(4 << 20)
    other.touch(there, 4 << 20)
    before = machine.digest()
    with pytest.raises(NotModelled):
        task.move_pages(pages(start, 1536), [1] * 1536)
    assert machine.digest() == before


@pytest.mark.rule("MG-002", "MG-003")
def test_hugetlb_pages_are_where_they_are():
    machine = sim(hugepages={"2 MiB": 2})
    task = machine.spawn()
    start = task.mmap(2 * PMD, flags=0x40022)
    task.touch(start, PAGE)
    assert task.move_pages(pages(start, 2, PMD), None)[1] == [0, -errno.ENOENT]
    assert move(task, [start, start + PAGE], 0) == [0, 0]
    with pytest.raises(NotModelled):
        task.move_pages([start], [1])
