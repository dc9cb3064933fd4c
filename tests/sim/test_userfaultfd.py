"""Userfaultfds of children: state, refusals, invariants (what both backends show is in tests/live)."""

from __future__ import annotations

import errno

import pytest

import pmcore
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import load_machine
from pmcore.errors import SyscallError
from pmcore.program import Program, Run
from pmcore.program import steps as s
from pmcore.uapi import UffdFeature

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
