"""hugetlb on the simulated machine: pools, promises, faults, parts, gigantic pages, invariants, going back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import pmcore
from pmcore import PageFlag, ScanRequest
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import load_machine
from pmcore.errors import AddressSpaceFault, ArgumentError, NotModelled, SyscallError
from pmcore.lockstep.programs import programs
from pmcore.program import Run
from pmcore.uapi import Madvise, MapFlag, PageCategory, UffdFeature

PAGE, HUGE, GIB = 4096, 1 << 21, 1 << 30
PRIVATE = int(MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.HUGETLB)
SHARED = int(MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.HUGETLB)
NORESERVE = int(MapFlag.NORESERVE)
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def make(pages=8, *, surplus=0, memory="128 MiB", kernel="6.18", **settings):
    return pmcore.open(
        "sim", memory=memory, swap="8 MiB", kernel=kernel, hugepages={"2 MiB": (pages, surplus)}, **settings
    )


@pytest.fixture
def machine():
    with make() as machine:
        yield machine
        machine.check()


def numbers(machine):
    """Total, free, promised, surplus."""
    pool = machine.hugetlb.default
    return pool.total, len(pool.free), pool.reserved, pool.surplus


def errno_of(call, *arguments, **named):
    with pytest.raises(SyscallError) as caught:
        call(*arguments, **named)
    return caught.value.errno


@pytest.mark.parametrize("version", ["6.18", "6.12", "6.1", "4.19", "2.6.32"])
def test_invariants_hold_after_every_step(version):
    """And when all tasks have ended the pool is as it was."""

    @SLOW
    @given(programs(max_steps=28))
    def hold(program):
        machine = make(12, surplus=3, memory="256 MiB", kernel=version)
        run = Run(program, machine)
        for step in program.steps:
            run.advance(step)
            machine.check()
        state, digest = machine.checkpoint(), machine.digest()
        machine.close()
        machine.check()
        assert numbers(machine) == (12, 12, 0, 0)
        assert machine.core.memory.contents.in_use == 0
        machine.restore(state)
        machine.check()
        assert machine.digest() == digest

    hold()


@pytest.mark.rule("HT-001")
def test_the_pool_grows_and_shrinks(machine):
    task = machine.spawn()
    start = task.mmap(6 * HUGE, flags=PRIVATE)
    task.touch(start, 4 * HUGE)
    assert numbers(machine) == (8, 4, 2, 0)
    assert machine.hugetlb.resize("2 MiB", 1) == 6  # promised and used ones stay, as surplus
    assert numbers(machine) == (6, 2, 2, 5)
    machine.check()
    task.munmap(start, HUGE)
    assert numbers(machine) == (5, 2, 2, 4)
    assert machine.hugetlb.resize("2 MiB", 3) == 5
    assert numbers(machine)[3] == 2
    assert machine.hugetlb.resize("2 MiB", 1000) < 64  # as far as memory allows
    machine.check()
    machine.hugetlb.resize("2 MiB", 8)
    task.exit()
    assert numbers(machine) == (8, 8, 0, 0)
    for bad in (lambda: machine.hugetlb.resize("3 MiB", 1), lambda: machine.hugetlb.resize("2 MiB", -1)):
        with pytest.raises(ArgumentError):
            bad()
    with pytest.raises(ArgumentError, match="1000 huge pages"):
        make(1000)


@pytest.mark.rule("HT-001")
def test_meminfo_has_the_pool(machine):
    task = machine.spawn()
    task.mmap(3 * HUGE, flags=PRIVATE)
    lines = machine.pread("meminfo", 0, 10_000).decode().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    assert found["HugePages_Total"] == found["HugePages_Free"] == 8
    assert (found["HugePages_Rsvd"], found["Hugepagesize"], found["Hugetlb"]) == (3, 2048, 8 * 2048)


@pytest.mark.rule("HT-002", "HT-005")
def test_promises_are_kept_and_no_more_are_made():
    machine = make(4, surplus=2)
    task = machine.spawn()
    start = task.mmap(5 * HUGE, flags=PRIVATE)
    assert numbers(machine) == (5, 5, 5, 1)  # a surplus page is made for the promise
    assert errno_of(task.mmap, 2 * HUGE, flags=PRIVATE) == 12
    other = task.mmap(4 * HUGE, flags=PRIVATE | NORESERVE)
    task.touch(other, HUGE)
    assert numbers(machine) == (6, 5, 5, 2)
    with pytest.raises(AddressSpaceFault, match="exhausted") as caught:
        task.touch(other, 4 * HUGE)
    assert (caught.value.signal, caught.value.address) == ("SIGBUS", other + HUGE)
    assert errno_of(task.madvise, other, 4 * HUGE, Madvise.POPULATE_READ) == 14
    assert errno_of(task.mlock, other, 4 * HUGE) == 12
    task.touch(start, 5 * HUGE)
    machine.check()
    task.exit()
    machine.check()
    assert numbers(machine) == (4, 4, 0, 0)


@pytest.mark.rule("HT-003")
def test_parts_are_refused_and_change_nothing(machine):
    task = machine.spawn()
    start = task.mmap(2 * HUGE + PAGE, flags=PRIVATE)  # rounded up
    assert task.process.maps()[0].length == 3 * HUGE
    task.touch(start, HUGE)
    fd = task.userfaultfd(UffdFeature.WP_ASYNC)
    before = machine.digest()
    for call in (
        lambda: task.mmap(HUGE, addr=start + (64 << 20) + PAGE, flags=PRIVATE | MapFlag.FIXED),
        lambda: task.mmap(HUGE, flags=PRIVATE | 22 << 26),
        lambda: task.munmap(start + PAGE, HUGE),
        lambda: task.munmap(start, PAGE),
        lambda: task.mprotect(start, PAGE, 1),
        lambda: task.madvise(start + PAGE, HUGE, Madvise.DONTNEED),
        lambda: task.madvise(start, PAGE, Madvise.RANDOM),
        lambda: task.mremap(start + PAGE, HUGE, HUGE, flags=3, new_addr=1 << 41),
        lambda: task.mremap(start, HUGE, 2 * HUGE),
        lambda: task.uffd_register(fd, start, PAGE, 2),
        lambda: task.uffd_register(fd, start + PAGE, HUGE, 2),
        *(
            lambda advice=advice: task.madvise(start, HUGE, advice)
            for advice in ("FREE", "COLD", "PAGEOUT", "COLLAPSE", "WIPEONFORK", "GUARD_INSTALL")
            for advice in [Madvise[advice]]
        ),
    ):
        assert errno_of(call) == 22
        assert machine.digest() == before, call
    assert errno_of(task.madvise, start, HUGE, Madvise.REMOVE) == 13


@pytest.mark.rule("HT-004", "HT-011")
def test_a_fault_takes_a_whole_page(machine):
    task = machine.spawn()
    start = task.mmap(2 * HUGE, flags=PRIVATE)
    task.write(start + HUGE - 2, b"across")
    assert task.read(start + HUGE - 3, 7) == b"\0across"
    assert task.read(start + 9 * PAGE, 1) == b"\0"
    entries = task.process.pagemap(start, start + 2 * HUGE)
    assert entries.present.all()
    assert entries.exclusive.all()
    assert not entries.file.any()
    assert (np.diff(entries.pfn[:512].astype(np.int64)) == 1).all()
    flags = machine.kpageflags(entries[0].pfn, 512)
    wanted = PageFlag.HUGE | PageFlag.UPTODATE | PageFlag.ANON | PageFlag.MMAP
    assert flags.has(wanted).all()
    assert not flags.has(PageFlag.LRU).any()
    assert flags.has(PageFlag.COMPOUND_HEAD).sum() == 1
    assert (machine.kpagecount(entries[0].pfn, 512) == 1).all()
    smaps = task.process.smaps()[0]
    assert (smaps.counters["Rss"], smaps.counters["Private_Hugetlb"]) == (0, 2 * HUGE)
    assert smaps.counters["KernelPageSize"] == HUGE
    assert smaps.has_flag("ht")
    assert task.mincore(start, 2 * HUGE).all()


@pytest.mark.rule("HT-006")
def test_the_first_owner_takes_its_page_back():
    machine = make(3)
    task = machine.spawn()
    start = task.mmap(2 * HUGE, flags=PRIVATE)
    task.write(start, b"old")
    task.touch(start + HUGE, 1)
    child = task.fork()
    task.write(start, b"new")  # the third page
    assert (task.read(start, 3), child.read(start, 3)) == (b"new", b"old")
    task.touch(start + HUGE, 1)  # none is left: the child loses the second
    assert not child.process.pagemap(start + HUGE, start + 2 * HUGE).present.any()
    with pytest.raises(AddressSpaceFault, match="first owner"):
        child.touch(start + HUGE, 1)
    assert child.read(start, 3) == b"old"
    machine.check()


@pytest.mark.rule("HT-007", "HT-008", "HT-012")
def test_shared_pages_are_the_files(machine):
    task = machine.spawn()
    start = task.mmap(3 * HUGE, flags=SHARED)
    task.write(start, b"seen by all")
    task.write(start + HUGE + 5, b"x")
    child = task.fork()
    assert not child.process.pagemap(start, start + HUGE).present.any()
    assert child.read(start, 11) == b"seen by all"
    entries = task.process.pagemap(start, start + HUGE)
    assert entries.file.all()
    assert not entries.exclusive.any()
    assert machine.kpageflags(entries[0].pfn, 512).has(PageFlag.DIRTY).all()
    task.madvise(start, HUGE, Madvise.DONTNEED)
    assert task.read(start, 4) == b"seen"
    task.madvise(start + PAGE, 2 * HUGE, Madvise.REMOVE)  # the second page whole, the rest in part
    assert child.read(start, 4) == b"seen"
    assert child.read(start + HUGE + 5, 1) == b"\0"
    assert numbers(machine) == (8, 6, 1, 0)
    task.exit()
    assert numbers(machine) == (8, 6, 1, 0)
    child.exit()
    assert numbers(machine) == (8, 8, 0, 0)


@pytest.mark.rule("HT-002")
def test_a_replaced_file_still_has_its_pages_while_the_call_lasts():
    """Its page would have been the second one."""
    machine = make(2)
    task = machine.spawn()
    start = task.mmap(HUGE, addr=1 << 40, flags=SHARED)
    task.touch(start, HUGE)
    assert errno_of(task.mmap, 2 * HUGE, addr=start, flags=PRIVATE | MapFlag.FIXED) == 12
    assert not task.process.maps()
    assert numbers(machine) == (2, 2, 0, 0)
    machine.check()


@pytest.mark.rule("HT-008")
def test_what_the_owner_gives_up_is_promised_again(machine):
    task = machine.spawn()
    start = task.mmap(3 * HUGE, flags=PRIVATE)
    task.write(start, b"x")
    task.touch(start, 3 * HUGE)
    task.madvise(start, 2 * HUGE + PAGE, Madvise.DONTNEED)  # the last part is left alone
    assert numbers(machine) == (8, 7, 2, 0)
    assert task.read(start, 1) == b"\0"
    old = make(kernel="6.1").spawn()
    start = old.mmap(HUGE, flags=PRIVATE)
    old.touch(start, HUGE)
    old.madvise(start, HUGE, Madvise.DONTNEED)
    assert numbers(old.process.kernel) == (8, 8, 0, 0)


@pytest.mark.rule("HT-008")
def test_a_promise_that_holds_again_counts_once_the_page_is_free(machine):
    """Below zero meanwhile, as meminfo shows it (DV-028)."""
    task = machine.spawn()
    start = task.mmap(HUGE, flags=PRIVATE)
    task.touch(start, PAGE)
    child = task.fork()
    task.madvise(start, HUGE, Madvise.DONTNEED)
    assert numbers(machine) == (8, 7, 0, 0)
    task.touch(start, PAGE)
    assert numbers(machine) == (8, 6, -1, 0)
    assert f"HugePages_Rsvd:    {(1 << 64) - 1}" in machine.pread("meminfo", 0, 8192).decode()
    machine.check()
    machine.restore(machine.checkpoint())
    machine.check()
    child.exit()
    assert numbers(machine) == (8, 7, 0, 0)


@pytest.mark.rule("HT-009")
def test_moving_keeps_pages_and_promises(machine):
    task = machine.spawn()
    start = task.mmap(4 * HUGE, flags=PRIVATE)
    task.write(start + HUGE, b"moves")
    moved = task.mremap(start, 4 * HUGE, 3 * HUGE, flags=3, new_addr=1 << 41)
    assert task.read(moved + HUGE, 5) == b"moves"
    assert numbers(machine) == (8, 7, 2, 0)
    machine.check()
    with pytest.raises(NotModelled, match="promises"):
        task.mremap(moved, HUGE, HUGE, flags=3, new_addr=1 << 42)
    machine.check()
    task.mlock(moved, PAGE, onfault=True)
    assert not task.process.smaps()[0].has_flag("lo")
    assert numbers(machine) == (8, 6, 1, 0)


@pytest.mark.rule("HT-010", "SC-042")
def test_protection_of_whole_pages(machine):
    task = machine.spawn()
    task.touch(task.mmap(PAGE, addr=1 << 40, flags=0x100022), PAGE)
    start = task.mmap(3 * HUGE, addr=(1 << 40) + HUGE, flags=PRIVATE | 0x100000)
    task.touch(start, HUGE)
    fd = task.userfaultfd(UffdFeature.WP_ASYNC)
    task.uffd_register(fd, start, 3 * HUGE, 2)
    assert errno_of(task.uffd_writeprotect, fd, start, PAGE, protect=True) == 22
    task.uffd_writeprotect(fd, start, 2 * HUGE, protect=True)
    words = task.process.pagemap(start, start + 3 * HUGE).values[::512]
    assert [hex(word >> 56) for word in words.tolist()] == ["0x83", "0x2", "0x0"]  # 57 without 62
    task.write(start + HUGE, b"x")
    request = ScanRequest(
        start=start,
        end=start + HUGE + 7 * PAGE,
        vec_len=9,
        flags=1,
        category_mask=int(PageCategory.WRITTEN),
        return_mask=0x7F,
    )
    result = task.process.pagemap_scan(request)
    assert len(result.regions) == 0  # a part cannot be protected, and is not reported
    assert result.walk_end == start + HUGE
    task.madvise(start, HUGE, Madvise.DONTNEED)
    assert task.process.pagemap(start, start + PAGE).values[0] & ~np.uint64(1 << 55) == 1 << 57


@pytest.mark.rule("HT-013")
def test_gigantic_pages():
    machine = pmcore.open("sim", memory="4 GiB", kernel="6.12", hugepages={"1 GiB": 2})
    machine.check()
    flags = PRIVATE | MapFlag.HUGE_1GB
    task = machine.spawn()
    start = task.mmap(2 * GIB, flags=flags, addr=1 << 40)
    small = task.mmap(PAGE, addr=(1 << 40) + 4 * GIB)
    task.touch(small, PAGE)
    task.write(start + GIB - 3, b"across")
    assert task.read(start + GIB - 3, 6) == b"across"
    entries = task.process.pagemap(start + GIB - 4 * PAGE, start + GIB + 4 * PAGE)
    assert entries.present.all()
    assert entries[4].pfn % (1 << 18) == 0
    assert entries[3].pfn % (1 << 18) == (1 << 18) - 1
    regions = task.process.pagemap_scan(
        ScanRequest(start=start, end=start + 2 * GIB, vec_len=8, return_mask=0x7F)
    ).regions
    assert regions["end"][0] - regions["start"][0] == 2 * GIB
    assert task.process.smaps()[0].counters["Private_Hugetlb"] == 2 * GIB
    assert task.mincore(start + 7 * PAGE, PAGE).all()
    machine.check()
    child = task.fork()
    with pytest.raises(AddressSpaceFault):
        child.write(start, b"x")
    state = machine.checkpoint()
    task.madvise(start, GIB, Madvise.DONTNEED)
    child.exit()
    machine.check()
    machine.restore(state)
    machine.check()
    task.exit()
    for other in machine.tasks():
        other.exit()
    assert machine.hugetlb.resize("1 GiB", 0) == 0
    machine.check()
    assert machine.hugetlb.resize("1 GiB", 1) == 1
    with pytest.raises(ArgumentError, match="surplus"):
        machine.hugetlb.overcommit("1 GiB", 1)
    machine.check()


def test_check_finds_what_is_broken(machine):
    """Planted mistakes, each found by name."""
    task = machine.spawn()
    start = task.mmap(4 * HUGE, flags=PRIVATE)
    task.touch(start, HUGE)
    shared = task.mmap(2 * HUGE, flags=SHARED)
    task.touch(shared, HUGE)
    pool, frames = machine.hugetlb.default, machine.core.memory.frames
    head = task.process.pagemap(start, start + PAGE)[0].pfn
    file = next(vma.huge.file for vma in task.mm.vmas if vma.start == shared)
    machine.check()
    for owner, name, value, words in (
        (pool, "reserved", pool.reserved + 1, "promised"),
        (pool, "total", pool.total + 1, "counted"),
        (pool, "surplus", -1, "counted"),
        (pool, "free", [*pool.free, head], "free, or somebody"),
        (file, "reserved", set(), "promised to it"),
        (machine.hugetlb, "restored", {pool.free[0]}, "promise"),
        (file, "users", {}, "VMAs that map it"),
    ):
        before = getattr(owner, name)
        setattr(owner, name, value)
        with pytest.raises(BrokenInvariant, match=words):
            machine.check()
        setattr(owner, name, before)
    for column, index, value, words in (
        ("mapcount", head + 7, 2, "mapcount"),
        ("behind", head + 7, 1, "tails"),
        ("flags", head, frames.flags[head] & ~np.uint64(PageFlag.ANON), "anonymous or its file's"),
    ):
        array = getattr(frames, column)
        before = array[index]
        array[index] = value
        with pytest.raises(BrokenInvariant, match=words):
            machine.check()
        array[index] = before
    machine.check()


def test_saved_and_loaded(machine, tmp_path):
    task = machine.spawn()
    start = task.mmap(3 * HUGE, flags=PRIVATE)
    task.write(start, b"kept")
    shared = task.mmap(2 * HUGE, flags=SHARED)
    task.touch(shared, HUGE)
    task.fork()
    machine.save(tmp_path / "m")
    again = load_machine(tmp_path / "m")
    again.check()
    assert again.digest() == machine.digest()
    same = next(iter(again.tasks()))
    assert same.read(start, 4) == b"kept"
    assert same.process.smaps() == task.process.smaps()
    for each in list(again.tasks()):
        each.exit()
    assert numbers(again) == (8, 8, 0, 0)


def test_what_is_not_modelled_says_so(machine):
    """Two shared mappings of 1 GiB would share their page tables."""
    with pytest.raises(NotModelled, match="shared page tables"):
        machine.spawn().mmap(GIB, addr=1 << 40, flags=SHARED | NORESERVE)


def test_a_kernel_without_hugetlb_has_none():
    machine = pmcore.open("sim", kernel="6.12", config=["!CONFIG_HUGETLB_PAGE"])
    assert errno_of(machine.spawn().mmap, HUGE, flags=PRIVATE) == 22
