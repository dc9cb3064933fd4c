"""The running kernel: its frames, its processes, its profile found by trying.

What only some questions need is imported when they are asked: counting frames starts in a fraction of the time.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.procfs.files import MAX_OFFSET, WordFile, open_file, read_text
from pmcore.errors import syscall_error
from pmcore.geometry import Geometry
from pmcore.protocols import IDLE_BITMAP, FrameFile, Kernel

if TYPE_CHECKING:
    from pmcore.backends.procfs.probe import Probe
    from pmcore.backends.procfs.process import ProcfsProcess
    from pmcore.backends.procfs.read_ahead import ReadAhead
    from pmcore.profile import KernelProfile

__all__ = ["ProcfsKernel"]

_WORD_FILES = frozenset(FrameFile)
_TEXTS = ("version", "meminfo", "vmstat", "buddyinfo", "swaps")
#: Below /sys/kernel/mm: what was set, the pools of hugetlb, and KSM.
_SETTINGS = (
    "transparent_hugepage/*",
    "transparent_hugepage/khugepaged/*",
    "transparent_hugepage/hugepages-*/*",
    "hugepages/hugepages-*/*hugepages",
    "ksm/*",
)


def running_geometry(root: str = "/proc") -> Geometry:
    """Page size of this system; the page tables of x86-64 unless the page size says otherwise.

    pagemap ends where the address space ends: it goes on behind 47 bits where page tables have five levels.
    """
    shift = os.sysconf("SC_PAGE_SIZE").bit_length() - 1
    if shift != 12:
        return Geometry(page_shift=shift, task_size=1 << 47)
    try:
        fd = os.open(f"{root}/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return Geometry()
    try:
        five = len(os.pread(fd, 8, (1 << 47 >> shift) * 8)) == 8
    except OSError:
        five = False
    finally:
        os.close(fd)
    return Geometry(levels=5, task_size=(1 << 56) - 4096) if five else Geometry()


class ProcfsKernel(Kernel):
    """A running kernel behind `root`, normally /proc. Close it, or use it as a context manager."""

    name = "procfs"

    def __init__(self, *, root: str, scan: str, maps: str, ahead: ReadAhead | None = None) -> None:
        self.root = root
        self._ahead = ahead
        self.scan_by = scan
        # Reading and parsing the text took 7 to 8 us a VMA, asking by ioctl 9 (6.18, 170 and 20,000 VMAs);
        # the text also shows vsyscall.
        self.maps_by = "text" if maps == "auto" else maps
        self._files: dict[str, WordFile] = {}
        self._lock = threading.Lock()
        self._frame_count: int | None = None

    # -- what it can do --------------------------------------------------------------------------------

    @cached_property
    def _probes(self) -> tuple[Probe, ...]:
        from pmcore.backends.procfs.probe import probe_all

        return probe_all(self.root)

    @cached_property
    def profile(self) -> KernelProfile:  # type: ignore[override]
        """The preset of the running version, corrected by what was tried."""
        from pmcore.backends.procfs.probe import running_profile

        return running_profile(self._probes, self.geometry)

    @cached_property
    def geometry(self) -> Geometry:
        """What the system says of its pages, and how far its pagemap goes."""
        return running_geometry(self.root)

    @cached_property
    def pfn_visible(self) -> bool:  # type: ignore[override]
        """Whether frame numbers are shown to us (found by looking at a page of our own)."""
        from pmcore.backends.procfs.probe import pfn_is_visible

        return pfn_is_visible(self.root)

    @cached_property
    def concurrency(self) -> int:  # type: ignore[override]
        """Processors that we may run on, eight at the most."""
        return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 8)

    def report(self) -> tuple[Probe, ...]:
        """What was tried, what came of it, and how to get what is missing."""
        return self._probes

    # -- frames ----------------------------------------------------------------------------------------

    def _words(self, name: str) -> WordFile:
        with self._lock:
            if name not in self._files:
                self._files[name] = WordFile(f"{self.root}/{name}", name)
            return self._files[name]

    def frame_count(self) -> int:
        """Words in kpageflags. The file does not say its size, so its end is searched for."""
        if self._frame_count is None:
            words = self._words(FrameFile.KPAGEFLAGS)
            low, high = 0, 1 << 24
            while high < 1 << 52 and words.pread(high * 8, 8):
                low, high = high, high * 2
            while low < high:
                middle = (low + high) // 2
                if words.pread(middle * 8, 8):
                    low = middle + 1
                else:
                    high = middle
            self._frame_count = low
        return self._frame_count

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of /proc/`name`, or of the file of sysfs whose path begins with /sys/."""
        if name in _WORD_FILES:
            return self._words(name).pread(offset, length)
        if name == IDLE_BITMAP:
            from pmcore.backends.procfs.marking import read_idle

            return read_idle(offset, length)
        if offset < 0 or length < 0:
            raise syscall_error(errno.EINVAL, f"pread({self.root}/{name}, {length}, {offset})")
        if offset > MAX_OFFSET:
            return b""
        # Another /proc than this system's has no sysfs beside it.
        own = name.startswith("/sys/") and self.root == "/proc"
        return read_text(name if own else f"{self.root}/{name}", name)[offset : offset + length]

    def files(self) -> Sequence[str]:
        """The frame files, texts about memory, and the settings of huge pages in sysfs, as far as they are there."""
        there = [name for name in (*map(str, FrameFile), *_TEXTS) if os.path.exists(f"{self.root}/{name}")]  # noqa: PTH110
        if self.root == "/proc":
            below = Path("/sys/kernel/mm")
            there += sorted(
                str(path) for pattern in _SETTINGS for path in below.glob(pattern) if path.is_file()
            )
        return there

    def read_frames(self, file: FrameFile, start_pfn: int, out: U64Array) -> int:
        """Raw words of `file` from `start_pfn` on."""
        if self._ahead is not None and file is FrameFile.KPAGEFLAGS:
            found = self._ahead.take(start_pfn * 8, out.nbytes)
            if found is not None:
                out[:] = np.frombuffer(found, dtype=np.uint64)
                return len(out)
        return self._words(file).read_words(start_pfn, out)

    def file_pagemap(
        self, path: str, start: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, U64Array]]:
        """Pagemap words of the pages of the regular file `path` that are in memory: (offset, words), window by window.

        `start` and `end` in bytes. Nothing is read from disk. Raises Missing, NotPermitted.
        """
        from pmcore.backends.procfs.residency import file_pagemap

        size = self.geometry.page_size
        fd = open_file(path, "file", flags=os.O_RDONLY | os.O_NONBLOCK)
        try:
            length = os.fstat(fd).st_size
            stop = length if end is None else min(end, length)
            own = WordFile(f"{self.root}/self/pagemap", "pagemap")
            try:
                if stop > start:
                    yield from file_pagemap(own, fd, start, stop - start, page_size=size)
            finally:
                own.close()
        finally:
            os.close(fd)

    def pwrite(self, name: str, offset: int, data: bytes) -> int:
        """Write to page_idle/bitmap; the bytes taken. Raises Missing where idle page tracking is not configured."""
        if name != IDLE_BITMAP:
            return super().pwrite(name, offset, data)
        from pmcore.backends.procfs.marking import write_idle

        return write_idle(offset, data)

    def mark_idle(self, pfns: U64Array) -> None:
        """Mark frames idle. Raises Missing where idle page tracking is not configured."""
        from pmcore.backends.procfs.marking import mark_idle

        mark_idle(pfns)

    def hwpoison(self, pfns: U64Array) -> None:
        """Poison frames: their contents are lost. Raises Missing where the kernel's injector is not there."""
        from pmcore.backends.procfs.marking import poison

        poison(pfns, undo=False)

    def unpoison(self, pfns: U64Array) -> None:
        """Take the poison off again."""
        from pmcore.backends.procfs.marking import poison

        poison(pfns, undo=True)

    # -- processes -------------------------------------------------------------------------------------

    def pids(self) -> list[int]:
        """The processes there are."""
        return sorted(int(name) for name in os.listdir(self.root) if name.isdigit())  # noqa: PTH208

    def process(self, pid: int) -> ProcfsProcess:
        """The process `pid`. Raises ProcessGone if there is none."""
        directory = f"{self.root}/{pid}"
        if not isinstance(pid, int) or pid <= 0 or not os.path.isdir(directory):  # noqa: PTH112
            raise syscall_error(errno.ESRCH, f"process({pid})", remedy="see pids() for those there are")
        from pmcore.backends.procfs.process import ProcfsProcess

        return ProcfsProcess(self, pid, directory)

    def own_process(self) -> ProcfsProcess:
        """This process."""
        return self.process(os.getpid())

    def close(self) -> None:
        """Close the kpage* files."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
