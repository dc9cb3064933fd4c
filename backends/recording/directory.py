"""A directory that `pmcore dump` wrote, as a kernel: plain files of words and text, under their names in /proc."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pmcore.arrays import U64Array
from pmcore.errors import FormatError, UnknownCapability, syscall_error
from pmcore.procview.dump import PROFILE
from pmcore.profile import KernelProfile, preset, profile_from_row
from pmcore.protocols import IDLE_BITMAP, FileResidency, FrameFile, Kernel, Process
from pmcore.scan.over_pagemap import scan_pagemap
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import ScanResult
from pmcore.smaps import SmapsEntry, parse_smaps
from pmcore.uapi import PM_PFRAME_MASK, ClearRefs
from pmcore.vma import Vma, parse_maps

__all__ = ["DumpedKernel", "DumpedProcess"]


def _open_errors(path: Path, error: OSError) -> OSError:
    return syscall_error(error.errno or errno.EIO, f"open({path})", remedy="it is not in the dump")


def _words(path: Path, index: int, out: U64Array) -> int:
    """Fill `out` from a file of words; how many there were."""
    if index < 0 or not len(out):
        return 0
    try:
        with path.open("rb") as file:
            file.seek(min(index * 8, (1 << 63) - 8))
            data = file.read(out.nbytes)
            found = np.frombuffer(data[: len(data) & -8], dtype="<u8")
    except OSError as error:
        raise _open_errors(path, error) from None
    out[: len(found)] = found
    return len(found)


def _bytes(path: Path, offset: int, length: int, *, words: bool) -> bytes:
    if offset < 0 or length < 0 or (words and (offset % 8 or length % 8)):
        raise syscall_error(errno.EINVAL, f"pread({path}, {length}, {offset})")
    try:
        with path.open("rb") as file:
            there = max(0, os.fstat(file.fileno()).st_size - offset)
            file.seek(min(offset, (1 << 63) - 8))
            return file.read(min(length, there))
    except OSError as error:
        raise _open_errors(path, error) from None


class DumpedProcess(Process):
    """One process of a dump."""

    def __init__(self, kernel: DumpedKernel, pid: int, directory: Path) -> None:
        self.pid = pid
        self._kernel, self._directory = kernel, directory

    @property
    def kernel(self) -> DumpedKernel:
        """The kernel that was dumped."""
        return self._kernel

    def files(self) -> Sequence[str]:
        """What was dumped of it."""
        return sorted(path.name for path in self._directory.iterdir())

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a file."""
        return _bytes(self._directory / name, offset, length, words=name == "pagemap")

    def read_pagemap(self, start_vpn: int, out: U64Array) -> int:
        """Raw entries from page `start_vpn` on."""
        return _words(self._directory / "pagemap", start_vpn, out)

    def _text(self, name: str) -> bytes:
        return _bytes(self._directory / name, 0, 1 << 40, words=False)

    def maps(self) -> tuple[Vma, ...]:
        """The VMAs."""
        return parse_maps(self._text("maps"), source=str(self._directory / "maps"))

    def smaps(self, start: int = 0, end: int | None = None) -> tuple[SmapsEntry, ...]:
        """The VMAs with their counters."""
        found = parse_smaps(self._text("smaps"), source=str(self._directory / "smaps"))
        return tuple(e for e in found if e.vma.end > start and (end is None or e.vma.start < end))

    def pagemap_scan_raw(self, request: ScanRequest) -> ScanResult:
        """PAGEMAP_SCAN by the core's engine over what was dumped; `unknown` says what that cannot tell."""
        return scan_pagemap(self, request)

    def clear_refs(self, what: ClearRefs | int) -> None:
        """Refused: a dump does not change."""
        raise syscall_error(errno.EROFS, f"write({self._directory}/clear_refs, {int(what)})")

    def file_residency(self, vma: Vma, start: int, end: int) -> FileResidency:
        """Refused: of files nothing was dumped."""
        raise syscall_error(errno.EOPNOTSUPP, f"file_residency({vma})", reason="files are not in a dump")


class DumpedKernel(Kernel):
    """The kernel behind a directory with a tree as /proc has it; `path` is that directory, or the one above it.

    Raises SyscallError (EISDIR) for one that is none, FormatError for one that is damaged.
    """

    name = "recording"
    concurrency = 1

    def __init__(self, path: Path) -> None:
        self.root = path / "proc" if (path / "proc").is_dir() else path
        if not any((self.root / file).is_file() for file in FrameFile) and not self.pids():
            raise syscall_error(errno.EISDIR, f"open({path})", reason="a directory, and no dump of a machine")
        self.profile = self._profile()
        self.pfn_visible = self._visible()

    def _profile(self) -> KernelProfile:
        """What was noted beside the tree; else the preset of the version that it has."""
        noted = self.root.parent / PROFILE
        try:
            if noted.is_file():
                return profile_from_row(json.loads(noted.read_text(encoding="utf-8")))
            match = re.match(r"Linux version (\S+)", (self.root / "version").read_text(encoding="utf-8"))
            return preset(match[1]) if match else preset()
        except FileNotFoundError:
            return preset()
        except (UnknownCapability, ValueError, TypeError, LookupError) as error:
            raise FormatError(f"no profile: {error}", source=str(noted)) from None

    def _visible(self) -> bool:
        """Whether any entry that is there names a frame."""
        for pid in self.pids():
            process = self.process(pid)
            for vma in process.maps()[:50]:
                words = np.zeros(min(vma.length >> self.geometry.page_shift, 512), dtype=np.uint64)
                process.read_pagemap(vma.start >> self.geometry.page_shift, words)
                there = words[words.view(np.int64) < 0]
                if len(there):
                    return bool((there & np.uint64(PM_PFRAME_MASK)).any())
        return True

    def files(self) -> Sequence[str]:
        """The files of proc, and those of sys by their whole paths."""
        system = self.root.parent / "sys"
        below = sorted(f"/sys/{p.relative_to(system).as_posix()}" for p in system.rglob("*") if p.is_file())
        return (*sorted(path.name for path in self.root.iterdir() if path.is_file()), *below)

    def frame_count(self) -> int:
        """Words in kpageflags."""
        path = self.root / "kpageflags"
        try:
            return path.stat().st_size // 8
        except OSError as error:
            raise _open_errors(path, error) from None

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a file."""
        path = self.root.parent / name.lstrip("/") if name.startswith("/sys/") else self.root / name
        return _bytes(path, offset, length, words=name in (*FrameFile, IDLE_BITMAP))

    def read_frames(self, file: FrameFile, start_pfn: int, out: U64Array) -> int:
        """Raw words of `file` from `start_pfn` on."""
        return _words(self.root / file, start_pfn, out)

    def pids(self) -> Sequence[int]:
        """The processes dumped."""
        names = (path.name for path in self.root.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def process(self, pid: int) -> DumpedProcess:
        """The process `pid`. Raises ProcessGone if it was not dumped."""
        directory = self.root / str(pid)
        if pid < 1 or not directory.is_dir():
            raise syscall_error(errno.ESRCH, f"process({pid})", remedy="see pids() for those dumped")
        return DumpedProcess(self, pid, directory)

    def close(self) -> None:
        """Nothing is held."""
