"""A session: many random programs in lockstep, the first that differs shrunk to the smallest that still does.

Needs the `lockstep` extra (Hypothesis).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from pmcore.errors import ArgumentError, NotModelled
from pmcore.lockstep.programs import KEPT, thp_settings
from pmcore.lockstep.programs import programs as random_programs
from pmcore.lockstep.run import Result, lockstep
from pmcore.profile import KernelProfile
from pmcore.program import Program
from pmcore.program.steps import Exit
from pmcore.protocols import Workbench

__all__ = ["Report", "session"]


@attrs.define(kw_only=True)
class Report:
    """What a session came to."""

    seed: int
    programs: int = 0
    steps: int = 0
    scans: int = 0
    seconds: float = 0.0
    #: Programs that were not compared to their end, because of a step that a side does not model; what, and how often.
    not_modelled: Counter[str] = attrs.field(factory=Counter)
    masked: Counter[str] = attrs.field(factory=Counter)
    reached: Counter[str] = attrs.field(factory=Counter)
    #: The smallest program that differs, if any does.
    difference: Result | None = None

    def add(self, result: Result) -> None:
        """Count a program that was compared."""
        self.programs += 1
        self.steps += result.steps
        self.scans += result.scans
        self.masked.update(result.masked)
        self.reached.update(result.reached)

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        found = self.difference
        return {
            "seed": self.seed,
            "programs": self.programs,
            "steps": self.steps,
            "scans": self.scans,
            "seconds": round(self.seconds, 3),
            "differences": 0 if found is None else 1,
            "masks": dict(sorted(self.masked.items())),
            "not_modelled": dict(sorted(self.not_modelled.items())),
            "reached": {key: count for key, count in sorted(self.reached.items()) if count},
        }


_SAMPLED = {"REFERENCED", "ACTIVE", "IDLE"}


class _Differs(Exception):
    """Thrown to Hypothesis, which looks for a smaller program that throws it."""


def session(
    left: Callable[[], Workbench],
    right: Callable[[], Workbench],
    *,
    programs: int,
    steps: int = 40,
    seed: int = 0,
    profile: KernelProfile | None = None,
    hugetlb: bool | None = None,
    thp: Mapping[str, str] | None = None,
    random_thp: bool = False,
    progress: Callable[[Report], object] | None = None,
) -> Report:
    """Compare `programs` random programs of up to `steps` steps; ends early at one that differs, shrunk.

    `left` and `right` give the workbench for a program: a fresh one, or always the same. The programs are such as the
    kernel of `profile` makes interesting. The same seed gives the same programs, with the same version of Hypothesis.
    `hugetlb`: programs with mappings of it, without, or (None) of both sorts.
    `thp` is what every program says of huge pages (`Program.thp`); `random_thp` draws that anew for each, over `thp`.
    """
    report = Report(seed=seed)
    always = dict(thp or {})
    sizes = thp_settings().map(lambda drawn: {**always, **drawn}) if random_thp else st.just(always)
    began = time.monotonic()

    def compare(program: Program) -> None:
        try:
            result = lockstep(program, left(), right())
            if not result.agrees and _sampled(result):
                result = lockstep(program, left(), right())
                result.masked["DV-020"] += 1
        except NotModelled as error:
            if report.difference is None:
                report.not_modelled[error.what] += 1
            return
        if report.difference is None:
            report.add(result)
            report.seconds = time.monotonic() - began
            if progress is not None:
                progress(report)
        if not result.agrees:
            report.difference = result
            raise _Differs

    run = settings(
        max_examples=programs,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )(given(random_programs(profile, max_steps=steps, hugetlb=hugetlb, thp=sizes))(compare))
    try:
        hypothesis_seed(seed)(run)()
    except _Differs as difference:
        difference.__traceback__ = None
        assert report.difference is not None
        report.difference = _without_idle_steps(report.difference, left, right)
    report.seconds = time.monotonic() - began
    return report


def _sampled(result: Result) -> bool:
    """Whether who samples accessed bits (DV-020) may have made the difference: the program is then asked once more.

    Only REFERENCED, ACTIVE and IDLE of a file's frames differ: an access was not noted when its entry was zapped.
    """
    sides = [({*found.left.split("|")}, {*found.right.split("|")}) for found in result.differences]
    return all(found.kind == "kpageflags" for found in result.differences) and all(
        one ^ other <= _SAMPLED and "ANON" not in one for one, other in sides
    )


def _without_idle_steps(
    found: Result, left: Callable[[], Workbench], right: Callable[[], Workbench]
) -> Result:
    """Leave out every step, one after the other, without which the sides still differ in the same sort of thing."""
    assert found.differs_at is not None
    kind = found.differences[0].kind
    steps = list(found.program.steps[: found.differs_at + 1])
    index = len(steps) - 2
    while index >= 0:
        # Taken out, these could lead a running kernel into a loop (see programs.py).
        careful = any(getattr(step, "area", "") == KEPT for step in steps)
        if careful and (isinstance(steps[index], Exit) or getattr(steps[index], "area", "") == KEPT):
            index -= 1
            continue
        fewer = steps[:index] + steps[index + 1 :]
        try:
            result = lockstep(attrs.evolve(found.program, steps=tuple(fewer)), left(), right())
        except (ArgumentError, NotModelled):
            result = None
        if result is not None and result.differs_at is not None and result.differences[0].kind == kind:
            found, steps = result, fewer[: result.differs_at + 1]
            index = min(index, len(steps) - 1)
        index -= 1
    return attrs.evolve(found, program=attrs.evolve(found.program, steps=tuple(steps)))
