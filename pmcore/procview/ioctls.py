"""The ioctls of pagemap and maps as a caller makes them: a structure in, the same structure and memory out."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import Protocol

from pmcore.errors import syscall_error
from pmcore.protocols import Process
from pmcore.scan.request import ScanRequest
from pmcore.scan.validate import refusal
from pmcore.uapi import PM_SCAN_ARG_BYTES
from pmcore.vma import Vma

__all__ = ["CallerMemory", "pagemap_scan", "procmap_query"]

_SCAN = struct.Struct("=12Q")
_WALK_END = struct.Struct("=Q")
_WALK_END_AT = 4 * 8
_QUERY = struct.Struct("=9Q4L2Q")
#: Through query_addr: what a structure must have at the least.
_QUERY_LEAST, _PAGE, _PATH_MAX = 24, 4096, 4096
_READABLE, _WRITABLE, _EXECUTABLE, _SHARED, _COVERING_OR_NEXT, _FILE_BACKED = 1, 2, 4, 8, 16, 32


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
    call = "ioctl(PROCMAP_QUERY)"
    if len(argument) < 8:
        raise syscall_error(errno.EFAULT, call)
    size = int.from_bytes(argument[:8], "little")
    if size > _PAGE:
        raise syscall_error(errno.E2BIG, call)
    if size < _QUERY_LEAST:
        raise syscall_error(errno.EINVAL, call)
    if len(argument) < min(size, _QUERY.size):
        raise syscall_error(errno.EFAULT, call)
    # A caller of an older header gives less, the rest counts as zero; one of a newer header must give zeros behind.
    if any(argument[_QUERY.size : size]):
        raise syscall_error(errno.E2BIG, call)
    whole = bytes(argument[: min(size, _QUERY.size)]).ljust(_QUERY.size, b"\0")
    _, flags, address, *_, room, build_id, name_at, build_id_at = _QUERY.unpack(whole)
    if flags & ~0x3F or bool(room) != bool(name_at) or bool(build_id) != bool(build_id_at):
        raise syscall_error(errno.EINVAL, call)
    # What lies above the user addresses (vsyscall) is in maps, and not found by this call (rule AC-008).
    limit = process.kernel.geometry.task_size
    vma = _matching([vma for vma in process.maps() if vma.start < limit], address, flags)
    if vma is None:
        raise syscall_error(errno.ENOENT, call)
    name = vma.name_bytes.replace(b"\\012", b"\n") + b"\0" if vma.name else b""
    if room and len(name) > min(room, _PATH_MAX):
        raise syscall_error(errno.ENAMETOOLONG, call)
    [entry] = process.smaps(vma.start, vma.end)
    page = entry.counters.get("KernelPageSize", process.kernel.geometry.page_size)
    perms = vma.readable * _READABLE | vma.writable * _WRITABLE | vma.executable * _EXECUTABLE
    perms |= vma.shared * _SHARED
    if room and name:
        memory.write(name_at, name)
    where = (vma.offset, vma.inode, vma.dev_major, vma.dev_minor) if vma.inode else (0, 0, 0, 0)
    filled = _QUERY.pack(
        *(size, flags, address, vma.start, vma.end, perms, page, *where),
        *(len(name) if room else 0, 0, name_at, build_id_at),
    )
    argument[: min(size, _QUERY.size)] = filled[:size]
    return 0


def _matching(vmas: Sequence[Vma], address: int, flags: int) -> Vma | None:
    for vma in vmas:
        if vma.end <= address:
            continue
        if vma.start > address and not flags & _COVERING_OR_NEXT:
            return None
        fits = all(
            not flags & bit or there
            for bit, there in (
                (_READABLE, vma.readable),
                (_WRITABLE, vma.writable),
                (_EXECUTABLE, vma.executable),
                (_SHARED, vma.shared),
                (_FILE_BACKED, bool(vma.inode)),
            )
        )
        if fits:
            return vma
        if not flags & _COVERING_OR_NEXT:
            return None
    return None
