"""Memory failure: what a guest whose memory may be poisoned answered, and a running kernel that knows no such thing."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from pmcore.errors import BackendUnavailable
from pmcore.lockstep.answers import answers_from_json, replay
from pmcore.lockstep.session import session
from pmcore.profile import preset
from pmcore.program import Program, load_program, run
from pmcore.program import steps as s
from pmcore.registry import open_workbench
from pmcore.uapi import Madvise

HERE = Path(__file__).parent
KEPT = sorted((HERE / "kept" / "poison").glob("*.json"))
#: As wherever programs are compared: hugetlb pages set aside, and surplus ones.
POOL = {"2 MiB": (8, 2)}
ANSWERS = sorted((HERE / "answers").glob("*/poison/*.json"))


@pytest.mark.rule("HW-001", "HW-002", "HW-003", "HW-004", "HW-005", "HW-006", "HW-007", "HW-008", "HW-009")
@pytest.mark.rule("HW-010", "HW-011", "HW-012", "HW-013", "HW-015", "HW-016")
@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_the_simulator_answers_as_the_kernel_did(path):
    answers = answers_from_json(path.read_text(encoding="utf-8"), source=str(path))
    assert answers.program == load_program(HERE / "kept" / "poison" / path.name), "record the answers again"
    machine = open_workbench(
        "sim",
        memory="256 MiB",
        swap="256 MiB",
        kernel=answers.profile,
        swap_kind=answers.swap_kind,
        hugepages=POOL,
    )
    result = replay(answers, machine)
    assert result.agrees, "\n".join(map(str, result.differences))
    assert result.steps == len(answers.program.steps)
    machine.check()


def test_each_kept_program_has_an_answer():
    assert {path.name for path in ANSWERS} == {path.name for path in KEPT}


def test_random_programs_poison():
    """Two machines agree, and programs of this subject do reach poisoned pages."""

    def machine():
        return open_workbench("sim", memory="64 MiB", swap="16 MiB", kernel="6.12")

    report = session(
        machine, machine, programs=12, seed=3, hugetlb=False, focus="poison", profile=preset("6.12")
    )
    assert not report.differences
    assert report.reached["signal SIGBUS"] > 3


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("HW-001")
def test_a_kernel_without_it_refuses_and_one_with_it_is_spared():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    steps = (s.Map(area="a", pages=2), s.Touch(area="a", pages=2))
    asked = [
        s.Advise(area="a", pages=pages, advice=int(advice))
        for advice in (Madvise.HWPOISON, Madvise.SOFT_OFFLINE)
        for pages in (1, 0)
    ]
    with open_workbench("procfs") as live:
        if live.kernel.profile.has("mm.memory_failure"):
            with pytest.raises(BackendUnavailable):
                run(Program(name="x", steps=(*steps, asked[0])), live)
            return
        program = Program(name="x", steps=(*steps, *asked))
        answered = run(program, live).outcomes
        assert [outcome.errno for outcome in answered[2:]] == [errno.EINVAL] * 4
        assert answered == run(program, open_workbench("sim", kernel=live.kernel.profile)).outcomes
