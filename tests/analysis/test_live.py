"""Figures of the running kernel, beside those of smaps, page-types and thpmaps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pmcore
from pmcore.analysis.dirty import DirtyMethod, DirtyTracker
from pmcore.analysis.huge import huge_rollup, huge_stats
from pmcore.analysis.residency import residency
from pmcore.analysis.survey import survey
from pmcore.uapi import PageFlag, UffdFeature

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]
PAGE = 4096


@pytest.fixture
def bench():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    from pmcore.backends.procfs.workbench import open_workbench

    with open_workbench() as bench:
        if not bench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        yield bench


def furnished(bench):
    """A task with memory of many sorts."""
    task = bench.spawn()
    anon = task.mmap(300 * PAGE)
    task.touch(anon, 200 * PAGE)
    task.touch(anon + 250 * PAGE, 20 * PAGE, write=False)
    huge = task.mmap(8 << 20, addr=0x1000_0000_0000, flags=0x100022)
    task.madvise(huge, 8 << 20, 14)
    task.touch(huge, 6 << 20)
    task.munmap(huge + (1 << 20), PAGE)
    shared = task.mmap(64 * PAGE, flags=0x21)
    task.touch(shared, 40 * PAGE)
    return task


def test_residency_is_that_of_smaps(bench):
    task = furnished(bench)
    task.fork()
    for _ in range(20):  # what the fork server copies meanwhile changes who shares its pages
        before, found, after = task.process.smaps(), residency(task.process), task.process.smaps()
        if before == after:
            break
    smaps = {entry.vma.start: entry for entry in after}
    compared = 0
    for row, vma in zip(found.rows, found.vmas, strict=True):
        if vma.name and not vma.name.startswith("["):
            continue  # file pages are shared with processes that come and go
        counters = smaps[vma.start].counters
        assert int(row["rss"]) * PAGE == counters["Rss"], vma
        assert int(row["pss"]) >> 10 << 10 == counters["Pss"], vma
        assert int(row["uss"]) * PAGE == counters["Private_Clean"] + counters["Private_Dirty"], vma
        assert int(row["anon"]) * PAGE == counters["Anonymous"], vma
        assert int(row["swap"]) * PAGE == counters["Swap"], vma
        compared += 1
    assert compared > 5


def test_survey_adds_up(bench):
    found = survey(bench.kernel, raw=True)
    assert found.total_pages == bench.kernel.frame_count()
    one = survey(bench.kernel, raw=True, threads=1)
    assert one.total_pages == found.total_pages
    # Two looks at a machine that goes on running: what nobody allocates or frees is the same.
    assert abs(one.pages_with(PageFlag.RESERVED) - found.pages_with(PageFlag.RESERVED)) < 64
    assert found.pages_with(PageFlag.ANON) > 0


@pytest.mark.rule("KC-007", "KF-050")
def test_types_prints_what_page_types_prints(bench, page_types):
    """With the tool at hand: lists of a task's pages, with map counts, byte for byte."""
    from pmcore.backends.procfs.workbench import drain_lru

    task = furnished(bench)
    areas = [vma for vma in task.process.maps() if not vma.name or vma.name.startswith("/dev/zero")]
    where = [part for vma in areas for part in ("-a", f"{vma.start // PAGE:#x},{vma.end // PAGE:#x}")]
    for options in (
        [],
        ["-r"],
        ["-l", "-M"],
        ["-L", "-M", "-N"],
        ["-l", "-C"],
        ["-r", "-L"],
        ["-l", "-b", "thp,~lru"],
    ):
        command = ["-p", str(task.pid), *where, *options]
        # A monitor may mark a page idle between the two looks: some attempt finds the machine still.
        for _ in range(20):
            drain_lru()
            theirs = subprocess.run([page_types, *command], capture_output=True, text=True, check=True).stdout
            ours = subprocess.run(
                [sys.executable, "-m", "pmcore.cli", "types", "--format", "page-types", *command],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            if theirs == ours:
                break
        assert ours == theirs, options
        assert len(ours.splitlines()) > 3


def test_huge_pages_are_those_of_thpmaps(bench, thpmaps):
    task = furnished(bench)
    done = subprocess.run(
        [sys.executable, thpmaps, "--pid", str(task.pid), "--rollup", "--inc-empty", "--cont", "64K"],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = {m[1]: int(m[2]) << 10 for m in re.finditer(r"^(\S+):\s+(\d+) kB", done.stdout, re.MULTILINE)}
    ours = huge_rollup(huge_stats(task.process, cont=[4]))
    assert ours.values == theirs
    assert list(ours.values) == list(theirs)


def test_huge_pages_of_a_split_mapping(bench):
    task = furnished(bench)
    values = huge_rollup(huge_stats(task.process)).values
    if not values["anon-thp-pmd-aligned-2048kB"]:
        pytest.skip("the kernel had no huge page to give")
    assert values["anon-thp-pmd-aligned-2048kB"] == 4 << 20
    assert values["anon-thp-pte-partial"] == (2 << 20) - PAGE


def test_dirty_pages_of_a_registered_process(bench):
    if not bench.kernel.profile.has("uffd.wp_async"):
        pytest.skip("this kernel has no asynchronous write protection")
    task = bench.spawn()
    start = task.mmap(16 * PAGE)
    fd = task.userfaultfd(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED)
    task.uffd_register(fd, start, 16 * PAGE, 2)
    tracker = DirtyTracker(task.process)
    assert tracker.method is DirtyMethod.UFFD_WP
    tracker.reset()
    assert len(tracker.dirty()) == 0
    task.touch(start + 3 * PAGE, 2 * PAGE)
    task.write(start + 9 * PAGE, b"x")
    found = [((low - start) // PAGE, (high - start) // PAGE) for low, high, _ in tracker.dirty().tolist()]
    assert found == [(3, 5), (9, 10)]
    tracker.reset()
    assert tracker.pages() == 0


def test_own_process_is_looked_at():
    if not Path("/proc/self/pagemap").exists():
        pytest.skip("needs a running Linux kernel")
    with pmcore.open("procfs") as kernel:
        found = residency(kernel.process(os.getpid()))
        assert found.total("present") > 100
        assert (found.total("rss") is None) == found.frames_hidden
