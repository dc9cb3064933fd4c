"""Huge pages of other sizes than a PMD maps, by policy, on the simulated machine."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcore
from pmcore import ClearRefs, PageFlag
from pmcore.backends.sim import Policy
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import SwapSettings, load_machine
from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.errors import AddressSpaceFault, ArgumentError
from pmcore.lockstep.programs import programs, thp_settings
from pmcore.program import Run
from pmcore.uapi import Madvise, UffdFeature

PAGE, PMD = 4096, 1 << 21
BASE = 1 << 40
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
RANDOM = programs(max_steps=24, thp=thp_settings())


def machine_with(**sizes):
    return pmcore.open(
        "sim",
        memory="64 MiB",
        swap="16 MiB",
        kernel="6.18",
        policy={"thp_sizes": {name.removeprefix("_"): how for name, how in sizes.items()}},
    )


def orders(machine, task, start, end):
    """Of each page the order of the folio that its entry maps; -1 where nothing is mapped, 0 for a single page."""
    entries = task.process.pagemap(start, end)
    found = []
    for entry in entries:
        if not entry.present:
            found.append(-1)
            continue
        frames = machine.core.memory.frames
        folio = machine.core.memory.large.get(frames.head(entry.pfn))
        found.append(folio.order if folio else 0)
    return found


# -- policy ----------------------------------------------------------------------------------------------


@pytest.mark.rule("TH-001")
def test_the_defaults_are_the_kernels():
    """Without a word no size but the PMD's is given, and that one inherits."""
    machine = machine_with()
    assert Policy() == machine.core.policy
    assert machine.core.thp_orders() == (0, 1 << 9)


@pytest.mark.rule("TH-001")
@pytest.mark.parametrize(
    ("pmd", "how", "always", "advised"),
    [
        ("madvise", "always", True, True),
        ("madvise", "madvise", False, True),
        ("madvise", "inherit", False, True),
        ("madvise", "never", False, False),
        ("always", "inherit", True, True),
        ("always", "madvise", False, True),
        ("never", "inherit", False, False),
        ("never", "always", True, True),
    ],
)
def test_each_setting(pmd, how, always, advised):
    """What a size of 64 kB gives to any mapping, and to one under MADV_HUGEPAGE."""
    machine = pmcore.open("sim", kernel="6.12", policy=Policy(pmd=pmd, thp_sizes={"64kB": how}))
    task = machine.spawn()
    for address, advice, expected in ((BASE, None, always), (2 * BASE, Madvise.HUGEPAGE, advised)):
        start = task.mmap(16 * PAGE, addr=address, flags=0x32)
        if advice:
            task.madvise(start, 16 * PAGE, advice)
        assert task.process.smaps(start, start + PAGE)[0].plain["THPeligible"] == int(expected)
        task.write(start + 5 * PAGE, b"x")
        assert (orders(machine, task, start, start + 16 * PAGE)[0] == 4) == expected
    machine.check()


@pytest.mark.rule("TH-001")
def test_sizes_are_named_by_size_or_order():
    names = ({"64kB": "always"}, {"64 KiB": "always"}, {4: "always"}, {"4": "always"})
    assert {pmcore.open("sim", policy={"thp_sizes": sizes}).core.thp_orders() for sizes in names} == {
        (1 << 4, 1 << 4 | 1 << 9)
    }


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"thp_sizes": {"64kB": "sometimes"}}, "always, inherit, madvise, never"),
        ({"thp_sizes": {"8kB": "always"}}, "there are: 16kB, 32kB"),
        ({"thp_sizes": {"4MiB": "always"}}, "there are: 16kB, 32kB"),
        ({"thp_sizes": {"48kB": "always"}}, "no huge pages of 48kB"),
        ({"thp_sizes": {"0": "always"}}, "no huge pages"),
        ({"thp_size": {}}, "it has pmd, thp_sizes"),
        ({"pmd": "sometimes"}, "policy"),
    ],
)
def test_policies_that_no_machine_has(policy, words):
    with pytest.raises(ArgumentError, match=words):
        pmcore.open("sim", kernel="6.12", policy=policy)


@pytest.mark.rule("TH-001")
def test_older_kernels_have_one_size():
    with pytest.raises(ArgumentError, match=r"6\.8"):
        pmcore.open("sim", kernel="6.6", policy={"thp_sizes": {"64kB": "always"}})
    assert pmcore.open("sim", kernel="6.8", policy={"thp_sizes": {"64kB": "always"}})


# -- as single faults, and well after every step ---------------------------------------------------------


@SLOW
@given(RANDOM)
def test_invariants_hold_after_every_step(program):
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
        machine.check()
    machine.close()
    machine.check()
    assert machine.core.memory.contents.in_use == 0
    assert len(machine.core.memory.large) == 0


@SLOW
@given(RANDOM)
def test_memory_that_runs_out_leaves_a_machine_that_is_well(program):
    machine = pmcore.open("sim", memory="8 MiB", kernel="6.18")
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
        machine.check()


def _seen(program, kernel, *, whole, swap, write=True):
    """What a program and then a touch of all its areas leave: a fault, smaps, entries, and each page's folio."""
    machine = pmcore.open("sim", memory="64 MiB", swap=swap, kernel=kernel)
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
    faults = []
    for task in run.tasks.values():
        for start, length in sorted(run.areas.values()):
            try:
                if whole:
                    task.touch(start + 5, length, write=write)
                else:
                    for addr in range(start + 5, start + length, PAGE):
                        task.touch(addr, 1, write=write)
            except AddressSpaceFault as error:
                faults.append(error.address)
    machine.check()
    frames = machine.core.memory.frames
    entries = [
        task.process.pagemap(vma.start, vma.end) for task in run.tasks.values() for vma in task.process.maps()
    ]
    words = [(e.values & ~np.uint64((1 << 55) - 1)).tolist() for e in entries]
    folios = [frames.behind[e.pfn[e.has_pfn]].tolist() for e in entries]
    flags = [(frames.flags[e.pfn[e.has_pfn]]).tolist() for e in entries]
    return faults, [task.process.smaps() for task in run.tasks.values()], words, folios, flags


@pytest.mark.rule("TH-002", "TH-003")
@SLOW
@given(RANDOM, st.booleans(), st.sampled_from(["6.8", "6.12", "6.18"]))
def test_a_range_is_touched_as_its_pages_one_by_one(program, write, kernel):
    """Vectorised faults against single ones, on whatever a program has left behind."""
    one, other = (_seen(program, kernel, whole=whole, swap="8 MiB", write=write) for whole in (True, False))
    assert one == other


@SLOW
@given(RANDOM, st.integers(0, 23))
def test_going_back_and_saving(tmp_path_factory, program, cut):
    """Folios that are words and folios that are counted come back as they were."""
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")
    run = Run(program, machine)
    for step in program.steps[:cut]:
        run.advance(step)
    state, digest = machine.checkpoint(), machine.digest()
    machine.save(path := tmp_path_factory.mktemp("saved") / "machine.zip")
    for step in program.steps[cut:]:
        run.advance(step)
    machine.restore(state)
    machine.check()
    assert machine.digest() == digest == load_machine(path).digest()


def test_looking_changes_nothing():
    """A folio asked for one by one is the same state as one that was never looked at."""
    machine = machine_with(_64kB="always")
    task = machine.spawn()
    start = task.mmap(64 * PAGE, addr=BASE, flags=0x32)
    task.touch(start, 64 * PAGE)
    before = machine.digest()
    assert set(orders(machine, task, start, start + 64 * PAGE)) == {4}
    assert machine.digest() == before


def test_check_finds_what_is_broken():
    """Planted mistakes in the word of a folio, in what is counted of it, and in its frames."""
    machine = machine_with(_64kB="always")
    task = machine.spawn()
    start = task.mmap(64 * PAGE, addr=BASE, flags=0x32)
    task.touch(start, 64 * PAGE)
    memory = machine.core.memory
    head = memory.frames.head(task.process.pagemap(start, start + PAGE)[0].pfn)
    machine.check()
    for index, value, words in (
        (head, memory.frames.whole[head] + 64, "counts its mappings"),
        (head, memory.frames.whole[head] + 1, "one head and tails"),
        (head + 1, memory.frames.whole[head], "at their heads"),
    ):
        before = int(memory.frames.whole[index])
        memory.frames.whole[index] = value
        with pytest.raises(BrokenInvariant, match=words):
            machine.check()
        memory.frames.whole[index] = before
    machine.check()
    memory.large[head].shared = True
    with pytest.raises(BrokenInvariant, match="shared"):
        machine.check()


# -- faults ----------------------------------------------------------------------------------------------


@pytest.mark.rule("TH-002")
def test_the_largest_block_that_is_empty_and_inside():
    """Alignment, bounds of the mapping, what is there already."""
    machine = machine_with(_16kB="always", _64kB="always")
    task = machine.spawn()
    start = task.mmap(44 * PAGE, addr=BASE + 8 * PAGE, flags=0x32) - 8 * PAGE
    task.touch(start + 30 * PAGE, PAGE, write=False)
    for page, first, order in ((9, 8, 2), (20, 20, 2), (25, 24, 2), (29, 29, 0), (33, 32, 4), (50, 48, 2)):
        task.write(start + page * PAGE, b"x")
        assert orders(machine, task, start + first * PAGE, start + (first + (1 << order)) * PAGE) == [
            order
        ] * (1 << order)
    machine.check()


@pytest.mark.rule("TH-003")
def test_all_entries_of_the_folio_are_set_as_if_written():
    machine = machine_with(_64kB="always")
    task = machine.spawn()
    start = task.mmap(32 * PAGE, addr=BASE, flags=0x32)
    task.write(start + 5 * PAGE, b"x")
    entries = task.process.pagemap(start, start + 32 * PAGE)
    assert entries.present.tolist() == [True] * 16 + [False] * 16
    assert entries.exclusive.tolist() == entries.present.tolist()
    assert np.diff(entries.pfn[:16].astype(np.int64)).tolist() == [1] * 15
    flags = machine.frames_at(pmcore.FrameFile.KPAGEFLAGS, entries.pfn[:16])
    assert ((flags & int(PageFlag.THP)) != 0).all()
    counters = task.process.smaps()[0].counters
    assert (counters["Rss"], counters["Private_Dirty"], counters["AnonHugePages"]) == (65536, 65536, 0)


@pytest.mark.rule("TH-003")
def test_soft_dirty_is_set_on_all_of_it():
    machine = pmcore.open("sim", memory="64 MiB", kernel="6.12", policy={"thp_sizes": {"64kB": "always"}})
    task = machine.spawn()
    start = task.mmap(32 * PAGE, addr=BASE, flags=0x32)
    task.process.clear_refs(ClearRefs.SOFT_DIRTY)
    task.write(start + 5 * PAGE, b"x")
    assert task.process.pagemap(start, start + 32 * PAGE).soft_dirty.tolist() == [True] * 16 + [False] * 16


@pytest.mark.rule("TH-004")
def test_reads_and_userfaultfd_keep_to_single_pages():
    machine = machine_with(_64kB="always")
    task = machine.spawn()
    start = task.mmap(32 * PAGE, addr=BASE, flags=0x32)
    task.touch(start + PAGE, PAGE, write=False)
    assert orders(machine, task, start, start + 4 * PAGE) == [-1, 0, -1, -1]
    fd = task.userfaultfd(UffdFeature.WP_ASYNC)
    task.uffd_register(fd, start + 16 * PAGE, 16 * PAGE, 2)
    task.touch(start + 20 * PAGE, PAGE)
    assert orders(machine, task, start + 19 * PAGE, start + 22 * PAGE) == [-1, 0, -1]


@pytest.mark.rule("TH-005")
def test_without_a_block_the_next_smaller_size_will_do():
    """Memory in pieces: 64 kB are nowhere, 16 kB are."""
    machine = machine_with(_16kB="always", _64kB="always")
    task = machine.spawn()
    hoard = task.mmap(64 << 20)
    task.madvise(hoard, 64 << 20, Madvise.NOHUGEPAGE)
    with suppress(pmcore.SyscallError):
        task.touch(hoard, 64 << 20)
    pages = task.process.pagemap(hoard, hoard + (64 << 20))
    for pfn, page in zip(pages.pfn.tolist(), range(len(pages.pfn)), strict=True):
        if pfn % 16 < 4 and pages[page].present:
            task.madvise(hoard + page * PAGE, PAGE, Madvise.DONTNEED)
    with suppress(NoMemory):
        while True:  # what the kernel keeps for itself lies in larger blocks
            machine.core.memory.block(3, kernel=True)
    start = task.mmap(16 * PAGE, addr=BASE, flags=0x32)
    task.write(start, b"x")
    assert orders(machine, task, start, start + 4 * PAGE) == [2] * 4
    assert machine.counters["mthp_fallback"] >= 1


# -- afterwards ------------------------------------------------------------------------------------------


@pytest.mark.rule("TH-006")
@pytest.mark.parametrize("advice", [Madvise.FREE, Madvise.COLD, Madvise.PAGEOUT])
def test_advice_for_a_part_takes_the_folio_apart(advice):
    """All of it: nothing happens to the folio, but PAGEOUT to a swap area without clusters."""
    machine = machine_with(_64kB="always")
    task = machine.spawn()
    start = task.mmap(32 * PAGE, addr=BASE, flags=0x32)
    for page in range(32):
        task.write(start + page * PAGE, b"x")
    task.madvise(start, 16 * PAGE, advice)
    task.madvise(start + 20 * PAGE, PAGE, advice)
    expected = [-1] * 16 if advice == Madvise.PAGEOUT else [4] * 16
    assert orders(machine, task, start, start + 16 * PAGE) == expected
    rest = orders(machine, task, start + 16 * PAGE, start + 32 * PAGE)
    assert set(rest) == ({0, -1} if advice == Madvise.PAGEOUT else {0})
    machine.check()


@pytest.mark.rule("TH-006")
def test_advice_for_a_part_of_a_shared_folio_does_nothing():
    machine = machine_with(_64kB="always")
    task = machine.spawn()
    start = task.mmap(16 * PAGE, addr=BASE, flags=0x32)
    task.touch(start, PAGE)
    child = task.fork()
    before = child.process.smaps()
    child.madvise(start + PAGE, 2 * PAGE, Madvise.FREE)
    assert child.process.smaps() == before
    assert orders(machine, child, start, start + 16 * PAGE) == [4] * 16


@pytest.mark.rule("TH-007")
@pytest.mark.parametrize(("kernel", "left"), [("6.18", 16), ("6.12", 11)])
def test_lazily_freed_folios_go_whole_or_not_at_all(kernel, left):
    """One page written since keeps them all; before 6.15 those before it went."""
    machine = pmcore.open(
        "sim", memory="64 MiB", swap="8 MiB", kernel=kernel, policy={"thp_sizes": {"64kB": "always"}}
    )
    task = machine.spawn()
    start = task.mmap(32 * PAGE, addr=BASE, flags=0x32)
    task.touch(start, 32 * PAGE)
    task.madvise(start, 32 * PAGE, Madvise.FREE)
    task.write(start + 21 * PAGE, b"x")
    task.madvise(start, 32 * PAGE, Madvise.PAGEOUT)
    present = task.process.pagemap(start, start + 32 * PAGE).present
    assert (int(present[:16].sum()), int(present[16:].sum())) == (0, left)
    machine.check()


@pytest.mark.rule("TH-008")
def test_two_processes_are_counted_a_third_is_not():
    """The third keeps a folio that counts as shared, though nobody else is left."""
    machine = machine_with(_64kB="always")
    task = machine.spawn()
    start = task.mmap(16 * PAGE, addr=BASE, flags=0x32)
    task.touch(start, PAGE)
    child = task.fork()
    task.exit()
    pfn = child.process.pagemap(start, start + PAGE)[0].pfn
    child.write(start, b"x")
    assert child.process.pagemap(start, start + PAGE)[0].pfn == pfn
    second = child.fork()
    third = second.fork()
    child.exit()
    second.exit()
    third.write(start, b"y")
    assert third.process.pagemap(start, start + PAGE)[0].pfn != pfn
    machine.check()


@pytest.mark.rule("TH-009")
def test_a_folio_in_the_swap_cache_comes_back_whole():
    """On an area with clusters that completes later the folio stays, and one fault maps all of it again."""
    area = SwapSettings(length=16 << 20, immediate=False, large_folios=True)
    machine = pmcore.open(
        "sim", memory="64 MiB", swap=[area], kernel="6.18", policy={"thp_sizes": {"64kB": "always"}}
    )
    task = machine.spawn()
    start = task.mmap(32 * PAGE, addr=BASE, flags=0x32)
    task.touch(start, 32 * PAGE)
    for folio in range(2):  # folios of zeros would only be noted (RC-004)
        task.write(start + folio * 16 * PAGE, b"x")
    before = task.process.pagemap(start, start + 32 * PAGE).pfn.tolist()
    task.madvise(start, 32 * PAGE, Madvise.PAGEOUT)
    machine.check()
    assert not task.process.pagemap(start, start + 32 * PAGE).present.any()
    task.touch(start + 3 * PAGE, PAGE, write=False)
    assert task.process.pagemap(start, start + 32 * PAGE).present.tolist() == [True] * 16 + [False] * 16
    assert task.process.pagemap(start, start + 16 * PAGE).pfn.tolist() == before[:16]
    machine.check()
    task.exit()
    machine.check()


def test_folios_that_two_processes_map_whole_cost_no_objects():
    """fork and exit count a GiB of folios as words: the same as counting each, which looking at one shows."""
    machine = pmcore.open("sim", memory="64 MiB", kernel="6.18", policy={"thp_sizes": {"16kB": "always"}})
    task = machine.spawn()
    start = task.mmap(64 * PAGE)
    task.touch(start, 64 * PAGE)
    large, alone = machine.core.memory.large, machine.core.memory.frames.whole.copy()
    child = task.fork()
    machine.check()
    assert large.words == len(large) > 0
    mine, theirs = task.mm.number, child.mm.number
    for folio in large.values():
        assert folio.by_mm == folio.known == {mine: folio.pages, theirs: folio.pages}
        assert folio.shared
        assert (folio.mapped, folio.entire) == (2 * folio.pages, 0)
    digest = machine.digest()
    for head, _ in list(large.items()):
        assert large[head].shared  # an object from here on
    assert large.words == 0
    assert machine.digest() == digest
    third = task.fork()
    machine.check()
    third.exit()
    machine.check()
    child.exit()
    machine.check()
    assert (machine.core.memory.frames.whole == alone).all()
