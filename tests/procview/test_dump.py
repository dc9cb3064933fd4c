"""pmcore dump: a machine's views as plain files, and the directory as a backend."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest

import pmcore
from pmcore.errors import ArgumentError, FormatError, Missing, ProcessGone, SyscallError
from pmcore.procview import Opener, ProcView
from pmcore.procview.dump import dump
from pmcore.protocols import IDLE_BITMAP
from pmcore.recording import record
from pmcore.scan import ScanRequest
from pmcore.testing.conformance import KernelConformance

PAGE = 4096


@pytest.fixture
def machine():
    machine = pmcore.open(
        "sim", memory="32 MiB", swap="4 MiB", kernel="6.18", config=["!CONFIG_MEM_SOFT_DIRTY"]
    )
    task = machine.spawn()
    start = task.mmap(3000 * PAGE)
    task.touch(start, 700 * PAGE)
    task.touch(start + 2500 * PAGE, PAGE)
    task.mmap(PAGE, addr=0x1000_0000)
    task.touch(0x1000_0000, PAGE, write=False)
    task.fork()
    return machine


@pytest.fixture
def place(machine, tmp_path):
    dump(ProcView(machine, self_pid=2), tmp_path / "dump")
    return tmp_path / "dump"


def test_every_file_is_as_the_machine_shows_it(machine, place):
    """Texts and frame files whole, pagemap at each mapping and beside it; nothing else."""
    view = ProcView(machine)
    for name in view.node("/proc/1").names():
        if name in ("pagemap", "clear_refs"):
            continue
        assert (place / "proc/1" / name).read_bytes() == machine.process(1).pread(name, 0, 1 << 20)
    for name in ("kpageflags", "kpagecount", "kpagecgroup", "meminfo", "buddyinfo", "version"):
        assert (place / "proc" / name).read_bytes() == machine.pread(name, 0, 1 << 30)
    thp = "sys/kernel/mm/transparent_hugepage/enabled"
    assert (place / thp).read_bytes() == machine.pread(f"/{thp}", 0, 100)
    assert not (place / "proc/1/clear_refs").exists()
    assert (place / "proc/self").readlink().as_posix() == "2"
    process = machine.process(1)
    with (place / "proc/1/pagemap").open("rb") as file:
        for vma in process.maps():
            first, last = vma.start // PAGE - 600, vma.end // PAGE + 600
            file.seek(first * 8)
            words = np.zeros(last - first, dtype=np.uint64)
            process.read_pagemap(first, words)
            assert file.read((last - first) * 8) == words.tobytes()


def test_pagemap_is_as_long_as_the_address_space_and_sparse(machine, place):
    """Its size is a word for each page of the user addresses; it takes little of a disk."""
    status = (place / "proc/1/pagemap").stat()
    assert status.st_size == machine.geometry.task_size // PAGE * 8
    if hasattr(status, "st_blocks"):
        assert status.st_blocks * 512 < 1 << 20


def test_the_directory_is_a_backend(machine, place):
    """All that inspection asks is answered as the machine answers it; nothing can be changed."""
    with pmcore.open("recording", place) as kernel:
        assert kernel.profile == machine.profile
        assert kernel.pfn_visible
        assert list(kernel.pids()) == [1, 2]
        assert (kernel.kpageflags().values == machine.kpageflags().values).all()
        assert (kernel.kpagecount(5, 70) == machine.kpagecount(5, 70)).all()
        assert set(kernel.files()) == set(machine.files())
        for pid in (1, 2):
            one, other = kernel.process(pid), machine.process(pid)
            assert one.maps() == other.maps()
            assert one.smaps() == other.smaps()
            vma = one.maps()[-1]
            assert (one.pagemap(vma.start, vma.end).values == other.pagemap(vma.start, vma.end).values).all()
            request = ScanRequest(start=vma.start, end=vma.end, vec_len=99, category_mask=8, return_mask=8)
            assert one.pagemap_scan(request).regions.tolist() == other.pagemap_scan(request).regions.tolist()
        with pytest.raises(OSError, match="EROFS") as caught:
            one.clear_refs(1)
        assert caught.value.errno == errno.EROFS
        with pytest.raises(ProcessGone):
            kernel.process(3)
        with pytest.raises(Missing):
            kernel.pread("zoneinfo", 0, 8)
        record(kernel, place.parent / "again.rec")
    with pmcore.open("recording", place.parent / "again.rec") as again:
        assert (again.kpageflags().values == machine.kpageflags().values).all()


class TestConformance(KernelConformance):
    """What any backend must mean, over a directory."""

    @pytest.fixture(autouse=True)
    def _place(self, place):
        self.place = place

    def make_kernel(self):
        return pmcore.open("recording", self.place)

    def some_pid(self, kernel):
        return 1


def test_only_what_the_opener_may_read(machine, tmp_path):
    """Somebody unprivileged gets no frame files, and entries without frame numbers."""
    done = dump(ProcView(machine, owner=1000), tmp_path / "d", opener=Opener.user(1000))
    assert {path for path, _ in done.refused} == {
        *(f"/proc/{n}" for n in ("kpageflags", "kpagecount", "kpagecgroup", "pagetypeinfo")),
        IDLE_BITMAP,
    }
    assert {number for _, number in done.refused} == {errno.EACCES}
    kernel = pmcore.open("recording", tmp_path / "d")
    assert not kernel.pfn_visible
    with pytest.raises(Missing):
        kernel.frame_count()


def test_nothing_half_done_stays(machine, tmp_path, monkeypatch):
    """A path that is there is refused; an error leaves nothing behind."""
    (tmp_path / "there").mkdir()
    with pytest.raises(ArgumentError, match="is there already"):
        dump(ProcView(machine), tmp_path / "there")
    view = ProcView(machine)
    monkeypatch.setattr(type(machine), "frame_count", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dump(view, tmp_path / "new")
    with pytest.raises(Missing):
        dump(view, tmp_path / "none" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_machine_with_nothing_in_it(tmp_path):
    """A task that has mapped nothing, and no task at all."""
    machine = pmcore.open("sim", memory="16 MiB")
    assert dump(ProcView(machine), tmp_path / "none").refused == ()
    machine.spawn()
    dump(ProcView(machine), tmp_path / "empty")
    assert (tmp_path / "empty/proc/1/smaps").read_bytes() == b""
    kernel = pmcore.open("recording", tmp_path / "empty")
    assert kernel.process(1).maps() == ()
    assert (kernel.kpageflags().values == machine.kpageflags().values).all()


def test_what_is_no_dump(tmp_path, place):
    """An empty directory, and one with a profile that is none."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(SyscallError, match="no dump"):
        pmcore.open("recording", tmp_path / "empty")
    for text in ("{", "[]", json.dumps({"preset": "9.9"})):
        (place / "profile.json").write_text(text)
        with pytest.raises(FormatError):
            pmcore.open("recording", place)
    (place / "profile.json").unlink()
    assert pmcore.open("recording", place).profile.name == "6.18"
