"""Soft-dirty on the simulated machine: what lockstep against 6.12 and 6.1 showed."""

import numpy as np
import pytest

import pmcore
from pmcore.backends.sim.events import Fault
from pmcore.registry import open_workbench
from pmcore.uapi import PM_SOFT_DIRTY, Madvise

PAGE = 4096
BASE = 0x10000000


@pytest.fixture(params=["6.12", "6.1"])
def bench(request):
    with open_workbench("sim", kernel=request.param) as machine:
        yield machine


def mapped(task, pages, at=0):
    return task.mmap(pages * PAGE, addr=BASE + at * PAGE, flags=0x100032)


def dirty(task, pages=8):
    words = task.process.pagemap(BASE, BASE + pages * PAGE).values
    return [int(bit) for bit in (words & np.uint64(PM_SOFT_DIRTY)) != 0]


def two_parts(task):
    """Two mappings side by side that only DONTFORK keeps apart: a fresh one, and one that was cleared."""
    mapped(task, 8)
    task.madvise(BASE + 4 * PAGE, 4 * PAGE, Madvise.DONTFORK)
    task.process.clear_refs(4)
    task.munmap(BASE, 4 * PAGE)
    mapped(task, 4)
    assert dirty(task) == [1] * 4 + [0] * 4


@pytest.mark.rule("KX-001")
def test_a_merged_vma_is_soft_dirty_as_the_changed_part_was(bench):
    """Whichever part changes last decides for all."""
    task = bench.spawn()
    two_parts(task)
    task.madvise(BASE + 4 * PAGE, 4 * PAGE, Madvise.DOFORK)
    assert dirty(task) == [0] * 8
    other = bench.spawn()
    two_parts(other)
    other.madvise(BASE, 4 * PAGE, Madvise.DONTFORK)
    assert dirty(other) == [1] * 8


@pytest.mark.rule("KX-001")
def test_later_kernels_keep_soft_dirty_on_merge():
    profile = pmcore.preset("6.12").changed(add=["mm.merge_keeps_soft_dirty"])
    with open_workbench("sim", kernel=profile) as bench:
        task = bench.spawn()
        two_parts(task)
        task.madvise(BASE + 4 * PAGE, 4 * PAGE, Madvise.DOFORK)
        assert dirty(task) == [1] * 8


@pytest.mark.rule("KX-002")
def test_new_memory_makes_its_neighbours_soft_dirty(bench):
    task = bench.spawn()
    mapped(task, 4)
    task.process.clear_refs(4)
    assert dirty(task, 4) == [0] * 4
    mapped(task, 4, at=4)
    assert dirty(task) == [1] * 8


@pytest.mark.rule("KX-003")
def test_mremap_marks_entries_and_not_the_vma(bench):
    task = bench.spawn()
    start = task.mmap(4 * PAGE, addr=BASE + (1 << 30), flags=0x100032)
    task.write(start + PAGE, b"x")
    task.process.clear_refs(4)
    task.mremap(start, 4 * PAGE, 4 * PAGE, flags=3, new_addr=BASE)
    assert dirty(task, 4) == [0, 1, 0, 0]


@pytest.mark.rule("SD-001", "SD-003")
def test_cleared_entries_fault_once_and_keep_their_frames(bench):
    """The first write after clearing faults on the page that is there; the second does not."""
    task = bench.spawn()
    mapped(task, 8)
    task.touch(BASE, 8 * PAGE)
    frames = task.process.pagemap(BASE, BASE + 8 * PAGE).pfn.tolist()
    task.process.clear_refs(4)
    assert dirty(task) == [0] * 8
    for write, faults in ((False, 0), (True, 2), (True, 0)):
        with bench.observe() as events:
            task.touch(BASE + PAGE, 2 * PAGE, write=write)
        assert sum(len(event.addresses) for event in events if isinstance(event, Fault)) == faults
    assert dirty(task) == [0, 1, 1, 0, 0, 0, 0, 0]
    assert task.process.pagemap(BASE, BASE + 8 * PAGE).pfn.tolist() == frames


@pytest.mark.rule("SD-002")
def test_a_renewed_mapping_is_soft_dirty_as_a_whole(bench):
    task = bench.spawn()
    mapped(task, 4)
    task.touch(BASE, 4 * PAGE)
    task.process.clear_refs(4)
    task.munmap(BASE + PAGE, PAGE)
    assert dirty(task, 4) == [0] * 4
    other = bench.spawn()
    mapped(other, 4)
    other.touch(BASE, 4 * PAGE)
    other.process.clear_refs(4)
    other.munmap(BASE, 4 * PAGE)
    mapped(other, 4)
    assert dirty(other, 4) == [1] * 4
    assert not other.process.pagemap(BASE, BASE + 4 * PAGE).present.any()
