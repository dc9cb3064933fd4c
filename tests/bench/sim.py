"""How fast the simulated machine is: nanoseconds a page, microseconds a step, and ratios to the running kernel.

Run as `python tests/bench/sim.py [--repeat N] [--cpu]`, or `tox -e bench-sim`. The live figures need Linux and root.
On a machine that others use, too, `--cpu` counts the processor's time instead of the clock's.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pmcore import FrameFile, ScanRequest
from pmcore.registry import open_workbench
from pmcore.uapi import Madvise, PageCategory, UffdFeature

GIB, PAGE = 1 << 30, 4096
PAGES = GIB // PAGE
START = 1 << 40


clock = time.perf_counter


def timed(function: Callable[[], Any]) -> float:
    began = clock()
    function()
    return clock() - began


def median(repeat: int, function: Callable[[], float]) -> float:
    return statistics.median(function() for _ in range(repeat))


def settled(repeat: int, function: Callable[[], Any]) -> float:
    """The median of many calls, after one that has the memory that is needed made ready."""
    function()
    return median(5 * repeat, lambda: timed(function))


def row(name: str, figure: float, unit: str, bar: float, *, more: bool = False) -> None:
    met = figure >= bar if more else figure <= bar
    print(
        f"{name:36s} {figure:9.2f} {unit:10s} bar {'>=' if more else '<='} {bar:<8g} {'' if met else 'MISSED'}"
    )


BOOT = """
import resource, sys, time
import pmcore, numpy
from pmcore.backends.sim import machine
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before, began = peak(), time.process_time()
pmcore.open("sim", memory="1 TiB", swap="64 GiB", kernel="6.18")
print(time.process_time() - began, (peak() - before) / 1e6)
"""


def boot(repeat: int) -> None:
    """A large machine, in a process of its own."""
    found = []
    for _ in range(repeat):
        out = subprocess.run([sys.executable, "-c", BOOT], capture_output=True, text=True, check=True).stdout
        found.append([float(word) for word in out.split()])
    row("boot 1 TiB", statistics.median(f[0] for f in found), "s", 1)
    row("boot 1 TiB: memory", statistics.median(f[1] for f in found), "MB", 200)


def sparse(repeat: int) -> None:
    """1 MiB mapped in almost 128 TiB of range, against 1 MiB in 1 MiB: the cost follows what is mapped."""
    mib, figures = 1 << 20, {}
    for length in (mib, 126 << 40):
        took: dict[str, list[float]] = {}
        for _ in range(3 * repeat):
            machine = open_workbench("sim", memory="64 MiB", swap="16 MiB", kernel="6.18")
            task = machine.spawn()
            task.mmap(length, addr=START, flags=0x4032)
            task.touch(START + length // 2 & -mib, mib)
            request = ScanRequest(start=START, end=START + length, vec_len=8, category_mask=8, return_mask=8)
            children: list[Any] = []
            for name, call in (
                ("scan", lambda task=task, request=request: task.process.pagemap_scan(request)),
                ("smaps", task.process.smaps),
                ("maps", task.process.maps),
                ("clear_refs", lambda task=task: task.process.clear_refs(1)),
                ("fork", lambda task=task, children=children: children.append(task.fork())),
                ("mprotect", lambda task=task, length=length: task.mprotect(START, length, 1)),
                ("swap out", lambda task=task, length=length: task.madvise(START, length, Madvise.PAGEOUT)),
                ("munmap", lambda task=task, length=length: task.munmap(START, length)),
            ):
                took.setdefault(name, []).append(timed(call))
            machine.close()
        figures[length] = {name: statistics.median(values) for name, values in took.items()}
    for name, small in figures[mib].items():
        large = figures[126 << 40][name]
        # Tables of upper levels and the hole's ends cost something: microseconds, not terabytes.
        row(f"1 MiB in 126 TiB: {name}", (large - small) * 1e6, "us more", 200)


def flat(repeat: int) -> None:
    """A page costs the same in small ranges as in large ones (from 1 MiB on, where calls cost little)."""
    figures: dict[str, list[float]] = {}
    sizes = (1 << 20, 16 << 20, 256 << 20, 4 << 30, 16 << 30)
    for size in sizes:
        pages, took = size // PAGE, {"touch": [], "pagemap": [], "scan": []}
        out = np.zeros(pages, dtype=np.uint64)
        for _ in range(repeat if size > GIB else 5 * repeat):
            gc.collect()
            machine = open_workbench("sim", memory="20 GiB", kernel="6.18")
            task = machine.spawn()
            task.mmap(size, addr=START, flags=0x32)
            took["touch"].append(timed(lambda task=task, size=size: task.touch(START, size)))
            for _ in range(2):
                read = timed(lambda task=task, out=out: task.process.read_pagemap(START // PAGE, out))
            took["pagemap"].append(read)
            request = ScanRequest(start=START, end=START + size, vec_len=8, category_mask=8, return_mask=8)
            took["scan"].append(timed(lambda task=task, request=request: task.process.pagemap_scan(request)))
            machine.close()
        for name, values in took.items():
            figures.setdefault(name, []).append(statistics.median(values) / pages * 1e9)
    for name, values in figures.items():
        shown = ", ".join(f"{value:.1f}" for value in values)
        print(f"{name} of 1 MiB, 16 MiB, 256 MiB, 4 GiB, 16 GiB: {shown} ns/page")
        row(f"  {name}: 16 GiB against 1 MiB", values[-1] / values[0], "x", 2)


def ranges(repeat: int) -> None:
    """Whole GiBs."""
    found: dict[str, list[float]] = {}

    def note(name: str, function: Callable[[], Any]) -> None:
        found.setdefault(name, []).append(timed(function) / PAGES * 1e9)

    for _ in range(repeat):
        gc.collect()  # the machine before is not this one's cost
        machine = open_workbench("sim", memory="3 GiB", swap="2 GiB", kernel="6.18")
        task = machine.spawn()
        task.mmap(GIB, addr=START, flags=0x32)
        note("touch", lambda task=task: task.touch(START, GIB))
        children: list[Any] = []
        note("fork", lambda task=task, children=children: children.append(task.fork()))
        children[0].exit()
        note("swap out", lambda task=task: task.madvise(START, GIB, Madvise.PAGEOUT))
        note("swap in", lambda task=task: task.touch(START, GIB))
        note("munmap", lambda task=task: task.munmap(START, GIB))
        machine.close()
    for name, bar in (("touch", 100), ("fork", 30), ("swap out", 200), ("swap in", 200), ("munmap", 30)):
        row(f"{name} 1 GiB", statistics.median(found[name]), "ns/page", bar)


def shared(repeat: int) -> None:
    """The same GiB as shared anonymous memory and as a memfd, beside private memory; the best of each, as ratios."""
    found: dict[str, dict[str, list[float]]] = {}

    def note(kind: str, name: str, function: Callable[[], Any]) -> None:
        found.setdefault(name, {}).setdefault(kind, []).append(timed(function) / PAGES * 1e9)

    out = np.zeros(PAGES, dtype=np.uint64)
    request = ScanRequest(start=START, end=START + GIB, vec_len=PAGES, category_mask=8, return_mask=8)
    second = 2 * START
    for _ in range(repeat):
        for kind in ("private", "shared", "memfd"):
            gc.collect()
            machine = open_workbench("sim", memory="3 GiB", kernel="6.18")
            task, fd = machine.spawn(), -1
            if kind == "memfd":
                fd = task.memfd_create("shared")
                task.ftruncate(fd, GIB)
            task.mmap(GIB, addr=START, flags=0x32 if kind == "private" else 0x31, fd=fd)
            note(kind, "touch", lambda task=task: task.touch(START, GIB))
            for _ in range(3):
                note(kind, "pagemap", lambda task=task: task.process.read_pagemap(START // PAGE, out))
                note(kind, "scan", lambda task=task: task.process.pagemap_scan(request))
            children: list[Any] = []
            note(kind, "fork", lambda task=task, children=children: children.append(task.fork()))
            children[0].exit()
            if kind == "memfd":
                task.mmap(GIB, addr=second, flags=0x1, fd=fd)
                note(kind, "touch, a second mapping", lambda task=task: task.touch(second, GIB))
                note(kind, "munmap, a second mapping", lambda task=task: task.munmap(second, GIB))
            note(kind, "munmap", lambda task=task: task.munmap(START, GIB))
            if kind == "memfd":
                _file(task, fd, note)
            machine.close()
    for name, sides in found.items():
        base = min(sides.get("private") or found[name.split(",")[0]]["private"])
        for kind in ("shared", "memfd"):
            if kind in sides:
                figure = min(sides[kind])
                row(f"{kind}: {name} ({figure:.1f} ns; {base:.1f})", figure / base, "x private", 2)


def _file(task: Any, fd: int, note: Callable[[str, str, Callable[[], Any]], None]) -> None:
    """What system calls do to a GiB of a memfd, against what munmap and touch cost."""
    note("memfd", "munmap, by a punched hole", lambda: task.fallocate(fd, 3, 0, GIB))
    note("memfd", "touch, by fallocate", lambda: task.fallocate(fd, 0, 0, GIB))
    note("memfd", "munmap, by ftruncate", lambda: task.ftruncate(fd, 0))


def copying(repeat: int) -> None:
    """write(2) and read(2) of many pages at once, against copying as many bytes; memory itself, too."""
    size = 1 << 28
    data = np.arange(size // 8, dtype=np.uint64).tobytes()
    figures: dict[str, list[float]] = {}

    def note(name: str, function: Callable[[], Any]) -> None:
        figures.setdefault(name, []).append(timed(function) / (size // PAGE) * 1e9)

    for _ in range(repeat):
        gc.collect()
        machine = open_workbench("sim", memory="2 GiB", kernel="6.18")
        task = machine.spawn()
        note("copying", lambda: bytearray(data))
        task.mmap(size, addr=START, flags=0x32)
        note("memory: write", lambda task=task: task.write(START, data))
        note("memory: read", lambda task=task: task.read(START, size))
        task.munmap(START, size)
        for kind, fd in (("memfd", task.memfd_create("copied")), ("disk", task.open_file("copied", pages=0))):
            note(f"{kind}: pwrite", lambda task=task, fd=fd: task.pwrite(fd, data, 0))
            note(f"{kind}: pwrite again", lambda task=task, fd=fd: task.pwrite(fd, data, 0))
            note(f"{kind}: pread", lambda task=task, fd=fd: task.pread(fd, size, 0))
            if kind == "disk":
                note("disk: fsync", lambda task=task, fd=fd: task.fsync(fd))
            task.ftruncate(fd, 0)
        machine.close()
    base = min(figures.pop("copying"))
    for name, values in figures.items():
        figure = min(values)
        row(f"{name} ({figure:.0f} ns/page; {base:.0f})", figure / base, "x a copy", 4)


def looking(repeat: int) -> None:
    """Reading and scanning, beside the running kernel."""
    sides = [("sim", open_workbench("sim", memory="3 GiB", kernel="6.18"))]
    if sys.platform.startswith("linux"):
        live = open_workbench("procfs")
        if live.kernel.pfn_visible:
            sides.append(("live", live))
    figures: dict[str, dict[str, float]] = {}
    for name, bench in sides:
        task = bench.spawn()
        task.mmap(GIB, addr=START, flags=0x100022)
        task.madvise(START, GIB, Madvise.NOHUGEPAGE)
        task.touch(START, GIB)
        out = np.zeros(PAGES, dtype=np.uint64)
        read = settled(repeat, lambda task=task, out=out: task.process.read_pagemap(START // PAGE, out))
        task.madvise(START, GIB, Madvise.DONTNEED)
        task.touch(START, GIB, step=2 * PAGE)
        present = int(PageCategory.PRESENT)
        request = ScanRequest(
            start=START, end=START + GIB, vec_len=PAGES, category_mask=present, return_mask=present
        )
        scan = settled(repeat, lambda task=task, request=request: task.process.pagemap_scan(request))
        count = bench.kernel.frame_count()
        words = np.zeros(count, dtype=np.uint64)
        flags = median(
            min(repeat, 3),
            lambda bench=bench, words=words: timed(
                lambda: bench.kernel.read_frames(FrameFile.KPAGEFLAGS, 0, words)
            ),
        )
        figures[name] = {"pagemap": read / PAGES, "scan": scan / PAGES, "kpageflags": flags / count}
        bench.close()
    for what, bar in (("pagemap", 3.0), ("scan", 2.0), ("kpageflags", 10.0)):
        ours = figures["sim"][what]
        print(f"{what:36s} {ours * 1e9:9.2f} ns/page")
        if "live" in figures:
            row(
                f"  times as fast as live ({figures['live'][what] * 1e9:.1f} ns)",
                figures["live"][what] / ours,
                "x",
                bar,
                more=True,
            )


def steps(repeat: int) -> None:
    """Single pages: each call on its own, what it needs made ready before the clock starts."""
    machine = open_workbench("sim", memory="64 MiB", swap="16 MiB", kernel="6.18")
    task, other = machine.spawn(), machine.spawn()
    start = task.mmap(64 * PAGE)
    task.touch(start, 64 * PAGE)
    far, fd = 1 << 40, task.userfaultfd(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED)
    watched = task.mmap(64 * PAGE)
    task.uffd_register(fd, watched, 64 * PAGE, 2)
    task.touch(watched, 64 * PAGE)
    file = task.mmap(64 * PAGE, flags=0x21)
    task.touch(file, 64 * PAGE)
    other.mmap(PAGE, addr=far, flags=0x8032)
    task.mmap(PAGE, addr=far + 64 * PAGE, flags=0x8032)
    scan = ScanRequest(start=start, end=start + PAGE, vec_len=1, return_mask=8)
    arm = ScanRequest(start=watched, end=watched + PAGE, vec_len=1, flags=1, category_mask=2, return_mask=2)
    places: list[int] = []
    children: list[Any] = []

    def touched() -> None:
        task.touch(start, PAGE)

    def empty() -> None:
        task.madvise(start, PAGE, Madvise.DONTNEED)

    def swapped() -> None:
        touched()
        task.madvise(start, PAGE, Madvise.PAGEOUT)

    def shared() -> None:
        for child in children:
            child.exit()
        touched()
        children[:] = [task.fork()]

    def alone() -> None:
        for child in children:
            child.exit()
        children.clear()

    def mapped() -> None:
        places[:] = [task.mmap(PAGE)]
        task.touch(places[0], PAGE)

    def away() -> None:
        places[:] = [task.mmap(PAGE, addr=far, flags=0x8032)]

    def move(target: int) -> None:
        places.append(task.mremap(places.pop(), PAGE, PAGE, flags=3, new_addr=target))

    def back() -> None:
        task.munmap(places.pop(), PAGE)

    def nothing() -> None:
        pass

    def protect(prot: int) -> Callable[[], None]:
        return lambda: task.mprotect(start, PAGE, prot)

    def lock() -> None:
        task.mlock(start, PAGE)

    def unlock() -> None:
        task.munlock(start, PAGE)

    def wp(on: bool) -> Callable[[], None]:
        return lambda: task.uffd_writeprotect(fd, watched, PAGE, protect=on)

    for name, before, call, after in (
        ("touch", nothing, touched, nothing),
        ("touch, the first", empty, touched, nothing),
        ("touch, read only, the first", empty, lambda: task.touch(start, PAGE, write=False), nothing),
        ("touch, copied after fork", shared, touched, alone),
        ("touch, swapped in", swapped, touched, nothing),
        ("write", nothing, lambda: task.write(start, b"x"), nothing),
        ("write, the first", empty, lambda: task.write(start, b"x"), nothing),
        ("read", nothing, lambda: task.read(start, 8), nothing),
        ("mmap", nothing, lambda: places.append(task.mmap(PAGE)), back),
        ("mmap, populated", nothing, lambda: places.append(task.mmap(PAGE, flags=0x8022)), back),
        ("munmap", mapped, lambda: task.munmap(places[0], PAGE), nothing),
        ("mprotect to read", nothing, protect(1), protect(3)),
        ("mprotect to write", protect(1), protect(3), nothing),
        ("mremap", away, lambda: move(far + 8 * PAGE), back),
        ("mremap to three new page tables", away, lambda: move(far * 2), back),
        ("mlock", nothing, lock, unlock),
        ("munlock", lock, unlock, nothing),
        ("mincore", nothing, lambda: task.mincore(start, PAGE), nothing),
        ("MADV_DONTNEED", touched, empty, touched),
        ("MADV_FREE", touched, lambda: task.madvise(start, PAGE, Madvise.FREE), nothing),
        ("MADV_COLD", touched, lambda: task.madvise(start, PAGE, Madvise.COLD), nothing),
        ("MADV_PAGEOUT", touched, lambda: task.madvise(start, PAGE, Madvise.PAGEOUT), touched),
        ("MADV_WILLNEED", swapped, lambda: task.madvise(start, PAGE, Madvise.WILLNEED), touched),
        ("MADV_POPULATE_WRITE", empty, lambda: task.madvise(start, PAGE, Madvise.POPULATE_WRITE), nothing),
        ("MADV_GUARD_INSTALL", nothing, lambda: task.madvise(start, PAGE, Madvise.GUARD_INSTALL), nothing),
        ("MADV_GUARD_REMOVE", nothing, lambda: task.madvise(start, PAGE, Madvise.GUARD_REMOVE), touched),
        ("uffd: protect", wp(False), wp(True), nothing),
        ("uffd: write to protected", wp(True), lambda: task.touch(watched, PAGE), nothing),
        ("uffd: unprotect", wp(True), wp(False), nothing),
        ("shared memory: touch", nothing, lambda: task.touch(file, PAGE), nothing),
        ("pagemap", nothing, lambda: task.process.pagemap(start, start + PAGE), nothing),
        ("PAGEMAP_SCAN", nothing, lambda: task.process.pagemap_scan(scan), nothing),
        ("PAGEMAP_SCAN, protecting", wp(False), lambda: task.process.pagemap_scan(arm), nothing),
        ("fork", nothing, lambda: children.append(other.fork()), alone),
        ("clear_refs", nothing, lambda: other.process.clear_refs(1), nothing),
        ("exit", lambda: children.append(other.fork()), lambda: children.pop().exit(), nothing),
    ):
        took = []
        for _ in range(100 * repeat):
            before()
            took.append(timed(call))
            after()
        row(f"one page: {name}", statistics.median(took) * 1e6, "us", 15)

    def mixed() -> None:
        task = machine.spawn()
        start = task.mmap(64 * PAGE)
        for page in range(8):
            place = start + page * PAGE
            task.touch(place, PAGE)
            task.write(place, b"hi")
            task.madvise(place, PAGE, Madvise.DONTNEED)
            task.mprotect(place + 8 * PAGE, PAGE, 1)
            task.read(place, 4)
        task.exit()

    took = median(repeat, lambda: timed(lambda: [mixed() for _ in range(20)]))
    row("spawn and 40 mixed steps", took / 20 * 1e3, "ms", 3)


def files(repeat: int) -> None:
    """Single pages of a memfd and of a file of a disk, each mapped."""
    machine = open_workbench("sim", memory="64 MiB", swap="16 MiB", kernel="6.18")
    task = machine.spawn()
    memfd, disk = task.memfd_create("one"), task.open_file("one", pages=64)
    task.ftruncate(memfd, 64 * PAGE)

    def nothing() -> None:
        pass

    for kind, fd in (("memfd", memfd), ("disk", disk)):
        start = task.mmap(64 * PAGE, flags=1, fd=fd)
        task.touch(start, 64 * PAGE)

        def touched(start: int = start) -> None:
            task.touch(start, PAGE)

        def empty(start: int = start) -> None:
            task.madvise(start, PAGE, Madvise.DONTNEED)

        def written(fd: int = fd) -> None:
            task.pwrite(fd, b"x", 0)

        def synced(fd: int = fd) -> None:
            task.fsync(fd)

        def punched(fd: int = fd) -> None:
            task.fallocate(fd, 3, 0, PAGE)

        def populated(start: int = start) -> None:
            task.madvise(start, PAGE, Madvise.POPULATE_READ)

        def longer(fd: int = fd) -> None:
            task.ftruncate(fd, 64 * PAGE)
            task.pwrite(fd, b"x", 63 * PAGE)

        def read_only(start: int = start) -> None:
            task.touch(start, PAGE, write=False)

        for name, before, call in (
            ("touch", nothing, touched),
            ("MADV_DONTNEED", touched, empty),
            ("touch, the first", empty, touched),
            ("touch, read only, the first", empty, read_only),
            ("MADV_POPULATE_READ", empty, populated),
            ("mincore", nothing, lambda start=start: task.mincore(start, PAGE)),
            ("pwrite", nothing, written),
            ("pread", nothing, lambda fd=fd: task.pread(fd, PAGE, 0)),
            ("fsync", touched, synced),
            ("touch, after fsync", synced, touched),
            ("punch a hole", written, punched),
            ("fallocate", punched, lambda fd=fd: task.fallocate(fd, 0, 0, PAGE)),
            ("ftruncate", longer, lambda fd=fd: task.ftruncate(fd, 63 * PAGE)),
        ):
            took = []
            for _ in range(100 * repeat):
                before()
                took.append(timed(call))
            row(f"one page of a {kind}: {name}", statistics.median(took) * 1e6, "us", 30)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="processor time instead of the clock's")
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS], help="one part")
    options = parser.parse_args()
    if options.cpu:
        global clock
        clock = time.process_time
    for part in PARTS:
        if options.only in (None, part.__name__):
            part(options.repeat)


PARTS = (boot, sparse, flat, ranges, shared, copying, looking, steps, files)


if __name__ == "__main__":
    main()
