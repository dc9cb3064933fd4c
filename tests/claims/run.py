"""The kernel's own claims, held against simulated machines, the running kernel, and the kernels of the matrix.

    python tests/claims/run.py                         simulated machines of 6.18, 6.12 and 6.1
    sudo python tests/claims/run.py --live             the running kernel
    python tests/claims/run.py --kernel 6.12           a kernel of tests/kernels, booted under software emulation

What came of it is kept in tests/claims/results/, and spec/claims.md is written anew from all that is kept there.
Exits with 1 if a claim fails, 2 where a kernel could not be asked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))  # at the end: the installed project comes first

from tests.claims.claims import FAILS, NOT_MODELLED, PASSES, load  # noqa: E402
from tests.kernels.archive import MatrixError, choices  # noqa: E402
from tests.kernels.job import available, lines_of, write_down  # noqa: E402

STATED, RESULTS, TABLE = HERE / "stated", HERE / "results", ROOT / "spec" / "claims.md"
SIMULATED = ("6.18", "6.12", "6.1")
#: Cases of each selftest, as it counts them itself; of guard-regions.c those about pagemap and PAGEMAP_SCAN.
CASES = {"pagemap_ioctl.c": 115, "soft-dirty.c": 15, "guard-regions.c": 6}


def main() -> int:
    """Ask what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--live", action="store_true", help="the running kernel (as root)")
    names = [choice.name for choice in choices()]
    parser.add_argument("--kernel", action="append", choices=names, help="one of the matrix, again for more")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pmcore-kernels"
    parser.add_argument("--cache", type=Path, default=cache)
    options = parser.parse_args()
    asked: dict[str, list[dict[str, Any]]] = {}
    try:
        if options.live:
            lines = here({"backend": "procfs"})
            asked[".".join(lines[0].get("release", "live").split(".")[:2])] = lines
        for choice in choices():
            if choice.name in (options.kernel or ()):
                asked[choice.name] = lines_of(
                    choice,
                    HERE / "claims.py",
                    {"backend": "procfs", "folder": "/files"},
                    sorted(STATED.glob("*.json")),
                    cache=options.cache,
                )
        if not options.live and not options.kernel:
            asked = {f"sim {version}": here({"backend": "sim", "kernel": version}) for version in SIMULATED}
    except MatrixError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    failed = sum([keep(name, lines) for name, lines in asked.items()])
    TABLE.write_text(table(), encoding="utf-8")
    return int(failed > 0)


def here(wish: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of claims.py in a process of its own."""
    command = [sys.executable, str(HERE / "claims.py"), json.dumps({"folder": str(STATED), **wish})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return available(wish["backend"], [json.loads(line) for line in done.stdout.splitlines()])


def keep(name: str, lines: list[dict[str, Any]]) -> int:
    """Write down what came of a kernel, and say it; the number of expectations that failed."""
    counts: Counter[str] = Counter()
    told = {}
    for line in lines[1:]:
        told[line["claim"]] = line["told"]
        for number, (outcome, why) in enumerate(line["told"]):
            counts[outcome] += 1
            if outcome == FAILS:
                print(f"{name}: {line['claim']}, expectation {number}: {why}")
    write_down(RESULTS, name, lines[0]["release"], told)
    print(
        f"{name} ({lines[0]['release']}): " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    )
    return counts[FAILS]


def table() -> str:
    """The table of spec/claims.md."""
    claims = [load(path) for path in sorted(STATED.glob("*.json"))]
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    order = [name for version in SIMULATED for name in (f"sim-{version}", version) if name in results]
    text = (
        "# What the kernel's own selftests claim\n\n"
        "Made by `python tests/claims/run.py` (simulated machines), `--live` (the running kernel) and `--kernel "
        "NAME` (emulated\nones) from `tests/claims/stated/` and `tests/claims/results/`. Each claim of "
        "`pagemap_ioctl.c`, `soft-dirty.c` and, of\n`guard-regions.c`, of what concerns pagemap, is restated as a "
        "program with what its steps have to answer. A file on a\ndisk is one of the workbench's directory: in "
        "the emulated kernels that lies in memory.\n\n"
        "| selftest | cases | stated | " + " | ".join(f"{name}: cases that pass" for name in order) + " |\n"
        "|---|---|---|" + "---|" * len(order) + "\n"
    )
    for of, count in CASES.items():
        stated = {case for claim in claims if claim.of == of for e in claim.expect for case in e.cases}
        cells = [of, str(count), str(len(stated))]
        for name in order:
            cells.append(str(len(passing(of, claims, results[name]["told"]))))
        text += f"| {' | '.join(cells)} |\n"
    text += "\nReleases: " + ", ".join(f"{name} is {results[name]['release']}" for name in order) + ".\n"
    for of in CASES:
        text += f"\n## {of}\n\n| claim | function | cases | says | rules | " + " | ".join(order) + " |\n"
        text += "|---|---|---|---|---|" + "---|" * len(order) + "\n"
        for claim in (claim for claim in claims if claim.of == of):
            for number, e in enumerate(claim.expect):
                outcomes = [outcome(results[name]["told"], claim.name, number) for name in order]
                cells = [claim.name, f"`{claim.function}`", ", ".join(map(str, e.cases)), e.says]
                text += f"| {' | '.join([*cells, ', '.join(e.rules), *outcomes])} |\n"
    text += "\n## What is stated otherwise than it is tested\n\n"
    text += "".join(
        f"- **{claim.name}** (`{claim.function}`): {claim.differs}\n" for claim in claims if claim.differs
    )
    return text


def outcome(told: dict[str, Any], claim: str, number: int) -> str:
    """What came of an expectation; "not asked" where the claim is newer than the result."""
    return str(told[claim][number][0]) if number < len(told.get(claim, ())) else "not asked"


def passing(of: str, claims: list[Any], told: dict[str, Any]) -> set[int]:
    """The cases that pass: some expectation about them does, and none about them fails.

    A case that is stated twice, over files on a disk as well, passes where one is not modelled and the other passes.
    """
    found: dict[int, set[str]] = {}
    for claim in (claim for claim in claims if claim.of == of):
        for number, e in enumerate(claim.expect):
            for case in e.cases:
                found.setdefault(case, set()).add(outcome(told, claim.name, number))
    return {
        case for case, outcomes in found.items() if PASSES in outcomes and outcomes <= {PASSES, NOT_MODELLED}
    }


if __name__ == "__main__":
    sys.exit(main())
