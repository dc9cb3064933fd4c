"""A machine that stands still: a backend over given arrays, for tests of tools on any operating system.

    kernel = SnapshotKernel(kpageflags=flags, kpagecount=counts)
    kernel.add_process(1234, {Vma(start=0x10000, end=0x14000): words})

It answers the inspection protocols, with the kernel's errors; it cannot run anything. Nothing is hidden unless
`pfn_visible` is False: pagemap then shows no frame numbers, and the frame files are forbidden.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

import numpy as np

from pmcore.arrays import U64Array
from pmcore.errors import syscall_error
from pmcore.profile import KernelProfile, preset
from pmcore.protocols import FileResidency, FrameFile, Kernel, Process
from pmcore.scan.over_pagemap import scan_pagemap
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import ScanResult
from pmcore.smaps import SmapsEntry, format_smaps
from pmcore.uapi import PM_PFRAME_MASK, ClearRefs
from pmcore.vma import Vma, format_maps

__all__ = ["SnapshotKernel", "SnapshotProcess"]


def _words(words: U64Array, offset: int, length: int, what: str) -> bytes:
    """Bytes of an array of words, as a kpage file gives them."""
    if offset % 8 or length % 8 or offset < 0 or length < 0:
        raise syscall_error(errno.EINVAL, f"pread({what}, {length}, {offset})")
    return words[offset // 8 : (offset + length) // 8].tobytes()


class SnapshotProcess(Process):
    """A process of a SnapshotKernel."""

    def __init__(
        self,
        kernel: SnapshotKernel,
        pid: int,
        memory: Mapping[Vma, U64Array],
        smaps: Sequence[SmapsEntry] = (),
        files: Mapping[Vma, FileResidency] | None = None,
    ) -> None:
        self.pid = pid
        self._kernel = kernel
        self._memory = dict(sorted(memory.items(), key=lambda item: item[0].start))
        self._smaps = {entry.vma.start: entry for entry in smaps}
        self._files = dict(files or {})

    @property
    def kernel(self) -> SnapshotKernel:
        """The kernel that it belongs to."""
        return self._kernel

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of pagemap, maps or smaps."""
        if name == "pagemap":
            if offset % 8 or length % 8 or offset < 0 or length < 0:
                raise syscall_error(errno.EINVAL, f"pread(/proc/{self.pid}/pagemap, {length}, {offset})")
            out = np.zeros(length // 8, dtype=np.uint64)
            return out[: self.read_pagemap(offset // 8, out)].tobytes()
        texts = {"maps": lambda: format_maps(self._memory), "smaps": lambda: format_smaps(self.smaps())}
        if name not in texts:
            raise syscall_error(errno.ENOENT, f"open(/proc/{self.pid}/{name})")
        return texts[name]()[offset : offset + length]

    def read_pagemap(self, start_vpn: int, out: U64Array) -> int:
        """Raw entries."""
        geometry = self._kernel.profile.geometry
        count = min(len(out), max(0, (geometry.task_size >> geometry.page_shift) - start_vpn))
        out[:count] = 0
        for vma, words in self._memory.items():
            low = max(vma.start >> geometry.page_shift, start_vpn)
            high = min(vma.end >> geometry.page_shift, start_vpn + count)
            if low < high:
                base = vma.start >> geometry.page_shift
                out[low - start_vpn : high - start_vpn] = words[low - base : high - base]
        if not self._kernel.pfn_visible:
            out[:count] &= np.uint64(~PM_PFRAME_MASK & (1 << 64) - 1)
        return count

    def maps(self) -> tuple[Vma, ...]:
        """The VMAs."""
        return tuple(self._memory)

    def smaps(self, start: int = 0, end: int | None = None) -> tuple[SmapsEntry, ...]:
        """The VMAs with the counters that were given, none for the others."""
        return tuple(
            self._smaps.get(vma.start, SmapsEntry(vma=vma, vm_flags=()))
            for vma in self._memory
            if vma.end > start and (end is None or vma.start < end)
        )

    def pagemap_scan_raw(self, request: ScanRequest) -> ScanResult:
        """PAGEMAP_SCAN by the core's engine."""
        return scan_pagemap(self, request)

    def clear_refs(self, what: ClearRefs | int) -> None:
        """Refused: a snapshot does not change."""
        raise syscall_error(errno.EROFS, f"write(/proc/{self.pid}/clear_refs, {int(what)})")

    def file_residency(self, vma: Vma, start: int, end: int) -> FileResidency:
        """What was given for the VMA."""
        if vma not in self._files:
            raise syscall_error(errno.EINVAL, f"file_residency({vma})", reason="no file is mapped there")
        shift = self._kernel.profile.geometry.page_shift
        part = slice((start - vma.start) >> shift, (end - vma.start) >> shift)
        whole = self._files[vma]
        return FileResidency(data=whole.data[part], in_core=whole.in_core[part])


class SnapshotKernel(Kernel):
    """Frames and processes as given. Frame arrays have one word a frame; missing ones read as missing files."""

    name = "snapshot"
    concurrency = 1

    def __init__(
        self,
        *,
        kpageflags: U64Array | None = None,
        kpagecount: U64Array | None = None,
        kpagecgroup: U64Array | None = None,
        profile: KernelProfile | None = None,
        pfn_visible: bool = True,
    ) -> None:
        self.profile = profile or preset()
        self.pfn_visible = pfn_visible
        given = {
            FrameFile.KPAGEFLAGS: kpageflags,
            FrameFile.KPAGECOUNT: kpagecount,
            FrameFile.KPAGECGROUP: kpagecgroup,
        }
        self._arrays = {name: np.asarray(a, dtype=np.uint64) for name, a in given.items() if a is not None}
        self._processes: dict[int, SnapshotProcess] = {}

    def add_process(
        self,
        pid: int,
        memory: Mapping[Vma, U64Array],
        *,
        smaps: Sequence[SmapsEntry] = (),
        files: Mapping[Vma, FileResidency] | None = None,
    ) -> SnapshotProcess:
        """A process whose VMAs have these pagemap words, one a page."""
        process = SnapshotProcess(self, pid, memory, smaps, files)
        self._processes[pid] = process
        return process

    def _file(self, name: str) -> U64Array:
        if not self.pfn_visible:
            raise syscall_error(errno.EACCES, f"open(/proc/{name})", remedy="run as root")
        if name not in self._arrays:
            raise syscall_error(errno.ENOENT, f"open(/proc/{name})")
        return self._arrays[FrameFile(name)]

    def frame_count(self) -> int:
        """Frames in kpageflags."""
        return len(self._file(FrameFile.KPAGEFLAGS))

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a frame file."""
        return _words(self._file(name), offset, length, f"/proc/{name}")

    def read_frames(self, file: FrameFile, start_pfn: int, out: U64Array) -> int:
        """Raw words."""
        part = self._file(file)[start_pfn : start_pfn + len(out)]
        out[: len(part)] = part
        return len(part)

    def pids(self) -> Sequence[int]:
        """The processes."""
        return sorted(self._processes)

    def process(self, pid: int) -> SnapshotProcess:
        """The process `pid`."""
        if pid not in self._processes:
            raise syscall_error(errno.ESRCH, f"process({pid})", remedy="see pids() for those there are")
        return self._processes[pid]

    def close(self) -> None:
        """Nothing to let go of."""
