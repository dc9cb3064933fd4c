"""Doing something to frames: marking them idle, poisoning and unpoisoning them."""

from __future__ import annotations

import os

import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.procfs.files import failure, open_file
from pmcore.errors import syscall_error
from pmcore.protocols import IDLE_BITMAP

__all__ = ["POISON_DIRECTORY", "mark_idle", "poison", "read_idle", "write_idle"]

POISON_DIRECTORY = "/sys/kernel/debug/hwpoison"


def mark_idle(pfns: U64Array, *, bitmap: str = IDLE_BITMAP) -> None:
    """Mark the frames idle: one bit a frame, written by words of 64. Raises Missing, NotPermitted."""
    fd = _open_bitmap(bitmap, os.O_WRONLY)
    try:
        words, position = np.unique(pfns >> np.uint64(6), return_inverse=True)
        bits = np.zeros(len(words), dtype=np.uint64)
        np.bitwise_or.at(bits, position, np.uint64(1) << (pfns & np.uint64(63)))
        cuts = np.flatnonzero(np.diff(words) != 1) + 1
        for run in np.split(np.arange(len(words)), cuts):
            if len(run):
                os.pwrite(fd, bits[run].tobytes(), int(words[run[0]]) * 8)
    except OSError as error:
        raise failure(error, f"write({bitmap})", "page_idle") from None
    finally:
        os.close(fd)


def read_idle(offset: int, length: int, *, bitmap: str = IDLE_BITMAP) -> bytes:
    """One pread(2) of the bitmap. Raises Missing, NotPermitted, InvalidArgument as the kernel does."""
    fd = _open_bitmap(bitmap, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise failure(error, f"pread({bitmap}, {length}, {offset})", "page_idle") from None
    finally:
        os.close(fd)


def write_idle(offset: int, data: bytes, *, bitmap: str = IDLE_BITMAP) -> int:
    """One pwrite(2) of the bitmap; the bytes taken. Raises as `read_idle`."""
    fd = _open_bitmap(bitmap, os.O_WRONLY)
    try:
        return os.pwrite(fd, data, offset)
    except OSError as error:
        raise failure(error, f"pwrite({bitmap}, {len(data)} bytes, {offset})", "page_idle") from None
    finally:
        os.close(fd)


def _open_bitmap(bitmap: str, flags: int) -> int:
    try:
        return open_file(bitmap, "page_idle", flags=flags)
    except FileNotFoundError as error:
        raise syscall_error(
            error.errno or 2, f"open({bitmap})", remedy="needs a kernel with CONFIG_IDLE_PAGE_TRACKING"
        ) from None


def poison(pfns: U64Array, *, undo: bool, directory: str = POISON_DIRECTORY) -> None:
    """Poison (or unpoison) frames through the kernel's injector, one write a frame: it takes no more at a time."""
    path = f"{directory}/{'unpoison-pfn' if undo else 'corrupt-pfn'}"
    try:
        fd = open_file(path, "hwpoison", flags=os.O_WRONLY)
    except FileNotFoundError as error:
        raise syscall_error(
            error.errno or 2,
            f"open({path})",
            remedy="needs CONFIG_HWPOISON_INJECT (modprobe hwpoison-inject) and debugfs mounted",
        ) from None
    try:
        for pfn in pfns.tolist():
            os.write(fd, f"{pfn:#x}\n".encode())
    except OSError as error:
        raise failure(error, f"write({path})", "hwpoison") from None
    finally:
        os.close(fd)
