"""The simulated machine: invariants after each step, ranges as their pages one by one, errors that change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcore
from pmcore import ClearRefs, FrameFile, PageFlag, ScanRequest
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.errors import (
    AddressSpaceFault,
    InvalidArgument,
    NotModelled,
    OutOfMemory,
    ProcessGone,
    SyscallError,
)
from pmcore.lockstep.programs import programs
from pmcore.profile import preset
from pmcore.program import Run
from pmcore.protocols import HEAP
from pmcore.spec.reference.entry import decode
from pmcore.testing.conformance import KernelConformance, WorkbenchConformance
from pmcore.uapi import Madvise

PAGE, PMD = 4096, 1 << 21
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def machine():
    with pmcore.open("sim", memory="64 MiB", swap="16 MiB", kernel="6.12") as machine:
        yield machine
        machine.check()


@pytest.mark.parametrize("version", ["6.18", "6.12", "6.1", "4.19", "3.2", "2.6.32"])
def test_invariants_hold_after_every_step(version):
    @SLOW
    @given(programs(max_steps=28))
    def hold(program):
        machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel=version)
        run = Run(program, machine)
        for step in program.steps:
            run.advance(step)
            machine.check()
        machine.close()
        machine.check()
        assert machine.core.memory.contents.in_use == 0

    hold()


@SLOW
@given(programs(max_steps=20))
def test_memory_that_runs_out_leaves_a_machine_that_is_well(program):
    machine = pmcore.open("sim", memory="8 MiB", swap="0", kernel="6.18")
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
        machine.check()


@SLOW
@given(programs(max_steps=28))
def test_the_same_program_gives_the_same_bytes(program):
    seen = []
    for _ in range(2):
        machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB")
        run = Run(program, machine)
        for step in program.steps:
            run.advance(step)
        seen.append((machine.digest(), run.outcomes))
    assert seen[0] == seen[1]


@SLOW
@given(programs(max_steps=16), st.booleans())
def test_a_range_is_touched_as_its_pages_one_by_one(program, write):
    """Vectorised touching against single accesses, on whatever a program has left behind."""
    looks = []
    for whole in (True, False):
        machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB")
        run = Run(program, machine)
        for step in program.steps:
            run.advance(step)
        fault = None
        for task in run.tasks.values():
            for start, length in sorted(run.areas.values()):
                try:
                    if whole:
                        task.touch(start + 5, length, write=write)
                    else:
                        for addr in range(start + 5, start + length, PAGE):
                            task.touch(addr, 1, write=write)
                except AddressSpaceFault as error:
                    fault = error.address
        machine.check()
        views = [task.process.smaps() for task in run.tasks.values()]
        flags = [
            (e.values & ~np.uint64((1 << 55) - 1)).tolist()
            for task in run.tasks.values()
            for vma in task.process.maps()
            for e in [task.process.pagemap(vma.start, vma.end)]
        ]
        looks.append((fault, views, flags))
    assert looks[0] == looks[1]


@SLOW
@given(programs(max_steps=24))
def test_views_are_decoded_and_scanned_as_the_reference_says(program):
    """The states that programs reach, through the executable reference."""
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB")
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
    for task in run.tasks.values():
        for start, length in run.areas.values():
            entries = task.process.pagemap(start, start + min(length, 40 * PAGE))
            for word, entry in zip(entries.values.tolist(), entries, strict=True):
                expected = decode(word, machine.profile.capabilities)
                assert (entry.present, entry.swapped) == (expected.present, expected.swapped)


class TestConformance(KernelConformance):
    """What every backend has to mean by its answers."""

    def make_kernel(self):
        machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")
        task = machine.spawn()
        start = task.mmap(64 * PAGE)
        task.touch(start, 20 * PAGE)
        task.touch(start + 30 * PAGE, 4 * PAGE, write=False)
        task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
        task.fork()
        return machine

    def some_pid(self, kernel):
        return kernel.pids()[0]


class TestWorkbenchConformance(WorkbenchConformance):
    """What every workbench has to do alike."""

    def make_workbench(self):
        return pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")


def test_contents_survive_fork_swap_and_collapse(machine):
    task = machine.spawn()
    start = task.mmap(2 * PMD, addr=1 << 40, flags=0x100022)
    data = bytes(range(256)) * 40
    task.write(start + 4000, data)
    child = task.fork()
    child.write(start + 4000, b"child")
    task.madvise(start, PMD, Madvise.PAGEOUT)
    task.touch(start, PMD)
    task.madvise(start, PMD, Madvise.COLLAPSE)
    assert task.read(start + 4000, len(data)) == data
    assert child.read(start + 4000, 6) == b"child" + data[5:6]
    moved = task.mremap(start, PMD, 2 * PMD, flags=1)
    assert task.read(moved + 4000, len(data)) == data


@pytest.mark.rule("PM-006")
def test_soft_dirty_follows_writes(machine):
    task = machine.spawn()
    start = task.mmap(8 * PAGE)
    assert task.process.pagemap(start, start + 8 * PAGE).soft_dirty.all()  # a new mapping is all dirty
    task.touch(start, 4 * PAGE)
    task.process.clear_refs(ClearRefs.SOFT_DIRTY)
    assert not task.process.pagemap(start, start + 8 * PAGE).soft_dirty.any()
    task.touch(start, 8 * PAGE, write=False)
    task.write(start + PAGE, b"x")
    task.touch(start + 6 * PAGE, PAGE)
    assert np.flatnonzero(task.process.pagemap(start, start + 8 * PAGE).soft_dirty).tolist() == [1, 6]
    task.madvise(start, 4 * PAGE, Madvise.PAGEOUT)
    entries = task.process.pagemap(start, start + 8 * PAGE)
    assert entries.swapped[:4].all()
    assert np.flatnonzero(entries.soft_dirty).tolist() == [1, 6]
    moved = task.mremap(start, 8 * PAGE, 8 * PAGE, flags=3, new_addr=1 << 41)
    assert task.process.pagemap(moved, moved + 8 * PAGE).soft_dirty.all()


def test_out_of_memory_is_a_clear_error():
    machine = pmcore.open("sim", memory="8 MiB")
    task = machine.spawn()
    start = task.mmap(32 << 20)
    with pytest.raises(OutOfMemory) as caught:
        task.touch(start, 32 << 20)
    assert "swap" in caught.value.remedy
    machine.check()
    task.exit()
    assert machine.core.memory.zones[0].free_pages > 1900


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda t, a: t.mmap(0), 22),
        (lambda t, a: t.mmap(PAGE, addr=a + 1, flags=0x32), 22),
        (lambda t, a: t.mmap(PAGE, addr=a, flags=0x100022), 17),
        (lambda t, a: t.mmap(1 << 60), 12),
        (lambda t, a: t.mmap(PAGE, flags=0x20), 22),
        (lambda t, a: t.mmap(PAGE, flags=2, fd=9), 9),
        (lambda t, a: t.munmap(a + 1, PAGE), 22),
        (lambda t, a: t.munmap(a, 0), 22),
        (lambda t, a: t.mprotect(a + 1, PAGE, 1), 22),
        (lambda t, a: t.mprotect(1 << 30, PAGE, 1), 12),
        (lambda t, a: t.mremap(a, PAGE, 2 * PAGE), 12),
        (lambda t, a: t.mremap(a, PAGE, PAGE, flags=2, new_addr=1 << 40), 22),
        (lambda t, a: t.mremap(1 << 30, PAGE, PAGE), 14),
        (lambda t, a: t.mremap(a, PAGE, 0), 22),
        (lambda t, a: t.madvise(a, PAGE, 77), 22),
        (lambda t, a: t.madvise(a + 1, PAGE, 4), 22),
        (lambda t, a: t.madvise(1 << 30, PAGE, 4), 12),
        (lambda t, a: t.mlock(1 << 30, PAGE), 12),
        (lambda t, a: t.mincore(a + 1, PAGE), 22),
        (lambda t, a: t.mincore(1 << 30, PAGE), 12),
        (lambda t, a: t.uffd_register(5, a, PAGE, 2), 9),
        (lambda t, a: t.userfaultfd(1 << 50), 22),
        (lambda t, a: t.process.clear_refs(7), 22),
        (lambda t, a: t.process.pread("pagemap", 3, 8), 22),
        (lambda t, a: t.process.pread("nothing", 0, 8), 2),
        (lambda t, a: t.process.pagemap_scan(ScanRequest(start=a + 1, end=a + 2)), 22),
    ],
)
def test_what_is_refused_changes_nothing(machine, call, number):
    task = machine.spawn()
    start = task.mmap(4 * PAGE)
    task.touch(start, 2 * PAGE)
    before = machine.digest()
    with pytest.raises(SyscallError) as caught:
        call(task, start)
    assert caught.value.errno == number
    assert machine.digest() == before


def test_what_is_not_modelled_says_so(machine):
    task = machine.spawn()
    for call in (
        lambda: task.lseek(task.memfd_create("x"), 0, 1),
        lambda: machine.hwpoison(np.array([machine.core.zero_pfn], dtype=np.uint64)),
    ):
        with pytest.raises(NotModelled, match="not modelled"):
            call()


def test_the_dead_are_gone(machine):
    task = machine.spawn()
    start = task.mmap(PAGE)
    process = task.process
    task.exit()
    task.exit()
    for call in (
        process.maps,
        process.smaps,
        task.fork,
        lambda: task.mmap(PAGE),
        lambda: machine.process(task.pid),
    ):
        with pytest.raises(ProcessGone):
            call()
    assert process.read_pagemap(start >> 12, np.zeros(1, dtype=np.uint64)) == 0


def test_without_privilege_frames_are_hidden():
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", privileged=False)
    task = machine.spawn()
    start = task.mmap(2 * PAGE)
    task.touch(start, 2 * PAGE)
    task.madvise(start, PAGE, Madvise.PAGEOUT)
    entries = task.process.pagemap(start, start + 2 * PAGE)
    assert entries.hidden.all()
    assert entries.present.tolist() == [False, True]
    with pytest.raises(PermissionError):
        machine.kpageflags()


def test_faults_name_address_and_cause(machine):
    task = machine.spawn()
    start = task.mmap(2 * PAGE, prot=1)
    for call, words in (
        (lambda: task.write(start + 9, b"x"), "may not be written"),
        (lambda: task.read(1 << 30, 1), "nothing is mapped"),
    ):
        with pytest.raises(AddressSpaceFault, match=words) as caught:
            call()
        assert caught.value.signal == "SIGSEGV"
    assert caught.value.address == 1 << 30


def test_check_finds_what_is_broken(machine):
    """Planted mistakes, each of them found by name."""
    task = machine.spawn()
    start = task.mmap(4 * PAGE)
    task.touch(start, 3 * PAGE)
    frames = machine.core.memory.frames
    pfn = task.process.pagemap(start, start + PAGE)[0].pfn
    machine.check()
    for column, index, value, words in (
        ("mapcount", pfn, 2, "mapcount"),
        ("flags", pfn, int(PageFlag.BUDDY), "BUDDY"),
        ("behind", pfn, 1, "tails"),
        ("swap", pfn, 5, "SWAPCACHE"),
        ("lru", pfn, 0, "LRU"),
    ):
        array = getattr(frames, column)
        before = array[index]
        array[index] = value
        with pytest.raises(BrokenInvariant, match=words):
            machine.check()
        array[index] = before
    machine.check()


def test_check_finds_what_lies_in_unused_memory():
    """Frames that no zone has reached hold nothing: growing the frame table leaves them behind."""
    machine = pmcore.open("sim", memory="5 GiB", kernel="6.12")
    machine.check()
    machine.core.memory.frames.owner[1 << 19] = 3
    with pytest.raises(BrokenInvariant, match="never used hold nothing: owner: 0x80000"):
        machine.check()
    again = pmcore.open("sim", memory="5 GiB", kernel="6.12")
    again.restore(again.checkpoint())
    again.spawn().mmap(1 << 16, flags=0x8022)
    again.check()


@pytest.mark.parametrize("version", ["2.6.32", "3.4", "4.0", "4.19", "5.10", "6.1", "6.12", "6.18"])
def test_every_kernel_has_a_machine(version):
    """Only what the version knows is shown."""
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel=version)
    task = machine.spawn()
    start = task.mmap(4 * PMD, addr=1 << 40, flags=0x32)
    if machine.profile.has("madv.hugepage"):
        task.madvise(start, 4 * PMD, Madvise.HUGEPAGE)
    task.touch(start, 3 * PMD)
    child = task.fork()
    child.touch(start, 4 * PMD)
    machine.check()
    known = sum(1 << bit for bit in pmcore.pageflags.flag_rows(preset(version)))
    words = machine.kpageflags().values
    assert not (words & ~np.uint64(known)).any()
    assert len(task.process.pagemap(start, start + 4 * PMD).decode().present) == 2048


@pytest.mark.parametrize(("shift", "levels"), [(12, 4), (12, 5), (14, 4), (16, 3)])
def test_other_geometries(shift, levels):
    geometry = pmcore.Geometry(page_shift=shift, levels=levels, task_size=(1 << 46))
    machine = pmcore.open("sim", memory="1 GiB", swap="64 MiB", geometry=geometry, kernel="6.12")
    task, size = machine.spawn(), 1 << shift
    start = task.mmap(100 * size)
    task.touch(start, 100 * size)
    task.write(start + 3 * size - 2, b"across")
    task.madvise(start, 50 * size, Madvise.PAGEOUT)
    assert task.read(start + 3 * size - 2, 6) == b"across"
    task.munmap(start + 10 * size, 10 * size)
    assert machine.frames_at(
        FrameFile.KPAGECOUNT, task.process.pagemap(start, start + size).pfn
    ).tolist() in ([0], [1])
    machine.check()


@pytest.mark.rule("VM-025")
def test_places(machine):
    """A hint that is free is taken; else the highest place, huge mappings aligned."""
    task = machine.spawn()
    assert task.mmap(PAGE, addr=1 << 40) == 1 << 40
    first, second = task.mmap(PAGE), task.mmap(PAGE, addr=1 << 40)
    assert first > second == first - PAGE
    huge = task.mmap(2 * PMD)
    assert huge % PMD == 0
    assert huge < second
    task.munmap(first, PAGE)
    assert task.mmap(PAGE) == first


@pytest.mark.rule("VM-030")
def test_the_break_moves_and_names(machine):
    """A page stays free behind it; what cannot be leaves it where it is; whatever lies in it is called heap."""
    task = machine.spawn()
    assert task.brk(0) == HEAP
    assert task.brk(HEAP + 5) == HEAP + 5
    task.mmap(PAGE, addr=HEAP + 4 * PAGE, flags=0x32)
    assert task.brk(HEAP + 3 * PAGE + 1) == HEAP + 5
    assert task.brk(HEAP - 1) == HEAP + 5
    assert task.brk(HEAP + 3 * PAGE) == HEAP + 3 * PAGE
    assert [v.name for v in task.process.maps()] == ["[heap]", ""]
    task.mremap(HEAP, 3 * PAGE, 3 * PAGE, flags=3, new_addr=1 << 40)
    assert [v.name for v in task.process.maps()] == ["", ""]
    assert task.brk(HEAP) == HEAP + 3 * PAGE
    machine.check()


@pytest.mark.rule("VM-031")
def test_protection_from_the_start_of_a_stack(machine):
    task = machine.spawn()
    top = 1 << 40
    task.mmap(4 * PAGE, addr=top - 4 * PAGE, flags=0x132)
    task.mprotect(top - 2 * PAGE, PAGE, 0x01000001)
    assert [(v.start, v.end, v.writable) for v in task.process.maps()] == [
        (top - 4 * PAGE, top - PAGE, False),
        (top - PAGE, top, True),
    ]
    for prot in (0x02000001, 0x03000001):
        with pytest.raises(InvalidArgument):
            task.mprotect(top - PAGE, PAGE, prot)
    other = task.mmap(PAGE)
    with pytest.raises(InvalidArgument):
        task.mprotect(other, PAGE, 0x01000001)


@pytest.mark.rule("KX-013")
@pytest.mark.parametrize(("kernel", "huge"), [("6.12", False), ("6.18", True)])
def test_emptied_tables_are_freed(kernel, huge):
    machine = pmcore.open("sim", memory="64 MiB", kernel=kernel)
    task = machine.spawn()
    task.mmap(PMD, addr=1 << 40, flags=0x32)
    task.touch(1 << 40, PMD)
    task.madvise(1 << 40, PMD, Madvise.HUGEPAGE)
    task.madvise(1 << 40, PMD, Madvise.DONTNEED)
    machine.check()
    task.write(1 << 40, b"x")
    assert bool(task.process.smaps()[0].counters["AnonHugePages"]) == huge
    machine.check()


@pytest.mark.rule("VM-032")
def test_all_is_locked_and_msync_says_so(machine):
    task = machine.spawn()
    start = task.mmap(2 * PAGE)
    task.mlockall(3)
    assert task.process.pagemap(start, start + 2 * PAGE).present.all()
    with pytest.raises(SyscallError) as caught:
        task.msync(start, PAGE, 2)
    assert caught.value.errno == 16
    assert "lo" in task.process.smaps(task.mmap(PAGE))[0].vm_flags
    child = task.fork()
    assert not any("lo" in e.vm_flags for e in child.process.smaps())
    task.munlockall()
    task.msync(start, PAGE, 2)
    assert not any("lo" in e.vm_flags for e in task.process.smaps())


def test_page_tables_are_given_back_empty(machine):
    """One table of each level goes with the last page of its range; check() looks into those given back."""
    task = machine.spawn()
    before = machine.core.pool.in_use
    for addr in (1 << 40, 1 << 41, (1 << 41) + PMD):
        task.mmap(PAGE, addr=addr, flags=0x8032)
    assert machine.core.pool.in_use == before + 3 + 3 + 1
    for addr, left in (((1 << 41) + PMD, 6), (1 << 41, 3), (1 << 40, 0)):
        task.munmap(addr, PAGE)
        assert machine.core.pool.in_use == before + left
        machine.check()
    row = machine.core.pool.free_rows[-1]
    machine.core.pool.rows[row, 5] = 1
    with pytest.raises(BrokenInvariant, match="given back holds nothing"):
        machine.check()
    machine.core.pool.rows[row, 5] = 0


def test_flags_are_a_folios(machine):
    """What clears or sets a flag through one page of a huge page mapped by PTEs does so for all of it."""
    task = machine.spawn()
    task.mmap(PMD, addr=1 << 40, flags=0x32)
    task.madvise(1 << 40, PMD, Madvise.HUGEPAGE)
    task.touch(1 << 40, PMD)
    task.mprotect(1 << 40, PAGE, 1)
    task.madvise((1 << 40) + PAGE, PAGE, Madvise.POPULATE_WRITE)
    task.munmap((1 << 40) + 8 * PAGE, 8 * PAGE)
    task.process.clear_refs(1)
    machine.check()
    task.mprotect(1 << 40, PAGE, 3)
    task.madvise(1 << 40, PAGE, Madvise.POPULATE_WRITE)
    machine.check()


def test_stack_and_break_grow(machine):
    task = machine.spawn()
    top = 1 << 40
    task.mmap(4 * PAGE, addr=top - 4 * PAGE, flags=0x100 | 0x32)
    task.write(top - 20 * PAGE, b"deep")
    assert [v.start for v in task.process.maps()] == [top - 20 * PAGE]
    with pytest.raises(AddressSpaceFault):
        task.write(top - (9 << 20), b"too deep")
