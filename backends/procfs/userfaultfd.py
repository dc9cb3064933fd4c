"""Which pages of this process's own memory were written: userfaultfd write protection, resolved by the kernel itself.

Pages are armed with PAGEMAP_SCAN; the first write to each disarms it without stopping the writer (WP_ASYNC), and the
next scan reports and re-arms it in one atomic step. Rules SC-030 to SC-034.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np

from pmcore.backends.procfs.files import WordFile
from pmcore.backends.procfs.ioctl import pagemap_scan
from pmcore.errors import ArgumentError, syscall_error
from pmcore.geometry import align_down, align_up
from pmcore.scan.loop import join_regions
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import RegionArray, empty_regions
from pmcore.uapi import PageCategory, ScanFlag, UffdFeature

__all__ = ["WriteTracker", "offered_features"]

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}
_UFFD_API = 0xAA
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_MODE_WP = 2
_VEC_LEN = 4096
_FEATURES = UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED


class WriteTracker:
    """Tracks writes to a range of this process's memory; a context manager.

        with WriteTracker.of(array) as tracker:
            array[5] = 1
            tracker.written()      # regions (start, end, categories), page by page what was written since the start
            tracker.reset()        # from here on

    The range is rounded outward to whole pages. Memory of any kind that userfaultfd takes: anonymous, shmem, hugetlb.
    Raises NotSupported where the kernel lacks asynchronous write protection, NotPermitted where userfaultfd is not
    allowed, Busy where the range is being tracked already, InvalidArgument where it holds memory that cannot be.
    """

    def __init__(self, start: int, length: int) -> None:
        if start < 0 or length <= 0:
            raise ArgumentError(f"{length} bytes from {start:#x} are no range")
        self._size = os.sysconf("SC_PAGE_SIZE")
        self.start = align_down(start, self._size)
        self.end = align_up(start + length, self._size)
        self._fd = -1
        self._pagemap: WordFile | None = None
        self._keep: object = None

    @classmethod
    def of(cls, buffer: Any) -> WriteTracker:
        """A tracker of the memory behind `buffer` (numpy array, mmap, bytearray, ...), writable and contiguous."""
        view = memoryview(buffer)
        if view.readonly or not view.contiguous or view.nbytes == 0:
            raise ArgumentError("only writable, contiguous, non-empty buffers can be tracked")
        array = np.frombuffer(view, dtype=np.uint8)
        tracker = cls(int(array.ctypes.data), view.nbytes)
        tracker._keep = array
        return tracker

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Register the range and arm every page of it."""
        if self._fd >= 0:
            raise ArgumentError("this tracker is open already")
        self._fd = _userfaultfd(_FEATURES)
        try:
            self._pagemap = WordFile("/proc/self/pagemap", "pagemap")
            argument = struct.pack("=4Q", self.start, self.end - self.start, _MODE_WP, 0)
            _ioctl(
                self._fd,
                _UFFDIO_REGISTER,
                argument,
                "ioctl(UFFDIO_REGISTER)",
                "every page must be mapped, of one kind that userfaultfd takes, and tracked by nobody else",
            )
            self.reset()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unregister and let go; twice is allowed. The memory is as writable as before."""
        if self._fd >= 0:
            # Closing the last descriptor unregisters the range and clears its protection.
            os.close(self._fd)
            self._fd = -1
        if self._pagemap is not None:
            self._pagemap.close()
            self._pagemap = None
        self._keep = None

    def reset(self) -> None:
        """Arm every page: what is written from now on counts."""
        self._scan(vec_len=0, flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC)

    def written(self, *, reset: bool = False) -> RegionArray:
        """Regions written since the last reset. With `reset` they are armed again in the same step."""
        flags = ScanFlag.CHECK_WPASYNC | (ScanFlag.WP_MATCHING if reset else ScanFlag(0))
        return self._scan(vec_len=_VEC_LEN, flags=flags)

    def _scan(self, *, vec_len: int, flags: ScanFlag) -> RegionArray:
        if self._pagemap is None:
            raise ArgumentError("the tracker is closed", remedy="use it inside its with statement")
        written = int(PageCategory.WRITTEN)
        pieces, position = [empty_regions()], self.start
        while position < self.end:
            request = ScanRequest(
                start=position,
                end=self.end,
                vec_len=vec_len,
                flags=int(flags),
                category_mask=written,
                return_mask=written,
            )
            result = pagemap_scan(self._pagemap.fd, request, page_size=self._size).check()
            pieces.append(result.regions)
            if not vec_len or len(result.regions) < vec_len:
                break
            position = max(result.walk_end, int(result.regions["end"][-1]))
        return join_regions(np.concatenate(pieces))


@contextmanager
def _opened() -> Iterator[int]:
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise syscall_error(errno.ENOSYS, "userfaultfd()", remedy=f"not known on {os.uname().machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise syscall_error(
            ctypes.get_errno(),
            "userfaultfd()",
            remedy="run as root, or set /proc/sys/vm/unprivileged_userfaultfd to 1",
        )
    try:
        yield fd
    finally:
        os.close(fd)


def offered_features() -> UffdFeature:
    """The features that the kernel offers. Raises NotPermitted, NotSupported where there is no userfaultfd for us."""
    with _opened() as fd:
        return UffdFeature(_api(fd, UffdFeature(0)))


def _userfaultfd(features: UffdFeature) -> int:
    """A userfaultfd with `features` on, and write protection of shmem and hugetlb where there is such.

    Raises NotSupported where the kernel does not offer `features`.
    """
    offered = offered_features()
    missing = features & ~offered
    if missing:
        raise syscall_error(
            errno.EOPNOTSUPP,
            "ioctl(UFFDIO_API)",
            reason=f"the kernel does not offer {missing!r}",
            remedy="asynchronous write protection came with 6.7, CONFIG_PTE_MARKER_UFFD_WP",
        )
    with _opened() as fd:
        _api(fd, features | offered & UffdFeature.WP_HUGETLBFS_SHMEM)
        return os.dup(fd)


def _api(fd: int, features: UffdFeature) -> int:
    """UFFDIO_API; the features that the kernel offers."""
    answer = _ioctl(
        fd, _UFFDIO_API, struct.pack("=3Q", _UFFD_API, int(features), 0), "ioctl(UFFDIO_API)", None
    )
    return int(struct.unpack("=3Q", answer)[1])


def _ioctl(fd: int, request: int, argument: bytes, call: str, remedy: str | None) -> bytes:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
    buffer = ctypes.create_string_buffer(argument, len(argument))
    if libc.ioctl(fd, request, buffer) < 0:
        raise syscall_error(ctypes.get_errno(), call, remedy=remedy)
    return buffer.raw
