"""Memory cgroups for a workbench: directories of its own, removed with it, whatever ends us.

They lie in one directory at the top of the memory controller's hierarchy, of version 1 or 2. Tasks that no program
moves stay where the workbench is.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pmcore.backends.procfs.workbench.steady import guard
from pmcore.errors import ArgumentError, BackendUnavailable, syscall_error

__all__ = ["Groups", "hierarchy"]

#: Seconds that a removed group may take to be offline.
_PATIENCE = 5.0


def hierarchy() -> tuple[Path, int]:
    """Where the memory controller's groups are mounted, and the version of that. Raises BackendUnavailable."""
    found: list[tuple[Path, int]] = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options = line.split()[:4]
        path = Path(place.encode().decode("unicode_escape"))
        if kind == "cgroup" and "memory" in options.split(","):
            return path, 1
        if kind == "cgroup2" and "memory" in (path / "cgroup.controllers").read_text().split():
            found.append((path, 2))
    if not found:
        raise BackendUnavailable("no memory cgroups are mounted", remedy="mount a cgroup hierarchy with them")
    return found[0]


def _own_path(version: int) -> str:
    """The group of this process, below the hierarchy's root."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") if version == 1 else number == "0":
            return path.strip("/")
    return ""


class Groups:
    """The groups of one workbench."""

    def __init__(self) -> None:
        self._root, self.version = hierarchy()
        if self.version == 2 and "memory" not in self._read(self._root / "cgroup.subtree_control").split():
            raise BackendUnavailable(
                "memory is not accounted below the root cgroup",
                remedy="echo +memory > .../cgroup.subtree_control",
            )
        self._home = self._root / _own_path(self.version)
        self._base = self._root / Path(tempfile.mktemp(prefix=f"pmcore-{os.getpid()}-")).name
        self._guardian = guard({"groups": str(self._base)})
        try:
            self._base.mkdir()
            self._enable(self._base)
        except OSError as error:
            self.close()
            raise BackendUnavailable(f"no cgroup can be made: {error}", remedy="run as root") from None
        #: Inode numbers of the groups that are there, by path.
        self.there: dict[str, int] = {}

    @staticmethod
    def _read(path: Path) -> str:
        return path.read_text()

    def _enable(self, directory: Path) -> None:
        """Have memory accounted for what is made in the directory."""
        if self.version == 2:
            (directory / "cgroup.subtree_control").write_text("+memory")

    def make(self, path: str) -> None:
        """mkdir. Raises ArgumentError, SyscallError."""
        if not re.fullmatch(r"[^/\0\n]+(/[^/\0\n]+)*", path) or not {".", ".."}.isdisjoint(path.split("/")):
            raise ArgumentError(
                f"make_group({path!r})", remedy='a path below the workbench\'s group, as in "a/b"'
            )
        place = self._base / path
        try:
            place.mkdir()
            try:
                if place.parent != self._base:
                    self._enable(place.parent)
            except OSError:
                place.rmdir()
                raise
        except OSError as error:
            raise syscall_error(error.errno or errno.EIO, f"mkdir({path!r})") from None
        self.there[path] = place.stat().st_ino

    def remove(self, path: str, offline: Callable[[int], bool] | None = None) -> None:
        """rmdir. Raises SyscallError. Waits until `offline` says that the group of that inode is."""
        inode = self.there.get(path, 0)
        try:
            (self._base / path).rmdir()
        except OSError as error:
            raise syscall_error(error.errno or errno.EIO, f"rmdir({path!r})") from None
        del self.there[path]
        end = time.monotonic() + _PATIENCE
        while offline is not None and not offline(inode):
            if time.monotonic() > end:
                raise BackendUnavailable(f"{path!r} is not offline after {_PATIENCE} s")
            time.sleep(0.001)

    def move(self, pid: int, path: str) -> None:
        """Write to cgroup.procs; "" is where the workbench is. Raises SyscallError."""
        place = self._base / path if path else self._home
        try:
            fd = os.open(place / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, str(pid).encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise syscall_error(error.errno or errno.EIO, f"move_task({pid}, {path!r})") from None

    def limit(self, path: str, length: int | None) -> None:
        """The most that it may have. Raises SyscallError."""
        name, none = ("memory.limit_in_bytes", "-1") if self.version == 1 else ("memory.max", "max")
        try:
            (self._base / path / name).write_text(none if length is None else str(length))
        except OSError as error:
            raise syscall_error(error.errno or errno.EIO, f"limit_group({path!r}, {length})") from None

    def file(self, path: str, name: str, text: str | None) -> str:
        """What a file says, after writing to it if there is something to write. Raises SyscallError."""
        place = self._base / path / name
        try:
            if text is not None:
                place.write_text(text)
            return place.read_text()
        except OSError as error:
            raise syscall_error(error.errno or errno.EIO, f"{name} of {path!r}") from None

    def usage(self, path: str) -> int:
        """Bytes that are charged to it."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self._base / path / name).read_text())

    def close(self) -> None:
        """Remove them all: the guardian does."""
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        self._guardian.wait()
        assert self._guardian.stdout is not None
        self._guardian.stdout.close()
