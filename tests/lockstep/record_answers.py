"""Ask the running kernel every kept program again, keep its answers, and show what changed.

    sudo .venv/bin/python tests/lockstep/record_answers.py [PROGRAM.json]...

Answers are written to tests/lockstep/answers/RELEASE/, those to programs of kept/disk to its folder disk. A file whose
answers are the same is left as it is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pmcore.lockstep.answers import answers_from_json, answers_to_json, ask, changes
from pmcore.program import load_program
from pmcore.registry import open_workbench

HERE = Path(__file__).resolve().parent


def main(paths: list[Path]) -> int:
    changed = 0
    with open_workbench("procfs", still=True, swap="256 MiB", disk="64 MiB") as bench:
        version = bench.kernel.pread("version", 0, 4096).decode().strip()
        release = re.match(r"Linux version (\d+\.\d+)", version)
        folder = HERE / "answers" / (release[1] if release else "unknown")
        for path in paths:
            place = (
                folder / path.relative_to(HERE / "kept") if path.is_relative_to(HERE) else folder / path.name
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            new = answers_from_json(answers_to_json(ask(load_program(path), bench, version=version)))
            if place.is_file():
                old = answers_from_json(place.read_text(encoding="utf-8"), source=str(place))
                result = changes(old, new)
                if old.program == new.program and result.agrees:
                    print(f"{path.stem}: the same")
                    continue
                print(f"{path.stem}: changed at step {result.differs_at} (before | now)")
                for difference in result.differences:
                    print(f"  {difference}")
            else:
                print(f"{path.stem}: new")
            place.write_text(answers_to_json(new), encoding="utf-8")
            changed += 1
    print(f"{len(paths)} programs asked, {changed} files written")
    return 0


if __name__ == "__main__":
    named = [Path(argument).resolve() for argument in sys.argv[1:]]
    sys.exit(main(named or sorted((HERE / "kept").rglob("*.json"))))
