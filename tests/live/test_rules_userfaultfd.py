"""Userfaultfds that tell of forks, moves and unmapped ranges: on the running kernel and on the simulated machine."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import numpy as np
import pytest

from pmcore.errors import SyscallError
from pmcore.uapi import Madvise, MremapFlag, UffdFeature

from .conftest import PAGE

ASYNC = UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED
UFFD_WP = 57


@pytest.fixture(autouse=True)
def _has_userfaultfd(needs):
    needs("uffd.wp_async", "uffd.wp_unpopulated")


def protected(task, start, pages):
    """Of each page, whether its entry is write-protected by a userfaultfd (markers too)."""
    words = np.zeros(pages, dtype=np.uint64)
    task.process.read_pagemap(start // PAGE, words)
    return "".join("w" if word >> UFFD_WP & 1 else "." for word in words.tolist())


def refused(call, *arguments, **named):
    with pytest.raises(SyscallError) as caught:
        call(*arguments, **named)
    return caught.value.errno


def armed(task, area, features):
    """Eight pages of which four are populated, all of them protected; and the userfaultfd."""
    start = area(8)
    task.touch(start, 4 * PAGE)
    fd = task.userfaultfd(ASYNC | features)
    task.uffd_register(fd, start, 8 * PAGE, 2)
    task.uffd_writeprotect(fd, start, 8 * PAGE, protect=True)
    return start, fd


@pytest.mark.rule("VM-033")
def test_a_child_is_not_watched(task, area):
    """Without UFFD_FEATURE_EVENT_FORK: neither registered, nor protected, nor are there markers."""
    start, fd = armed(task, area, 0)
    child = task.fork()
    assert child.watched_by == {}
    assert protected(child, start, 8) == "........"
    assert protected(task, start, 8) == "wwwwwwww"
    # The child has the descriptor, which is its parent's.
    child.uffd_writeprotect(fd, start, 2 * PAGE, protect=False)
    assert protected(task, start, 8) == "..wwwwww"
    child.exit()


@pytest.mark.rule("VM-033")
def test_a_child_is_watched(task, area):
    """With it: a userfaultfd of its own, which its parent holds and the child does not."""
    start, fd = armed(task, area, UffdFeature.EVENT_FORK)
    child = task.fork()
    [(origin, new)] = child.watched_by.items()
    assert origin == (task.pid, fd)
    assert protected(child, start, 8) == protected(task, start, 8) == "wwwwwwww"
    child.touch(start, 6 * PAGE)
    assert protected(child, start, 8) == "......ww"
    assert protected(task, start, 8) == "wwwwwwww"
    task.uffd_writeprotect(new, start, 2 * PAGE, protect=True)
    assert protected(child, start, 8) == "ww....ww"
    task.uffd_writeprotect(fd, start, 8 * PAGE, protect=False)
    assert protected(task, start, 8) == "........"
    assert refused(child.uffd_writeprotect, new, start, PAGE, protect=True) in (errno.EBADF, errno.ENOTTY)
    # A grandchild: the event comes to who holds the child's, which is its parent's parent.
    grandchild = child.fork()
    [(origin, third)] = grandchild.watched_by.items()
    assert origin == (task.pid, new)
    assert protected(grandchild, start, 8) == "ww....ww"
    task.uffd_unregister(third, start, 8 * PAGE)
    assert protected(grandchild, start, 8) == "........"
    # Closed: the registration ends, and with it the protection.
    task.close(new)
    assert protected(child, start, 8) == "........"
    grandchild.exit()
    assert refused(task.uffd_writeprotect, third, start, PAGE, protect=True) == errno.ESRCH
    child.exit()


@pytest.mark.rule("VM-034")
@pytest.mark.parametrize("tells", [False, True])
def test_what_moves(task, area, tells):
    """Protection, markers and registration move along only where moves are told of."""
    start, fd = armed(task, area, UffdFeature.EVENT_REMAP if tells else 0)
    target = area(8)
    task.munmap(target, 8 * PAGE)
    moved = task.mremap(
        start,
        8 * PAGE,
        8 * PAGE,
        flags=MremapFlag.MAYMOVE | MremapFlag.FIXED,
        new_addr=target,
    )
    assert protected(task, moved, 8) == ("wwwwwwww" if tells else "........")
    task.touch(moved, PAGE)
    if tells:
        task.uffd_writeprotect(fd, moved, 8 * PAGE, protect=True)
        assert protected(task, moved, 8) == "wwwwwwww"
    else:
        assert refused(task.uffd_writeprotect, fd, moved, PAGE, protect=True) == errno.ENOENT


@pytest.mark.rule("VM-034")
def test_what_goes(task, area):
    """Emptying and unmapping a range under their events: the tables are as without them."""
    found = []
    for features in (0, UffdFeature.EVENT_REMOVE | UffdFeature.EVENT_UNMAP):
        start, _ = armed(task, area, features)
        task.madvise(start + PAGE, 2 * PAGE, Madvise.DONTNEED)
        task.munmap(start + 6 * PAGE, 2 * PAGE)
        found.append(protected(task, start, 8))
    assert found == ["w..www.."] * 2


@pytest.mark.rule("VM-033", "VM-034")
@pytest.mark.procfs_only
def test_the_workbench_reads_and_holds_nothing(bench, task, area):
    """No call waits for longer than it takes to read its event; afterwards we hold no descriptor of a task's."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    every = UffdFeature.EVENT_FORK | UffdFeature.EVENT_REMAP
    start, fd = armed(task, area, every | UffdFeature.EVENT_REMOVE | UffdFeature.EVENT_UNMAP)
    began = time.monotonic()
    children = [task.fork() for _ in range(5)]
    task.madvise(start, PAGE, Madvise.DONTNEED)
    task.munmap(start + PAGE, PAGE)
    task.mremap(start + 4 * PAGE, 4 * PAGE, 4 * PAGE, flags=7, new_addr=area(1) + 64 * PAGE)
    assert time.monotonic() - began < 5
    for child in children:
        [new] = child.watched_by.values()
        task.close(new)
        child.exit()
    links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not any("userfaultfd" in link for link in links)
    assert len(links) <= before + 2
    task.close(fd)
    task.touch(start, PAGE)


@pytest.mark.rule("VM-034")
def test_a_move_ends_its_neighbours_watch(task):
    """DV-041: what moves joins what the same userfaultfd watches, and the whole of it is watched no more."""
    here, there = 0x100000000000, 0x100040000000
    for start in (here, there):
        task.mmap(8 * PAGE, addr=start, flags=0x32)
    fd = task.userfaultfd(ASYNC)
    for start in (here, there):
        task.uffd_register(fd, start, 8 * PAGE, 2)
    task.mremap(here + 2 * PAGE, 2 * PAGE, 2 * PAGE, flags=3, new_addr=there + 8 * PAGE)
    watched = {
        (entry.vma.start, entry.vma.end - entry.vma.start): "uw" in entry.vm_flags
        for entry in task.process.smaps()
        if here <= entry.vma.start < there + (1 << 30)
    }
    assert watched == {
        (here, 2 * PAGE): True,
        (here + 4 * PAGE, 4 * PAGE): True,
        (there, 10 * PAGE): False,
    }
