"""Descriptors of files below /proc and /sys: the same calls on the running kernel and on a machine in its place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys

import pytest

import pmcore
from pmcore.testing import fake_proc
from pmcore.uapi import PAGEMAP_SCAN

PAGE = mmap.PAGESIZE
FILES = (
    *(f"/proc/self/{name}" for name in ("pagemap", "maps", "smaps", "clear_refs")),
    "/proc/kpageflags",
    "/proc/kpagecount",
)


@contextlib.contextmanager
def _live():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    if not os.access("/proc/kpageflags", os.R_OK):
        pytest.skip("needs root: kpageflags cannot be read")
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        for page in (0, 1, 2, 3, 10, 11):
            area[page * PAGE] = 1
        yield ctypes.addressof(ctypes.c_char.from_buffer(area))


@contextlib.contextmanager
def _simulated():
    with pmcore.open("sim", memory="64 MiB", kernel="6.18", config=["!CONFIG_MEM_SOFT_DIRTY"]) as machine:
        task = machine.spawn()
        start = task.mmap(64 * PAGE)
        task.touch(start, 4 * PAGE)
        task.touch(start + 10 * PAGE, 2 * PAGE)
        with fake_proc(machine, pid=task.pid):
            yield start


@pytest.fixture(params=[pytest.param("kernel", marks=pytest.mark.live), "sim"])
def place(request):
    """The address of 64 pages of this process, of which 0 to 3, 10 and 11 are written."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(_live() if request.param == "kernel" else _simulated())


def said(call, *arguments):
    """What came of a call: its value, or the name of its error."""
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]


@contextlib.contextmanager
def opened(path, flags=os.O_RDONLY):
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.rule("FD-001")
@pytest.mark.parametrize("path", FILES)
def test_seeking(place, path):
    writing = path.endswith("clear_refs")
    with opened(path, os.O_WRONLY if writing else os.O_RDONLY) as fd:
        calls = ((16, 0), (8, 1), (0, 2), (0, 3), (0, 4), (0, 9), (1 << 62, 0))
        found = [said(os.lseek, fd, offset, whence) for offset, whence in calls]
        if writing:
            assert found == [0, 0, 0, 0, 0, "EINVAL", 0]
            return
        assert found == [16, 24, *["EINVAL"] * 4, 1 << 62]
        assert os.read(fd, 64) == b""
        assert said(os.pread, fd, 8, -8) == "EINVAL"


@pytest.mark.rule("FD-002", "FS-002")
def test_several_buffers(place):
    word = place // PAGE * 8
    with opened("/proc/self/pagemap") as fd:
        parts = [bytearray(8), bytearray(16), bytearray(3)]
        assert os.preadv(fd, parts[:2], word) == 24
        assert b"".join(parts[:2]) == os.pread(fd, 24, word)
        assert os.preadv(fd, [parts[0], parts[2]], word) == 8
        assert said(os.preadv, fd, [parts[2], parts[0]], word) == "EINVAL"
        os.lseek(fd, word, os.SEEK_SET)
        assert os.readv(fd, parts[:2]) == 24
        assert os.lseek(fd, 0, os.SEEK_CUR) == word + 24
    with opened("/proc/self/maps") as fd:
        parts = [bytearray(3), bytearray(5), bytearray(1 << 20)]
        assert os.preadv(fd, parts[:2], 0) == 8
        whole = os.preadv(fd, parts, 0)
        assert 8 < whole < 2 * PAGE  # the rest of the line that was cut, then a buffer


@pytest.mark.rule("FD-003", "FS-001")
@pytest.mark.parametrize("path", FILES)
def test_status(place, path):
    """The same mode, size, owner and block size by path and by descriptor."""
    by_path = os.stat(path)
    with opened(path, os.O_WRONLY if path.endswith("clear_refs") else os.O_RDONLY) as fd:
        by_descriptor = os.fstat(fd)
    for found in (by_path, by_descriptor):
        assert (found.st_size, found.st_blksize, found.st_uid, found.st_nlink) == (0, 1024, 0, 1)
    assert by_path.st_mode == by_descriptor.st_mode
    assert by_path.st_ino == by_descriptor.st_ino


@pytest.mark.rule("FD-003")
def test_what_python_reads_ahead(place):
    """A file object asks for 1024 bytes, and so knows what changed behind them only."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(place // PAGE * 8)
        file.read(8)
        assert len(file.peek()) == 1016
        assert file.raw.tell() == place // PAGE * 8 + 1024


@pytest.mark.rule("FD-004", "FS-008")
def test_flags_of_open(place):
    def attempt(path, flags):
        return said(lambda: os.close(os.open(path, flags)))

    maps, create = "/proc/self/maps", os.O_WRONLY | os.O_CREAT
    assert attempt("/proc/nothing", create) == "ENOENT"
    assert attempt("/proc/self/nothing", create) == "ENOENT"
    assert attempt("/sys/nothing", create) == "EACCES"
    assert attempt(maps, create | os.O_EXCL) == "EEXIST"
    assert attempt(maps, os.O_DIRECTORY) == "ENOTDIR"
    assert attempt(f"{maps}/", os.O_RDONLY) == "ENOTDIR"
    assert attempt(f"{maps}/x", os.O_RDONLY) == "ENOTDIR"
    assert attempt("/proc/self", os.O_NOFOLLOW) == "ELOOP"
    assert attempt(maps, os.O_NOFOLLOW) is None
    assert attempt("/proc/self", os.O_RDWR) == "EISDIR"
    assert attempt("/proc/self/clear_refs", os.O_WRONLY | os.O_TRUNC) is None
    with opened("/proc/self", os.O_RDONLY) as fd:
        assert said(os.read, fd, 8) == "EISDIR"
        assert said(fcntl.ioctl, fd, PAGEMAP_SCAN, bytearray(96)) == "ENOTTY"
        assert set(os.listdir(fd)) == set(os.listdir("/proc/self"))
    with opened("/proc/self/clear_refs", os.O_WRONLY) as fd:
        assert said(os.read, fd, 8) == "EBADF"
    with opened("/proc/self/pagemap") as fd:
        assert said(os.write, fd, b"x") == "EBADF"
        with pytest.raises(ValueError, match="mmap"):
            mmap.mmap(fd, PAGE, access=mmap.ACCESS_READ)
    assert said(os.listdir, maps) == "ENOTDIR"
    assert said(os.readlink, maps) == "EINVAL"
    assert os.readlink("/proc/self") == str(os.getpid())
    assert said(os.stat, f"{maps}/") == "ENOTDIR"
    for mode, there in ((os.F_OK, True), (os.R_OK, True), (os.W_OK, True), (os.X_OK, False)):
        assert os.access(maps, mode) is there
    assert os.access("/proc/self", os.X_OK)


@pytest.mark.rule("FS-009", "SC-001")
def test_ioctl_as_python_makes_it(place):
    """Buffers that may be written to are, others come back as a copy; refusals and the regions are the same."""
    vec = (ctypes.c_uint64 * 30)()
    end = place + 64 * PAGE

    def argument(start=place, room=10, flags=0, size=96, vec_at=None):
        at = ctypes.addressof(vec) if vec_at is None else vec_at
        return bytearray(struct.pack("=12Q", size, flags, start, end, 0, at, room, 0, 0, 8, 0, 8))

    with open("/proc/self/pagemap", "rb") as file:
        there = argument()
        assert fcntl.ioctl(file, PAGEMAP_SCAN, there) == 2
        assert [(a - place) // PAGE for a in vec[:5] if a > 8] == [0, 4, 10, 12]
        assert struct.unpack("=12Q", there)[4] == end
        copy = fcntl.ioctl(file.fileno(), PAGEMAP_SCAN, bytes(argument()))
        assert copy == bytes(there)
        assert fcntl.ioctl(file, PAGEMAP_SCAN, argument(), False) == copy
        for bad, error in (
            (argument(start=place + 1), "EINVAL"),
            (argument(size=88), "EINVAL"),
            (argument(flags=4), "EINVAL"),
            (argument(vec_at=0), "EINVAL"),
            (argument(vec_at=0x10000), "EFAULT"),
            (7, "EFAULT"),
        ):
            assert said(fcntl.ioctl, file, PAGEMAP_SCAN, bad) == error
        assert said(fcntl.ioctl, file, 0x5401, bytearray(96)) == "EINVAL"
        with pytest.raises(ValueError, match="too long"):
            fcntl.ioctl(file, PAGEMAP_SCAN, bytes(2000))
