"""SIGKILL at any moment, of anybody: nothing stays mounted, no process stays, again and again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from .conftest import ended, mounts, wait_for

#: Reads, scans and writes without end, so that a kill meets calls under way.
BUSY = """
import fcntl, os, struct
print("ready", flush=True)
fd, flags = os.open("/proc/1/pagemap", os.O_RDONLY), os.open("/proc/kpageflags", os.O_RDONLY)
while True:
    os.pread(flags, 1 << 16, 0)
    fcntl.ioctl(fd, 0xC0606610, bytearray(struct.pack("=12Q", 96, 0, 1 << 44, (1 << 44) + (1 << 18), *[0] * 8)))
    with open("/proc/1/clear_refs", "w") as file:
        file.write("4")
    open("/proc/1/smaps").read()
"""
#: Seconds after which somebody is killed: while namespaces are made, while the command starts, while it is busy.
MOMENTS = (0.05, 0.3, 0.6, 0.9, 1.2, 2.0)


def family(pid):
    """A process and its descendants, as far as they are there."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        for thread in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                todo += [int(child) for child in thread.read_text().split()]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_exec_is_killed_at_any_moment(started, program, seed):
    chance, before = random.Random(seed), mounts()
    for moment in chance.sample(MOMENTS, 3):
        done = started("exec", "--machine", program, "--", sys.executable, "-c", BUSY, start_new_session=True)
        time.sleep(moment * chance.uniform(0.7, 1.3))
        everybody = family(done.pid)
        victim = chance.choice(everybody)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        if victim == done.pid:
            done.wait()
        wait_for(lambda everybody=everybody: all(ended(pid) for pid in everybody), seconds=30)
        done.wait()
        assert done.returncode != 0
        assert mounts() == before


@pytest.mark.parametrize("seed", range(2))
def test_mount_is_killed_at_any_moment(started, program, tmp_path, seed):
    if os.geteuid() != 0:
        pytest.skip("mounting on a directory needs root")
    chance, before = random.Random(seed), mounts()
    for number, moment in enumerate(chance.sample(MOMENTS, 3)):
        place = tmp_path / str(number)
        place.mkdir()
        server = started("mount", str(place), "--machine", program)
        time.sleep(moment * chance.uniform(0.7, 1.3))
        everybody = family(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        wait_for(lambda everybody=everybody: all(ended(pid) for pid in everybody), seconds=30)
        wait_for(lambda: mounts() == before)
        assert list(place.iterdir()) == []
