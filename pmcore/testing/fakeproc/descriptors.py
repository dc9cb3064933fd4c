"""Open file descriptions: a file of the view, a position, and how it was opened. A descriptor is a number for one."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from pmcore.errors import syscall_error
from pmcore.procview import Node, OpenFile
from pmcore.procview.files import ClearRefsFile, PagemapFile, WordsFile

__all__ = ["Description", "seek"]

_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR
_LARGEST, _LARGEST_PLAIN = (1 << 63) - 1, (1 << 31) - 1


class Description:
    """What open(2) makes. Reading and writing move the position, as read(2) and write(2) do."""

    def __init__(self, owner: Any, node: Node, file: OpenFile | None, flags: int) -> None:
        self.owner = owner
        self.node = node
        #: None for a directory.
        self.file = file
        self.flags = flags
        self.position = 0
        self.references = 0
        #: Set when the context that it belongs to has ended.
        self.over = False

    @property
    def name(self) -> str:
        """Its path."""
        return self.node.path

    def _ready(self, *, writing: bool, call: str) -> OpenFile:
        access = self.flags & _ACCESS
        if self.over or access == (os.O_RDONLY if writing else os.O_WRONLY):
            raise syscall_error(errno.EBADF, f"{call}({self.name})")
        if self.file is None:
            raise syscall_error(errno.EISDIR, f"{call}({self.name})")
        return self.file

    def read(self, size: int) -> bytes:
        """read(2)."""
        data = self._ready(writing=False, call="read").read(self.position, size)
        self.position += len(data)
        return data

    def pread(self, size: int, offset: int) -> bytes:
        """pread(2)."""
        file = self._ready(writing=False, call="pread")
        if offset < 0:
            raise syscall_error(errno.EINVAL, f"pread({self.name}, {size}, {offset})")
        return file.read(offset, size)

    def preadv(self, buffers: Sequence[Any], offset: int) -> int:
        """preadv(2): files of words fill buffer after buffer, texts give one read's worth (rule FD-002)."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        if not isinstance(self.file, WordsFile | PagemapFile):
            data = self.pread(sum(len(view) for view in views), offset)
            taken = len(data)
            for view in views:
                part = data[: len(view)]
                view[: len(part)] = part
                data = data[len(part) :]
            return taken
        total = 0
        for view in views:
            try:
                part = self.pread(len(view), offset + total)
            except OSError:
                if total:
                    break
                raise
            view[: len(part)] = part
            total += len(part)
            if len(part) < len(view):
                break
        return total

    def write(self, data: bytes) -> int:
        """write(2)."""
        taken = self._ready(writing=True, call="write").write(self.position, data)
        self.position += taken
        return taken

    def pwrite(self, data: bytes, offset: int) -> int:
        """pwrite(2)."""
        file = self._ready(writing=True, call="pwrite")
        if offset < 0:
            raise syscall_error(errno.EINVAL, f"pwrite({self.name})")
        return file.write(offset, data)

    def lseek(self, offset: int, whence: int) -> int:
        """lseek(2)."""
        if self.over:
            raise syscall_error(errno.EBADF, f"lseek({self.name})")
        self.position = seek(self, offset, whence)
        return self.position


def seek(description: Description, offset: int, whence: int) -> int:
    """Where lseek(2) leads to (rule FD-001). Raises its refusal."""
    file, name = description.file, description.name
    if isinstance(file, ClearRefsFile) and whence in range(5):
        return 0
    # Files of the ordinary sort know an end, and no place beyond what a 32-bit file has.
    plain = name.startswith("/sys/") or name.endswith("/cmdline")
    ends = {os.SEEK_SET: 0, os.SEEK_CUR: description.position}
    if plain:
        ends[os.SEEK_END] = description.node.size
    target = ends.get(whence, -1) + offset
    if whence not in ends or not 0 <= target <= (_LARGEST_PLAIN if plain else _LARGEST):
        raise syscall_error(errno.EINVAL, f"lseek({name}, {offset}, {whence})")
    return target
