"""Hypothesis strategies for users' own tests: random page-table programs, and machines that have run one."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from pmcore import registry
from pmcore.lockstep.programs import programs
from pmcore.program import run

__all__ = ["machines", "programs"]


@st.composite
def machines(draw: st.DrawFn, /, *, max_steps: int = 20, **settings: Any) -> Any:
    """A simulated machine of these settings in a state that a random program has left; its tasks are alive."""
    machine: Any = registry.open_workbench("sim", **settings)
    run(draw(programs(max_steps=max_steps)), machine)
    return machine
