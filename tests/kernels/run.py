"""The kernel matrix: the simulated machine in lockstep with real kernels, each booted under software emulation.

    tox -e kernels                                   each kernel of kernels.toml: kept programs, 50 random ones
    tox -e kernels -- --kernel 6.12 --programs 500   one of them, longer
    tox -e kernels -- --kernel 6.12 --ask            it only answers, and is compared here: half the time
    tox -e kernels -- --kernel 6.12 --again          what it answered last is compared again, nothing is booted
    tox -e kernels -- --kernel 6.12 --levels 5       page tables of five levels
    tox -e kernels -- --kernel live                  the running kernel by the same programs (as root)
    tox -e kernels -- --table                        spec/kernels.md anew from the results that are kept

Needs Debian's apt (kernels come from its archive, into a cache of our own) and qemu-system-x86_64, no root. Exits
with 0 if all agree, 1 at a difference, 2 where it could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # at the end: the installed project comes first

from tests.kernels.archive import HERE, KernelTree, MatrixError, choices, fetch  # noqa: E402
from tests.kernels.asked import compared, saved  # noqa: E402
from tests.kernels.job import inside  # noqa: E402
from tests.kernels.table import summary, write_table  # noqa: E402

RESULTS = HERE / "results"
ANSWERS = ROOT / "tests" / "lockstep" / "answers"
LIVE = "live"
#: Folders of kept programs that go with a focus; without one those that every kernel is asked.
_FOLDERS = {"any": ["", "cgroups", "disk"], "cgroups": ["cgroups"], "disk": ["disk"], "poison": ["poison"]}


def main() -> int:
    """Run what the command line asks for."""
    options = _options()
    try:
        wanted = [choice for choice in choices() if not options.kernel or choice.name in options.kernel]
        failed = False
        if options.table:
            write_table(RESULTS, ROOT / "spec" / "kernels.md", ANSWERS)
            return 0
        for choice in wanted:
            tree = fetch(choice, options.cache)
            told = _asked(tree, options) if options.ask or options.again else _guest(tree, options)
            failed |= _report(choice.name, told, options)
        if options.kernel and LIVE in options.kernel:
            failed |= _report(LIVE, _live(options), options)
    except MatrixError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    return int(failed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [choice.name for choice in choices()]
    parser.add_argument(
        "--kernel", action="append", choices=[*names, LIVE], help="one of them (again for more)"
    )
    parser.add_argument("--programs", type=int, default=50, help="random programs for each kernel")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=25, help="for each kernel, then it ends")
    parser.add_argument("--replay", type=Path, action="append", help="this program instead of the kept ones")
    parser.add_argument("--levels", type=int, choices=(4, 5), default=4, help="levels of page tables")
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        help="so many nodes of memory, and programs that move pages between them",
    )
    parser.add_argument("--focus", default="", help="a subject that programs are about, or any")
    parser.add_argument("--ask", action="store_true", help="have it answer only, and compare here")
    parser.add_argument("--again", action="store_true", help="compare what it answered last with that seed")
    parser.add_argument("--record", action="store_true", help="keep the result for the table of spec/")
    parser.add_argument("--table", action="store_true", help="write spec/kernels.md and end")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pmcore-kernels"
    parser.add_argument("--cache", type=Path, default=cache)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    return options


def _wanted(options: argparse.Namespace, **values: Any) -> dict[str, Any]:
    wanted = {"programs": options.programs, "seed": options.seed, "seconds": options.minutes * 60}
    if options.levels != 4:
        wanted["levels"] = options.levels
    if options.nodes > 1:
        wanted |= {"nodes": options.nodes, "focus": "nodes"}
    if options.focus:
        wanted |= {"focus": options.focus, "disk": options.focus in ("any", "disk")}
    return {**wanted, **values}


def _kept(options: argparse.Namespace) -> list[Path]:
    kept = ROOT / "tests" / "lockstep" / "kept"
    folders = ["nodes"] if options.nodes > 1 else _FOLDERS.get(options.focus, [""])
    return options.replay or [path for folder in folders for path in sorted((kept / folder).glob("*.json"))]


def _guest(tree: KernelTree, options: argparse.Namespace) -> dict[str, Any]:
    """What lockstep inside a guest told, line by line."""
    lines: list[dict[str, Any]] = []

    def listen(line: dict[str, Any]) -> None:
        lines.append(line)
        _progress(tree.choice.name, line)

    wanted = _wanted(options, smaller=bool(options.replay))
    inside(tree, wanted, _kept(options), cache=options.cache, listen=listen)
    return {"lines": lines, "kernel": _kernel(tree)}


def _asked(tree: KernelTree, options: argparse.Namespace) -> dict[str, Any]:
    """What a guest answered, kept in the cache, compared here."""
    place = options.cache / f"asked-{tree.choice.name}-{options.seed}.jsonl"
    if not options.again:
        count = 0
        with place.with_suffix(".part").open("w", encoding="utf-8") as out:

            def listen(line: dict[str, Any]) -> None:
                nonlocal count
                out.write(json.dumps(line) + "\n")
                out.flush()
                count += line["kind"] == "answers"
                if line["kind"] == "answers" and count % 25 == 0:
                    print(f"{tree.choice.name}: {count} programs answered", flush=True)

            inside(tree, _wanted(options, answers=True), _kept(options), cache=options.cache, listen=listen)
        place.with_suffix(".part").rename(place)
    if not place.exists():
        raise MatrixError(f"{tree.choice.name}: nothing was asked with seed {options.seed}: --ask first")
    lines = []
    for line in compared(saved(place)):
        lines.append(line)
        if line.get("found"):
            print(f"{tree.choice.name}: program {line['program']}: a difference", flush=True)
    return {"lines": lines, "kernel": _kernel(tree)}


def _kernel(tree: KernelTree) -> dict[str, Any]:
    config = tree.config.read_text(encoding="utf-8")
    return {
        "release": tree.release,
        "package": tree.package,
        "config": [line for line in config.splitlines() if line.partition("=")[0] in _CONFIG],
        "swap": "device-mapper over a disk of memory",
    }


#: What of a configuration is told.
_CONFIG = (
    *(
        "CONFIG_MEM_SOFT_DIRTY",
        "CONFIG_TRANSPARENT_HUGEPAGE",
        "CONFIG_KSM",
        "CONFIG_USERFAULTFD",
        "CONFIG_MEMCG",
    ),
    *(
        "CONFIG_PTE_MARKER_UFFD_WP",
        "CONFIG_IDLE_PAGE_TRACKING",
        "CONFIG_ZSWAP",
        "CONFIG_LRU_GEN",
        "CONFIG_NUMA",
    ),
    "CONFIG_NO_PAGE_MAPCOUNT",
)


def _live(options: argparse.Namespace) -> dict[str, Any]:
    """The same on this machine."""
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for path in _kept(options):
            shutil.copy(path, work)
        wanted = json.dumps(_wanted(options, swap="256 MiB", swap_device="", kept=work))
        command = [sys.executable, str(HERE / "inside.py"), wanted]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(json.loads(line))
            _progress(LIVE, lines[-1])
        if process.wait():
            raise MatrixError(f"lockstep on this machine ended with {process.returncode}")
    release = os.uname().release
    kernel = {"release": release, "package": "", "config": [], "swap": "a file behind zswap"}
    return {"lines": lines, "kernel": kernel}


def _progress(name: str, line: dict[str, Any]) -> None:
    if line["kind"] == "random":
        words = "a difference" if line["differences"] else "no difference"
        print(
            f"{name}: {line['programs']} programs, {line['steps']} steps, {line['seconds']:.0f} s: {words}",
            flush=True,
        )
        for found in line.get("found", []):
            print(f"{name}: program {line['seed']}:{found['number']} {json.dumps(found)}", flush=True)
    elif line["kind"] == "kept" and line.get("difference"):
        print(f"{name}: {line['program']}: a difference", flush=True)


def _report(name: str, told: dict[str, Any], options: argparse.Namespace) -> bool:
    """Print what came of a kernel, keep it where asked; whether anything differed."""
    found = summary(told, seed=options.seed)
    for difference in found["found"]:
        print(json.dumps(difference, indent=1))
    if options.record:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"date": time.strftime("%Y-%m-%d"), **found}, indent=1, sort_keys=True)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        write_table(RESULTS, ROOT / "spec" / "kernels.md", ANSWERS)
    print(
        f"{name} ({found['release']}): {found['kept']} kept and {found['programs']} random programs, "
        f"{found['steps']} steps, {found['differences']} differences, masks {found['masks'] or 'none'}, "
        f"{found['not_modelled']} not modelled" + ("" if found["complete"] else "; out of time"),
        flush=True,
    )
    return bool(found["differences"])


if __name__ == "__main__":
    sys.exit(main())
