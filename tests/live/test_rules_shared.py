"""Rules SH- and VM-016: shared and swapped memory, with a swap file of our own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmcore.analysis.shared import SharedState, shared_states
from pmcore.uapi import PageFlag

from .conftest import PAGE


@pytest.fixture(scope="module")
def swap(bench, tmp_path_factory) -> Iterator[None]:
    """64 MiB of swap for the time of these tests, if the machine lets us."""
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        pytest.skip("the machine swaps already: its areas are left alone")
    path = Path("/var/tmp") / f"pmcore-test-swap-{os.getpid()}"
    # Pages that go to a file stay in the swap cache, in memory, until something reclaims them; zswap lets go at once.
    zswap = Path("/sys/module/zswap/parameters/enabled")
    before = zswap.read_text().strip() if zswap.exists() else None
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        path.write_bytes(bytes(64 << 20))
        path.chmod(0o600)
        made = subprocess.run(["mkswap", str(path)], capture_output=True, check=False)
        if made.returncode or libc.swapon(str(path).encode(), 0):
            pytest.skip(f"no swap to be had: errno {ctypes.get_errno()}")
        try:
            if before == "N":
                zswap.write_text("Y")
            yield
        finally:
            if before == "N":
                zswap.write_text("N")
            libc.swapoff(str(path).encode())
    except FileNotFoundError:
        pytest.skip("needs mkswap (util-linux)")
    finally:
        path.unlink(missing_ok=True)


def page_out(task, start: int, pages: int, gone) -> None:
    """MADV_PAGEOUT until `gone` says so: write-out takes its time."""
    from pmcore.backends.procfs.workbench import drain_lru

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        # A page that was unmapped and then could not be written out must be mapped again to be tried again.
        task.touch(start, pages * PAGE, write=False)
        drain_lru()
        task.madvise(start, pages * PAGE, 21)
        if gone():
            return
        time.sleep(0.01)
    pytest.skip("the kernel would not swap these pages out")


@pytest.mark.rule("VM-016", "PM-003", "PM-004", "PM-012", "KF-014")
def test_anonymous_page_goes_to_swap_and_back(task, area, swap, look):
    start = area(2)
    task.write(start, b"keep me")
    look(task, start, 1)

    def gone() -> bool:
        return not task.process.pagemap(start, start + PAGE).present[0]

    page_out(task, start, 1, gone)
    entry = task.process.pagemap(start, start + PAGE)[0]
    assert entry.swapped
    assert not entry.file
    assert entry.pfn is None
    assert entry.swap_entry is not None
    kind, offset = entry.swap_entry
    assert kind == 0
    assert 0 < offset < (64 << 20) // PAGE
    [smaps] = [e for e in task.process.smaps() if e.vma.start == start]
    assert smaps.counters["Swap"] == PAGE
    assert task.read(start, 7) == b"keep me"
    assert task.process.pagemap(start, start + PAGE).present[0]


@pytest.mark.rule("SH-001", "SH-002", "SH-003", "SH-004", "SH-005", "SH-006", "SH-007", "SH-008", "FM-009")
def test_three_witnesses_tell_shared_pages_apart(task, area, swap, look):
    """Present, swapped out and never allocated: pagemap alone shows the last two alike."""
    start = area(3, flags=0x21)
    task.write(start, b"present")
    task.write(start + PAGE, b"swapped")
    look(task, start, 2)
    [vma] = [v for v in task.process.maps() if v.start == start]

    def gone() -> bool:
        return shared_states(task.process, vma)[1] == SharedState.STORED

    page_out(task, start + PAGE, 1, gone)
    entries = task.process.pagemap(start, start + 3 * PAGE)
    assert entries.present.tolist() == [True, False, False]
    assert entries.values[1] == entries.values[2]
    file = task.process.file_residency(vma, start, start + 3 * PAGE)
    assert file.data.tolist() == [True, True, False]
    assert file.in_core.tolist() == [True, False, False]
    assert shared_states(task.process, vma).tolist() == [
        SharedState.PRESENT,
        SharedState.STORED,
        SharedState.NONE,
    ]
    assert task.read(start + PAGE, 7) == b"swapped"
    assert look(task, start, 2)[1].has(PageFlag.DIRTY)[1]


@pytest.mark.rule("SH-005", "SH-008")
def test_cached_but_not_mapped_here(task, area, look):
    start = area(2, flags=0x21)
    task.write(start, b"x")
    task.madvise(start, PAGE, 4)
    [vma] = [v for v in task.process.maps() if v.start == start]
    assert shared_states(task.process, vma).tolist() == [SharedState.CACHED, SharedState.NONE]
    _, flags, _ = look(task, start, 1)
    assert not flags.any(PageFlag.ANON).any()
