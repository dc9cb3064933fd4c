"""Memory cgroups of the simulated machine: swap, migration, merging, collapse; state, invariants, refusals."""

from __future__ import annotations

import contextlib
import errno
import functools

import numpy as np
import pytest

import pmcore
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import load_machine
from pmcore.backends.sim.physical.charges import Limit
from pmcore.errors import AddressSpaceFault, NotModelled, OutOfMemory, SyscallError
from pmcore.lockstep.generator import Seeded, random_program
from pmcore.program import Run
from pmcore.protocols import FrameFile
from pmcore.uapi import Madvise, PageFlag

PAGE, PMD = 4096, 1 << 21


def make(**settings):
    settings = {
        "memory": "64 MiB",
        "swap": "16 MiB",
        "kernel": "6.18",
        "config": ["CONFIG_MEMCG_V1"],
        **settings,
    }
    return pmcore.open("sim", **settings)


def owners(machine, task, start, pages):
    """Whom pages are charged to, by path; None: nobody."""
    pfns = task.process.pagemap(start, start + pages * PAGE).pfn
    names = {inode: path for path, inode in machine.groups().items()}
    words = machine.frames_at(FrameFile.KPAGECGROUP, np.asarray(pfns, dtype=np.uint64))
    return [names[word] if word else None for word in words.tolist()]


def in_group(machine, path, pages=4):
    """A task in a new group, with pages that it has written."""
    machine.make_group(path)
    task = machine.spawn()
    machine.move_task(task, path)
    start = task.mmap(pages * PAGE)
    task.touch(start, pages * PAGE)
    return task, start


def test_a_machine_without_groups_shows_nothing():
    machine = make()
    task = machine.spawn()
    start = task.mmap(PAGE)
    task.write(start, b"x")
    assert owners(machine, task, start, 1) == [None]
    machine.make_group("a")
    assert owners(machine, task, start, 1) == [""]


@pytest.mark.rule("CG-008")
@pytest.mark.parametrize("kind", ["compressed", "device", "disk"])
def test_swap_remembers_the_group(kind):
    machine = make(swap_kind=kind)
    task, start = in_group(machine, "a")
    machine.make_group("c")
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
    machine.reclaim(64)
    machine.move_task(task, "c")
    task.touch(start, PAGE, write=False)  # one by one, and in a row
    task.touch(start, 2 * PAGE)
    assert owners(machine, task, start, 2) == ["a", "a"]
    machine.check()
    machine.remove_group("a")
    task.touch(start, 4 * PAGE)
    assert owners(machine, task, start, 4) == ["", "", "c", "c"]
    machine.check()


@pytest.mark.rule("CG-008")
def test_a_group_that_is_gone_when_its_page_leaves_leaves_it_to_the_one_above():
    machine = make()
    machine.make_group("a")
    task, start = in_group(machine, "a/b")
    machine.make_group("c")
    machine.move_task(task, "c")
    machine.remove_group("a/b")
    task.madvise(start, PAGE, Madvise.PAGEOUT)
    task.touch(start, PAGE)
    assert owners(machine, task, start, 1) == ["a"]
    machine.check()


@pytest.mark.rule("CG-008")
def test_swapoff_charges_for_the_group_or_for_who_has_the_page():
    machine = make()
    task, start = in_group(machine, "a")
    other, there = in_group(machine, "b")
    fd = task.memfd_create("m")
    task.ftruncate(fd, PAGE)
    shared = task.mmap(PAGE, flags=1, fd=fd)
    task.write(shared, b"x")
    for one, place in ((task, start), (other, there)):
        one.madvise(place, 4 * PAGE, Madvise.PAGEOUT)
    machine.reclaim(64)
    machine.make_group("c")
    machine.move_task(task, "c")
    machine.remove_group("a")
    machine.swapoff(0)
    assert owners(machine, task, start, 4) == ["c"] * 4
    assert owners(machine, other, there, 4) == ["b"] * 4
    task.read(shared, 1)
    assert owners(machine, task, shared, 1) == [""]
    machine.check()


@pytest.mark.rule("CG-012")
def test_a_page_that_migrates_takes_its_charge_along():
    machine = make(block_size="8 MiB")
    task, start = in_group(machine, "a")
    held = machine.spawn()
    place = held.mmap(12 << 20)
    held.touch(place, 12 << 20)  # whatever is taken next lies above the kernel's own block
    machine.move_task(task, "a")
    more = task.mmap(4 * PAGE)
    task.touch(more, 4 * PAGE)
    machine.offline_block(int(task.process.pagemap(more, more + PAGE).pfn[0]) // 2048)
    assert machine.counters["migrate"] >= 4
    assert owners(machine, task, more, 4) == ["a"] * 4
    assert owners(machine, held, place, 2) == ["", ""]
    assert owners(machine, task, start, 4) == ["a"] * 4
    machine.check()


@pytest.mark.rule("CG-012")
def test_a_poisoned_page_is_charged_to_nobody():
    machine = make()
    task, start = in_group(machine, "a", 4)
    before = machine.group_usage("a")
    pfn = int(task.process.pagemap(start, start + PAGE).pfn[0])
    with pytest.raises(AddressSpaceFault):  # the page was dirty: its process is told
        task.madvise(start, PAGE, Madvise.HWPOISON)
    task.madvise(start + PAGE, PAGE, Madvise.SOFT_OFFLINE)
    machine.check()
    assert machine.group_usage("a") == before - PAGE
    assert int(machine.kpagecgroup(pfn, 1)[0]) == 0
    assert owners(machine, task, start + PAGE, 3) == ["a"] * 3
    machine.limit_group("a", before)
    task.madvise(start, PAGE, Madvise.DONTNEED)
    task.touch(start, PAGE)
    machine.check()


@pytest.mark.rule("CG-012")
def test_merged_pages_stay_with_one_group_and_copies_go_to_who_gets_them():
    machine = make()
    task, start = in_group(machine, "a", 1)
    other, there = in_group(machine, "b", 1)
    for one, place in ((task, start), (other, there)):
        one.madvise(place, PAGE, Madvise.MERGEABLE)
        one.write(place, b"same")
    machine.ksm.run(2)
    assert owners(machine, task, start, 1) == owners(machine, other, there, 1) == ["b"]
    machine.check()
    machine.ksm_unmerge()
    assert owners(machine, task, start, 1) == ["a"]
    assert owners(machine, other, there, 1) == ["b"]
    machine.check()


@pytest.mark.rule("CG-009")
def test_khugepaged_charges_the_group_that_the_process_is_in():
    machine = make(policy={"pmd": "madvise"})
    task = machine.spawn()
    start = task.mmap(2 * PMD, addr=1 << 40)
    task.touch(start, PMD)
    machine.make_group("a")
    machine.move_task(task, "a")
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    machine.khugepaged.step(1 << 20)
    assert task.process.smaps(start, start + PMD)[0].counters["AnonHugePages"] == PMD
    assert owners(machine, task, start, 512) == ["a"] * 512
    machine.check()


@pytest.mark.rule("KG-004")
@pytest.mark.parametrize(("kernel", "tail"), [("6.1", None), ("6.12", "a")])
def test_tails(kernel, tail):
    machine = make(kernel=kernel, policy={"pmd": "always"})
    machine.make_group("a")
    task = machine.spawn()
    machine.move_task(task, "a")
    start = task.mmap(PMD, addr=1 << 40)
    task.write(start, b"x")
    assert owners(machine, task, start, 2) == ["a", tail]
    task.munmap(start, PAGE)
    machine.reclaim(1 << 14)
    machine.check()


def test_what_the_kernel_keeps_is_charged_to_nobody():
    machine = make(hugepages={"2 MiB": 2})
    task, start = in_group(machine, "a")
    machine.balloon_inflate(16)
    huge = task.mmap(PMD, flags=0x40022)
    task.write(huge, b"x")
    task.madvise(start, PAGE, Madvise.DONTNEED)
    task.read(start, 1)
    count = machine.frame_count()
    flags, owner = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.uint64)
    machine.read_frames(FrameFile.KPAGEFLAGS, 0, flags)
    machine.read_frames(FrameFile.KPAGECGROUP, 0, owner)
    kept = (
        PageFlag.SLAB
        | PageFlag.RESERVED
        | PageFlag.OFFLINE
        | PageFlag.HUGE
        | PageFlag.ZERO_PAGE
        | PageFlag.BUDDY
    )
    assert not owner[(flags & np.uint64(kept)) != 0].any()
    assert not owner[flags == 0].any()
    tables = owner[(flags & np.uint64(PageFlag.PGTABLE)) != 0]
    assert set(tables.tolist()) == {0, machine.groups()["a"]}
    machine.check()


@pytest.mark.rule("CG-005", "CG-011")
def test_refusals_change_nothing():
    for config in ([], ["CONFIG_MEMCG_V1"]):
        machine = make(config=config)
        task, _ = in_group(machine, "a")
        machine.make_group("b")
        machine.make_group("b/c")
        before = machine.digest()
        calls = [
            (machine.make_group, "a"),
            (machine.make_group, "x/y"),
            (machine.remove_group, "a"),
            (machine.remove_group, "b"),
            (machine.remove_group, ""),
            (machine.remove_group, "x"),
        ]
        if not config:
            calls += [(machine.make_group, "a/x"), (functools.partial(machine.move_task, task), "b")]
        for call, path in calls:
            with pytest.raises(SyscallError):
                call(path)
            assert machine.digest() == before
    task.exit()
    with pytest.raises(SyscallError):
        machine.move_task(task, "a")
    with pytest.raises(SyscallError):
        make(config=["!CONFIG_MEMCG"]).make_group("a")


def test_going_back_and_saving(tmp_path):
    machine = make()
    task, start = in_group(machine, "a", 8)
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
    state, digest, seen = machine.checkpoint(), machine.digest(), owners(machine, task, start, 8)
    machine.save(tmp_path / "machine")
    machine.make_group("b")
    machine.move_task(task, "b")
    machine.remove_group("a")
    task.touch(start, 8 * PAGE)
    assert machine.digest() != digest
    machine.restore(state)
    machine.check()
    assert machine.digest() == digest
    again = load_machine(tmp_path / "machine")
    assert again.digest() == digest
    for one in (machine, again):
        alive = next(iter(one.tasks()))
        assert owners(one, alive, start, 8) == seen
        alive.touch(start, 8 * PAGE)
        assert owners(one, alive, start, 8) == ["a"] * 8
        one.check()
    plain = make()
    plain_digest = plain.digest()
    blank = plain.checkpoint()
    in_group(plain, "a")
    plain.restore(blank)
    assert plain.digest() == plain_digest


@pytest.mark.parametrize(
    ("fault", "invariant"),
    [
        (lambda m, p: m.core.memory.frames.group_at.__setitem__(p, 7), "that there is, or was"),
        (lambda m, p: m.core.memory.frames.group_at.__setitem__(0, 1), "somebody's"),
        (lambda m, p: setattr(m.core.memory, "grouped", False), "without groups"),
        (lambda m, p: m.core.swap.there[0].group.__setitem__(9, 1), "a slot remembers"),
        (lambda m, p: m.core.memory.charges.pages.__setitem__(1, 3), "charges are counted"),
        (lambda m, p: m.core.memory.charges.limits.update({1: (Limit(1, 3, (1,)),)}), "more than its limit"),
        (lambda m, p: setattr(m.core.groups.there[1], "online", False), "a task is in a group"),
        (lambda m, p: setattr(m.core.groups.there[1], "parent", 1), "a group has a parent"),
        (lambda m, p: setattr(m.core.groups.there[1], "path", "x/y"), "directory lies in its parent"),
        (lambda m, p: setattr(m.core.groups.there[1], "inode", 1), "directories of their own"),
    ],
)
def test_planted_faults_are_found(fault, invariant):
    machine = make()
    task, start = in_group(machine, "a")
    machine.check()
    fault(machine, int(task.process.pagemap(start, start + PAGE).pfn[0]))
    with pytest.raises(BrokenInvariant, match=invariant):
        machine.check()


def test_a_folio_with_two_owners_is_found():
    machine = make(policy={"pmd": "always"})
    machine.make_group("a")
    task = machine.spawn()
    machine.move_task(task, "a")
    start = task.mmap(PMD, addr=1 << 40)
    task.write(start, b"x")
    machine.core.memory.frames.group_at[int(task.process.pagemap(start, start + PAGE).pfn[0]) + 3] = 0
    with pytest.raises(BrokenInvariant, match="charged to one group"):
        machine.check()


# -- limits ----------------------------------------------------------------------------------------------


def limited(machine, path="a", pages=100):
    """A task in a new group that may have so many pages."""
    machine.make_group(path)
    machine.limit_group(path, pages * PAGE)
    task = machine.spawn()
    machine.move_task(task, path)
    return task


@pytest.mark.rule("CG-014")
@pytest.mark.parametrize("kind", ["compressed", "disk"])
@pytest.mark.parametrize("write", [True, False])
def test_a_group_at_its_limit_reclaims_its_own_pages(kind, write):
    machine = make(swap_kind=kind)
    other, there = in_group(machine, "b", 64)
    task = limited(machine)
    start = task.mmap(300 * PAGE)
    for place in range(300):
        task.write(start + place * PAGE, bytes([place % 251 + 1]))
        assert machine.group_usage("a") <= 100 * PAGE
    machine.check()
    task.touch(start, 300 * PAGE, write=write)
    machine.check()
    assert machine.group_usage("a") <= 100 * PAGE
    assert [task.read(start + place * PAGE, 1)[0] for place in range(300)] == [
        p % 251 + 1 for p in range(300)
    ]
    machine.check()
    assert other.process.pagemap(there, there + 64 * PAGE).present.all()
    assert task.process.pagemap(start, start + 300 * PAGE).present.sum() < 100


@pytest.mark.rule("CG-014")
def test_the_limit_of_a_group_above_counts_for_those_below():
    machine = make()
    machine.make_group("a")
    machine.limit_group("a", 100 * PAGE)
    (one, first), (two, second) = in_group(machine, "a/b", 60), in_group(machine, "a/c", 60)
    machine.check()
    assert machine.group_usage("a") <= 100 * PAGE
    assert machine.group_usage("a") == machine.group_usage("a/b") + machine.group_usage("a/c")
    machine.move_task(one, "")
    machine.remove_group("a/b")
    two.touch(second, 60 * PAGE)
    machine.check()
    assert machine.group_usage("a") <= 100 * PAGE
    one.touch(first, 60 * PAGE)
    machine.check()


@pytest.mark.rule("CG-014")
def test_nothing_left_to_reclaim_is_an_error_that_names_the_group():
    machine = make(swap=0)
    task = limited(machine)
    start = task.mmap(300 * PAGE)
    with pytest.raises(OutOfMemory, match="cgroup 'a' is at its limit"):
        task.touch(start, 300 * PAGE)
    machine.check()
    assert 90 * PAGE < machine.group_usage("a") <= 100 * PAGE
    with pytest.raises(OutOfMemory, match="cgroup 'a' is at its limit"):
        task.write(start + 200 * PAGE, b"x")
    other = machine.spawn()
    other.touch(other.mmap(300 * PAGE), 300 * PAGE)
    machine.limit_group("a", None)
    task.touch(start, 300 * PAGE)
    machine.check()


@pytest.mark.rule("CG-014")
def test_a_huge_page_over_the_limit_becomes_small_ones():
    machine = make(policy={"pmd": "always", "thp_sizes": {"64kB": "always"}})
    task = limited(machine)
    start = task.mmap(PMD, addr=1 << 40)
    task.touch(start, 32 * PAGE)
    machine.check()
    assert machine.group_usage("a") <= 100 * PAGE
    task.touch(start, 200 * PAGE)
    machine.check()
    assert machine.group_usage("a") <= 100 * PAGE
    assert not task.process.smaps(start, start + PMD)[0].counters["AnonHugePages"]


@pytest.mark.rule("CG-013")
def test_a_smaller_limit():
    machine = make()
    task, start = in_group(machine, "a", 200)
    other, there = in_group(machine, "b", 200)
    machine.limit_group("a", 100 * PAGE + 1)
    machine.check()
    assert machine.group_usage("a") <= 100 * PAGE
    assert other.process.pagemap(there, there + 200 * PAGE).present.all()
    task.mlock(start, 40 * PAGE)
    with pytest.raises(SyscallError) as caught:
        machine.limit_group("a", 20 * PAGE)
    assert caught.value.errno == errno.EBUSY
    task.touch(start, 90 * PAGE)
    machine.check()
    with pytest.raises(SyscallError) as caught:
        machine.limit_group("", PAGE)
    assert caught.value.errno == errno.EINVAL
    version_2 = make(config=[], swap=0)
    in_group(version_2, "a", 200)
    with pytest.raises(NotModelled, match="killing a process"):
        version_2.limit_group("a", PAGE)
    version_2.check()


@pytest.mark.rule("CG-014")
def test_what_comes_back_from_swap_counts_against_the_limit_of_its_own_group():
    machine = make()
    task = limited(machine)
    start = task.mmap(90 * PAGE)
    task.touch(start, 90 * PAGE)
    task.madvise(start, 90 * PAGE, Madvise.PAGEOUT)
    machine.make_group("b")
    machine.move_task(task, "b")
    machine.limit_group("a", 40 * PAGE)
    task.touch(start, 90 * PAGE)
    machine.check()
    assert machine.group_usage("a") <= 40 * PAGE
    with pytest.raises(NotModelled, match="swapoff"):
        machine.swapoff(0)
    machine.limit_group("a", None)
    machine.swapoff(0)
    machine.check()
    assert 90 * PAGE <= machine.group_usage("a") < 100 * PAGE


@pytest.mark.rule("CG-015")
def test_usage_is_what_is_charged():
    machine = make()
    task, start = in_group(machine, "a", 10)
    tables = machine.group_usage("a") - 10 * PAGE
    assert tables > 0
    child = task.fork()
    child.touch(start, 3 * PAGE)
    task.munmap(start, PAGE)
    machine.check()
    child.exit()
    assert machine.group_usage("a") == 9 * PAGE + tables
    task.exit()
    assert machine.group_usage("a") == 0
    machine.check()


def test_limits_go_along_when_a_machine_is_saved(tmp_path):
    machine = make()
    task = limited(machine)
    start = task.mmap(300 * PAGE)
    task.touch(start, 80 * PAGE)
    machine.save(tmp_path / "machine")
    again = load_machine(tmp_path / "machine")
    for one in (machine, again):
        next(iter(one.tasks())).touch(start, 300 * PAGE)
        one.check()
        assert one.group_usage("a") <= 100 * PAGE
    assert machine.digest() == again.digest()


@pytest.mark.parametrize("version", [[], ["CONFIG_MEMCG_V1"]])
def test_random_programs_keep_the_machine_well(version):
    for number in range(12):
        machine = make(memory="128 MiB", config=version)
        run = Run(random_program(Seeded(f"groups:{number}"), machine.profile, focus="cgroups"), machine)
        for place, step in enumerate(run.program.steps):
            run.advance(step)
            machine.check()
            if place % 5 == 4:  # and with limits, which the generator does not draw
                for path in machine.groups():
                    with contextlib.suppress(SyscallError, NotModelled):
                        machine.limit_group(path, [None, 40 * PAGE, 700 * PAGE][place // 5 % 3])
                    machine.check()
        run.end()
        machine.check()
        assert list(machine.groups()) == [""]
