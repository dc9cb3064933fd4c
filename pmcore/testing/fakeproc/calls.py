"""What stands in for the functions of `os`, `fcntl` and `resource`: each asks whose the path or descriptor is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any

from pmcore.errors import Missing, NotModelled, syscall_error
from pmcore.procview import Node
from pmcore.testing.fakeproc.descriptors import Description
from pmcore.testing.fakeproc.fake import FakeProc, active, answering, passing
from pmcore.testing.fakeproc.memory import OwnMemory
from pmcore.testing.fakeproc.real import REAL, real
from pmcore.testing.fakeproc.table import TABLE
from pmcore.testing.fakeproc.tree import claimed

__all__ = ["CALLS", "REFUSED", "described", "open_description", "where"]

_CREAT, _EXCL = os.O_CREAT, os.O_EXCL
_DIRECTORY, _NOFOLLOW = getattr(os, "O_DIRECTORY", 0), getattr(os, "O_NOFOLLOW", 0)
_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR
#: Python's fcntl hands the kernel a copy of no more than that.
_IOCTL_COPY = 1024


def where(path: Any, dir_fd: Any = None) -> tuple[FakeProc, str] | None:
    """The machine that answers for a path, and the path as it knows it; None: nobody's but the system's."""
    fake = active()
    if fake is None:
        return None
    if dir_fd is not None and isinstance(path, str | bytes | os.PathLike):
        folder = TABLE.get(dir_fd)
        text = os.fsdecode(os.fspath(path))
        if folder is not None and not text.startswith("/"):
            path = f"{folder.name}/{text}"
    found = claimed(path)
    return None if found is None else (fake, found)


def described(fd: Any) -> Description | None:
    """What a descriptor, or what has one, stands for; None for everybody else's."""
    if passing():
        return None
    if not isinstance(fd, int) and hasattr(fd, "fileno"):
        fd = fd.fileno()
    return TABLE.get(fd)


def open_description(fake: FakeProc, path: str, flags: int, shown: Any) -> int:
    """open(2); the descriptor. Raises OSError that names the path as it was given."""
    with answering(shown):
        try:
            node = fake.tree.node(path, follow=not flags & _NOFOLLOW)
        except Missing:
            if flags & _CREAT and path.startswith("/sys/"):
                raise syscall_error(errno.EACCES, path) from None
            raise
        if flags & _CREAT and flags & _EXCL:
            raise syscall_error(errno.EEXIST, path)
        if node.is_link:
            raise syscall_error(errno.ELOOP, path)
        if not node.is_dir:
            if flags & _DIRECTORY:
                raise syscall_error(errno.ENOTDIR, path)
            return TABLE.new(Description(fake, node, node.open(flags, fake.opener), flags))
        if flags & (_ACCESS | _CREAT):
            raise syscall_error(errno.EISDIR, path)
        return TABLE.new(Description(fake, node, None, flags))


# -- descriptors -----------------------------------------------------------------------------------------


def _open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: Any = None) -> Any:
    found = where(path, dir_fd)
    if found is None:
        return real("os.open", path, flags, mode, **({} if dir_fd is None else {"dir_fd": dir_fd}))
    return open_description(*found, flags, path)


def _close(fd: int) -> Any:
    if described(fd) is not None:
        TABLE.drop(fd)
    return real("os.close", fd)


def _read(fd: int, length: int, /) -> Any:
    found = described(fd)
    if found is None:
        return real("os.read", fd, length)
    with answering():
        return found.read(length)


def _readv(fd: int, buffers: Sequence[Any], /) -> Any:
    found = described(fd)
    if found is None:
        return real("os.readv", fd, buffers)
    with answering():
        taken = found.preadv(buffers, found.position)
        found.position += taken
        return taken


def _pread(fd: int, length: int, offset: int, /) -> Any:
    found = described(fd)
    if found is None:
        return real("os.pread", fd, length, offset)
    with answering():
        return found.pread(length, offset)


def _preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0, /) -> Any:
    found = described(fd)
    if found is None:
        return real("os.preadv", fd, buffers, offset, flags)
    with answering():
        return found.preadv(buffers, offset)


def _write(fd: int, data: Any, /) -> Any:
    found = described(fd)
    if found is None:
        return real("os.write", fd, data)
    with answering():
        return found.write(bytes(data))


def _writev(fd: int, buffers: Sequence[Any], /) -> Any:
    found = described(fd)
    if found is None:
        return real("os.writev", fd, buffers)
    with answering():
        return found.write(b"".join(bytes(buffer) for buffer in buffers))


def _pwrite(fd: int, data: Any, offset: int, /) -> Any:
    found = described(fd)
    if found is None:
        return real("os.pwrite", fd, data, offset)
    with answering():
        return found.pwrite(bytes(data), offset)


def _lseek(fd: int, position: int, whence: int, /) -> Any:
    found = described(fd)
    if found is None:
        return real("os.lseek", fd, position, whence)
    with answering():
        return found.lseek(position, whence)


def _fstat(fd: int) -> Any:
    found = described(fd)
    return real("os.fstat", fd) if found is None else found.owner.tree.status(found.node)


def _ftruncate(fd: int, length: int, /) -> Any:
    return real("os.ftruncate", fd, length) if described(fd) is None else None


def _dup(fd: int, /) -> Any:
    found = described(fd)
    if found is None:
        return real("os.dup", fd)
    with answering():
        return TABLE.duplicate(found)


def _dup2(fd: int, fd2: int, inheritable: bool = True) -> Any:
    found = described(fd)
    if found is None:
        if described(fd2) is not None:
            TABLE.drop(fd2)
        return real("os.dup2", fd, fd2, inheritable)
    with answering():
        return fd2 if fd == fd2 else TABLE.duplicate(found, fd2, inheritable=inheritable)


def _no_short_cut(name: str) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        for one in (*arguments[:3], *options.values()):
            if isinstance(one, int) and not isinstance(one, bool) and described(one) is not None:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(f"os.{name}", *arguments, **options)

    return call


# -- paths -----------------------------------------------------------------------------------------------


def _stat(path: Any, *, dir_fd: Any = None, follow_symlinks: bool = True) -> Any:
    if isinstance(path, int):
        return _fstat(path)
    found = where(path, dir_fd)
    if found is None:
        more = {} if dir_fd is None else {"dir_fd": dir_fd}
        return real("os.stat", path, follow_symlinks=follow_symlinks, **more)
    fake, claim = found
    with answering(path):
        return fake.tree.status(fake.tree.node(claim, follow=follow_symlinks))


def _lstat(path: Any, *, dir_fd: Any = None) -> Any:
    if where(path, dir_fd) is None:
        return real("os.lstat", path, **({} if dir_fd is None else {"dir_fd": dir_fd}))
    return _stat(path, dir_fd=dir_fd, follow_symlinks=False)


def _access(path: Any, mode: int, *, dir_fd: Any = None, **options: Any) -> Any:
    found = where(path, dir_fd)
    if found is None:
        more = options if dir_fd is None else {"dir_fd": dir_fd, **options}
        return real("os.access", path, mode, **more)
    fake, claim = found
    try:
        with answering(path):
            node = fake.tree.node(claim)
            return fake.tree.may(node, fake.opener, mode)
    except OSError:
        return False


def _readlink(path: Any, *, dir_fd: Any = None) -> Any:
    found = where(path, dir_fd)
    if found is None:
        return real("os.readlink", path, **({} if dir_fd is None else {"dir_fd": dir_fd}))
    fake, claim = found
    with answering(path):
        node = fake.tree.node(claim, follow=False)
        if not node.is_link:
            raise syscall_error(errno.EINVAL, claim)
    return os.fsencode(node.target) if isinstance(path, bytes) else node.target


def _folder(path: Any) -> tuple[FakeProc, Node] | None:
    """The directory of the machine's that a path or descriptor names."""
    if isinstance(path, int):
        description = described(path)
        return None if description is None else (description.owner, description.node)
    found = where(path)
    if found is None:
        return None
    fake, claim = found
    with answering(path):
        return fake, fake.tree.node(claim)


def _names(path: Any) -> tuple[FakeProc, Node, list[Any]] | None:
    found = _folder(path)
    if found is None:
        return None
    fake, node = found
    with answering(path):
        names = [str(name) for name in node.names()]
    return fake, node, [os.fsencode(name) for name in names] if isinstance(path, bytes) else names


def _listdir(path: Any = ".") -> Any:
    found = _names(path)
    return real("os.listdir", path) if found is None else found[2]


class _Entry:
    """A directory's entry, as os.DirEntry."""

    def __init__(self, fake: FakeProc, folder: str, name: Any, path: Any) -> None:
        self.name, self.path = name, path
        self._fake = fake
        self._claim = f"{folder.rstrip('/')}/{os.fsdecode(name)}"

    def __fspath__(self) -> Any:
        return self.path

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"

    def _node(self, follow: bool) -> Node:
        with answering(self.path):
            return self._fake.tree.node(self._claim, follow=follow)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """stat(2), or lstat(2)."""
        return self._fake.tree.status(self._node(follow_symlinks))

    def inode(self) -> int:
        """The inode number."""
        return self.stat(follow_symlinks=False).st_ino

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a directory."""
        return self._node(follow_symlinks).is_dir

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a file."""
        node = self._node(follow_symlinks)
        return not node.is_dir and not node.is_link

    def is_symlink(self) -> bool:
        """Whether it is a link."""
        return self._node(False).is_link

    def is_junction(self) -> bool:
        """Whether it is a junction: never."""
        return False


class _Scan:
    """What os.scandir gives: an iterator to be closed."""

    def __init__(self, entries: Iterator[_Entry]) -> None:
        self._entries = entries

    def __iter__(self) -> _Scan:
        return self

    def __next__(self) -> _Entry:
        return next(self._entries)

    def __enter__(self) -> _Scan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No more entries."""
        self._entries = iter(())


def _scandir(path: Any = ".") -> Any:
    found = _names(path)
    if found is None:
        return real("os.scandir", path)
    fake, node, names = found
    entries = []
    for name in names:
        # Of a descriptor the entries' paths are their names alone, as the system's are.
        whole = name if isinstance(path, int) else os.path.join(os.fspath(path), name)  # noqa: PTH118
        entries.append(_Entry(fake, node.path, name, whole))
    return _Scan(iter(entries))


def _questions(name: str) -> Any:
    """os.path.exists and its like, which some platforms have apart from os.stat."""

    def call(path: Any) -> Any:
        found = where(path)
        if found is None:
            return real(f"os.path.{name}", path)
        fake, claim = found
        try:
            with answering(path):
                node = fake.tree.node(claim, follow=name not in ("lexists", "islink"))
        except OSError:
            return False
        answers = {
            "isfile": not node.is_dir and not node.is_link,
            "isdir": node.is_dir,
            "islink": node.is_link,
        }
        return answers.get(name, True)

    return call


def _refuse(name: str) -> Any:
    """A call that changes the file system, or this process's place in it: not below /proc and /sys."""

    def call(*arguments: Any, **options: Any) -> Any:
        for one in (*arguments[:2], options.get("path"), options.get("src"), options.get("dst")):
            if where(one) is not None:
                raise NotModelled(f"os.{name} of {os.fsdecode(one)}")
        return real(f"os.{name}", *arguments, **options)

    return call


# -- the machine, the process ----------------------------------------------------------------------------


def _ioctl(fd: Any, request: int, arg: Any = 0, mutate_flag: bool = True, /) -> Any:
    found = described(fd)
    if found is None:
        return real("fcntl.ioctl", fd, request, arg, mutate_flag)
    if isinstance(arg, int):
        return _kernel_ioctl(found, request, bytearray())
    if isinstance(arg, str):
        arg = arg.encode()
    with memoryview(arg).cast("B") as view:
        if mutate_flag and not view.readonly:
            copy = bytearray(view)
            try:
                return _kernel_ioctl(found, request, copy)
            finally:
                view[:] = copy
        if len(view) > _IOCTL_COPY:
            raise ValueError("ioctl string arg too long")
        copy = bytearray(view)
        _kernel_ioctl(found, request, copy)
        return bytes(copy)


def _kernel_ioctl(found: Description, request: int, argument: bytearray) -> int:
    with answering():
        if found.over:
            raise syscall_error(errno.EBADF, "ioctl")
        if found.file is None:
            raise syscall_error(errno.ENOTTY, "ioctl")
        return found.file.ioctl(request & 0xFFFF_FFFF, argument, OwnMemory())


_SYSCONF_PAGE = ("SC_PAGESIZE", "SC_PAGE_SIZE")


def _sysconf(name: Any, /) -> Any:
    fake, numbers = active(), getattr(os, "sysconf_names", {})
    if fake is not None:
        names = (
            {name} if isinstance(name, str) else {text for text, number in numbers.items() if number == name}
        )
        size = fake.machine.geometry.page_size
        if names & set(_SYSCONF_PAGE):
            return size
        for each, line in (("SC_PHYS_PAGES", "MemTotal:"), ("SC_AVPHYS_PAGES", "MemFree:")):
            if each in names:
                with answering():
                    found = _memory(fake, line)
                    return fake.machine.frame_count() if found is None else found // size
    return real("os.sysconf", name)


def _memory(fake: FakeProc, label: str) -> int | None:
    """Bytes that a line of meminfo counts; None where there is none."""
    kernel = fake.machine
    if "meminfo" in kernel.files():
        for line in kernel.pread("meminfo", 0, 1 << 20).decode().splitlines():
            if line.startswith(label):
                return int(line.split()[1]) << 10
    return None


def _getpagesize() -> Any:
    fake = active()
    return real("resource.getpagesize") if fake is None else fake.machine.geometry.page_size


def _getpid() -> Any:
    fake = active()
    return real("os.getpid") if fake is None or fake.pid is None else fake.pid


def _kill(pid: int, sig: int, /) -> Any:
    fake = active()
    if fake is None:
        return real("os.kill", pid, sig)
    with answering():
        there = pid in fake.machine.pids()
        if sig == 0 and not there:
            raise syscall_error(errno.ESRCH, f"kill({pid}, 0)")
    if sig == 0:
        return None
    if there:
        raise NotModelled(f"os.kill({pid}, {sig}): signals to a machine's processes")
    return real("os.kill", pid, sig)


#: By the name of what they replace.
CALLS: dict[str, Any] = {
    "os.open": _open,
    "os.close": _close,
    "os.read": _read,
    "os.readv": _readv,
    "os.pread": _pread,
    "os.preadv": _preadv,
    "os.write": _write,
    "os.writev": _writev,
    "os.pwrite": _pwrite,
    "os.lseek": _lseek,
    "os.fstat": _fstat,
    "os.ftruncate": _ftruncate,
    "os.dup": _dup,
    "os.dup2": _dup2,
    "os.listdir": _listdir,
    "os.scandir": _scandir,
    "os.stat": _stat,
    "os.lstat": _lstat,
    "os.access": _access,
    "os.readlink": _readlink,
    "os.sysconf": _sysconf,
    "os.getpid": _getpid,
    "os.kill": _kill,
    "fcntl.ioctl": _ioctl,
    "resource.getpagesize": _getpagesize,
    **{f"os.{name}": _no_short_cut(name) for name in ("sendfile", "copy_file_range", "splice")},
    **{f"os.path.{name}": _questions(name) for name in ("exists", "lexists", "isfile", "isdir", "islink")},
}
#: Calls that are refused below /proc and /sys: every other of `real`.
REFUSED = tuple(name for name in REAL if name.startswith("os.") and name not in CALLS)
CALLS |= {name: _refuse(name.removeprefix("os.")) for name in REFUSED}
