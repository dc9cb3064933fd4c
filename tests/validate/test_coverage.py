"""No family of rules and no kernel is without a case, or without a reason that is written down."""

from __future__ import annotations

import re
from pathlib import Path

from pmcore import spec
from pmcore.profile import preset
from pmcore.validate import cases

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "mistakes.md"


def test_every_family_of_rules_has_a_case_or_a_reason():
    families = {rule.partition("-")[0] for rule in spec.rules()}
    shown = {rule.partition("-")[0] for case in cases() for rule in case.rules}
    text = DOCUMENT.read_text(encoding="utf-8").partition("\n## Families without a case\n")[2]
    reasons = dict(re.findall(r"^\| ([A-Z]{2}) \| (.+) \|$", text, re.MULTILINE))
    assert shown | reasons.keys() == families
    assert not shown & reasons.keys()
    named = set(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+){2,}", " ".join(reasons.values())))
    assert named <= {case.name for case in cases()} | {"page-types-summary"}


def test_every_kernel_is_run_or_does_what_an_earlier_one_does():
    """Versions that nothing in spec/tables/features.toml tells apart need no case of their own."""
    run = {version for case in cases() for version in case.kernels}
    assert run <= {row.version for row in spec.kernels()}
    can: frozenset[str] | None = None
    for row in spec.kernels():
        there = preset(row.version).capabilities
        assert row.version in run or there == can, row.version
        can = there
