"""A simulated machine in the middle of a migration, looked at; and after it."""

from __future__ import annotations

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
from pmcore.uapi import PM_PFRAME_MASK, Madvise, PageCategory, PageFlag, UffdFeature

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
        lambda: task.touch(start + 4 * PAGE, PAGE),
        lambda: task.munmap(start, PAGE),
        task.fork,
        task.exit,
        machine.spawn,
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
