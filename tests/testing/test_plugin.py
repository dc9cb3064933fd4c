"""What we ship for others' tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from pmcore.testing.strategies import machines

PAGE = 4096


def test_a_machine_for_each_test(sim_machine, sim_task):
    start = sim_task.mmap(4 * PAGE)
    sim_task.write(start, b"x")
    assert sim_machine.process(sim_task.pid).pagemap(start, start + PAGE)[0].present
    assert sim_machine.pids() == [1]


@pytest.mark.sim(memory="8 MiB", kernel="4.19", swap=0)
def test_another_machine(sim_machine):
    assert sim_machine.frame_count() == 2048
    assert sim_machine.profile.name == "4.19"


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(machines(max_steps=12, memory="64 MiB"))
def test_machines_in_any_state(machine):
    machine.check()
    for task in machine.tasks():
        for vma in task.process.maps():
            entries = task.process.pagemap(vma.start, vma.end)
            assert not (entries.exclusive & ~entries.present).any()
