"""A few pages are taken one by one, many as arrays: the state after either is the same."""

from __future__ import annotations

import random
from collections import Counter
from unittest import mock

import numpy as np
import pytest

import pmcore
from pmcore import ScanRequest
from pmcore.backends.sim.calls import uffd_fill
from pmcore.backends.sim.services import blocks, diskfile, mincore, pagecache, shmem, writeback
from pmcore.backends.sim.virtual import copying, tables, touch
from pmcore.errors import AddressSpaceFault, NotModelled, SyscallError
from pmcore.scan import engine
from pmcore.uapi import Madvise, UffdFeature

PAGE = 4096
START = 1 << 40
#: Pages of private memory, and of shared behind them.
PAGES = 12
ADVICE = tuple(Madvise)
#: Pages of each memory where many are taken at once.
MANY = 24


def one_by_one(few: bool):
    """Whether few pages are taken one by one, or as arrays like all others."""
    return [
        mock.patch.object(room, name, number if few else 0)
        for room, name, number in ((tables, "FEW", 4), (engine, "_FEW", 8))
    ]


class Side:
    """One machine, which does what it is told with few pages in its way."""

    def __init__(self, few: bool, kernel: str, **settings) -> None:
        self.few = few
        self.machine = pmcore.open("sim", memory="4 MiB", kernel=kernel, **settings)
        self.tasks = [self.machine.spawn()]
        task = self.tasks[0]
        task.mmap(PAGES * PAGE, addr=START, flags=0x32)
        task.mmap(PAGES * PAGE, addr=START + PAGES * PAGE, flags=0x31)
        features = UffdFeature.WP_ASYNC if self.machine.core.caps.uffd_features & UffdFeature.WP_ASYNC else 0
        self.fd = task.userfaultfd(features)

    def do(self, step):
        patches = one_by_one(self.few)
        for patch in patches:
            patch.start()
        try:
            return step(self)
        except (SyscallError, AddressSpaceFault, NotModelled) as error:
            return repr(error)
        finally:
            for patch in patches:
                patch.stop()


def step_of(rng: random.Random):
    """Something to do with few pages, the same on any side."""
    who, page, count = rng.randrange(3), rng.randrange(2 * PAGES), rng.choice((1, 1, 1, 2, 3, 4, 5))
    start, length = START + page * PAGE, count * PAGE
    what = rng.randrange(19)
    write, number = rng.random() < 0.7, rng.randrange(1 << 16)

    def task(side):
        return side.tasks[who % len(side.tasks)]

    def fork(side):
        if len(side.tasks) < 3:
            side.tasks.append(task(side).fork())
        else:
            side.tasks.pop().exit()

    def scan(side):
        request = ScanRequest(
            start=start,
            end=start + length,
            vec_len=number & 3,
            max_pages=number >> 2 & 3,
            flags=number >> 4 & 1,
            category_mask=(0, 2, 8)[number % 3],
            return_mask=number >> 6 & 0x4A,
        )
        result = task(side).process.pagemap_scan(request)
        return result.regions.tolist(), result.walk_end

    def move(side):
        target = START + (number % (4 * PAGES)) * PAGE + (number >> 15) * (1 << 30)
        return task(side).mremap(start, length, length, flags=3, new_addr=target)

    def lock(side):
        return (
            task(side).mlock(start, length, onfault=not write)
            if number & 1
            else task(side).munlock(start, length)
        )

    return {
        0: lambda side: task(side).touch(start, length, write=write),
        1: lambda side: task(side).write(start + 5, bytes([number & 0xFF]) * 9),
        2: lambda side: task(side).read(start, length),
        3: lambda side: task(side).madvise(start, length, ADVICE[number % len(ADVICE)]),
        4: lambda side: task(side).madvise(start, length, Madvise.PAGEOUT),
        5: lambda side: task(side).madvise(start, length, Madvise.FREE),
        6: lambda side: task(side).madvise(start, length, Madvise.COLD),
        7: lambda side: task(side).mprotect(start, length, number % 4),
        8: lambda side: task(side).mprotect(start, length, 3),
        9: lock,
        10: lambda side: task(side).mincore(start, length).tolist(),
        11: move,
        12: fork,
        13: scan,
        14: lambda side: task(side).uffd_writeprotect(side.fd, start, length, protect=write),
        15: lambda side: task(side).uffd_register(side.fd, start, length, 2),
        16: lambda side: task(side).process.clear_refs(1 + number % 5),
        18: lambda side: (task(side).madvise(start, length, Madvise.MERGEABLE), side.machine.ksm_scan(2))[1],
        17: lambda side: task(side).mmap(length, addr=start, prot=3, flags=(0x32, 0x8032, 0x31)[number % 3]),
    }[what]


@pytest.mark.parametrize("kernel", ["6.18", "6.12", "5.10"])
@pytest.mark.parametrize("sort", ["compressed", "disk", "none", "large folios"])
def test_few_pages_come_to_the_same(kernel, sort):
    """Random steps on few pages, on two machines: answers and states are equal after each."""
    settings = {
        "swap": "0" if sort == "none" else "64 KiB",
        "swap_kind": "disk" if sort == "disk" else "compressed",
    }
    if sort == "large folios" and kernel == "6.18":
        settings["policy"] = {"pmd": "madvise", "thp_sizes": {"16kB": "always"}}
    for seed in range(20):
        rng = random.Random(f"{seed} {kernel} {sort}")
        sides = [Side(few, kernel, **settings) for few in (True, False)]
        for number in range(40):
            step = step_of(rng)
            answers = [side.do(step) for side in sides]
            assert answers[0] == answers[1], (seed, number)
            assert sides[0].machine.digest() == sides[1].machine.digest(), (seed, number)
        sides[0].machine.check()


# -- files ---------------------------------------------------------------------------------------------------


class FileSide(Side):
    """One machine with a memfd and a file of a disk, mapped; single pages, or many, in one of two ways each."""

    def __init__(self, few: bool, kernel: str) -> None:
        self.few = few
        self.machine = pmcore.open("sim", memory="8 MiB", swap="64 KiB", kernel=kernel)
        self.tasks = [self.machine.spawn()]
        task = self.tasks[0]
        self.fds = task.memfd_create("m"), task.open_file("d", pages=PAGES)
        task.ftruncate(self.fds[0], PAGES * PAGE)
        for number, fd in enumerate(self.fds):
            for private in (0, 1):
                place = START + (2 * number + private) * PAGES * PAGE
                task.mmap(PAGES * PAGE, addr=place, flags=0x12 if private else 0x11, prot=3, fd=fd)

    def do(self, step):
        settings = (
            (tables, "FEW", 4, 0),
            (pagecache, "FEW", 4, 0),
            (mincore, "FEW", 4, 0),
            (writeback, "_FEW", 1, 0),
            # Of many pages the way is the other one: as arrays, or one by one.
            (shmem, "MANY", 2, 1 << 20),
            (diskfile, "MANY", 2, 1 << 20),
            (copying, "_MANY", 7, 1 << 20),
            (touch, "_FEW", 1 << 20, 6),
        )
        patches = [mock.patch.object(room, name, few if self.few else no) for room, name, few, no in settings]
        for patch in patches:
            patch.start()
        try:
            return step(self)
        except (SyscallError, AddressSpaceFault, NotModelled) as error:
            return repr(error)
        finally:
            for patch in patches:
                patch.stop()


def state(machine):
    """All of a machine, but for how the rows are numbered that contents lie in: that is the order of their making."""
    core = machine.core
    frames, contents = core.memory.frames, core.memory.contents
    found = [getattr(frames, name).tobytes() for name, _ in frames.COLUMNS if name != "content"]
    found.append(core.pool.rows.tobytes())
    found += [contents.read(row, 0, PAGE) if row else b"" for row in frames.content.tolist()]
    for inode in core.inodes.values():
        for index in (inode.index, inode.blocks, inode.shadows):
            pages, words = index.used()
            if index is inode.blocks:
                found += [contents.read(row, 0, PAGE) if row else b"" for row in blocks.rows(words).tolist()]
                words = words & np.uint64(blocks.KIND)
            found += [pages.tobytes(), words.tobytes()]
    found += [contents.in_use, core.memory.lru_clock, core.memory.lru_tail, core.memory.age, machine.counters]
    return found


def file_step(rng: random.Random):
    """Something to do with a file, or with what maps it."""
    which, page, count = rng.randrange(2), rng.randrange(PAGES), rng.choice((1, 1, 2, 3, 8, PAGES))
    lead = rng.choice((0, 0, 5))
    start, length = START + (2 * which + rng.randrange(2)) * PAGES * PAGE + page * PAGE, count * PAGE
    count = min(count, PAGES - page)
    what, number, write = rng.randrange(16), rng.randrange(1 << 16), rng.random() < 0.6
    data = b"".join(
        bytes(PAGE) if rng.random() < 0.3 else bytes([rng.randrange(256)]) * PAGE for _ in range(count)
    )
    advice = (
        Madvise.DONTNEED,
        Madvise.POPULATE_READ,
        Madvise.POPULATE_WRITE,
        Madvise.PAGEOUT,
        Madvise.WILLNEED,
    )

    def task(side):
        return side.tasks[number % len(side.tasks)]

    def fork(side):
        if len(side.tasks) < 3:
            side.tasks.append(task(side).fork())
        else:
            side.tasks.pop().exit()

    return {
        0: lambda side: task(side).pwrite(side.fds[which], data, page * PAGE + lead),
        1: lambda side: task(side).pread(side.fds[which], length, page * PAGE + lead),
        2: lambda side: task(side).touch(start, length, write=write),
        3: lambda side: task(side).write(start + lead, data[: PAGES * PAGE - page * PAGE - lead]),
        4: lambda side: task(side).read(start + lead, count * PAGE - lead),
        5: lambda side: task(side).madvise(start, count * PAGE, advice[number % 5]),
        6: lambda side: task(side).madvise(start, count * PAGE, Madvise.DONTNEED),
        7: lambda side: task(side).fallocate(side.fds[which], 3, page * PAGE + lead, length),
        8: lambda side: task(side).fallocate(side.fds[which], number & 1, page * PAGE, length),
        9: lambda side: task(side).ftruncate(side.fds[which], page * PAGE + lead),
        10: lambda side: task(side).ftruncate(side.fds[which], PAGES * PAGE),
        11: lambda side: task(side).fsync(side.fds[1]),
        12: lambda side: task(side).fadvise(side.fds[which], page * PAGE, length, 4),
        13: lambda side: task(side).mincore(start, length).tolist(),
        14: fork,
        15: lambda side: side.machine.drop_caches() if number & 1 else side.machine.reclaim(4),
    }[what]


@pytest.mark.parametrize("kernel", ["6.18", "6.1"])
def test_pages_of_files_come_to_the_same(kernel):
    """Single pages of files without arrays, many as arrays: answers and states are equal after each step."""
    for seed in range(30):
        rng = random.Random(f"files {seed} {kernel}")
        sides = [FileSide(few, kernel) for few in (True, False)]
        for number in range(40):
            step = file_step(rng)
            answers = [side.do(step) for side in sides]
            assert answers[0] == answers[1], (seed, number)
            assert state(sides[0].machine) == state(sides[1].machine), (seed, number)
        sides[0].machine.check()


# -- many pages -----------------------------------------------------------------------------------------------


class ManySide(Side):
    """One machine with private and shared memory that a userfaultfd may watch, and a source to copy from."""

    def __init__(self, few: bool, kernel: str, swap_kind: str) -> None:
        self.few = few
        self.machine = pmcore.open("sim", memory="8 MiB", swap="1 MiB", swap_kind=swap_kind, kernel=kernel)
        self.tasks = [self.machine.spawn()]
        task = self.tasks[0]
        for number, flags in enumerate((0x32, 0x31, 0x32)):
            task.mmap(MANY * PAGE, addr=START + number * MANY * PAGE, flags=flags)
        task.write(START + 2 * MANY * PAGE, b"".join(bytes([n % 5]) * PAGE for n in range(MANY)))
        features = UffdFeature.WP_ASYNC if self.machine.core.caps.uffd_features & UffdFeature.WP_ASYNC else 0
        features |= UffdFeature.WP_UNPOPULATED & self.machine.core.caps.uffd_features
        features |= UffdFeature.MISSING_SHMEM | UffdFeature.MINOR_SHMEM
        self.fd = task.userfaultfd(features)

    def do(self, step):
        few = 1 << 20 if self.few else 6
        with mock.patch.object(touch, "_FEW", few), mock.patch.object(uffd_fill, "_FEW", few):
            try:
                return step(self)
            except (SyscallError, AddressSpaceFault, NotModelled) as error:
                return repr(error)


def many_step(rng: random.Random):
    """Something to do with many pages of private or shared memory."""
    shared, page = rng.randrange(2), rng.randrange(MANY)
    count = rng.choice((1, 9, 12, MANY))
    start, source = START + (shared * MANY + page) * PAGE, START + (2 * MANY + rng.randrange(MANY)) * PAGE
    length = min(count, MANY - page) * PAGE
    what, number, write = rng.randrange(16), rng.randrange(1 << 16), rng.random() < 0.7

    def task(side):
        return side.tasks[number % len(side.tasks)]

    def fork(side):
        if len(side.tasks) < 3:
            side.tasks.append(task(side).fork())
        else:
            side.tasks.pop().exit()

    def watched(mode, call):
        """What userfaultfds do, to one that watches the memory just for that, or (protecting) from then on."""

        def step(side):
            base = START + shared * MANY * PAGE
            side.tasks[0].uffd_register(side.fd, base, MANY * PAGE, mode)
            if mode != 2 and write:
                side.tasks[0].madvise(start, length, Madvise.DONTNEED if number & 1 else Madvise.REMOVE)
            try:
                return call(side.tasks[0], side.fd)
            finally:
                if mode != 2 or number & 4:
                    side.tasks[0].uffd_unregister(side.fd, base, MANY * PAGE)

        return step

    return {
        0: lambda side: task(side).touch(start, length, write=write),
        1: lambda side: task(side).touch(start, length, write=True),
        2: lambda side: task(side).touch(start, length, write=False),
        3: fork,
        4: lambda side: task(side).madvise(start, length, Madvise.PAGEOUT),
        5: lambda side: task(side).madvise(start, length, Madvise.DONTNEED),
        6: lambda side: task(side).madvise(start, length, Madvise.FREE),
        7: lambda side: task(side).touch(source, length, write=write),
        8: watched(2, lambda task, fd: task.uffd_writeprotect(fd, start, length, protect=number & 3 > 0)),
        9: watched(1, lambda task, fd: task.uffd_copy(fd, start, source, length)),
        10: watched(1, lambda task, fd: task.uffd_zeropage(fd, start, length)),
        11: watched(4, lambda task, fd: task.uffd_continue(fd, start, length)),
        12: lambda side: task(side).process.clear_refs(1 + number % 4),
        13: watched(3, lambda task, fd: task.uffd_copy(fd, start, source, length, mode=number & 2)),
        14: lambda side: task(side).madvise(source, length, Madvise.PAGEOUT),
        15: lambda side: task(side).mprotect(start, length, 1 | write << 1),
    }[what]


@pytest.mark.parametrize(
    ("kernel", "swap"), [("6.18", "compressed"), ("6.12", "disk"), ("6.8", "compressed")]
)
def test_many_pages_come_to_the_same(kernel, swap):
    """Ranges of pages one access after the other, and as arrays: answers and states are equal after each step."""
    reached, done = Counter(), Counter()
    for seed in range(40):
        rng = random.Random(f"many {seed} {kernel}")
        sides = [ManySide(few, kernel, swap) for few in (True, False)]
        for number in range(40):
            step = many_step(rng)
            answers = [side.do(step) for side in sides]
            assert answers[0] == answers[1], (seed, number)
            assert state(sides[0].machine) == state(sides[1].machine), (seed, number)
            done[isinstance(answers[0], int) and answers[0] > 6 * PAGE] += 1  # filled in by a userfaultfd
        sides[0].machine.check()
        reached += sides[1].machine.counters
    assert reached["copy_on_write"] > 50
    assert reached["swap_in"] > 50
    assert done[True] > 50
