"""swapoff on the model and on the running kernel: pages of all sorts come back alike."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from pmcore.backends.sim.machine import SwapSettings
from pmcore.errors import BackendUnavailable
from pmcore.lockstep import Comparer, take
from pmcore.program import Program, Run
from pmcore.program import steps as s
from pmcore.registry import open_workbench
from pmcore.uapi import Madvise, PageFlag, UffdFeature

PAGE = 4096
OUT = int(Madvise.PAGEOUT)
FEATURES = int(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED | UffdFeature.PAGEFAULT_FLAG_WP)
STEPS = (
    s.Map(area="a", pages=64, align=2 << 20),
    s.Touch(area="a", pages=64),
    s.Write(area="a", offset=3 * PAGE, text="three"),
    s.Write(area="a", offset=20 * PAGE, text="twenty"),
    # Shared by fork: 0 to 15 while they are out, of which some come back into the swap cache.
    s.Advise(area="a", pages=16, advice=OUT),
    s.Fork(child="c"),
    s.Touch(area="a", page=2, pages=3, write=False),
    s.Touch(task="c", area="a", page=8, pages=2),
    s.Touch(task="c", area="a", page=3, pages=1),
    # A process's own, of which some were read, some written, some may not be written any more.
    s.Map(area="b", pages=64, align=2 << 20),
    s.Touch(area="b", pages=64),
    s.Write(area="b", offset=33 * PAGE, text="own"),
    s.UffdOpen(features=FEATURES),
    s.UffdRegister(area="b", page=32, pages=16),
    s.UffdProtect(area="b", page=34, pages=6),
    s.Advise(area="b", pages=48, advice=OUT),
    s.UffdProtect(area="b", page=40, pages=2),
    s.Touch(area="b", page=4, pages=4, write=False),
    s.Touch(area="b", page=8, pages=4),
    s.Protect(area="b", page=16, pages=8, prot=1),
    s.Lock(area="b", page=24, pages=4, onfault=True),
    s.Advise(area="b", page=4, pages=2, advice=OUT),
)
AFTER = (
    s.Touch(area="b", pages=16),
    s.Touch(area="a", pages=16, write=False),
    s.Touch(task="c", area="a", pages=16),
    s.Read(area="a", offset=3 * PAGE, length=5),
    s.Touch(area="b", page=32, pages=16),
    s.Scan(area="b", pages=64),
)


@pytest.mark.rule("RC-012", "RC-013")
@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.parametrize("zswap", ["Y", "N"])
def test_swapoff(zswap):
    try:
        knobs = {"/sys/module/zswap/parameters/enabled": zswap}
        live = open_workbench("procfs", swap="64 MiB", knobs=knobs)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with live:
        if not live.kernel.pfn_visible or not live.kernel.profile.has("mm.mremap_many"):
            pytest.skip("needs frame numbers, and a kernel of the model's own version")
        area = SwapSettings(length=64 << 20, immediate=zswap == "Y")
        machine = open_workbench("sim", memory="64 MiB", swap=[area], kernel=live.kernel.profile)
        runs = Run(Program(name="x", steps=()), machine), Run(Program(name="x", steps=()), live)
        comparer = Comparer()

        def same(what: object) -> None:
            while "nr_writeback 0\n" not in Path("/proc/vmstat").read_text():
                pass
            live.settle()
            found = comparer.compare(*(take(run) for run in runs))
            assert not found, "\n".join([str(what), *map(str, found)])

        def do(step: s.Step) -> None:
            outcomes = [run.advance(step) for run in runs]
            assert outcomes[0] == outcomes[1], step
            same(step)

        for step in STEPS:
            do(step)
        rows = [line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:]]
        if len(rows) != 1:
            pytest.skip("another swap area is on")
        assert int(rows[0][2]) * 1024 == machine.swaps()[0].size
        assert int(rows[0][4]) == machine.swaps()[0].priority
        assert ctypes.CDLL(None).swapoff(rows[0][0].encode()) == 0
        machine.swapoff(0)
        same("swapoff")
        for step in AFTER:
            do(step)
        for run in runs:
            for task in list(run.tasks.values()):
                task.exit()
        machine.check()


@pytest.mark.rule("RC-018")
@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.parametrize("cached", [False, True])
def test_a_page_read_back_alone(cached):
    """Exclusive where the swap cache had them; of others only those that fill the batch (others fill it, too)."""
    try:
        live = open_workbench("procfs", swap="64 MiB")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with live:
        if not live.kernel.pfn_visible or not live.kernel.profile.has("kpageflags.owner_2"):
            pytest.skip("needs frame numbers, and a kernel that shows OWNER_2")
        task, size = live.spawn(), 12 * PAGE
        start = task.mmap(size)
        task.touch(start, size)
        task.madvise(start, size, Madvise.PAGEOUT)
        child = task.fork()
        if cached:
            child.touch(start, size, write=False)
        child.exit()
        task.mlock(start, size, onfault=True)
        live.settle()
        task.touch(start, size, write=False)
        pfns = task.process.pagemap(start, start + size).pfn
        shown = [bool(live.kernel.kpageflags(int(pfn), 1).has(PageFlag.OWNER_2)[0]) for pfn in pfns]
        assert all(shown) if cached else sum(shown) <= 3


@pytest.mark.rule("RC-011")
@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_areas_of_one_priority_take_turns(tmp_path):
    """Page by page, the same on both; and the priorities of areas that ask for none."""
    from pmcore.backends.procfs.workbench.steady import _swap_file

    try:
        live = open_workbench("procfs", swap="4 MiB")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    libc, files = ctypes.CDLL(None), []
    try:
        with live:
            machine = open_workbench("sim", swap="4 MiB", kernel=live.kernel.profile)
            first = [line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:]]
            if len(first) != 1 or not live.kernel.pfn_visible:
                pytest.skip("needs frame numbers, and no other swap area")
            for priority in (None, 5, 5):
                files.append(_swap_file(2 << 20))
                flags = 0 if priority is None else 0x8000 | priority
                assert libc.swapon(files[-1].encode(), flags) == 0
                machine.swapon(2 << 20, priority=priority)
            rows = [line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:]]
            shown = [(int(row[2]) * 1024, int(row[4])) for row in rows]
            assert shown == [(row.size, row.priority) for row in machine.swaps()]
            found = []
            for bench in (machine, live):
                task = bench.spawn()
                start = task.mmap(2000 * PAGE, addr=1 << 40, flags=0x100022)
                task.madvise(start, 2000 * PAGE, Madvise.NOHUGEPAGE)
                task.touch(start, 2000 * PAGE)
                task.madvise(start, 2000 * PAGE, Madvise.PAGEOUT)
                found.append(task.process.pagemap(start, start + 2000 * PAGE).values & 0x1F)
                task.exit()
            # Which of the two begins is left to what happened before.
            turn = found[0][0] ^ found[1][0]
            assert turn in (0, 2 ^ 3)
            assert ((found[0] ^ turn)[:900] == found[1][:900]).all()
            assert {2, 3} == set(found[1][:900].tolist())
            assert set(found[1][1030:].tolist()) == {0}
    finally:
        for path in files:
            libc.swapoff(path.encode())
            Path(path).unlink()
