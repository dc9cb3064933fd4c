"""Other people's mistakes: each case's wrong reading is found, with its rule, and the right one passes.

The same readers, and the same programs, on simulated machines of all the case's kernels and on the running kernel.
"""

from __future__ import annotations

import sys

import pytest

from pmcore.program import run
from pmcore.registry import open_workbench
from pmcore.validate import FunctionTool, cases, validate
from pmcore.validate.says import compare, read_says
from pmcore.validate.truth import Truth

from .careful import careful
from .misuses import WRONG, in_core

CASES = {case.name: case for case in cases()}
#: Those that a running 6.18 shows, too.
LIVE = (
    "walk-end-is-not-the-end",
    "dirty-and-swapped",
    "categories-come-with-kernels",
    "clear-bit-without-registration",
    "not-in-core-is-not-gone",
    "clear-refs-is-for-everybody",
    "words-are-64-bits",
    "not-empty-is-not-swapped",
    "protected-pages",
    "one-frame-many-pages",
    "mapped-twice-by-one",
    "private-copies-are-not-the-file",
    "the-zero-page",
    "swap-field-is-no-frame",
    "empty-pages-are-written",
)


@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_reading_is_found(name):
    """On at least one kernel it is wrong, or fails; what is broken are the case's rules."""
    report = validate(FunctionTool(WRONG[name]), [CASES[name]])
    broken = [result for result in report.results if result.broken]
    assert broken, [result.verdict for result in report.results]
    assert set(report.broken) <= set(CASES[name].rules), report.broken
    assert not report.well


@pytest.mark.parametrize("name", CASES)
def test_the_right_reading_passes(name):
    for result in validate(FunctionTool(careful), [CASES[name]]).results:
        assert result.verdict == "right" or (result.verdict == "refused" and CASES[name].may_refuse), result


def test_mincore_of_the_program():
    """What mincore said is in the program's outcomes."""
    case = CASES["not-in-core-is-not-gone"]
    for kernel in case.kernels:
        scene = case.scene(kernel)
        told, findings = FunctionTool(in_core(scene.run)).ask(scene)
        assert [finding.rule for finding in findings] == ["PM-012"]
        assert told == ("present", "swapped")


@pytest.fixture(scope="module")
def bench():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    with open_workbench("procfs") as workbench:
        if not workbench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        yield workbench


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.rule("AC-012", "PM-012", "PM-024", "SC-011", "SC-014", "SC-018", "SC-026", "SC-039")
@pytest.mark.parametrize("name", LIVE)
def test_on_the_running_kernel(bench, name):
    """The right reader says what the kernel's interfaces say through pmcore; the wrong one does not."""
    case = CASES[name]
    state = run(case.program, bench)
    try:
        bench.settle()
        pid, areas = (
            state.task("main").pid,
            [(start, start + length) for start, length in state.areas.values()],
        )
        truth = Truth.of(bench.kernel, pid, within=areas)
        assert compare(read_says(careful(pid, areas)), truth, case) == ()
        reader = WRONG.get(name) or in_core(state)
        if name == "categories-come-with-kernels":
            with pytest.raises(OSError, match="Invalid argument"):
                reader(pid, areas)
            return
        said = reader(pid, areas)
        assert {finding.rule for finding in compare(read_says(said), truth, case)} & set(case.rules)
    finally:
        for task in list(state.tasks.values()):
            task.exit()
