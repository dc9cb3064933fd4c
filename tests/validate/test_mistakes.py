"""Other people's mistakes: each case's wrong reading is found, with its rule, and the right one passes.

On simulated machines of all the case's kernels; test_live_mistakes.py does the same on the running kernel.
"""

from __future__ import annotations

import json

import pytest

from pmcore.validate import FunctionTool, cases, validate

from . import kernels, mistakes
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


@pytest.mark.parametrize("version", ["6.18", "6.12", "6.1"])
def test_the_kernels_showed_each_mistake(version):
    """All that they can show: what is not theirs, or needs somebody without privilege, is named."""
    told = json.loads((kernels.RESULTS / f"{version}.json").read_text(encoding="utf-8"))["told"]
    assert told.keys() == CASES.keys(), "tests/validate/kernels.py asks again"
    for name, case in CASES.items():
        reason = mistakes.why_not(case, version)
        if reason:
            assert told[name] == f"{mistakes.NOT_HERE}: {reason}"
        else:
            assert told[name] in (mistakes.SHOWN, mistakes.RIGHT, f"{mistakes.NOT_HERE}: no such setting")
    assert sum(outcome == mistakes.SHOWN for outcome in told.values()) >= 12


def test_the_table_is_made_of_the_results():
    text = kernels.DOCUMENT.read_text(encoding="utf-8")
    assert text.endswith(kernels.table()), "python tests/validate/kernels.py --live"
