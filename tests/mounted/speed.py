"""How fast a mounted machine is: page-types over a million frames, beside as many of the running kernel; one word.

python tests/mounted/speed.py --page-types PATH        (root: it reads the running kernel's frames too)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import pmcore
from pmcore.mounted import Tree, execute
from pmcore.procview import ProcView

_FRAMES = 1 << 20
_WORDS = 5000


def _page_types(tool: str, runs: int) -> float:
    """Milliseconds of the fastest run over the first million frames."""
    took = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run([tool, "-a", f"0,{_FRAMES}"], stdout=subprocess.DEVNULL, check=True)
        took.append(time.perf_counter() - began)
    return min(took) * 1e3


def _one_word(path: str, offset: int) -> tuple[float, float]:
    """Microseconds of a read of 8 bytes: median and mean, at places in turn."""
    fd, took = os.open(path, os.O_RDONLY), []
    for number in range(_WORDS):
        began = time.perf_counter()
        os.pread(fd, 8, offset + number * 7919 % 700 * 8)
        took.append(time.perf_counter() - began)
    os.close(fd)
    return sorted(took)[_WORDS // 2] * 1e6, sum(took) / _WORDS * 1e6


def _measure(tool: str, where: str, pagemap: tuple[str, int]) -> None:
    print(f"{where}: page-types over {_FRAMES} frames {_page_types(tool, 9):.1f} ms")
    for path, offset in (("/proc/kpageflags", 0), ("/proc/kpagecount", 0), pagemap):
        median, mean = _one_word(path, offset)
        print(f"{where}: 8 bytes of {path}: median {median:.1f} us, mean {mean:.1f} us", flush=True)


def main() -> int:
    """Measure inside when called so, else both sides."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--page-types", metavar="PATH", required=True)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        _measure(given.page_types, "simulated", ("/proc/1/pagemap", given.inside))
        return 0
    _measure(given.page_types, "running kernel", ("/proc/self/pagemap", 0))
    machine = pmcore.open("sim", memory=_FRAMES * 4096)
    task = machine.spawn()
    start = task.mmap(3 << 30)
    task.touch(start, 3 << 30)
    sparse = task.mmap(128 << 20)
    task.touch(sparse, 128 << 20, step=3 * 4096)
    task.fork().touch(start, 300 << 20)
    command = [sys.executable, __file__, "--page-types", given.page_types, "--inside", str(start // 512)]
    return execute(Tree(ProcView(machine)), command)


if __name__ == "__main__":
    sys.exit(main())
