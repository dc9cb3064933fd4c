"""Userfaultfds of children: state, refusals, invariants (what both backends show is in tests/live)."""

from __future__ import annotations

import errno

import pytest

import pmcore
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import load_machine
from pmcore.errors import AddressSpaceFault, SyscallError
from pmcore.program import Program, Run
from pmcore.program import steps as s
from pmcore.uapi import Madvise, UffdFeature

PAGE = 4096
ASYNC = int(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED)
FORK = int(UffdFeature.EVENT_FORK)


def make(**settings):
    return pmcore.open("sim", **{"memory": "64 MiB", "swap": "16 MiB", "kernel": "6.18", **settings})


def watched(machine):
    """A parent and a child under userfaultfds that tell of forks."""
    task = machine.spawn()
    start = task.mmap(8 * PAGE)
    task.touch(start, 8 * PAGE)
    fd = task.userfaultfd(ASYNC | FORK)
    task.uffd_register(fd, start, 8 * PAGE, 2)
    task.uffd_writeprotect(fd, start, 8 * PAGE, protect=True)
    child = task.fork()
    return task, child, start, fd, child.watched_by[task.pid, fd]


@pytest.mark.rule("VM-033")
def test_state_is_kept(tmp_path):
    """Going back, saving and loading keep who watches whom."""
    machine = make()
    task, child, start, fd, new = watched(machine)
    machine.check()
    state, digest = machine.checkpoint(), machine.digest()
    path = tmp_path / "machine.zip"
    machine.save(path)
    task.uffd_unregister(new, start, 8 * PAGE)
    task.close(fd)
    machine.restore(state)
    machine.check()
    assert machine.digest() == digest
    task.uffd_writeprotect(new, start, 4 * PAGE, protect=False)
    assert child.process.pagemap(start, start + 8 * PAGE).uffd_wp.tolist() == [False] * 4 + [True] * 4
    again = load_machine(path)
    assert again.digest() == digest
    parent, youngest = again.tasks()
    parent.uffd_writeprotect(new, start, PAGE, protect=False)
    assert not youngest.process.pagemap(start, start + PAGE).uffd_wp[0]
    assert parent.process.pagemap(start, start + PAGE).uffd_wp[0]


@pytest.mark.rule("VM-033")
def test_who_may_be_told_of_forks():
    with pytest.raises(SyscallError) as caught:
        make(privileged=False).spawn().userfaultfd(FORK)
    assert caught.value.errno == errno.EPERM


@pytest.mark.rule("VM-033")
def test_fork_without_memory_leaves_no_userfaultfd():
    machine = make(memory="8 MiB", swap=0)
    task = machine.spawn()
    start = task.mmap(64 * PAGE)
    fd = task.userfaultfd(ASYNC | FORK)
    task.uffd_register(fd, start, 64 * PAGE, 2)
    task.touch(start, 64 * PAGE)
    rest = task.mmap(16 << 20)
    with pytest.raises(SyscallError, match="ENOMEM"):
        task.touch(rest, 16 << 20)
    forks = 0
    for _ in range(10_000):
        try:
            task.fork()
        except SyscallError as error:
            failed = error.errno
            break
        forks += 1
    assert failed == errno.ENOMEM
    # One for the parent, and one for each child.
    assert len(task.mm.files) == 1 + forks
    machine.check()


@pytest.mark.rule("VM-033")
def test_programs_name_what_comes_of_a_fork():
    """`uffd` makes `uffd_child`, which makes `uffd_child_grandchild`; who opened the first holds them all."""
    machine = make()
    run = Run(Program(name="x", steps=()), machine)
    for step in (
        s.Map(area="a", pages=8),
        s.UffdOpen(features=ASYNC | FORK),
        s.UffdOpen(fd="silent", features=ASYNC),
        s.Fork(child="early"),
        s.UffdRegister(area="a", pages=8),
        s.UffdProtect(area="a", pages=8),
        s.Fork(child="c"),
        s.Fork(task="c", child="g"),
        s.UffdProtect(fd="uffd_c_g", area="a", pages=2, protect=False),
        s.CloseFd(fd="uffd_c"),
    ):
        assert not run.advance(step).errno, step
    assert sorted(run.fds) == ["silent", "uffd", "uffd_c_g"]
    start = run.areas["a"][0]
    found = {n: run.tasks[n].process.pagemap(start, start + 8 * PAGE).uffd_wp.sum() for n in run.tasks}
    assert found == {"main": 8, "early": 0, "c": 0, "g": 6}
    assert run.advance(s.UffdProtect(fd="uffd_c", area="a", pages=1)).errno == errno.EBADF
    machine.check()


def test_check_finds_a_registration_with_somebody_elses():
    machine = make()
    task, child, start, _, _ = watched(machine)
    machine.check()
    vma = child.mm.vmas.at(start)
    right, vma.uffd = vma.uffd, task.mm.vmas.at(start).uffd
    with pytest.raises(BrokenInvariant, match="its own address space"):
        machine.check()
    vma.uffd = right
    machine.check()


# -- filling, poisoning, moving --------------------------------------------------------------------------

SIGBUS = int(UffdFeature.SIGBUS)
HUGETLB = 0x40022


def registered(machine, pages=16, *, mode=1, features=SIGBUS, **mapping):
    task = machine.spawn()
    start = task.mmap(pages * PAGE, **mapping)
    fd = task.userfaultfd(features)
    task.uffd_register(fd, start, pages * PAGE, mode)
    return task, start, fd


def errno_of(call, *arguments, **named):
    with pytest.raises(SyscallError) as caught:
        call(*arguments, **named)
    return caught.value.errno


@pytest.mark.rule("UF-001")
def test_a_fault_that_nobody_answers_waits():
    """The deterministic machine says so instead of standing still, also where the kernel would fault in."""
    machine = make()
    task, start, _ = registered(machine, features=0)
    for call in (
        lambda: task.read(start, 1),
        lambda: task.write(start, b"x"),
        lambda: task.madvise(start, PAGE, Madvise.POPULATE_READ),
    ):
        with pytest.raises(AddressSpaceFault, match="would wait") as caught:
            call()
        assert caught.value.signal == "SIGSTOP"
    machine.check()


@pytest.mark.rule("UF-004")
def test_a_source_that_would_wait_is_no_source():
    machine = make()
    task, start, fd = registered(machine, features=0)
    with pytest.raises(AddressSpaceFault, match="would wait"):
        task.uffd_copy(fd, start, start + PAGE, PAGE)
    machine.check()


@pytest.mark.rule("UF-010")
def test_what_was_done_before_it_stopped_is_kept():
    machine = make()
    task, start, fd = registered(machine)
    source = task.mmap(16 * PAGE)
    task.write(source + PAGE, b"hello")
    assert task.uffd_zeropage(fd, start + 3 * PAGE, PAGE) == PAGE
    assert errno_of(task.uffd_copy, fd, start, source, 8 * PAGE) == errno.EAGAIN
    entries = task.process.pagemap(start, start + 5 * PAGE)
    assert entries.present.tolist() == [True, True, True, True, False]
    assert task.read(start + PAGE, 5) == b"hello"
    assert errno_of(task.uffd_copy, fd, start, source, PAGE) == errno.EEXIST
    machine.check()


@pytest.mark.rule("UF-004", "UF-005", "UF-007")
def test_filling_without_memory_leaves_nothing_half_done():
    machine = make(memory="8 MiB", swap=0)
    task, start, fd = registered(machine, 4096)
    source = task.mmap(PAGE)
    task.write(source, b"x" * PAGE)
    done = 0
    for page in range(4096):
        try:
            task.uffd_copy(fd, start + page * PAGE, source, PAGE)
        except SyscallError as error:
            failed = error.errno
            break
        done += 1
    assert failed == errno.ENOMEM
    assert done > 500
    machine.check()


@pytest.mark.rule("UF-007", "UF-009")
def test_state_with_poison_and_moved_pages_is_kept(tmp_path):
    machine = make()
    task, start, fd = registered(machine, 2048, mode=3)
    task.uffd_poison(fd, start + PAGE, 3 * PAGE)
    origin = task.mmap(16 * PAGE)
    task.touch(origin, 8 * PAGE)
    task.uffd_move(fd, start + 8 * PAGE, origin, 8 * PAGE)
    machine.check()
    digest, path = machine.digest(), tmp_path / "machine.zip"
    machine.save(path)
    again = load_machine(path)
    assert again.digest() == digest
    (other,) = again.tasks()
    with pytest.raises(AddressSpaceFault, match="poisoned"):
        other.read(start + PAGE, 1)
    assert other.process.pagemap(start, start + 16 * PAGE).present.tolist() == [False] * 8 + [True] * 8


@pytest.mark.rule("UF-008")
def test_moving_keeps_frames_and_marks():
    machine = make(kernel="6.12")
    task, start, fd = registered(machine)
    origin = task.mmap(4 * PAGE)
    task.write(origin, b"hello")
    task.touch(origin + PAGE, PAGE, write=False)
    task.process.clear_refs(4)
    before = task.process.pagemap(origin, origin + 2 * PAGE)
    assert not before.soft_dirty.any()
    assert task.uffd_move(fd, start, origin, 2 * PAGE) == 2 * PAGE
    after = task.process.pagemap(start, start + 2 * PAGE)
    assert after.pfn.tolist() == before.pfn.tolist()
    assert after.soft_dirty.tolist() == [True, False]
    assert not task.process.pagemap(origin, origin + 2 * PAGE).values.any()
    assert task.read(start, 5) == b"hello"
    machine.check()


@pytest.mark.parametrize(
    ("version", "calls"),
    [
        ("5.12", {"copy", "zeropage"}),
        ("6.1", {"copy", "zeropage", "continue"}),
        ("6.6", {"copy", "zeropage", "continue", "poison"}),
        ("6.8", {"copy", "zeropage", "continue", "poison", "move"}),
    ],
)
@pytest.mark.rule("UF-006", "UF-007", "UF-008", "UF-010")
def test_kernels_have_the_calls_of_their_version(version, calls):
    """What a kernel does not know is EINVAL, and UFFDIO_REGISTER does not offer it."""
    machine = make(kernel=version)
    task = machine.spawn()
    origin = task.mmap(PAGE)
    task.touch(origin, PAGE)
    memory = task.memfd_create("m")
    task.ftruncate(memory, 4 * PAGE)
    other = task.mmap(4 * PAGE, flags=1, fd=memory)
    task.touch(other, PAGE)
    start, fd = task.mmap(8 * PAGE), task.userfaultfd(SIGBUS)
    offered = task.uffd_register(fd, start, 8 * PAGE, 1)
    shared = task.mmap(4 * PAGE, flags=1, fd=memory)
    task.uffd_register(fd, shared, 4 * PAGE, 1)
    found = set()
    for name, call in {
        "copy": lambda: task.uffd_copy(fd, start, origin, PAGE),
        "zeropage": lambda: task.uffd_zeropage(fd, start + PAGE, PAGE),
        "continue": lambda: task.uffd_continue(fd, shared, PAGE),
        "poison": lambda: task.uffd_poison(fd, start + 2 * PAGE, PAGE),
        "move": lambda: task.uffd_move(fd, start + 3 * PAGE, origin, PAGE),
    }.items():
        if name in calls:
            assert call() == PAGE
            found.add(name)
        else:
            assert errno_of(call) == errno.EINVAL
    assert found == calls
    assert bool(offered & 1 << 5) == ("move" in calls)
    assert bool(offered & 1 << 8) == ("poison" in calls)
    machine.check()


@pytest.mark.rule("UF-003", "UF-006", "UF-010")
def test_hugetlb_is_filled_by_whole_pages():
    machine = make(hugepages={"2 MiB": 4})
    task, huge = machine.spawn(), 2 << 20
    fd, memory = task.userfaultfd(SIGBUS), task.memfd_create("h", flags=4)
    start = task.mmap(2 * huge, flags=1, fd=memory)
    offered = task.uffd_register(fd, start, 2 * huge, 5)
    assert offered == 1 << 2 | 1 << 3 | 1 << 7 | 1 << 8
    with pytest.raises(AddressSpaceFault):
        task.read(start, 1)
    source = task.mmap(huge)
    task.write(source + 5 * PAGE, b"hello")
    assert errno_of(task.uffd_copy, fd, start, source, PAGE) == errno.EINVAL
    assert errno_of(task.uffd_zeropage, fd, start, huge) == errno.EINVAL
    assert errno_of(task.uffd_continue, fd, start, huge) == errno.EFAULT
    assert task.uffd_copy(fd, start, source, huge) == huge
    assert task.read(start + 5 * PAGE, 5) == b"hello"
    assert task.uffd_poison(fd, start + huge, huge) == huge
    assert errno_of(task.uffd_poison, fd, start + huge, huge) == errno.EEXIST
    machine.check()
    state, digest = machine.checkpoint(), machine.digest()
    other = task.mmap(2 * huge, flags=1, fd=memory)
    task.uffd_register(fd, other, 2 * huge, 4)
    with pytest.raises(AddressSpaceFault):
        task.read(other, 1)
    assert task.uffd_continue(fd, other, huge) == huge
    assert task.read(other + 5 * PAGE, 5) == b"hello"
    machine.check()
    machine.restore(state)
    machine.check()
    assert machine.digest() == digest


@pytest.mark.rule("UF-004")
def test_a_copy_of_hugetlb_that_fails_gives_page_and_promise_back():
    machine = make(hugepages={"2 MiB": 4})
    task, huge = machine.spawn(), 2 << 20
    fd = task.userfaultfd(SIGBUS)
    start = task.mmap(2 * huge, flags=HUGETLB)
    task.uffd_register(fd, start, 2 * huge, 1)
    pool = machine.hugetlb.default
    before = (pool.total, len(pool.free), pool.reserved, pool.surplus)
    assert errno_of(task.uffd_copy, fd, start, start + huge, huge) == errno.EFAULT
    assert (pool.total, len(pool.free), pool.reserved, pool.surplus) == before
    memory = task.memfd_create("h", flags=4)
    task.ftruncate(memory, huge)
    shared = task.mmap(2 * huge, prot=1, flags=1, fd=memory)
    task.uffd_register(fd, shared, 2 * huge, 1)
    source = task.mmap(huge)
    assert errno_of(task.uffd_copy, fd, shared + huge, source, huge) == errno.EFAULT
    machine.check()
    task.exit()
    machine.check()
    assert len(pool.free) == 4


def test_check_finds_a_poisoned_entry_of_another_form():
    machine = make(hugepages={"2 MiB": 2})
    task, huge = machine.spawn(), 2 << 20
    fd, start = task.userfaultfd(SIGBUS), task.mmap(huge, flags=HUGETLB)
    task.uffd_register(fd, start, huge, 1)
    task.uffd_poison(fd, start, huge)
    machine.check()
    slot = task.mm.tables.leaf_slot(start, 1)
    machine.core.pool.at[slot] |= 4 << 5
    with pytest.raises(BrokenInvariant, match="none or a marker"):
        machine.check()


@pytest.mark.rule("UF-004")
@pytest.mark.parametrize(("kernel", "number"), [("6.12", errno.ENOMEM), ("6.18", errno.EEXIST)])
def test_a_copy_from_an_exhausted_pool(kernel, number):
    task = pmcore.open("sim", memory="64 MiB", kernel=kernel, hugepages={"2 MiB": 1}).spawn()
    source = task.mmap(2 << 20)
    start = task.mmap(2 << 20, flags=0x44022)  # MAP_NORESERVE: promised nothing
    task.mmap(2 << 20, flags=0x40022)
    fd = task.userfaultfd(UffdFeature.MISSING_HUGETLBFS)
    task.uffd_register(fd, start, 2 << 20, 1)
    with pytest.raises(SyscallError) as caught:
        task.uffd_copy(fd, start, source, 2 << 20)
    assert caught.value.errno == number
