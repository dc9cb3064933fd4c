"""`check` on the running kernel."""

from __future__ import annotations

import sys

import pytest

import pmcore
from pmcore.analysis.invariants import check
from pmcore.uapi import PageFlag as F


@pytest.mark.rule(
    "IN-001", "IN-002", "IN-003", "IN-004", "IN-005", "IN-006", "IN-007", "IN-008", "IN-009", "IN-010",
    "IN-011", "IN-012", "IN-013", "IN-014", "IN-015", "IN-016", "IN-017", "IN-018", "IN-019", "IN-020",
)  # fmt: skip
@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_the_running_kernel():
    """Of all rules only those with a divergence do not hold: on 6.18 SLAB frames show ANON and KSM."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    with pmcore.open("procfs") as kernel:
        if not kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        health = check(kernel)
        flags = kernel.kpageflags()
    found = {finding.rule: finding for finding in health.findings}
    assert set(found) <= {"IN-007"}, found
    assert set(found) == ({"IN-007"} if (flags.has(F.SLAB) & flags.any(F.ANON | F.KSM)).any() else set())
    assert health.frames == len(flags)
    assert health.entries > 1000
    assert len(health.rules) >= 15
