"""Swap areas: priorities, turns, numbers, and switching them off."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcore
from pmcore import ClearRefs, PageFlag
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import SwapSettings
from pmcore.errors import ArgumentError, OutOfMemory, SyscallError
from pmcore.lockstep.programs import programs
from pmcore.program import Run
from pmcore.uapi import MAX_SWAPFILES, Errno, Madvise

PAGE, MIB = 4096, 1 << 20
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def types(task, start, pages):
    entries = task.process.pagemap(start, start + pages * PAGE)
    return [entry.swap_entry[0] if entry.swap_entry else None for entry in entries]


@pytest.mark.rule("RC-011", "RC-012")
def test_areas_are_filled_by_priority_and_in_turns():
    machine = pmcore.open("sim", kernel="6.18", swap=[SwapSettings(length=9 * PAGE)])
    for priority in (5, 5, 9):
        machine.swapon(9 * PAGE, priority=priority)
    machine.swapon("1 MiB")
    assert [(row.number, row.priority) for row in machine.swaps()] == [
        (0, -2),
        (1, 5),
        (2, 5),
        (3, 9),
        (4, -3),
    ]
    assert [row.size for row in machine.swaps()] == [8 * PAGE] * 4 + [255 * PAGE]
    task = machine.spawn()
    start = task.mmap(40 * PAGE)
    task.touch(start, 40 * PAGE)
    task.madvise(start, 40 * PAGE, Madvise.PAGEOUT)
    assert types(task, start, 40) == [3] * 8 + [1, 2] * 8 + [0] * 8 + [4] * 8
    assert [row.used for row in machine.swaps()] == [8 * PAGE] * 5
    machine.check()
    state = machine.checkpoint()
    assert machine.swapoff(1) == 8
    machine.check()
    area = machine.swapon("1 MiB")
    assert (area.number, area.priority) == (1, -4)  # the number is used again, the priority is not
    after = machine.digest()
    machine.restore(state)
    assert [row.priority for row in machine.swaps()] == [-2, 5, 5, 9, -3]
    machine.swapoff(1)
    machine.swapon("1 MiB")
    assert machine.digest() == after
    machine.check()


@pytest.mark.rule("RC-011")
def test_turns_go_on_from_call_to_call():
    machine = pmcore.open("sim", swap=[SwapSettings(length=MIB, priority=1)] * 3)
    task = machine.spawn()
    start = task.mmap(16 * PAGE)
    task.touch(start, 16 * PAGE)
    for page, pages in ((0, 4), (4, 1), (5, 1), (6, 5), (11, 5)):
        task.madvise(start + page * PAGE, pages * PAGE, Madvise.PAGEOUT)
    assert types(task, start, 16) == [0, 1, 2] * 5 + [0]
    machine.check()


@pytest.mark.rule("RC-013")
@pytest.mark.parametrize("immediate", [False, True])
def test_swapoff_brings_everything_back(immediate):
    machine = pmcore.open("sim", kernel="6.12", swap=[SwapSettings(length=MIB, immediate=immediate)])
    task = machine.spawn()
    start = task.mmap(8 * PAGE)
    task.touch(start, 8 * PAGE)
    task.write(start + PAGE, b"one")
    task.process.clear_refs(ClearRefs.SOFT_DIRTY)
    task.write(start + 2 * PAGE, b"two")
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
    child = task.fork()
    task.madvise(start + 4 * PAGE, 2 * PAGE, Madvise.PAGEOUT)
    child.touch(start, PAGE, write=False)
    other = machine.spawn()
    mine = other.mmap(4 * PAGE)
    other.touch(mine, 4 * PAGE)
    other.madvise(mine, 4 * PAGE, Madvise.PAGEOUT)
    machine.swapoff(0)
    machine.check()
    assert machine.swaps() == ()
    entries = task.process.pagemap(start, start + 8 * PAGE)
    assert entries.present.all()
    assert entries.exclusive.tolist() == [False] * 8
    assert np.flatnonzero(entries.soft_dirty).tolist() == [2]
    assert other.process.pagemap(mine, mine + 4 * PAGE).exclusive.all()
    assert other.process.smaps()[0].counters["Referenced"] == 0
    flags = machine.kpageflags(entries[1].pfn, 1).values[0]
    assert flags & np.uint64(PageFlag.DIRTY)
    assert not flags & np.uint64(PageFlag.SWAPCACHE)
    for one in (task, child):
        assert one.read(start + PAGE, 3) == b"one"
        assert one.read(start + 2 * PAGE, 3) == b"two"
    other.write(mine, b"x")
    child.write(start, b"child")
    assert task.read(start, 1) == b"\0"
    machine.check()


@pytest.mark.rule("RC-014")
def test_what_does_not_fit_stays_out():
    machine = pmcore.open("sim", memory="16 MiB", swap="32 MiB")
    task = machine.spawn()
    start = task.mmap(24 * MIB)
    task.touch(start, 24 * MIB)
    before = machine.digest()
    with pytest.raises(OutOfMemory) as caught:
        machine.swapoff(0)
    assert caught.value.errno == Errno.ENOMEM
    assert "switch on another area" in caught.value.remedy
    assert machine.digest() == before
    machine.check()
    machine.swapon("64 MiB")
    machine.swapoff(0)
    machine.check()
    assert [row.number for row in machine.swaps()] == [1]
    assert set(types(task, start, 24 * MIB // PAGE)) == {None, 1}
    for number in (0, 7, -1):
        with pytest.raises(SyscallError) as caught:
            machine.swapoff(number)
        assert caught.value.errno == Errno.EINVAL


def test_areas_that_cannot_be():
    machine = pmcore.open("sim", swap=0)
    for length in (0, PAGE):
        with pytest.raises(SyscallError) as caught:
            machine.swapon(length)
        assert caught.value.errno == Errno.EINVAL
    for priority in (-7, 32768, True):
        with pytest.raises(ArgumentError):
            machine.swapon("1 MiB", priority=priority)
    for _ in range(23):
        machine.swapon(2 * PAGE)
    with pytest.raises(SyscallError) as caught:
        machine.swapon(2 * PAGE)
    assert caught.value.errno == Errno.EPERM
    machine.check()


@pytest.mark.rule("RC-013")
@SLOW
@given(programs(max_steps=20), st.booleans(), st.booleans(), st.integers(0, 500))
def test_swapoff_after_anything(program, immediate, large, amount):
    """Whatever was swapped out, and however: it comes back, and everything holds."""
    area = SwapSettings(length=64 * MIB, immediate=immediate, large_folios=large)
    machine = pmcore.open("sim", memory="128 MiB", kernel="6.18", swap=[area])
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
    machine.reclaim(amount)
    machine.check()
    machine.swapoff(0)
    machine.check()
    for task in run.tasks.values():
        for vma in task.process.maps():
            entries = task.process.pagemap(vma.start, vma.end)
            # Markers stay: their type is no swap area's.
            assert not (entries.swapped & (entries.swap_type < np.uint64(MAX_SWAPFILES))).any()
    machine.close()
    machine.check()
    assert machine.core.memory.contents.in_use == 0


def test_check_knows_areas_that_were_left():
    machine = pmcore.open("sim", swap="1 MiB")
    task = machine.spawn()
    start = task.mmap(2 * PAGE)
    task.touch(start, 2 * PAGE)
    task.madvise(start, 2 * PAGE, Madvise.PAGEOUT)
    area = machine.core.swap.areas[0]
    machine.core.swap.areas[0] = None
    with pytest.raises(BrokenInvariant, match="names no swap area"):
        machine.check()
    machine.core.swap.areas[0] = area
    machine.check()


@pytest.mark.rule("RC-018")
@pytest.mark.parametrize("few", [1, 40])
def test_a_page_just_read_is_not_exclusive_by_being_alone(few):
    """One by one and in bulk: by reading only what the entry says, or the swap cache had; by writing always."""
    size = few * PAGE
    shown = []
    for write, cached in ((False, False), (False, True), (True, False)):
        machine = pmcore.open("sim", memory="16 MiB", swap="16 MiB", kernel="6.18")
        task = machine.spawn()
        start = task.mmap(size)
        task.touch(start, size)
        task.madvise(start, size, Madvise.PAGEOUT)
        child = task.fork()
        if cached:
            child.touch(start, size, write=False)
        child.exit()
        task.mlock(start, size, onfault=True)
        task.touch(start, size, write=write)
        pfns = task.process.pagemap(start, start + size).pfn
        shown.append({bool(machine.kpageflags(int(p), 1).has(PageFlag.OWNER_2)[0]) for p in pfns})
        machine.check()
    assert shown == [{False}, {True}, {True}]
