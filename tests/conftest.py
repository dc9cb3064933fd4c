"""Tests that turn the machine's knobs take turns, on whichever worker they run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.tools import build

pytest_plugins = ("tests.counting",)

# How long a busy machine takes says nothing about the code: deadlines are for those who set them.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="module", autouse=True)
def _one_module_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module with live tests runs on one worker at a time, and alone among such modules."""
    items = [item for item in request.session.items if item.path == request.node.path]
    if not any(item.get_closest_marker("xdist_group") for item in items):
        yield
        return
    try:
        import fcntl
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as held:
        lock = held.enter_context(open(Path(tempfile.gettempdir()) / "pmcore-live-tests.lock", "w"))  # noqa: PTH123
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tool(variable: str) -> str:
    found = build.find(variable)
    if found is None:
        pytest.skip(
            f"no {build.TOOLS[variable]}: python tests/tools/build.py makes it, or {variable} names it"
        )
    return found


@pytest.fixture(scope="session")
def page_types() -> str:
    """The kernel's page-types, unchanged."""
    return _tool("PMCORE_PAGE_TYPES")


@pytest.fixture(scope="session")
def thpmaps() -> str:
    """The kernel's thpmaps, unchanged."""
    return _tool("PMCORE_THPMAPS")
