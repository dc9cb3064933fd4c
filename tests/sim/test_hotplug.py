"""Memory blocks that go offline and online, and the balloon."""

from __future__ import annotations

import contextlib
import errno

import numpy as np
import pytest

import pmcore
from pmcore.backends.sim.check import BrokenInvariant
from pmcore.backends.sim.machine import load_machine
from pmcore.errors import ArgumentError, NotModelled, SyscallError
from pmcore.lockstep import take
from pmcore.lockstep.generator import Seeded, random_program
from pmcore.profile import preset
from pmcore.program import Run
from pmcore.uapi import Madvise, MapFlag, PageFlag

PAGE, PMD, MIB = 4096, 2 << 20, 1 << 20
#: Frames in a block of 8 MiB.
BLOCK = 2048


def make(**settings):
    return pmcore.open(
        "sim", **{"memory": "64 MiB", "swap": "16 MiB", "block_size": "8 MiB", "kernel": "6.18", **settings}
    )


def flags(machine, number, name="kpageflags"):
    return np.frombuffer(machine.pread(name, number * BLOCK * 8, BLOCK * 8), dtype=np.uint64)


def pfns(task, start, pages):
    words = np.zeros(pages, dtype=np.uint64)
    task.process.read_pagemap(start // PAGE, words)
    return (words & np.uint64((1 << 55) - 1)).astype(np.int64)


def refused(machine, call, *arguments):
    """The errno of the refusal, which left everything as it was."""
    before = machine.digest()
    with pytest.raises((SyscallError, NotModelled)) as caught:
        call(*arguments)
    assert machine.digest() == before
    machine.check()
    return caught.value.errno


@pytest.mark.rule("HP-001", "HP-002", "HP-003")
@pytest.mark.parametrize(("kernel", "hole"), [("6.18", 0), ("6.12", 1 << 20), ("5.4", 1 << 20)])
def test_a_free_block_goes_and_comes(kernel, hole):
    machine = make(kernel=kernel)
    free = machine.core.memory.free_total
    assert [block.state for block in machine.memory_blocks()] == ["online"] * 8
    machine.offline_block(3)
    machine.check()
    assert [block.number for block in machine.memory_blocks() if block.state == "offline"] == [3]
    assert machine.core.memory.free_total == free - BLOCK
    assert (flags(machine, 3) == hole).all()
    assert not flags(machine, 3, "kpagecount").any()
    assert refused(machine, machine.offline_block, 3) == errno.EINVAL
    machine.online_block(3)
    machine.check()
    assert machine.core.memory.free_total == free
    assert (flags(machine, 3) == int(PageFlag.BUDDY)).all()
    assert refused(machine, machine.online_block, 3) == errno.EINVAL
    assert len(machine.core.memory.zones) == 1


@pytest.mark.rule("HP-003")
def test_nothing_is_taken_from_what_is_offline():
    machine = make()
    for number in (1, 2, 6):
        machine.offline_block(number)
    task = machine.spawn()
    start = task.mmap(32 * MIB)
    task.touch(start, 32 * MIB)
    machine.check()
    assert not np.isin(pfns(task, start, 8192) // BLOCK, (1, 2, 6)).any()
    for number in (6, 1, 2):
        machine.online_block(number)
        machine.check()
    task.touch(task.mmap(20 * MIB), 20 * MIB)
    machine.check()
    task.exit()
    machine.check()
    assert machine.core.memory.free_total > 61 * 256


@pytest.mark.rule("HP-001")
def test_blocks_with_holes_or_of_two_zones():
    """No such block, a hole, the border of two nodes: refused, and nothing has changed."""
    machine = make(holes=[("20 MiB", "24 MiB")], nodes=2, memory="72 MiB")
    assert [(b.zone, b.node) for b in machine.memory_blocks()][:5] == [
        ("Normal", 0),
        ("Normal", 0),
        ("", -1),
        ("Normal", 0),
        ("", -1),
    ]
    for number in (2, 4):
        assert refused(machine, machine.offline_block, number) == errno.EINVAL
    for number in (9, -1, 1 << 40):
        assert refused(machine, machine.offline_block, number) == errno.ENOENT
        assert refused(machine, machine.online_block, number) == errno.ENOENT
    machine.offline_block(5)
    assert machine.memory_blocks()[5].node == 1
    machine.online_block(5)
    machine.check()
    with pytest.raises(ArgumentError, match="number of a block"):
        machine.offline_block("3")
    with pytest.raises(ArgumentError, match="block_size"):
        make(block_size="3 MiB")
    assert machine.block_size == 8 << 20


@pytest.mark.rule("HP-006")
def test_what_the_kernel_uses_stays():
    """Reserved frames, slabs, page tables, the huge zero page: EBUSY."""
    machine = make(policy={"pmd": "always"})
    assert refused(machine, machine.offline_block, 0) == errno.EBUSY
    task = machine.spawn()
    low = task.mmap(8 * MIB)
    task.madvise(low, 8 * MIB, Madvise.NOHUGEPAGE)
    task.touch(low, 8 * MIB)
    start = task.mmap(2 * PMD, addr=1 << 40, flags=0x100022)
    task.touch(start, PMD, write=False)
    block = machine.core.huge_zero_pfn // BLOCK
    assert block == 1
    assert refused(machine, machine.offline_block, block) == errno.EBUSY
    machine = make()
    task = machine.spawn()
    for number in range(4):
        start = task.mmap(7 * MIB, addr=(number + 1) << 40, flags=0x100022)
        task.touch(start, 7 * MIB)
    tables = {int(pfn) // BLOCK for pfn in machine.core.pool.pfns if pfn}
    assert tables == {0, 1, 2}
    for number in tables:
        assert refused(machine, machine.offline_block, number) == errno.EBUSY
    machine.offline_block(3)


def fill(task):
    """Pages of many sorts, all of them behind the first block; by area: start, pages. Page tables come before them."""
    base, areas = 1 << 40, {}
    for number in range(10):
        task.touch(task.mmap(PAGE, addr=base + number * 2 * PMD + PMD, flags=0x100022), PAGE)
    ballast = task.mmap(8 * MIB)
    task.touch(ballast, 8 * MIB)

    def area(name, pages, **named):
        start = task.mmap(pages * PAGE, addr=base + len(areas) * 2 * PMD, **named)
        if pages < 512:  # a page behind the pages for tables shares theirs
            task.munmap(start, pages * PAGE)
            start = task.mmap(pages * PAGE, addr=start + PMD + 8 * PAGE, **named)
        areas[name] = start, pages
        return start

    fixed = int(MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED)
    shared = int(MapFlag.SHARED | MapFlag.FIXED)
    for name in ("plain", "forked", "locked", "protected", "swapped"):
        start = area(name, 8, flags=fixed)
        for page in range(8):
            task.write(start + page * PAGE, f"{name}{page}".encode())
    task.mlock(areas["locked"][0], 4 * PAGE)
    fd = task.userfaultfd(0)
    task.uffd_register(fd, areas["protected"][0], 8 * PAGE, 2)
    task.uffd_writeprotect(fd, areas["protected"][0], 4 * PAGE, protect=True)
    task.madvise(areas["swapped"][0], 8 * PAGE, Madvise.PAGEOUT)
    task.read(areas["swapped"][0], 3 * PAGE)
    memfd = task.memfd_create("m")
    task.ftruncate(memfd, 16 * PAGE)
    start = area("file", 8, flags=shared, fd=memfd)
    task.write(start, b"mapped")
    task.pwrite(memfd, b"not mapped", 12 * PAGE)
    for name in ("whole", "by ptes"):
        start = area(name, 512, flags=fixed)
        task.madvise(start, PMD, Madvise.HUGEPAGE)
        task.write(start + 3 * PAGE, b"huge")
    for page in range(
        0, 160, 2
    ):  # room for tables in the first block: the smallest free blocks are taken first
        task.munmap(ballast + page * PAGE, PAGE)
    task.mprotect(areas["by ptes"][0], PAGE, 1)
    return areas, memfd


@pytest.mark.rule("HP-004")
@pytest.mark.parametrize("kernel", ["6.18", "6.12", "6.1", "5.10"])
def test_pages_are_migrated(kernel):
    """Each sort of page: other frames, the same in everything else, but for DIRTY."""
    machine = make(kernel=kernel)
    task = machine.spawn()
    areas, memfd = fill(task)
    child = task.fork()
    child.write(areas["forked"][0], b"child's")

    def look():
        found = {}
        for which in (task, child):
            for name, (start, pages) in areas.items():
                words = np.zeros(pages, dtype=np.uint64)
                which.process.read_pagemap(start // PAGE, words)
                frames = (words[words >> np.uint64(63) == 1] & np.uint64((1 << 55) - 1)).astype(np.int64)
                shown = np.array([machine.core.memory.frames.flags[f] & ~np.uint64(16) for f in frames])
                counts = machine.core.memory.frames.mapcount[frames]
                bits = words & ~np.uint64((1 << 55) - 1) | (words >> np.uint64(63) == 0) * words
                found[which.pid, name] = frames, [bits.tolist(), shown.tolist(), counts.tolist()]
        return found

    before, maps = look(), str(task.process.maps())
    blocks = {int(f) // BLOCK for frames, _ in before.values() for f in frames} - {0}
    assert blocks == {1}
    machine.offline_block(1)
    machine.check()
    after = look()
    for key, (frames, rest) in before.items():
        assert after[key][1] == rest, key
        inside = frames // BLOCK == 1
        assert (frames[inside] != after[key][0][inside]).all()
        assert inside.all() or key == (child.pid, "forked")
    assert str(task.process.maps()) == maps
    dirty = int(PageFlag.DIRTY)
    assert machine.core.memory.frames.flags[after[task.pid, "plain"][0]].tolist()[0] & dirty
    assert child.read(areas["forked"][0], 7) == b"child's"
    assert task.read(areas["forked"][0], 7) == b"forked0"
    assert [task.read(areas["swapped"][0] + n * PAGE, 8) for n in range(8)] == [
        f"swapped{n}".encode() for n in range(8)
    ]
    assert task.read(areas["file"][0], 6) == b"mapped"
    assert task.pread(memfd, 10, 12 * PAGE) == b"not mapped"
    assert task.read(areas["whole"][0] + 3 * PAGE, 4) == b"huge"
    assert machine.counters["migrate"] > 1024
    machine.check()
    task.exit()
    child.exit()
    machine.check()


@pytest.mark.rule("HP-005")
@pytest.mark.parametrize("kernel", ["6.18", "6.8"])
def test_a_folio_that_nobody_maps_whole(kernel):
    """Taken apart before it moves since 6.10; moved whole before."""
    machine = make(kernel=kernel)
    task = machine.spawn()
    task.touch(task.mmap(PAGE, addr=(1 << 40) + PMD, flags=0x100022), PAGE)
    ballast = task.mmap(8 * MIB)
    task.touch(ballast, 8 * MIB)
    start = task.mmap(PMD, addr=1 << 40, flags=0x100022)
    task.madvise(start, PMD, Madvise.HUGEPAGE)
    task.write(start, b"one")
    task.write(start + 7 * PAGE, b"seven")
    task.munmap(ballast, PAGE)
    task.munmap(start + PAGE, PAGE)
    [block] = set(pfns(task, start, 1).tolist())
    free = machine.core.memory.free_total
    machine.offline_block(block // BLOCK)
    machine.check()
    assert task.read(start, 3) == b"one"
    assert task.read(start + 7 * PAGE, 5) == b"seven"
    there = pfns(task, start, 512)
    if kernel == "6.18":
        assert int((there == machine.core.zero_pfn).sum()) == 509
        assert not machine.core.memory.large
        assert machine.core.memory.free_total == free - BLOCK + 510  # two pages are left of the folio
    else:
        assert len(machine.core.memory.large) == 1
        assert there[7] - there[0] == 7


@pytest.mark.rule("HP-007")
def test_pages_of_a_pool():
    """One in use moves to a free one; those that are left in the block leave the pool; promises are kept."""
    machine = make(memory="96 MiB", hugepages={"2 MiB": 12})
    pool = machine.hugetlb.default
    task = machine.spawn()
    start = task.mmap(2 * PMD, addr=1 << 40, flags=0x140022)
    held = task.mmap(PMD, addr=1 << 41, flags=0x140022)
    task.touch(held, PMD, step=PMD)
    task.write(start, b"huge")
    [head] = pfns(task, start, 1).tolist()
    task.munmap(held, PMD)
    block = head // BLOCK
    inside = sum(1 for page in machine.core.hugetlb.folios if page // BLOCK == block)
    assert inside == 4
    machine.offline_block(block)
    machine.check()
    assert (pool.total, pool.reserved, len(pool.free)) == (8, 1, 7)
    assert pfns(task, start, 1)[0] // BLOCK != block
    assert task.read(start, 4) == b"huge"
    task.write(start + PMD, b"promised")
    other = task.mmap(6 * PMD, addr=1 << 41, flags=0x140022)
    left = {page // BLOCK for page in pool.free} - {0}
    assert refused(machine, machine.offline_block, min(left)) == errno.EBUSY
    task.munmap(other, 6 * PMD)
    for number in sorted({page // BLOCK for page in machine.core.hugetlb.folios} - {0}):
        machine.offline_block(number)
        machine.check()
    assert pool.total == 3  # a free one in the first block; those in use got fresh pages in the end
    assert task.read(start, 4) + task.read(start + PMD, 8) == b"hugepromised"
    task.exit()
    machine.check()
    assert len(pool.free) == pool.total == 3


@pytest.mark.rule("HP-007")
def test_surplus_pages_are_not_kept():
    """The page that one in use leaves behind is let go at once where the pool has a surplus."""
    machine = make(memory="96 MiB", hugepages={"2 MiB": (4, 2)})
    pool = machine.hugetlb.default
    task = machine.spawn()
    start = task.mmap(6 * PMD, addr=1 << 40, flags=0x140022)
    task.touch(start, 5 * PMD, step=PMD)
    assert (pool.total, pool.surplus, pool.reserved) == (6, 2, 1)
    for number in sorted({page // BLOCK for page in machine.core.hugetlb.folios}):
        refused_by = None
        try:
            machine.offline_block(number)
        except SyscallError as error:
            refused_by = error.errno
        assert refused_by in (None, errno.EBUSY)
        machine.check()
    task.exit()
    machine.check()


@pytest.mark.rule("HP-006")
def test_no_room_elsewhere():
    """Pages that fit nowhere, folios that would have to be taken apart: not modelled, and nothing has changed."""
    machine = make(memory="32 MiB", swap=0)
    task = machine.spawn()
    start = task.mmap(26 * MIB)
    task.touch(start, 26 * MIB)
    with pytest.raises(NotModelled, match="fit nowhere"):
        machine.offline_block(1)
    assert refused(machine, machine.offline_block, 1) == errno.ENOSYS
    task.munmap(start + 14 * MIB, 12 * MIB)
    machine.offline_block(1)
    machine.check()


@pytest.mark.rule("HP-002")
def test_old_kernels_show_what_was_there():
    machine = make(kernel="4.19")
    assert refused(machine, machine.offline_block, 3) == errno.ENOSYS


@pytest.mark.rule("HP-008", "KF-024")
@pytest.mark.parametrize(("kernel", "bit"), [("6.18", 23), ("5.1", 23), ("4.19", 23), ("3.13", None)])
def test_the_balloon(kernel, bit):
    """Its pages show OFFLINE, BALLOON by its older name, or nothing on kernels that know neither."""
    machine = make(kernel=kernel)
    free = machine.core.memory.free_total
    assert machine.balloon_inflate("8 MiB") == BLOCK
    machine.check()
    held = np.flatnonzero(machine.core.memory.frames.flags == np.uint64(PageFlag.OFFLINE))
    assert len(held) == BLOCK
    shown = np.frombuffer(machine.pread("kpageflags", 0, 16384 * 8), dtype=np.uint64)[held]
    assert set(shown.tolist()) == {0 if bit is None else 1 << bit}
    assert not np.frombuffer(machine.pread("kpagecount", 0, 16384 * 8), dtype=np.uint64)[held].any()
    assert machine.core.memory.free_total == free - BLOCK
    got = machine.balloon_inflate("1 GiB")
    assert machine.core.memory.free_total == machine.core.memory.reserve
    machine.check()
    assert machine.balloon_deflate(10) == 10
    assert machine.balloon_deflate(1 << 30) == got + BLOCK - 10
    assert machine.balloon_deflate(1) == machine.balloon_inflate(0) == machine.balloon_deflate(0) == 0
    machine.check()
    assert machine.core.memory.free_total == free
    for wrong in (-1, True, 1.5, None):
        with pytest.raises(ArgumentError):
            machine.balloon_inflate(wrong)
        with pytest.raises(ArgumentError):
            machine.balloon_deflate(wrong)


@pytest.mark.rule("HP-008", "HP-004")
def test_pages_of_the_balloon_move():
    machine = make()
    machine.balloon_inflate("12 MiB")
    assert (flags(machine, 1) == 1 << 23).sum() > 1000
    machine.offline_block(1)
    machine.check()
    assert not flags(machine, 1).any()
    assert sum((flags(machine, n) == 1 << 23).sum() for n in range(8)) == 3072
    assert machine.balloon_deflate("12 MiB") == 3072
    machine.check()


@pytest.mark.rule("EV-005")
def test_state_is_kept(tmp_path):
    """Checkpoints, saved machines and digests know what is offline and what the balloon has."""
    machine = make()
    plain = machine.digest()
    state = machine.checkpoint()
    machine.offline_block(4)
    machine.balloon_inflate(5)
    path = tmp_path / "machine.zip"
    machine.save(path)
    digest = machine.digest()
    assert digest != plain
    machine.restore(state)
    machine.check()
    assert machine.digest() == plain
    assert all(block.state == "online" for block in machine.memory_blocks())
    again = load_machine(path)
    assert again.digest() == digest
    assert again.block_size == machine.block_size
    assert again.memory_blocks()[4].state == "offline"
    again.online_block(4)
    assert again.balloon_deflate(9) == 5
    again.check()


def test_check_finds_planted_faults():
    machine = make()
    task = machine.spawn()
    start = task.mmap(PAGE)
    task.touch(start, PAGE)
    machine.balloon_inflate(1)
    machine.offline_block(1)
    machine.check()
    memory = machine.core.memory
    frames = memory.frames
    frames.reach(0, 4 * BLOCK)
    [held] = np.flatnonzero(frames.flags == np.uint64(PageFlag.OFFLINE))
    for column, index, value, words in (
        ("flags", BLOCK + 3, 1, "offline hold nothing"),
        ("free_order", BLOCK, 11, "offline hold nothing"),
        ("content", BLOCK + 9, 1, "offline hold nothing"),
        ("flags", held, int(PageFlag.OFFLINE | PageFlag.ANON), "balloon is nothing else"),
    ):
        array = getattr(frames, column)
        before = array[index]
        array[index] = value
        with pytest.raises(BrokenInvariant, match=words):
            machine.check()
        array[index] = before
    memory.offline[3] = ("Normal", 0)
    with pytest.raises(BrokenInvariant, match="belongs to no zone"):
        machine.check()
    del memory.offline[3]
    memory.zones[1].start -= 1024
    with pytest.raises(BrokenInvariant, match="belongs to no zone"):
        machine.check()
    memory.zones[1].start += 1024
    machine.check()


def keep_tables_apart(machine):
    """Page tables from the last zone, as a kernel keeps what cannot be moved apart from the rest."""
    memory = machine.core.memory

    def table_pages(count):
        found = memory.zones[-1].take_pages(count)
        memory.frames.flags[found] = int(PageFlag.PGTABLE)
        return found.tolist()

    memory.table_pages = table_pages
    memory.table_page = lambda: table_pages(1)[0]


@pytest.mark.rule("HP-004", "HP-005", "HP-006")
@pytest.mark.parametrize(("kernel", "focus"), [("6.18", ""), ("6.18", "disk"), ("6.18", "ksm"), ("6.12", "")])
def test_nobody_notices_but_by_frames(kernel, focus):
    """After any program: blocks go and come, tasks see the same in their memory, and refusals change nothing."""
    moved = 0
    for number in range(60 if focus == "disk" else 15):  # of files on a disk little moves
        program = random_program(Seeded(f"blocks:{number}"), preset(kernel), max_steps=25, focus=focus)
        machine = make(swap="8 MiB", kernel=kernel, nodes=2, memory="96 MiB", hugepages={"2 MiB": 8})
        keep_tables_apart(machine)
        machine.balloon_inflate(BLOCK)
        run = Run(program, machine)
        with contextlib.suppress(NotModelled):
            for step in program.steps:
                run.advance(step)
        before, frames = seen(run), frames_of(run)
        for block in (1, 2, 3, 0):
            digest = machine.digest()
            try:
                machine.offline_block(block)
            except (SyscallError, NotModelled):
                assert machine.digest() == digest
            machine.check()
        assert seen(run) == before
        now = frames_of(run)
        moved += sum(int((now[place] != frames[place]).sum()) for place in now)
        for block in (2, 1, 3):
            with contextlib.suppress(SyscallError):
                machine.online_block(block)
            machine.check()
        with contextlib.suppress(NotModelled, ArgumentError):  # a task may have exited the first time
            for step in program.steps[len(program.steps) // 2 :]:
                run.advance(step)
                machine.check()
        machine.close()
        machine.check()
    assert moved > 100


def frames_of(run):
    """Frames by task and mapping, 0 where there is none."""
    return {
        (name, vma.start): pfns(task, vma.start, vma.length // PAGE)
        for name, task in run.tasks.items()
        for vma in task.mm.vmas
    }


def seen(run):
    """Contents by area and task, and what pagemap says besides frames (zeros may become the zero page)."""
    look = take(run)
    assert look
    found = {}
    for name, task in run.tasks.items():
        for vma in task.mm.vmas:
            words = np.zeros(vma.length // PAGE, dtype=np.uint64)
            task.process.read_pagemap(vma.start // PAGE, words)
            core = run.workbench.core
            present = words >> np.uint64(63) == 1
            frames = (words[present] & np.uint64((1 << 55) - 1)).astype(np.int64)
            rows = core.memory.frames.content[frames]
            zero = core.memory.contents.zero(rows)
            data = [
                b"" if blank else core.memory.contents.read(int(row), 0, PAGE)
                for row, blank in zip(rows, zero, strict=True)
            ]
            found[name, vma.start] = present.tolist(), data
    return found
