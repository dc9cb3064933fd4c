"""Recordings of the running kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import pmcore
from pmcore.recording import record
from pmcore.uapi import PageFlag


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_a_live_process_is_recorded_as_it_is(tmp_path):
    """While it is still: every word equal."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    code = "import sys; x = bytearray(4 << 20); print('ready', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with (
        pmcore.open("procfs") as kernel,
        subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as child,
    ):
        try:
            if not kernel.pfn_visible:
                pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
            assert child.stdout is not None
            child.stdout.readline()
            process = kernel.process(child.pid)
            before = state(process)
            record(kernel, tmp_path / "r", pids=[child.pid])
            after = state(process)
            with pmcore.open("recording", tmp_path / "r") as copy:
                assert copy.pread("version", 0, 13) == b"Linux version"
                assert copy.process(child.pid).pread("comm", 0, 6) == b"python"
                recorded = state(copy.process(child.pid))
        finally:
            child.kill()

    assert recorded.keys() == before.keys()
    # What it shares with others (the interpreter, libraries) changes with them.
    still = [vma for vma in before if before[vma] == after.get(vma)]
    assert {vma: recorded[vma] for vma in still} == {vma: before[vma] for vma in still}
    assert sum(len(before[vma][1]) for vma in still) > 1000


def state(process):
    """By VMA, what /proc shows of it. Who samples accesses (DV-020) may change Referenced."""
    counters = {e.vma: {**e.counters, "Referenced": 0} for e in process.smaps()}
    end = process.kernel.geometry.task_size
    vmas = [vma for vma in process.maps() if vma.end <= end]
    return {v: (counters.get(v), process.pagemap(v.start, v.end).values.tolist()) for v in vmas}


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_the_whole_machine_is_recorded_with_other_numbers(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    with pmcore.open("procfs") as kernel:
        if not kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        done = record(kernel, tmp_path / "r", anonymise=True)
        assert done.frames == kernel.frame_count()
        assert os.getpid() in done.pids
    with pmcore.open("recording", tmp_path / "r") as copy:
        flags = copy.kpageflags()
        tails = flags.has(PageFlag.COMPOUND_TAIL)
        compound = flags.any(PageFlag.COMPOUND_HEAD | PageFlag.COMPOUND_TAIL)
        loose = np.flatnonzero(tails[1:] & ~compound[:-1])
        assert len(loose) < 100  # pages that came apart while they were read
