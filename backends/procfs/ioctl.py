"""The two ioctls: PAGEMAP_SCAN on pagemap and PROCMAP_QUERY on maps, with their structures."""

from __future__ import annotations

import ctypes
import errno
import struct

import numpy as np

from pmcore.errors import ArgumentError, syscall_error
from pmcore.procmap import QUERY_BYTES, MapAnswer, MapQuery
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import ScanResult, empty_regions
from pmcore.uapi import PAGEMAP_SCAN, PROCMAP_QUERY

__all__ = ["pagemap_scan", "procmap_query"]

_SCAN = struct.Struct("=12Q")
_WALK_END = 4 * 8
_NAME_BYTES = 4096 + 64
#: Address space set aside for one result at the most: as many regions as a request may ask for, never touched at once.
_MOST_REGIONS = 1 << 26

_libc: ctypes.CDLL | None = None


def _ioctl(fd: int, request: int, argument: ctypes.Array[ctypes.c_char]) -> int:
    """ioctl(2) on a buffer; the return value, or the negated errno. The buffer comes back in every case."""
    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
        _libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
    result = int(_libc.ioctl(fd, request, argument))
    return result if result >= 0 else -ctypes.get_errno()


def pagemap_scan(fd: int, request: ScanRequest, *, page_size: int) -> ScanResult:
    """PAGEMAP_SCAN on `fd`. A refusal is a result with its errno, and with what had been written before it.

    Raises ArgumentError for a request with more room than any range has pages and than memory can hold.
    """
    # The kernel checks that vec_len regions fit below the end of the user addresses, so the true vec_len goes in;
    # but it writes at most one region a page, and no more than that needs to be there.
    pages = max(0, request.end - request.start) // page_size + 2
    room = min(request.vec_len, pages)
    if room > _MOST_REGIONS:
        raise ArgumentError(
            f"vec_len {request.vec_len} over {pages} pages",
            remedy="use a smaller vec_len, and scan_all to go on",
        )
    vec = empty_regions(max(room, 1))
    argument = ctypes.create_string_buffer(
        _SCAN.pack(
            request.size,
            request.flags,
            request.start,
            request.end,
            0,
            vec.ctypes.data if request.vec else 0,
            request.vec_len,
            request.max_pages,
            request.category_inverted,
            request.category_mask,
            request.category_anyof_mask,
            request.return_mask,
        ),
        _SCAN.size,
    )
    count = _ioctl(fd, PAGEMAP_SCAN, argument)
    (walk_end,) = struct.unpack_from("=Q", argument, _WALK_END)
    if count < 0:
        # What was copied out before the refusal is in the buffer; a region that was never written is all zero.
        written = int(np.count_nonzero(vec["end"])) if request.vec and request.vec_len else 0
        return ScanResult(regions=vec[:written], walk_end=walk_end, errno=-count)
    return ScanResult(regions=vec[:count], walk_end=walk_end)


def procmap_query(fd: int, query: MapQuery) -> MapAnswer:
    """PROCMAP_QUERY on an open maps file. Raises the kernel's refusal."""
    name = ctypes.create_string_buffer(max(1, min(query.name_room, _NAME_BYTES)))
    build_id = ctypes.create_string_buffer(max(1, min(query.build_id_room, _NAME_BYTES)))
    packed = query.packed(
        name_at=ctypes.addressof(name) if query.name_room else 0,
        build_id_at=ctypes.addressof(build_id) if query.build_id_room else 0,
    )
    argument = ctypes.create_string_buffer(packed, max(QUERY_BYTES, min(query.size, _NAME_BYTES)))
    failed = -_ioctl(fd, PROCMAP_QUERY, argument)
    if failed > 0:
        remedy = "use maps='text' (the call came with 6.11)" if failed == errno.ENOTTY else None
        raise syscall_error(failed, "ioctl(PROCMAP_QUERY)", remedy=remedy)
    return MapAnswer.unpacked(argument.raw, name.raw)
