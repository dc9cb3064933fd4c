"""Events for observers: what they tell, that it is all of it, and that observing changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import pmcore
from pmcore.backends.sim.events import Allocation, EntryChange, Fault, FlagChange, Free
from pmcore.backends.sim.machine import SimMachine
from pmcore.backends.sim.physical.buddy import Zone
from pmcore.backends.sim.task import SimTask
from pmcore.errors import AddressSpaceFault
from pmcore.lockstep.programs import programs
from pmcore.program import Run
from pmcore.program import steps as s
from pmcore.uapi import Madvise, PageFlag, UffdFeature

PAGE, PMD = 4096, 2 << 20
START = 1 << 40
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def machine():
    return pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")


def faults(events):
    return [(e.outcome, e.addresses.tolist()) for e in events if isinstance(e, Fault)]


def entries(machine):
    found = {}
    for task in machine.tasks():
        for extent in task.mm.tables.extents(0, machine.geometry.task_size):
            for index in np.flatnonzero(extent.entries).tolist():
                key = (task.pid, int(extent.huge), extent.start + index * extent.size)
                found[key] = int(extent.entries[index])
    return found


def free_pages(machine):
    return sum(zone.free_pages for zone in machine.core.memory.zones)


@pytest.mark.rule("EV-002")
def test_faults_say_what_they_came_to(machine):
    task = machine.spawn()
    task.mmap(16 * PAGE, addr=START, flags=0x32)
    with machine.observe() as events:
        task.read(START, 1)
        task.write(START, b"x")
        task.touch(START + PAGE, 8 * PAGE)
        task.touch(START, 9 * PAGE)  # nothing faults
        task.madvise(START, 2 * PAGE, Madvise.PAGEOUT)
        task.touch(START, PAGE)
        child = task.fork()
        child.write(START + 2 * PAGE, b"y")
        task.write(START + 2 * PAGE, b"z")
        with pytest.raises(AddressSpaceFault):
            child.write(START - 1, b"w")
    first = START + PAGE
    assert faults(events) == [
        ("zero page", [START]),
        ("copy", [START]),
        ("new page", list(range(first, first + 8 * PAGE, PAGE))),
        ("swapped in", [START]),
        ("copy", [START + 2 * PAGE]),
        ("reused", [START + 2 * PAGE]),
        ("SIGSEGV", [START - 1]),
    ]
    told = [e for e in events if isinstance(e, Fault)]
    assert [e.pid for e in told[-3:]] == [child.pid, task.pid, child.pid]
    assert [e.call for e in told[:4]] == ["read", "write", "touch", "touch"]
    assert told[-1].write


@pytest.mark.rule("EV-002")
def test_faults_of_huge_pages_and_userfaultfd(machine):
    task = machine.spawn()
    task.mmap(2 * PMD, addr=START, flags=0x32)
    task.madvise(START, 2 * PMD, Madvise.HUGEPAGE)
    with machine.observe() as events:
        task.read(START, 1)
        task.write(START + 5 * PAGE, b"x")
        child = task.fork()
        child.write(START, b"x")
        fd = task.userfaultfd(UffdFeature.WP_ASYNC)
        task.mmap(PAGE, addr=START + 4 * PMD, flags=0x32)
        task.write(START + 4 * PMD, b"x")
        task.uffd_register(fd, START + 4 * PMD, PAGE, 2)
        task.uffd_writeprotect(fd, START + 4 * PMD, PAGE, protect=True)
        task.write(START + 4 * PMD, b"x")
    assert [outcome for outcome, _ in faults(events)] == [
        "huge zero page",
        "huge page",
        "mapped by PTEs",
        "copy",
        "new page",
        "unprotected",
    ]
    huge = [e for e in events if isinstance(e, Allocation) and e.order == 9]
    assert len(huge) == 2  # the huge zero page's, and the huge page's


@pytest.mark.rule("EV-001")
def test_a_call_over_a_range_tells_arrays(machine):
    """One event for a thousand pages, not a thousand events."""
    task = machine.spawn()
    task.mmap(1024 * PAGE, addr=START, flags=0x32)
    with machine.observe() as events:
        task.touch(START, 1024 * PAGE)
        task.munmap(START, 1024 * PAGE)
    assert len(events) < 24
    changes = [e for e in events if isinstance(e, EntryChange)]
    assert [len(e.addresses) for e in changes] == [1024, 1024]
    assert changes[0].old.tolist() == [0] * 1024
    assert changes[1].new.tolist() == [0] * 1024
    flags = [e for e in events if isinstance(e, FlagChange)]
    assert ((flags[0].new & np.uint64(PageFlag.ANON)) != 0).sum() == 1024
    assert sum(len(e.pfns) << e.order for e in events if isinstance(e, Free)) >= 1024


@pytest.mark.rule("EV-001")
def test_what_changes_nothing_tells_nothing(machine):
    task = machine.spawn()
    start = task.mmap(4 * PAGE)
    task.touch(start, 4 * PAGE)
    with machine.observe() as events:
        task.process.pagemap(start, start + 4 * PAGE)
        machine.kpageflags()
        task.process.smaps()
        task.mincore(start, PAGE)
        task.touch(start, 4 * PAGE)
    assert events == []


@pytest.mark.rule("EV-001", "EV-002", "EV-003")
@SLOW
@given(programs(max_steps=25))
def test_events_account_for_everything(program):
    """Changes lead from each state to the next, frames add up, and the end is the same as unobserved."""
    alone = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")
    run = Run(program, alone)
    for step in program.steps:
        run.advance(step)
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")
    watched = Run(program, machine)
    with machine.observe() as events:
        words, flags, free = entries(machine), machine.core.memory.frames.flags.copy(), free_pages(machine)
        for step in program.steps:
            events.clear()
            outcome = watched.advance(step)
            for event in events:
                if isinstance(event, EntryChange):
                    for addr, old, new in zip(
                        event.addresses.tolist(), event.old.tolist(), event.new.tolist(), strict=True
                    ):
                        key = (event.pid, event.level, addr)
                        assert words.get(key, 0) == old
                        words[key] = new
                elif isinstance(event, FlagChange):
                    flags = np.concatenate(
                        [flags, np.zeros(machine.core.memory.frames.rows - len(flags), dtype=np.uint64)]
                    )
                    assert np.array_equal(flags[event.pfns], event.old)
                    flags[event.pfns] = event.new
                elif isinstance(event, Allocation):
                    free -= len(event.pfns) << event.order
                elif isinstance(event, Free):
                    free += len(event.pfns) << event.order
            signals = [e.outcome for e in events if isinstance(e, Fault) and e.outcome.startswith("SIG")]
            # What an ioctl reads for its caller, and what is answered, is a signal of nobody's.
            if not isinstance(step, s.TouchAnswered | s.UffdCopy):
                assert signals == ([outcome.signal] if outcome.signal else [])
            assert {key: word for key, word in words.items() if word} == entries(machine)
            assert free == free_pages(machine)
            assert np.array_equal(flags, machine.core.memory.frames.flags[: len(flags)])
    assert watched.outcomes == run.outcomes
    assert machine.digest() == alone.digest()


@pytest.mark.rule("EV-003")
def test_nothing_is_left_of_an_observer(machine):
    task = machine.spawn()
    gone = machine.spawn()
    seen = []
    with machine.observe(seen.append), machine.observe() as collected:
        start = task.mmap(PAGE)
        state = machine.checkpoint()
        gone.exit()
        machine.restore(state)
        gone.write(gone.mmap(PAGE), b"x")
        task.write(start, b"x")
        child = task.fork()
    assert seen == collected
    assert seen
    assert type(machine) is SimMachine
    assert {type(t) for t in (task, gone, child)} == {SimTask}
    assert {type(zone) for zone in machine.core.memory.zones} == {Zone}
    assert machine.core.on_fault is None
    assert "observer" not in vars(task) | vars(machine) | vars(child.process)
    child.write(start, b"y")
    assert seen == collected
    machine.check()


@pytest.mark.rule("EV-003")
def test_an_observer_that_fails_harms_nobody_but_itself(machine):
    task = machine.spawn()
    start = task.mmap(PAGE)

    def fail(event):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError), machine.observe(fail):
        task.write(start, b"x")
    assert task.read(start, 1) == b"x"
    assert type(task) is SimTask
    machine.check()
