"""How long `pmcore check` takes on this machine with a process of 1 GiB, against reading the same tables once.

Run as `python tests/bench/check.py [--repeat N]`, or `tox -e bench-check`; as root, on Linux. Pairs: each time a
reading, then a check; the median of their ratios is the figure.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from pmcore.analysis.invariants import check
from pmcore.errors import PmcoreError
from pmcore.protocols import Kernel
from pmcore.registry import open_workbench

GIB = 1 << 30
BAR = 3.0
#: Words of a frame file read at once.
_CHUNK = 1 << 16


def read_once(kernel: Kernel) -> int:
    """All processes' maps and pagemap, and the three frame files, read and thrown away; pages and frames read."""
    read = 0
    for pid in kernel.pids():
        try:
            process = kernel.process(pid)
            for vma in process.maps():
                if vma.end <= kernel.geometry.task_size:
                    read += len(process.pagemap(vma.start, vma.end))
        except PmcoreError:  # it has ended, or hides
            continue
    frames = kernel.frame_count()
    for start in range(0, frames, _CHUNK):
        count = min(_CHUNK, frames - start)
        read += len(kernel.kpageflags(start, count).values)
        read += len(kernel.kpagecount(start, count)) + len(kernel.kpagecgroup(start, count))
    return read


def seconds(function: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with open_workbench("procfs") as bench:
        task = bench.spawn()
        task.touch(task.mmap(GIB), GIB)
        kernel = bench.kernel
        reading, checking = [], []
        for _ in range(repeat):
            reading.append(seconds(lambda: read_once(kernel)))
            checking.append(seconds(lambda: check(kernel)))
        ratio = statistics.median(c / r for c, r in zip(checking, reading, strict=True))
        print(f"reading once {statistics.median(reading):7.2f} s")
        print(f"check        {statistics.median(checking):7.2f} s")
        print(f"ratio        {ratio:7.2f}   bar <= {BAR} {'' if ratio <= BAR else 'MISSED'}")
        task.exit()


if __name__ == "__main__":
    main()
