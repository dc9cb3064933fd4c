"""Opening and reading the files of /proc with our errors: positioned, whole, into arrays, no bytes lost."""

from __future__ import annotations

import errno
import os
import re
import weakref

from pmcore.arrays import U64Array
from pmcore.errors import ArgumentError, SyscallError, syscall_error

__all__ = ["MAX_OFFSET", "WordFile", "failure", "open_file", "read_text"]

#: Largest offset that pread takes; what lies behind it is past the end of every file here.
MAX_OFFSET = (1 << 63) - 1
#: Bytes asked for in one call: large enough to make the call's own cost vanish, small enough to be interrupted.
_CHUNK = 4 << 20

_REMEDIES = {
    "pagemap": "run as the process's user, or with CAP_SYS_PTRACE; frame numbers also need CAP_SYS_ADMIN",
    "maps": "run as the process's user, or with CAP_SYS_PTRACE",
    "smaps": "run as the process's user, or with CAP_SYS_PTRACE",
    "smaps_rollup": "run as the process's user, or with CAP_SYS_PTRACE",
    "kpageflags": "run as root",
    "kpagecount": "run as root",
    "kpagecgroup": "run as root",
    "clear_refs": "run as the process's user, or as root",
    "map_files": "needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE",
}
_MISSING = {
    "pagemap": "this kernel was built without CONFIG_PROC_PAGE_MONITOR",
    "kpageflags": "this kernel was built without CONFIG_PROC_PAGE_MONITOR",
    "kpagecount": "this kernel was built without CONFIG_PROC_PAGE_MONITOR",
    "kpagecgroup": "this kernel is before 4.3 or was built without CONFIG_MEMCG",
    "clear_refs": "this kernel was built without CONFIG_PROC_PAGE_MONITOR",
    "smaps_rollup": "smaps_rollup came with 4.14",
}


def failure(error: OSError, call: str, name: str) -> SyscallError:
    """Our error for what the system said about file `name`."""
    number = error.errno or errno.EIO
    if number in (errno.EPERM, errno.EACCES):
        return syscall_error(number, call, remedy=_REMEDIES.get(name))
    if number == errno.ENOENT:
        return syscall_error(number, call, remedy=_MISSING.get(name))
    if number == errno.ESRCH:
        return syscall_error(number, call, remedy="the process is gone")
    return syscall_error(number, call)


def open_file(path: str, name: str, *, flags: int = os.O_RDONLY) -> int:
    """A descriptor of `path`. Raises SyscallError with a remedy that fits the file `name`."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise failure(error, f"open({path})", name) from None
    except ValueError as error:
        raise syscall_error(errno.EINVAL, f"open({path!r})", reason=str(error)) from None


def read_text(path: str, name: str) -> bytes:
    """All of a text file. Raises SyscallError."""
    fd = open_file(path, name)
    try:
        pieces = []
        while piece := os.read(fd, 1 << 20):
            pieces.append(piece)
        return b"".join(pieces)
    except OSError as error:
        raise failure(error, f"read({path})", name) from None
    finally:
        os.close(fd)


_SMAPS_HEADER = re.compile(rb"^([0-9a-f]{8,16})-([0-9a-f]{8,16}) ", re.MULTILINE)


def read_smaps_range(path: str, start: int, end: int | None) -> bytes:
    """The entries of smaps that overlap `start` to `end`; what lies behind is not read. Raises SyscallError."""
    fd = open_file(path, "smaps")
    try:
        data = b""
        while piece := os.read(fd, 4096):
            data += piece
            # The last header may still be incomplete: the one before it is enough to stop.
            last = data.rfind(b"VmFlags:")
            found = _SMAPS_HEADER.search(data, last) if last >= 0 and end is not None else None
            if found and end is not None and int(found[1], 16) >= end:
                break
    except OSError as error:
        raise failure(error, f"read({path})", "smaps") from None
    finally:
        os.close(fd)
    heads = list(_SMAPS_HEADER.finditer(data))
    first = next((h.start() for h in heads if int(h[2], 16) > start), len(data))
    last = len(data) if end is None else next((h.start() for h in heads if int(h[1], 16) >= end), len(data))
    return data[first:last]


class WordFile:
    """A file of 64-bit words, read by position. One descriptor, safe to read from several threads at once."""

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.name = name
        self.fd = open_file(path, name)
        self._close = weakref.finalize(self, os.close, self.fd)

    def close(self) -> None:
        """Let go of the descriptor; twice is allowed."""
        self._close()

    def pread(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer only at the end; what the kernel refuses is raised."""
        if offset < 0 or length < 0:
            raise syscall_error(errno.EINVAL, f"pread({self.path}, {length}, {offset})")
        if offset > MAX_OFFSET:
            # pread cannot even name the place: alignment is still checked, and nothing is there.
            if offset % 8 or length % 8:
                raise syscall_error(errno.EINVAL, f"pread({self.path}, {length}, {offset})")
            return b""
        pieces = []
        while True:
            try:
                piece = os.pread(self.fd, min(length, _CHUNK) if length > _CHUNK else length, offset)
            except OSError as error:
                raise failure(error, f"pread({self.path}, {length}, {offset})", self.name) from None
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
            if not piece or length <= 0:
                return b"".join(pieces)

    def read_words(self, index: int, out: U64Array) -> int:
        """Fill `out` from word `index` on; the number of words read, fewer only at the end of the file."""
        if index < 0:
            raise syscall_error(errno.EINVAL, f"pread({self.path}) at word {index}")
        if len(out) == 0 or index * 8 > MAX_OFFSET:
            return 0
        if not out.flags.c_contiguous:
            raise ArgumentError("words are read into contiguous arrays only")
        target = out.data.cast("B")
        done = 0
        while done < len(target):
            try:
                got = os.preadv(self.fd, [target[done : done + _CHUNK]], index * 8 + done)
            except OSError as error:
                raise failure(error, f"pread({self.path}) at word {index}", self.name) from None
            if got == 0:
                break
            done += got
        if done % 8:
            raise syscall_error(
                errno.EIO, f"pread({self.path}) at word {index}", reason=f"{done} bytes are not whole words"
            )
        return done // 8
