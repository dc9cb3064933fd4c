"""Pages moved between nodes of memory: what guests with two nodes answered, and the running kernel if it has them."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import attrs
import pytest

from pmcore.lockstep.answers import answers_from_json, replay
from pmcore.program import load_program, run
from pmcore.registry import open_workbench

HERE = Path(__file__).parent
KEPT = sorted((HERE / "kept" / "nodes").glob("*.json"))
ANSWERS = sorted((HERE / "answers").glob("*/nodes/*.json"))


@pytest.mark.rule("MG-001", "MG-002", "MG-003", "MG-004", "MG-005")
@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_the_simulator_answers_as_the_kernel_did(path):
    answers = answers_from_json(path.read_text(encoding="utf-8"), source=str(path))
    assert answers.program == load_program(HERE / "kept" / "nodes" / path.name), "record the answers again"
    machine = open_workbench(
        "sim",
        memory="256 MiB",
        swap="256 MiB",
        kernel=answers.profile,
        swap_kind=answers.swap_kind,
        nodes=2,
    )
    result = replay(answers, machine)
    assert result.agrees, "\n".join(map(str, result.differences))
    assert result.steps == len(answers.program.steps)
    machine.check()


def test_each_kept_program_has_answers_of_two_kernels():
    for release in ("6.12", "6.1"):
        assert {path.name for path in ANSWERS if path.parents[1].name == release} == {
            path.name for path in KEPT
        }


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("MG-001", "MG-002")
def test_the_running_kernel_says_the_same_of_where_pages_are():
    """Also on a machine of one node."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    program = load_program(HERE / "kept" / "move-pages-asked.json")
    with open_workbench("procfs") as live:
        if len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) != 1:
            pytest.skip("pages are on one of several nodes")
        # Nothing is paged out where there may be no swap.
        steps = tuple(step for step in program.steps if getattr(step, "advice", 0) != 21)
        program = attrs.evolve(program, steps=steps)
        answered = run(program, live).outcomes
        assert answered == run(program, open_workbench("sim", kernel=live.kernel.profile)).outcomes
        assert {outcome.errno for outcome in answered} == {0, errno.ENODEV, errno.EINVAL}
