"""The tree of paths over a kernel."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Sequence

import attrs

from pmcore.errors import Missing, ProcessGone, syscall_error
from pmcore.procview.files import (
    ClearRefsFile,
    IdleFile,
    MapsFile,
    OpenFile,
    PagemapFile,
    TextFile,
    WordsFile,
    WrittenFile,
)
from pmcore.procview.opener import ROOT, Capability, Opener
from pmcore.protocols import IDLE_BITMAP, FrameFile, Kernel, Process

__all__ = ["Node", "ProcView"]

#: Permissions of the files that are not readable by all; (rule FS-001).
_MODES = {
    **{str(file): 0o400 for file in FrameFile},
    "pagetypeinfo": 0o400,
    "pagemap": 0o400,
    "clear_refs": 0o200,
    "comm": 0o644,
}
#: What may only be opened by who may inspect the process.
_PTRACE = frozenset({"pagemap", "maps", "smaps", "smaps_rollup"})
_SYSFS_SIZE = 4096
#: What takes whether a memory block is online.
_BLOCK_STATE = re.compile(r"/sys/devices/system/memory/memory\d+/state")
#: Where groups come and go.
_CGROUPS = "/sys/fs/cgroup"
#: Files of a cgroup that take something.
_TAKES = frozenset({"cgroup.procs", "tasks", "memory.limit_in_bytes", "memory.max"})


@attrs.frozen(kw_only=True)
class Node:
    """A path of the tree: what stat(2) says of it, and what lies below it."""

    path: str
    #: As in st_mode: type and permissions.
    mode: int
    uid: int = 0
    #: As the kernel shows it: 0 for all of /proc and the idle bitmap, 4096 for the texts of /sys.
    size: int = 0
    #: Its inode number, where that says something (a cgroup's directory); 0 elsewhere.
    inode: int = 0
    #: Where a symbolic link leads.
    target: str = ""
    #: Of a directory: the names in it, when asked.
    list_names: Callable[[], Sequence[str]] = tuple
    #: Of a file: open it for somebody who may.
    _open: Callable[[Opener, bool], OpenFile] | None = None

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    def names(self) -> Sequence[str]:
        """The names in a directory. Raises NotADirectoryError."""
        if not self.is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.path)
        return self.list_names()

    def open(self, flags: int = os.O_RDONLY, opener: Opener = ROOT) -> OpenFile:
        """open(2) by `opener`. Raises OSError as the kernel does: EACCES, EPERM, ESRCH, EISDIR, ..."""
        access = flags & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR)
        writing = access != os.O_RDONLY
        if self.is_dir or self._open is None:
            number = errno.EISDIR if writing or self._open is None else errno.EINVAL
            raise IsADirectoryError(number, os.strerror(number), self.path)
        permissions = stat.S_IMODE(self.mode)
        reading = access != os.O_WRONLY
        # sysfs asks its own mode, whoever it is: capabilities do not help (rule FS-014).
        sysfs = self.path.startswith("/sys/") and not self.path.startswith(f"{_CGROUPS}/")
        if writing and sysfs and not permissions & 0o222:
            raise syscall_error(errno.EACCES, f"open({self.path})")
        if (reading and not opener.may(permissions, self.uid, write=False)) or (
            writing and not opener.may(permissions, self.uid, write=True)
        ):
            raise syscall_error(errno.EACCES, f"open({self.path})")
        return self._open(opener, reading)


class ProcView:
    """/proc and /sys of a kernel: see the package's docstring.

    `owner` is the user that the processes belong to; `self_pid` the process that /proc/self is (none: there is no such
    link).
    """

    def __init__(self, kernel: Kernel, *, owner: int = 0, self_pid: int | None = None) -> None:
        self.kernel = kernel
        self.owner = owner
        self.self_pid = self_pid
        #: Directories of sysfs, and the names in them, in their order.
        self._sys: dict[str, dict[str, None]] = {}
        self._proc: list[str] = []
        self._files: tuple[str, ...] = ()
        self._renew()

    def _renew(self) -> None:
        """Ask again which files there are: cgroups come and go."""
        files = tuple(self.kernel.files())
        if files == self._files:
            return
        self._files = files
        self._sys.clear()
        self._proc = [name for name in files if not name.startswith("/sys/")]
        for name in files:
            if name.startswith("/sys/"):
                self._grow(name)

    def _grow(self, path: str) -> None:
        while path != "/sys":
            parent, _, name = path.rpartition("/")
            known = self._sys.setdefault(parent, {})
            if name in known:
                return
            known[name] = None
            path = parent

    def inode(self, path: str) -> int:
        """The inode number of what has one of its own, see `Node`; else 0."""
        return self.kernel.inode(path) if path.startswith(_CGROUPS) else 0

    # -- paths -----------------------------------------------------------------------------------------

    def node(self, path: str) -> Node:
        """What an absolute path names; a link itself, not what it leads to. Raises Missing (ENOENT)."""
        parts = path.strip("/").split("/")
        if parts == [""]:
            return _directory("/", lambda: ["proc", "sys"] if self._sys else ["proc"])
        if parts[0] == "proc":
            return self._under_proc(path, parts[1:])
        if parts[0] == "sys":
            return self._under_sys("/" + "/".join(parts))
        raise _missing(path)

    def open(self, path: str, flags: int = os.O_RDONLY, opener: Opener = ROOT) -> OpenFile:
        """Open the file at `path`, following /proc/self. Raises OSError as the kernel does."""
        parts = path.strip("/").split("/")
        if parts[:2] == ["proc", "self"] and self.self_pid is not None:
            path = "/".join(["/proc", str(self.self_pid), *parts[2:]])
        return self.node(path).open(flags, opener)

    def _under_proc(self, path: str, parts: list[str]) -> Node:
        if not parts:
            return _directory("/proc", self._proc_names)
        name = parts[0]
        if name == "self" and self.self_pid is not None and len(parts) == 1:
            return Node(path=path, mode=stat.S_IFLNK | 0o777, target=str(self.self_pid))
        if name.isascii() and name.isdigit() and not name.startswith("0"):
            return self._under_process(path, int(name), parts[1:])
        if len(parts) > 1 or name not in self._proc:
            raise _missing(path)
        return self._kernel_file(path, name)

    def _proc_names(self) -> list[str]:
        link = ["self"] if self.self_pid is not None else []
        return [*(str(pid) for pid in self.kernel.pids()), *link, *self._proc]

    def _kernel_file(self, path: str, name: str) -> Node:
        kernel, buffer = self.kernel, self.kernel.geometry.page_size
        if name in tuple(FrameFile):
            return _file(path, _MODES[name], 0, lambda _o, _r: WordsFile(path, kernel, name))
        mode = _MODES.get(name, 0o444)
        return _file(path, mode, 0, lambda _o, _r: TextFile(path, kernel, name, buffer=buffer))

    def _under_process(self, path: str, pid: int, parts: list[str]) -> Node:
        try:
            process = self.kernel.process(pid)
        except ProcessGone:
            raise _missing(path) from None
        if not parts:
            return _directory(path, process.files, uid=self.owner)
        name = parts[0]
        if len(parts) > 1 or name not in process.files():
            raise _missing(path)

        def open_it(opener: Opener, reading: bool) -> OpenFile:
            return self._open_of_process(path, process, name, opener, reading)

        return _file(path, _MODES.get(name, 0o444), self.owner, open_it)

    def _open_of_process(
        self, path: str, process: Process, name: str, opener: Opener, reading: bool
    ) -> OpenFile:
        if name in _PTRACE and not opener.may_inspect(self.owner):
            raise syscall_error(errno.EACCES, f"open({path})")
        admin, profile = opener.has(Capability.SYS_ADMIN), self.kernel.profile
        buffer = self.kernel.geometry.page_size
        if name == "pagemap":
            if not admin and profile.has("pagemap.open_needs_admin"):
                raise syscall_error(errno.EPERM, f"open({path})")
            return PagemapFile(path, process, hidden=not admin and profile.has("pagemap.pfn_needs_admin"))
        if name == "clear_refs":
            return ClearRefsFile(path, process)
        kind = MapsFile if name == "maps" else TextFile
        return kind(path, process, name, buffer=buffer, writable=not reading)

    def _under_sys(self, path: str) -> Node:
        if _CGROUPS.startswith(path) or path.startswith(_CGROUPS):
            self._renew()
        if path in self._sys:
            permissions = 0o755 if path.startswith(_CGROUPS) else 0o555
            return _directory(
                path, lambda: list(self._sys[path]), inode=self.inode(path), permissions=permissions
            )
        parent, _, name = path.rpartition("/")
        if name not in self._sys.get(parent, ()):
            raise _missing(path)
        kernel, buffer = self.kernel, self.kernel.geometry.page_size
        if path == IDLE_BITMAP:
            return _file(path, 0o600, 0, lambda _o, _r: IdleFile(path, kernel))
        if _BLOCK_STATE.fullmatch(path):
            return _file(
                path,
                0o644,
                0,
                lambda _o, reading: WrittenFile(path, kernel, path, buffer=buffer, writable=not reading),
                size=_SYSFS_SIZE,
            )
        if path.startswith(_CGROUPS):
            node = _file(
                path,
                0o644 if name in _TAKES else 0o444,
                0,
                lambda _o, reading: WrittenFile(path, kernel, path, buffer=buffer, writable=not reading),
            )
            return attrs.evolve(node, inode=self.inode(path))
        return _file(
            path, 0o444, 0, lambda _o, _r: TextFile(path, kernel, path, buffer=buffer), size=_SYSFS_SIZE
        )


def _missing(path: str) -> Missing:
    return Missing(errno.ENOENT, f"open({path})")


def _directory(
    path: str, names: Callable[[], Sequence[str]], *, uid: int = 0, inode: int = 0, permissions: int = 0o555
) -> Node:
    return Node(path=path, mode=stat.S_IFDIR | permissions, uid=uid, list_names=names, inode=inode)


def _file(
    path: str, permissions: int, uid: int, opening: Callable[[Opener, bool], OpenFile], *, size: int = 0
) -> Node:
    return Node(path=path, mode=stat.S_IFREG | permissions, uid=uid, size=size, open=opening)
