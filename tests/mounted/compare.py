"""Real tools, unchanged, on random simulated machines, against what pmcore says of the same machines.

    python tests/mounted/compare.py --page-types PATH --machines 200
    python tests/mounted/compare.py --thpmaps PATH --machines 50
    cc -o scanner tests/mounted/scanner.c && python tests/mounted/compare.py --scanner ./scanner --machines 200

The tools are not part of this project: `python tests/tools/build.py` makes them from the kernel's source (6.12). Prints
each difference, and the sums; the exit code says whether there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))  # at the end: the installed project comes first

import attrs

from pmcore.analysis.huge import cont_order, huge_rollup, huge_stats
from pmcore.cli import types_work
from pmcore.lockstep.generator import Seeded
from pmcore.mounted import Tree, execute
from pmcore.procview import ProcView
from pmcore.scan import ScanRequest
from pmcore.uapi import PageCategory
from tests.mounted.machines import arm, random_machine

_FLAGS = (
    "mmap",
    "anonymous",
    "lru",
    "swapbacked",
    "buddy",
    "dirty",
    "uptodate",
    "thp",
    "huge",
    "pgtable",
    "active",
)


def _bits(draw: Any) -> str:
    one, two = draw.of(_FLAGS), draw.of(_FLAGS)
    return str(draw.of((one, f"{one},{two}", f"{one},~{two}", f"{one},{two}={one}", f"={one},{two}")))


def _requests(draw: Any, machine: Any) -> list[list[str]]:
    """Option lists of page-types for one machine: each figure's options, alone and together."""
    frames, pids = machine.frame_count(), machine.pids()
    pid = str(draw.of(list(pids)))
    low = draw.integer(0, frames - 1)
    spec = str(
        draw.of((f"{low}", f"{low}+{draw.integer(1, 4000)}", f"{low},", f",{low}", f"{low},{low + 999}"))
    )
    near = f"{low}+2000"
    found = [
        [],
        ["-r"],
        ["-l"],
        ["-l", "-r", "-N"],
        ["-L", "-a", near],
        ["-a", spec],
        ["-l", "-a", spec],
        ["-b", _bits(draw)],
        ["-r", "-b", _bits(draw), "-b", _bits(draw)],
        ["-l", "-b", _bits(draw), "-N"],
        ["-l", "-M"],
        ["-L", "-M", "-N", "-a", near],
        ["-c", "@7"],
        ["-l", "-c", "@7", "-a", spec],
    ]
    for each in pids:
        found += [["-p", str(each)], ["-L", "-p", str(each)], ["-l", "-r", "-p", str(each)]]
    found += [
        ["-l", "-M", "-N", "-p", pid],
        ["-L", "-M", "-r", "-p", pid],
        ["-b", _bits(draw), "-p", pid, "-L"],
    ]
    vma = next(iter(machine.process(int(pid)).maps()), None)
    if vma is not None:
        first = vma.start >> 12
        found.append(["-p", pid, "-l", "-a", f"{first}+{draw.integer(1, 300)}"])
    return found


_NAMES = {"-r": "raw", "-N": "no_summary", "-M": "list_mapcnt"}


def _ours(machine: Any, request: list[str]) -> str:
    options: dict[str, Any] = dict.fromkeys(
        ("raw", "no_summary", "list_mapcnt", "list_cgroup", "mark_idle", "hwpoison", "unpoison"), False
    )
    options |= {"addrs": [], "bits": [], "cgroup": None, "pid": None, "path": None, "listing": None}
    options |= {"form": "page-types", "no_progress": True, "threads": None}
    words = iter(request)
    for word in words:
        if word in _NAMES:
            options[_NAMES[word]] = True
        elif word in ("-l", "-L"):
            options["listing"] = "ranges" if word == "-l" else "each"
        elif word == "-a":
            options["addrs"].append(next(words))
        elif word == "-b":
            options["bits"].append(next(words))
        else:
            options[{"-c": "cgroup", "-p": "pid"}[word]] = next(words)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        types_work.live(machine, options)
    return out.getvalue()


def _run_all(machine: Any, commands: list[list[str]], place: Path) -> list[str]:
    """What each command prints inside the machine."""
    lines = [f"{shlex.join(words)} > {place}/{number} 2>&1" for number, words in enumerate(commands)]
    (place / "script").write_text("\n".join(lines) + "\n")
    execute(Tree(ProcView(machine)), ["sh", str(place / "script")])
    return [(place / str(number)).read_text() for number in range(len(commands))]


def page_types(tool: str, machines: int, seed: int) -> int:
    """Compare page-types; how many differences."""
    differences = compared = 0
    by_option: dict[str, int] = {}
    for number in range(machines):
        machine, _ = random_machine(f"{seed}:{number}", memory="64 MiB")
        requests = _requests(Seeded(f"options:{seed}:{number}"), machine)
        with tempfile.TemporaryDirectory() as place:
            theirs = _run_all(machine, [[tool, *request] for request in requests], Path(place))
        for request, text in zip(requests, theirs, strict=True):
            compared += 1
            for word in request:
                if word.startswith("-"):
                    by_option[word] = by_option.get(word, 0) + 1
            ours = _ours(machine, request)
            if ours != text:
                differences += 1
                print(f"machine {number}, page-types {shlex.join(request)}: differs")
                pairs = zip(ours.splitlines(), text.splitlines(), strict=False)
                for mine, other in [pair for pair in pairs if pair[0] != pair[1]][:3]:
                    print(f"  pmcore     {mine}\n  page-types {other}")
                print(f"  {len(ours)} and {len(text)} bytes")
        machine.close()
    print(f"page-types: {machines} machines, {compared} outputs compared, {differences} differ; {by_option}")
    return differences


_LABEL = re.compile(r"^((?:anon|file)-[a-z]+-[A-Za-z0-9-]+):\s+(\d+) kB")
_HEAD = re.compile(r"^\d+: ([0-9a-f]+)-([0-9a-f]+) ")


def _theirs(text: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    where = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            where = head[1].lstrip("0")
            found.setdefault(where, {})
        elif label := _LABEL.match(line):
            found.setdefault(where, {})[label[1]] = int(label[2])
    return found


def thpmaps(tool: str, machines: int, seed: int) -> int:
    """Compare thpmaps; how many differences."""
    differences = compared = figures = 0
    for number in range(machines):
        machine, _ = random_machine(f"{seed}:{number}", huge=True)
        orders = [cont_order(size, machine.profile.geometry) for size in (65536, 262144)]
        commands, wanted = [], []
        for pid in machine.pids():
            base = [sys.executable, tool, "--pid", str(pid), "--inc-empty", "--cont", "64K", "--cont", "256K"]
            stats = list(huge_stats(machine.process(pid), cont=orders))
            commands += [base, [*base, "--rollup"]]
            wanted.append({f"{s.vma.start:x}": s.values for s in stats if s.vma is not None})
            wanted.append({"": huge_rollup(stats).values} if stats else {})
        with tempfile.TemporaryDirectory() as place:
            texts = _run_all(machine, commands, Path(place))
        for command, text, ours in zip(commands, texts, wanted, strict=True):
            compared += 1
            theirs = _theirs(text)
            mine = {where: {k: v >> 10 for k, v in values.items()} for where, values in ours.items()}
            if "Traceback" in text or {w: v for w, v in mine.items() if v} != {
                w: v for w, v in theirs.items() if v
            }:
                differences += 1
                print(f"machine {number}, {shlex.join(command)}: differs")
                for where, values in mine.items():
                    other = theirs.get(where, {})
                    unlike = {k: (v, other.get(k)) for k, v in values.items() if v != other.get(k)}
                    print(f"  {where}: {unlike}")
            figures += sum(value > 0 for values in theirs.values() for value in values.values())
        machine.close()
    print(
        f"thpmaps: {machines} machines, {compared} outputs, {figures} figures above 0, {differences} differ"
    )
    return differences


def _scan_requests(draw: Any, machine: Any, armed: int) -> list[tuple[int, ScanRequest]]:
    """Requests with small buffers over parts of tasks' memory; some of them write-protect, some are refused."""
    known = PageCategory.WPALLOWED | PageCategory.WRITTEN | PageCategory.FILE | PageCategory.PRESENT
    known |= PageCategory.SWAPPED | PageCategory.PFNZERO | PageCategory.HUGE
    bits = [1 << bit for bit in range(10)]

    def mask() -> int:
        return sum(draw.of(bits) for _ in range(draw.integer(0, 2))) & int(draw.of((known, known, known, ~0)))

    found = []
    for _ in range(8):
        pid = draw.of([armed, armed, *machine.pids()])
        vmas = machine.process(pid).maps()
        if not vmas:
            continue
        one, two = sorted((draw.of(vmas), draw.of(vmas)), key=lambda vma: vma.start)
        start = one.start + draw.integer(0, 4) * 4096
        flags = draw.of((0, 0, 1, 1, 2, 3))
        request = ScanRequest(
            start=start,
            end=max(start, two.end - draw.integer(0, 2) * 2048),
            vec_len=draw.of((1, 2, 3, 7, 64)),
            max_pages=draw.of((0, 0, 1, 5, 100)),
            flags=flags,
            category_inverted=mask(),
            category_mask=mask(),
            category_anyof_mask=mask(),
            return_mask=mask() | int(PageCategory.PRESENT | PageCategory.WRITTEN),
        )
        found.append((pid, request))
    return found


def _scanned(machine: Any, pid: int, request: ScanRequest) -> str:
    """What the scanner in C should print: the same loop over the API."""
    lines, at = [], request.start
    while at < request.end:
        result = machine.process(pid).pagemap_scan_raw(attrs.evolve(request, start=at))
        if result.errno:
            return "".join([*lines, f"{-result.errno} 0\n"])
        lines.append(f"{len(result.regions)} {result.walk_end:x}\n")
        lines += [f" {a:x} {b:x} {c:x}\n" for a, b, c in result.regions.tolist()]
        if result.walk_end <= at:
            break
        at = result.walk_end
    return "".join(lines)


def scanner(tool: str, machines: int, seed: int) -> int:
    """Compare PAGEMAP_SCAN through the mount with the API; how many differences."""
    differences = compared = calls = regions = refused = protecting = 0
    for number in range(machines):
        machine, _ = random_machine(f"{seed}:{number}", huge=number % 3 == 0, kernels=("6.12", "6.18", "6.7"))
        armed = arm(machine, f"{seed}:{number}")
        requests = _scan_requests(Seeded(f"scans:{seed}:{number}"), machine, armed)
        before = machine.checkpoint()
        ours = [_scanned(machine, pid, request) for pid, request in requests]
        after = machine.digest()
        machine.restore(before)
        commands = [
            [tool, *map(str, (pid, r.start, r.end, r.vec_len, r.max_pages, r.flags))]
            + [
                str(word)
                for word in (r.category_inverted, r.category_mask, r.category_anyof_mask, r.return_mask)
            ]
            for pid, r in requests
        ]
        with tempfile.TemporaryDirectory() as place:
            theirs = _run_all(machine, commands, Path(place))
        for command, mine, text in zip(commands, ours, theirs, strict=True):
            compared += 1
            calls += sum(not line.startswith(" ") for line in text.splitlines())
            regions += sum(line.startswith(" ") for line in text.splitlines())
            refused += "-" in text
            if mine != text:
                differences += 1
                print(
                    f"machine {number}, {shlex.join(command)}: differs\n--- API\n{mine[:600]}--- C\n{text[:600]}"
                )
        protecting += machine.digest() != before.digest()
        if machine.digest() != after:
            differences += 1
            print(f"machine {number}: the scans left another state than the API's")
        machine.close()
    print(
        f"scanner: {machines} machines, {compared} scans in {calls} calls, {regions} regions, {refused} refused, "
        f"{protecting} machines changed by write protection; {differences} differ"
    )
    return differences


def main() -> int:
    """Parse, compare, say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--page-types", metavar="PATH")
    parser.add_argument("--thpmaps", metavar="PATH")
    parser.add_argument("--scanner", metavar="PATH", help="scanner.c of this directory, compiled")
    parser.add_argument("--machines", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began, differences = time.monotonic(), 0
    if given.page_types:
        differences += page_types(given.page_types, given.machines, given.seed)
    if given.thpmaps:
        differences += thpmaps(given.thpmaps, given.machines, given.seed)
    if given.scanner:
        differences += scanner(given.scanner, given.machines, given.seed)
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
