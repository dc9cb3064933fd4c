"""What a guest does for us: `inside.py` with a wish, the programs beside it, its lines as they come."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.kernels.archive import HERE, KernelChoice, KernelTree, MatrixError, fetch
from tests.kernels.machine import Told, boot


def inside(
    tree: KernelTree,
    wanted: dict[str, Any],
    programs: Iterable[Path],
    *,
    cache: Path,
    listen: Callable[[dict[str, Any]], object],
) -> Told:
    """Boot that kernel, and have `inside.py` do what is wanted with these programs. Raises MatrixError.

    `listen` is given each line that it writes.
    """
    said: list[str] = []

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "line":
            try:
                line = json.loads(event["text"])
            except ValueError:
                said.append(event["text"])
            else:
                listen(line)

    wish = json.dumps({"swap": "256 MiB", "swap_device": "/dev/dm-0", "kept": "/files", **wanted})
    with tempfile.TemporaryDirectory(dir=cache) as work:
        told = boot(
            tree,
            [["python", "inside.py", wish]],
            cache=cache,
            package=package(Path(work)),
            limit=wanted["seconds"] + 300,
            nodes=wanted.get("nodes", 1),
            levels=wanted.get("levels", 4),
            files=[HERE / "inside.py", *programs],
            listen=hear,
        )
    if not told.done or told.codes.get(0):
        raise MatrixError(f"{tree.choice.name}: no end.\n" + "\n".join([*said[-20:], told.console]))
    return told


def lines_of(
    choice: KernelChoice, script: Path, wish: dict[str, Any], files: Iterable[Path] = (), *, cache: Path
) -> list[dict[str, Any]]:
    """Boot that kernel, run `script` with `wish` and `files` beside it; the lines of JSON that it writes.

    Raises MatrixError, also where the script says that it cannot be done there (a line with "unavailable").
    """
    with tempfile.TemporaryDirectory(dir=cache) as work:
        told = boot(
            fetch(choice, cache),
            [["python", script.name, json.dumps(wish)]],
            cache=cache,
            package=package(Path(work)),
            limit=600,
            files=[script, *files],
        )
    said = told.lines.get(0, [])
    if not told.done or told.codes.get(0):
        raise MatrixError(f"{choice.name}: no end.\n" + "\n".join([*said[-20:], told.console]))
    return available(choice.name, [json.loads(line) for line in said])


def available(name: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines. Raises MatrixError where one says that it cannot be done."""
    for line in lines:
        if "unavailable" in line:
            raise MatrixError(f"{name}: {line['unavailable']}")
    return lines


def write_down(results: Path, name: str, release: str, told: dict[str, Any]) -> None:
    """Keep what came of a kernel."""
    results.mkdir(exist_ok=True)
    text = json.dumps({"release": release, "told": told}, indent=1, sort_keys=True) + "\n"
    (results / f"{name.replace(' ', '-')}.json").write_text(text, encoding="utf-8")


def package(place: Path) -> Path:
    """The installed project in one directory, also where it is installed for editing."""
    target = place / "pmcore"
    for name in ("pmcore", "pmcore.backends", "pmcore.spec"):
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise MatrixError(f"{name} is not installed here")
        source = Path(next(iter(found.submodule_search_locations)))
        where = target.joinpath(*name.split(".")[1:])
        shutil.copytree(source, where, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return target
