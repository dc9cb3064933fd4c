"""A program that differs, made smaller: steps left out, ranges cut, as long as it differs in the same sort of thing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import attrs

from pmcore.errors import ArgumentError, NotModelled
from pmcore.lockstep.generator import KEPT
from pmcore.lockstep.run import Result, lockstep
from pmcore.program.steps import Exit, Step
from pmcore.protocols import Workbench

__all__ = ["smallest"]


def smallest(
    found: Result,
    left: Callable[[], Workbench],
    right: Callable[[], Workbench],
    *,
    seconds: float = 60.0,
) -> Result:
    """A smaller program than `found` that differs too, by leaving out whatever it differs without.

    Its first difference stays one of the same kind. Looks no longer than about `seconds`: what was reached by then.
    """
    assert found.differs_at is not None
    found = _ending(found)
    until = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for steps in _fewer(found):
            if time.monotonic() > until:
                return found
            result = _again(found, steps, left, right)
            if result is not None:
                found, smaller = result, True
                break
    return found


def _fewer(found: Result) -> Iterator[tuple[Step, ...]]:
    """The program with less of it: half of its steps, one step, a range."""
    steps = found.program.steps
    size = len(steps) // 2
    while size:
        for end in range(len(steps) - 1, 0, -size):
            begin = max(0, end - size)
            if not _careful(steps, steps[begin:end]):
                yield steps[:begin] + steps[end:]
        size //= 2
    for index in range(len(steps) - 1, -1, -1):
        step = steps[index]
        pages = getattr(step, "pages", 1)
        if pages > 1 and hasattr(step, "page") and not _careful(steps, (step,)):
            yield (*steps[:index], attrs.evolve(step, pages=1), *steps[index + 1 :])  # type: ignore[call-arg]


def _careful(steps: tuple[Step, ...], without: tuple[Step, ...]) -> bool:
    """Whether leaving these out could lead a running kernel into a loop (see KEPT)."""
    if not any(getattr(step, "area", "") == KEPT for step in steps):
        return False
    return any(isinstance(step, Exit) or getattr(step, "area", "") == KEPT for step in without)


def _again(
    found: Result, steps: tuple[Step, ...], left: Callable[[], Workbench], right: Callable[[], Workbench]
) -> Result | None:
    """The result of these steps, if they differ as `found` does."""
    try:
        result = lockstep(attrs.evolve(found.program, steps=steps), left(), right())
    except (ArgumentError, NotModelled):
        return None
    if result.agrees or result.differences[0].kind != found.differences[0].kind:
        return None
    return _ending(result)


def _ending(found: Result) -> Result:
    """The same, without the steps after the one that differs."""
    assert found.differs_at is not None
    return attrs.evolve(
        found, program=attrs.evolve(found.program, steps=found.program.steps[: found.differs_at + 1])
    )
