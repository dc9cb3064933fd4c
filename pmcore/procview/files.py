"""The files of /proc and /sys once they are open: words, texts, and what takes numbers."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from pmcore.errors import syscall_error
from pmcore.procview.ioctls import CallerMemory, pagemap_scan, procmap_query
from pmcore.procview.sequence import SequenceReader
from pmcore.protocols import Kernel, Process
from pmcore.uapi import PAGEMAP_SCAN, PM_PFRAME_MASK, PROCMAP_QUERY

__all__ = [
    "ClearRefsFile",
    "IdleFile",
    "MapsFile",
    "OpenFile",
    "PagemapFile",
    "TextFile",
    "WordsFile",
    "WrittenFile",
]

_FLAGS = np.uint64(~PM_PFRAME_MASK & (1 << 64) - 1)
#: What clear_refs looks at of what is written to it.
_NUMBER_BYTES = 12
_SMAPS_HEAD = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ ", re.MULTILINE)
#: Text of a file that is not one of these is one record.
RECORDS: dict[str, Callable[[bytes], Sequence[bytes]]] = {
    "maps": lambda text: text.splitlines(keepends=True),
    "smaps": lambda text: _cut(text, [head.start() for head in _SMAPS_HEAD.finditer(text)]),
}


def _cut(text: bytes, starts: list[int]) -> list[bytes]:
    return [text[a:b] for a, b in itertools.pairwise([*starts, len(text)])]


class OpenFile:
    """An open file. What it cannot do is refused as the kernel refuses it; every error is an OSError with its errno."""

    def __init__(self, path: str) -> None:
        self.path = path

    def _refuse(self, number: int, call: str) -> NoReturn:
        raise syscall_error(number, f"{call}({self.path})")

    def read(self, offset: int, size: int) -> bytes:
        """What read(2) of `size` bytes at `offset` gives. May be less than there is; empty at the end."""
        self._refuse(errno.EINVAL, "read")

    def write(self, offset: int, data: bytes) -> int:
        """write(2) at `offset`; the number of bytes taken. What takes nothing refuses by where it is (rule FS-014)."""
        self._refuse(errno.EINVAL if self.path.split("/")[2].isdigit() else errno.EIO, "write")

    def ioctl(self, command: int, argument: bytearray, memory: CallerMemory) -> int:
        """ioctl(2). `argument` is the structure that the caller's pointer points at, and is changed in place."""
        self._refuse(errno.ENOTTY, f"ioctl {command:#x} ")

    def close(self) -> None:
        """Let go of it. Closing twice is allowed."""


class WordsFile(OpenFile):
    """kpagecount, kpageflags, kpagecgroup: a 64-bit word a frame."""

    def __init__(self, path: str, kernel: Kernel, name: str) -> None:
        super().__init__(path)
        self._kernel, self._name = kernel, name
        kernel.pread(name, 0, 0)

    def read(self, offset: int, size: int) -> bytes:
        """Words of frames (rule FS-002)."""
        return self._kernel.pread(self._name, offset, size)


class IdleFile(OpenFile):
    """page_idle/bitmap: a bit a frame, read and written in words; at most a page of them at a time (rule ID-002)."""

    def __init__(self, path: str, kernel: Kernel) -> None:
        super().__init__(path)
        self._kernel = kernel
        kernel.pread(path, 0, 0)

    def read(self, offset: int, size: int) -> bytes:
        """Words of frames that are idle, after a look at the entries that map them: reading changes the machine."""
        return self._kernel.pread(self.path, offset, size)

    def write(self, offset: int, data: bytes) -> int:
        """Frames whose bits are set become idle."""
        return self._kernel.pwrite(self.path, offset, data)


class PagemapFile(OpenFile):
    """pagemap: a 64-bit word a page. Frame numbers are shown or hidden by who opened it."""

    def __init__(self, path: str, process: Process, *, hidden: bool) -> None:
        super().__init__(path)
        self.process, self._hidden = process, hidden

    def read(self, offset: int, size: int) -> bytes:
        """Words of pages (rule FS-002)."""
        data = self.process.pread("pagemap", offset, size)
        if self._hidden:
            return (np.frombuffer(data, dtype=np.uint64) & _FLAGS).tobytes()
        return data

    def ioctl(self, command: int, argument: bytearray, memory: CallerMemory) -> int:
        """PAGEMAP_SCAN, where the kernel has it. The number of regions."""
        if not self.process.kernel.profile.has("scan"):
            self._refuse(errno.ENOTTY, "ioctl")
        if command != PAGEMAP_SCAN:
            self._refuse(errno.EINVAL, f"ioctl {command:#x} ")
        return pagemap_scan(self.process, argument, memory)


class TextFile(OpenFile):
    """A text that the kernel writes when it is read."""

    def __init__(
        self, path: str, source: Kernel | Process, name: str, *, buffer: int, writable: bool = False
    ) -> None:
        super().__init__(path)
        self._source, self._name = source, name
        whole = 1 << 62

        def show() -> Sequence[bytes]:
            text = source.pread(name, 0, whole)
            cut = RECORDS.get(name)
            return cut(text) if cut else [text]

        self._reader = SequenceReader(show, buffer=buffer)
        if not writable:
            source.pread(name, 0, 0)

    def read(self, offset: int, size: int) -> bytes:
        """Whole records, as many as fit (rule FS-004)."""
        return self._reader.read(offset, size)


class WrittenFile(TextFile):
    """A text that takes something: of a cgroup's directory (rule CG-017), the state of a memory block (FS-017)."""

    _source: Kernel

    def write(self, offset: int, data: bytes) -> int:
        """What is written goes to the kernel as it is."""
        return self._source.pwrite(self._name, offset, data)


class MapsFile(TextFile):
    """maps, which also answers PROCMAP_QUERY."""

    _source: Process

    def ioctl(self, command: int, argument: bytearray, memory: CallerMemory) -> int:
        """PROCMAP_QUERY, where the kernel has it. 0."""
        if command != PROCMAP_QUERY or not self._source.kernel.profile.has("maps.procmap_query"):
            self._refuse(errno.ENOTTY, f"ioctl {command:#x} ")
        return procmap_query(self._source, argument, memory)


class ClearRefsFile(OpenFile):
    """clear_refs: takes a number."""

    def __init__(self, path: str, process: Process) -> None:
        super().__init__(path)
        self._process = process

    def write(self, offset: int, data: bytes) -> int:
        """A number from 1 to 5 in decimal, blanks around it allowed (rule FS-006); offsets are no matter."""
        taken = data[:_NUMBER_BYTES]
        match = re.fullmatch(rb"\s*([+-]?)(\d+)\s*", taken.split(b"\0")[0])
        if match is None:
            self._refuse(errno.EINVAL, "write")
        number = int(match[1] + match[2])
        if not -(1 << 31) <= number < 1 << 31:
            self._refuse(errno.ERANGE, "write")
        if not 1 <= number <= 5:
            self._refuse(errno.EINVAL, "write")
        self._process.clear_refs(number)
        return len(taken)
