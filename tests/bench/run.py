"""How fast: each figure beside its yardstick, measured in turn in one run, medians of several.

    tox -e bench                                   what can be measured here
    tox -e bench -- --peer /path/to/page-types     and beside the kernel's C tool

Prints a table; exits 0 also where a bar is missed (a benchmark is no test), 1 with --strict.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROUNDS = 9


def alternate(
    one: Callable[[], object], other: Callable[[], object], rounds: int = ROUNDS
) -> tuple[float, float, float]:
    """Median seconds of both, run in turn after a warm-up, and the median of their ratios one / other."""
    one(), other()
    pairs = []
    for _ in range(rounds):
        pairs.append((timed(one), timed(other)))
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    return first, second, statistics.median(a / b for a, b in pairs)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    kept = work()
    taken = time.perf_counter() - began
    del kept
    return taken


def command(*words: str) -> Callable[[], object]:
    return lambda: subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


Figure = tuple[str, str, str, bool]


def decoding() -> Iterator[Figure]:
    from pmcore.pagemap import PagemapEntries

    words = np.random.default_rng(1).integers(0, 1 << 64, 1 << 24, dtype=np.uint64)
    entries = PagemapEntries(words)
    decoded, copied, ratio = alternate(entries.decode, words.copy)
    yield (
        "decode every field of 16 M random entries / copy them",
        f"{decoded * 1e3:.0f} ms / {copied * 1e3:.0f} ms = {ratio:.2f}",
        "at most 6",
        ratio <= 6,
    )
    real = (np.arange(1 << 24, dtype=np.uint64) + np.uint64(1 << 20)) | np.uint64(0x81 << 56)
    entries = PagemapEntries(real)
    decoded, copied, ratio = alternate(entries.decode, real.copy)
    yield (
        "the same, present pages only",
        f"{decoded * 1e3:.0f} ms / {copied * 1e3:.0f} ms = {ratio:.2f}",
        "at most 6",
        ratio <= 6,
    )


def starting() -> Iterator[Figure]:
    everything = "import pmcore; [getattr(pmcore, n) for n in pmcore.__all__]"
    for what, code in (
        ("import pmcore", "import numpy, pmcore"),
        ("import all its names", f"import numpy; {everything}"),
    ):
        ours, theirs, _ = alternate(
            command(sys.executable, "-P", "-c", code), command(sys.executable, "-P", "-c", "import numpy")
        )
        more = (ours - theirs) * 1e3
        yield (
            f"{what}, beyond import numpy",
            f"{ours * 1e3:.0f} - {theirs * 1e3:.0f} = {more:.0f} ms",
            "at most 40 ms",
            more <= 40,
        )
    script = str(Path(sys.executable).with_name("pmcore"))
    seconds = statistics.median(timed(command(script, "--help")) for _ in range(ROUNDS))
    yield ("pmcore --help", f"{seconds * 1e3:.0f} ms", "under 250 ms", seconds < 0.25)


def surveying(peer: str | None) -> Iterator[Figure]:
    import pmcore
    from pmcore.analysis.survey import survey

    try:
        kernel = pmcore.open("procfs")
        frames = kernel.frame_count()
        kernel.profile  # noqa: B018 - probed once, before the clock runs
    except pmcore.PmcoreError as error:
        yield ("survey of all frames", f"not measured: {error}", "", True)
        return
    if peer is None:
        seconds = statistics.median(timed(lambda: survey(kernel)) for _ in range(ROUNDS))
        yield (
            f"survey of {frames} frames",
            f"{seconds * 1e3:.0f} ms, {seconds / frames * 1e9:.1f} ns a frame",
            "",
            True,
        )
        return
    ours, theirs, ratio = alternate(lambda: survey(kernel), command(peer))
    yield (
        f"page-types / survey through the API, {frames} frames",
        f"{theirs * 1e3:.0f} ms / {ours * 1e3:.0f} ms = {1 / ratio:.2f}",
        "at least 1.5",
        1 / ratio >= 1.5,
    )
    script = str(Path(sys.executable).with_name("pmcore"))
    ours, theirs, ratio = alternate(command(script, "types"), command(peer))
    yield (
        "pmcore types / page-types, whole commands",
        f"{ours * 1e3:.0f} ms / {theirs * 1e3:.0f} ms = {ratio:.2f}",
        "at most 1",
        ratio <= 1,
    )


_MEMORY = """
import resource, sys
import numpy as np
from pmcore.analysis.survey import survey
from pmcore.testing.snapshot import SnapshotKernel
class Endless(SnapshotKernel):
    concurrency = 2
    def frame_count(self): return int(sys.argv[1])
    def read_frames(self, file, start, out):
        out[:] = (start >> 20) & 7
        return len(out)
kernel = Endless(kpageflags=np.zeros(1, dtype=np.uint64))
kernel.profile
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
survey(kernel)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def remembering() -> Iterator[Figure]:
    """Memory that a survey adds, on small and on absurdly large machines."""
    grown = []
    for frames in (1 << 22, 1 << 29):
        done = subprocess.run(
            [sys.executable, "-P", "-c", _MEMORY, str(frames)], capture_output=True, text=True, check=True
        )
        grown.append(int(done.stdout) / 1024)
    yield (
        "memory added by a survey of 16 GiB and of 2 TiB of frames",
        f"{grown[0]:.0f} MiB and {grown[1]:.0f} MiB",
        "bounded",
        grown[1] < grown[0] + 16,
    )


def scanning() -> Iterator[Figure]:
    """The engine over leaves that are at hand, every second page matching."""
    from pmcore.profile import preset
    from pmcore.scan import LeafBatch, ScanRequest, ScanVma, scan_tables

    pages = 1 << 18
    start = np.arange(pages, dtype=np.uint64) * np.uint64(4096) + np.uint64(1 << 30)
    batch = LeafBatch(
        start=start,
        end=start + np.uint64(4096),
        kind=np.full(pages, 2, dtype=np.uint8),
        categories=np.where(np.arange(pages) % 2, 10, 16).astype(np.uint64),
    )
    vma = ScanVma(start=1 << 30, end=(1 << 30) + pages * 4096)

    class Tables:
        def scan_vmas(self, start, end):
            return [vma]

        def leaves(self, vma, start, end):
            yield batch

    request = ScanRequest(start=vma.start, end=vma.end, vec_len=pages, category_mask=8, return_mask=10)
    profile = preset()
    seconds = statistics.median(timed(lambda: scan_tables(request, Tables(), profile)) for _ in range(ROUNDS))
    yield (
        "scan engine, 1 GiB, every second page",
        f"{seconds * 1e3:.1f} ms, {seconds / pages * 1e9:.1f} ns a page",
        "(12 ns: half the live ioctl)",
        True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", metavar="PATH", help="the kernel's page-types binary")
    parser.add_argument("--strict", action="store_true", help="exit 1 where a bar is missed")
    options = parser.parse_args()
    missed = 0
    print(f"{'what':62}  {'measured':38}  {'bar':28}  ")
    for part in (surveying(options.peer), decoding(), starting(), remembering(), scanning()):
        for what, measured, bar, held in part:
            missed += not held
            print(f"{what:62}  {measured:38}  {bar:28}  {'' if held else 'MISSED'}", flush=True)
    print(f"Python {sys.version.split()[0]}, numpy {np.__version__}; peak {peak():.0f} MiB")
    return 1 if missed and options.strict else 0


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
