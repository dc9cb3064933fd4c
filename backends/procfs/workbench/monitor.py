"""Reading the tasks' userfaultfds for them.

A task that forks, or that moves, removes or unmaps memory which a userfaultfd watches, waits until somebody has read
the event, if events were agreed on. While a task is at work the workbench holds its descriptors, too, and reads; not
longer, because a registration lasts as long as anybody holds its descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
from collections.abc import Callable, Iterator, Mapping

import attrs

from pmcore.errors import SyscallError, syscall_error
from pmcore.uapi import UffdFeature

__all__ = ["Context", "Monitor", "Watch", "copy_fd"]

_SYS_PIDFD_GETFD = 438
_EVENTS = (
    UffdFeature.EVENT_FORK | UffdFeature.EVENT_REMAP | UffdFeature.EVENT_REMOVE | UffdFeature.EVENT_UNMAP
)
_EVENT_FORK = 0x13
#: struct uffd_msg: the event, and what FORK says of it, the new descriptor.
_MESSAGE = struct.Struct("=B7xI20x")


@attrs.frozen(eq=False)
class Context:
    """A userfaultfd, whoever holds descriptors of it."""

    features: int


def copy_fd(pid: int, fd: int) -> int:
    """A descriptor of our own for one of another process's. Raises SyscallError."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(pid)
    try:
        found = int(libc.syscall(_SYS_PIDFD_GETFD, handle, fd, 0))
    finally:
        os.close(handle)
    if found < 0:
        raise syscall_error(ctypes.get_errno(), f"pidfd_getfd({pid}, {fd})")
    return found


class Watch:
    """Userfaultfds that are read while a task is at work."""

    def __init__(self) -> None:
        #: Our descriptor -> the task that holds it, by which number.
        self.held: dict[int, tuple[int, int, Context]] = {}
        #: Descriptors that came with the events of a fork: like those of `held`.
        self.forked: dict[int, tuple[int, int, Context]] = {}

    def wait(self, other: int, seconds: float) -> bool:
        """Read events until the descriptor `other` can be read; False where nothing happens for so long."""
        while True:
            ready = select.select([other, *self.held], [], [], seconds)[0]
            if not ready:
                return False
            if other in ready:
                return True
            for fd in ready:
                self._read(fd)

    def _read(self, fd: int) -> None:
        try:
            message = os.read(fd, _MESSAGE.size)
        except OSError:
            del self.held[fd]  # it cannot be read any more
            os.close(fd)
            return
        event, new = _MESSAGE.unpack(message)
        if event == _EVENT_FORK:
            self.forked[new] = self.held[fd]

    def close(self) -> None:
        """Hold them no longer."""
        for fd in (*self.held, *self.forked):
            os.close(fd)
        self.held.clear()
        self.forked.clear()


class Monitor:
    """Who holds which userfaultfd."""

    def __init__(self) -> None:
        #: By task, the oldest first, and descriptor.
        self._held: dict[int, dict[int, Context]] = {}

    def opened(self, pid: int, fd: int, features: int) -> None:
        """A task has a new one."""
        self._held.setdefault(pid, {})[fd] = Context(features)

    def received(self, pid: int, fd: int, context: Context) -> None:
        """A task has got one that came with the event of a fork."""
        self._held.setdefault(pid, {})[fd] = Context(context.features)

    def closed(self, pid: int, fd: int) -> None:
        """A task has closed a descriptor."""
        self._held.get(pid, {}).pop(fd, None)

    def forked(self, parent: int, child: int) -> None:
        """A child has the descriptors of its parent."""
        self._held[child] = dict(self._held.get(parent, {}))

    def ended(self, pid: int) -> None:
        """A task is gone."""
        self._held.pop(pid, None)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """Have a copy of each userfaultfd that tells of events, from the oldest task that holds it."""
        watch, seen = Watch(), set()
        try:
            for pid, fds in self._held.items():
                for fd, context in fds.items():
                    if context.features & _EVENTS and context not in seen:
                        seen.add(context)
                        with contextlib.suppress(SyscallError):  # a task that was killed holds nothing
                            watch.held[copy_fd(pid, fd)] = pid, fd, context
            yield watch
        finally:
            watch.close()

    def hand_over(self, watch: Watch, give: Callable[[int, int], int]) -> Mapping[tuple[int, int], int]:
        """Give what came with the events of a fork to the tasks that read them.

        `give(pid, fd)` has the task take a descriptor of ours, and says by which number it has it. By (task,
        descriptor) that the event came from: the number of the new one.
        """
        found = {}
        for fd, (pid, old, context) in watch.forked.items():
            number = give(pid, fd)
            self.received(pid, number, context)
            found[pid, old] = number
        return found
