"""A session: many random programs in lockstep, those that differ made as small as they still do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from pmcore.errors import NotModelled
from pmcore.lockstep.generator import Seeded, random_program
from pmcore.lockstep.generator import random_thp as random_huge_pages
from pmcore.lockstep.run import Result, lockstep
from pmcore.lockstep.smallest import smallest
from pmcore.profile import KernelProfile
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
    #: The programs that differ, made as small as they still do, and their numbers.
    differences: list[Result] = attrs.field(factory=list)
    numbers: list[int] = attrs.field(factory=list)

    def add(self, result: Result) -> None:
        """Count a program that was compared."""
        self.programs += 1
        self.steps += result.steps
        self.scans += result.scans
        self.masked.update(result.masked)
        self.reached.update(result.reached)

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return {
            "seed": self.seed,
            "programs": self.programs,
            "steps": self.steps,
            "scans": self.scans,
            "seconds": round(self.seconds, 3),
            "differences": len(self.differences),
            "masks": dict(sorted(self.masked.items())),
            "not_modelled": dict(sorted(self.not_modelled.items())),
            "reached": {key: count for key, count in sorted(self.reached.items()) if count},
        }


_SAMPLED = {"REFERENCED", "ACTIVE", "IDLE"}


def session(
    left: Callable[[], Workbench],
    right: Callable[[], Workbench],
    *,
    programs: int,
    steps: int = 40,
    seed: int = 0,
    first: int = 0,
    most: int = 1,
    profile: KernelProfile | None = None,
    hugetlb: bool | None = None,
    thp: Mapping[str, str] | None = None,
    random_thp: bool = False,
    mixed_thp: bool = False,
    focus: str | Sequence[str] = "",
    progress: Callable[[Report], object] | None = None,
    found: Callable[[Result], object] | None = None,
) -> Report:
    """Compare `programs` random programs of up to `steps` steps; ends early once `most` of them differ.

    `left` and `right` give the workbench for a program: a fresh one, or always the same. The programs are such as the
    kernel of `profile` makes interesting. Program `n` of a seed is always the same, whatever comes before it: `first`
    is the number of the first one that is run. `hugetlb`: programs with mappings of it, without, or (None) of both
    sorts. `thp` is what every program says of huge pages (`Program.thp`); `random_thp` draws that anew for each, over
    `thp`, `mixed_thp` for every second one. `focus` is the subject that programs are biased to; of several, "" among
    them, each program draws its own. A program that differs is made smaller before the next is run, and given to
    `found`.
    """
    report = Report(seed=seed)
    slow_disk = right().disk_kind == "disk"
    began = time.monotonic()
    for number in range(first, first + programs):
        draw = Seeded(f"{seed}:{number}")
        subject = focus if isinstance(focus, str) else draw.of(focus)
        at_random = random_thp or (mixed_thp and draw.flip())
        settings = {**(thp or {}), **(random_huge_pages(draw) if at_random else {})}
        program = random_program(
            draw,
            profile,
            max_steps=steps,
            hugetlb=hugetlb,
            thp=settings,
            focus=subject,
            slow_disk=slow_disk,
        )
        try:
            result = lockstep(program, left(), right())
            if not result.agrees and right().watched and _sampled(result):
                result = lockstep(program, left(), right())
                result.masked["DV-020"] += 1
        except NotModelled as error:
            report.not_modelled[error.what] += 1
            continue
        report.add(result)
        report.seconds = time.monotonic() - began
        if progress is not None:
            progress(report)
        if not result.agrees:
            report.differences.append(smallest(result, left, right))
            report.numbers.append(number)
            if found is not None:
                found(report.differences[-1])
            if len(report.differences) >= most:
                break
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
