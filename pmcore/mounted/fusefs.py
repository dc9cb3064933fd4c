"""The tree of a ProcView as a FUSE file system: what the kernel asks for, answered by nodes and open files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from pmcore.errors import BackendUnavailable, Missing, NotPermitted, PmcoreError, syscall_error
from pmcore.mounted.nearby import SHORT, Words, words_of
from pmcore.mounted.stepping import StepFile, Stepper
from pmcore.mounted.syscalls import CallersMemory
from pmcore.procview import ROOT, CallerMemory, Node, Opener, OpenFile, ProcView
from pmcore.procview.files import IdleFile

__all__ = ["KERNEL_PROC", "Tree", "mfusepy", "serve"]

#: Where a command inside finds the real /proc: what is not of the machine is linked to there.
KERNEL_PROC = ".kernel"
#: Files of the real /proc that say nothing of memory, and that programs need to run.
_PASSED = frozenset(
    {
        "self",
        "thread-self",
        "mounts",
        "filesystems",
        "cpuinfo",
        "stat",
        "uptime",
        "loadavg",
        "devices",
        "misc",
    }
    | {"tty", "sys", "net", "cmdline", "cgroups", "interrupts", "partitions", "modules"}
)
_STEP = "/proc/pmcore/step"
#: Directories that there are without anything in them, to hide the real machine's.
_ALWAYS: dict[str, tuple[str, ...]] = {
    "/sys": ("devices", "kernel"),
    "/sys/kernel": ("mm",),
    "/sys/kernel/mm": (),
    "/sys/devices": ("system",),
    "/sys/devices/system": ("memory",),
    "/sys/devices/system/memory": (),
}


def mfusepy() -> Any:
    """The module that speaks to libfuse. Raises BackendUnavailable where it or libfuse 3 is missing."""
    try:
        module: Any = import_module("mfusepy")
    except ImportError:
        raise BackendUnavailable("mfusepy is missing", remedy="pip install 'pmcore[fuse]'") from None
    except OSError as error:
        raise BackendUnavailable(f"libfuse is missing: {error}", remedy="apt install libfuse3-3") from None
    if module.fuse_version_major != 3:
        raise BackendUnavailable(
            f"libfuse {module.fuse_version_major} is too old", remedy="apt install libfuse3-3"
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise BackendUnavailable("/dev/fuse cannot be opened", remedy="modprobe fuse, or ask its owner")
    return module


class Tree:
    """Paths and open files, without FUSE: what can be asked, by path or by handle.

    `opener` says for a caller's user who that is on the machine. `passed` is where the real /proc is for what is not
    the machine's; without it there is nothing else. While it is mounted nothing but this tree may change the machine.
    """

    def __init__(
        self,
        view: ProcView,
        *,
        opener: Callable[[int], Opener] = lambda uid: ROOT if uid == 0 else Opener.user(uid),
        stepper: Stepper | None = None,
        passed: str = "",
    ) -> None:
        self.view, self.opener, self.stepper, self.passed = view, opener, stepper, passed
        #: What is open, with the node that it was opened by: a directory has no file.
        self._open: dict[int, tuple[Node, OpenFile | None]] = {}
        self._last = 0
        #: Files of words among them, for short reads.
        self._words: dict[int, Words] = {}
        #: How often anything was written to, or asked by an ioctl: only that changes a machine while it is mounted.
        self._changes = 0
        #: When it was mounted: the time of everything in it.
        self.time = time.time_ns()

    def node(self, path: str, caller: int = 0) -> Node:
        """What a path is. Raises OSError."""
        if self.stepper is not None and path in ("/proc/pmcore", _STEP):
            return self._step_node(path)
        if self.passed and path.startswith("/proc/"):
            name = path[6:]
            if name == KERNEL_PROC:
                return Node(path=path, mode=stat.S_IFDIR | 0o555)
            if name in _PASSED and (name != "self" or self.view.self_pid is None):
                if not os.path.lexists(f"{self.passed}/{name}"):
                    raise syscall_error(errno.ENOENT, f"open({path})")
                return Node(path=path, mode=stat.S_IFLNK | 0o777, target=f"{KERNEL_PROC}/{name}")
            if name.isdigit() and caller and self._is_caller(name, caller):
                return Node(path=path, mode=stat.S_IFLNK | 0o777, target=f"{KERNEL_PROC}/self")
        try:
            return self.view.node(path)
        except Missing:
            if path in _ALWAYS:
                return Node(path=path, mode=stat.S_IFDIR | 0o555, list_names=lambda: _ALWAYS[path])
            raise

    def _is_caller(self, name: str, caller: int) -> bool:
        """Whether the caller, a process outside of the machine, calls itself by that number."""
        if int(name) in self.view.kernel.pids():
            return False
        with contextlib.suppress(OSError), open(f"{self.passed}/{caller}/status", "rb") as file:  # noqa: PTH123
            for line in file:
                if line.startswith(b"NSpid:"):
                    return line.split()[-1] == name.encode()
        return False

    def _step_node(self, path: str) -> Node:
        stepper = self.stepper
        assert stepper is not None
        if path == _STEP:
            return Node(
                path=path, mode=stat.S_IFREG | 0o644, open=lambda _opener, _reading: StepFile(path, stepper)
            )
        return Node(path=path, mode=stat.S_IFDIR | 0o555, list_names=lambda: ["step"])

    def names(self, handle: int) -> Iterator[str]:
        """The names in an open directory."""
        node = self.opened(handle)
        yield from node.names()
        if node.path == "/proc":
            if self.stepper is not None:
                yield "pmcore"
            if self.passed:
                there = (name for name in sorted(_PASSED) if os.path.lexists(f"{self.passed}/{name}"))
                yield from (n for n in there if n != "self" or self.view.self_pid is None)

    def open(self, path: str, flags: int, uid: int) -> int:
        """Open a file; its handle."""
        node = self.node(path)
        return self._keep(node, node.open(flags, self.opener(uid)))

    def open_directory(self, path: str) -> int:
        """Open a directory; its handle."""
        return self._keep(self.node(path), None)

    def _keep(self, node: Node, file: OpenFile | None) -> int:
        self._last += 1
        self._open[self._last] = node, file
        words = words_of(file)
        if words is not None:
            self._words[self._last] = words
        return self._last

    def opened(self, handle: int) -> Node:
        """The node that was opened under that handle."""
        return self._open[handle][0]

    def access(self, path: str, mode: int, context: tuple[int, int, int]) -> None:
        """access(2). Raises OSError."""
        node, opener = self.node(path, context[2]), self.opener(context[0])
        permissions = stat.S_IMODE(node.mode)
        for bit, write in ((os.R_OK, False), (os.W_OK, True)):
            if mode & bit and not opener.may(permissions, node.uid, write=write):
                raise syscall_error(errno.EACCES, f"access({path})")
        if mode & os.X_OK and stat.S_ISREG(node.mode):
            raise syscall_error(errno.EACCES, f"access({path})")

    def file(self, handle: int) -> OpenFile:
        """The open file of that handle. Raises IsADirectoryError."""
        file = self._open[handle][1]
        if file is None:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return file

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """read(2) at `offset`. A tool that reads a word at a time is answered from what was read around it."""
        if size <= SHORT and not (offset | size) & 7:
            words = self._words.get(handle)
            if words is not None:
                return words.read(offset, size, self._changes)
        file = self.file(handle)
        if isinstance(file, IdleFile):
            self._changes += 1  # reading moves accessed bits, and takes IDLE off frames
        return file.read(offset, size)

    def write(self, handle: int, offset: int, data: bytes) -> int:
        """write(2)."""
        self._changes += 1
        return self.file(handle).write(offset, data)

    def ioctl(self, handle: int, command: int, argument: bytearray, memory: CallerMemory) -> int:
        """ioctl(2); `argument` is changed in place."""
        self._changes += 1
        return self.file(handle).ioctl(command, argument, memory)

    def release(self, handle: int) -> None:
        """Close it."""
        self._words.pop(handle, None)
        _, file = self._open.pop(handle)
        if file is not None:
            file.close()


def _made_of(path: str) -> int:
    """An inode number for what has none of its own: no cgroup has so large a one."""
    return zlib.crc32(path.encode()) | 1 << 32


def _bytes_of(command: int) -> int:
    """How long the structure is that an ioctl's number names."""
    return command >> 16 & 0x3FFF


def operations(tree: Tree, ready: Callable[[], object] = lambda: None) -> Any:
    """What mfusepy calls, over a tree; `ready` is called once when the kernel begins to ask."""
    module = mfusepy()
    base: Any = module.Operations
    context = module.fuse_get_context

    class _Operations(base):  # type: ignore[misc]
        use_ns = True
        flag_nopath = flag_nullpath_ok = True

        def init(self, path: str) -> None:
            ready()

        def getattr(self, path: str | None, fh: Any = None) -> dict[str, Any]:
            # What is open is known by its handle, and stays what it was when it has no path any more.
            node = tree.opened(fh) if path is None else tree.node(path, context()[2])
            return {
                "st_mode": node.mode,
                "st_uid": node.uid,
                "st_gid": node.uid,
                "st_ino": node.inode or _made_of(node.path),
                "st_size": len(node.target) or node.size,
                "st_nlink": 2 if node.is_dir else 1,
                "st_blksize": 1024,
                **dict.fromkeys(("st_mtime", "st_ctime", "st_atime"), tree.time),
            }

        def access(self, path: str, amode: int) -> int:
            tree.access(path, amode, context())
            return 0

        def readlink(self, path: str) -> str:
            return tree.node(path, context()[2]).target

        def opendir(self, path: str) -> int:
            return tree.open_directory(path)

        def readdir(self, path: str | None, fh: int) -> Any:
            place = tree.opened(fh).path.rstrip("/")
            # Names without an inode number are not shown by a C library.
            return [
                (name, {"st_ino": tree.view.inode(f"{place}/{name}") or _made_of(f"{place}/{name}")}, 0)
                for name in (".", "..", *tree.names(fh))
            ]

        def releasedir(self, path: str | None, fh: int) -> int:
            tree.release(fh)
            return 0

        def open(self, path: str, flags: int) -> int:
            return tree.open(path, flags, context()[0])

        def read(self, path: str | None, size: int, offset: int, fh: int) -> bytes:
            return tree.read(fh, offset, size)

        def write(self, path: str | None, data: bytes, offset: int, fh: int) -> int:
            return tree.write(fh, offset, data)

        def truncate(self, path: str, length: int, fh: Any = None) -> int:
            return 0  # a shell opens what it writes to with O_TRUNC, and /proc takes no notice

        def release(self, path: str | None, fh: int) -> int:
            tree.release(fh)
            return 0

        def statfs(self, path: str) -> dict[str, int]:
            return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255}

        def ioctl(self, path: str | None, cmd: int, arg: Any, fh: int, flags: int, data: Any) -> int:
            command = cmd & 0xFFFFFFFF
            size = _bytes_of(command)
            argument = bytearray(ctypes.string_at(data, size) if data and size else b"")
            before = bytes(argument)
            done = tree.ioctl(fh, command, argument, CallersMemory(context()[2]))
            if data and argument != before:
                ctypes.memmove(data, bytes(argument), size)
            return done

    for name, call in list(vars(_Operations).items()):
        if callable(call) and not name.startswith("_"):
            setattr(_Operations, name, _told(call))
    return _Operations()


def _told(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, where what is no refusal of a system call's is told on standard error, and answered with EIO."""

    def guarded(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except NotPermitted as error:
            if "process_vm" in error.call:
                print(f"pmcore: {error}", file=sys.stderr)
            raise
        except OSError:
            raise
        except Exception as error:
            text = str(error) if isinstance(error, PmcoreError) else f"{type(error).__name__}: {error}"
            print(f"pmcore: {text}", file=sys.stderr)
            raise OSError(errno.EIO, text) from error

    return guarded


#: What fuse_main returns where the file system did its work, and then ended by a signal or an error of its device.
_ENDED = (7, 8)


def serve(tree: Tree, place: str, ready: Callable[[], object] = lambda: None, **options: Any) -> bool:
    """Answer the kernel for the file system mounted at `place` until it is unmounted; whether a signal ended it.

    `options` are libfuse's. Raises BackendUnavailable where libfuse cannot begin.
    """
    module = mfusepy()
    try:
        module.FUSE(
            operations(tree, ready),
            place,
            foreground=True,
            nothreads=True,
            direct_io=True,
            attr_timeout=0,
            entry_timeout=0,
            negative_timeout=0,
            use_ino=True,
            fsname="pmcore",
            **options,
        )
    except RuntimeError as error:
        if error.args and error.args[0] in _ENDED:
            return True
        raise BackendUnavailable(f"libfuse could not mount on {place} (its code is {error})") from None
    return False
