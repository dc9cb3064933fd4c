"""Lockstep of files on a disk: the kernel has an ext4 of the workbench's own, the model its disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pmcore.errors import BackendUnavailable
from pmcore.lockstep import lockstep
from pmcore.lockstep.answers import answers_from_json, replay
from pmcore.lockstep.session import session
from pmcore.program import load_program, program_to_json
from pmcore.program import steps as s
from pmcore.registry import open_workbench

HERE = Path(__file__).parent
KEPT = sorted((HERE / "kept" / "disk").glob("*.json"))
ANSWERS = sorted((HERE / "answers").glob("*/disk/*.json"))
SETTINGS = {"memory": "256 MiB", "swap": "256 MiB"}


@pytest.fixture(scope="module")
def live():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    try:
        bench = open_workbench("procfs", swap="256 MiB", disk="256 MiB")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        if not bench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        if not bench.kernel.profile.has("mm.mremap_many"):
            pytest.skip("the model is held against kernels of its own version: this one is older than 6.17")
        yield bench


def model(live):
    return open_workbench("sim", **SETTINGS, kernel=live.kernel.profile, disk_kind=live.disk_kind)


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("DF-001", "DF-004", "DF-008", "DF-011")
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_programs_agree(live, path):
    live.renew()  # nothing read ahead
    result = lockstep(load_program(path), model(live), live)
    assert result.agrees, "\n".join(map(str, result.differences))


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_the_model_agrees_with_the_running_kernel(live):
    """Fixed seeds; PMCORE_LOCKSTEP names how many programs, PMCORE_LOCKSTEP_SEED where they begin."""
    programs = int(os.environ.get("PMCORE_LOCKSTEP", "60"))
    report = session(
        lambda: model(live),
        lambda: live.renew() or live,
        programs=programs,
        seed=int(os.environ.get("PMCORE_LOCKSTEP_SEED", "1")),
        profile=live.kernel.profile,
        hugetlb=False,
        focus="disk",
    )
    told = [
        line
        for found in report.differences
        for line in (program_to_json(found.program), *map(str, found.differences))
    ]
    assert not report.differences, "\n".join(told)
    assert report.reached["step openfile"] > programs // 2
    assert report.masked.keys() <= {"DV-018", "DV-019", "DV-020"}


@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_the_simulator_answers_as_the_kernel_did(path):
    answers = answers_from_json(path.read_text(encoding="utf-8"), source=str(path))
    assert answers.program == load_program(HERE / "kept" / "disk" / path.name), "record the answers again"
    machine = open_workbench("sim", **SETTINGS, kernel=answers.profile, swap_kind=answers.swap_kind)
    result = replay(answers, machine)
    assert result.agrees, "\n".join(map(str, result.differences))
    assert result.steps == len(answers.program.steps)


@pytest.mark.parametrize("release", ["6.18", "6.12", "6.1"])
def test_each_kept_program_has_an_answer(release):
    answered = [path.name for path in ANSWERS if path.parents[1].name == release]
    assert answered == [path.name for path in KEPT]
    assert len(KEPT) >= 12


def test_every_kept_program_uses_a_file():
    for path in KEPT:
        program = load_program(path)
        assert any(isinstance(step, s.OpenFile | s.MemfdCreate) for step in program.steps), path.name
