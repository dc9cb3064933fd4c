"""khugepaged on the model and on the running kernel: the same blocks are collapsed, the same tables are left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pmcore.errors import BackendUnavailable
from pmcore.lockstep import Comparer, take
from pmcore.program import Program, Run
from pmcore.program import steps as s
from pmcore.registry import open_workbench
from pmcore.uapi import ClearRefs, Madvise, UffdFeature

PAGE, PMD = 4096, 1 << 21
KNOBS = Path("/sys/kernel/mm/transparent_hugepage/khugepaged")
OUT, NOHUGE, HUGE = int(Madvise.PAGEOUT), int(Madvise.NOHUGEPAGE), int(Madvise.HUGEPAGE)
FEATURES = int(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED | UffdFeature.PAGEFAULT_FLAG_WP)


def b(block: int, page: int, pages: int = 1) -> dict[str, object]:
    return {"area": "a", "page": block * 512 + page, "pages": pages}


BLOCKS = 20
STEPS = (
    s.Map(area="a", pages=512 * BLOCKS, align=PMD),
    s.Advise(**b(0, 0, 512 * BLOCKS), advice=NOHUGE),
    s.Touch(**b(0, 0, 512 * BLOCKS)),
    s.Advise(**b(0, 0, 512)),  # 0: one page and 511 empty
    s.Touch(**b(0, 7)),
    s.Advise(**b(1, 0, 512)),  # 1: nothing but a page table
    s.Advise(**b(2, 0, 64), advice=OUT),  # 2, 3: as many swapped out as may be, and one more
    s.Advise(**b(3, 0, 65), advice=OUT),
    s.Protect(**b(5, 0, 512), prot=1),  # 4: never accessed; 5: may not be written
    s.Advise(**b(6, 0, 512)),  # 6: zero pages and one other
    s.Touch(**b(6, 0, 512), write=False),
    s.Touch(**b(6, 5)),
    s.Lock(**b(7, 0, 512)),  # 7: locked
    s.Advise(**b(8, 9), advice=int(Madvise.GUARD_INSTALL)),  # 8: a guard region
    s.Advise(**b(10, 0, 512), advice=int(Madvise.FREE)),  # 10: lazily free
    s.Advise(**b(11, 0, 300)),  # 11: some empty
    s.Advise(**b(12, 0, 64), advice=OUT),  # 12, 13: swapped out, and half of the rest accessed or not
    s.Advise(**b(13, 0, 64), advice=OUT),
    s.UffdOpen(features=FEATURES),
    s.UffdRegister(**b(14, 0, 1024)),  # 14: watched and protected; 15: watched, one page empty
    s.UffdProtect(**b(14, 3)),
    s.Advise(**b(15, 3)),
    s.Write(area="a", offset=16 * PMD + 3 * PAGE, text="sixteen"),
    s.Advise(**b(16, 0, 8), advice=OUT),
    s.Fork(child="c"),
    s.Advise(task="c", **b(0, 0, 512 * 16)),  # what follows is shared: 16 all, 17 half, 18 half and one
    s.Touch(task="c", **b(17, 0, 256)),
    s.Touch(task="c", **b(18, 0, 255)),
    s.Touch(task="c", **b(19, 0, 512)),
    s.ClearRefs(what=int(ClearRefs.ALL)),
    *(s.Touch(**b(n, 100), write=False) for n in (5, 6, 7, 8, 9, 11, 12, 14, 15, 17, 18, 19)),
    s.Touch(**b(0, 7), write=False),
    s.Touch(**b(2, 100, 256), write=False),
    s.Touch(**b(3, 100, 256), write=False),
    s.Touch(**b(8, 100, 256), write=False),
    s.Touch(**b(10, 100), write=False),
    s.Touch(**b(13, 100, 256), write=False),
    s.Touch(**b(16, 200, 256), write=False),
)


@pytest.mark.rule("RC-015", "RC-016", "RC-017")
@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_the_same_blocks_are_collapsed():
    try:
        live = open_workbench("procfs", swap="64 MiB", knobs={str(KNOBS / "pages_to_scan"): "1000000"})
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with live:
        if not live.kernel.pfn_visible or not live.kernel.profile.has("mm.mremap_many"):
            pytest.skip("needs frame numbers, and a kernel of the model's own version")
        machine = open_workbench("sim", memory="256 MiB", swap="64 MiB", kernel=live.kernel.profile)
        for name in ("max_ptes_none", "max_ptes_swap", "max_ptes_shared"):
            setattr(machine.khugepaged, name, int((KNOBS / name).read_text()))
        program = Program(name="blocks", steps=STEPS)
        runs = Run(program, machine), Run(program, live)
        for step in STEPS:
            outcomes = [run.advance(step) for run in runs]
            live.settle()
            assert outcomes[0] == outcomes[1], step
        allow = s.Advise(**b(0, 0, 512 * BLOCKS), advice=HUGE)
        for run in runs:
            run.advance(allow)
        live.settle()
        comparer = Comparer()
        found = comparer.compare(*(take(run) for run in runs))
        assert not found, "\n".join(map(str, found))
        if not _wake():
            pytest.skip("khugepaged, the least important thread of the machine, got no turn")
        for _ in range(2):
            while not machine.khugepaged.step(1 << 20).full_scan:
                pass
        live.settle()
        found = comparer.compare(*(take(run) for run in runs))
        assert not found, "\n".join(map(str, found))
        assert machine.khugepaged.pages_collapsed >= 6
        for run in runs:
            for task in list(run.tasks.values()):
                task.exit()
        machine.check()


def _wake() -> bool:
    """Two rounds through everything, so that each block was looked at since; False if they take too long.

    It is the least important thread of the machine: for this time it is like any other, or it might never get a turn.
    """
    before = int((KNOBS / "full_scans").read_text())
    comms = [path for path in Path("/proc").glob("[0-9]*/comm") if _read(path) == "khugepaged"]
    pids = [int(path.parent.name) for path in comms]
    knobs = [KNOBS / "alloc_sleep_millisecs", KNOBS / "scan_sleep_millisecs"]
    try:
        for pid in pids:
            os.setpriority(os.PRIO_PROCESS, pid, 0)
        for knob in knobs:
            knob.write_text("20")
        for _ in range(250):
            if int((KNOBS / "full_scans").read_text()) >= before + 2:
                return True
            time.sleep(0.1)
        return False
    finally:
        for knob in knobs:
            knob.write_text("3600000")
        for pid in pids:
            os.setpriority(os.PRIO_PROCESS, pid, 19)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
