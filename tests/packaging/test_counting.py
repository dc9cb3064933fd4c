"""The tests' last line counts what was compared, and what was skipped."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from tests.counting import line


def test_the_line():
    counts = Counter(
        {
            "live programs": 2,
            "live steps": 80,
            "recorded programs": 3,
            "recorded steps": 9,
            "mask DV-019": 7,
        }
    )
    skipped = [
        SimpleNamespace(longrepr=("file", 3, "Skipped: needs root")),
        SimpleNamespace(longrepr=("file", 9, "Skipped: needs root")),
    ]
    assert line(counts, skipped) == (
        "lockstep: 2 programs live (80 steps); 3 programs recorded (9 steps); masks DV-019 7; "
        "2 tests skipped (2: needs root)"
    )
    assert line(Counter({"simulated programs": 1}), []).endswith("masks none; 0 tests skipped")
