"""khugepaged: where it looks, what it collapses, what is left of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcore
from pmcore import ClearRefs, FrameFile, PageFlag
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.errors import ArgumentError
from pmcore.lockstep.programs import programs
from pmcore.program import Run
from pmcore.uapi import Madvise

PAGE, PMD = 4096, 1 << 21
SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def machine():
    with pmcore.open("sim", memory="128 MiB", swap="64 MiB", kernel="6.18") as machine:
        yield machine
        machine.check()


def small(machine, blocks, *, touch=True):
    """A task with small pages in so many blocks, for which huge pages are allowed from now on."""
    task = machine.spawn()
    start = task.mmap(blocks * PMD, addr=1 << 40, flags=0x100022)
    if touch:
        task.touch(start, blocks * PMD)
    return task, start


def allow(task, start, blocks):
    task.madvise(start, blocks * PMD, Madvise.HUGEPAGE)


@pytest.mark.rule("RC-015")
def test_it_goes_on_where_it_stopped(machine):
    one, start = small(machine, 3)
    other, place = small(machine, 2)
    allow(one, start, 3)
    allow(other, place, 2)
    first = machine.khugepaged.step(1024)
    assert [(b.address - start) // PMD for b in first.blocks] == [0, 1]
    assert (first.collapsed, first.full_scan) == (2, False)
    state = machine.checkpoint()
    second = machine.khugepaged.step()
    assert [(b.space, b.address) for b in second.blocks] == [
        (1, start + 2 * PMD),
        (2, place),
        (2, place + PMD),
    ]
    assert second.full_scan
    after = machine.digest()
    machine.restore(state)
    machine.khugepaged.step()
    assert machine.digest() == after
    again = machine.khugepaged.step()
    assert {block.result for block in again.blocks} == {"pmd_mapped"}
    assert (machine.khugepaged.full_scans, machine.khugepaged.pages_collapsed) == (2, 5)
    one.exit()
    assert [b.space for b in machine.khugepaged.step().blocks] == [2, 2]


@pytest.mark.rule("RC-015")
def test_where_huge_pages_are_not_wanted_it_does_not_look(machine):
    task, start = small(machine, 2)
    assert machine.khugepaged.step().blocks == ()
    task.madvise(start, PMD, Madvise.NOHUGEPAGE)
    machine.core.policy.pmd = "always"
    assert [b.address for b in machine.khugepaged.step().blocks] == [start + PMD]
    machine.core.policy.pmd = "never"
    allow(task, start, 2)
    assert machine.khugepaged.step() == type(machine.khugepaged.step())(blocks=(), full_scan=False)


@pytest.mark.rule("RC-016")
def test_limits(machine):
    task, start = small(machine, 12)
    at = [start + n * PMD for n in range(12)]
    task.madvise(at[0], PMD, Madvise.DONTNEED)
    task.touch(at[0] + 9 * PAGE, PAGE)
    for part in (0, 1):  # in halves: its page table stays (KX-013)
        task.madvise(at[1] + part * PMD // 2, PMD // 2, Madvise.DONTNEED)
    task.madvise(at[2], 64 * PAGE, Madvise.PAGEOUT)
    task.madvise(at[3], 65 * PAGE, Madvise.PAGEOUT)
    task.madvise(at[4] + 5 * PAGE, PAGE, Madvise.GUARD_INSTALL)
    task.process.clear_refs(ClearRefs.ALL)
    task.touch(at[0] + 9 * PAGE, PAGE, write=False)
    task.touch(at[2] + 100 * PAGE, 256 * PAGE, write=False)
    task.touch(at[3] + 100 * PAGE, 256 * PAGE, write=False)
    task.touch(at[4] + 100 * PAGE, 256 * PAGE, write=False)
    task.madvise(at[6], 64 * PAGE, Madvise.PAGEOUT)
    task.touch(at[6] + 100 * PAGE, 255 * PAGE, write=False)
    task.touch(at[7], PAGE, write=False)
    for n in (8, 9):
        task.touch(at[n], PAGE)
    child = task.fork()
    child.touch(at[8], PMD - 256 * PAGE)
    child.touch(at[9], PMD - 257 * PAGE)
    child.madvise(start, 8 * PMD, Madvise.DONTNEED)
    child.madvise(at[10], 2 * PMD, Madvise.DONTNEED)
    task.touch(at[7], PAGE)  # nobody else's any more
    allow(task, start, 12)
    results = [block.result for block in machine.khugepaged.step(12 * 512).blocks]
    assert results == [
        "collapsed",
        "exceed_none_pte",
        "collapsed",
        "exceed_swap_pte",
        "fail",
        "lack_referenced_page",
        "lack_referenced_page",
        "collapsed",
        "collapsed",
        "exceed_shared_pte",
        "lack_referenced_page",
        "lack_referenced_page",
    ]
    machine.check()
    machine.khugepaged.max_ptes_none = 0
    task.madvise(at[7] + PAGE, PAGE, Madvise.DONTNEED)
    machine.khugepaged.step(12 * 512)
    again = machine.khugepaged.step(12 * 512)
    assert again.blocks[7].result == "exceed_none_pte"


@pytest.mark.rule("RC-016")
def test_older_kernels_leave_swapped_and_shared_pages():
    for version, swapped, shared in (
        ("4.4", "exceed_swap_pte", "exceed_shared_pte"),
        ("5.4", "collapsed", "exceed_shared_pte"),
    ):
        machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB", kernel=version)
        task, start = small(machine, 2)
        child = task.fork()
        child.touch(start, PMD)
        child.munmap(start + PMD, PMD - PAGE)
        task.touch(start, 2 * PMD - PAGE)
        if machine.profile.has("madv.cold"):
            task.madvise(start, PAGE, Madvise.PAGEOUT)
        else:
            task.process.clear_refs(ClearRefs.ALL)
            machine.reclaim(1)
            task.touch(start + 4 * PAGE, 2 * PMD - 4 * PAGE, write=False)
        child.touch(start, PMD)
        allow(task, start, 2)
        found = [block.result for block in machine.khugepaged.step().blocks]
        assert found == [swapped, shared], version
        machine.check()


@pytest.mark.rule("RC-017")
def test_what_it_shows_then(machine):
    task, start = small(machine, 1)
    task.write(start + 3 * PAGE, b"three")
    task.write(start + 9 * PAGE, b"nine")
    task.madvise(start, 8 * PAGE, Madvise.PAGEOUT)
    child = task.fork()
    child.touch(start + 10 * PAGE, PMD - 10 * PAGE)
    child.read(start + 3 * PAGE, 1)
    task.madvise(start + 20 * PAGE, 40 * PAGE, Madvise.DONTNEED)
    task.touch(start + 60 * PAGE, PMD - 60 * PAGE, write=False)
    allow(task, start, 1)
    assert machine.khugepaged.step().collapsed == 1
    machine.check()
    entries = task.process.pagemap(start, start + PMD)
    assert entries.present.all()
    assert entries.exclusive.all()
    assert np.diff(entries.pfn.astype(np.int64)).tolist() == [1] * 511
    flags = machine.kpageflags(entries[0].pfn, 512)
    assert flags.has(PageFlag.THP).all()
    assert machine.frames_at(FrameFile.KPAGECOUNT, entries.pfn).tolist() == [1] * 512
    for one in (task, child):
        assert one.read(start + 3 * PAGE, 5) == b"three"
        assert one.read(start + 9 * PAGE, 4) == b"nine"
    task.write(start + 9 * PAGE, b"mine")
    assert child.read(start + 9 * PAGE, 4) == b"nine"


@SLOW
@given(programs(max_steps=20), st.integers(1, 5000), st.sampled_from(["6.18", "6.1", "5.4"]))
def test_contents_are_the_same_after_it(program, pages, version):
    machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB", kernel=version)
    machine.core.policy.pmd = "always"
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
        contents = _contents(machine, run)
        machine.khugepaged.step(pages)
        machine.check()
        assert _contents(machine, run) == contents
    machine.close()
    machine.check()
    assert machine.core.memory.contents.in_use == 0


def _contents(machine, run):
    """What the tasks would read, without an access: by address, what is not zero."""
    found = {}
    frames, swap = machine.core.memory.frames, machine.core.swap
    for name, task in run.tasks.items():
        for vma in task.process.maps():
            entries = task.process.pagemap(vma.start, vma.end)
            for index in np.flatnonzero(entries.present | entries.swapped).tolist():
                entry = entries[index]
                if entry.present:
                    row = int(frames.content[entry.pfn])
                elif entry.swap_entry and entry.swap_entry[0] < 23:
                    number, slot = entry.swap_entry
                    cached = int(swap.areas[number].cached[slot])
                    row = int(frames.content[cached - 1] if cached else swap.areas[number].content[slot])
                else:
                    continue
                data = machine.core.memory.contents.read(row, 0, PAGE).rstrip(b"\0")
                if data:
                    found[name, vma.start + index * PAGE] = data
    return found


def test_settings_that_cannot_be(machine):
    for pages in (0, -1, True, "x"):
        with pytest.raises(ArgumentError):
            machine.khugepaged.step(pages)
    machine.khugepaged.max_ptes_none = 512
    with pytest.raises(ArgumentError, match="max_ptes_none"):
        machine.khugepaged.step()
    machine.khugepaged.max_ptes_none = 511


def test_check_knows_its_place(machine):
    machine.khugepaged.address = 4096
    with pytest.raises(BrokenInvariant, match="khugepaged"):
        machine.check()
    machine.khugepaged.address = 0
