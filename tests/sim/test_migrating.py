"""A simulated machine in the middle of a migration, looked at; and after it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from pmcore.backends.sim.machine import load_machine
from pmcore.errors import AddressSpaceFault, ArgumentError, NotModelled
from pmcore.lockstep import take
from pmcore.lockstep.generator import Seeded, random_program
from pmcore.pagemap import PagemapEntry
from pmcore.profile import preset
from pmcore.program import Run
from pmcore.protocols import FrameFile
from pmcore.registry import open_workbench
from pmcore.scan.request import ScanRequest
from pmcore.uapi import PM_PFRAME_MASK, Madvise, MapFlag, PageCategory, PageFlag, UffdFeature

PAGE, PMD = 4096, 2 << 20
READ, EXCLUSIVE, WRITE = 28, 29, 30
SCAN = PageCategory.SWAPPED | PageCategory.WRITTEN


def sim(**options):
    return open_workbench("sim", **{"memory": "64 MiB", "kernel": "6.12", **options})


def words(task, start, pages):
    return task.process.pagemap(start, start + pages * PAGE).values


def fields(values):
    return [(int(word) & 31, (int(word) & PM_PFRAME_MASK) >> 5) for word in values]


def categories(task, start, pages):
    result = task.process.pagemap_scan(
        ScanRequest(start=start, end=start + pages * PAGE, vec_len=64, return_mask=0x7F)
    )
    found = []
    for region in result.regions:
        count = (int(region["end"]) - int(region["start"])) // PAGE
        found += [int(region["categories"])] * count
    return found


def frames(machine, values):
    pfns = values & np.uint64(PM_PFRAME_MASK)
    return machine.frames_at(FrameFile.KPAGEFLAGS, pfns), machine.frames_at(FrameFile.KPAGECOUNT, pfns)


@pytest.fixture
def prepared():
    """Pages: written, shared with a child, read-only, write-protected by a userfaultfd; a file's at the end."""
    machine = sim()
    task = machine.spawn()
    start = task.mmap(6 * PAGE)
    task.touch(start, 4 * PAGE)
    task.write(start, b"here")
    child = task.fork()
    child.touch(start, PAGE)
    task.touch(start, PAGE)
    task.process.clear_refs(4)
    task.touch(start, PAGE)
    task.touch(start + 4 * PAGE, 2 * PAGE)
    task.mprotect(start + 4 * PAGE, PAGE, 1)
    fd = task.userfaultfd(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED)
    task.uffd_register(fd, start + 5 * PAGE, PAGE, 2)
    task.uffd_writeprotect(fd, start + 5 * PAGE, PAGE, protect=True)
    memfd = task.memfd_create("m")
    task.ftruncate(memfd, PAGE)
    shared = task.mmap(PAGE, flags=1, fd=memfd)
    task.touch(shared, PAGE)
    return machine, task, child, start, shared


@pytest.mark.rule("MG-006")
def test_entries(prepared):
    machine, task, child, start, shared = prepared
    before, others = words(task, start, 6), words(child, start, 6)
    seen = categories(task, start, 6)
    assert machine.start_migration(task, start, 6 * PAGE) == 6
    after = words(task, start, 6)
    pfns = (before & np.uint64(PM_PFRAME_MASK)).tolist()
    assert fields(after) == list(zip([WRITE, READ, READ, READ, EXCLUSIVE, EXCLUSIVE], pfns, strict=True))
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        was, now = PagemapEntry(old), PagemapEntry(new)
        assert (now.swapped, now.present, now.exclusive, now.file) == (True, False, False, False)
        assert (now.soft_dirty, now.uffd_wp) == (was.soft_dirty, was.uffd_wp)
    # The child has its own first page, which stays; what it shares with its parent moves for it, too.
    assert int(words(child, start, 1)[0]) == int(others[0])
    assert fields(words(child, start, 4)[1:]) == fields(after[1:4])
    assert categories(task, start, 6) == [
        word & ~PageCategory.PRESENT | PageCategory.SWAPPED for word in seen
    ]
    assert task.process.smaps(start, start + PAGE)[0].counters["Private_Dirty"] == 0
    assert task.process.pread("status", 0, 4096).decode().count("VmSwap:\t       0 kB") == 1
    assert task.mincore(start, 6 * PAGE).all()
    machine.check()
    machine.finish_migration()
    assert machine.start_migration(task, shared, PAGE) == 1
    entry = PagemapEntry(int(words(task, shared, 1)[0]))
    assert (entry.file, entry.swapped) == (True, True)
    assert categories(task, shared, 1) == [SCAN | PageCategory.FILE]
    machine.check()


@pytest.mark.rule("MG-006")
def test_kernels_before_exclusive_pages_have_two_types():
    machine = sim(kernel="5.15")
    task = machine.spawn()
    start = task.mmap(2 * PAGE)
    task.touch(start, 2 * PAGE)
    task.mprotect(start, PAGE, 1)
    machine.start_migration(task, start, 2 * PAGE)
    assert [kind for kind, _ in fields(words(task, start, 2))] == [28, 29]


@pytest.mark.rule("MG-007")
def test_frames_and_waiting(prepared):
    machine, task, child, start, _ = prepared
    before = words(task, start, 6)
    machine.start_migration(task, start, 4 * PAGE)
    flags, counts = frames(machine, before)
    assert counts.tolist()[:4] == [0, 0, 0, 0]
    gone = int(PageFlag.LRU | PageFlag.MMAP | PageFlag.OWNER_2)
    assert {int(word) & gone for word in flags[:4]} == {0}
    assert all(int(word) & PageFlag.LOCKED and int(word) & PageFlag.DIRTY for word in flags[:4])
    for who in (task, child):
        for call in (lambda t: t.read(start + PAGE, 1), lambda t: t.touch(start + PAGE, PAGE)):
            with pytest.raises(AddressSpaceFault) as caught:
                call(who)
            assert (caught.value.signal, caught.value.address) == ("SIGSTOP", start + PAGE)
    digest = machine.digest()
    for act in (
        lambda: task.madvise(start, PAGE, Madvise.PAGEOUT),
        lambda: task.mmap(PAGE, flags=0x22 | MapFlag.POPULATE),
        lambda: task.mlock(start, PAGE),
        lambda: task.userfaultfd(0),
        lambda: task.move_pages([start], None),
        lambda: machine.reclaim(1),
        lambda: machine.khugepaged.step(),
        lambda: machine.ksm_scan(),
        lambda: machine.swapon("1 MiB"),
        lambda: task.process.clear_refs(4),
        lambda: machine.hugetlb.resize("2 MiB", 1),
        lambda: machine.start_migration(task, start, PAGE),
    ):
        with pytest.raises(NotModelled):
            act()
    assert machine.digest() == digest
    machine.check()


@pytest.mark.rule("MG-007")
def test_what_is_not_on_its_way_is_accessed(prepared):
    machine, task, child, start, _ = prepared
    machine.start_migration(task, start + PAGE, PAGE)
    fresh = task.mmap(4 * PAGE)
    task.touch(fresh, 4 * PAGE)
    task.write(start, b"x" * PAGE)
    for access in (
        lambda: task.touch(start, 4 * PAGE),
        lambda: task.read(start, 4 * PAGE),
        lambda: task.write(start + PAGE - 3, b"abcdef"),
        lambda: task.touch(start + 5, 4 * PAGE, step=PAGE // 2),
    ):
        with pytest.raises(AddressSpaceFault) as caught:
            access()
        assert caught.value.signal == "SIGSTOP"
        assert start + PAGE <= caught.value.address < start + PAGE + 8
    assert task.read(start + PAGE - 3, 3) == b"abc"
    assert machine.spawn().read(machine.spawn().mmap(PAGE), 0) == b""
    machine.check()
    machine.finish_migration()
    machine.check()
    assert child.read(start + PAGE, 1) == b"\0"


@pytest.mark.rule("MG-007")
def test_who_comes_to_a_page_of_a_file_on_its_way_waits():
    machine = sim()
    task = machine.spawn()
    fd = task.memfd_create("m")
    task.ftruncate(fd, 4 * PAGE)
    start = task.mmap(4 * PAGE, flags=1, fd=fd)
    task.touch(start, 4 * PAGE)
    machine.start_migration(task, start + PAGE, PAGE)
    child = task.fork()
    child.touch(start, PAGE, write=False)  # and what lies around, but for that page
    assert [PagemapEntry(int(word)).present for word in words(child, start, 4)] == [True, False, True, True]
    with pytest.raises(AddressSpaceFault) as caught:
        child.touch(start + PAGE, PAGE)
    assert (caught.value.signal, caught.value.address) == ("SIGSTOP", start + PAGE)
    machine.check()
    task.munmap(start, 4 * PAGE)  # the file has the page still
    machine.check()
    machine.finish_migration()
    child.touch(start + PAGE, PAGE)
    machine.check()


@pytest.mark.rule("MG-011")
def test_fork_beside_a_migration(prepared):
    machine, task, _, start, _ = prepared
    machine.start_migration(task, start, 6 * PAGE)
    before = words(task, start, 6)
    again = task.fork()
    assert [kind for kind, _ in fields(words(task, start, 6))] == [READ] * 6
    assert [kind for kind, _ in fields(words(again, start, 6))] == [READ] * 6
    assert [pfn for _, pfn in fields(words(again, start, 6))] == [pfn for _, pfn in fields(before)]
    machine.check()
    machine.finish_migration()
    _, counts = frames(machine, words(task, start, 6))
    assert counts.tolist() == [2, 3, 3, 3, 2, 2]
    again.write(start, b"mine")
    assert (task.read(start, 4), again.read(start, 4)) == (b"here", b"mine")
    machine.check()


@pytest.mark.rule("MG-012")
def test_protection_beside_a_migration(prepared):
    machine, task, _, start, shared = prepared
    machine.start_migration(task, start, PAGE)
    task.mprotect(start, PAGE, 1)
    assert [kind for kind, _ in fields(words(task, start, 1))] == [EXCLUSIVE]
    task.mprotect(start, PAGE, 3)
    assert [kind for kind, _ in fields(words(task, start, 1))] == [EXCLUSIVE]
    moved = task.mremap(start, PAGE, PAGE, flags=3, new_addr=start + (1 << 30))
    assert [kind for kind, _ in fields(words(task, moved, 1))] == [EXCLUSIVE]
    machine.check()
    machine.finish_migration()
    task.write(moved, b"more")
    assert task.read(moved, 4) == b"more"
    machine.start_migration(task, shared, PAGE)
    assert [kind for kind, _ in fields(words(task, shared, 1))] == [WRITE]
    task.mprotect(shared, PAGE, 1)
    assert [kind for kind, _ in fields(words(task, shared, 1))] == [READ]
    machine.check()


@pytest.mark.rule("MG-013")
def test_unmapping_beside_a_migration(prepared):
    machine, task, child, start, _ = prepared
    machine.start_migration(task, start, 6 * PAGE)
    task.madvise(start, 2 * PAGE, Madvise.DONTNEED)
    assert not (words(task, start, 2) & np.uint64(1 << 62)).any()
    assert [kind for kind, _ in fields(words(child, start + PAGE, 1))] == [READ]
    machine.check()
    task.munmap(start + 2 * PAGE, PAGE)
    child.exit()
    machine.check()
    task.touch(start, PAGE)
    machine.finish_migration()
    machine.check()
    task.touch(start, 2 * PAGE)
    machine.start_migration(task, start, PAGE)
    task.exit()
    machine.check()
    machine.finish_migration()
    machine.check()
    assert not machine.core.memory.frames.mapcount.any()


@pytest.mark.rule("MG-009", "MG-011", "MG-012", "MG-013")
def test_huge_pages_beside_a_migration():
    machine = sim()
    task = machine.spawn()
    start = (task.mmap(2 * PMD) + PMD - 1) & -PMD
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    task.write(start + 7 * PAGE, b"huge")
    machine.start_migration(task, start, PMD)
    child = task.fork()
    assert {kind for who in (task, child) for kind, _ in fields(words(who, start, 512))} == {READ}
    assert set(categories(child, start, 512)) == {SCAN | PageCategory.HUGE}
    machine.check()
    child.munmap(start + 256 * PAGE, 256 * PAGE)
    assert set(categories(child, start, 256)) == {SCAN}
    assert set(categories(task, start, 256)) == {SCAN | PageCategory.HUGE}
    machine.check()
    task.mprotect(start, 8 * PAGE, 1)
    machine.check()
    machine.finish_migration()
    machine.check()
    assert (task.read(start + 7 * PAGE, 4), child.read(start + 7 * PAGE, 4)) == (b"huge", b"huge")


@pytest.mark.rule("MG-007", "MG-011", "MG-012", "MG-013")
@pytest.mark.parametrize("focus", ["", "disk", "poison"])
def test_programs_go_on_beside_a_migration(focus):
    """Whatever may be done meanwhile, all is well after each step, and at the end."""
    done = 0
    for number in range(12):
        program = random_program(
            Seeded(f"beside:{number}"), preset("6.12"), max_steps=30, focus=focus, hugetlb=False
        )
        machine = sim(memory="96 MiB", swap="16 MiB")
        run = Run(program, machine)
        for place, step in enumerate(program.steps):
            if machine.core.migration is None and place % 3 == 2:
                for task in list(run.tasks.values()):
                    for vma in list(task.mm.vmas)[:2]:
                        with contextlib.suppress(ArgumentError, NotModelled):
                            machine.start_migration(task, vma.start, min(vma.length, 64 * PAGE))
            try:
                run.advance(step)
            except NotModelled:
                if machine.core.migration is None:
                    break
                machine.finish_migration()
                machine.check()
                continue
            done += machine.core.migration is not None
            machine.check()
        machine.close()
        machine.check()
    assert done > 10


@pytest.mark.rule("MG-008")
def test_the_end_is_that_of_one_step(prepared, tmp_path):
    machine, task, child, start, _ = prepared
    before = words(task, start, 6)
    state = machine.checkpoint()
    machine.start_migration(task, start, 6 * PAGE)
    machine.save(tmp_path / "m")
    again = load_machine(tmp_path / "m")
    assert again.digest() == machine.digest()
    for one in (machine, again):
        one.finish_migration()
        one.check()
    assert again.digest() == machine.digest()
    with pytest.raises(ArgumentError):
        machine.finish_migration()
    after = words(task, start, 6)
    moved = (before ^ after) & np.uint64(PM_PFRAME_MASK)
    assert (moved != 0).all()
    assert ((before ^ after) & ~np.uint64(PM_PFRAME_MASK)).max() == 0
    assert (task.read(start, 4), child.read(start, 4)) == (b"here", b"here")
    machine.restore(state)
    assert words(task, start, 6).tolist() == before.tolist()
    machine.check()


@pytest.mark.rule("MG-009")
def test_huge_pages():
    machine = sim()
    task = machine.spawn()
    start = (task.mmap(2 * PMD) + PMD - 1) & -PMD
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    task.write(start, b"huge")
    head = int(words(task, start, 1)[0]) & PM_PFRAME_MASK
    assert machine.start_migration(task, start + 7 * PAGE, PAGE) == 512
    assert fields(words(task, start, 512)) == [(WRITE, head + n) for n in range(512)]
    assert set(categories(task, start, 512)) == {SCAN | PageCategory.HUGE}
    counters = task.process.smaps(start, start + PAGE)[0].counters
    assert (counters["AnonHugePages"], counters["Rss"], counters["Shared_Dirty"]) == (PMD, PMD, PMD)
    with pytest.raises(AddressSpaceFault):
        task.touch(start + 9 * PAGE, 1)
    machine.check()
    machine.finish_migration()
    machine.check()
    assert task.read(start, 4) == b"huge"
    assert int(words(task, start, 1)[0]) & PM_PFRAME_MASK != head


@pytest.mark.rule("MG-006")
def test_what_cannot_be_moved(prepared):
    machine, task, _, start, _ = prepared
    empty = task.mmap(PAGE)
    task.touch(empty, PAGE, write=False)
    with pytest.raises(ArgumentError):
        machine.start_migration(task, empty, PAGE)
    with pytest.raises(ArgumentError):
        machine.start_migration(sim().spawn(), start, PAGE)
    task.mlock(start, PAGE)
    with pytest.raises(NotModelled):
        machine.start_migration(task, start, PAGE)
    machine.check()


@pytest.mark.rule("MG-004", "MG-008", "MG-010")
@pytest.mark.parametrize(
    ("kernel", "focus"),
    [("6.18", ""), ("6.12", "nodes"), ("6.12", "poison"), ("6.18", "disk"), ("6.18", "ksm")],
)
def test_nobody_notices_but_by_frames(kernel, focus):
    """Whatever a program does: pages that are moved meanwhile are the same to all that look at them."""
    moved = 0
    for number in range(6):
        program = random_program(
            Seeded(f"moved:{number}"), preset(kernel), max_steps=28, focus=focus, hugetlb=False
        )
        machine = sim(kernel=kernel, memory="96 MiB", swap="16 MiB", nodes=2)
        run = Run(program, machine)
        for step in program.steps:
            try:
                run.advance(step)
            except NotModelled:
                break
            before = seen(run)
            moved += machine.compact()
            for task in list(run.tasks.values()):
                for vma in list(task.mm.vmas)[:1]:
                    digest = machine.digest()
                    try:
                        moved += machine.start_migration(task, vma.start, min(vma.length, 64 * PAGE))
                    except (ArgumentError, NotModelled):
                        assert machine.digest() == digest
                        continue
                    machine.check()
                    machine.finish_migration()
            machine.check()
            assert seen(run) == before
        machine.close()
        machine.check()
    assert moved > 100


def seen(run):
    """All that a look shows but frames, and which pages are dirty."""
    found = []
    for name, task in take(run).tasks.items():
        found.append((name, (task.words & ~np.uint64(PM_PFRAME_MASK)).tolist()))
        for entry in task.vmas:
            kept = {
                key: value for key, value in entry.counters.items() if not key.endswith(("Dirty", "Clean"))
            }
            kept.pop("LazyFree", None)
            found.append((str(entry.vma), kept))
    return found
