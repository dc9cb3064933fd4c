"""Other people's mistakes: each case's wrong reading is found, with its rule, and the right one passes.

On simulated machines of all the case's kernels; test_live_mistakes.py does the same on the running kernel.
"""

from __future__ import annotations

import json

import pytest

from pmcore.validate import FunctionTool, cases, validate

from . import kernels, mistakes
from .careful import careful
from .misuses import WRONG, WRONG_OF_RUN

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


@pytest.mark.parametrize("name", WRONG_OF_RUN)
def test_what_the_program_saw_is_wrong_now(name):
    """What mincore said, what pagemap said before: it is in the program's outcomes."""
    case = CASES[name]
    for kernel in case.kernels:
        scene = case.scene(kernel)
        findings = FunctionTool(WRONG_OF_RUN[name](scene.run)).ask(scene)[1]
        assert findings
        assert {finding.rule for finding in findings} <= set(case.rules)


def test_each_case_has_its_wrong_reading():
    """A case without one shows nothing; sums are told by tools alone, and who may not open reads nothing wrong."""
    assert CASES.keys() - WRONG.keys() - WRONG_OF_RUN.keys() == {"huge-pages-of-many-sizes", "who-may-open"}


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
            missing = [f"{mistakes.NOT_HERE}: {mistakes.NO_SETTING}"]
            missing += [f"{mistakes.NOT_HERE}: {mistakes.NOT_CONFIGURED}"] if case.needs else []
            assert told[name] in (mistakes.SHOWN, mistakes.RIGHT, *missing)
    assert sum(outcome == mistakes.SHOWN for outcome in told.values()) >= 12


def test_the_table_is_made_of_the_results():
    text = kernels.DOCUMENT.read_text(encoding="utf-8")
    assert text.endswith(kernels.table()), "python tests/validate/kernels.py --live"
