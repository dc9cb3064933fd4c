"""A simulated process, looked at from outside: what its directory in /proc shows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.backends.sim.services import clear_refs, filesystem, migrating
from pmcore.backends.sim.services.filesystem import data_pages
from pmcore.backends.sim.services.mincore import in_core
from pmcore.backends.sim.services.pagecache import OpenFile
from pmcore.backends.sim.views import maps as maps_view
from pmcore.backends.sim.views import pagemap as pagemap_view
from pmcore.backends.sim.views import status
from pmcore.backends.sim.views.scan import SimTables
from pmcore.errors import syscall_error
from pmcore.geometry import align_up
from pmcore.protocols import FileResidency, Process
from pmcore.scan.engine import scan_tables
from pmcore.scan.over_pagemap import scan_pagemap
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import ScanResult
from pmcore.scan.validate import refusal
from pmcore.smaps import SmapsEntry, format_smaps
from pmcore.uapi import ClearRefs, Errno
from pmcore.vma import Vma, format_maps

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import SimMachine
    from pmcore.backends.sim.task import SimTask

__all__ = ["SimProcess"]


#: Bytes of an ELF header.
_HEADER = 64


class SimProcess(Process):
    """One process's page tables."""

    def __init__(self, machine: SimMachine, task: SimTask) -> None:
        self._machine = machine
        self._task = task
        self.pid = task.pid

    @property
    def kernel(self) -> SimMachine:
        """The machine that it runs on."""
        return self._machine

    def _alive(self, call: str) -> None:
        if not self._task.alive:
            raise syscall_error(int(Errno.ESRCH), call, remedy="the process is gone")

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of pagemap, maps, smaps, or another text of `files`."""
        if name == "pagemap":
            if offset % 8 or length % 8 or offset < 0 or length < 0:
                refuse(Errno.EINVAL, f"pread(/proc/{self.pid}/pagemap, {length}, {offset})")
            geometry = self._machine.geometry
            there = max(0, (geometry.task_size >> geometry.page_shift) - offset // 8)
            out = np.zeros(min(length // 8, there), dtype=np.uint64)
            return out[: self.read_pagemap(offset // 8, out)].tobytes()
        if (
            length == 0 and name != "clear_refs" and name in self.files()
        ):  # nobody wants the text: it is not made
            self._alive(f"read(/proc/{self.pid}/{name})")
            return b""
        if name == "maps":
            return format_maps(self.maps())[offset : offset + length]
        if name == "smaps":
            return format_smaps(self.smaps())[offset : offset + length]
        if name not in self.files() or name == "clear_refs":
            raise syscall_error(int(Errno.ENOENT), f"open(/proc/{self.pid}/{name})")
        self._alive(f"read(/proc/{self.pid}/{name})")
        return status.text(self._machine.core, self._task.mm, self.pid, name)[offset : offset + length]

    def files(self) -> Sequence[str]:
        """What there is of a process on this kernel."""
        names = (*super().files(), *status.TEXTS)
        return (
            names
            if self._machine.profile.has("smaps.rollup")
            else tuple(n for n in names if n != "smaps_rollup")
        )

    def read_pagemap(self, start_vpn: int, out: U64Array) -> int:
        """Raw entries from page `start_vpn` on."""
        if not self._task.alive:
            return 0
        return pagemap_view.fill(
            self._machine.core, self._task.mm, start_vpn, out, visible=self._machine.pfn_visible
        )

    def maps(self) -> tuple[Vma, ...]:
        """The VMAs."""
        self._alive(f"read(/proc/{self.pid}/maps)")
        return maps_view.maps(self._task.mm)

    def smaps(self, start: int = 0, end: int | None = None) -> tuple[SmapsEntry, ...]:
        """The VMAs with their counters."""
        self._alive(f"read(/proc/{self.pid}/smaps)")
        return maps_view.smaps(self._machine.core, self._task.mm, start, 1 << 64 if end is None else end)

    def pagemap_scan_raw(self, request: ScanRequest) -> ScanResult:
        """PAGEMAP_SCAN; on a kernel without it the core's engine over pagemap."""
        if not self._task.alive:
            return self._scan_of_ended(request)
        if not self._machine.core.caps.scan:
            return scan_pagemap(self, request)
        if request.flags:
            migrating.still(self._machine.core, "a scan that may write-protect")
        self._machine.core.memory.charging = 0  # the caller's group: whoever looks is in the root
        try:
            return scan_tables(request, SimTables(self._machine.core, self._task.mm), self._machine.profile)
        except NoMemory:
            return ScanResult(errno=int(Errno.ENOMEM))

    def _scan_of_ended(self, request: ScanRequest) -> ScanResult:
        """What a scan finds of a process that is gone (rule FS-010)."""
        if not self._machine.profile.has("quirk.scan_of_ended"):
            return ScanResult(errno=int(Errno.ESRCH))
        refused = refusal(request, self._machine.profile)
        return (
            ScanResult(errno=refused)
            if refused
            else ScanResult(walk_end=align_up(request.end, self._machine.geometry.page_size))
        )

    def clear_refs(self, what: ClearRefs | int) -> None:
        """Write `what` to clear_refs."""
        self._alive(f"write(/proc/{self.pid}/clear_refs)")
        migrating.still(self._machine.core, "clear_refs")
        clear_refs.write(self._machine.core, self._task.mm, int(what))

    def read_header(self, start: int) -> None:
        """What asking for a build id does: the first bytes of the file behind the VMA are read, as read(2) would."""
        area, core = self._task.mm.vmas.at(start), self._machine.core
        if area is None or area.file is None:
            return
        migrating.still(core, "asking for a build id")
        with suppress(NoMemory):
            filesystem.pread(core, area.opened or OpenFile(area.file), _HEADER, 0)

    def file_residency(self, vma: Vma, start: int, end: int) -> FileResidency:
        """SEEK_DATA and mincore of the file behind a mapping."""
        area = self._task.mm.vmas.at(start)
        if area is None or area.file is None or end > area.end:
            refuse(Errno.EINVAL, f"file_residency({vma})", "no file is mapped there")
        core, shift = self._machine.core, self._machine.geometry.page_shift
        first, count = area.pgoff + (start - area.start >> shift), end - start >> shift
        return FileResidency(
            data=data_pages(core, area.file, np.arange(first, first + count, dtype=np.int64)),
            in_core=in_core(core, area.file, first, count),
        )
