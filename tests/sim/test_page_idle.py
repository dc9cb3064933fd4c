"""Idle page tracking on the simulated machine: the bitmap, what makes a page not idle, and what keeps it young."""

from __future__ import annotations

import errno

import numpy as np
import pytest

import pmcore
from pmcore import PageFlag
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.physical.frames import MOVED_YOUNG
from pmcore.errors import InvalidArgument, Missing, NotPermitted, SyscallError
from pmcore.lockstep.generator import random_program
from pmcore.lockstep.generator.draw import Seeded
from pmcore.program import Program, Run, run
from pmcore.program import steps as s
from pmcore.protocols import IDLE_BITMAP
from pmcore.uapi import ClearRefs, Madvise, MapFlag

PAGE, PMD = 4096, 1 << 21
NO_BITMAP = pmcore.preset("6.12").changed(remove=["page_idle"])


@pytest.fixture
def machine():
    with pmcore.open("sim", memory="64 MiB", swap="16 MiB", swap_kind="disk", kernel="6.12") as machine:
        yield machine
        machine.check()


def pfns(task, start, pages=1):
    return task.process.pagemap(start, start + pages * PAGE).pfn


def shown(machine, frames):
    """Whether kpageflags says IDLE of each frame, without bringing it up to date."""
    return [bool(int(machine.kpageflags(int(pfn), 1).values[0]) & PageFlag.IDLE) for pfn in frames]


def idle(machine, frames):
    """What the bitmap says of each frame."""
    words = np.frombuffer(bitmap(machine), dtype=np.uint64)
    return [bool(words[int(pfn) >> 6] >> np.uint64(int(pfn) & 63) & np.uint64(1)) for pfn in frames]


def bitmap(machine):
    """All of it, a page of it at a time, as a reader has to."""
    data = b""
    while piece := machine.pread(IDLE_BITMAP, len(data), 1 << 20):
        data += piece
    return data


def referenced(task):
    return sum(area.counters["Referenced"] for area in task.process.smaps())


def mapped(machine, pages=4):
    task = machine.spawn()
    start = task.mmap(pages * PAGE)
    task.touch(start, pages * PAGE)
    return task, start, pfns(task, start, pages)


@pytest.mark.rule("ID-001")
@pytest.mark.rule("ID-003")
def test_a_bit_a_frame_and_zeros_do_nothing(machine):
    _task, _start, frames = mapped(machine)
    assert (
        machine.pwrite(
            IDLE_BITMAP, int(frames[0]) // 64 * 8, (1 << int(frames[0]) % 64).to_bytes(8, "little")
        )
        == 8
    )
    assert shown(machine, frames) == idle(machine, frames) == [True, False, False, False]
    before = machine.digest()
    assert machine.pwrite(IDLE_BITMAP, int(frames[0]) // 64 * 8, bytes(8)) == 8
    assert machine.digest() == before
    machine.mark_idle(frames[1:3])
    assert idle(machine, frames) == [True, True, True, False]
    assert len(bitmap(machine)) == machine.frame_count() // 8


@pytest.mark.rule("ID-002")
@pytest.mark.rule("ID-003")
@pytest.mark.parametrize(("offset", "length"), [(1, 8), (4, 8), (0, 1), (0, 12), (8, 4095)])
def test_words_alone_can_be_read_and_written(machine, offset, length):
    with pytest.raises(InvalidArgument):
        machine.pread(IDLE_BITMAP, offset, length)
    with pytest.raises(InvalidArgument):
        machine.pwrite(IDLE_BITMAP, offset, bytes(length))


@pytest.mark.rule("ID-002")
@pytest.mark.rule("ID-003")
def test_a_call_takes_a_page_and_ends_with_memory(machine):
    """64 MiB are 2048 bytes of bitmap; a larger machine's comes a page at a time."""
    end = machine.frame_count() // 8
    assert machine.pread(IDLE_BITMAP, 3, 0) == b"" == machine.pread(IDLE_BITMAP, end, 8)
    assert len(machine.pread(IDLE_BITMAP, 8, 4096)) == end - 8
    assert machine.pwrite(IDLE_BITMAP, end - 8, bytes(16)) == 8
    assert machine.pwrite(IDLE_BITMAP, 3, b"") == 0
    with pytest.raises(SyscallError) as refused:
        machine.pwrite(IDLE_BITMAP, end, bytes(8))
    assert refused.value.errno == errno.ENXIO
    with pmcore.open("sim", memory="1 GiB", kernel="6.12") as large:
        assert len(large.pread(IDLE_BITMAP, 0, 8192)) == 4096 == len(large.pread(IDLE_BITMAP, 8, 4097))
        assert large.pwrite(IDLE_BITMAP, 0, bytes(5000)) == 4096


@pytest.mark.rule("ID-004")
def test_only_pages_of_lru_lists_become_idle():
    with pmcore.open("sim", memory="64 MiB", kernel="6.12", hugepages={"2 MiB": 1}) as machine:
        task = machine.spawn()
        start = task.mmap(PAGE)
        task.touch(start, PAGE)
        empty = task.mmap(PAGE)
        task.touch(empty, PAGE, write=False)
        huge = task.mmap(PMD, flags=MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.HUGETLB)
        task.touch(huge, PAGE)
        machine.mark_idle(np.arange(machine.frame_count()))
        flags = machine.kpageflags().values
        (found,) = np.flatnonzero(flags & np.uint64(PageFlag.IDLE))
        assert found == pfns(task, start)[0]
        assert sum(int(word).bit_count() for word in np.frombuffer(bitmap(machine), dtype=np.uint64)) == 1
        machine.check()


@pytest.mark.rule("ID-005")
@pytest.mark.rule("ID-010")
@pytest.mark.parametrize(("kernel", "tails"), [("6.12", True), ("6.1", True), ("5.10", False)])
def test_a_huge_page_is_idle_by_its_head(kernel, tails):
    with pmcore.open("sim", memory="64 MiB", kernel=kernel, policy={"pmd": "always"}) as machine:
        task = machine.spawn()
        start = task.mmap(PMD, addr=1 << 40, flags=0x32)
        task.touch(start, PMD)
        frames = pfns(task, start, 512)
        machine.mark_idle(frames[1:])
        assert not any(shown(machine, frames))
        machine.mark_idle(frames[:1])
        assert shown(machine, frames[[0, 1, 511]]) == [True, tails, tails]
        assert idle(machine, frames[:3]) == [True, False, False]
        task.touch(start + 100 * PAGE, PAGE)
        assert all(shown(machine, frames[:1]))  # nobody has looked yet (KF-026)
        assert not any(idle(machine, frames[:1]))
        machine.mark_idle(frames[:1])
        task.madvise(start, PAGE, Madvise.DONTNEED)
        machine.check()


@pytest.mark.rule("ID-005")
@pytest.mark.rule("ID-010")
def test_every_page_of_a_huge_page_taken_apart_stays_idle(machine):
    task = machine.spawn()
    start = task.mmap(PMD, addr=1 << 40, flags=0x32)
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    for page in range(512):
        task.write(start + page * PAGE, b"kept")  # zeros would become the zero page
    frames = pfns(task, start, 512)
    machine.mark_idle(frames[:1])
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)  # in part: taken apart first
    left = pfns(task, start + 4 * PAGE, 508)
    assert len(left) == 508
    assert all(idle(machine, left))


@pytest.mark.rule("ID-006")
@pytest.mark.rule("KF-026")
def test_an_access_is_noticed_when_the_bitmap_is_read(machine):
    task, start, frames = mapped(machine)
    child = task.fork()
    machine.mark_idle(frames)
    assert idle(machine, frames) == [True] * 4
    task.touch(start, PAGE, write=False)
    child.touch(start + PAGE, PAGE, write=False)
    assert shown(machine, frames) == [True] * 4
    assert idle(machine, frames) == [False, False, True, True] == shown(machine, frames)


@pytest.mark.rule("ID-006")
@pytest.mark.rule("ID-007")
def test_the_access_that_was_taken_counts_in_smaps(machine):
    task, start, frames = mapped(machine)
    task.process.clear_refs(ClearRefs.ALL)
    task.touch(start, 2 * PAGE)
    machine.mark_idle(frames)
    assert referenced(task) == 2 * PAGE
    task.process.clear_refs(ClearRefs.ALL)
    assert referenced(task) == 0


@pytest.mark.rule("ID-007")
def test_reclaim_spares_what_was_young_once(machine):
    task, start, frames = mapped(machine, 64)
    task.process.clear_refs(ClearRefs.ALL)
    task.touch(start, 32 * PAGE)
    machine.mark_idle(frames)
    assert machine.reclaim(32).pages >= 0
    machine.settle()
    there = task.process.pagemap(start, start + 64 * PAGE).present
    assert there[:32].all()
    assert not there[32:].all()
    flags = machine.core.memory.frames.flags[frames[:32].astype(np.int64)]
    assert not (flags & np.uint64(MOVED_YOUNG)).any()


@pytest.mark.rule("ID-008")
def test_reclaim_that_finds_an_access_makes_the_page_not_idle(machine):
    task, start, frames = mapped(machine, 64)
    task.process.clear_refs(ClearRefs.ALL)
    machine.mark_idle(frames)
    task.touch(start, 32 * PAGE, write=False)
    machine.reclaim(16)
    assert not any(shown(machine, frames[:32]))


@pytest.mark.rule("ID-008")
@pytest.mark.parametrize("disk", [False, True])
def test_system_calls_make_a_page_not_idle_at_once(machine, disk):
    task = machine.spawn()
    fd = task.open_file("f", pages=4) if disk else task.memfd_create("f")
    if not disk:
        task.ftruncate(fd, 4 * PAGE)
    task.pwrite(fd, b"x" * 4 * PAGE, 0)
    start = task.mmap(4 * PAGE, flags=MapFlag.SHARED, fd=fd)
    task.touch(start, 4 * PAGE, write=False)
    frames = pfns(task, start, 4)
    machine.mark_idle(frames)
    task.pread(fd, PAGE, 0)
    assert shown(machine, frames) == [False, True, True, True]
    task.pwrite(fd, b"y", PAGE)
    assert shown(machine, frames) == [False, False, True, True]
    task.touch(start + 2 * PAGE, PAGE, write=False)
    task.munmap(start + 2 * PAGE, 2 * PAGE)
    assert shown(machine, frames) == [False, False, False, True]
    if disk:
        task.fsync(fd)
        assert shown(machine, frames)[3]
    again = task.mmap(PAGE, flags=MapFlag.SHARED | MapFlag.POPULATE, fd=fd, offset=3 * PAGE)
    assert not any(shown(machine, pfns(task, again)))


@pytest.mark.rule("ID-009")
@pytest.mark.parametrize("forget", ["clear_refs", "cold"])
def test_what_forgets_accesses_hides_them_from_tracking(machine, forget):
    task, start, frames = mapped(machine)
    machine.mark_idle(frames)
    task.touch(start, 4 * PAGE, write=False)
    if forget == "cold":
        task.madvise(start, 4 * PAGE, Madvise.COLD)
    else:
        task.process.clear_refs(ClearRefs.ANON)
    assert idle(machine, frames) == [True] * 4
    assert referenced(task) == 0


@pytest.mark.rule("ID-009")
@pytest.mark.rule("ID-010")
def test_a_page_that_was_out_comes_back_not_idle(machine):
    task, start, frames = mapped(machine)
    machine.mark_idle(frames)
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
    machine.reclaim(64)
    task.touch(start, 4 * PAGE)
    assert not any(shown(machine, pfns(task, start, 4)))


@pytest.mark.rule("ID-010")
def test_a_migrated_page_stays_idle_and_a_copy_is_not():
    with pmcore.open("sim", memory="64 MiB", kernel="6.12", block_size="4 MiB") as machine:
        task = machine.spawn()
        start = task.mmap(8 * PAGE, addr=1 << 40)
        task.touch(start + 7 * PAGE, PAGE)  # its page tables lie in the first block
        task.touch(task.mmap(8 << 20), 8 << 20)
        task.touch(start, 4 * PAGE)
        frames = pfns(task, start, 4)
        machine.mark_idle(frames)
        machine.offline_block(int(frames[0]) * PAGE // machine.block_size)
        moved = pfns(task, start, 4)
        assert not set(moved.tolist()) & set(frames.tolist())
        assert idle(machine, moved) == [True] * 4
        child = task.fork()
        child.touch(start, PAGE)
        assert idle(machine, [*pfns(child, start), *pfns(task, start)]) == [False, True]
        machine.check()


@pytest.mark.rule("ID-011")
def test_without_the_option_there_is_no_bitmap():
    with pmcore.open("sim", memory="16 MiB", kernel=NO_BITMAP) as machine:
        assert IDLE_BITMAP not in machine.files()
        for call in (
            lambda: machine.pread(IDLE_BITMAP, 0, 8),
            lambda: machine.pwrite(IDLE_BITMAP, 0, bytes(8)),
            lambda: machine.mark_idle(np.zeros(1, dtype=np.uint64)),
        ):
            with pytest.raises(Missing, match="CONFIG_IDLE_PAGE_TRACKING"):
                call()


@pytest.mark.rule("ID-001")
def test_the_bitmap_is_roots():
    with (
        pmcore.open("sim", memory="16 MiB", kernel="6.12", privileged=False) as machine,
        pytest.raises(NotPermitted),
    ):
        machine.pread(IDLE_BITMAP, 0, 8)


@pytest.mark.rule("ID-006")
@pytest.mark.rule("ID-011")
def test_programs_mark_and_read():
    steps = (
        s.Map(area="a", pages=4),
        s.Touch(area="a", pages=3),
        s.MarkIdle(area="a", pages=4),
        s.Touch(area="a", page=1, pages=1, write=False),
        s.ReadIdle(area="a", pages=4),
    )
    with pmcore.open("sim", memory="16 MiB", kernel="6.12") as machine:
        assert run(Program(name="idle", steps=steps), machine).outcomes[-1].value == [1, 0, 1, -1]
    with pmcore.open("sim", memory="16 MiB", kernel=NO_BITMAP) as machine:
        outcomes = run(Program(name="idle", steps=steps), machine).outcomes
        assert [outcome.errno for outcome in outcomes] == [0, 0, errno.ENOENT, 0, errno.ENOENT]


@pytest.mark.rule("ID-003")
def test_a_checkpoint_holds_what_is_idle_and_young(machine):
    task, start, frames = mapped(machine)
    machine.mark_idle(frames)
    task.touch(start, PAGE)
    state, digest = machine.checkpoint(), machine.digest()
    assert idle(machine, frames) == [False, True, True, True]
    assert machine.digest() != digest
    machine.restore(state)
    assert machine.digest() == digest
    assert idle(machine, frames) == [False, True, True, True]


@pytest.mark.rule("ID-004")
def test_the_check_finds_what_cannot_be_idle(machine):
    task, start, frames = mapped(machine)
    flags = machine.core.memory.frames.flags
    free = int(np.flatnonzero(flags == np.uint64(PageFlag.BUDDY))[0])
    flags[free] |= np.uint64(PageFlag.IDLE)
    with pytest.raises(BrokenInvariant, match="idle"):
        machine.check()
    flags[free] = np.uint64(PageFlag.BUDDY)
    flags[frames[0]] |= np.uint64(MOVED_YOUNG)
    with pytest.raises(BrokenInvariant, match="idle"):  # nobody has marked anything yet
        machine.check()
    flags[frames[0]] &= np.uint64((1 << 62) - 1)
    task.munmap(start, PAGE)


@pytest.mark.rule("ID-012")
def test_nothing_on_an_lru_list_is_skipped_between_calls(machine):
    """Frames of all sorts are marked at once: every one that shows LRU shows IDLE after, and no other."""
    task, start, _frames = mapped(machine, 64)
    task.mlock(start, 4 * PAGE)
    fd = task.open_file("f", pages=8)
    task.pread(fd, 8 * PAGE, 0)
    task.madvise(start + 32 * PAGE, 8 * PAGE, Madvise.PAGEOUT)
    machine.mark_idle(np.arange(machine.frame_count()))
    flags = machine.kpageflags().values
    on_lists, marked = (flags & np.uint64(bit) != 0 for bit in (PageFlag.LRU, PageFlag.IDLE))
    assert on_lists.sum() >= 64
    assert (on_lists == marked).all()


@pytest.mark.rule("ID-013")
def test_what_a_workload_does_not_use_is_told(machine):
    """By the steps of the document, with a working set of 10 pages of 64."""
    task, start, frames = mapped(machine, 64)
    machine.mark_idle(frames)
    task.touch(start + 7 * PAGE, 10 * PAGE, write=False)
    assert sum(idle(machine, frames)) == 54
    assert int(machine.kpageflags().has(PageFlag.IDLE).sum()) == 54


@pytest.mark.rule("ID-003", "ID-010")
@pytest.mark.parametrize("kernel", ["6.18", "6.12", "5.10"])
def test_random_programs_with_idle_pages(kernel):
    """Two runs are the same, every invariant holds, and going back and reclaim do no harm."""
    profile = pmcore.preset(kernel)
    for seed in range(15):
        program = random_program(Seeded(seed), profile, max_steps=30, hugetlb=False)
        digests = []
        for _ in range(2):
            with pmcore.open("sim", memory="64 MiB", swap="32 MiB", kernel=kernel) as machine:
                state = Run(program, machine)
                for number, step in enumerate(program.steps):
                    state.advance(step)
                    machine.check()
                    if number % 7 == 6:
                        machine.reclaim(64)
                        machine.check()
                digests.append(machine.digest())
        assert digests[0] == digests[1]
