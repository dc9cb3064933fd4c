"""Lockstep of memory cgroups: the kernel has groups of the workbench's own, the model its tree."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

import pytest

from pmcore.errors import BackendUnavailable, OutOfMemory, ProcessGone
from pmcore.lockstep import Comparer, lockstep, take
from pmcore.lockstep.answers import answers_from_json, replay
from pmcore.lockstep.session import session
from pmcore.program import Program, Run, load_program, program_to_json
from pmcore.program import steps as s
from pmcore.registry import open_workbench

HERE = Path(__file__).parent
KEPT = sorted((HERE / "kept" / "cgroups").glob("*.json"))
ANSWERS = sorted((HERE / "answers").glob("*/cgroups/*.json"))
POOL = {"2 MiB": (8, 2)}
SETTINGS = {"memory": "256 MiB", "swap": "256 MiB", "hugepages": POOL}


@pytest.fixture(scope="module")
def live():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    try:
        bench = open_workbench("procfs", swap="256 MiB", hugepages=POOL)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        if not bench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        if not bench.kernel.profile.has("mm.mremap_many"):
            pytest.skip("the model is held against kernels of its own version: this one is older than 6.17")
        try:
            bench.make_group("here")
        except BackendUnavailable as error:
            pytest.skip(str(error))
        bench.remove_group("here")
        yield bench


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule(
    "CG-001", "CG-002", "CG-003", "CG-004", "CG-005", "CG-006", "CG-007", "CG-008", "CG-009", "KG-004"
)
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_programs_agree(live, path):
    live.renew()
    result = lockstep(load_program(path), open_workbench("sim", **SETTINGS, kernel=live.kernel.profile), live)
    assert result.agrees, "\n".join(map(str, result.differences))
    assert not live.groups()


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_the_model_agrees_with_the_running_kernel(live):
    """Fixed seeds; PMCORE_LOCKSTEP names how many programs, PMCORE_LOCKSTEP_SEED where they begin."""
    programs = int(os.environ.get("PMCORE_LOCKSTEP", "60"))
    report = session(
        lambda: open_workbench("sim", **SETTINGS, kernel=live.kernel.profile),
        lambda: live.renew() or live,
        programs=programs,
        seed=int(os.environ.get("PMCORE_LOCKSTEP_SEED", "1")),
        profile=live.kernel.profile,
        focus="cgroups",
    )
    told = [
        line
        for found in report.differences
        for line in (program_to_json(found.program), *map(str, found.differences))
    ]
    assert not report.differences, "\n".join(told)
    assert report.reached["step makegroup"] > programs // 2
    assert report.masked.keys() <= {"DV-018", "DV-019", "DV-020"}


class Sides:
    """The same steps on the model and on the kernel, compared after each."""

    def __init__(self, live) -> None:
        self.live, self.machine = live, open_workbench("sim", **SETTINGS, kernel=live.kernel.profile)
        self.runs = [Run(Program(name="by hand", steps=()), bench) for bench in (self.machine, live)]
        self.comparer = Comparer(watched=live.watched)

    def do(self, *steps: s.Step) -> None:
        for step in steps:
            for run in self.runs:
                outcome = run.advance(step)
                assert not outcome.errno, (step, outcome)
        self.compare()

    def compare(self) -> None:
        self.live.settle()
        found = self.comparer.compare(*(take(run) for run in self.runs))
        assert not found, "\n".join(map(str, found))
        self.machine.check()

    def there(self, task: str, area: str) -> list[int]:
        """Pages of the area that are in memory: in the model, on the kernel."""
        found = []
        for run in self.runs:
            start, length = run.area(area)
            found.append(int(run.task(task).process.pagemap(start, start + length).present.sum()))
        return found

    def close(self) -> None:
        for run in self.runs:
            run.end()
        self.machine.check()


@pytest.fixture
def sides(live):
    made = Sides(live)
    yield made
    made.close()


def _two_groups() -> tuple[s.Step, ...]:
    return (
        s.Map(area="a", pages=600),
        s.Map(area="b", pages=600),
        s.MakeGroup(group="g"),
        s.MakeGroup(group="h"),
        s.Fork(child="c"),
        s.MoveTask(group="g"),
        s.MoveTask(task="c", group="h"),
        s.Touch(area="a", pages=600),
        s.Touch(task="c", area="b", pages=600),
    )


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("CG-013")
def test_a_smaller_limit_takes_pages_of_that_group_alone(sides):
    sides.do(*_two_groups())
    for pages in (40, 150):
        before = sides.there("main", "a")[1]
        usage = sides.live.group_usage("g")
        sides.live.limit_group("g", usage - pages * 4096)
        sides.live.limit_group("g", None)
        taken = before - sides.there("main", "a")[1]
        assert taken > 0
        assert sides.machine.reclaim(taken, group="g").pages == taken
        sides.compare()
        assert sides.there("c", "b") == [600, 600]
    sides.machine.limit_group("g", 100 * 4096)
    assert sides.machine.group_usage("g") <= 100 * 4096
    assert sides.there("c", "b") == [600, 600]


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("CG-015")
def test_a_kernels_usage_is_the_models_and_what_the_model_does_not_have(sides):
    sides.do(*_two_groups())
    for group in ("g", "h"):
        model, kernel = sides.machine.group_usage(group), sides.live.group_usage(group)
        assert 600 * 4096 < model <= kernel <= model + (64 * (os.cpu_count() or 1) << 12) + (4 << 20)


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("CG-016", "CG-017")
@pytest.mark.flaky(
    reruns=3
)  # the interpreter may run meanwhile: its pages are counted before they are on a list
def test_memory_stat_but_for_the_pages_of_the_interpreter(sides):
    if not sides.live.kernel.profile.has("memcg.v1"):
        pytest.skip("memory.stat of version 2 was compared with its source alone")
    sides.do(
        s.Map(area="a", pages=1024, align=2 << 20),
        s.Map(area="b", pages=300),
        s.MemfdCreate(fd="m", pages=100),
        s.Map(area="c", pages=100, flags=1, fd="m"),
        s.MakeGroup(group="g"),
        s.MakeGroup(group="g/h"),
        s.MoveTask(group="g"),
        s.Advise(area="a", pages=1024, advice=14),
        s.Touch(area="a", pages=1),
        s.Touch(area="b", pages=200),
        s.Touch(area="c", pages=50),
        s.Pwrite(fd="m", offset=70 * 4096),
        s.Lock(area="b", pages=20),
        s.Fork(child="k"),
        s.MoveTask(task="k", group="g/h"),
        s.Touch(task="k", area="b", page=10, pages=100),
        s.Touch(task="k", area="c", page=40, pages=30),
        s.Advise(area="b", page=150, pages=50, advice=21),
    )
    sides.live.settle()  # pages of the interpreter may lie in batches, on no list yet
    time.sleep(2.5)  # a kernel adds up what processors have counted every two seconds
    for group in ("g", "g/h"):
        texts = (
            sides.machine.pread(f"/sys/fs/cgroup/memory/{group}/memory.stat", 0, 1 << 16).decode(),
            sides.live.group_file(group, "memory.stat"),
        )
        model, kernel = ({k: int(v) for k, v in map(str.split, text.splitlines())} for text in texts)
        # The process itself has anonymous memory of its own.
        for prefix in ("", "total_"):
            other = kernel.pop(f"{prefix}rss") - model.pop(f"{prefix}rss")
            lists = [{k: v for k, v in side.items() if k.startswith(prefix)} for side in (model, kernel)]
            moved = [side[f"{prefix}inactive_anon"] + side[f"{prefix}active_anon"] for side in lists]
            assert moved[1] - moved[0] == other >= 0
        skipped = {f"{p}{k}" for p in ("", "total_") for k in ("inactive_anon", "active_anon")}
        assert {k: (v, kernel[k]) for k, v in model.items() if k not in skipped and kernel[k] != v} == {}
    with pytest.raises(OSError, match=r"memory\.limit_in_bytes") as caught:
        sides.live.group_file("g", "memory.limit_in_bytes", "much")
    assert caught.value.errno == errno.EINVAL
    for text, shown in (("64M", 64 << 20), ("-1", (1 << 63) - 4096)):
        for bench in (sides.machine, sides.live):
            if bench is sides.live:
                bench.group_file("g", "memory.limit_in_bytes", text)
                found = bench.group_file("g", "memory.limit_in_bytes")
            else:
                name = "/sys/fs/cgroup/memory/g/memory.limit_in_bytes"
                bench.pwrite(name, 0, text.encode())
                found = bench.pread(name, 0, 99).decode()
            assert int(found) == shown


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("CG-014")
def test_at_the_limit_pages_go_and_without_any_to_go_a_process_does(sides):
    sides.do(*_two_groups()[:-2])
    for run in sides.runs:
        run.workbench.limit_group("g", 500 * 4096)
        run.task("main").touch(run.area("a")[0], 600 * 4096)
        assert run.workbench.group_usage("g") <= 500 * 4096
    model, kernel = sides.there("main", "a")
    assert model <= 500
    assert 0 < kernel <= 500
    # Locked memory cannot go.
    ends = ((OutOfMemory, "'g' is at its limit"), (ProcessGone, "the task is gone"))
    for run, (end, words) in zip(sides.runs, ends, strict=True):
        task = run.task("main")
        task.mlock(run.area("a")[0], 600 * 4096, onfault=True)
        with pytest.raises(end, match=words):
            task.touch(run.area("a")[0], 600 * 4096)
        sides.machine.check()


@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_the_simulator_answers_as_the_kernel_did(path):
    answers = answers_from_json(path.read_text(encoding="utf-8"), source=str(path))
    assert answers.program == load_program(HERE / "kept" / "cgroups" / path.name), "record the answers again"
    machine = open_workbench("sim", **SETTINGS, kernel=answers.profile, swap_kind=answers.swap_kind)
    result = replay(answers, machine)
    assert result.agrees, "\n".join(map(str, result.differences))
    assert result.steps == len(answers.program.steps)


@pytest.mark.parametrize("release", ["6.18", "6.12", "6.1"])
def test_each_kept_program_has_an_answer(release):
    answered = [path.name for path in ANSWERS if path.parents[1].name == release]
    assert answered == [path.name for path in KEPT]
    assert len(KEPT) >= 6


def test_every_kept_program_has_groups():
    for path in KEPT:
        assert any(isinstance(step, s.MakeGroup) for step in load_program(path).steps), path.name
