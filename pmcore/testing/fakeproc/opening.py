"""`open`: Python's own file objects over a file of the machine."""

from __future__ import annotations

import errno
import io
import os
from typing import Any

from pmcore.testing.fakeproc.calls import described, open_description, where
from pmcore.testing.fakeproc.descriptors import Description
from pmcore.testing.fakeproc.fake import answering, passing
from pmcore.testing.fakeproc.real import real
from pmcore.testing.fakeproc.table import TABLE
from pmcore.testing.fakeproc.tree import block_size

__all__ = ["open_file"]

_PIECE = 1 << 16


class MachineFile(io.FileIO):
    """The unbuffered file: what io.FileIO is, with the machine's answers."""

    def __init__(self, fd: int, description: Description, name: Any, mode: str, *, closefd: bool) -> None:
        super().__init__(fd, mode, closefd=closefd)
        self.name = name
        self._description = description
        self._fd = fd

    def readinto(self, buffer: Any, /) -> int:
        """read(2) into a buffer."""
        self._usable(reading=True)
        with memoryview(buffer).cast("B") as view, answering():
            data = self._description.read(len(view))
            view[: len(data)] = data
            return len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        """read(2), or everything that is left."""
        if size is None or size < 0:
            return self.readall()
        self._usable(reading=True)
        with answering():
            return self._description.read(size)

    def readall(self) -> bytes:
        """Everything that is left."""
        self._usable(reading=True)
        pieces = []
        with answering():
            while piece := self._description.read(_PIECE):
                pieces.append(piece)
        return b"".join(pieces)

    def write(self, data: Any, /) -> int:
        """write(2)."""
        self._usable(reading=False)
        with answering():
            return self._description.write(bytes(data))

    def seek(self, position: int, whence: int = 0, /) -> int:
        """lseek(2)."""
        self._usable()
        with answering():
            return self._description.lseek(position, whence)

    def tell(self) -> int:
        """The position."""
        self._usable()
        return self._description.position

    def truncate(self, size: int | None = None, /) -> int:
        """Allowed, and without effect, as on the files of /proc."""
        self._usable(reading=False)
        return self._description.position if size is None else size

    def close(self) -> None:
        """close(2)."""
        if not self.closed and self.closefd and TABLE.get(self._fd) is self._description:
            TABLE.drop(self._fd)
        super().close()

    def _usable(self, *, reading: bool | None = None) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if reading is not None and not (self.readable() if reading else self.writable()):
            raise io.UnsupportedOperation(f"File not open for {'reading' if reading else 'writing'}")


def _flags(mode: str) -> int:
    """The flags of open(2) that a mode of open() stands for."""
    access = os.O_RDWR if "+" in mode else os.O_RDONLY if "r" in mode else os.O_WRONLY
    more = {"w": os.O_CREAT | os.O_TRUNC, "x": os.O_CREAT | os.O_EXCL, "a": os.O_CREAT | os.O_APPEND}
    return (
        access
        | next((flags for letter, flags in more.items() if letter in mode), 0)
        | getattr(os, "O_CLOEXEC", 0)
    )


def open_file(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    """The built-in open."""
    how = (mode, buffering, encoding, errors, newline)
    fd = file if isinstance(file, int) else None
    found = where(file)
    if passing() or (fd is not None and described(fd) is None):
        return real("io.open", file, *how, closefd, opener)
    if fd is None and opener is not None:
        # An opener may give a descriptor of the machine's whatever the path is, and is to be called once.
        given = opener(file, _flags(mode))
        if described(given) is None:
            return real("io.open", file, *how, closefd, lambda _path, _flags: given)
        fd = given
    elif fd is None and found is None:
        return real("io.open", file, *how, closefd, opener)
    _check(*how)
    if not isinstance(file, int) and not closefd:
        raise ValueError("Cannot use closefd=False with file name")
    if fd is None:
        assert found is not None
        fd = open_description(*found, _flags(mode), file)
    description = described(fd)
    assert description is not None
    try:
        if description.file is None:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), file)
        return _layers(fd, description, file, *how, closefd=closefd)
    except BaseException:
        if not isinstance(file, int) and described(fd) is description:
            TABLE.drop(fd)
            real("os.close", fd)
        raise


def _check(mode: str, buffering: int, encoding: str | None, errors: str | None, newline: str | None) -> None:
    """Let Python refuse what it refuses, in its words."""
    plain = mode.replace("x", "w") if isinstance(mode, str) else mode
    real("io.open", TABLE.empty(), plain, buffering, encoding, errors, newline, False).close()


def _layers(
    fd: int,
    description: Description,
    name: Any,
    mode: str,
    buffering: int,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
    *,
    closefd: bool,
) -> Any:
    letters = set(mode)
    kind = next(letter for letter in "rwxa" if letter in letters)
    plus = "+" if "+" in letters else ""
    # FileIO opens a descriptor, not a path: "x" would be refused, and says no more than "w" by now.
    raw = MachineFile(fd, description, name, ("w" if kind == "x" else kind) + plus, closefd=closefd)
    if kind == "a":
        with answering():
            description.lseek(0, os.SEEK_END)
    if buffering == 0:
        return raw
    size = buffering if buffering > 1 else block_size(description.node)
    buffer: Any
    if plus:
        buffer = io.BufferedRandom(raw, size)
    elif kind == "r":
        buffer = io.BufferedReader(raw, size)
    else:
        buffer = io.BufferedWriter(raw, size)
    if "b" in letters:
        return buffer
    text = io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)
    text.mode = mode  # type: ignore[misc]
    return text
