"""Memory blocks on the running kernel: what goes offline shows nothing, and pages are migrated as the model says.

A block goes offline only where the kernel itself has nothing in it, and nobody can say where pages are to come from:
other memory is filled until they come from such a block. Where that cannot be had the tests are skipped.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmcore.errors import PmcoreError
from pmcore.lockstep import Comparer, take
from pmcore.program import Program, Run
from pmcore.program import steps as s
from pmcore.registry import open_workbench
from pmcore.uapi import PM_PFRAME_MASK, Madvise, PageFlag, UffdFeature

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]

PAGE, PMD, MIB = 4096, 2 << 20, 1 << 20
BLOCKS = Path("/sys/devices/system/memory")
#: What may lie in a block that goes offline.
MOVABLE = int(PageFlag.BUDDY | PageFlag.LRU | PageFlag.HUGE)
UFFD = int(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED | UffdFeature.PAGEFAULT_FLAG_WP)

HUGE = (
    s.Map(area="h", pages=512, align=PMD),
    s.Advise(area="h", pages=512, advice=int(Madvise.HUGEPAGE)),
    s.Touch(area="h", pages=512),
    s.Map(area="p", pages=512, align=PMD),
    s.Advise(area="p", pages=512, advice=int(Madvise.HUGEPAGE)),
    s.Touch(area="p", pages=512),
    s.Protect(area="p", pages=1, prot=1),
    s.Protect(area="p", pages=1, prot=3),
    s.Map(area="t", pages=512, align=PMD),
    s.Advise(area="t", pages=512, advice=int(Madvise.HUGEPAGE)),
    s.Touch(area="t", pages=512),
    s.Write(area="t", text="torn"),
    s.Write(area="t", offset=400 * PAGE, text="torn"),
    s.Unmap(area="t", page=100, pages=30),
)
SMALL = (
    s.Map(area="a", pages=48),
    s.Touch(area="a", pages=48),
    s.Write(area="a", offset=3 * PAGE, text="three"),
    s.Lock(area="a", page=8, pages=4),
    s.Protect(area="a", page=12, pages=4, prot=1),
    s.UffdOpen(features=UFFD),
    s.UffdRegister(area="a", page=16, pages=8),
    s.UffdProtect(area="a", page=16, pages=4),
    s.Advise(area="a", page=24, pages=4, advice=int(Madvise.COLD)),
    s.Advise(area="a", page=28, pages=4, advice=int(Madvise.FREE)),
    s.Map(area="s", pages=8),
    s.Touch(area="s", pages=8),
    s.Write(area="s", text="swapped"),
    s.Write(area="s", offset=PAGE, text="swapped"),
    s.Advise(area="s", pages=8, advice=int(Madvise.PAGEOUT)),
    s.Touch(area="s", pages=2, write=False),
    s.MemfdCreate(fd="m", pages=16),
    s.Map(area="m", pages=8, flags=1, fd="m"),
    s.Touch(area="m", pages=4),
    s.Write(area="m", text="file"),
    s.Map(area="c", pages=8, flags=2, fd="m"),
    s.Touch(area="c", pages=4, write=False),
    s.Touch(area="c", pages=2),
    s.Map(area="x", pages=8, flags=0x21),
    s.Touch(area="x", pages=8),
    s.Fork(child="child"),
    s.Write(task="child", area="a", offset=3 * PAGE, text="child"),
)
AFTER = (
    s.Read(area="a", offset=3 * PAGE, length=5),
    s.Read(task="child", area="a", offset=3 * PAGE, length=5),
    s.Read(area="s", length=7),
    s.Read(area="m", length=4),
    s.Read(area="t", length=4),
    s.Touch(area="a", pages=48),
    s.Touch(area="s", pages=8),
    s.Touch(area="c", pages=8),
    s.Touch(area="h", pages=512),
    s.Touch(area="t", pages=100),
    s.Scan(area="a", pages=48),
)


class Machine:
    """The running kernel's memory blocks; what is taken offline comes online again, also if we are killed."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.pages = int((BLOCKS / "block_size_bytes").read_text(), 16) // PAGE
        self._guards: dict[int, Any] = {}

    def _write(self, number: int, word: str) -> int:
        try:
            (BLOCKS / f"memory{number}" / "state").write_text(word)
        except OSError as error:
            return error.errno or -1
        return 0

    def offline(self, number: int) -> int:
        """0, or the errno."""
        state = BLOCKS / f"memory{number}" / "state"
        script = f"import sys, pathlib; sys.stdin.read(); pathlib.Path({str(state)!r}).write_text('online')"
        guard = subprocess.Popen(
            [sys.executable, "-I", "-c", script], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        failed = self._write(number, "offline")
        if failed:
            guard.communicate()
        else:
            self._guards[number] = guard
        return failed

    def online(self, number: int) -> int:
        """0, or the errno."""
        failed = self._write(number, "online")
        if number in self._guards:
            self._guards.pop(number).communicate()
        return failed

    def restore(self) -> None:
        """Everything online again."""
        for number in list(self._guards):
            self.online(number)

    def words(self, number: int, name: str = "kpageflags") -> Any:
        """kpageflags or kpagecount of a block."""
        return np.frombuffer(
            self.kernel.pread(name, number * self.pages * 8, self.pages * 8), dtype=np.uint64
        )

    def movable(self, number: int) -> bool:
        """Whether nothing in the block is seen to stand in the way (a few free pages in batches show nothing)."""
        words = self.words(number)
        kernels = (words & np.uint64(PageFlag.SLAB | PageFlag.PGTABLE | PageFlag.RESERVED)) != 0
        return not kernels.any() and int(((words & np.uint64(MOVABLE)) == 0).sum()) < 300

    def free(self) -> list[int]:
        """Blocks of which all frames are free, the highest first."""
        numbers = sorted((int(p.name[6:]) for p in BLOCKS.glob("memory[0-9]*")), reverse=True)
        return [n for n in numbers if n and (self.words(n) & np.uint64(PageFlag.BUDDY)).all()]


@contextlib.contextmanager
def live(**settings: Any) -> Iterator[tuple[Any, Machine]]:
    if not (BLOCKS / "auto_online_blocks").exists():
        pytest.skip("needs a kernel with memory blocks")
    try:
        bench = open_workbench("procfs", still=True, **settings)
    except PmcoreError as error:
        pytest.skip(str(error))
    with bench:
        if not bench.kernel.pfn_visible or not bench.kernel.profile.has("mm.mremap_many"):
            pytest.skip("needs frame numbers, and a kernel of the model's own version")
        machine = Machine(bench.kernel)
        try:
            yield bench, machine
        finally:
            machine.restore()


def frames(task: Any, start: int, pages: int) -> Any:
    words = np.zeros(pages, dtype=np.uint64)
    task.process.read_pagemap(start // PAGE, words)
    return (words[words >> np.uint64(63) == 1] & np.uint64(PM_PFRAME_MASK)).astype(np.int64)


def fill(bench: Any, machine: Machine, ballast: Any, *, huge: bool) -> bool:
    """Take memory until it comes from a block that could go offline; whether that came to pass."""
    length = 2 * PMD if huge else PMD
    for _ in range(6 << 30 >> 20 + 2):
        start = ballast.mmap(length, addr=0)
        ballast.madvise(start, length, Madvise.HUGEPAGE if huge else Madvise.NOHUGEPAGE)
        ballast.touch(start, length)
        blocks = {int(pfn) // machine.pages for pfn in frames(ballast, start, length // PAGE)}
        if len(blocks) == 1 and machine.movable(*blocks):
            return True
    return False


def simulated(profile: Any) -> Any:
    """A machine whose first block, with what the kernel has, is full, and whose page tables lie elsewhere."""
    machine = open_workbench(
        "sim", memory="128 MiB", swap="64 MiB", kernel=profile, block_size="8 MiB", nodes=2
    )
    memory = machine.core.memory

    def table_pages(count: int) -> list[int]:
        found = memory.zones[-1].take_pages(count)
        memory.frames.flags[found] = int(PageFlag.PGTABLE)
        return list(found.tolist())

    memory.table_pages = table_pages
    memory.table_page = lambda: table_pages(1)[0]
    machine.balloon_inflate(2048)
    return machine


def where(run: Run, pages: int) -> Counter[int]:
    """Blocks that hold frames of the run's areas."""
    found: Counter[int] = Counter()
    zeros = run.workbench.kernel
    for task in run.tasks.values():
        for start, length in run.areas.values():
            for pfn in frames(task, start, length // PAGE).tolist():
                word = np.frombuffer(zeros.pread("kpageflags", pfn * 8, 8), dtype=np.uint64)[0]
                if not int(word) & int(PageFlag.ZERO_PAGE):
                    found[pfn // pages] += 1
    return found


@pytest.mark.rule("HP-001", "HP-002", "HP-003")
def test_a_free_block():
    """Offline it shows nothing; online again all of it is free. What is so already, or has holes, is EINVAL."""
    with live() as (_, machine):
        if not machine.free():
            pytest.skip("no block of this machine is free")
        number = machine.free()[0]
        assert machine.offline(number) == 0
        assert not machine.words(number).any()
        assert not machine.words(number, "kpagecount").any()
        assert machine._write(number, "offline") == errno.EINVAL
        assert machine.online(number) == 0
        assert int(((machine.words(number) & np.uint64(PageFlag.BUDDY)) != 0).sum()) > machine.pages - 1024
        assert machine.online(number) == errno.EINVAL
        assert machine.offline(0) in (errno.EINVAL, errno.EBUSY)


@pytest.mark.rule("HP-006")
def test_a_block_with_slabs():
    with live() as (_, machine):
        full = [n for n in range(200) if (machine.words(n) & np.uint64(PageFlag.SLAB)).any()]
        if not full:
            pytest.skip("no slabs are seen")
        before = machine.words(full[-1]).copy()
        assert machine.offline(full[-1]) == errno.EBUSY
        assert int((machine.words(full[-1]) != before).sum()) < 3000


@pytest.mark.rule("HP-004", "HP-005")
def test_pages_are_migrated():
    """The same program on both; then every block with one of its pages goes offline, and both show the same again."""
    with live(swap="64 MiB") as (bench, machine):
        for _ in range(8):
            if _migrated(bench, machine):
                return
        pytest.skip("not all pages came from blocks that could go offline")


def _migrated(bench: Any, machine: Machine) -> bool:
    sim = simulated(bench.kernel.profile)
    runs = Run(Program(name="x", steps=()), sim), Run(Program(name="x", steps=()), bench)
    comparer, ballast = Comparer(), bench.spawn()
    try:
        found = fill(bench, machine, ballast, huge=True)
        for step in HUGE:
            assert len({repr(run.advance(step)) for run in runs}) == 1, step
        found = found and fill(bench, machine, ballast, huge=False)
        for step in SMALL:
            assert len({repr(run.advance(step)) for run in runs}) == 1, step
        bench.settle()
        assert not comparer.compare(*(take(run) for run in runs))
        ballast.exit()
        there = where(runs[1], machine.pages)
        if not found:
            return False
        before = [take(run) for run in runs]
        if any(machine.offline(number) for number in there):
            return False
        for number in where(runs[0], sim.core.memory.block_pages):
            sim.offline_block(number)
        sim.check()
        bench.settle()
        # Frames are other ones: a comparer that has not seen the old ones.
        after = [take(run) for run in runs]
        differences = Comparer().compare(*after)
        assert not differences, "\n".join(map(str, differences))
        for old, new in zip(before, after, strict=True):
            assert not np.intersect1d(old.pfns, new.pfns).size > 1  # but for the zero page
        assert not any(machine.words(number).any() for number in there)
        machine.restore()
        comparer = Comparer()
        for step in AFTER:
            assert len({repr(run.advance(step)) for run in runs}) == 1, step
            bench.settle()
            differences = comparer.compare(*(take(run) for run in runs))
            assert not differences, "\n".join([str(step), *map(str, differences)])
        sim.check()
        return True
    finally:
        machine.restore()
        sim.close()
        for task in list(bench.tasks()):
            task.exit()


@pytest.mark.rule("HP-007")
def test_huge_pages_of_a_pool():
    """Those in use move to free ones, and all that were in the block leave the pool."""
    with live(hugepages={"2 MiB": 100}) as (bench, machine):
        knobs = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

        def pool() -> list[int]:
            names = ("nr_hugepages", "free_hugepages", "resv_hugepages")
            return [int((knobs / name).read_text()) for name in names]

        task = bench.spawn()
        start = task.mmap(50 * PMD, flags=0x40022)
        task.touch(start, 40 * PMD, step=PMD)
        heads = frames(task, start, 50 * 512)[::512]
        assert len(heads) == 40
        for number, used in Counter((heads // machine.pages).tolist()).items():
            huge = int(((machine.words(number) & np.uint64(PageFlag.HUGE)) != 0).sum()) // 512
            total, free, promised = pool()
            if machine.offline(number):
                continue
            assert pool() == [total - huge, free - huge, promised]
            again = frames(task, start, 50 * 512)[::512]
            inside = heads // machine.pages == number
            assert int((again != heads).sum()) == int(inside.sum()) == used
            shown = [bench.kernel.kpageflags(int(pfn), 1) for pfn in again[inside]]
            assert all(bool(word.has(PageFlag.HUGE | PageFlag.DIRTY)[0]) for word in shown)
            return
        pytest.skip("no block with a huge page in use could go offline")
