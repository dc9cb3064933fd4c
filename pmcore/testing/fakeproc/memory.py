"""This process's own memory, written to by address: where an ioctl's caller wants its answer."""

from __future__ import annotations

import errno
import os
from typing import Any

__all__ = ["OwnMemory"]

#: Bytes that a pipe takes at once on every system.
_PIECE = 4096


class OwnMemory:
    """A `pmcore.procview.CallerMemory` over the memory of this process.

    Addresses that are not mapped, or not writable, are EFAULT where there is a C library's read(2) to find out with:
    it puts the bytes there, from a pipe. Elsewhere they are moved unasked.
    """

    def write(self, address: int, data: bytes) -> None:
        """Put `data` at `address`. Raises OSError(EFAULT)."""
        import ctypes

        read = _c_read()
        if read is None:
            ctypes.memmove(address, data, len(data))
            return
        source, sink = os.pipe()
        try:
            for first in range(0, len(data), _PIECE):
                piece = data[first : first + _PIECE]
                os.write(sink, piece)
                taken = read(source, ctypes.c_void_p(address + first), len(piece))
                if taken < len(piece):
                    number = ctypes.get_errno() if taken < 0 else errno.EFAULT
                    raise OSError(number, os.strerror(number))
        finally:
            os.close(source)
            os.close(sink)


def _c_read() -> Any:
    """read(2) of the C library; None where there is none."""
    import ctypes

    if os.name != "posix":
        return None
    read = ctypes.CDLL(None, use_errno=True).read
    read.restype, read.argtypes = ctypes.c_ssize_t, (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    return read
