"""Other people's mistakes on a real kernel: each case's program, the right reader and the wrong one.

    python mistakes.py '{"folder": "/files", "swap": "/dev/dm-0"}'

Writes one JSON text a line: the kernel, then each case with what came of it. The right reader has to say what is true;
the wrong one something else, and by the case's rules, or to fail.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from pmcore import registry
from pmcore.errors import BackendUnavailable
from pmcore.program import run
from pmcore.program.steps import OpenFile
from pmcore.validate import FunctionTool, Truth, cases, validate
from pmcore.validate.case import Case
from pmcore.validate.says import compare, read_says

SHOWN, RIGHT, NOT_HERE = "shown", "no mistake on this kernel", "not here"
NOT_CONFIGURED, NO_SETTING = "not configured", "no such setting"
_DISK = 32 << 20
_HUGE = "/sys/kernel/mm/transparent_hugepage"


def readers(folder: str) -> tuple[Any, Any]:
    """The modules careful and misuses, from a directory, as a package of their own."""
    package = types.ModuleType("readers")
    package.__path__ = [folder]
    sys.modules["readers"] = package
    return importlib.import_module("readers.careful"), importlib.import_module("readers.misuses")


def needed(case: Case) -> tuple[dict[str, str], Mapping[Any, Any], int]:
    """What the case's machine has set: knobs, hugetlb pages, and the bytes of a disk for its files."""
    policy = case.machine.get("policy", {})
    knobs = {f"{_HUGE}/enabled": policy["pmd"]} if "pmd" in policy else {}
    for size, setting in policy.get("thp_sizes", {}).items():
        knobs[f"{_HUGE}/hugepages-{size}/enabled"] = setting
    disk = _DISK if any(isinstance(step, OpenFile) for step in case.program.steps) else 0
    return knobs, case.machine.get("hugepages", {}), disk


def why_not(case: Case, version: str) -> str:
    """Why a real kernel of that version cannot show the case; "" if it can."""
    if version not in case.kernels:
        return "not of this kernel"
    if case.future_flags:
        return "of a kernel to come"
    return "of somebody without privilege" if case.unprivileged else ""


def judge(case: Case, bench: Any, careful: Any, misuses: Any, version: str) -> str:
    """`SHOWN`, `RIGHT` where the simulated machine of that version says so, too, or what is otherwise."""
    state = run(case.program, bench)
    try:
        bench.settle()
        pid = state.task("main").pid
        areas = [(start, start + length) for start, length in state.areas.values()]
        truth = Truth.of(bench.kernel, pid, within=areas)
        found = compare(read_says(careful.careful(pid, areas)), truth, case)
        if found:
            return f"the right reader: {found[0]}"
        wrong = misuses.WRONG.get(case.name)
        if wrong is None and case.name in misuses.WRONG_OF_RUN:
            wrong = misuses.WRONG_OF_RUN[case.name](state)
        if wrong is None:
            return SHOWN  # a mistake of sums, not of pages: the right reader is all that there is
        try:
            said = wrong(pid, areas)
        except (OSError, ValueError):
            return SHOWN
        broken = {finding.rule for finding in compare(read_says(said), truth, case)}
        if broken & set(case.rules):
            return SHOWN
        simulated = validate(FunctionTool(wrong), [attrs.evolve(case, kernels=(version,))])
        return RIGHT if not broken and simulated.well else f"the wrong reader is right here: {sorted(broken)}"
    finally:
        for task in list(state.tasks.values()):
            task.exit()


def outcomes(version: str, swap: str, folder: str, poison: bool) -> Iterator[tuple[str, str]]:
    """Each case, and what came of it."""
    careful, misuses = readers(folder)
    waiting: dict[str, list[Case]] = {}
    for case in cases():
        reason = why_not(case, version)
        if reason:
            yield case.name, f"{NOT_HERE}: {reason}"
        else:
            waiting.setdefault(json.dumps(needed(case)), []).append(case)
    for wish, some in waiting.items():
        knobs, pools, disk = json.loads(wish)
        settings = {"swap": swap, "knobs": knobs, "hugepages": pools, "disk": disk, "poison": poison}
        if not all(Path(path).exists() for path in knobs) or (disk and not shutil.which("mkfs.ext4")):
            yield from ((case.name, f"{NOT_HERE}: {NO_SETTING}") for case in some)
            continue
        with registry.open_workbench("procfs", still=True, **settings) as bench:
            for case in some:
                if not all(bench.kernel.profile.has(name) for name in case.needs):
                    yield case.name, f"{NOT_HERE}: {NOT_CONFIGURED}"
                    continue
                try:
                    yield case.name, judge(case, bench, careful, misuses, version)
                except BackendUnavailable:
                    if not case.needs:
                        raise
                    yield case.name, f"{NOT_HERE}: {NOT_CONFIGURED}"


def main() -> None:
    """Do what the argument says."""
    wish = json.loads(sys.argv[1])
    release = os.uname().release
    print(json.dumps({"release": release}), flush=True)
    try:
        version, poison = ".".join(release.split(".")[:2]), wish.get("poison", False)
        for name, outcome in outcomes(version, wish["swap"], wish["folder"], poison):
            print(json.dumps({"case": name, "outcome": outcome}), flush=True)
    except BackendUnavailable as error:
        print(json.dumps({"unavailable": str(error)}), flush=True)


if __name__ == "__main__":
    main()
