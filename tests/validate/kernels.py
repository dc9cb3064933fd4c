"""Other people's mistakes on real kernels: the running one, and those of the matrix.

    sudo python tests/validate/kernels.py --live             the running kernel
    python tests/validate/kernels.py --kernel 6.12           a kernel of tests/kernels, booted under software emulation

What came of it is kept in tests/validate/results/, and the table at the end of docs/mistakes.md is written anew.
Exits with 1 if a mistake is not shown where it should be, 2 where a kernel could not be asked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))  # at the end: the installed project comes first

from tests.kernels.archive import MatrixError, choices  # noqa: E402
from tests.kernels.job import available, lines_of, write_down  # noqa: E402
from tests.validate.mistakes import NOT_HERE, RIGHT, SHOWN  # noqa: E402

RESULTS, DOCUMENT = HERE / "results", ROOT / "docs" / "mistakes.md"
SCRIPT, READERS = HERE / "mistakes.py", (HERE / "careful.py", HERE / "misuses.py")
_HEAD = "\n## On real kernels\n"


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
    failed = 0
    try:
        if options.live:
            lines = here()
            failed += keep(".".join(lines[0]["release"].split(".")[:2]), lines)
        for choice in choices():
            if choice.name in (options.kernel or ()):
                wish = {"folder": "/files", "swap": "/dev/dm-0", "poison": True}  # a guest is gone afterwards
                failed += keep(choice.name, lines_of(choice, SCRIPT, wish, READERS, cache=options.cache))
    except MatrixError as error:
        print(f"mistakes: {error}", file=sys.stderr)
        return 2
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text.split(_HEAD)[0] + table(), encoding="utf-8")
    return int(failed > 0)


def here() -> list[dict[str, Any]]:
    """Lines of mistakes.py in a process of its own."""
    wish = json.dumps({"folder": str(HERE), "swap": "64 MiB"})
    command = [sys.executable, str(SCRIPT), wish]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return available("the running kernel", [json.loads(line) for line in done.stdout.splitlines()])


def keep(name: str, lines: list[dict[str, Any]]) -> int:
    """Write down what came of a kernel, and say it; how many cases are not as they should be."""
    told = {line["case"]: line["outcome"] for line in lines[1:]}
    wrong = {case: said for case, said in told.items() if not said.startswith((SHOWN, RIGHT, NOT_HERE))}
    for case, said in wrong.items():
        print(f"{name}: {case}: {said}")
    write_down(RESULTS, name, lines[0]["release"], told)
    print(
        f"{name} ({lines[0]['release']}): {sum(said == SHOWN for said in told.values())} shown, {len(wrong)} not"
    )
    return len(wrong)


def table() -> str:
    """The last section of docs/mistakes.md."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    order = sorted(results, key=lambda name: tuple(map(int, name.split("."))))
    text = f"{_HEAD}\nMade by `python tests/validate/kernels.py --live` and `--kernel NAME`: on each kernel the right "
    text += "reader says what is\ntrue, the wrong one what is not. "
    text += ", ".join(f"{name} is {results[name]['release']}" for name in order) + ".\n\n"
    text += "| case | " + " | ".join(order) + " |\n|---|" + "---|" * len(order) + "\n"
    for case in sorted({case for result in results.values() for case in result["told"]}):
        told = [results[name]["told"].get(case, "not asked") for name in order]
        text += f"| {case} | " + " | ".join(said.removeprefix(f"{NOT_HERE}: ") for said in told) + " |\n"
    return text


if __name__ == "__main__":
    sys.exit(main())
