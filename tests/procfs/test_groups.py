"""Memory cgroups of a workbench of real processes: they go with it, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmcore.errors import BackendUnavailable
from pmcore.registry import open_workbench

pytestmark = [
    pytest.mark.live,
    pytest.mark.xdist_group("live"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux"),
]

_SCRIPT = """
import sys
from pmcore.registry import open_workbench
bench = open_workbench("procfs")
task = bench.spawn()
bench.make_group("a")
bench.make_group("a/b")
bench.move_task(task, "a")
place = task.mmap(4096)
task.write(place, b"x")
print(bench._groups._base, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bench():
    with open_workbench("procfs") as opened:
        try:
            opened.make_group("a")
        except BackendUnavailable as error:
            pytest.skip(str(error))
        yield opened


def _gone(base: Path) -> bool:
    end = time.monotonic() + 15
    while base.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return not base.exists()


def test_groups_go_when_the_workbench_closes(bench):
    base = bench._groups._base
    task = bench.spawn()
    bench.move_task(task, "a")
    assert (base / "a").is_dir()
    bench.close()
    assert not base.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_groups_go_when_the_workbench_is_killed(bench, number):
    driver = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    base = Path(driver.stdout.readline().strip())
    assert base.parent == bench._groups._base.parent
    assert (base / "a" / "b").is_dir()
    os.kill(driver.pid, number)
    driver.wait()
    driver.stdin.close()
    driver.stdout.close()
    assert _gone(base)


def test_a_task_goes_back_to_where_the_workbench_is(bench):
    task = bench.spawn()
    before = task.process.pread("cgroup", 0, 4096)
    bench.move_task(task, "a")
    assert task.process.pread("cgroup", 0, 4096) != before
    bench.move_task(task, "")
    assert task.process.pread("cgroup", 0, 4096) == before


def test_a_removed_group_is_offline_at_once(bench):
    task = bench.spawn()
    place = task.mmap(4096)
    bench.move_task(task, "a")
    task.write(place, b"x")
    pfn = int(task.process.pagemap(place, place + 4096).pfn[0])
    inode = bench.groups()["a"]
    assert int(bench.kernel.kpagecgroup(pfn, 1)[0]) == inode
    bench.move_task(task, "")
    bench.remove_group("a")
    assert int(bench.kernel.kpagecgroup(pfn, 1)[0]) not in (0, inode)
    assert not bench.groups()
