"""Tests that turn the machine's knobs stay together on one worker."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Name the group in the test's id, as xdist's loadgroup wants it: xdist 3.8 forgets to with pytest 9.2."""
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        mark = item.get_closest_marker("xdist_group")
        if mark is not None and "@" not in item.nodeid:
            item._nodeid = f"{item.nodeid}@{mark.args[0]}"
