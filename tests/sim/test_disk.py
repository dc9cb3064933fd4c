"""Files on a disk on the simulated machine: its state, its invariants, its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import pmcore
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import load_machine
from pmcore.backends.sim.services import blocks
from pmcore.errors import ArgumentError, NotModelled, SyscallError
from pmcore.lockstep.programs import programs
from pmcore.program import Run
from pmcore.uapi import Errno, Madvise, PageFlag

PAGE = 4096
SHARED, PRIVATE = 1, 2
SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def machine():
    return pmcore.open("sim", memory="64 MiB", swap="16 MiB", kernel="6.18")


def opened(machine, pages, *, flags=SHARED):
    """A task, a new file of its, and a mapping of that."""
    task = machine.spawn()
    fd = task.open_file("file", pages=pages)
    return task, fd, task.mmap(pages * PAGE, flags=flags, fd=fd)


@SLOW
@given(programs(max_steps=28, focus="disk"))
def test_programs_leave_it_well_and_can_be_gone_back_on(tmp_path_factory, program):
    machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB", kernel="6.18")
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
        machine.check()
    state, digest = machine.checkpoint(), machine.digest()
    path = tmp_path_factory.mktemp("disk") / "machine.zip"
    machine.save(path)
    ends = []
    for _ in range(2):
        for task in machine.tasks():
            task.sync()
        machine.drop_caches()
        machine.check()
        ends.append(machine.digest())
        machine.restore(state)
        assert machine.digest() == digest
        machine.check()
    again = load_machine(path)
    assert again.digest() == digest
    for task in again.tasks():
        task.sync()
    again.drop_caches()
    assert ends == [again.digest()] * 2


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_many_accesses_at_once_are_as_one_after_the_other(write, again):
    """Pages that are missing, cached, of holes, evicted, or read-only after they were written out."""
    shown = []
    for at_once in (False, True):
        machine = pmcore.open("sim", memory="64 MiB", kernel="6.18")
        task, fd, start = opened(machine, 300)
        task.ftruncate(fd, 600 * PAGE)
        start = task.mmap(600 * PAGE, flags=SHARED, fd=fd)
        task.pwrite(fd, b"x" * 9 * PAGE, 20 * PAGE)
        task.pread(fd, 7 * PAGE, 290 * PAGE)
        task.touch(start + 100 * PAGE, 40 * PAGE, write=True)
        task.madvise(start + 100 * PAGE, 20 * PAGE, Madvise.PAGEOUT)
        task.fsync(fd)
        task.madvise(start + 90 * PAGE, 20 * PAGE, Madvise.PAGEOUT)
        for _ in range(1 + again):
            if at_once:
                task.touch(start, 600 * PAGE, write=write)
            else:
                for page in range(600):
                    task.touch(start + page * PAGE, PAGE, write=write)
            if again:
                task.fsync(fd)
        machine.check()
        words = task.process.pagemap(start, start + 600 * PAGE)
        flags = machine.core.memory.frames.flags[words.pfn.astype(np.int64)]
        state = [words.values >> np.uint64(55), flags, *machine.core.inodes[1].blocks.used()[0:1]]
        state += [words.present, task.mincore(start, 600 * PAGE)]
        shown.append([column.tolist() for column in state] + [task.pread(fd, 600 * PAGE, 0)])
    assert shown[0] == shown[1]
    assert all(shown[0][3])


def test_contents_survive_the_cache(machine):
    task, fd, start = opened(machine, 4)
    task.write(start + PAGE, b"mapped")
    task.pwrite(fd, b"written", 2 * PAGE + 4090)
    task.exit()
    other = machine.spawn()
    other.sync()
    machine.drop_caches()
    free = machine.core.memory.free_total
    fd = other.open_file("file")
    assert other.pread(fd, 8, PAGE) == b"mapped\n\0"
    assert other.pread(fd, 9, 2 * PAGE + 4090) == b"writtenil"
    assert other.pread(fd, 7, 0) == b"file:0\n"
    assert machine.core.memory.free_total < free
    machine.check()


@pytest.mark.rule("DF-003")
@pytest.mark.parametrize("cached", [False, True])
def test_a_page_read_before_the_last_where_no_page_table_is(machine, cached):
    """As Linux 6.18.44 does: a fault that waits for its page begins again, and finds it before the last one."""
    task = machine.spawn()
    fd = task.open_file("file", pages=3)
    start = task.mmap(3 * PAGE, addr=1 << 44, flags=SHARED | 0x100000, fd=fd)
    task.pread(fd, 1, 2 * PAGE)
    if cached:
        task.pread(fd, 1, 0)
    task.touch(start, 8, write=False)
    assert task.process.pagemap(start, start + 3 * PAGE).present.tolist() == [True, False, True]
    machine.check()


@pytest.mark.rule("DF-003")
@pytest.mark.parametrize("other", [False, True])
def test_a_marked_page_before_the_last_where_no_page_table_is(machine, other):
    """As Linux 6.18.44 does: the fault maps the marked page alone; where a page table is, the last one, too."""
    machine.set_readahead(8 * PAGE)
    task = machine.spawn()
    fd = task.open_file("file", pages=3)
    start = task.mmap(5 * PAGE, addr=1 << 44, flags=SHARED | 0x100000, fd=fd, offset=PAGE)
    if other:
        task.mmap(PAGE, addr=(1 << 44) + 8 * PAGE, flags=0x100022)
        task.touch((1 << 44) + 8 * PAGE, PAGE)
    task.touch(start, 8, write=False)
    assert task.process.pagemap(start, start + 2 * PAGE).present.tolist() == [True, other]
    machine.check()


@pytest.mark.parametrize("pages", [-1, "3", 1.5, 1 << 40])
def test_what_is_no_number_of_pages(machine, pages):
    task = machine.spawn()
    digest = machine.digest()
    with pytest.raises(ArgumentError):
        task.open_file("file", pages=pages)
    with pytest.raises(ArgumentError):
        machine.set_readahead(-4096)
    assert machine.digest() == digest


def test_a_file_made_anew_is_another(machine):
    """The old one stays as long as it is used."""
    task, fd, start = opened(machine, 4)
    task.write(start, b"old")
    new = task.open_file("file", pages=2)
    assert task.pread(new, 5, 0) == b"file:"
    assert task.pread(fd, 5, 0) == b"olde:"
    assert len(machine.core.inodes) == 2
    task.munmap(start, 4 * PAGE)
    task.close(fd)
    assert len(machine.core.inodes) == 1
    machine.check()
    task.exit()
    assert machine.core.names == {"file": 2}
    machine.check()


def test_the_counters_of_smaps(machine):
    task, fd, start = opened(machine, 8)
    task.touch(start, 8 * PAGE, write=False)
    task.touch(start, 3 * PAGE, write=True)
    child = task.fork()
    child.touch(start, 2 * PAGE, write=False)  # fault-around maps all of it
    counters = task.process.smaps(start, start + PAGE)[0].counters
    shown = [
        counters[f"{who}_{what}"] // PAGE for who in ("Shared", "Private") for what in ("Clean", "Dirty")
    ]
    assert shown == [5, 3, 0, 0]
    task.fsync(fd)
    counters = task.process.smaps(start, start + PAGE)[0].counters
    assert (counters["Shared_Clean"], counters["Shared_Dirty"]) == (8 * PAGE, 0)


def test_events_tell_of_writing_back(machine):
    task, fd, start = opened(machine, 4)
    task.touch(start, 2 * PAGE, write=True)
    with machine.observe() as events:
        task.fsync(fd)
        task.fadvise(fd, 0, 0, 4)
    changes = [event for event in events if type(event).__name__ == "FlagChange"]
    assert [((event.old ^ event.new) == np.uint64(PageFlag.DIRTY)).all() for event in changes[:1]] == [True]
    assert any(type(event).__name__ == "EntryChange" and event.call == "fsync" for event in events)


@pytest.mark.parametrize(
    ("fault", "invariant"),
    [
        (
            lambda m, inode, pfn: m.core.memory.frames.flags_at.__setitem__(
                pfn, m.core.memory.frames.flags_at[pfn] & ~int(PageFlag.DIRTY)
            ),
            "what may be written of a file on a disk is dirty",
        ),
        (
            lambda m, inode, pfn: m.core.memory.frames.flags_at.__setitem__(
                pfn, m.core.memory.frames.flags_at[pfn] & ~int(PageFlag.PRIVATE)
            ),
            "a dirty page of a file on a disk has buffers",
        ),
        (lambda m, inode, pfn: inode.blocks.set(9, blocks.DELAYED), "the page of a delayed block is dirty"),
        (lambda m, inode, pfn: inode.blocks.set(1, 0), "a dirty page has room on the disk"),
        (lambda m, inode, pfn: inode.blocks.set(2, 5), "a block is a hole, set aside, delayed"),
        (lambda m, inode, pfn: inode.blocks.set(2, blocks.UNWRITTEN | 1), "a block is a hole, set aside"),
        (lambda m, inode, pfn: inode.shadows.set(1, 3), "what is cached is not remembered"),
        (lambda m, inode, pfn: setattr(inode, "size", PAGE), "nothing behind the end of a file on a disk"),
        (lambda m, inode, pfn: inode.blocks.set(3, blocks.WRITTEN | 1), "contents have one owner"),
        (
            lambda m, inode, pfn: setattr(next(iter(m.tasks())).mm.vmas.first(0), "opened", None),
            "what maps a file on a disk, and nothing else, has an open file",
        ),
        (
            lambda m, inode, pfn: setattr(next(iter(m.tasks())).mm.vmas.first(0).opened, "window", (0, 1, 2)),
            "what it read ahead a window",
        ),
        (lambda m, inode, pfn: m.core.names.clear(), "a file is there while something refers to it"),
    ],
)
def test_planted_faults_are_found(machine, fault, invariant):
    task, fd, start = opened(machine, 4)
    task.touch(start + PAGE, PAGE, write=True)
    machine.check()
    inode = machine.core.inodes[1]
    pfn = int(task.process.pagemap(start, start + 4 * PAGE).pfn[1])
    if invariant.startswith("a file is there"):
        task.munmap(start, 4 * PAGE)
        del task.mm.files[fd]
    fault(machine, inode, pfn)
    with pytest.raises(BrokenInvariant, match=invariant):
        machine.check()


@pytest.mark.parametrize("mode", [8, 16, 32])
def test_moving_blocks_is_not_modelled(machine, mode):
    task, fd, _ = opened(machine, 4)
    digest = machine.digest()
    with pytest.raises(NotModelled):
        task.fallocate(fd, mode, 0, PAGE)
    with pytest.raises(NotModelled):
        task.fadvise(fd, 0, 0, 5)
    assert machine.digest() == digest


@pytest.mark.parametrize(
    ("call", "arguments", "errno"),
    [
        ("fadvise", (0, 0, 9), Errno.EINVAL),
        ("fadvise", (0, -1, 4), Errno.EINVAL),
        ("ftruncate", (1 << 44,), Errno.EFBIG),
        ("fallocate", (0, 1 << 44, PAGE), Errno.EFBIG),
        ("fallocate", (2, 0, PAGE), Errno.EOPNOTSUPP),
        ("lseek", (8 * PAGE, 3), Errno.ENXIO),
    ],
)
def test_refusals_change_nothing(machine, call, arguments, errno):
    task, fd, _ = opened(machine, 4)
    digest = machine.digest()
    with pytest.raises(SyscallError) as caught:
        getattr(task, call)(fd, *arguments)
    assert caught.value.errno == errno
    assert machine.digest() == digest


def test_mincore_of_a_swapped_private_copy_is_not_the_files(machine):
    """However few pages are asked about."""
    for pages in (1, 8):
        task, _, start = opened(machine, pages, flags=PRIVATE)
        task.touch(start, pages * PAGE, write=True)
        task.madvise(start, PAGE, Madvise.PAGEOUT)
        assert task.mincore(start, pages * PAGE).tolist() == [False] + [True] * (pages - 1)


@pytest.mark.rule("DF-016")
def test_reclaim_drops_what_is_clean_and_writes_what_is_dirty(machine):
    task, fd, start = opened(machine, 64)
    anon = task.mmap(64 * PAGE)
    task.touch(anon, 64 * PAGE)
    task.pread(fd, 64 * PAGE, 0)
    task.touch(start + 10 * PAGE, 10 * PAGE, write=True)
    task.madvise(start, 64 * PAGE, Madvise.COLD)
    done = machine.reclaim(64)
    machine.check()
    assert (done.pages, done.dropped, done.cleaned) == (64, 64, 10)
    assert not task.mincore(start, 64 * PAGE).any()
    assert task.process.pagemap(anon, anon + 64 * PAGE).present.all()
    assert task.pread(fd, 8, 12 * PAGE) == b"file:12\n"
    task.touch(start, 64 * PAGE, write=False)
    flags = machine.kpageflags(int(task.process.pagemap(start, start + PAGE).pfn[0]), 1)
    assert flags.has(PageFlag.ACTIVE)[0]  # it was here not long ago


@pytest.mark.rule("DF-016")
def test_what_is_used_stays_longer(machine):
    """One access by an entry keeps a page for a round; two, or one of what may be executed, make it active."""
    task, fd, start = opened(machine, 4)
    code = task.mmap(4 * PAGE, prot=5, flags=PRIVATE, fd=fd)
    other = task.mmap(4 * PAGE, flags=SHARED, fd=fd)
    task.touch(start, 4 * PAGE, write=False)
    task.madvise(start, 4 * PAGE, Madvise.DONTNEED)  # noted on the pages
    task.fadvise(fd, 0, 0, 4)
    task.touch(start, PAGE, write=False)  # once
    task.touch(start + PAGE, PAGE, write=False)
    task.touch(other + PAGE, PAGE, write=False)  # twice, and page 0 too
    task.madvise(other, PAGE, Madvise.DONTNEED)
    task.touch(code + 2 * PAGE, PAGE, write=False)
    task.pread(fd, 1, 3 * PAGE)
    done = machine.reclaim(1)
    machine.check()
    assert done.pages == 1
    assert task.mincore(start, 4 * PAGE).astype(int).tolist() == [1, 1, 1, 0]


def test_a_file_larger_than_memory_is_written_through_it():
    machine = pmcore.open("sim", memory="8 MiB", kernel="6.18")
    task, fd, start = opened(machine, 4096)
    for page in range(0, 4096, 64):
        task.write(start + page * PAGE + 100, b"%d!" % page)
    task.touch(start, 4096 * PAGE, write=True)
    machine.check()
    assert machine.counters["written"] > 2000
    assert [task.pread(fd, 5, page * PAGE + 100)[:4] for page in (0, 64, 4032)] == [
        b"0!\0\0",
        b"64!\0",
        b"4032",
    ]
    assert task.pread(fd, 9, 4095 * PAGE) == b"file:4095"
    task.exit()
    machine.check()


@pytest.mark.rule("DF-009")
def test_dropping_caches_marks_what_is_dirty(machine):
    """As Linux 6.18.44 does: it goes once it is written, and is not mapped around a fault until then."""
    task = machine.spawn()
    fd = task.open_file("file", pages=8)
    start = task.mmap(8 * PAGE, flags=SHARED, fd=fd)
    task.pwrite(fd, b"x", 3 * PAGE)
    task.pread(fd, 2 * PAGE, 3 * PAGE)
    machine.drop_caches()
    assert task.mincore(start, 8 * PAGE).tolist() == [False] * 3 + [True] + [False] * 4
    task.touch(start + 6 * PAGE, PAGE, write=False)
    assert task.process.pagemap(start, start + 8 * PAGE).present.tolist() == [False] * 6 + [True, False]
    task.touch(start + 3 * PAGE, PAGE, write=False)
    pfn = int(task.process.pagemap(start + 3 * PAGE, start + 4 * PAGE).pfn[0])
    flags = machine.kpageflags(pfn, 1)[0]
    assert (
        flags.value & (PageFlag.RECLAIM | PageFlag.DIRTY | PageFlag.REFERENCED)
        == PageFlag.RECLAIM | PageFlag.DIRTY
    )
    machine.check()
