"""A recorded process."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pmcore.arrays import U64Array
from pmcore.errors import FormatError, syscall_error
from pmcore.protocols import FileResidency, Process
from pmcore.recording.capture import BLOCK
from pmcore.recording.container import RecordingFile, WordStream
from pmcore.scan.over_pagemap import scan_pagemap
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import ScanResult
from pmcore.smaps import SmapsEntry, parse_smaps
from pmcore.uapi import PM_PFRAME_MASK, ClearRefs
from pmcore.vma import Vma, parse_maps

if TYPE_CHECKING:
    from pmcore.backends.recording.kernel import RecordedKernel

__all__ = ["RecordedProcess"]

_THEN = "it was refused when the recording was made"


class RecordedProcess(Process):
    """One process of a recording. `row` is its entry in the index. Raises FormatError, or what a wrong type does."""

    def __init__(self, kernel: RecordedKernel, file: RecordingFile, row: Any) -> None:
        self.pid = row["pid"]
        self._kernel = kernel
        self._file = file
        self._texts = frozenset(map(str, row["texts"]))
        self._refused = {str(name): int(number) for name, number in row["refused"].items()}
        geometry = kernel.profile.geometry
        last = geometry.task_size >> geometry.page_shift
        position = 0
        for first, pages in row["spans"]:
            if not position <= first < first + pages <= last:
                raise FormatError(f"pages of process {self.pid} overlap", source=file.source)
            position = first + pages
        spans = np.array(row["spans"], dtype=np.int64).reshape(-1, 2)
        self._first, self._end = spans[:, 0], spans[:, 0] + spans[:, 1]
        #: Where in the stream the words of each span begin.
        self._place = np.append(0, np.cumsum(spans[:, 1]))
        self._words = file.stream(row["pagemap"], limit=last)
        if self._words.words != int(self._place[-1]):
            raise FormatError(f"pagemap of {self.pid}: {self._words.words} words", source=file.source)
        self._moved = [(int(first), int(count)) for first, count in row["moved"]]
        blocks = -(-self._words.words // BLOCK)
        if not all(0 <= first < first + count <= blocks for first, count in self._moved):
            raise FormatError(f"moved entries of {self.pid}", source=file.source)
        self._files: dict[int, int | WordStream] | None = None
        if row["files"] is not None:
            self._files = {
                int(each["start"]): int(each["errno"])
                if "errno" in each
                else file.stream(each["pages"], limit=last)
                for each in row["files"]
            }

    @property
    def kernel(self) -> RecordedKernel:
        """The kernel that it was recorded on."""
        return self._kernel

    def _text(self, name: str) -> bytes:
        if name not in self._texts:
            number = self._refused.get(name, errno.ENOENT)
            raise syscall_error(number, f"open(/proc/{self.pid}/{name})", remedy=_THEN)
        return self._file.text(f"processes/{self.pid}/{name}")

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of pagemap, or of a text that was recorded (maps, smaps, smaps_rollup, comm)."""
        if name == "pagemap":
            if offset % 8 or length % 8 or offset < 0 or length < 0:
                raise syscall_error(errno.EINVAL, f"pread(/proc/{self.pid}/pagemap, {length}, {offset})")
            geometry = self._kernel.profile.geometry
            there = max(0, (geometry.task_size >> geometry.page_shift) - offset // 8)
            out = np.zeros(min(length // 8, there), dtype=np.uint64)
            return out[: self.read_pagemap(offset // 8, out)].tobytes()
        return self._text(name)[offset : offset + length]

    def files(self) -> Sequence[str]:
        """pagemap, what was recorded as text or was refused then, and clear_refs, which refuses."""
        return ("pagemap", *sorted(self._texts | self._refused.keys()), "clear_refs")

    def read_pagemap(self, start_vpn: int, out: U64Array) -> int:
        """Raw entries from page `start_vpn` on; none for a process without memory, as a kernel thread is."""
        if "maps" not in self._texts:
            self._text("maps")
        geometry = self._kernel.profile.geometry
        count = min(len(out), max(0, (geometry.task_size >> geometry.page_shift) - start_vpn))
        if not len(self._first):
            return 0
        out[:count] = 0
        end = start_vpn + count
        index = int(np.searchsorted(self._end, start_vpn, side="right"))
        while index < len(self._first) and self._first[index] < end:
            low, high = max(int(self._first[index]), start_vpn), min(int(self._end[index]), end)
            place = int(self._place[index]) + low - int(self._first[index])
            self._words.read(place, out[low - start_vpn : high - start_vpn])
            index += 1
        return count

    def moved_frames(self) -> Iterator[U64Array]:
        """The frames named by entries that changed while the recording was made, a block at a time."""
        for first, count in self._moved:
            for block in range(first, first + count):
                words = np.zeros(BLOCK, dtype=np.uint64)
                self._words.read(block * BLOCK, words)
                yield words[words.view(np.int64) < 0] & np.uint64(PM_PFRAME_MASK)

    def maps(self) -> tuple[Vma, ...]:
        """The VMAs."""
        return parse_maps(self._text("maps"), source=f"{self._file.source}: maps of {self.pid}")

    def smaps(self, start: int = 0, end: int | None = None) -> tuple[SmapsEntry, ...]:
        """The VMAs with their counters."""
        found = parse_smaps(self._text("smaps"), source=f"{self._file.source}: smaps of {self.pid}")
        return tuple(e for e in found if e.vma.end > start and (end is None or e.vma.start < end))

    def pagemap_scan_raw(self, request: ScanRequest) -> ScanResult:
        """PAGEMAP_SCAN by the core's engine, over what was recorded; `unknown` says what that cannot tell."""
        return scan_pagemap(self, request)

    def clear_refs(self, what: ClearRefs | int) -> None:
        """Refused: a recording does not change."""
        raise syscall_error(errno.EROFS, f"write(/proc/{self.pid}/clear_refs, {int(what)})")

    def file_residency(self, vma: Vma, start: int, end: int) -> FileResidency:
        """What was recorded of the file behind `vma`. Raises NotSupported where files were not asked about."""
        call = f"file_residency({vma}, {start:#x}, {end:#x})"
        if not vma.start <= start <= end <= vma.end:
            raise syscall_error(errno.EINVAL, call, reason="not in the VMA")
        if not vma.inode:
            raise syscall_error(errno.EINVAL, call, reason="no file is mapped there")
        if self._files is None:
            raise syscall_error(
                errno.EOPNOTSUPP, call, reason="files were not recorded", remedy="record with --files"
            )
        found = self._files.get(vma.start, errno.EINVAL)
        if isinstance(found, int):
            raise syscall_error(found, call, remedy=_THEN)
        shift = self._kernel.profile.geometry.page_shift
        words = np.zeros((end - start) >> shift, dtype=np.uint64)
        if found.read((start - vma.start) >> shift, words) < len(words):
            raise FormatError(f"file pages of {vma} are missing", source=self._file.source)
        return FileResidency(data=(words & np.uint64(1)) != 0, in_core=(words & np.uint64(2)) != 0)
