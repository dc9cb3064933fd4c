"""Tools from PyPI, unchanged, on a simulated machine: what they print is what the machine says."""

from __future__ import annotations

import re

import pytest

import pmcore
from pmcore.testing import fake_proc

PAGE = 4096
NEEDED = "needs the extra: pip install 'pmcore[examples]'"


@pytest.fixture
def machine():
    """Task 1 has three areas, one of them shared with its child, one in part in swap, one a memfd."""
    with pmcore.open("sim", memory="64 MiB", swap="16 MiB") as machine:
        task = machine.spawn()
        shared = task.mmap(16 * PAGE, addr=0x2000_0000_0000)
        task.touch(shared, 16 * PAGE)
        task.fork()
        swapped = task.mmap(32 * PAGE, addr=0x3000_0000_0000)
        task.touch(swapped, 32 * PAGE)
        task.madvise(swapped, 8 * PAGE, pmcore.uapi.Madvise.PAGEOUT)
        fd = task.memfd_create("buffer")
        task.ftruncate(fd, 64 * PAGE)
        task.mmap(64 * PAGE, addr=0x4000_0000_0000, flags=1, fd=fd)
        task.touch(0x4000_0000_0000, 4 * PAGE)
        yield machine


def test_psutil(machine):
    """psutil.Process.memory_maps(): its sums are smaps' counters, VMA by VMA.

    psutil asks for the process's start before anything, which a simulated machine does not keep: it is added.
    """
    psutil = pytest.importorskip("psutil", reason=NEEDED)
    stat = "1 (task-1) S 0 " + " ".join(["0"] * 48)
    with fake_proc(machine, pid=1, files={"/proc/1/stat": stat, "/proc/stat": "btime 1700000000\n"}):
        process = psutil.Process()
        assert process.pid == 1
        maps = process.memory_maps(grouped=False)
        assert psutil.pids() == [1, 2]
        assert psutil.pid_exists(2)
        assert not psutil.pid_exists(99)
    entries = machine.process(1).smaps()
    assert len(maps) == len(entries) >= 3
    for row, entry in zip(maps, entries, strict=True):
        counters = entry.counters
        assert row.addr == f"{entry.vma.start:08x}-{entry.vma.end:08x}"
        assert row.perms == entry.vma.perms
        assert row.path.split()[0] == (entry.vma.name.split() or ["[anon]"])[0]
        assert (row.rss, row.size, row.pss, row.swap) == tuple(
            counters[k] for k in ("Rss", "Size", "Pss", "Swap")
        )
        assert row.shared_dirty + row.private_dirty == counters["Shared_Dirty"] + counters["Private_Dirty"]
        assert (row.referenced, row.anonymous) == (counters["Referenced"], counters["Anonymous"])
    assert {row.addr[:4]: row.swap for row in maps}["3000"] == 8 * PAGE


def test_pagemap(machine):
    """The tool `pagemap` counts pages by seeking to each of them, and translates an address."""
    entry = pytest.importorskip("pagemap.entry", reason=NEEDED)
    from click.testing import CliRunner

    process, runner = machine.process(1), CliRunner()
    with fake_proc(machine, pid=1):
        shown = runner.invoke(entry.run, ["show", "--pid", "1"], catch_exceptions=False).output
        arguments = ["convert", "-p", "1", "-v", hex(0x3000_0000_8123)]
        converted = runner.invoke(entry.run, arguments, catch_exceptions=False)
    entries = [process.pagemap(vma.start, vma.end) for vma in process.maps()]
    assert [int(number) for number in re.findall(r"\d+", shown)] == [
        1,
        sum(len(each) for each in entries),
        sum(int(each.present.sum()) for each in entries),
        sum(int(each.swapped.sum()) for each in entries),
    ]
    pfn = process.pagemap(0x3000_0000_8000, 0x3000_0000_9000)[0].pfn
    assert f"0x300000008123 -> {pfn * PAGE + 0x123:#x}" in converted.output
