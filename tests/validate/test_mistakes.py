"""Other people's mistakes: each case's wrong reading is found, with its rule, and the right one passes.

On simulated machines of all the case's kernels; test_live_mistakes.py does the same on the running kernel.
"""

from __future__ import annotations

import pytest

from pmcore.validate import FunctionTool, cases, validate

from .careful import careful
from .misuses import WRONG, in_core

CASES = {case.name: case for case in cases()}


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
