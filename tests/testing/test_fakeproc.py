"""/proc and /sys of a machine in this process: what answers, what goes through untouched, and that all is put back."""

from __future__ import annotations

import array
import builtins
import ctypes
import errno
import fcntl
import glob
import io
import mmap
import ntpath
import os
import resource
import struct
import subprocess
import sys
import threading
from os import pread as pread_taken_before
from pathlib import Path

import numpy as np
import pytest

import pmcore
from pmcore.procview import Opener
from pmcore.recording import record
from pmcore.testing import fake_proc
from pmcore.uapi import PAGEMAP_SCAN, PM_PFRAME_MASK, PROCMAP_QUERY

PAGE = 4096
USER = Opener.user(1000)
NAMES = (
    (builtins, ["open"]),
    (io, ["open"]),
    (fcntl, ["ioctl"]),
    (resource, ["getpagesize"]),
    (mmap, ["PAGESIZE"]),
    (os.path, ["exists", "isfile"]),
    (os, ["open", "close", "read", "pread", "preadv", "write", "lseek", "fstat", "stat", "lstat", "listdir"]),
    (os, ["scandir", "access", "dup", "sysconf", "getpid"]),
)


@pytest.fixture
def machine():
    with pmcore.open("sim", memory="32 MiB", swap="4 MiB") as machine:
        yield machine
        machine.check()


@pytest.fixture
def area(machine):
    """64 pages of task 1, of which 8 are there."""
    task = machine.spawn()
    start = task.mmap(64 * PAGE)
    task.touch(start, 8 * PAGE)
    return start


@pytest.fixture
def fake(machine, area):
    with fake_proc(machine, pid=1) as fake:
        yield fake


def words_of(machine, start, pages):
    return machine.process(1).pagemap(start, start + pages * PAGE).values


def everything():
    return [getattr(module, name) for module, names in NAMES for name in names]


def read(*arguments, **options):
    with open(*arguments, **options) as file:
        return file.read()


def refused(call, *arguments):
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


# -- reading -----------------------------------------------------------------------------------------------


def test_each_way_to_read_pagemap_gives_the_machines_words(machine, area, fake):
    expected, place = words_of(machine, area, 10).tobytes(), area // PAGE * 8
    with open("/proc/self/pagemap", "rb") as file:
        assert file.seek(place) == place
        assert struct.unpack("2Q", file.read(16)) == struct.unpack_from("2Q", expected)
        assert file.read(64) == expected[16:80]
        assert file.tell() == place + 80
        assert file.raw.name == "/proc/self/pagemap"
    with Path("/proc/1/pagemap").open("rb", buffering=0) as file:
        file.seek(place)
        buffer = array.array("Q", [0] * 10)
        assert file.readinto(buffer) == 80
        assert buffer.tobytes() == expected
    fd = os.open(f"/proc/{os.getpid()}/pagemap", os.O_RDONLY)
    assert os.lseek(fd, place, os.SEEK_SET) == place
    assert os.read(fd, 80) == expected
    assert os.pread(fd, 8, place) == expected[:8] == pread_taken_before(fd, 8, place)
    parts = [bytearray(8), bytearray(16)]
    assert os.preadv(fd, parts, place) == 24
    assert b"".join(parts) == expected[:24]
    with os.fdopen(fd, "rb") as file:
        assert file.seek(place) == place
        assert np.fromfile(file, dtype="<u8", count=3).tobytes() == expected[:24]
        assert file.tell() == place + 24
        assert np.fromfile(file, dtype="<u8", count=2).tobytes() == expected[24:40]
    assert refused(os.read, fd, 8) == errno.EBADF


def test_texts_by_lines_and_whole(machine, area, fake):
    text = machine.process(1).pread("maps", 0, 1 << 20).decode()
    with open("/proc/self/maps") as file:
        assert list(file) == text.splitlines(keepends=True)
    assert Path("/proc/self/maps").read_text() == text
    with open(b"/proc/1/maps", "rb", 0) as file:
        assert file.readall() == text.encode()
    with open("/proc/../proc/./self/maps") as file:
        assert file.readline() == text.splitlines(keepends=True)[0]
    folder = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
    with open("maps", opener=lambda name, flags: os.open(name, flags, dir_fd=folder)) as file:
        assert file.read() == text
    os.close(folder)


def test_many_vmas_through_small_buffers(machine, area, fake):
    """Lines that a buffer cuts come out whole, as many as there are."""
    task = next(iter(machine.tasks()))
    for number in range(300):
        task.mmap(PAGE, addr=0x2000_0000_0000 + number * 0x10_0000)
    for buffering in (-1, 2, 100, 1 << 20):
        with open("/proc/self/smaps", "rb", buffering) as file:
            assert file.read() == machine.process(1).pread("smaps", 0, 1 << 30)
    with open("/proc/self/maps") as file:
        assert len(file.readlines()) == len(machine.process(1).maps()) >= 300


def test_a_frame_file_as_arrays(machine, area, fake):
    flags = machine.kpageflags().values
    assert np.fromfile("/proc/kpageflags", dtype=np.uint64, count=64).tolist() == flags[:64].tolist()
    with open("/proc/kpageflags", "rb") as file:
        assert np.frombuffer(file.read(), dtype=np.uint64).tolist() == flags.tolist()
        assert file.read(8) == b""


def test_writing_clear_refs_changes_the_machine(machine, area, fake):
    entry = machine.process(1).smaps()[0]
    assert entry.counters["Referenced"] == 8 * PAGE
    with open("/proc/self/clear_refs", "w") as file:
        file.write("1\n")
    assert machine.process(1).smaps()[0].counters["Referenced"] == 0
    with pytest.raises(OSError, match="Invalid argument"), open("/proc/self/clear_refs", "w") as file:
        file.write("77")


def test_directories(machine, area, fake):
    names = os.listdir("/proc")
    assert {"1", "self", "kpageflags"} <= set(names)
    assert {type(name) for name in names} == {str}
    assert b"1" in os.listdir(b"/proc")
    with os.scandir("/proc") as entries:
        kinds = {entry.name: (entry.is_dir(), entry.is_file(), entry.is_symlink()) for entry in entries}
    assert kinds["1"] == (True, False, False)
    assert kinds["self"] == (True, False, True)
    assert kinds["kpagecount"] == (False, True, False)
    assert sorted(glob.glob("/proc/[0-9]*/pagemap")) == ["/proc/1/pagemap"]
    assert {path.name for path in Path("/proc/self").iterdir()} == set(machine.process(1).files())
    assert Path("/proc/self").resolve() == Path("/proc/1")
    assert os.readlink("/proc/self") == "1"
    assert [folder for folder, _, _ in os.walk("/proc")] == ["/proc", "/proc/1"]
    assert Path("/proc/1/maps").exists()
    assert not os.path.exists("/proc/9")
    assert os.path.isdir("/proc/1")
    assert not os.access("/proc/1/nothing", os.F_OK)
    assert os.stat("/proc/self").st_ino == os.stat("/proc/1").st_ino


def test_the_machine_as_such(machine, area):
    small = pmcore.open("sim", memory="16 MiB")
    with fake_proc(machine):
        assert os.sysconf("SC_PAGE_SIZE") == os.sysconf("SC_PAGESIZE") == mmap.PAGESIZE == PAGE
        assert os.sysconf(os.sysconf_names["SC_PAGE_SIZE"]) == resource.getpagesize() == PAGE
        assert 0 < os.sysconf("SC_AVPHYS_PAGES") < os.sysconf("SC_PHYS_PAGES") <= machine.frame_count()
        with fake_proc(small):
            assert os.sysconf("SC_PHYS_PAGES") <= small.frame_count()
        os.kill(1, 0)
        assert refused(os.kill, 77, 0) == errno.ESRCH
        with pytest.raises(pmcore.errors.NotModelled):
            os.kill(1, 15)
        assert refused(open, "/proc/self/maps") == errno.ENOENT  # no pid: nobody is this process


# -- ioctl -------------------------------------------------------------------------------------------------


def scan(file, start, end, vec, *, room=64, masks=(0, 8, 0, 8), most=0):
    argument = bytearray(struct.pack("=12Q", 96, 0, start, end, 0, vec, room, most, *masks))
    return fcntl.ioctl(file, PAGEMAP_SCAN, argument), struct.unpack("=12Q", argument)[4]


def test_pagemap_scan_fills_the_callers_own_memory(machine, area, fake):
    task = next(iter(machine.tasks()))
    task.touch(area + 20 * PAGE, 4 * PAGE)
    regions = [(area, area + 8 * PAGE, 8), (area + 20 * PAGE, area + 24 * PAGE, 8)]
    with open("/proc/self/pagemap", "rb") as file:
        vec = (ctypes.c_uint64 * 30)()
        assert scan(file, area, area + 64 * PAGE, ctypes.addressof(vec)) == (2, area + 64 * PAGE)
        assert list(vec[:6]) == [*regions[0], *regions[1]]
        out = np.zeros((4, 3), dtype=np.uint64)
        assert scan(file, area, area + 64 * PAGE, out.ctypes.data, room=1)[0] == 1
        assert out.tolist() == [list(regions[0]), [0] * 3, [0] * 3, [0] * 3]

        class Argument(ctypes.Structure):
            _fields_ = [(f"field{number}", ctypes.c_uint64) for number in range(12)]

        argument = Argument(96, 0, area, area + 64 * PAGE, 0, ctypes.addressof(vec), 10, 3, 0, 8, 0, 8)
        assert fcntl.ioctl(file.fileno(), PAGEMAP_SCAN, argument) == 1
        assert argument.field4 == area + 3 * PAGE
        copied = fcntl.ioctl(file, PAGEMAP_SCAN, bytes(argument))
        assert isinstance(copied, bytes)
        assert len(copied) == 96
        assert refused(scan, file, area, area + 64 * PAGE, 0x1000) == errno.EFAULT
        assert refused(scan, file, area + 1, area + 64 * PAGE, ctypes.addressof(vec)) == errno.EINVAL
        assert refused(fcntl.ioctl, file, 0x5401, bytearray(96)) == errno.EINVAL
        assert refused(fcntl.ioctl, file, PAGEMAP_SCAN, 5) == errno.EFAULT
    with open("/proc/self/maps") as file:
        name = ctypes.create_string_buffer(64)
        fields = (104, 0x10, *[0] * 7, 0, 0, len(name), 0, ctypes.addressof(name), 0)
        query = bytearray(struct.pack("=9Q4L2Q", *fields))
        assert fcntl.ioctl(file, PROCMAP_QUERY, query) == 0
        assert struct.unpack_from("=2Q", query, 24)[0] == machine.process(1).maps()[0].start


def test_more_regions_than_a_pipe_holds(machine, fake):
    """4000 regions, 96 kB, come through whole."""
    task = machine.spawn()
    start = task.mmap(8000 * PAGE)
    for page in range(0, 8000, 2):
        task.touch(start + page * PAGE, PAGE)
    out = np.zeros((4096, 3), dtype=np.uint64)
    with open(f"/proc/{task.pid}/pagemap", "rb") as file:
        assert scan(file, start, start + 8000 * PAGE, out.ctypes.data, room=4096)[0] == 4000
    assert out[:4000, 0].tolist() == list(range(start, start + 8000 * PAGE, 2 * PAGE))


# -- who may -----------------------------------------------------------------------------------------------


@pytest.mark.rule("AC-001", "AC-003")
def test_privilege_is_the_openers(machine, area):
    with fake_proc(machine, pid=1, opener=USER, owner=1000):
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(area // PAGE * 8)
            assert not int.from_bytes(file.read(8), "little") & PM_PFRAME_MASK
        assert refused(open, "/proc/kpageflags", "rb") == errno.EACCES
        assert not os.access("/proc/kpageflags", os.R_OK)
    with fake_proc(machine, pid=1, opener=USER):
        with pytest.raises(PermissionError) as caught:
            open("/proc/1/maps")
        assert caught.value.filename == "/proc/1/maps"


# -- what is left alone, and put back ----------------------------------------------------------------------


def test_other_paths_go_through_untouched(fake, tmp_path):
    path = tmp_path / "proc"
    path.write_text("here")
    assert path.read_text() == read(path) == "here"
    fd = os.open(path, os.O_RDWR)
    assert os.read(fd, 2) == b"he"
    assert os.lseek(fd, 0, os.SEEK_END) == 4
    with mmap.mmap(fd, 4) as view:
        assert view[:] == b"here"
    os.close(fd)
    assert os.listdir(tmp_path) == ["proc"]
    assert read("/procedure", opener=lambda _path, _flags: os.open(path, os.O_RDONLY)) == "here"
    assert refused(open, "/procedure") == errno.ENOENT
    with subprocess.Popen(
        [sys.executable, "-c", "print(open('/proc/self/comm').read())"], stdout=-1
    ) as child:
        assert child.communicate()[0].startswith(b"python")
    with pytest.raises(pmcore.errors.NotModelled):
        os.mkdir("/sys/fs/cgroup/x")
    with pytest.raises(pmcore.errors.NotModelled):
        path.rename("/proc/x")


def test_everything_is_put_back(machine, area):
    before, names = everything(), [set(vars(module)) for module, _ in NAMES]
    with pytest.raises(KeyError), fake_proc(machine, pid=1):
        raise KeyError(open is not before[0])
    assert everything() == before
    assert [set(vars(module)) for module, _ in NAMES] == names
    assert globals()["pread_taken_before"] is os.pread


def test_contexts_nest(machine, area):
    """The innermost answers; files stay with the one that opened them, and end with it."""
    other = pmcore.open("sim", memory="16 MiB")
    for _ in range(3):
        task = other.spawn()
    outer, inner = fake_proc(machine, pid=1), fake_proc(other, pid=task.pid)
    with outer:
        file = open("/proc/self/pagemap", "rb", 0)
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        with inner:
            assert os.getpid() == 3
            assert "3" in os.listdir("/proc")
            theirs = os.open("/proc/kpageflags", os.O_RDONLY)
            file.seek(area // PAGE * 8)
            assert file.read(8) == words_of(machine, area, 1).tobytes()
            with outer:  # again
                assert os.getpid() == 1
            assert os.getpid() == 3
        assert os.getpid() == 1
        assert refused(os.read, theirs, 8) == errno.EBADF
        os.close(theirs)
        assert os.pread(fd, 8, area // PAGE * 8) == words_of(machine, area, 1).tobytes()
    assert refused(os.read, fd, 8) == refused(os.pread, fd, 8, 0) == errno.EBADF
    assert refused(file.read, 8) == errno.EBADF
    file.close()
    os.close(fd)
    assert os.getpid() not in (1, 3)


def test_descriptors_are_real_numbers(fake, tmp_path):
    """A number that was closed behind our back, and given to another file, is that file's."""
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    assert not os.get_inheritable(fd)
    real_close = os.close.__wrapped__
    real_close(fd)
    (tmp_path / "x").write_text("x")
    again = os.open(tmp_path / "x", os.O_RDONLY)
    assert again == fd
    assert os.read(again, 8) == b"x"
    os.close(again)


def test_duplicates_share_the_position(machine, area, fake):
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    copy = os.dup(fd)
    os.lseek(fd, area // PAGE * 8, os.SEEK_SET)
    assert os.read(copy, 8) == words_of(machine, area, 1).tobytes()
    assert os.read(fd, 8) == words_of(machine, area, 2)[1:].tobytes()
    os.close(fd)
    assert os.read(copy, 8) == words_of(machine, area, 3)[2:].tobytes()
    os.close(copy)


def test_threads(machine, area, fake):
    """Eight threads read at once: each what is there."""
    expected, wrong = words_of(machine, area, 64).tobytes(), []

    def reader():
        with open("/proc/self/pagemap", "rb") as file:
            for _ in range(50):
                file.seek(area // PAGE * 8)
                wrong.extend([1] if file.read(512) != expected else [])

    threads = [threading.Thread(target=reader) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_added_texts(machine, area):
    with fake_proc(
        machine, pid=1, files={"/proc/1/stat": "1 (x) S 0\n", "/sys/devices/system/cpu/online": b"0\n"}
    ):
        assert read("/proc/self/stat") == "1 (x) S 0\n"
        assert sorted(os.listdir("/sys/devices/system")) == ["cpu", "memory"]
        assert "stat" in os.listdir("/proc/1")
        assert Path("/sys/devices/system/cpu/online").read_text() == "0\n"
        assert refused(os.listdir, "/proc/1/stat") == errno.ENOTDIR
    with pytest.raises(pmcore.errors.ArgumentError, match="below /proc"):
        fake_proc(machine, files={"/etc/passwd": ""})


def test_wrong_settings(machine):
    with pytest.raises(pmcore.errors.ArgumentError, match="no such process"):
        fake_proc(machine, pid=7)
    with pytest.raises(pmcore.errors.ArgumentError, match="is no machine"):
        fake_proc(3)


def test_pythons_own_refusals(fake):
    for arguments in (("rw",), ("q",), ("rb", 1 << 10, "utf-8"), ("r", 0), ("r", -1, "no-such-encoding")):
        with pytest.raises((ValueError, LookupError)):
            open("/proc/self/maps", *arguments)
    with pytest.raises(ValueError, match="closefd"):
        open("/proc/self/maps", closefd=False)
    file = open("/proc/self/maps", "rb", 0)
    with pytest.raises(io.UnsupportedOperation):
        file.write(b"x")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


# -- other machines ----------------------------------------------------------------------------------------


def test_a_recording_stands_there(machine, area, tmp_path):
    record(machine, tmp_path / "a.rec")
    expected = words_of(machine, area, 64).tobytes()
    with pmcore.open("recording", tmp_path / "a.rec") as kernel, fake_proc(kernel, pid=1):
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(area // PAGE * 8)
            assert file.read(512) == expected
            vec = (ctypes.c_uint64 * 30)()
            assert scan(file, area, area + 64 * PAGE, ctypes.addressof(vec)) == (1, area + 64 * PAGE)
        with pytest.raises(OSError) as caught, open("/proc/self/clear_refs", "w") as file:
            file.write("1")
        assert caught.value.errno == errno.EROFS


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the procfs backend works on Linux")
def test_our_own_reader_of_proc_sees_the_machine(machine, area):
    """The procfs backend, a tool of some thousand lines, answers as the machine does."""
    task = next(iter(machine.tasks()))
    task.fork()
    with fake_proc(machine, pid=1), pmcore.open("procfs") as kernel:
        assert list(kernel.pids()) == list(machine.pids())
        assert kernel.frame_count() == machine.frame_count()
        assert (kernel.kpageflags().values == machine.kpageflags().values).all()
        assert (kernel.kpagecount() == machine.kpagecount()).all()
        for pid in machine.pids():
            mine, theirs = kernel.process(pid), machine.process(pid)
            assert mine.maps() == theirs.maps()
            assert mine.smaps() == theirs.smaps()
            assert (
                mine.pagemap(area, area + 64 * PAGE).values == theirs.pagemap(area, area + 64 * PAGE).values
            ).all()
            request = pmcore.ScanRequest(
                start=area, end=area + 64 * PAGE, category_mask=8, return_mask=8, vec_len=10
            )
            regions = [process.pagemap_scan(request).regions.tobytes() for process in (mine, theirs)]
            assert regions[0] == regions[1]


_ON_WINDOWS = """
import sys
for name in ("fcntl", "resource", "pwd", "termios"):
    sys.modules[name] = None        # as where there is none
import os, mmap
for name in "pread preadv readv writev pwrite sysconf sysconf_names O_DIRECTORY O_NOFOLLOW O_CLOEXEC".split():
    delattr(os, name)
for name in ("PROT_READ", "MAP_SHARED"):
    delattr(mmap, name)
sys.platform = "win32"
import pmcore
from pmcore.testing import fake_proc
machine = pmcore.open("sim", memory="32 MiB")
task = machine.spawn()
start = task.mmap(16 * 4096)
task.touch(start, 4096)
with fake_proc(machine, pid=task.pid):
    import ctypes, fcntl, resource, struct
    assert resource.getpagesize() == mmap.PAGESIZE == os.sysconf("SC_PAGE_SIZE") == 4096
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    assert int.from_bytes(os.pread(fd, 8, start // 4096 * 8), "little") >> 63
    vec = (ctypes.c_uint64 * 3)()
    argument = bytearray(struct.pack("=12Q", 96, 0, start, start + 65536, 0, ctypes.addressof(vec), 1, 0, 0, 8, 0, 8))
    assert fcntl.ioctl(fd, 0xC0606610, argument) == 1
    assert list(vec) == [start, start + 4096, 8]
    os.close(fd)
    with open("/proc/self/maps") as file:
        assert file.read()
    assert mmap.PROT_READ == 1
assert not hasattr(os, "pread") and not hasattr(os, "sysconf") and sys.modules["fcntl"] is None
assert not hasattr(mmap, "PROT_READ")
"""


def test_where_there_is_no_fcntl():
    """What win32 lacks is there for the time, and gone afterwards."""
    command = [sys.executable, "-W", "error", "-c", _ON_WINDOWS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_paths_of_windows(monkeypatch):
    from pmcore.testing.fakeproc import tree

    monkeypatch.setattr(tree.os, "sep", "\\")
    monkeypatch.setattr(tree.os.path, "splitdrive", ntpath.splitdrive)
    assert tree.claimed(r"\proc\self\maps") == "/proc/self/maps"
    assert tree.claimed(r"C:\proc\1") == "/proc/1"
    assert tree.claimed(r"C:\Users\proc") is None


def test_the_fixture(sim_proc, sim_machine, sim_task):
    """sim_proc: /proc/self is the task sim_task."""
    start = sim_task.mmap(PAGE)
    assert f"{start:x}-" in read("/proc/self/maps")
    assert os.getpid() == sim_task.pid
    assert sim_proc.machine is sim_machine


@pytest.mark.rule("ID-001", "ID-002", "ID-003", "ID-006")
def test_the_idle_bitmap_is_written_and_read(machine, area):
    """A tool that marks pages idle and looks again: what it writes changes the machine."""
    path = "/sys/kernel/mm/page_idle/bitmap"
    pfn = int(machine.process(1).pagemap(area, area + PAGE).pfn[0])
    with fake_proc(machine, pid=1):
        assert os.stat(path).st_size == 0
        fd = os.open(path, os.O_RDWR)
        for call in (lambda: os.pwrite(fd, b"1234", 0), lambda: os.pread(fd, 8, 4)):
            with pytest.raises(OSError, match="Invalid argument"):
                call()
        with pytest.raises(OSError, match="No such device or address"):
            os.pwrite(fd, bytes(8), 1 << 30)
        assert os.pwrite(fd, struct.pack("=Q", 1 << pfn % 64), pfn // 64 * 8) == 8
        with open(path, "rb") as file:
            assert int.from_bytes(file.read(), "little") == 1 << pfn
        next(iter(machine.tasks())).touch(area, 1)
        assert os.pread(fd, 8, pfn // 64 * 8) == bytes(8)
        os.close(fd)
    with fake_proc(machine, pid=1, opener=USER), pytest.raises(PermissionError):
        os.open(path, os.O_RDONLY)
