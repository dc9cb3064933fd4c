"""Descriptors of a fake /proc: real numbers, so that none is another file's, each standing for a description."""

from __future__ import annotations

import errno
import os
import tempfile

import numpy as np

from pmcore.errors import syscall_error
from pmcore.procview.files import PagemapFile, WordsFile
from pmcore.testing.fakeproc.descriptors import Description
from pmcore.testing.fakeproc.real import real

__all__ = ["TABLE", "Table"]

_PIECE = 1 << 20


class Table:
    """Which descriptor stands for what. Really each is of an empty temporary file, or of a copy (`duplicate`)."""

    def __init__(self) -> None:
        self._empty = -1
        #: Descriptor -> its description, and the file that it really is: another means it was closed behind us.
        self._open: dict[int, tuple[Description, tuple[int, int]]] = {}

    def begin(self) -> None:
        """The first context begins. What is behind the descriptors is for writing: no C code reads it as empty."""
        fd, path = tempfile.mkstemp()
        os.close(fd)
        self._empty = os.open(path, os.O_WRONLY | getattr(os, "O_TEMPORARY", 0))
        if os.name != "nt":
            os.unlink(path)  # noqa: PTH108

    def end(self) -> None:
        """No context is left."""
        if self._empty >= 0:
            real("os.close", self._empty)
            self._empty = -1

    def empty(self) -> int:
        """A real descriptor of an empty file."""
        return self._empty

    def new(self, description: Description) -> int:
        """A descriptor for a description."""
        return self._enter(real("os.dup", self._empty), description)

    def _enter(self, fd: int, description: Description) -> int:
        os.set_inheritable(fd, False)
        self._open[fd] = (description, _identity(fd))
        description.references += 1
        return fd

    def get(self, fd: object) -> Description | None:
        """What a descriptor stands for; None for everybody else's."""
        if not isinstance(fd, int):
            return None
        found = self._open.get(fd)
        if found is None:
            return None
        try:
            same = _identity(fd) == found[1]
        except OSError:
            same = False
        if same:
            return found[0]
        self.drop(fd)
        return None

    def drop(self, fd: int) -> None:
        """The descriptor is closed, or about to be."""
        found = self._open.pop(fd, None)
        if found is not None:
            description = found[0]
            description.references -= 1
            if not description.references and description.file is not None:
                description.file.close()

    def duplicate(
        self, description: Description, onto: int | None = None, *, inheritable: bool = False
    ) -> int:
        """A second descriptor, really of a file that holds what is shown now: whoever reads it in C sees that."""
        with tempfile.TemporaryFile(buffering=0) as copy:
            _copy(description, copy.fileno())
            if onto is None:
                fd = real("os.dup", copy.fileno())
            else:
                self.drop(onto)
                fd = real("os.dup2", copy.fileno(), onto)
        self._enter(fd, description)
        os.set_inheritable(fd, inheritable)
        return int(fd)

    def abandon(self, owner: object) -> None:
        """The context `owner` has ended, and its descriptions. Descriptors are left for who opened them to close."""
        for fd, (description, _) in list(self._open.items()):
            if description.owner is owner:
                description.over = True
                self.drop(fd)


TABLE = Table()


def _identity(fd: int) -> tuple[int, int]:
    status = real("os.fstat", fd)
    return status.st_dev, status.st_ino


def _copy(description: Description, fd: int) -> None:
    """Write what a description shows to a file, leaving holes for zeros."""
    file = description.file
    if file is None or description.flags & os.O_WRONLY:
        return
    if isinstance(file, PagemapFile):
        if os.name == "nt":
            raise syscall_error(errno.ENOTSUP, f"dup({description.name})", reason="no sparse files here")
        shift = file.process.kernel.geometry.page_shift
        spans = [
            (vma.start >> shift << 3, vma.end >> shift << 3)
            for vma in file.process.maps()
            if vma.end <= file.process.kernel.geometry.task_size
        ]
    else:
        spans = [(0, 1 << 62)]
    end = 0
    for start, stop in spans:
        end = start
        while end < stop:
            piece = file.read(end, min(_PIECE, stop - end))
            if not piece:
                break
            if not isinstance(file, WordsFile) or np.frombuffer(piece, dtype=np.uint8).any():
                real("os.lseek", fd, end, os.SEEK_SET)
                real("os.write", fd, piece)
            end += len(piece)
    if isinstance(file, PagemapFile):
        end = file.process.kernel.geometry.task_size >> file.process.kernel.geometry.page_shift << 3
    real("os.ftruncate", fd, end)
    real("os.lseek", fd, 0, os.SEEK_SET)
