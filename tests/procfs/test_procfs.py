"""The procfs backend: on files of our own anywhere, on the running kernel where there is one."""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pmcore
from pmcore.errors import ArgumentError, FormatError, InvalidArgument, Missing, ProcessGone, ShortRead
from pmcore.protocols import FrameFile
from pmcore.scan import ScanRequest
from pmcore.uapi import PageCategory, PageFlag
from pmcore.vma import Vma, format_maps

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
posix = pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs preadv")


@pytest.fixture
def root(tmp_path):
    """A directory that looks a little like /proc."""
    words = np.arange(1000, dtype=np.uint64)
    for name in ("kpageflags", "kpagecount", "kpagecgroup"):
        words.tofile(tmp_path / name)
    process = tmp_path / "42"
    process.mkdir()
    (process / "maps").write_bytes(format_maps([Vma(start=0x1000, end=0x3000, name="/x")]))
    np.arange(8, dtype=np.uint64).tofile(process / "pagemap")
    return tmp_path


@posix
def test_frames_of_a_directory(root):
    with pmcore.open("procfs", root=str(root)) as kernel:
        assert kernel.frame_count() == 1000
        out = np.zeros(10, dtype=np.uint64)
        assert kernel.read_frames(FrameFile.KPAGECOUNT, 5, out) == 10
        assert out.tolist() == list(range(5, 15))
        assert kernel.read_frames(FrameFile.KPAGECOUNT, 995, out) == 5
        assert kernel.read_frames(FrameFile.KPAGECOUNT, 1 << 61, out) == 0
        assert kernel.pids() == [42]
        assert kernel.process(42).maps()[0].name == "/x"
        with pytest.raises(ArgumentError):
            kernel.read_frames(FrameFile.KPAGECOUNT, 0, np.zeros(20, dtype=np.uint64)[::2])
    kernel.close()


@posix
def test_truncated_frame_file(root):
    with (root / "kpagecount").open("ab") as file:
        file.write(b"abc")
    with pmcore.open("procfs", root=str(root)) as kernel, pytest.raises(ShortRead, match="whole words"):
        kernel.read_frames(FrameFile.KPAGECOUNT, 990, np.zeros(20, dtype=np.uint64))


@posix
def test_missing_files_say_what_is_missing(root):
    (root / "kpagecgroup").unlink()
    (root / "42" / "pagemap").unlink()
    with pmcore.open("procfs", root=str(root)) as kernel:
        with pytest.raises(Missing, match="CONFIG_MEMCG"):
            kernel.pread("kpagecgroup", 0, 8)
        with pytest.raises(Missing, match="CONFIG_PROC_PAGE_MONITOR"):
            kernel.process(42).pread("pagemap", 0, 8)


@posix
def test_garbage_in_maps_is_named(root):
    (root / "42" / "maps").write_bytes(b"1000-2000 r--p 0 00:00 0 \nnot a line\n")
    with pmcore.open("procfs", root=str(root)) as kernel, pytest.raises(FormatError, match="maps:2"):
        kernel.process(42).maps()


@posix
@pytest.mark.rule("AC-009")
def test_processes_that_are_not_there(root):
    with pmcore.open("procfs", root=str(root)) as kernel:
        for pid in (0, -1, 43, 1 << 70):
            with pytest.raises(ProcessGone):
                kernel.process(pid)
        process = kernel.process(42)
        for file in (root / "42").iterdir():
            file.unlink()
        (root / "42").rmdir()
        with pytest.raises(ProcessGone):
            process.maps()


@posix
@given(st.integers(-(1 << 70), 1 << 70), st.integers(-8, 4096))
def test_any_offset_and_length(tmp_path_factory, offset, length):
    path = tmp_path_factory.getbasetemp() / "words"
    np.arange(64, dtype=np.uint64).tofile(path)
    from pmcore.backends.procfs.files import WordFile

    file = WordFile(str(path), "kpagecount")
    try:
        data = file.pread(offset, length)
        assert data == path.read_bytes()[offset : offset + length]
    except InvalidArgument:
        assert offset < 0 or length < 0 or offset % 8 or length % 8
    finally:
        file.close()
        file.close()


def test_options_are_checked():
    for options in ({"scan": "guess"}, {"maps": "both"}):
        with pytest.raises(ArgumentError, match="one of"):
            pmcore.open("procfs", **options)


# -- marking ---------------------------------------------------------------------------------------------


@posix
@pytest.mark.rule("KF-026")
def test_marking_idle_writes_one_bit_a_frame(tmp_path):
    from pmcore.backends.procfs.marking import mark_idle

    bitmap = tmp_path / "bitmap"
    bitmap.write_bytes(bytes(64))
    mark_idle(np.array([0, 63, 64, 200, 200], dtype=np.uint64), bitmap=str(bitmap))
    words = np.fromfile(bitmap, dtype="<u8").tolist()
    assert words == [1 | 1 << 63, 1, 0, 1 << 8, 0, 0, 0, 0]
    with pytest.raises(Missing, match="CONFIG_IDLE_PAGE_TRACKING"):
        mark_idle(np.zeros(1, dtype=np.uint64), bitmap=str(tmp_path / "no"))


@posix
def test_poisoning_names_each_frame(tmp_path):
    from pmcore.backends.procfs.marking import poison

    for name in ("corrupt-pfn", "unpoison-pfn"):
        (tmp_path / name).touch()
    poison(np.array([16, 17], dtype=np.uint64), undo=False, directory=str(tmp_path))
    poison(np.array([16], dtype=np.uint64), undo=True, directory=str(tmp_path))
    assert (tmp_path / "corrupt-pfn").read_text() == "0x10\n0x11\n"
    assert (tmp_path / "unpoison-pfn").read_text() == "0x10\n"
    with pytest.raises(Missing, match="HWPOISON_INJECT"):
        poison(np.zeros(1, dtype=np.uint64), undo=False, directory=str(tmp_path / "no"))


# -- huge pages ------------------------------------------------------------------------------------------


def test_huge_page_sizes(tmp_path):
    from pmcore.backends.procfs import hugepages

    pool = tmp_path / "hugepages-2048kB"
    pool.mkdir()
    for name in ("nr", "free", "resv", "surplus"):
        (pool / f"{name}_hugepages").write_text("3\n")
    (pool / "enabled").write_text("always inherit [madvise] never\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    [found] = hugepages.hugetlb_pools(tmp_path)
    assert (found.size, found.total, found.free) == (2 << 20, 3, 3)
    [policy] = hugepages.thp_policies(tmp_path)
    assert (policy.size, policy.enabled) == (2 << 20, "madvise")
    assert hugepages.thp_pmd_size(tmp_path) == 2 << 20
    with pytest.raises(Missing):
        hugepages.thp_pmd_size(tmp_path / "no")


# -- live ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    with pmcore.open("procfs") as kernel:
        if not kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        yield kernel


@pytest.mark.live
def test_probing_changes_nothing_and_is_consistent(kernel):
    first, second = (pmcore.open("procfs").report() for _ in range(2))
    assert [(p.name, p.ok) for p in first] == [(p.name, p.ok) for p in second]
    for probe in first:
        assert probe.ok or probe.remedy or probe.capability
        if probe.capability:
            assert kernel.profile.has(probe.capability) == probe.ok


@pytest.mark.live
@pytest.mark.rule("SC-010", "SC-017")
def test_the_engine_agrees_with_the_ioctl(kernel):
    """Both ways over a process that stands still: equal in all that the engine says it knows."""
    if not kernel.profile.has("scan"):
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    from pmcore.backends.procfs.workbench import open_workbench

    with open_workbench() as bench, pmcore.open("procfs", scan="engine") as other:
        task = bench.spawn()
        start = task.mmap(64 * 4096, addr=0x1000_0000_0000, flags=0x100022)
        task.touch(start, 40 * 4096, step=3 * 4096)
        task.touch(start + 50 * 4096, 4096, write=False)
        for vma in task.process.maps():
            if vma.end > kernel.profile.geometry.task_size or vma.name.startswith("[vvar"):
                continue
            mask = int(PageCategory.PRESENT | PageCategory.SWAPPED | PageCategory.FILE | PageCategory.PFNZERO)
            request = ScanRequest(
                start=vma.start,
                end=vma.end,
                vec_len=4096,
                category_anyof_mask=int(PageCategory.PRESENT | PageCategory.SWAPPED),
                return_mask=mask,
            )
            by_call = task.process.pagemap_scan(request)
            by_engine = other.process(task.pid).pagemap_scan(request)
            assert not by_engine.unknown & mask
            assert by_call.regions.tolist() == by_engine.regions.tolist(), vma
            assert by_call.walk_end == by_engine.walk_end


@pytest.mark.live
def test_cached_pages_of_a_file(kernel, tmp_path):
    path = tmp_path / "cached"
    path.write_bytes(bytes(10 * 4096 + 5))
    [(offset, words)] = kernel.file_pagemap(str(path))
    assert offset == 0
    assert len(words) == 11
    entries = pmcore.PagemapEntries(words)
    assert entries.present.all()
    assert entries.file.all()
    flags = kernel.frames_at(FrameFile.KPAGEFLAGS, entries.pfn)
    assert not (flags & np.uint64(PageFlag.ANON)).any()
    [(offset, words)] = kernel.file_pagemap(str(path), 4096, 3 * 4096)
    assert (offset, len(words)) == (4096, 2)
    with pytest.raises(Missing):
        list(kernel.file_pagemap(str(tmp_path / "none")))
    (tmp_path / "empty").touch()
    assert list(kernel.file_pagemap(str(tmp_path / "empty"))) == []


@pytest.mark.live
@pytest.mark.rule("SC-030", "SC-032", "SC-034")
def test_tracking_writes_of_this_process(kernel):
    from pmcore.backends.procfs.userfaultfd import WriteTracker
    from pmcore.errors import Busy

    if not kernel.profile.has("uffd.wp_async"):
        pytest.skip("this kernel has no asynchronous write protection")
    area = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(area, dtype=np.uint8)
    with WriteTracker.of(array) as tracker:
        assert len(tracker.written()) == 0
        array[5] = 1
        array[3 * 4096 : 5 * 4096] = 7
        pages = [
            ((low - tracker.start) // 4096, (high - tracker.start) // 4096)
            for low, high, _ in tracker.written(reset=True).tolist()
        ]
        assert pages == [(0, 1), (3, 5)]
        assert len(tracker.written()) == 0
        with pytest.raises(Busy), WriteTracker.of(array):
            pass
        with pytest.raises(ArgumentError):
            tracker.open()
    with pytest.raises(ArgumentError, match="closed"):
        tracker.written()
    array[0] = 2
    with pytest.raises(ZeroDivisionError), WriteTracker.of(array):
        raise ZeroDivisionError
    with WriteTracker.of(array) as tracker:
        assert len(tracker.written()) == 0


@pytest.mark.live
def test_what_cannot_be_tracked(kernel):
    from pmcore.backends.procfs.userfaultfd import WriteTracker

    with pytest.raises(ArgumentError):
        WriteTracker.of(b"read only")
    with pytest.raises(ArgumentError):
        WriteTracker(0, 0)
    with pytest.raises(InvalidArgument), WriteTracker(1 << 20, 4096):
        pass


@pytest.mark.live
def test_reading_another_process_needs_it_to_be_there(kernel):
    with pytest.raises(ProcessGone):
        kernel.process(max(kernel.pids()) + 100_000)
    assert os.getpid() in kernel.pids()
    own = kernel.own_process()
    assert Path(f"/proc/{own.pid}").is_dir()
    own.close()
    assert own.maps()
    own.close()


# -- reading ahead ---------------------------------------------------------------------------------------


@posix
def test_what_was_read_ahead_is_what_the_file_holds(tmp_path):
    """All of a file of several read-ahead chunks, in whatever order and size it is asked for."""
    from pmcore.backends.procfs.read_ahead import CHUNK

    words = np.arange(3 * (4 << 20) // 8 + 17, dtype=np.uint64)
    words.tofile(tmp_path / "kpageflags")
    for step in (CHUNK // 8, CHUNK // 8 - 3):
        with pmcore.open("procfs", root=str(tmp_path), read_ahead=True) as kernel:
            time.sleep(0.05)
            found = []
            for first in range(0, len(words), step):
                out = np.zeros(min(step, len(words) - first), dtype=np.uint64)
                assert kernel.read_frames(FrameFile.KPAGEFLAGS, first, out) == len(out)
                found.append(out)
            assert np.array_equal(np.concatenate(found), words)


@posix
def test_what_was_read_ahead_is_handed_out_once(tmp_path):
    from pmcore.backends.procfs.read_ahead import CHUNK, ReadAhead

    (tmp_path / "words").write_bytes(bytes(8 << 20))
    ahead = ReadAhead(str(tmp_path / "words"))
    deadline = time.monotonic() + 5
    while len(ahead._chunks) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ahead.take(CHUNK, CHUNK) is not None
    assert ahead.take(CHUNK, CHUNK) is None
    assert ahead.take(0, 8) is None
    assert ReadAhead(str(tmp_path / "none")).take(0, CHUNK) is None


def test_what_is_missing_takes_its_option_along():
    """A kernel without transparent huge pages has no advice about them either."""
    from pmcore.backends.procfs.probe import Probe, running_profile
    from pmcore.geometry import Geometry

    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    missing = Probe(name="thp", ok=False, seen="no directory", remedy="", capability="mm.thp")
    profile = running_profile((missing,), Geometry())
    assert not any(profile.has(name) for name in ("mm.thp", "madv.hugepage", "madv.collapse", "mm.mthp"))
    assert running_profile((), Geometry()).has("madv.hugepage")
