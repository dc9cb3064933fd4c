"""Reclaim on request and under pressure: the lists, who is spared, what goes where."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcore
from pmcore import PageFlag
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import SwapSettings
from pmcore.errors import ArgumentError, OutOfMemory
from pmcore.lockstep.programs import programs
from pmcore.program import Run
from pmcore.uapi import ClearRefs, Errno, Madvise

PAGE, PMD = 4096, 1 << 21
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def make(memory="64 MiB", swap="64 MiB", kernel="6.18", **more):
    return pmcore.open("sim", memory=memory, swap=swap, kernel=kernel, **more)


@pytest.fixture
def machine():
    with make() as machine:
        yield machine
        machine.check()


def flags_of(machine, task, start):
    return int(machine.kpageflags(task.process.pagemap(start, start + PAGE)[0].pfn, 1).values[0])


def swapped(task, start, pages):
    return np.flatnonzero(task.process.pagemap(start, start + pages * PAGE).swapped).tolist()


@pytest.mark.rule("RC-001", "RC-002")
def test_the_tail_goes_first_and_what_was_used_is_spared(machine):
    task = machine.spawn()
    start = task.mmap(100 * PAGE)
    task.touch(start, 100 * PAGE)
    task.process.clear_refs(ClearRefs.ALL)
    task.touch(start + 4 * PAGE, 2 * PAGE, write=False)
    result = machine.reclaim(8)
    assert (result.pages, result.referenced, result.scanned) == (8, 2, 10)
    assert swapped(task, start, 100) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert flags_of(machine, task, start + 4 * PAGE) & PageFlag.REFERENCED
    # Spared once, they are at the head; used again they become active, and only the older one of them has to go.
    task.touch(start + 4 * PAGE, 2 * PAGE, write=False)
    result = machine.reclaim(91)
    assert (result.pages, result.activated, result.deactivated) == (91, 2, 2)
    assert swapped(task, start, 100) == [n for n in range(100) if n != 5]
    assert flags_of(machine, task, start + 5 * PAGE) & PageFlag.REFERENCED


@pytest.mark.rule("RC-003")
def test_shared_pages_go_from_everybody(machine):
    task = machine.spawn()
    start = task.mmap(8 * PAGE)
    task.write(start, b"ours")
    task.touch(start + PAGE, 7 * PAGE)
    child, other = task.fork(), machine.spawn()
    mine = other.mmap(4 * PAGE)
    other.touch(mine, 4 * PAGE)
    assert machine.reclaim(100).pages == 12
    one, two = (t.process.pagemap(start, start + 8 * PAGE) for t in (task, child))
    assert one.swapped.all()
    assert one.values.tolist() == two.values.tolist()
    assert machine.swap_areas()[0].counts.sum() == 20
    child.write(start, b"mine")
    assert task.read(start, 4) == b"ours"
    assert child.read(start, 4) == b"mine"
    task.exit()
    child.exit()
    other.exit()
    assert machine.swap_areas()[0].used == 0


@pytest.mark.rule("RC-004")
def test_a_disk_keeps_pages_in_the_swap_cache_until_they_are_found():
    machine = make(swap=[SwapSettings(length=16 << 20, immediate=False)])
    task = machine.spawn()
    start = task.mmap(4 * PAGE)
    task.touch(start, 4 * PAGE)
    task.write(start, b"written")
    task.write(start + PAGE, b"and this")
    free = machine.core.memory.free_total
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
    # Pages of zeros are only noted.
    assert task.mincore(start, 4 * PAGE).tolist() == [True, True, False, False]
    assert machine.core.memory.free_total == free + 2
    machine.check()
    assert task.read(start, 7) == b"written"
    assert not flags_of(machine, task, start) & (PageFlag.DIRTY | PageFlag.ACTIVE)
    # Clean in the swap cache: nothing to write, gone at once.
    task.madvise(start, PAGE, Madvise.PAGEOUT)
    assert task.mincore(start, 2 * PAGE).tolist() == [False, True]
    assert machine.reclaim(1).pages == 1
    assert task.mincore(start, 2 * PAGE).tolist() == [False, False]
    assert task.read(start + PAGE, 8) == b"and this"
    machine.check()
    older = make(swap=[SwapSettings(length=16 << 20, immediate=False)], kernel="6.1")
    task = older.spawn()
    start = task.mmap(4 * PAGE)
    task.touch(start, 4 * PAGE)
    result = older.reclaim(3)
    assert (result.pages, result.written) == (3, 3)
    older.check()


@pytest.mark.rule("RC-005", "RC-010")
def test_without_swap_only_lazily_freed_pages_go():
    machine = make(swap=0)
    task = machine.spawn()
    start = task.mmap(20 * PAGE)
    task.touch(start, 20 * PAGE)
    task.write(start, b"x")
    task.madvise(start, 10 * PAGE, Madvise.FREE)
    task.write(start + PAGE, b"again")
    child = task.fork()
    before = machine.checkpoint().arrays["frames.lru"]
    result = machine.reclaim(100)
    assert (result.pages, result.discarded, result.activated) == (9, 9, 1)
    assert machine.kpageflags(task.process.pagemap(start + PAGE, start + 2 * PAGE)[0].pfn, 1).has(
        PageFlag.SWAPBACKED | PageFlag.ACTIVE | PageFlag.DIRTY
    )
    for one in (task, child):
        assert one.read(start, 1) == b"\0"
        assert one.read(start + PAGE, 5) == b"again"
    pfn = task.process.pagemap(start + 15 * PAGE, start + 16 * PAGE)[0].pfn
    assert machine.core.memory.frames.lru[pfn] == before[pfn]
    machine.check()


@pytest.mark.rule("RC-006")
def test_active_pages_are_moved_over_when_inactive_ones_are_few(machine):
    task = machine.spawn()
    start = task.mmap(64 * PAGE)
    task.touch(start, 64 * PAGE)
    for _ in range(2):  # populating twice marks as accessed twice
        task.madvise(start, 64 * PAGE, Madvise.POPULATE_READ)
    assert flags_of(machine, task, start) & PageFlag.ACTIVE
    result = machine.reclaim(10)
    assert result.pages == 10
    assert result.deactivated == 32
    assert swapped(task, start, 64) == list(range(10))
    active = [bool(flags_of(machine, task, start + n * PAGE) & PageFlag.ACTIVE) for n in range(10, 64)]
    assert active == [False] * 22 + [True] * 32


@pytest.mark.rule("RC-007")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("immediate", [False, True])
def test_huge_pages_of_several_processes(large, immediate):
    machine = make(swap=[SwapSettings(length=64 << 20, immediate=immediate, large_folios=large)])
    task = machine.spawn()
    start = task.mmap(2 * PMD, addr=1 << 40, flags=0x100022)
    task.madvise(start, 2 * PMD, Madvise.HUGEPAGE)
    task.touch(start, 2 * PMD)
    task.write(start + 5 * PAGE, b"five")
    task.write(start + PMD, b"second")
    child = task.fork()
    child.munmap(start + PMD, 3 * PAGE)
    machine.reclaim(10 * 1024)
    machine.check()
    entries = task.process.pagemap(start, start + 2 * PMD)
    if large:
        assert entries.swapped[:1024].all()
        assert (
            np.diff((entries.values[:512] & np.uint64((1 << 55) - 1)) >> np.uint64(5)).tolist() == [1] * 511
        )
    else:
        assert entries.swapped.sum() == 2  # the rest was zeros
    for one in (task, child):
        assert one.read(start + 5 * PAGE, 4) == b"five"
    assert task.read(start + PMD, 6) == b"second"
    task.touch(start, 2 * PMD)
    machine.check()
    task.exit()
    child.exit()
    assert machine.core.memory.contents.in_use == 0
    machine.check()


@pytest.mark.rule("RC-008")
def test_locked_pages_stay(machine):
    task = machine.spawn()
    start = task.mmap(16 * PAGE)
    task.touch(start, 16 * PAGE)
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
    task.mlock(start + 8 * PAGE, 4 * PAGE)
    task.mlock(start, 4 * PAGE, onfault=True)
    task.touch(start, 2 * PAGE, write=False)
    assert not flags_of(machine, task, start) & PageFlag.MLOCKED  # DV-023
    assert machine.reclaim(100).pages == 8
    assert flags_of(machine, task, start) & PageFlag.UNEVICTABLE
    assert not task.process.pagemap(start + 8 * PAGE, start + 12 * PAGE).swapped.any()
    task.munlock(start, 16 * PAGE)
    assert machine.reclaim(100).pages == 6


@pytest.mark.rule("RC-009")
def test_more_memory_than_there_is():
    """Pressure: the oldest pages go out, the contents stay what they were."""
    machine = make(memory="16 MiB", swap="64 MiB")
    task = machine.spawn()
    start = task.mmap(40 << 20)
    pages = (40 << 20) // PAGE
    for page in range(0, pages, 16):
        task.write(start + page * PAGE, b"%05d" % page)
    machine.check()
    child = task.fork()
    task.touch(start, 40 << 20)
    machine.check()
    child.touch(start, 40 << 20, write=False)
    machine.check()
    for page in range(0, pages, 160):
        assert task.read(start + page * PAGE, 5) == child.read(start + page * PAGE, 5) == b"%05d" % page
    assert machine.counters["reclaim"] > 5
    last = task.process.pagemap(start, start + (40 << 20)).present
    assert 0 < last.sum() < pages


@pytest.mark.rule("RC-009")
def test_when_swap_is_full_too_it_is_enomem():
    machine = make(memory="16 MiB", swap="8 MiB")
    task = machine.spawn()
    start = task.mmap(64 << 20)
    with pytest.raises(OutOfMemory) as caught:
        task.touch(start, 64 << 20)
    assert caught.value.errno == Errno.ENOMEM
    assert caught.value.remedy
    machine.check()
    assert machine.core.swap.free == 0
    done = task.process.pagemap(start, start + (64 << 20))
    there = np.flatnonzero(done.present | done.swapped)
    assert there.tolist() == list(range(len(there)))  # all before it, nothing behind
    child_error = None
    try:
        task.fork()
    except OutOfMemory as error:
        child_error = error
    machine.check()
    task.munmap(start, 32 << 20)
    if child_error is not None:
        task.fork()
    machine.check()


@pytest.mark.rule("RC-009")
@SLOW
@given(programs(max_steps=20), st.sampled_from(["0", "4 MiB", "32 MiB"]), st.booleans(), st.booleans())
def test_programs_under_pressure(program, swap, immediate, large):
    """Small memory, steps of all sorts, reclaim between them: everything holds, twice the same."""
    digests = []
    for _ in range(2):
        areas = [
            SwapSettings(length=pmcore.geometry.parse_size(swap), immediate=immediate, large_folios=large)
        ]
        machine = make(memory="8 MiB", swap=areas if swap != "0" else 0)
        run = Run(program, machine)
        for number, step in enumerate(program.steps):
            run.advance(step)
            machine.check()
            if number % 3 == 2:
                machine.reclaim(5 * number)
                machine.check()
        digests.append(machine.digest())
    assert digests[0] == digests[1]


@SLOW
@given(programs(max_steps=20), st.integers(1, 3000))
def test_contents_survive_reclaim(program, amount):
    """What programs see does not depend on reclaim in between; going back undoes it."""
    outcomes = []
    for squeeze in (False, True):
        machine = make(swap="128 MiB")
        run = Run(program, machine)
        for step in program.steps:
            run.advance(step)
            if squeeze:
                state = machine.checkpoint()
                machine.reclaim(amount)
                after = machine.digest()
                machine.restore(state)
                machine.reclaim(amount)
                assert machine.digest() == after
                machine.check()
        reads = []
        for task in run.tasks.values():
            for start, length in run.areas.values():
                for vma in task.process.maps():
                    if vma.start <= start < vma.end and vma.readable:
                        reads.append(_read(task, start, min(length, vma.end - start, 8 * PAGE)))
        outcomes.append(reads)
        machine.close()
        machine.check()
        assert machine.core.memory.contents.in_use == 0
    # Lazily freed pages may read as zeros after reclaim; everything else reads the same.
    if not any(getattr(step, "advice", 0) == Madvise.FREE for step in program.steps):
        assert outcomes[0] == outcomes[1]


def _read(task, start, length):
    try:
        return task.read(start, length)
    except (pmcore.errors.PmcoreError, OSError) as error:
        return type(error).__name__


@pytest.mark.parametrize("amount", [-1, True, 1.5, "x", None])
def test_amounts_that_are_none(machine, amount):
    with pytest.raises(ArgumentError):
        machine.reclaim(amount)


def test_bytes_are_pages_too(machine):
    task = machine.spawn()
    task.touch(task.mmap(PMD), PMD)
    assert machine.reclaim("1 MiB").pages == 256
    assert machine.reclaim(0).pages == 0


def test_check_knows_when_a_reclaimed_page_was_miscounted(machine):
    task = machine.spawn()
    start = task.mmap(8 * PAGE)
    task.touch(start, 8 * PAGE)
    task.fork()
    machine.reclaim(4)
    area = machine.swap_areas()[0]
    area.counts[1] -= 1
    with pytest.raises(BrokenInvariant, match="slot's count"):
        machine.check()
    area.counts[1] += 1


def test_bulk_reclaim_is_fast():
    """At most 200 ns a page where nobody else computes; the bound here is wide."""
    machine = make(memory="1 GiB", swap="1 GiB")
    task = machine.spawn()
    start = task.mmap(512 << 20)
    task.touch(start, 512 << 20)
    began = time.process_time()
    assert machine.reclaim("512 MiB").pages == 131072
    assert (time.process_time() - began) / 131072 < 2e-6
