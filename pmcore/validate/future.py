"""A machine of a later kernel: its kpageflags have bits that nobody knows yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pmcore.arrays import U64Array
from pmcore.protocols import FrameFile, Kernel, Process

__all__ = ["FutureKernel"]


class FutureKernel(Kernel):
    """`kernel` with `flags` set on the frames that the process `pid` maps now."""

    def __init__(self, kernel: Kernel, *, pid: int, flags: int) -> None:
        self._kernel, self._flags = kernel, np.uint64(flags)
        self.name, self.profile = kernel.name, kernel.profile
        self.pfn_visible, self.concurrency = kernel.pfn_visible, 1
        process = kernel.process(pid)
        pieces = [process.pagemap(vma.start, vma.end) for vma in process.maps()]
        self._frames_of_it = np.unique(np.concatenate([piece.pfn[piece.has_pfn] for piece in pieces]))

    def frame_count(self) -> int:
        """As many as there are."""
        return self._kernel.frame_count()

    def files(self) -> Sequence[str]:
        """The same files."""
        return self._kernel.files()

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a file, kpageflags with the new flags."""
        data = self._kernel.pread(name, offset, length)
        if name != FrameFile.KPAGEFLAGS:
            return data
        words = np.frombuffer(data, dtype=np.uint64).copy()
        self._mark(words, offset // 8)
        return words.tobytes()

    def read_frames(self, file: FrameFile, start_pfn: int, out: U64Array) -> int:
        """Words, kpageflags with the new flags."""
        filled = self._kernel.read_frames(file, start_pfn, out)
        if file == FrameFile.KPAGEFLAGS:
            self._mark(out[:filled], start_pfn)
        return filled

    def _mark(self, words: U64Array, first: int) -> None:
        chosen = self._frames_of_it.astype(np.int64) - first
        words[chosen[(chosen >= 0) & (chosen < len(words))]] |= self._flags

    def pids(self) -> Sequence[int]:
        """The same processes."""
        return self._kernel.pids()

    def process(self, pid: int) -> Process:
        """The same process."""
        return self._kernel.process(pid)

    def close(self) -> None:
        """Close the machine."""
        self._kernel.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)
