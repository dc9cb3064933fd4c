"""The three findings of spec/findings.md: short programs, equal on the model and the kernel, that show what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pmcore.errors import BackendUnavailable
from pmcore.lockstep import lockstep
from pmcore.profile import preset
from pmcore.program import Run, load_program
from pmcore.registry import open_workbench

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "spec" / "findings.md"
FINDINGS = {path.stem: load_program(path) for path in sorted((HERE / "findings").glob("*.json"))}
PAGE = 4096
LOST, HOLE, PROMISES = (
    "memory-lost-by-merging",
    "a-hole-of-five-bytes-unmaps-a-file",
    "promises-fall-below-zero",
)


def simulated(kernel=None):
    """A machine whose groups are those of cgroup version 1."""
    kernel = kernel or preset("6.18", config=["CONFIG_MEMCG_V1"])
    return open_workbench("sim", memory="64 MiB", swap="64 MiB", kernel=kernel, hugepages={"2 MiB": (4, 0)})


def ended(bench, name):
    """The program's end: its main task, and the start of its only area."""
    run = Run(FINDINGS[name], bench)
    for step in FINDINGS[name].steps:
        run.advance(step)
    [(start, _)] = run.areas.values()
    return run, run.task("main"), start


def the_second_page_is_lost(bench):
    run, task, start = ended(bench, LOST)
    assert not task.process.pagemap(start, start + 2 * PAGE).has_pfn.any()
    assert not task.process.pagemap(start, start + 2 * PAGE).swapped.any()
    assert task.read(start + PAGE, 8) == bytes(8)
    leave(run, bench)


def one_page_of_eight_is_mapped(bench):
    run, task, start = ended(bench, HOLE)
    assert task.process.pagemap(start, start + 8 * PAGE).present.tolist() == [True] + [False] * 7
    leave(run, bench)


def leave(run, bench):
    for task in list(run.tasks.values()):
        task.exit()
    bench.renew()


def test_the_document_names_each_program():
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, program in FINDINGS.items():
        assert f"`{name}.json`" in text
        assert len(program.steps) <= 10
        assert all(rule in text for rule in program.rules)


@pytest.mark.rule("KS-019")
def test_memory_lost_by_merging():
    the_second_page_is_lost(simulated())


@pytest.mark.rule("DF-015")
def test_a_hole_unmaps_a_file():
    one_page_of_eight_is_mapped(simulated())


@pytest.mark.rule("HT-008")
def test_promises_fall_below_zero():
    machine = simulated()
    run, _, _ = ended(machine, PROMISES)
    lines = machine.pread("meminfo", 0, 1 << 16).decode().splitlines()
    counters = dict(line.split(":", 1) for line in lines)
    assert int(counters["HugePages_Rsvd"]) == (1 << 64) - 1
    leave(run, machine)


@pytest.fixture(scope="module")
def live():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    try:
        bench = open_workbench("procfs", swap="64 MiB", hugepages={"2 MiB": (4, 0)})
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        if not bench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        if not bench.kernel.profile.has("mm.mremap_many"):
            pytest.skip("the findings are 6.18's: this kernel is older than 6.17")
        yield bench


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.parametrize("name", FINDINGS)
def test_the_running_kernel_shows_the_same(live, name):
    if name == LOST and not live.kernel.profile.has("memcg.v1"):
        pytest.skip("the memory controller is not that of cgroup version 1")
    live.renew()
    result = lockstep(FINDINGS[name], simulated(live.kernel.profile), live)
    assert result.agrees, "\n".join(map(str, result.differences))
    live.renew()


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("KS-019")
def test_the_running_kernel_loses_memory(live):
    if not live.kernel.profile.has("memcg.v1"):
        pytest.skip("the memory controller is not that of cgroup version 1")
    the_second_page_is_lost(live)


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("DF-015")
def test_the_running_kernel_unmaps_the_file(live):
    one_page_of_eight_is_mapped(live)


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("HT-008")
def test_the_running_kernel_promises_less_than_nothing(live):
    run, _, _ = ended(live, PROMISES)
    counters = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    assert int(counters["HugePages_Rsvd"].split()[0]) == (1 << 64) - 1
    leave(run, live)
