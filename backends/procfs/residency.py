"""What a file says of its pages: SEEK_DATA by runs, mincore by page, and its frames through a mapping of our own."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.backends.procfs.files import WordFile
from pmcore.errors import syscall_error

__all__ = ["data_pages", "file_pagemap", "pages_in_core"]

_PROT_READ, _MAP_SHARED = 1, 1
_MADV_RANDOM = 1
_FAILED = ctypes.c_void_p(-1).value
#: Bytes mapped at a time: bounds the address space and the page tables that looking at a file costs.
_WINDOW = 256 << 20


def _call(name: str, *arguments: int | ctypes.c_void_p | None) -> int:
    """A libc function that returns -1 and errno. Raises SyscallError."""
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, name)
    function.restype = ctypes.c_void_p if name == "mmap" else ctypes.c_int
    result = function(*arguments)
    if result in (-1, _FAILED):
        raise syscall_error(ctypes.get_errno(), name)
    return int(result or 0)


@contextmanager
def _mapped(fd: int, offset: int, length: int) -> Iterator[int]:
    address = _call(
        "mmap",
        None,
        ctypes.c_void_p(length),
        _PROT_READ,
        _MAP_SHARED,
        fd,
        ctypes.c_void_p(offset),
    )
    try:
        yield address
    finally:
        _call("munmap", ctypes.c_void_p(address), ctypes.c_void_p(length))


def data_pages(fd: int, offset: int, length: int, *, page_size: int) -> BoolArray:
    """Per page from `offset` on, whether the file has data there (SEEK_DATA, SEEK_HOLE: one call a run)."""
    pages = -(-length // page_size)
    found = np.zeros(pages, dtype=np.bool_)
    position, end = offset, offset + length
    while position < end:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole behind here, or the end of the file
                break
            raise
        if data >= end:
            break
        hole = os.lseek(fd, data, os.SEEK_HOLE)
        first, last = (data - offset) // page_size, -(-(min(hole, end) - offset) // page_size)
        found[first:last] = True
        position = max(hole, data + 1)
    return found


def pages_in_core(fd: int, offset: int, length: int, *, page_size: int) -> BoolArray:
    """Per page from `offset` on, whether it is in memory (mincore on a mapping of our own)."""
    pages = -(-length // page_size)
    found = np.zeros(pages, dtype=np.uint8)
    for first in range(0, pages * page_size, _WINDOW):
        size = min(_WINDOW, pages * page_size - first)
        with _mapped(fd, offset + first, size) as address:
            part = found[first // page_size : (first + size) // page_size]
            _call(
                "mincore",
                ctypes.c_void_p(address),
                ctypes.c_void_p(size),
                part.ctypes.data_as(ctypes.c_void_p),
            )
    return (found & 1).astype(np.bool_)


def file_pagemap(
    pagemap: WordFile, fd: int, offset: int, length: int, *, page_size: int
) -> Iterator[tuple[int, U64Array]]:
    """Pagemap words of the file's cached pages, window by window: (offset, words).

    Each cached page is touched through a mapping of our own, which puts its frame into our page table; pages that are
    not in memory are left alone, so that looking reads nothing from disk.
    """
    for first in range(0, length, _WINDOW):
        size = min(_WINDOW, -(-(length - first) // page_size) * page_size)
        with _mapped(fd, offset + first, size) as address:
            _call("madvise", ctypes.c_void_p(address), ctypes.c_void_p(size), _MADV_RANDOM)
            core = np.zeros(size // page_size, dtype=np.uint8)
            _call(
                "mincore",
                ctypes.c_void_p(address),
                ctypes.c_void_p(size),
                core.ctypes.data_as(ctypes.c_void_p),
            )
            pages = np.flatnonzero(core & 1).astype(np.uint64)
            _touch(np.uint64(address) + pages * np.uint64(page_size))
            words = np.zeros(size // page_size, dtype=np.uint64)
            pagemap.read_words(address // page_size, words)
            yield offset + first, words


def _touch(addresses: U64Array) -> None:
    """Have one byte read at each of the addresses.

    The file may shrink meanwhile, and a plain read would then kill us with SIGBUS: the kernel copies the bytes into a
    scratch file for us instead, up to 1024 places a call, and says EFAULT where nothing is left.
    """
    vectors = np.ones((len(addresses), 2), dtype=np.uint64)  # struct iovec: base, length 1
    vectors[:, 0] = addresses
    libc = ctypes.CDLL(None, use_errno=True)
    scratch = os.memfd_create("pmcore-touch", os.MFD_CLOEXEC)
    try:
        position = 0
        while position < len(vectors):
            batch = np.ascontiguousarray(vectors[position : position + 1024])
            done = libc.pwritev(scratch, ctypes.c_void_p(batch.ctypes.data), len(batch), ctypes.c_long(0))
            position += max(int(done), 0)
            if done < len(batch):
                position += 1  # the page that could not be read
    finally:
        os.close(scratch)
