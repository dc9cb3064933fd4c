"""The context: which machine answers now, and what is replaced as long as any does."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from pmcore.errors import ArgumentError
from pmcore.procview import ROOT, Opener, ProcView
from pmcore.protocols import Kernel
from pmcore.testing.fakeproc.tree import Tree

__all__ = ["FakeProc", "active", "answering", "fake_proc", "passing"]

#: The machines that stand in, the innermost last.
_stack: list[FakeProc] = []
#: Callers take turns: a view and a machine are for one at a time.
_turn = threading.RLock()
_here = threading.local()


class FakeProc:
    """A machine in the place of /proc and /sys: see the package. Made by `fake_proc`; a context manager."""

    def __init__(
        self,
        machine: Kernel,
        *,
        pid: int | None,
        opener: Opener,
        owner: int,
        files: Mapping[str, bytes | str],
    ) -> None:
        if not isinstance(machine, Kernel):
            raise ArgumentError(
                f"{type(machine).__name__} is no machine",
                remedy='what pmcore.open("sim") or open("recording", ...) gives',
            )
        if pid is not None and pid not in machine.pids():
            there = ", ".join(map(str, list(machine.pids())[:8])) or "none"
            raise ArgumentError(f"pid={pid}: the machine has no such process", remedy=f"there are: {there}")
        self.machine = machine
        #: The process that /proc/self and os.getpid() are; None: there is no /proc/self.
        self.pid = pid
        #: Who opens files.
        self.opener = opener
        self.tree = Tree(ProcView(machine, owner=owner, self_pid=pid), files)

    def __enter__(self) -> Self:
        from pmcore.testing.fakeproc import patching

        with _turn:
            _stack.append(self)
            if len(_stack) == 1:
                try:
                    patching.install()
                except BaseException:
                    _stack.pop()
                    raise
            patching.announce()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from pmcore.testing.fakeproc import patching

        with _turn:
            last = len(_stack) - 1 - _stack[::-1].index(self)
            del _stack[last]
            if self not in _stack:
                patching.abandon(self)
            if not _stack:
                patching.remove()
            else:
                patching.announce()


def fake_proc(
    machine: Kernel,
    *,
    pid: int | None = None,
    opener: Opener = ROOT,
    owner: int = 0,
    files: Mapping[str, bytes | str] | None = None,
) -> FakeProc:
    """A context in which this process's /proc and /sys are those of `machine` (see the package for what that covers).

    `pid` is the process that /proc/self and os.getpid() are. `opener` opens the files (pmcore.procview.Opener), the
    processes belong to user `owner`. `files` adds texts that the machine has not, by path.
    Raises ArgumentError for a process that the machine does not have.
    """
    return FakeProc(machine, pid=pid, opener=opener, owner=owner, files=files or {})


def active() -> FakeProc | None:
    """The machine that answers now; None also while one is being asked, so that it can use the real files itself."""
    if getattr(_here, "asking", False) or not _stack:
        return None
    return _stack[-1]


def passing() -> bool:
    """Whether calls are to go through untouched: a machine is being asked in this thread."""
    return bool(getattr(_here, "asking", False))


@contextlib.contextmanager
def answering(path: object = None) -> Iterator[None]:
    """Ask the machine: one caller at a time, its own file accesses untouched, errors as the operating system's."""
    with _turn:
        before, _here.asking = passing(), True
        try:
            yield
        except OSError as error:
            number = error.errno if error.errno is not None else errno.EIO
            if path is None:
                raise OSError(number, os.strerror(number)) from error
            raise OSError(number, os.strerror(number), path) from error
        finally:
            _here.asking = before
