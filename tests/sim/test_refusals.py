"""What a refused call leaves behind: nothing, but where the kernel itself stops halfway; also when memory runs out."""

from __future__ import annotations

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcore
from pmcore.errors import SyscallError
from pmcore.lockstep.programs import programs
from pmcore.program import Run
from pmcore.program import steps as s
from pmcore.uapi import Madvise, MapFlag, ScanFlag

SLOW = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
PAGE = 4096


def pieces(run, step):
    """How many mappings, and holes between them, the step's range has; one more where it ends inside a huge page.

    There the boundary at its start is made, and stays, before the one at its end is refused (HT-003). Of fallocate,
    whether the file is one of huge pages.
    """
    if isinstance(step, s.Fallocate):
        made = [one for one in run.program.steps if isinstance(one, s.MemfdCreate) and one.fd == step.fd]
        return any(one.flags & 4 for one in made)  # MFD_HUGETLB
    if getattr(step, "area", None) not in run.areas or not hasattr(step, "page"):
        return 0
    start = run.areas[step.area][0] + step.page * PAGE
    end = start + step.pages * PAGE
    vmas = run.tasks[step.task].mm.vmas
    last = vmas.at(end - 1)
    cuts = last is not None and last.huge is not None and end % last.huge.file.pool.size != 0
    return len(vmas.within(start, end)) + (not vmas.covers(start, end)) + cuts


def half_done(step, parts, number):
    """Whether the kernel stops halfway through such a call, and so the model does (each with its reason)."""
    if isinstance(step, s.Advise) and step.advice in (Madvise.POPULATE_READ, Madvise.POPULATE_WRITE):
        return True  # what came before the page that could not be faulted in stays
    if isinstance(step, s.Advise) and step.advice == Madvise.COLLAPSE:
        return True  # pages were read back from swap before the block turned out to be none; other blocks stay huge
    if isinstance(step, s.Lock) and number in (errno.ENOMEM, errno.EAGAIN):
        return True  # the mapping is locked before its pages are faulted in
    if isinstance(step, s.TouchAnswered):
        return True  # accesses, and calls more than one
    if isinstance(step, s.UffdCopy | s.UffdZeropage | s.UffdContinue | s.UffdPoison | s.UffdMove):
        # A source has been read, tables were made, and pages before the one that cannot be filled.
        return number not in (errno.EBADF, errno.ENOTTY, errno.ESRCH)
    if isinstance(step, s.Fallocate) and number == errno.ENOSPC:
        return parts  # of a hugetlb file: pages that were had before the pool was exhausted stay
    if isinstance(step, s.Touch | s.Read | s.Write):
        return number == errno.ENOMEM  # no call: the accesses before have happened
    if isinstance(step, s.Fork):
        return number == errno.ENOMEM  # what the child had shared so far stays write-protected in the parent
    if isinstance(step, s.Advise | s.Protect | s.Lock | s.Unlock | s.UffdProtect | s.Move):
        return parts > 1  # one mapping after the other (mremap so since 6.17)
    if isinstance(step, s.Scan):
        # Mappings are protected before CHECK_WPASYNC finds one without it, or tables for markers cannot be had.
        return bool(step.flags & ScanFlag.WP_MATCHING) and (parts > 1 or number == errno.ENOMEM)
    if isinstance(step, s.Unmap):
        return (
            number == errno.EINVAL and step.pages > 0
        )  # inside a huge page, behind a boundary that stays (HT-003)
    if isinstance(step, s.Map) and step.flags & MapFlag.HUGETLB:
        return number == errno.ENOMEM  # the pool is asked for its promise after the place has been cleared
    return isinstance(step, s.Map) and step.anywhere  # more calls than one


@pytest.mark.rule("EV-005")
@pytest.mark.parametrize(
    ("kernel", "memory"), [("6.18", "64 MiB"), ("6.12", "64 MiB"), ("6.18", "8 MiB"), ("6.12", "4 MiB")]
)
def test_what_is_refused_has_not_happened(kernel, memory):
    """The digest of the whole state is the same before and after."""

    @SLOW
    @given(programs(max_steps=40))
    def hold(program):
        machine = pmcore.open("sim", memory=memory, swap="2 MiB", kernel=kernel)
        run = Run(program, machine)
        run.task("main")
        for step in program.steps:
            run.task(step.task)  # one that names "main" after its exit begins it anew
            if machine.core.memory.short:  # as before any call, refused or not
                machine.core.relieve(1)
            short = machine.core.memory.short
            before, parts = machine.digest(), pieces(run, step)
            outcome = run.advance(step)
            machine.check()
            if outcome.errno and not short and not half_done(step, parts, outcome.errno):
                assert machine.digest() == before, (step, outcome)

    hold()


@pytest.mark.rule("EV-006")
@SLOW
@given(programs(max_steps=40), st.sampled_from(["4 MiB", "8 MiB"]), st.sampled_from([0, "1 MiB"]))
def test_without_memory_all_is_well(program, memory, swap):
    """Small machines: whatever fails for want of memory is refused, the state stays whole, and all comes back."""
    machine = pmcore.open("sim", memory=memory, swap=swap, kernel="6.18")
    free = sum(zone.free_pages for zone in machine.core.memory.zones)
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
        machine.check()
    for task in list(machine.tasks()):
        task.exit()
    machine.check()
    kept = 512 if machine.core.huge_zero_pfn else 0
    assert sum(zone.free_pages for zone in machine.core.memory.zones) == free - kept
    assert all(area.used == 0 for area in machine.swap_areas())


def test_collapse_that_runs_out_of_memory_while_it_reads_back_keeps_no_huge_page():
    machine = pmcore.open("sim", memory="4 MiB", swap="2 MiB", kernel="6.12")
    task = machine.spawn()
    start = task.mmap(4 << 20, addr=1 << 40)
    task.write(start, b"x")
    task.madvise(start, 2 << 20, Madvise.COLLAPSE)
    task.madvise(start, 4096, Madvise.DONTNEED)
    task.madvise(start, 4 << 20, Madvise.POPULATE_WRITE)
    task.madvise(start, 4 << 20, Madvise.PAGEOUT)
    with pytest.raises(SyscallError) as caught:
        task.madvise(start, 4 << 20, Madvise.COLLAPSE)
    assert caught.value.errno == errno.ENOMEM
    machine.check()
