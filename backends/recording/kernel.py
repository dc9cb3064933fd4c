"""A recorded kernel: frames, processes, profile, as the file has them."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.recording.process import RecordedProcess
from pmcore.errors import FormatError, syscall_error
from pmcore.profile import profile_from_row
from pmcore.protocols import FrameFile, Kernel
from pmcore.recording.container import PIECE, RecordingFile, WordStream, format_errors
from pmcore.uapi import PageFlag

__all__ = ["RecordedKernel"]

#: Frames that a file may claim: some, and so many for each of its bytes (real ones have some tens).
_SOME_FRAMES, _FRAMES_A_BYTE = 1 << 20, 4096


class RecordedKernel(Kernel):
    """The kernel of a recording. Close it, or use it as a context manager."""

    name = "recording"
    concurrency = 1

    def __init__(self, path: str | Path) -> None:
        self._file = RecordingFile(path)
        try:
            with format_errors(self._file.source):
                self._open(self._file.index)
        except BaseException:
            self._file.close()
            raise

    def _open(self, index: dict[str, Any]) -> None:
        self.profile = profile_from_row(index["profile"])
        self.pfn_visible = bool(index["pfn_visible"])
        #: The backend that was recorded; whether frames got other numbers; begin and end, in seconds since 1970.
        self.recorded_from = str(index["backend"])[:80]
        self.anonymised = bool(index["anonymised"])
        self.began, self.ended = float(index["began"]), float(index["ended"])
        time.gmtime(self.began)
        frames = index["frames"]
        limit = _SOME_FRAMES + _FRAMES_A_BYTE * self._file.size
        self._streams: dict[FrameFile, WordStream] = {
            FrameFile(name): self._file.stream(row, limit=limit) for name, row in frames["files"].items()
        }
        self._later = {
            FrameFile(name): self._file.stream(row, limit=limit) for name, row in frames["later"].items()
        }
        self._count = frames["count"]
        streams = (*self._streams.values(), *self._later.values())
        if not isinstance(self._count, int) or any(s.words != self._count for s in streams):
            raise FormatError("frame files of different lengths", source=self._file.source)
        self._refused = _errnos(frames["refused"])
        self._texts = frozenset(map(str, index["texts"]))
        rows = index["processes"]
        self._rows: dict[int, Any] = {row["pid"]: row for row in rows}
        if not all(isinstance(pid, int) and 0 < pid < 1 << 32 for pid in self._rows):
            raise FormatError("processes without numbers", source=self._file.source)
        self._processes: dict[int, RecordedProcess] = {}
        # All of it is checked now, so that a damaged index is told when it is opened.
        for pid in self._rows:
            self.process(pid)

    # -- frames ----------------------------------------------------------------------------------------

    def _words(self, name: str) -> WordStream:
        try:
            return self._streams[FrameFile(name)]
        except (KeyError, ValueError):
            number = self._refused.get(name, errno.ENOENT)
            remedy = "it was refused when the recording was made"
            raise syscall_error(number, f"open(/proc/{name})", remedy=remedy) from None

    def frame_count(self) -> int:
        """Words in the frame files."""
        self._words(FrameFile.KPAGEFLAGS)
        return int(self._count)

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a frame file, or of a text that was recorded (version, meminfo, ...)."""
        if name in self._texts and offset >= 0 and length >= 0:
            return self._file.text(f"kernel/{name.lstrip('/')}")[offset : offset + length]
        words = self._words(name)
        if offset % 8 or length % 8 or offset < 0 or length < 0:
            raise syscall_error(errno.EINVAL, f"pread(/proc/{name}, {length}, {offset})")
        out = np.zeros(min(length // 8, max(0, words.words - offset // 8)), dtype=np.uint64)
        return out[: words.read(offset // 8, out)].tobytes()

    def files(self) -> Sequence[str]:
        """The frame files, and the texts that were recorded."""
        refused = [name for name in self._refused if name in tuple(FrameFile)]
        return (*map(str, self._streams), *refused, *sorted(self._texts))

    def read_frames(self, file: FrameFile, start_pfn: int, out: U64Array) -> int:
        """Raw words of `file` from `start_pfn` on."""
        return self._words(file).read(start_pfn, out)

    def changed_meanwhile(self) -> U64Array:
        """Frames whose flags (IDLE aside) or count were others at the end, or that entries named which were."""
        found = [pfns for process in self._processes.values() for pfns in process.moved_frames()]
        for first in range(0, int(self._count), PIECE):
            changed = np.zeros(min(PIECE, int(self._count) - first), dtype=np.bool_)
            one, other = np.zeros((2, len(changed)), dtype=np.uint64)
            for file, later in self._later.items():
                if file in self._streams:
                    self._streams[file].read(first, one)
                    later.read(first, other)
                    unlike = one ^ other
                    if file is FrameFile.KPAGEFLAGS:
                        unlike &= ~np.uint64(PageFlag.IDLE)
                    changed |= unlike != 0
            found.append(np.flatnonzero(changed).astype(np.uint64) + np.uint64(first))
        return np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *found]))

    # -- processes -------------------------------------------------------------------------------------

    def pids(self) -> Sequence[int]:
        """The processes recorded."""
        return sorted(self._rows)

    def process(self, pid: int) -> RecordedProcess:
        """The process `pid`. Raises ProcessGone if it was not recorded."""
        if pid not in self._rows:
            raise syscall_error(errno.ESRCH, f"process({pid})", remedy="see pids() for those recorded")
        if pid not in self._processes:
            with format_errors(self._file.source):
                self._processes[pid] = RecordedProcess(self, self._file, self._rows[pid])
        return self._processes[pid]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _errnos(row: Any) -> dict[str, int]:
    """Refusals by file name, the errno of each."""
    return {str(name): int(number) for name, number in row.items()}
