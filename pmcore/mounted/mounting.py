"""A machine mounted on a directory, in the foreground; nothing stays mounted, however this ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pmcore.errors import BackendUnavailable, SyscallError, syscall_error
from pmcore.mounted.fusefs import Tree, mfusepy, serve
from pmcore.mounted.syscalls import MNT_DETACH, umount

__all__ = ["mount"]


def mount(
    tree: Tree, place: str | Path, *, others: bool = False, ready: Callable[[], object] = lambda: None
) -> None:
    """Mount `tree` on the directory `place`, and answer until it is unmounted, or a signal ends it.

    `others` lets other users in too; `ready` is called once it is mounted. Raises BackendUnavailable where that
    cannot be, Missing for a place that is no directory.
    """
    mfusepy()
    where = Path(place).resolve()
    if not where.is_dir():
        raise syscall_error(20 if where.exists() else 2, f"mount({place})", remedy="a directory to mount on")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise BackendUnavailable(
            "mounting without root needs fusermount3", remedy="apt install fuse3, or use pmcore exec"
        )
    watcher, alive = _watch(str(where))
    try:
        options: dict[str, Any] = {"allow_other": True} if others else {}
        serve(tree, str(where), ready, **options)
    finally:
        os.close(alive)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(watcher, 0)


def _watch(place: str) -> tuple[int, int]:
    """A process that unmounts when this one has ended, even by SIGKILL; its number, and what to close at the end."""
    ours = os.stat(place).st_dev  # noqa: PTH116
    watched, alive = os.pipe()
    child = os.fork()
    if child:
        os.close(watched)
        return child, alive
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(alive)
        os.read(watched, 1)
        _unmount(place, ours)
    finally:
        os._exit(0)


def _unmount(place: str, before: int) -> None:
    """Unmount what a server that is no more has left; another file system at the place is left alone."""
    try:
        if os.stat(place).st_dev == before:  # noqa: PTH116
            return
    except OSError:
        pass  # nobody answers for it any more
    with contextlib.suppress(SyscallError):
        umount(place, MNT_DETACH)
        return
    fusermount = shutil.which("fusermount3")
    if fusermount is not None:
        subprocess.run([fusermount, "-u", "-z", "-q", place], check=False)
