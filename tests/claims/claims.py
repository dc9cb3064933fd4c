"""What the kernel's own selftests claim, restated: programs of ours, and what their steps have to answer.

    python claims.py '{"backend": "procfs", "folder": "/files", "swap": "/dev/dm-0"}'

A file of tests/claims/stated/ names the selftest and the function that it restates, the capabilities that it needs,
a program, and what is expected of steps: each expectation with the rules behind it, and the numbers of the
selftest's cases that it stands for (in the order in which the selftest tells them). Writes one JSON text a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from pmcore import registry
from pmcore.errors import BackendUnavailable, FormatError, NotModelled
from pmcore.profile import KernelProfile
from pmcore.program import Outcome, Program, Run, program_from_json
from pmcore.protocols import Workbench

#: Hugetlb pages set aside for the claims about them, and surplus ones allowed.
POOL: dict[int | str, tuple[int, int]] = {"2 MiB": (8, 2)}
PASSES, FAILS, ABSENT, NOT_MODELLED = "passes", "fails", "not there", "not modelled"


@attrs.frozen(kw_only=True)
class Expectation:
    """What one step has to answer: see `_CHECKS` for what can be asked for."""

    says: str
    step: int
    cases: tuple[int, ...]
    rules: tuple[str, ...]
    asks: dict[str, Any]


@attrs.frozen(kw_only=True)
class Claim:
    """A program, and what is expected of it."""

    name: str
    #: The selftest, and the function of it that is restated.
    of: str
    function: str
    #: What is not as in the selftest, if anything.
    differs: str
    needs: tuple[str, ...]
    program: Program
    expect: tuple[Expectation, ...]

    def missing(self, profile: KernelProfile) -> list[str]:
        """The capabilities that the kernel of that profile has not."""
        return [name for name in self.needs if not profile.has(name)]


@attrs.frozen(kw_only=True)
class Told:
    """What came of an expectation: "passes", "fails", "not there" or "not modelled"; and in words why."""

    expectation: Expectation
    outcome: str
    why: str = ""


def load(path: Path) -> Claim:
    """The claim of that file. Raises FormatError."""
    data = json.loads(path.read_text(encoding="utf-8"))
    try:
        expect = []
        for row in data.pop("expect"):
            common = {key: row.pop(key) for key in ("says", "step")}
            cases, rules = tuple(row.pop("cases")), tuple(row.pop("rules"))
            unknown = row.keys() - _CHECKS.keys()
            if unknown or not row:
                raise FormatError(
                    f"{common['says']}: asks for {sorted(unknown) or 'nothing'}", source=str(path)
                )
            expect.append(Expectation(**common, cases=cases, rules=rules, asks=row))
        program = program_from_json(json.dumps(data.pop("program")), source=str(path))
        claim = Claim(
            name=path.stem,
            needs=tuple(data.pop("needs")),
            program=program,
            expect=tuple(expect),
            **data,
        )
    except (TypeError, KeyError) as error:
        raise FormatError(f"no claim: {error}", source=str(path)) from None
    for expectation in claim.expect:
        if not 0 <= expectation.step < len(program.steps):
            raise FormatError(f"{expectation.says}: there is no step {expectation.step}", source=str(path))
    return claim


def try_claim(claim: Claim, workbench: Workbench) -> list[Told]:
    """Run the claim's program, and hold each expectation against what its step answered."""
    absent = claim.missing(workbench.kernel.profile)
    if absent:
        return [Told(expectation=e, outcome=ABSENT, why=", ".join(absent)) for e in claim.expect]
    run = Run(claim.program, workbench)
    told: list[Told] = []
    wanted = list(claim.expect)
    try:
        for number, step in enumerate(claim.program.steps):
            try:
                outcome = run.advance(step)
            except NotModelled as error:
                rest = [Told(expectation=e, outcome=NOT_MODELLED, why=error.what) for e in wanted]
                return [*told, *rest]
            for expectation in [e for e in wanted if e.step == number]:
                wanted.remove(expectation)
                why = "; ".join(wrong(expectation, outcome, run))
                told.append(Told(expectation=expectation, outcome=FAILS if why else PASSES, why=why))
    finally:
        for task in list(run.tasks.values()):
            task.exit()
    return told


def wrong(expectation: Expectation, outcome: Outcome, run: Run) -> Iterator[str]:
    """What is not as expected, in words."""
    for key, value in expectation.asks.items():
        found = _CHECKS[key](outcome, run, value)
        if found != value:
            yield f"{key} is {found}, and not {value}"


# -- what can be asked for: each gives what was found, in the words of what is expected ------------------


def _regions(outcome: Outcome) -> list[list[int]]:
    value = outcome.value if isinstance(outcome.value, dict) else {}
    return [list(region) for region in value.get("regions", [])]


def _pages(outcome: Outcome, _run: Run, value: list[int]) -> list[int]:
    number = sum(end - start for start, end, _ in _regions(outcome))
    return value if value[0] <= number <= value[1] else [number, number]


def _bits(outcome: Outcome, _run: Run, value: dict[str, Any]) -> dict[str, Any]:
    words = outcome.value["words"] if isinstance(outcome.value, dict) else []
    return {**value, "pages": "".join(str(word >> value["bit"] & 1) for word in words)}


def _huge(_outcome: Outcome, run: Run, value: dict[str, Any]) -> dict[str, Any]:
    start, length = run.area(value["area"])
    found = run.task("main").process.smaps(start, start + length)
    return {**value, "KiB": sum(entry.counters["AnonHugePages"] for entry in found) >> 10}


_CHECKS: dict[str, Any] = {
    # Whether the step was neither refused nor killed.
    "done": lambda outcome, _run, _value: not outcome.errno and outcome.signal is None,
    "errno": lambda outcome, _run, _value: outcome.errno,
    "signal": lambda outcome, _run, _value: outcome.signal,
    # Regions of a scan: [first page, page behind the last, categories].
    "regions": lambda outcome, _run, _value: _regions(outcome),
    "count": lambda outcome, _run, _value: len(_regions(outcome)),
    # Pages of all regions: at least, at most.
    "pages": _pages,
    # Categories that all regions show.
    "all": lambda outcome, _run, value: value if all(r[2] & value == value for r in _regions(outcome)) else 0,
    # [first page, page behind the last] of each region.
    "ranges": lambda outcome, _run, _value: [region[:2] for region in _regions(outcome)],
    "walk_end": lambda outcome, _run, _value: outcome.value["walk_end"] if outcome.value else None,
    # A bit of the words of a read of pagemap: {"bit": 55, "pages": "1101"}.
    "bits": _bits,
    # Memory in huge pages that PMDs map, by smaps.
    "huge": _huge,
    # Text that a read gave.
    "text": lambda outcome, _run, _value: outcome.value.decode() if outcome.value is not None else None,
}


def main() -> None:
    """Hold all claims of a folder against a backend."""
    wish = json.loads(sys.argv[1])
    options = {"still": True, "swap": wish.get("swap", 0), "hugepages": POOL}
    if wish["backend"] == "sim":
        options = {"memory": "256 MiB", "kernel": wish["kernel"], "hugepages": POOL}
    try:
        with registry.open_workbench(wish["backend"], **options) as bench:
            version = wish.get("kernel") or bench.kernel.pread("version", 0, 4096).decode().split()[2]
            print(json.dumps({"kind": "kernel", "release": version}), flush=True)
            for path in sorted(Path(wish["folder"]).glob("*.json")):
                bench.renew()
                told = [[t.outcome, t.why] for t in try_claim(load(path), bench)]
                print(json.dumps({"kind": "claim", "claim": path.stem, "told": told}), flush=True)
    except BackendUnavailable as error:
        print(json.dumps({"unavailable": str(error)}), flush=True)


if __name__ == "__main__":
    main()
