"""Random page-table programs as Hypothesis strategies, for property tests.

Needs the `test` extra (Hypothesis).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import attrs
from hypothesis import strategies as st

from pmcore.lockstep.generator import KEPT, random_program, random_thp
from pmcore.profile import KernelProfile
from pmcore.program import Program

__all__ = ["KEPT", "programs", "thp_settings"]

T = TypeVar("T")


@attrs.frozen
class _Drawn:
    """Choices that Hypothesis makes, and can make smaller."""

    draw: st.DrawFn

    def of(self, among: Sequence[T]) -> T:
        return self.draw(st.sampled_from(among))

    def integer(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def flip(self) -> bool:
        return self.draw(st.booleans())


@st.composite
def thp_settings(draw: st.DrawFn) -> dict[str, str]:
    """What an administrator may set of huge pages (`Program.thp`)."""
    return random_thp(_Drawn(draw))


@st.composite
def programs(
    draw: st.DrawFn,
    profile: KernelProfile | None = None,
    *,
    max_steps: int = 40,
    hugetlb: bool | None = None,
    thp: st.SearchStrategy[dict[str, str]] | None = None,
    focus: str = "",
) -> Program:
    """A program of up to `max_steps` steps (see `generator.random_program`); `thp` draws what it says of huge pages."""
    settings = draw(thp) if thp is not None else None
    return random_program(
        _Drawn(draw), profile, max_steps=max_steps, hugetlb=hugetlb, thp=settings, focus=focus
    )
