"""Reclaim on the model and on the running kernel: a memory cgroup (version 1) says how much of one task has to go."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pmcore.backends.sim.machine import SwapSettings
from pmcore.errors import BackendUnavailable
from pmcore.lockstep import Comparer, Difference, take
from pmcore.program import Program, Run
from pmcore.program import steps as s
from pmcore.registry import open_workbench
from pmcore.uapi import ClearRefs, Madvise

GROUPS = Path("/sys/fs/cgroup/memory")
PAGE = 4096
NOTHING = Program(name="by hand", steps=())


class Sides:
    """The same steps on the model and on the kernel, compared after each."""

    def __init__(self, live, group: Path, *, immediate: bool = True) -> None:
        swap = [SwapSettings(length=256 << 20, immediate=immediate)]
        self.machine = open_workbench("sim", memory="256 MiB", swap=swap, kernel=live.kernel.profile)
        self.live, self.group, self.immediate = live, group, immediate
        self.runs = Run(NOTHING, self.machine), Run(NOTHING, live)
        (group / "cgroup.procs").write_text(str(self.runs[1].task("main").pid))
        self.comparer = Comparer(watched=self.live.watched)

    def do(self, *steps: s.Step) -> None:
        for step in steps:
            for run in self.runs:
                outcome = run.advance(step)
                assert not outcome.errno, (step, outcome)
            self.live.settle()
        self.compare()

    def differences(self) -> list[Difference]:
        for _ in range(500):
            if "nr_writeback 0\n" in Path("/proc/vmstat").read_text():
                break
            time.sleep(0.002)
        self.live.settle()
        found = self.comparer.compare(*(take(run) for run in self.runs))
        # Not modelled yet: reclaim leaves the accessed bits of entries in locked mappings alone.
        return [difference for difference in found if difference.kind != "smaps Referenced"]

    def compare(self) -> None:
        found = self.differences()
        assert not found, "\n".join(map(str, found))
        self.machine.check()

    def swapped(self, task: str = "main", area: str = "a") -> int:
        run = self.runs[1]
        start, length = run.area(area)
        entries = run.task(task).process.pagemap(start, start + length)
        return int((entries.swapped & ~entries.present).sum())

    def gone(self) -> int:
        """Pages of area "a" that are not there on the live kernel."""
        run = self.runs[1]
        start, length = run.area("a")
        return int((~run.task("main").process.pagemap(start, start + length).present).sum())

    def shrink(self, pages: int) -> int:
        """Let the cgroup have less, and take as many pages from the model as the kernel took; how many that were."""
        before = self.gone()
        usage = int((self.group / "memory.usage_in_bytes").read_text())
        self.live.settle()
        with contextlib.suppress(OSError):
            (self.group / "memory.limit_in_bytes").write_text(str(usage - pages * PAGE))
        (self.group / "memory.limit_in_bytes").write_text("-1")
        taken = self.gone() - before
        result = self.machine.reclaim(taken)
        assert result.pages == taken
        self.compare()
        return taken

    def empty(self) -> None:
        """Let everything go that can. The kernel's idea of what is active may be two seconds old."""
        self.machine.reclaim(1 << 16)
        for _ in range(35):
            (self.group / "memory.force_empty").write_text("0")
            if not self.differences():
                break
            time.sleep(0.1)
        self.compare()

    def close(self) -> None:
        for run in self.runs:
            for task in list(run.tasks.values()):
                task.exit()
        self.machine.check()


@pytest.fixture(scope="module", params=["Y", "N"])
def live(request):
    try:
        bench = open_workbench(
            "procfs", swap="256 MiB", knobs={"/sys/module/zswap/parameters/enabled": request.param}
        )
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        if not bench.kernel.pfn_visible or not bench.kernel.profile.has("mm.mremap_many"):
            pytest.skip("needs frame numbers, and a kernel of the model's own version")
        yield bench, request.param == "Y"


@pytest.fixture
def sides(live):
    bench, immediate = live
    if not (GROUPS / "memory.force_empty").exists() and not (GROUPS / "cgroup.procs").exists():
        pytest.skip("needs memory cgroups of version 1")
    group = GROUPS / f"pmcore-test-{os.getpid()}"
    group.mkdir()
    both = None
    try:
        both = Sides(bench, group, immediate=immediate)
        yield both
    finally:
        if both is not None:
            both.close()
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.02)


#: Who samples accessed bits by physical address (DV-020) changes what the kernel takes for used: it is asked again.
pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live"), pytest.mark.flaky(reruns=5)]


@pytest.mark.rule("RC-001", "RC-002")
def test_what_was_not_accessed_goes_from_the_tail(sides):
    """In the order in which pages came; what was accessed since is spared, and marked."""
    sides.do(
        s.Map(area="a", pages=2048, align=2 << 20),
        s.Advise(area="a", pages=2048, advice=int(Madvise.NOHUGEPAGE)),
        s.Touch(area="a", pages=2048),
        s.ClearRefs(what=int(ClearRefs.ALL)),
        s.Touch(area="a", page=256, pages=256),
    )
    assert sides.shrink(200) > 50
    assert sides.shrink(300) > 100
    sides.do(s.Touch(area="a", page=256, pages=64))
    assert sides.shrink(300) > 100


@pytest.mark.rule("RC-003")
def test_pages_of_several_processes_go_from_all_of_them(sides):
    sides.do(
        s.Map(area="a", pages=512, align=2 << 20),
        s.Advise(area="a", pages=512, advice=int(Madvise.NOHUGEPAGE)),
        s.Touch(area="a", pages=512),
        # To a disk only zeros for now: when the writing of others ends is up to it.
        *[s.Write(area="a", offset=5 * PAGE, text="shared")] * sides.immediate,
        s.Fork(child="c"),
        s.Fork(child="d", task="c"),
        s.Touch(task="c", area="a", page=100, pages=20),
        s.ClearRefs(what=int(ClearRefs.ALL)),
        s.ClearRefs(task="c", what=int(ClearRefs.ALL)),
        s.ClearRefs(task="d", what=int(ClearRefs.ALL)),
    )
    assert sides.shrink(250) > 100
    if not sides.immediate:
        for run in sides.runs:
            run.task("d").write(run.area("a")[0] + 5 * PAGE, b"shared")
    sides.empty()
    # Not compared any further: a cgroup measures refaults with its own few pages, the model with all of memory.
    assert [run.task("d").read(run.area("a")[0] + 5 * PAGE, 6) for run in sides.runs] == [b"shared"] * 2


@pytest.mark.rule("RC-004")
def test_what_waits_in_the_swap_cache(sides):
    """On a disk what was written waits, clean; zeros, and what is clean already, do not."""
    sides.do(
        s.Map(area="a", pages=16, align=2 << 20),
        s.Touch(area="a", pages=16),
        *(s.Write(area="a", offset=page * PAGE, text="content") for page in (0, 3, 5)),
        s.Advise(area="a", pages=12, advice=int(Madvise.PAGEOUT)),
        s.Mincore(area="a", pages=16),
    )
    sides.do(
        s.Read(area="a", offset=0, length=7),
        s.Read(area="a", offset=PAGE, length=7),
        s.Write(area="a", offset=3 * PAGE, text="new"),
    )
    sides.do(s.Advise(area="a", pages=12, advice=int(Madvise.PAGEOUT)), s.Mincore(area="a", pages=16))
    sides.do(s.Fork(child="c"), s.Read(task="c", area="a", offset=5 * PAGE, length=7))


@pytest.mark.rule("RC-005", "RC-006")
def test_lazily_freed_pages_are_dropped(sides):
    """Not those that were written since: they are ordinary memory again."""
    sides.do(
        s.Map(area="a", pages=64, align=2 << 20),
        s.Touch(area="a", pages=64),
        s.Fork(child="c"),
        s.Advise(area="a", page=8, pages=24, advice=int(Madvise.FREE)),
        s.Touch(area="a", page=12, pages=4, write=False),
        s.Exit(task="c"),
        s.Touch(area="a", page=20, pages=6),
        s.Lock(area="a", page=40, pages=4),
    )
    sides.empty()


@pytest.mark.rule("RC-007")
@pytest.mark.parametrize("forked", [False, True])
def test_huge_pages_are_taken_apart(sides, forked):
    """What they hold of zeros becomes the zero page; the rest goes page by page, from everybody."""
    sides.do(
        s.Map(area="a", pages=1024, align=2 << 20),
        s.Advise(area="a", pages=1024, advice=int(Madvise.HUGEPAGE)),
        s.Touch(area="a", pages=1024),
        s.Write(area="a", offset=7 * PAGE, text="seven"),
        s.Write(area="a", offset=600 * PAGE, text="six hundred"),
        s.Unmap(area="a", page=1000, pages=3),
    )
    if forked:
        sides.do(s.Fork(child="c"), s.Write(task="c", area="a", offset=9 * PAGE, text="nine"))
    sides.empty()
    assert [run.task("main").read(run.area("a")[0] + 7 * PAGE, 5) for run in sides.runs] == [b"seven"] * 2


@pytest.mark.rule("RC-008")
def test_pages_found_in_a_locked_mapping_are_locked_then(sides):
    """What a fault read into a locked mapping (DV-023) is unevictable once reclaim has come across it."""
    sides.do(
        s.Map(area="a", pages=32, align=2 << 20),
        s.Touch(area="a", pages=32),
        s.Advise(area="a", pages=8, advice=int(Madvise.PAGEOUT)),
        s.Lock(area="a", pages=16, onfault=True),
        s.Touch(area="a", pages=4),
    )
    sides.empty()
    flags = take(sides.runs[0]).kpageflags
    assert np.count_nonzero(flags & np.uint64(1 << 18)) >= 4
