"""Areas of this process's own memory in many states, and PAGEMAP_SCAN on them, by plain system calls."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import struct
import sys
from collections.abc import Iterator

import attrs

from pmcore.scan import ScanRequest, ScanVma
from pmcore.uapi import PageCategory

PAGE, PMD = 4096, 1 << 21
PAGEMAP_SCAN = 0xC0606610
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
ARENA = 0x10_0000_0000_00
ALL = 0xFF


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
    return libc


def checked(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


@attrs.define
class LiveAreas:
    """`areas` as the test made them; scanning and looking go through this process's own pagemap."""

    libc: ctypes.CDLL = attrs.field(factory=_libc)
    areas: list[ScanVma] = attrs.field(factory=list)
    #: Mapped as well, but not part of what is looked at.
    spare: list[ScanVma] = attrs.field(factory=list)
    fds: list[int] = attrs.field(factory=list)
    pagemap: int = -1
    uffd: int = -1

    def open(self) -> LiveAreas:
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.fds.append(self.pagemap)
        number = _SYS_USERFAULTFD[os.uname().machine]
        self.uffd = checked(self.libc.syscall(number, os.O_CLOEXEC), "userfaultfd")
        self.fds.append(self.uffd)
        # WP_ASYNC, WP_UNPOPULATED and WP on hugetlb and shmem
        api = ctypes.create_string_buffer(struct.pack("<3Q", 0xAA, 1 << 15 | 1 << 13 | 1 << 12, 0))
        checked(self.libc.ioctl(self.uffd, UFFDIO_API, api), "UFFDIO_API")
        return self

    def close(self) -> None:
        self.unmap_all()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def unmap_all(self) -> None:
        for area in self.areas + self.spare:
            self.libc.munmap(area.start, area.end - area.start)
        self.areas.clear()
        self.spare.clear()

    def map(self, start: int, length: int, *, kind: str, protect: bool) -> ScanVma:
        flags, fd = 0x100000, -1  # MAP_FIXED_NOREPLACE
        if kind == "shmem":
            fd = os.memfd_create("pmcore-test")
            os.ftruncate(fd, length)
            flags |= 0x01
        elif kind == "hugetlb":
            flags |= 0x22 | 0x40000
        else:
            flags |= 0x22
        address = self.libc.mmap(start, length, 3, flags, fd, 0)
        if fd >= 0:
            os.close(fd)
        if address in (None, ctypes.c_void_p(-1).value):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        if protect:
            register = ctypes.create_string_buffer(struct.pack("<4Q", start, length, 2, 0))
            checked(self.libc.ioctl(self.uffd, UFFDIO_REGISTER, register), "UFFDIO_REGISTER")
        area = ScanVma(
            start=start,
            end=start + length,
            wp_async=protect,
            uffd_wp=protect,
            hugetlb=PMD if kind == "hugetlb" else 0,
        )
        self.areas.append(area)
        return area

    def advise(self, start: int, length: int, advice: int) -> None:
        checked(self.libc.madvise(start, length, advice), "madvise")

    def touch(self, address: int, *, write: bool) -> None:
        cell = ctypes.c_ubyte.from_address(address)
        if write:
            cell.value = 1
        else:
            _ = cell.value

    def scan(self, request: ScanRequest) -> tuple[int, list[tuple[int, int, int]], int]:
        """(errno, regions, walk_end) of one call."""
        room = min(request.vec_len, 1 << 16)
        vec = (ctypes.c_uint64 * (3 * max(room, 1)))()
        argument = ctypes.create_string_buffer(
            struct.pack(
                "<12Q",
                request.size,
                request.flags,
                request.start,
                request.end,
                0,
                ctypes.addressof(vec) if request.vec else 0,
                request.vec_len,
                request.max_pages,
                request.category_inverted,
                request.category_mask,
                request.category_anyof_mask,
                request.return_mask,
            ),
            96,
        )
        count = self.libc.ioctl(self.pagemap, PAGEMAP_SCAN, argument)
        failed = ctypes.get_errno() if count < 0 else 0
        regions = [(vec[3 * i], vec[3 * i + 1], vec[3 * i + 2]) for i in range(max(count, 0))]
        return failed, regions, struct.unpack_from("<Q", argument, 32)[0]

    def page_categories(self, start: int, end: int) -> list[int]:
        """The full categories of each page, asked for page by page."""
        found = []
        for address in range(start, end, PAGE):
            request = ScanRequest(start=address, end=address + PAGE, vec_len=1, return_mask=ALL)
            failed, regions, _ = self.scan(request)
            if failed:
                raise OSError(failed, os.strerror(failed))
            found.append(regions[0][2] if regions else 0)
        return found


def why_not() -> str | None:
    """Why this machine cannot run the live tests of PAGEMAP_SCAN, or None."""
    if not sys.platform.startswith("linux") or sys.byteorder != "little":
        return "needs Linux on a little-endian machine"
    if os.uname().machine not in _SYS_USERFAULTFD or os.sysconf("SC_PAGE_SIZE") != PAGE:
        return "written for x86-64 and arm64 with pages of 4 KiB"
    live = LiveAreas()
    try:
        live.open()
        failed, _, _ = live.scan(ScanRequest(start=0, end=0))
        return f"this kernel refuses PAGEMAP_SCAN: {errno.errorcode[failed]}" if failed else None
    except OSError as error:
        return f"userfaultfd with asynchronous write protection is not to be had: {error}"
    finally:
        live.close()


def blocks(start: int, end: int) -> Iterator[int]:
    yield from range(start - start % PMD, end, PMD)


def furnish(live: LiveAreas, area: ScanVma, rng: random.Random, *, shmem: bool) -> None:
    """Bring the area's blocks into random states: untouched, huge, sparsely or densely touched, guarded."""
    if area.hugetlb:
        for address in range(area.start, area.end, PMD):
            how = rng.choice(["write", "read", "no"])
            if how != "no":
                live.touch(address, write=how == "write")
        return
    for block in blocks(area.start, area.end):
        low, high = max(block, area.start), min(block + PMD, area.end)
        how = rng.choice(["no", "huge", "sparse", "dense"])
        if how == "huge" and (low, high) == (block, block + PMD):
            live.advise(low, PMD, 14)
            live.touch(low, write=rng.random() < 0.7)
        elif how == "sparse":
            for _ in range(rng.randint(1, 12)):
                live.touch(rng.randrange(low, high, PAGE), write=rng.random() < 0.7)
        elif how == "dense":
            step = rng.choice([1, 2, 3]) * PAGE
            for address in range(low, high, step):
                live.touch(address, write=True)
        if not shmem and rng.random() < 0.2:
            live.advise(rng.randrange(low, high, PAGE), PAGE, 4)


def categories_mask(rng: random.Random) -> int:
    return rng.choice([0, 0, int(PageCategory.WRITTEN), 1 << rng.randrange(8), rng.randrange(256)])
