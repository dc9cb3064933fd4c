"""The transcript of a program: its tables after each step, on a simulated machine and on a running kernel."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from pmcore import spec
from pmcore.cli.lockstep import step_words
from pmcore.cli.tables import FrameNames, describe
from pmcore.errors import ArgumentError
from pmcore.lockstep import Comparer, take
from pmcore.profile import KernelProfile, profile_from_row, profile_row
from pmcore.program import Outcome, Program, Run
from pmcore.protocols import Workbench

__all__ = ["profile_of", "transcript"]

_PROFILE = re.compile(r"^<!-- profile (\{.*\}) -->$", re.MULTILINE)
_HEAD = """\
# A page-table program on the simulated machine and on Linux {name}

Made by `pmcore tour --transcript FILE`, on a machine with that kernel, as root; not written by hand. After each step
stands what `pagemap`, `kpagecount` and `kpageflags` show of all pages of the program, first on the simulated machine,
then on the running kernel. Frames are called F1, F2, ... and swap slots S1, S2, ... as they are first seen; "x2" is a
frame mapped twice, "x0" one that is not counted. The step's outcome comes first where there is one.

`pmcore tour --no-live --like FILE --transcript -` makes the simulated side of it again, on any machine.

<!-- profile {profile} -->
"""


def profile_of(path: str) -> KernelProfile:
    """The kernel of a transcript. Raises ArgumentError."""
    try:
        found = _PROFILE.search(Path(path).read_text(encoding="utf-8"))
        if found is not None:
            return profile_from_row(json.loads(found[1]))
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{path}: {error}") from None
    raise ArgumentError(f"{path} is no transcript", remedy="pmcore tour --transcript FILE makes one")


def transcript(
    stops: Iterable[tuple[Any, str, tuple[str, ...]]],
    machine: Workbench,
    bench: Workbench | None,
    *,
    profile: KernelProfile,
) -> tuple[str, bool]:
    """The text, and whether the two sides agreed at every step. Without `bench` it has the simulated side alone."""
    stops = list(stops)
    program = Program(name="tour", steps=tuple(step for step, _, _ in stops))
    sides = [("simulated", Run(program, machine), FrameNames())]
    if bench is not None:
        sides.append((f"Linux {profile.name}", Run(program, bench), FrameNames()))
    row = json.dumps(profile_row(profile), sort_keys=True)
    lines = [_HEAD.format(name=profile.name, profile=row)]
    comparer, agreed = Comparer(), True
    for number, (step, words, rules) in enumerate(stops, start=1):
        lines += [f"## {number}. {step_words(step)}", ""]
        if words:
            lines += [f"{words} {_rules(rules)}", ""]
        outcomes = [run.advance(step) for _, run, _ in sides]
        looks = [take(run) for _, run, _ in sides]
        for (title, _, names), outcome, look in zip(sides, outcomes, looks, strict=True):
            names.keep(look)
            lines += [f"```text {title}", *_outcome(outcome), *describe(look, profile, names), "```", ""]
        if bench is not None:
            agreed &= outcomes[0] == outcomes[1] and not comparer.compare(looks[0], looks[1])
    return "\n".join(lines), agreed


def _rules(names: Iterable[str]) -> str:
    return " ".join(f"[{spec.rule(name).id}]" for name in names)


def _outcome(outcome: Outcome) -> Iterator[str]:
    shown = attrs.asdict(outcome, filter=lambda _field, value: bool(value))
    if shown:
        yield "  " + ", ".join(f"{name} {value!r}" for name, value in shown.items())
