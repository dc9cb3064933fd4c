"""Merged pages where other services meet them: reclaim, swap, locks, files, huge pages, migration, hugetlb."""

from __future__ import annotations

import numpy as np
import pytest

import pmcore
from pmcore import PageFlag
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.errors import NotModelled
from pmcore.uapi import ClearRefs, Madvise, MapFlag

PAGE, PMD = 4096, 1 << 21


def mapped(task, *texts, **settings):
    """A mapping to be merged, with a page for each text ("" leaves it empty)."""
    start = task.mmap(len(texts) * PAGE, **settings)
    task.madvise(start, len(texts) * PAGE, Madvise.MERGEABLE)
    for index, text in enumerate(texts):
        if text:
            task.write(start + index * PAGE, text.encode())
    return start


def entries(task, start, pages=1):
    return task.process.pagemap(start, start + pages * PAGE)


def pfns(task, start, pages=1):
    return entries(task, start, pages).pfn.tolist()


@pytest.fixture
def machine():
    with pmcore.open("sim", memory="64 MiB", swap="16 MiB", kernel="6.18") as machine:
        yield machine
        machine.check()


def reclaimed(machine, task, start, pages):
    """Merge what is equal, and have it all swapped out."""
    machine.ksm.run(2)
    machine.settle()
    for one in machine.tasks():
        one.process.clear_refs(ClearRefs.ALL)
    machine.reclaim(1000)
    machine.check()
    assert not entries(task, start, pages).present.any()


@pytest.mark.rule("KS-013")
def test_a_merged_page_is_reclaimed_from_all_who_map_it(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same", "same")
    child = task.fork()
    reclaimed(machine, task, start, 3)
    assert not entries(child, start, 3).present.any()
    assert machine.swap_areas()[0].used == 1


@pytest.mark.rule("KS-016")
def test_who_reads_it_back_first_has_it_and_the_others_copies(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same", "same")
    child = task.fork()
    reclaimed(machine, task, start, 3)
    assert [task.read(start + n * PAGE, 4) for n in (1, 0, 2)] == [b"same"] * 3
    first, second, third = pfns(task, start, 3)
    assert len({first, second, third}) == 3
    assert entries(task, start, 3).exclusive.tolist() == [True, True, True]  # counted once: it says no more
    assert machine.kpageflags(second, 1).has(PageFlag.SWAPCACHE).all()
    assert not machine.kpageflags(first, 1).has(PageFlag.SWAPCACHE).any()
    assert machine.kpageflags(first, 1).has(PageFlag.DIRTY).all()
    machine.check()
    assert child.read(start + PAGE, 4) == b"same"
    assert pfns(child, start + PAGE) == [second]
    child.read(start, 4)
    assert pfns(child, start) not in ([first], [second], [third])
    assert machine.counters["ksm_swapin_copy"] == 3


@pytest.mark.rule("KS-016")
def test_a_copy_may_be_written_at_once(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same")
    reclaimed(machine, task, start, 2)
    task.read(start, 1)
    before = machine.counters["copy_on_write"]
    task.write(start + PAGE, b"S")
    assert machine.counters["copy_on_write"] == before
    assert (task.read(start, 4), task.read(start + PAGE, 4)) == (b"same", b"Same")


@pytest.mark.rule("KS-016")
def test_swapoff_copies_within_a_process(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same", "same", "other")
    reclaimed(machine, task, start, 4)
    task.read(start + PAGE, 1)
    machine.swapoff(0)
    assert len(set(pfns(task, start, 4))) == 4
    assert [task.read(start + n * PAGE, 4) for n in range(4)] == [b"same"] * 3 + [b"othe"]


@pytest.mark.rule("KS-016")
def test_swapoff_between_processes_is_not_modelled(machine):
    """Who is looked at first depends on when each was swapped out for the first time; refused, nothing is changed."""
    one, other = machine.spawn(), machine.spawn()
    start = mapped(one, "same", addr=1 << 40, flags=0x100022)
    mapped(other, "same", addr=(1 << 40) + PAGE, flags=0x100022)
    reclaimed(machine, one, start, 1)
    before = machine.digest()
    with pytest.raises(NotModelled, match="swapoff"):
        machine.swapoff(0)
    assert machine.digest() == before
    one.read(start, 1)
    machine.swapoff(0)
    assert other.read((1 << 40) + PAGE, 4) == b"same"


@pytest.mark.rule("KS-016")
def test_what_is_known_of_slots_goes_back_with_the_state(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same")
    reclaimed(machine, task, start, 2)
    task.read(start, 1)
    state, digest = machine.checkpoint(), machine.digest()
    task.read(start + PAGE, 1)
    assert machine.counters["ksm_swapin_copy"] == 1
    task.munmap(start, 2 * PAGE)
    assert not machine.swap_areas()[0].merged
    machine.restore(state)
    assert machine.digest() == digest
    task.read(start + PAGE, 1)
    assert machine.counters["ksm_swapin_copy"] == 1


def test_a_slot_that_is_free_is_no_merged_page_s(machine):
    machine.check()
    area = machine.swap_areas()[0]
    area.merged[7] = ()
    with pytest.raises(BrokenInvariant, match="slots of merged pages"):
        machine.check()
    area.merged.clear()


@pytest.mark.rule("KS-017")
def test_a_page_that_a_batch_holds_is_left_for_the_next_scan(machine):
    task = machine.spawn()
    start = mapped(task, "\0")
    task.mlock(start, PAGE)
    child = task.fork()
    machine.ksm.use_zero_pages = True
    machine.ksm.run(2)
    assert pfns(task, start) == [machine.core.zero_pfn] != pfns(child, start)
    machine.ksm.run()
    assert pfns(child, start) == [machine.core.zero_pfn]


@pytest.mark.rule("KS-017")
def test_a_batch_holds_no_more_than_31(machine):
    task = machine.spawn()
    start = mapped(task, *"\0" * 40)
    task.mlock(start, 40 * PAGE)
    child = task.fork()
    machine.ksm.use_zero_pages = True
    machine.ksm.run(2)
    left = np.array(pfns(child, start, 40)) != machine.core.zero_pfn
    assert left.tolist() == [False] * 31 + [True] * 9


@pytest.mark.rule("KS-001")
def test_private_copies_of_a_file_are_merged_its_own_pages_are_not(machine):
    task = machine.spawn()
    fd = task.memfd_create("m")
    task.ftruncate(fd, 4 * PAGE)
    task.pwrite(fd, b"same", 0)
    task.pwrite(fd, b"same", PAGE)
    start = mapped(task, "", "", "same", "same", fd=fd, flags=int(MapFlag.PRIVATE))
    task.read(start, 2 * PAGE)
    machine.ksm.run(2)
    found = pfns(task, start, 4)
    assert found[2] == found[3]
    assert len(set(found)) == 3
    shared = task.mmap(PAGE, fd=fd, flags=int(MapFlag.SHARED))
    task.madvise(shared, PAGE, Madvise.MERGEABLE)
    assert [("mg" in vma.vm_flags) for vma in task.process.smaps() if vma.vma.start == shared] == [False]


@pytest.mark.rule("KS-001")
def test_hugetlb_is_never_merged():
    machine = pmcore.open("sim", memory="64 MiB", kernel="6.18", hugepages={"2 MiB": 2})
    task = machine.spawn()
    start = task.mmap(PMD, flags=0x40022)
    task.madvise(start, PMD, Madvise.MERGEABLE)
    assert "mg" not in task.process.smaps()[0].vm_flags
    task.touch(start, PMD)
    assert not any(machine.ksm.run(2).values())
    task.madvise(start, PMD, Madvise.UNMERGEABLE)
    machine.check()


@pytest.mark.rule("KS-010")
@pytest.mark.parametrize("size", ["16kB", "64kB"])
def test_folios_of_other_sizes_are_taken_apart_for_one_of_their_pages(size):
    machine = pmcore.open("sim", memory="64 MiB", kernel="6.18", policy={"thp_sizes": {size: "always"}})
    task = machine.spawn()
    start = task.mmap(32 * PAGE, addr=1 << 40, flags=0x100022)
    task.madvise(start, 32 * PAGE, Madvise.MERGEABLE)
    for page in range(32):
        task.write(start + page * PAGE, str(page % 31).encode())
    child = task.fork()
    machine.ksm.run(2)
    assert machine.counters["split_folio"] == 2
    assert len(set(pfns(task, start, 32))) == 31
    assert pfns(task, start, 32) == pfns(child, start, 32)
    machine.check()


@pytest.mark.rule("KS-015")
def test_a_block_that_maps_a_merged_page_twice_is_not_collapsed(machine):
    task = machine.spawn()
    start = task.mmap(PMD, addr=1 << 40, flags=0x100022)
    task.madvise(start, PMD, Madvise.MERGEABLE)
    task.madvise(start, PMD, Madvise.NOHUGEPAGE)
    for page in (3, 5, 9):
        task.write(start + page * PAGE, b"same")
    task.touch(start + PAGE, PAGE)
    machine.ksm.run(2)
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    machine.khugepaged.max_ptes_shared = 256
    assert [block.result for block in machine.khugepaged.step().blocks] == ["page_lock"]
    with pytest.raises(OSError, match="madvise") as caught:
        task.madvise(start, PMD, Madvise.COLLAPSE)
    assert caught.value.errno == 11
    task.write(start + 5 * PAGE, b"S")
    task.write(start + 9 * PAGE, b"s")
    assert [block.result for block in machine.khugepaged.step().blocks] == ["collapsed"]
    assert task.read(start + 3 * PAGE, 4) == b"same"


@pytest.mark.rule("KS-018")
def test_a_merged_page_that_migrates_is_found_where_it_goes():
    machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB", block_size="8 MiB", kernel="6.18")
    task = machine.spawn()
    task.touch(task.mmap(2100 * PAGE), 2100 * PAGE)  # the first block has frames of the kernel's
    start = mapped(task, "same", "same")
    machine.ksm.run(2)
    before = pfns(task, start)[0]
    machine.offline_block(before // 2048)
    machine.check()
    after, again = pfns(task, start, 2)
    assert after == again != before
    task.write(start + PAGE, b"S")
    more = mapped(task, "same")
    machine.ksm.run(2)
    assert pfns(task, more) == [after]
    machine.check()


def test_unmerging_reclaims_what_it_needs():
    machine = pmcore.open("sim", memory="8 MiB", swap="16 MiB", kernel="6.18")
    task = machine.spawn()
    start = task.mmap(1200 * PAGE)
    task.madvise(start, 1200 * PAGE, Madvise.MERGEABLE)
    task.touch(start, 1200 * PAGE)
    machine.ksm.run(2)
    other = task.mmap(1000 * PAGE)
    task.touch(other, 1000 * PAGE)
    machine.ksm.unmerge()
    machine.check()
    assert not machine.kpageflags().has(PageFlag.KSM).any()


def test_merging_is_told_to_whoever_observes(machine):
    task = machine.spawn()
    start = mapped(task, "same", "same")
    with machine.observe() as events:
        machine.ksm_scan(2)
        task.write(start, b"S")
    changes = [event for event in events if type(event).__name__ == "EntryChange"]
    assert changes[0].call == "ksm_scan"
    assert changes[0].addresses.tolist() == [start, start + PAGE]
    [fault] = [event for event in events if type(event).__name__ == "Fault"]
    assert (fault.outcome, fault.addresses.tolist()) == ("copy", [start])


@pytest.mark.rule("KS-007")
@pytest.mark.parametrize(("kernel", "back"), [("6.18", True), ("6.6", True), ("6.1", False)])
def test_unmerging_zero_pages_by_kernel(kernel, back):
    """Before 6.6 nothing told a zero page that ksmd had placed from one that was read: it stayed."""
    machine = pmcore.open("sim", memory="64 MiB", kernel=kernel)
    task = machine.spawn()
    start = mapped(task, "\0", "\0")
    machine.ksm.use_zero_pages = True
    machine.ksm.run(2)
    assert set(pfns(task, start, 2)) == {machine.core.zero_pfn}
    task.madvise(start, 2 * PAGE, Madvise.UNMERGEABLE)
    assert (machine.core.zero_pfn not in pfns(task, start, 2)) is back
    machine.check()


@pytest.mark.rule("KS-019")
def test_what_is_merged_into_a_lazily_freed_page_is_lost(machine):
    """As the kernel does it (DV-030): only the first of the three mappings was under MADV_FREE."""
    task = machine.spawn()
    given_up, gone = mapped(task, "precious"), mapped(task, "precious")
    machine.ksm.run(2)
    task.munmap(gone, PAGE)
    task.madvise(given_up, PAGE, Madvise.FREE)
    kept = mapped(task, "precious")
    machine.ksm.run(2)
    assert pfns(task, kept) == pfns(task, given_up)
    task.process.clear_refs(ClearRefs.ALL)
    machine.reclaim(10)
    assert task.read(kept, 8) == bytes(8)


@pytest.mark.rule("KS-004")
def test_a_merged_page_is_marked_as_often_as_it_is_mapped(machine):
    """And active only after that: three times leave it active and not referenced."""
    task = machine.spawn()
    start = mapped(task, "", "same", "same", "same", "")
    machine.ksm.run(2)
    task.madvise(start + PAGE, 3 * PAGE, Madvise.POPULATE_READ)
    flags = machine.kpageflags(pfns(task, start + PAGE)[0], 1)
    assert flags.has(PageFlag.ACTIVE).all()
    assert not flags.has(PageFlag.REFERENCED).any()
