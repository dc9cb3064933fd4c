"""The ioctls of pagemap and maps as a caller makes them: a structure in, the same structure and memory out."""

from __future__ import annotations

import errno
import struct
from typing import Protocol

from pmcore.errors import syscall_error
from pmcore.procmap import QUERY, QUERY_BYTES, MapAnswer, answer
from pmcore.protocols import Process
from pmcore.scan.request import ScanRequest
from pmcore.scan.validate import refusal
from pmcore.uapi import PM_SCAN_ARG_BYTES
from pmcore.vma import Vma

__all__ = ["CallerMemory", "pagemap_scan", "procmap_query"]

_SCAN = struct.Struct("=12Q")
_WALK_END = struct.Struct("=Q")
_WALK_END_AT = 4 * 8


class CallerMemory(Protocol):
    """The memory of who makes the call."""

    def write(self, address: int, data: bytes) -> None:
        """Put `data` there. Raises OSError (EFAULT where there is nothing to write to)."""
        ...


def pagemap_scan(process: Process, argument: bytearray, memory: CallerMemory) -> int:
    """PAGEMAP_SCAN with the `struct pm_scan_arg` in `argument`: regions go to `vec`, `walk_end` into `argument`.

    The number of regions. Raises the kernel's refusal; what had been written before it stays written.
    """
    if len(argument) < PM_SCAN_ARG_BYTES:
        raise syscall_error(errno.EFAULT, "ioctl(PAGEMAP_SCAN)", reason=f"{len(argument)} bytes of argument")
    size, flags, start, end, _, vec, vec_len, most, inverted, mask, anyof, shown = _SCAN.unpack_from(argument)
    request = ScanRequest(
        start=start,
        end=end,
        vec=vec != 0,
        vec_len=vec_len,
        max_pages=most,
        flags=flags,
        category_inverted=inverted,
        category_mask=mask,
        category_anyof_mask=anyof,
        return_mask=shown,
        size=size,
    )
    refused = refusal(request, process.kernel.profile, vec_address=vec)
    if refused:
        if not process.kernel.profile.has("quirk.scan_of_ended"):
            process.maps()  # a process that is gone is told before any mistake in the argument
        raise syscall_error(refused, "ioctl(PAGEMAP_SCAN)")
    result = process.pagemap_scan_raw(request)
    if len(result.regions):
        memory.write(vec, result.regions.tobytes())
    _WALK_END.pack_into(argument, _WALK_END_AT, result.walk_end)
    result.check()
    return len(result.regions)


def procmap_query(process: Process, argument: bytearray, memory: CallerMemory) -> int:
    """PROCMAP_QUERY with the `struct procmap_query` in `argument`, which is filled in; the name goes to the caller.

    Raises the kernel's refusal. Build ids are told as not there: no machine behind this interface has the files.
    """
    size, limit = process.kernel.geometry.page_size, process.kernel.geometry.task_size

    def page_size(vma: Vma) -> int:
        [entry] = process.smaps(vma.start, vma.end)
        return entry.counters.get("KernelPageSize", size)

    # What lies above the user addresses (vsyscall) is in maps, and not found by this call (rule AC-008).
    answer(argument, [vma for vma in process.maps() if vma.start < limit], page_size, memory.write)
    known = int.from_bytes(argument[:8], "little") >= QUERY_BYTES
    if known and QUERY.unpack(bytes(argument[:QUERY_BYTES]))[-1]:
        process.read_header(MapAnswer.unpacked(argument).start)
    return 0
