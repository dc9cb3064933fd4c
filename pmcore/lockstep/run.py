"""Lockstep: one program, two workbenches, every difference. Knows neither backend."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
import numpy as np

from pmcore.errors import NotModelled
from pmcore.geometry import align_up
from pmcore.lockstep.compare import Comparer, Difference
from pmcore.lockstep.look import Look, take
from pmcore.lockstep.reached import Reached
from pmcore.program import Outcome, Program, Run
from pmcore.program.steps import Advise, Compact, Map, Scan, Step
from pmcore.protocols import Workbench
from pmcore.uapi import Madvise, MapFlag, PageFlag

__all__ = ["Result", "lockstep", "renewed"]


@attrs.frozen(kw_only=True, eq=False)
class Result:
    """What came of a program: the step after which the sides differed (None: they agree), and what differed."""

    program: Program
    steps: int
    scans: int
    differs_at: int | None = None
    differences: tuple[Difference, ...] = ()
    looks: tuple[Look, Look] | None = None
    masked: Counter[str] = attrs.field(factory=Counter)
    #: What was reached, counted: words like "step fork", "errno 22".
    reached: Counter[str] = attrs.field(factory=Counter)

    @property
    def agrees(self) -> bool:
        """Whether no step differed."""
        return self.differs_at is None


def lockstep(program: Program, left: Workbench, right: Workbench) -> Result:
    """Run `program` on both, and compare outcomes and looks after each step; ends at the first that differs.

    The tasks are ended; the workbenches stay open. Raises ArgumentError for a program that names what it has not made,
    NotModelled before the right side poisons its zero page: all programs after this one would meet it.
    """
    runs = Run(program, left), Run(program, right)
    comparer, reached = Comparer(watched=left.watched or right.watched), Reached()
    scans = 0
    try:
        for number, step in enumerate(program.steps):
            first = runs[0].advance(step), take(runs[0])
            _spare(step, first[1])
            outcomes = first[0], runs[1].advance(step)
            scans += isinstance(step, Scan)
            reached.step(step, outcomes[0])
            looks = first[1], take(runs[1])
            found = [*_outcomes(step, *outcomes), *comparer.compare(*looks, renewed(runs[0], step))]
            if found:
                return Result(
                    program=program,
                    steps=number + 1,
                    scans=scans,
                    differs_at=number,
                    differences=tuple(found),
                    looks=looks,
                    masked=comparer.masked,
                    reached=reached.counts,
                )
            reached.look(looks[0])
        return Result(
            program=program,
            steps=len(program.steps),
            scans=scans,
            masked=comparer.masked,
            reached=reached.counts,
        )
    finally:
        for run in runs:
            run.end()


def _spare(step: Step, left: Look) -> None:
    """Raise NotModelled if the step has poisoned the zero page."""
    if isinstance(step, Advise) and step.advice == Madvise.HWPOISON:
        lost = np.uint64(PageFlag.HWPOISON | PageFlag.ZERO_PAGE)
        if ((left.kpageflags & lost) == lost).any():
            raise NotModelled(
                "poisoning the zero page of a kernel that goes on running: it stays so for good"
            )


def renewed(run: Run, step: Step) -> tuple[int, int]:
    """The addresses that a step maps anew, whatever was there: up to the end of a huge page where it is of hugetlb.

    Where any page may have moved they are all.
    """
    if isinstance(step, Compact):
        return 0, 1 << 63
    if not isinstance(step, Map) or step.area not in run.areas:
        return 0, 0
    start, length = run.areas[step.area]
    huge = 1 << (step.flags >> 26 & 63 or 21)
    return start, start + (align_up(length, huge) if step.flags & MapFlag.HUGETLB else length)


def _outcomes(step: Step, left: Outcome, right: Outcome) -> list[Difference]:
    if left == right:
        return []
    return [Difference("outcome", type(step).__name__.lower(), _words(left), _words(right))]


def _words(outcome: Outcome) -> str:
    shown: dict[str, Any] = attrs.asdict(outcome, filter=lambda _field, value: bool(value))
    text = str(shown) if shown else "ok"
    return text if len(text) < 800 else text[:800] + "..."
