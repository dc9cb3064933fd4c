"""Lockstep inside a guest, or on this machine: kept programs first, then random ones in runs with seeds of their own.

    python inside.py '{"programs": 100, "seed": 1, "seconds": 600, "swap_device": "/dev/dm-0", "kept": "/files"}'

Writes one JSON text a line: the kernel, each kept program, each run of random programs, a last line. Programs are
counted as compared only if they ran to their end, or to a difference.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from pmcore import registry, spec
from pmcore.errors import NotModelled
from pmcore.lockstep import Result, lockstep
from pmcore.lockstep.session import session
from pmcore.program import load_program, program_to_json
from pmcore.protocols import Workbench

#: Random programs of one run: a difference ends a run, and not the rest.
_RUN = 25


def tell(kind: str, **values: Any) -> None:
    """One line."""
    print(json.dumps({"kind": kind, **values}), flush=True)


def main() -> None:
    """Do what the argument says."""
    wanted = json.loads(sys.argv[1])
    device, size = wanted["swap_device"], wanted["swap"]
    ends = time.monotonic() + wanted["seconds"]
    with registry.open_workbench("procfs", still=True, swap=device or size) as right:
        profile = right.kernel.profile
        kind = "device" if device else "compressed"

        def left() -> Workbench:
            return registry.open_workbench("sim", memory="256 MiB", swap=size, swap_kind=kind, kernel=profile)

        known = {name: profile.has(name) for name in sorted(spec.features())}
        tell(
            "kernel",
            name=profile.name,
            release=os.uname().release,
            capabilities=[n for n, ok in known.items() if ok],
        )
        for path in sorted(Path(wanted["kept"]).glob("*.json")):
            if time.monotonic() < ends:
                _kept(path, left, right)
        _random(wanted, ends, left, right)
    tell("end", complete=time.monotonic() < ends)


def _kept(path: Path, left: Callable[[], Workbench], right: Workbench) -> None:
    program = load_program(path)
    try:
        result = lockstep(program, left(), right)
    except NotModelled as error:
        tell("kept", program=path.stem, not_modelled=error.what)
        return
    tell(
        "kept",
        program=path.stem,
        steps=result.steps,
        scans=result.scans,
        masks=dict(result.masked),
        difference=_words(result) if not result.agrees else None,
    )


def _random(wanted: dict[str, Any], ends: float, left: Callable[[], Workbench], right: Workbench) -> None:
    for number in range(-(-wanted["programs"] // _RUN)):
        if time.monotonic() > ends:
            return
        report = session(
            left,
            lambda: right,
            programs=min(_RUN, wanted["programs"] - number * _RUN),
            seed=wanted["seed"],
            first=number * _RUN,
            profile=right.kernel.profile,
        )
        values = report.as_dict()
        if report.differences:
            values["difference"] = _words(report.differences[0])
        tell("random", **values)


def _words(result: Result) -> dict[str, Any]:
    return {
        "at": result.differs_at,
        "program": json.loads(program_to_json(result.program)),
        "differences": [attrs.asdict(difference) for difference in result.differences],
    }


if __name__ == "__main__":
    main()
