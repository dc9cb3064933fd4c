"""KSM on the simulated machine: what is merged when, what shows of it, and what takes it apart again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcore
from pmcore import PageCategory, PageFlag, ScanRequest
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import load_machine
from pmcore.backends.sim.services.ksm_tree import UnstableTree
from pmcore.errors import ArgumentError, Busy, Missing, OutOfMemory
from pmcore.lockstep.programs import programs
from pmcore.profile import preset
from pmcore.program import Run
from pmcore.uapi import Madvise, MremapFlag, UffdFeature

PAGE, PMD = 4096, 1 << 21
SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def mapped(task, *texts, advice=Madvise.MERGEABLE):
    """A mapping with a page for each text ("" leaves it empty)."""
    start = task.mmap(len(texts) * PAGE)
    task.madvise(start, len(texts) * PAGE, advice)
    for index, text in enumerate(texts):
        if text:
            task.write(start + index * PAGE, text.encode())
    return start


def pfns(task, start, pages):
    return task.process.pagemap(start, start + pages * PAGE).pfn.tolist()


@pytest.fixture
def machine():
    with pmcore.open("sim", memory="64 MiB", swap="16 MiB", kernel="6.18") as machine:
        yield machine
        machine.check()


@pytest.mark.rule("KS-001")
def test_the_flag_is_shown_inherited_and_taken_back(machine):
    task = machine.spawn()
    start = mapped(task, "x")
    assert "mg" in task.process.smaps()[0].vm_flags
    assert "mg" in task.fork().process.smaps()[0].vm_flags
    task.madvise(start, PAGE, Madvise.UNMERGEABLE)
    assert "mg" not in task.process.smaps()[0].vm_flags


@pytest.mark.rule("KS-002", "KS-003")
def test_the_second_scan_merges_into_the_page_looked_at_second(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same", "same", "other")
    before = pfns(task, start, 4)
    machine.ksm.run()
    assert pfns(task, start, 4) == before
    machine.ksm.run()
    assert pfns(task, start, 4) == [before[1], before[1], before[1], before[3]]


@pytest.mark.rule("KS-002")
def test_a_page_that_changed_is_left_for_the_next_scan(machine):
    task = machine.spawn()
    start = mapped(task, "a", "b")
    machine.ksm.run()
    task.write(start + PAGE, b"a")
    machine.ksm.run()
    assert len(set(pfns(task, start, 2))) == 2
    machine.ksm.run()
    assert len(set(pfns(task, start, 2))) == 1


@pytest.mark.rule("KS-004")
@pytest.mark.parametrize(("kernel", "others"), [("6.18", False), ("6.12", True)])
def test_what_a_merged_page_shows(kernel, others):
    """KSM on other anonymous pages, too, is a quirk of kernels from 6.10 on (DV-014)."""
    machine = pmcore.open("sim", memory="64 MiB", kernel=kernel)
    task = machine.spawn()
    start = mapped(task, "same", "same", "other")
    machine.ksm.run(2)
    entries = task.process.pagemap(start, start + 3 * PAGE)
    assert entries.exclusive.tolist() == [False, False, True]
    assert not entries.file.any()
    merged, _, other = entries.pfn.tolist()
    assert machine.kpagecount(merged, 1).tolist() == [2]
    flags = machine.kpageflags(merged, 1)
    assert flags.has(PageFlag.KSM | PageFlag.ANON | PageFlag.DIRTY | PageFlag.REFERENCED).all()
    assert machine.kpageflags(other, 1).has(PageFlag.KSM).tolist() == [others]
    counters = task.process.smaps()[0].counters
    assert (counters["Rss"], counters["Pss"], counters["KSM"]) == (3 * PAGE, 2 * PAGE, 2 * PAGE)
    machine.check()


@pytest.mark.rule("KS-005")
def test_a_write_copies_also_for_the_last(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same")
    machine.ksm.run(2)
    merged = pfns(task, start, 1)[0]
    task.write(start, b"S")
    task.write(start + PAGE, b"S")
    assert merged not in pfns(task, start, 2)
    assert task.read(start, 4) == task.read(start + PAGE, 4) == b"Same"
    assert task.process.pagemap(start, start + 2 * PAGE).exclusive.all()
    assert machine.kpageflags(merged, 1).has(PageFlag.BUDDY).all()


@pytest.mark.rule("KS-006")
def test_no_more_than_the_limit_share_a_page_but_forks(machine):
    machine.ksm.max_page_sharing = 3
    task = machine.spawn()
    start = mapped(task, *["same"] * 8)
    machine.ksm.run(3)
    found = pfns(task, start, 8)
    assert sorted(found.count(pfn) for pfn in set(found)) == [2, 3, 3]
    task.fork()
    machine.ksm.run(2)
    assert sorted(machine.kpagecount(pfn, 1)[0] for pfn in set(found)) == [4, 6, 6]
    with pytest.raises(Busy):
        machine.ksm.max_page_sharing = 4
    assert machine.ksm.max_page_sharing == 3
    machine.ksm.unmerge()
    machine.ksm.max_page_sharing = 4
    for wrong in (1, -1, "x"):
        with pytest.raises(ArgumentError):
            machine.ksm.max_page_sharing = wrong


@pytest.mark.rule("KS-007")
def test_zeros_become_the_zero_page_if_wanted(machine):
    task = machine.spawn()
    start = mapped(task, "\0", "\0", "x")
    machine.ksm.run(2)
    assert len(set(pfns(task, start, 2))) == 1
    assert machine.ksm.ksm_zero_pages == 0
    machine.ksm.unmerge()
    machine.ksm.use_zero_pages = True
    machine.ksm.run(2)
    assert set(pfns(task, start, 2)) == {machine.core.zero_pfn}
    assert machine.ksm.ksm_zero_pages == 2
    task.write(start, b"1")
    task.madvise(start + PAGE, PAGE, Madvise.UNMERGEABLE)
    assert machine.core.zero_pfn not in pfns(task, start, 2)
    assert machine.ksm.ksm_zero_pages == 0


@pytest.mark.rule("KS-008")
def test_unmerging_gives_clean_pages_of_their_own(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same", "same")
    machine.ksm.run(2)
    task.madvise(start, 2 * PAGE, Madvise.UNMERGEABLE)
    entries = task.process.pagemap(start, start + 3 * PAGE)
    assert len(set(entries.pfn.tolist())) == 3
    assert entries.exclusive.all()
    assert task.process.smaps()[0].counters["Private_Dirty"] == 0
    assert task.process.smaps()[0].counters["Private_Clean"] == 2 * PAGE
    assert [task.read(start + n * PAGE, 4) for n in range(3)] == [b"same"] * 3
    assert machine.ksm.unmerge()["pages_shared"] == 0
    assert machine.ksm.full_scans == 0
    assert not machine.kpageflags().has(PageFlag.KSM).any()


@pytest.mark.rule("KS-009")
def test_mremap_unmerges(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same")
    machine.ksm.run(2)
    to = task.mmap(PAGE)
    moved = task.mremap(start, PAGE, PAGE, flags=MremapFlag.MAYMOVE | MremapFlag.FIXED, new_addr=to)
    assert pfns(task, moved, 1) != pfns(task, start + PAGE, 1)
    assert all("mg" in vma.vm_flags for vma in task.process.smaps())
    machine.ksm.run(2)
    assert pfns(task, moved, 1) == pfns(task, start + PAGE, 1)


@pytest.mark.rule("KS-010")
def test_a_huge_page_is_taken_apart_for_one_of_its_pages(machine):
    task = machine.spawn()
    small = mapped(task, "same")
    block = task.mmap(PMD, addr=1 << 40, flags=0x100022)
    task.madvise(block, PMD, Madvise.HUGEPAGE)
    for page in range(512):
        task.write(block + page * PAGE, f"page {page}".encode())
    task.write(block + 7 * PAGE, b"same\0\0\0\0")
    task.madvise(block, PMD, Madvise.MERGEABLE)
    machine.ksm.run()
    assert machine.counters["split_folio"] == 0
    machine.ksm.run()
    assert machine.counters["split_folio"] == 1
    assert pfns(task, block + 7 * PAGE, 1) == pfns(task, small, 1)


@pytest.mark.rule("KS-010")
def test_parts_of_one_huge_page_are_merged_a_scan_later(machine):
    task = machine.spawn()
    block = task.mmap(PMD, addr=1 << 40, flags=0x100022)
    task.madvise(block, PMD, Madvise.HUGEPAGE)
    task.madvise(block, PMD, Madvise.MERGEABLE)
    for page in range(512):
        task.write(block + page * PAGE, str(page // 2).encode())
    machine.ksm.run(2)
    assert len(set(pfns(task, block, 512))) == 257
    machine.ksm.run()
    assert len(set(pfns(task, block, 512))) == 256


@pytest.mark.rule("KS-011")
def test_the_last_sharer_frees_the_page(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same", "same")
    child = task.fork()
    machine.ksm.run(2)
    merged = pfns(task, start, 1)[0]
    assert machine.kpagecount(merged, 1).tolist() == [6]
    task.munmap(start, 3 * PAGE)
    child.madvise(start, 2 * PAGE, Madvise.DONTNEED)
    assert machine.kpagecount(merged, 1).tolist() == [1]
    child.exit()
    assert machine.kpageflags(merged, 1).has(PageFlag.BUDDY).all()
    machine.ksm.run()
    assert not machine.ksm.nodes
    assert not any(machine.ksm.counters().values())


@pytest.mark.rule("KS-012")
def test_merging_takes_write_protection_off_what_is_given_up(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same")
    fd = task.userfaultfd(UffdFeature.WP_ASYNC)
    task.uffd_register(fd, start, 2 * PAGE, 2)
    task.uffd_writeprotect(fd, start, 2 * PAGE, protect=True)
    machine.ksm.run(2)
    words = PageCategory.WRITTEN | PageCategory.PRESENT
    result = task.process.pagemap_scan(
        ScanRequest(start=start, end=start + 2 * PAGE, vec_len=8, return_mask=words)
    )
    assert result.regions["categories"].tolist() == [int(words), int(PageCategory.PRESENT)]


@pytest.mark.rule("KS-013")
def test_a_page_read_back_from_swap_is_an_ordinary_one(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same")
    machine.ksm.run(2)
    task.madvise(start, 2 * PAGE, Madvise.PAGEOUT)
    assert task.process.pagemap(start, start + 2 * PAGE).present.all()
    task.madvise(start, PAGE, Madvise.DONTNEED)
    task.madvise(start + PAGE, PAGE, Madvise.PAGEOUT)
    assert task.process.pagemap(start + PAGE, start + 2 * PAGE).swapped.all()
    assert task.read(start + PAGE, 4) == b"same"
    assert not machine.kpageflags(pfns(task, start + PAGE, 1)[0], 1).has(PageFlag.KSM).any()


@pytest.mark.rule("KS-014")
def test_counters(machine):
    task = machine.spawn()
    start = mapped(task, "a", "a", "a", "b", "b", "c", "d")
    machine.ksm.run(2)
    task.write(start + 6 * PAGE, b"e")
    assert machine.ksm.run() == {
        "pages_shared": 2,
        "pages_sharing": 3,
        "pages_unshared": 1,
        "pages_volatile": 1,
    }
    assert (machine.ksm.full_scans, machine.ksm.pages_scanned) == (3, 21)


def test_in_steps_as_in_one(machine):
    """A scan in pieces comes to the same as one in a piece, while nothing else happens."""
    task = machine.spawn()
    start = mapped(task, *"abacabadabacabae")
    state = machine.checkpoint()
    machine.ksm.run(3)
    digest, shared = machine.digest(), pfns(task, start, 16)
    machine.restore(state)
    while machine.ksm.full_scans < 3:
        machine.ksm.step(pages=3)
        machine.check()
    assert pfns(task, start, 16) == shared
    assert machine.digest() == digest


def test_nodes_of_memory_are_kept_apart_if_wanted():
    machine = pmcore.open("sim", memory="32 MiB", kernel="6.18", nodes=2)
    task = machine.spawn()
    machine.ksm.merge_across_nodes = False
    pages = 5000
    start = task.mmap(pages * PAGE)
    task.madvise(start, pages * PAGE, Madvise.MERGEABLE)
    task.touch(start, pages * PAGE)
    task.write(start, b"x")
    task.write(start + (pages - 1) * PAGE, b"x")
    machine.ksm.run(2)
    assert pfns(task, start, 1) != pfns(task, start + (pages - 1) * PAGE, 1)
    machine.ksm.unmerge() if machine.core.memory.zones[0].free_pages > pages else None
    machine.check()


def test_a_kernel_without_ksm_has_no_ksmd():
    machine = pmcore.open("sim", kernel=preset("6.18", config=["!CONFIG_KSM"]))
    with pytest.raises(Missing):
        machine.ksm.run()


def test_unmerging_without_memory_is_refused():
    machine = pmcore.open("sim", memory="8 MiB", kernel="6.18")
    task = machine.spawn()
    start = task.mmap(1200 * PAGE)
    task.madvise(start, 1200 * PAGE, Madvise.MERGEABLE)
    task.touch(start, 1200 * PAGE)
    machine.ksm.run(2)
    other = task.mmap(1000 * PAGE)
    task.touch(other, 1000 * PAGE)
    with pytest.raises(OutOfMemory):
        machine.ksm.unmerge()
    machine.check()


@SLOW
@given(programs(max_steps=28, focus="ksm"), st.integers(0, 400))
def test_programs_leave_it_well_and_can_be_gone_back_on(tmp_path_factory, program, pages):
    machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB", kernel="6.18")
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
        machine.check()
    machine.ksm.step(pages)
    machine.check()
    state, digest = machine.checkpoint(), machine.digest()
    path = tmp_path_factory.mktemp("ksm") / "machine.zip"
    machine.save(path)
    ends = []
    for _ in range(2):
        machine.ksm.run(2)
        machine.check()
        ends.append(machine.digest())
        machine.restore(state)
        assert machine.digest() == digest
    again = load_machine(path)
    assert again.digest() == digest
    again.ksm.run(2)
    assert ends == [again.digest()] * 2


@pytest.mark.parametrize(
    ("fault", "invariant"),
    [
        (lambda m, pfn: m.ksm.by_pfn.clear(), "a merged page has a node"),
        (lambda m, pfn: setattr(next(iter(m.ksm.nodes.values())), "items", 7), "a node counts its items"),
        (lambda m, pfn: m.ksm.stable.clear(), "each node hangs in the stable tree once"),
        (lambda m, pfn: m.core.memory.frames.content_at.__setitem__(pfn, 0), "holds what it held"),
        (lambda m, pfn: m.ksm.slots[0].addresses.__setitem__(0, 1 << 60), "items ascend"),
        (lambda m, pfn: m.ksm.by_mm.clear(), "who asks for merging is on the list"),
        (
            lambda m, pfn: m.core.memory.frames.flags_at.__setitem__(
                pfn, m.core.memory.frames.flags_at[pfn] | 1 << 60
            ),
            "nobody's own",
        ),
    ],
)
def test_planted_faults_are_found(fault, invariant):
    machine = pmcore.open("sim", kernel="6.18")
    task = machine.spawn()
    start = mapped(task, "same", "same", "x")
    machine.ksm.run(2)
    machine.check()
    fault(machine, pfns(task, start, 1)[0])
    with pytest.raises(BrokenInvariant, match=invariant):
        machine.check()


def _black_height(node, tree):
    if node is None:
        return 1
    for child in (node.left, node.right):
        assert child is None or child.parent is node
        assert child is None or not (node.red and child.red)
    heights = [_black_height(child, tree) for child in (node.left, node.right)]
    assert heights[0] == heights[1]
    return heights[0] + (not node.red)


@given(st.lists(st.integers(0, 60), max_size=120))
def test_the_unstable_tree_is_a_red_black_tree(numbers):
    """Whatever is put in and taken out, in whatever order: it is balanced, and finds what is there."""
    tree, there = UnstableTree(), set()
    tree.shape(lambda place: b"")
    for number in numbers:
        content = bytes([number])
        if number in there and number % 3:
            tree.take((1, number))
            there.discard(number)
        else:
            found = tree.search((1, number), content, lambda place: True)
            assert found == ((1, number) if number in there else None)
            there.add(number)
        assert tree._root is None or not tree._root.red
        _black_height(tree._root, tree)
    assert sorted(place[1] for place in tree._nodes) == sorted(there)


def test_a_search_gives_up_at_a_page_that_is_gone():
    tree = UnstableTree()
    for number in (5, 3, 8):
        tree.put(1, np.array([number]))
    tree.shape(lambda place: bytes([place[1]]))
    gone = {(1, 3)}
    assert tree.search((1, 9), b"\x09", lambda place: place not in gone) is None
    assert tree.search((1, 1), b"\x01", lambda place: place not in gone) is False
