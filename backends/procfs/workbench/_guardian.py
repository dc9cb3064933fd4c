"""Puts the machine back when its parent is done with it, or dead: its end of the pipe closes in any case.

Run as `python -I -S -B _guardian.py JSON` with a pipe as standard input; JSON names the swap files to switch off, the
file systems to unmount, the knobs with the values that they had, the files and zram devices to remove, and the cgroup
to remove with all in it once their tasks are gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time

_PATIENCE = 10.0


def main() -> None:
    """Wait for the end of standard input, then put everything back, in the order given."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    todo = json.loads(sys.argv[1])
    os.write(1, b"ready\n")
    while os.read(0, 4096):
        pass
    libc = ctypes.CDLL(None)
    for path in todo.get("swapoff", ()):
        libc.swapoff(path.encode())
    for path in todo.get("umount", ()):
        libc.umount2(path.encode(), 2)  # MNT_DETACH: whoever still has a file open keeps it until then
        try:
            os.rmdir(path)  # noqa: PTH106
        except OSError:
            continue
    for path, value in todo.get("knobs", ()):
        try:
            with open(path) as knob:  # noqa: PTH123
                if f"[{value}]" in knob.read():
                    continue  # it says so already
            with open(path, "w") as knob:  # noqa: PTH123
                knob.write(value)
        except OSError:
            continue
    for path in todo.get("remove", ()):
        try:
            os.unlink(path)  # noqa: PTH108
        except OSError:
            continue
    for number in todo.get("zram", ()):
        _remove_zram(number)
    if "groups" in todo:
        _remove_groups(todo["groups"])


def _remove_zram(number: int) -> None:
    """Until nobody has a file of it open any more."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            with open("/sys/class/zram-control/hot_remove", "w") as knob:  # noqa: PTH123
                knob.write(str(number))
        except OSError:
            time.sleep(0.01)
        else:
            return


def _remove_groups(base: str) -> None:
    end = time.monotonic() + _PATIENCE
    while os.path.isdir(base) and time.monotonic() < end:  # noqa: PTH112
        for directory, _, _ in os.walk(base, topdown=False):
            try:
                os.rmdir(directory)  # noqa: PTH106
            except OSError:
                time.sleep(0.01)


if __name__ == "__main__":
    main()
