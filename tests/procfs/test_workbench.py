"""Real tasks: fast, tidy, and not to be killed by their own steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from pmcore.errors import AddressSpaceFault, ArgumentError, BackendUnavailable, ProcessGone

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]
PAGE = 4096


@pytest.fixture
def bench():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    from pmcore.backends.procfs.workbench import open_workbench

    with open_workbench() as bench:
        yield bench


def test_a_fault_is_reported_and_survived(bench):
    task = bench.spawn()
    start = task.mmap(2 * PAGE)
    task.munmap(start + PAGE, PAGE)
    for _ in range(3):
        with pytest.raises(AddressSpaceFault) as caught:
            task.touch(start, 2 * PAGE)
        assert caught.value.address == start + PAGE
    assert task.read(start, 1) == b"\0"


def test_both_signals_are_told_apart(bench):
    task = bench.spawn()
    fd = task.memfd_create("short")
    start = task.mmap(PAGE, flags=1, fd=fd)
    with pytest.raises(AddressSpaceFault, match="SIGBUS"):
        task.read(start, 1)
    with pytest.raises(AddressSpaceFault, match="SIGSEGV"):
        task.write(0, b"x")


def test_a_killed_task_is_gone_and_not_waited_for(bench):
    task = bench.spawn()
    os.kill(task.pid, signal.SIGKILL)
    began = time.monotonic()
    with contextlib.suppress(ProcessGone):
        task.mmap(PAGE)
    with pytest.raises(ProcessGone):
        task.mmap(PAGE)
    assert time.monotonic() - began < 5
    assert not task.alive
    assert list(bench.tasks()) == []
    bench.spawn().exit()


def test_nothing_is_left_behind():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    from pmcore.backends.procfs.workbench import open_workbench

    bench = open_workbench()
    tasks = [bench.spawn() for _ in range(3)]
    tasks.append(tasks[0].fork())
    tasks[0].open_file("kept")
    pids, directory = [task.pid for task in tasks], bench.directory
    assert directory.is_dir()
    bench.close()
    bench.close()
    assert not directory.exists()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_nothing_of_a_disk_is_left_behind():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    from pmcore.backends.procfs.workbench import open_workbench

    try:
        bench = open_workbench(disk="8 MiB")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        disk = bench.disk
        bench.spawn().open_file("kept", pages=3)
        assert f" {disk.directory} ext4 " in Path("/proc/mounts").read_text()
        assert (bench.directory / "kept").read_bytes()[4096:4103] == b"kept:1\n"
    assert str(disk.directory) not in Path("/proc/mounts").read_text()
    assert not disk.directory.exists()
    assert not disk.image.exists()


def test_the_arena_is_free_in_a_fresh_task(bench):
    vmas = bench.spawn().process.maps()
    assert not [v for v in vmas if v.end > 0x1000_0000_0000 and v.start < 0x4000_0000_0000]


def test_a_step_disturbs_no_area(bench):
    """A hundred steps that do nothing to an area leave its entries as they were."""
    task = bench.spawn()
    start = task.mmap(16 * PAGE, addr=0x1000_0000_0000, flags=0x100022)
    task.touch(start, 8 * PAGE)
    before = task.process.pagemap(start, start + 16 * PAGE).values.tolist()
    for _ in range(100):
        task.read(start, 64)
    assert task.process.pagemap(start, start + 16 * PAGE).values.tolist() == before


def test_file_names_stay_in_the_workbench(bench):
    task = bench.spawn()
    for name in ("../up", "/etc/passwd", "", ".."):
        with pytest.raises(ArgumentError):
            task.open_file(name)


def test_silly_touches_are_refused(bench):
    task = bench.spawn()
    with pytest.raises(ArgumentError):
        task.touch(0, -1)
    with pytest.raises(ArgumentError):
        task.touch(0, 10, step=-5)


def test_steady_puts_everything_back():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    from pmcore.backends.procfs.workbench import drain_lru, steady

    knobs = [Path("/proc/sys/vm/page-cluster")]
    knobs.append(Path("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs"))
    before = [knob.read_text() if knob.exists() else None for knob in knobs], os.sched_getaffinity(0)
    seen = []

    def interrupted() -> None:
        with steady():
            seen.append(len(os.sched_getaffinity(0)))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert seen == [1]
    assert before == (
        [knob.read_text() if knob.exists() else None for knob in knobs],
        os.sched_getaffinity(0),
    )
    assert drain_lru() in (True, False)


def test_accesses_through_the_kernels_copying():
    """The way of machines for which there is no machine code: the same accesses, and a fault instead of a death."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    import ctypes
    import mmap

    from pmcore.backends.procfs.workbench import _child

    memory, area = _child._Portable(), mmap.mmap(-1, 2 * PAGE)
    place = ctypes.addressof(ctypes.c_char.from_buffer(area))
    data = ctypes.create_string_buffer(b"abc", 3)
    memory.access(place + 1, 1, 3, ctypes.addressof(data), write=True)
    assert area[:5] == b"\0abc\0"
    seen = ctypes.create_string_buffer(3)
    memory.access(place, 2, 3, ctypes.addressof(seen), write=False)
    assert seen.raw == b"\0b\0"
    memory.access(place, PAGE, 2, 0, write=True)
    memory.access(place, PAGE, 2, 0, write=False)
    assert area[:5] == b"\0abc\0"
    for write in (False, True):
        with pytest.raises(_child.Fault) as caught:
            memory.access(1 << 46, 1, 1, 0, write=write)
        assert caught.value.args == (signal.SIGSEGV, 1 << 46, 0, 0)
