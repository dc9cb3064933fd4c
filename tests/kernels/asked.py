"""What a guest answered to programs, kept in the cache, and held against the simulated machine here.

A guest that only answers is done in half the time, and what has been fixed since can be tried without booting it again.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from pmcore.errors import NotModelled
from pmcore.lockstep.answers import Answers, answers_from_json, replay
from pmcore.lockstep.run import Result
from pmcore.program import program_to_json
from pmcore.protocols import Workbench
from pmcore.registry import open_workbench

#: Hugetlb pages set aside, and surplus ones allowed: as everywhere in lockstep.
POOL: dict[int | str, tuple[int, int]] = {"2 MiB": (8, 2)}


def answers_of(line: dict[str, Any]) -> Answers:
    """The answers in a guest's line. Raises FormatError."""
    text = zlib.decompress(base64.b64decode(line["text"])).decode()
    return answers_from_json(text, source=line["program"])


def machine_for(answers: Answers) -> Workbench:
    """A simulated machine such as the one that answered."""
    return open_workbench(
        "sim",
        memory="256 MiB",
        swap="256 MiB",
        swap_kind=answers.swap_kind,
        kernel=answers.profile,
        hugepages=POOL,
    )


def compared(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A guest's lines with what came of each program in place of its answers, as lockstep inside it would tell."""
    for line in lines:
        if line["kind"] != "answers":
            yield line
            continue
        kind = "random" if ":" in line["program"] else "kept"
        if "cannot" in line:
            yield {"kind": "kept", "program": line["program"], "not_modelled": line["cannot"]}
            continue
        answers = answers_of(line)
        try:
            result = replay(answers, machine_for(answers))
        except NotModelled as error:
            yield {"kind": "kept", "program": line["program"], "not_modelled": error.what}
            continue
        found = [] if result.agrees else [{"number": line["program"], **_words(result)}]
        yield {
            "kind": kind,
            "program": line["program"],
            "programs": 1,
            "steps": result.steps,
            "scans": result.scans,
            "masks": dict(result.masked),
            "found": found,
        }


def _words(result: Result) -> dict[str, Any]:
    assert result.differs_at is not None
    steps = result.program.steps[: result.differs_at + 1]
    return {
        "at": result.differs_at,
        "program": json.loads(program_to_json(attrs.evolve(result.program, steps=steps))),
        "differences": [attrs.asdict(difference) for difference in result.differences],
    }


def saved(place: Path) -> list[dict[str, Any]]:
    """The lines that were kept there. Raises OSError."""
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
