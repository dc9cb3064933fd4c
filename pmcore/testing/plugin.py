"""The pytest plug-in: a simulated machine and a task on it, for tests of tools that read page tables.

Loaded by pytest where pmcore is installed. Mark a test with `@pytest.mark.sim(memory="1 GiB", kernel="6.1")` to get
another machine. Each test's machine is checked when the test is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pmcore import registry

__all__ = ["sim_machine", "sim_proc", "sim_task"]


def pytest_configure(config: pytest.Config) -> None:
    """Announce the marker."""
    config.addinivalue_line("markers", "sim(**settings): settings of the machine that sim_machine gives")


@pytest.fixture
def sim_machine(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A simulated machine: 64 MiB of memory, 16 MiB of swap, the reference kernel, unless the test is marked."""
    marker = request.node.get_closest_marker("sim")
    settings = {"memory": "64 MiB", "swap": "16 MiB", **(marker.kwargs if marker else {})}
    machine: Any = registry.open_workbench("sim", **settings)
    with machine:
        yield machine
        machine.check()


@pytest.fixture
def sim_task(sim_machine: Any) -> Any:
    """A task on the machine, with nothing mapped."""
    return sim_machine.spawn()


@pytest.fixture
def sim_proc(sim_machine: Any, sim_task: Any) -> Iterator[Any]:
    """While the test runs, /proc and /sys are the machine's, and this process is `sim_task` (`fake_proc`)."""
    from pmcore.testing.fakeproc import fake_proc

    with fake_proc(sim_machine, pid=sim_task.pid) as fake:
        yield fake
