"""One process of the running kernel."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pmcore.arrays import U64Array
from pmcore.backends.procfs.files import WordFile, failure, open_file, read_smaps_range, read_text
from pmcore.backends.procfs.ioctl import pagemap_scan, procmap_query
from pmcore.backends.procfs.residency import data_pages, pages_in_core
from pmcore.errors import Missing, SyscallError, syscall_error
from pmcore.procmap import MapAnswer, MapQuery
from pmcore.protocols import FileResidency, Process
from pmcore.scan.over_pagemap import scan_pagemap
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import ScanResult
from pmcore.smaps import SmapsEntry, parse_smaps
from pmcore.uapi import ClearRefs, ProcmapFlag
from pmcore.vma import Vma, parse_maps

if TYPE_CHECKING:
    from pmcore.backends.procfs.kernel import ProcfsKernel

__all__ = ["ProcfsProcess"]

_GONE = "the process is gone"
#: Room for any name of a mapping.
_NAME_ROOM = 4096


class ProcfsProcess(Process):
    """A process, looked at through /proc/PID. Files are opened when first needed and kept."""

    def __init__(self, kernel: ProcfsKernel, pid: int, directory: str) -> None:
        self.pid = pid
        self._kernel = kernel
        self._directory = directory
        self._pagemap: WordFile | None = None

    @property
    def kernel(self) -> ProcfsKernel:
        """The kernel that it runs on."""
        return self._kernel

    def close(self) -> None:
        """Let go of the open files; the next look opens them again."""
        if self._pagemap is not None:
            self._pagemap.close()
            self._pagemap = None

    def _words(self) -> WordFile:
        if self._pagemap is None:
            try:
                self._pagemap = WordFile(f"{self._directory}/pagemap", "pagemap")
            except SyscallError as error:
                raise self._gone_or(error) from None
        return self._pagemap

    def _gone_or(self, error: SyscallError) -> SyscallError:
        """ProcessGone where a file is missing because the process is."""
        if error.errno == errno.ENOENT and not os.path.isdir(self._directory):  # noqa: PTH112
            return syscall_error(errno.ESRCH, error.call, remedy=_GONE)
        return error

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of /proc/PID/`name`, as the file gives them."""
        if name == "pagemap":
            return self._words().pread(offset, length)
        return self._text(name)[offset : offset + length]

    def read_pagemap(self, start_vpn: int, out: U64Array) -> int:
        """Raw entries from page `start_vpn` on."""
        return self._words().read_words(start_vpn, out)

    def maps(self) -> tuple[Vma, ...]:
        """The VMAs: by text, or by PROCMAP_QUERY where that was asked for when the kernel was opened."""
        if self._kernel.maps_by == "query":
            return self.maps_by_query()
        data = self._text("maps")
        return parse_maps(data, source=f"{self._directory}/maps")

    def query_maps(self, query: MapQuery) -> MapAnswer:
        """PROCMAP_QUERY, asked of the kernel."""
        with self._maps_file() as fd:
            return procmap_query(fd, query)

    def maps_by_query(self) -> tuple[Vma, ...]:
        """The VMAs of user addresses by PROCMAP_QUERY, the file opened once."""
        found: list[Vma] = []
        with self._maps_file() as fd:
            while True:
                address = found[-1].end if found else 0
                try:
                    query = MapQuery(
                        address=address, flags=ProcmapFlag.COVERING_OR_NEXT_VMA, name_room=_NAME_ROOM
                    )
                    found.append(procmap_query(fd, query).vma())
                except Missing:
                    return tuple(found)

    @contextmanager
    def _maps_file(self) -> Iterator[int]:
        try:
            fd = open_file(f"{self._directory}/maps", "maps")
        except SyscallError as error:
            raise self._gone_or(error) from None
        try:
            yield fd
        finally:
            os.close(fd)

    def smaps(self, start: int = 0, end: int | None = None) -> tuple[SmapsEntry, ...]:
        """The VMAs with their counters; those outside the range are not parsed, and behind it not read."""
        path = f"{self._directory}/smaps"
        if start == 0 and end is None:
            return parse_smaps(self._text("smaps"), source=path)
        try:
            data = read_smaps_range(path, start, end)
        except SyscallError as error:
            raise self._gone_or(error) from None
        return parse_smaps(data, source=path)

    def smaps_rollup(self) -> SmapsEntry | None:
        """The counters of all VMAs together; None for a process without memory. Raises Missing before 4.14."""
        entries = parse_smaps(self._text("smaps_rollup"), source=f"{self._directory}/smaps_rollup")
        return entries[0] if entries else None

    def _text(self, name: str) -> bytes:
        try:
            return read_text(f"{self._directory}/{name}", name)
        except SyscallError as error:
            raise self._gone_or(error) from None

    def pagemap_scan_raw(self, request: ScanRequest) -> ScanResult:
        """PAGEMAP_SCAN: the ioctl, or the core's engine over pagemap where the kernel has none or it was asked for."""
        how = self._kernel.scan_by
        if how == "engine" or (how == "auto" and not self._kernel.profile.has("scan")):
            return scan_pagemap(self, request)
        return pagemap_scan(self._words().fd, request, page_size=self._kernel.profile.geometry.page_size)

    def clear_refs(self, what: ClearRefs | int) -> None:
        """Write `what` to clear_refs. It concerns everybody who watches this process."""
        path = f"{self._directory}/clear_refs"
        try:
            fd = open_file(path, "clear_refs", flags=os.O_WRONLY)
        except SyscallError as error:
            raise self._gone_or(error) from None
        try:
            os.write(fd, b"%d" % int(what))
        except OSError as error:
            remedy = (
                "this kernel was built without CONFIG_MEM_SOFT_DIRTY"
                if what == ClearRefs.SOFT_DIRTY
                else None
            )
            raise syscall_error(
                error.errno or errno.EIO, f"write({path}, {int(what)})", remedy=remedy
            ) from None
        finally:
            os.close(fd)

    def file_residency(self, vma: Vma, start: int, end: int) -> FileResidency:
        """SEEK_DATA and mincore of the file behind `vma`, reached through map_files."""
        if not vma.start <= start <= end <= vma.end:
            raise syscall_error(
                errno.EINVAL, f"file_residency({vma}, {start:#x}, {end:#x})", reason="not in the VMA"
            )
        if not vma.inode and not vma.name.startswith("/"):
            raise syscall_error(errno.EINVAL, f"file_residency({vma})", reason="no file is mapped there")
        path = f"{self._directory}/map_files/{vma.start:x}-{vma.end:x}"
        fd = open_file(path, "map_files")
        try:
            offset = vma.offset + start - vma.start
            size = self._kernel.profile.geometry.page_size
            return FileResidency(
                data=data_pages(fd, offset, end - start, page_size=size),
                in_core=pages_in_core(fd, offset, end - start, page_size=size),
            )
        except OSError as error:
            if isinstance(error, SyscallError):
                raise
            raise failure(error, f"file_residency({path})", "map_files") from None
        finally:
            os.close(fd)
