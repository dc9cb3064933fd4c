"""Ask kernels every kept program again, keep their answers, and show what changed.

    sudo .venv/bin/python tests/lockstep/record_answers.py [PROGRAM.json]...
    .venv/bin/python tests/lockstep/record_answers.py --kernel 6.12 --kernel 6.1
    .venv/bin/python tests/lockstep/record_answers.py --kernel 6.12 --kernel 6.1 --nodes 2

The first asks the running kernel, the second kernels of tests/kernels, booted under software emulation.
Answers are written to tests/lockstep/answers/RELEASE/, those to programs of a folder of kept (disk, cgroups, nodes,
poison) to one of its own; nodes are programs that need two nodes of memory, poison ones that need CONFIG_MEMORY_FAILURE
and memory that may be lost. A file whose answers are the same is left as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = HERE / "kept"
#: Folders of programs that guests are asked alone.
_GUESTS = ("nodes", "poison")
sys.path.append(str(HERE.parents[1]))  # at the end: the installed project comes first

from pmcore.errors import ArgumentError, BackendUnavailable, NotModelled  # noqa: E402
from pmcore.lockstep.answers import Answers, answers_from_json, answers_to_json, ask, changes  # noqa: E402
from pmcore.program import load_program  # noqa: E402
from pmcore.registry import open_workbench  # noqa: E402
from tests.kernels.archive import MatrixError, choices, fetch  # noqa: E402
from tests.kernels.asked import POOL, answers_of  # noqa: E402
from tests.kernels.job import inside  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="*", type=Path, help="these instead of all that are kept")
    names = [choice.name for choice in choices()]
    parser.add_argument("--kernel", action="append", choices=names, help="one of the matrix, again for more")
    parser.add_argument(
        "--nodes", type=int, default=1, help="kept/nodes on guests with so many nodes of memory"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pmcore-kernels"
    parser.add_argument("--cache", type=Path, default=cache)
    options = parser.parse_args()
    keeper = Keeper()
    if not options.kernel:
        every = sorted(path for path in KEPT.rglob("*.json") if path.parent.name not in _GUESTS)
        running(options.programs or every, keeper)
    folders = ["nodes"] if options.nodes > 1 else ["", "cgroups", "disk"]
    paths = options.programs or [path for name in folders for path in sorted((KEPT / name).glob("*.json"))]
    try:
        for choice in choices():
            if choice.name in (options.kernel or ()):
                emulated(fetch(choice, options.cache), paths, keeper, options.cache, options.nodes)
    except MatrixError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{keeper.asked} answers, {keeper.written} files written")
    return 0


class Keeper:
    """Puts answers where they belong, and tells what is not as it was."""

    def __init__(self) -> None:
        self.asked = self.written = 0

    def keep(self, name: str, new: Answers) -> None:
        release = re.match(r"Linux version (\d+\.\d+)", new.version)
        place = HERE / "answers" / (release[1] if release else "unknown") / f"{name}.json"
        self.asked += 1
        if place.is_file():
            old = answers_from_json(place.read_text(encoding="utf-8"), source=str(place))
            result = changes(old, new)
            if old.program == new.program and result.agrees and old.profile == new.profile:
                print(f"{name}: the same")
                return
            if old.program != new.program:
                print(f"{name}: another program")
            elif result.agrees:
                print(f"{name}: the same from another profile")
            else:
                print(f"{name}: changed at step {result.differs_at} (before | now)")
            for difference in result.differences:
                print(f"  {difference}")
        else:
            print(f"{name}: new")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(answers_to_json(new), encoding="utf-8")
        self.written += 1


def running(paths: list[Path], keeper: Keeper) -> None:
    """The running kernel's answers."""
    with open_workbench("procfs", still=True, swap="256 MiB", hugepages=POOL, disk="64 MiB") as bench:
        version = bench.kernel.pread("version", 0, 4096).decode().strip()
        for path in paths:
            bench.renew()
            try:
                answers = ask(load_program(path), bench, version=version)
            except (ArgumentError, BackendUnavailable, NotModelled) as error:
                print(f"{path.stem}: cannot be asked: {error}")
                continue
            below = path.resolve().parent
            name = f"{below.name}/{path.stem}" if below.parent == KEPT else path.stem
            keeper.keep(name, answers_from_json(answers_to_json(answers)))


def emulated(tree: Any, paths: list[Path], keeper: Keeper, cache: Path, nodes: int) -> None:
    """An emulated kernel's answers."""
    below = [path.resolve() for path in paths]
    folders = {path.stem: f"{path.parent.name}/" for path in below if path.parent.parent == KEPT}

    def listen(line: dict[str, Any]) -> None:
        if line["kind"] == "answers" and "cannot" in line:
            print(f"{line['program']}: cannot be asked: {line['cannot']}")
        elif line["kind"] == "answers":
            keeper.keep(folders.get(line["program"], "") + line["program"], answers_of(line))

    wanted = {"programs": 0, "seed": 0, "seconds": 1500, "answers": True, "nodes": nodes}
    wanted["disk"] = any('"openfile"' in path.read_text(encoding="utf-8") for path in paths)
    inside(tree, wanted, paths, cache=cache, listen=listen)


if __name__ == "__main__":
    sys.exit(main())
