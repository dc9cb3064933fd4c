"""Inside a guest, or on this machine: lockstep, or answers to be compared elsewhere. Kept programs, then random ones.

    python inside.py '{"programs": 100, "seed": 1, "seconds": 600, "swap_device": "/dev/dm-0", "kept": "/files"}'

With "answers" programs are only run here, and what the kernel answered is told. With "smaller" kept programs that
differ are made smaller. Writes one JSON text a line: the kernel, each kept program, each run of random programs (each
random program with "answers"), a last line. Programs are counted as compared only if they ran to their end, or to a
difference.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from pmcore import registry, spec
from pmcore.errors import ArgumentError, BackendUnavailable, NotModelled
from pmcore.lockstep import Result, lockstep
from pmcore.lockstep.answers import answers_to_json, ask
from pmcore.lockstep.generator import Seeded, random_program
from pmcore.lockstep.session import session
from pmcore.lockstep.smallest import smallest
from pmcore.program import Program, load_program, program_to_json
from pmcore.protocols import Workbench

#: Random programs of one run, whose figures are one line.
_RUN = 25
#: Size of the disk that files of random programs lie on.
_DISK = "128 MiB"
#: Programs of any subject: half of them are biased to nothing.
_ANY = ("", "", "", "cgroups", "disk", "ksm")
#: Hugetlb pages set aside on both sides, and surplus ones allowed.
_POOL: dict[int | str, tuple[int, int]] = {"2 MiB": (8, 2)}


def tell(kind: str, **values: Any) -> None:
    """One line."""
    print(json.dumps({"kind": kind, **values}), flush=True)


def main() -> None:
    """Do what the argument says."""
    wanted = json.loads(sys.argv[1])
    for length in range(2, 1200):
        words = (np.arange(length, dtype=np.uint64) * np.uint64(7919)) % np.uint64(length + 1)
        if (np.diff(words[np.argsort(words)].astype(np.int64)) < 0).any():
            raise SystemExit("this processor, or its emulation, sorts wrongly: nothing here can be trusted")
    nodes = wanted.get("nodes", 1)
    device, size = wanted["swap_device"], wanted["swap"]
    ends = time.monotonic() + wanted["seconds"]
    disk = {"disk": _DISK} if wanted.get("disk") else {}
    with registry.open_workbench(
        "procfs", still=True, swap=device or size, hugepages=_POOL, poison=bool(device), **disk
    ) as right:
        profile = right.kernel.profile
        kind = "device" if device else "compressed"

        def left() -> Workbench:
            return registry.open_workbench(
                "sim",
                memory="256 MiB",
                swap=size,
                swap_kind=kind,
                disk_kind=right.disk_kind or "compressed",
                kernel=profile,
                hugepages=_POOL,
                nodes=nodes,
            )

        def fresh() -> Workbench:
            right.renew()
            return right

        known = {name: profile.has(name) for name in sorted(spec.features())}
        tell(
            "kernel",
            name=profile.name,
            release=os.uname().release,
            capabilities=[n for n, ok in known.items() if ok],
        )
        for path in sorted(Path(wanted["kept"]).glob("*.json")):
            if time.monotonic() > ends:
                break
            program = load_program(path)
            if wanted.get("answers"):
                _answers(path.stem, program, fresh(), kind)
            else:
                _kept(path.stem, program, left, fresh, smaller=wanted.get("smaller", False))
        if wanted.get("answers"):
            for number in range(wanted["programs"]):
                if time.monotonic() > ends:
                    break
                draw = Seeded(f"{wanted['seed']}:{number}")
                focus = wanted.get("focus", "")
                subject = draw.of(_ANY) if focus == "any" else focus
                program = random_program(draw, profile, hugetlb=False if nodes > 1 else None, focus=subject)
                _answers(f"{wanted['seed']}:{number}", program, fresh(), kind)
        else:
            _random(wanted, ends, left, fresh)
    tell("end", complete=time.monotonic() < ends)


def _answers(name: str, program: Program, right: Workbench, kind: str) -> None:
    version = right.kernel.pread("version", 0, 4096).decode().strip()
    try:
        text = answers_to_json(ask(program, right, version=version, swap_kind=kind))
    except (ArgumentError, BackendUnavailable, NotModelled) as error:
        tell("answers", program=name, cannot=str(error))
        return
    tell("answers", program=name, text=base64.b64encode(zlib.compress(text.encode())).decode())


def _kept(
    name: str,
    program: Program,
    left: Callable[[], Workbench],
    right: Callable[[], Workbench],
    *,
    smaller: bool,
) -> None:
    try:
        result = lockstep(program, left(), right())
    except NotModelled as error:
        tell("kept", program=name, not_modelled=error.what)
        return
    except (ArgumentError, BackendUnavailable) as error:  # what this kernel does not have
        tell("kept", program=name, not_modelled=str(error))
        return
    if smaller and not result.agrees:
        result = smallest(result, left, right, seconds=90)
    tell(
        "kept",
        program=name,
        steps=result.steps,
        scans=result.scans,
        masks=dict(result.masked),
        difference=_words(result) if not result.agrees else None,
    )


def _random(
    wanted: dict[str, Any], ends: float, left: Callable[[], Workbench], right: Callable[[], Workbench]
) -> None:
    for number in range(-(-wanted["programs"] // _RUN)):
        if time.monotonic() > ends:
            return
        report = session(
            left,
            right,
            programs=min(_RUN, wanted["programs"] - number * _RUN),
            seed=wanted["seed"],
            first=number * _RUN,
            most=_RUN,
            profile=right().kernel.profile,
            hugetlb=False if wanted.get("nodes", 1) > 1 else None,
            focus=_ANY if wanted.get("focus") == "any" else wanted.get("focus", ""),
        )
        values = report.as_dict()
        found = zip(report.numbers, report.differences, strict=True)
        values["found"] = [{"number": number, **_words(result)} for number, result in found]
        tell("random", **values)


def _words(result: Result) -> dict[str, Any]:
    return {
        "at": result.differs_at,
        "program": json.loads(program_to_json(result.program)),
        "differences": [attrs.asdict(difference) for difference in result.differences],
    }


if __name__ == "__main__":
    main()
