"""A recording answers what its source answered; damaged files say so."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcore
from pmcore.analysis.huge import huge_stats
from pmcore.analysis.residency import residency
from pmcore.analysis.shared import shared_states
from pmcore.analysis.survey import survey
from pmcore.backends.recording import open_recording
from pmcore.cli import entry
from pmcore.errors import (
    ArgumentError,
    FormatError,
    HiddenPfn,
    InvalidArgument,
    Missing,
    NotPermitted,
    NotSupported,
    ProcessGone,
    SyscallError,
)
from pmcore.lockstep.programs import programs
from pmcore.program import Run
from pmcore.protocols import FileResidency, FrameFile
from pmcore.recording import record
from pmcore.recording.container import PIECE, decode_piece, encode_piece
from pmcore.scan import ScanRequest
from pmcore.testing.conformance import KernelConformance
from pmcore.testing.snapshot import SnapshotKernel
from pmcore.uapi import Madvise, PageFlag
from pmcore.vma import Vma

PAGE = 4096
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def furnished(**options):
    """A simulated machine with two related tasks: small, huge, swapped and guarded pages."""
    machine = pmcore.open("sim", **{"memory": "64 MiB", "swap": "16 MiB", "kernel": "6.18", **options})
    task = machine.spawn()
    huge = task.mmap(4 << 20, addr=1 << 40, flags=0x100022)
    task.madvise(huge, 4 << 20, Madvise.HUGEPAGE)
    task.touch(huge, 3 << 20)
    small = task.mmap(64 * PAGE, addr=1 << 41, flags=0x100022)
    task.touch(small, 40 * PAGE, step=3 * PAGE)
    task.madvise(small + 6 * PAGE, 6 * PAGE, Madvise.PAGEOUT)
    task.madvise(small + 30 * PAGE, PAGE, Madvise.GUARD_INSTALL)
    child = task.fork()
    child.touch(small, 12 * PAGE)
    child.madvise(huge + 8 * PAGE, 8 * PAGE, Madvise.DONTNEED)
    return machine


def same(source, copy):
    """Everything that the protocols show is equal."""
    assert list(copy.pids()) == list(source.pids())
    assert copy.profile == source.profile
    assert copy.pfn_visible == source.pfn_visible
    for file in FrameFile:
        try:
            words = np.zeros(source.frame_count() + 3, dtype=np.uint64)
            count = source.read_frames(file, 0, words)
        except SyscallError as error:
            with pytest.raises(type(error)):
                copy.pread(file, 0, 8)
            continue
        again = np.zeros_like(words)
        assert copy.read_frames(file, 0, again) == count == copy.frame_count()
        assert np.array_equal(again, words)
    for pid in source.pids():
        one, other = source.process(pid), copy.process(pid)
        assert other.maps() == one.maps()
        assert other.smaps() == one.smaps()
        for vma in one.maps():
            around = (max(vma.start - 3 * PAGE, 0), vma.end + 3 * PAGE)
            assert np.array_equal(one.pagemap(*around).values, other.pagemap(*around).values)


class TestConformance(KernelConformance):
    """The kit's part about kernels."""

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path):
        self.path = tmp_path / "a recording"

    def make_kernel(self):
        record(furnished(), self.path, overwrite=True)
        return pmcore.open("recording", self.path)

    def some_pid(self, kernel):
        return kernel.pids()[0]


@pytest.mark.parametrize("kernel", ["6.18", "6.12", "6.1", "4.19"])
def test_a_recorded_machine_is_the_machine(tmp_path, kernel):
    source = furnished(kernel=kernel) if kernel == "6.18" else pmcore.open("sim", kernel=kernel)
    if kernel != "6.18":
        task = source.spawn()
        task.touch(task.mmap(20 * PAGE), 9 * PAGE)
    done = record(source, tmp_path / "r")
    with pmcore.open("recording", tmp_path / "r") as copy:
        same(source, copy)
        assert (copy.recorded_from, copy.anonymised) == ("sim", False)
        assert copy.began <= copy.ended
        # What was recorded can be recorded.
        record(copy, tmp_path / "again")
    assert done.size == (tmp_path / "r").stat().st_size
    with pmcore.open("recording", tmp_path / "again") as again:
        same(source, again)


@SLOW
@given(programs(max_steps=15))
def test_any_program_can_be_recorded(tmp_path_factory, program):
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
    path = tmp_path_factory.mktemp("recordings") / "r"
    record(machine, path)
    with pmcore.open("recording", path) as copy:
        same(machine, copy)


def test_analyses_say_the_same(tmp_path):
    machine = furnished()
    record(machine, tmp_path / "r")
    with pmcore.open("recording", tmp_path / "r") as copy:
        assert survey(copy, raw=True).flags.tolist() == survey(machine, raw=True).flags.tolist()
        assert survey(copy, raw=True).pages.tolist() == survey(machine, raw=True).pages.tolist()
        for pid in machine.pids():
            sides = [kernel.process(pid) for kernel in (machine, copy)]
            tables = [residency(side).rows.tolist() for side in sides]
            assert tables[0] == tables[1]
            huge = [[one.values for one in huge_stats(side)] for side in sides]
            assert huge[0] == huge[1]


@pytest.mark.parametrize(
    "command",
    [
        ["types", "--raw"],
        ["types", "-p", "1", "-L"],
        ["map", "1"],
        ["map", "1", "--pages"],
        ["map", "2", "--explain", "0x10000000000"],
        ["thp", "1"],
        ["thp", "--rollup"],
        ["check"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("form", ["table", "json"])
def test_commands_print_the_same(tmp_path, monkeypatch, capsys, command, form):
    from pmcore import registry

    machine = furnished()
    record(machine, tmp_path / "r")
    opened = registry.open
    monkeypatch.setattr(
        registry, "open", lambda name, *what, **o: machine if name == "lab" else opened(name, *what, **o)
    )
    monkeypatch.setattr(machine, "close", lambda: None)
    printed = []
    for backend in ("lab", f"recording:{tmp_path / 'r'}"):
        arguments = [*command, "--backend", backend]
        if "--explain" not in command or form == "json":
            arguments += ["--format", form if "check" not in command or form == "json" else "text"]
        code = entry._run(arguments)
        printed.append((code, capsys.readouterr()))
    assert without_time(printed[0]) == without_time(printed[1])
    assert printed[0][1].out


def without_time(printed):
    code, text = printed
    return code, re.sub(r'in \d+\.\d s|"seconds": [\d.e-]+', "", text.out), text.err


def test_what_was_hidden_stays_hidden(tmp_path):
    machine = pmcore.open("sim", privileged=False)
    task = machine.spawn()
    task.touch(task.mmap(PAGE), PAGE)
    record(machine, tmp_path / "r")
    with pmcore.open("recording", tmp_path / "r") as copy:
        assert not copy.pfn_visible
        with pytest.raises(NotPermitted, match="when the recording was made"):
            copy.frame_count()
        assert residency(copy.process(1)).frames_hidden
    with pytest.raises(HiddenPfn):
        record(machine, tmp_path / "other", anonymise=True)


def test_scans_are_answered_over_the_tables(tmp_path):
    machine = furnished()
    record(machine, tmp_path / "r")
    request = ScanRequest(start=0, end=machine.geometry.task_size, category_mask=8, return_mask=8 | 16)
    with pmcore.open("recording", tmp_path / "r") as copy:
        for pid in machine.pids():
            found = copy.process(pid).pagemap_scan(request).regions.tolist()
            assert found == machine.process(pid).pagemap_scan(request).regions.tolist()


def test_a_recording_does_not_change(tmp_path):
    record(furnished(), tmp_path / "r", pids=[1])
    with pmcore.open("recording", tmp_path / "r") as copy:
        assert list(copy.pids()) == [1]
        process = copy.process(1)
        with pytest.raises(SyscallError, match="clear_refs") as caught:
            process.clear_refs(4)
        assert caught.value.errno == 30
        with pytest.raises(ProcessGone):
            copy.process(2)
        with pytest.raises(Missing):
            process.pread("environ", 0, 9)
        with pytest.raises(Missing):
            copy.pread("kmsg", 0, 9)
        with pytest.raises(InvalidArgument):
            process.file_residency(process.maps()[0], process.maps()[0].start, process.maps()[0].end)


def filed():
    """A process with a file mapping, whose file has four pages, two of them in memory."""
    vma = Vma(start=1 << 20, end=(1 << 20) + 4 * PAGE, inode=9, name="/dev/shm/x", shared=True)
    kernel = SnapshotKernel(kpageflags=np.zeros(8, np.uint64), kpagecount=np.zeros(8, np.uint64))
    files = FileResidency(data=np.array([1, 1, 1, 0], bool), in_core=np.array([1, 1, 0, 0], bool))
    words = np.array([1 << 63 | 1 << 61 | 3, 0, 0, 0], dtype=np.uint64)
    kernel.add_process(5, {vma: words}, files={vma: files})
    return kernel, vma


def test_files_are_recorded_on_request(tmp_path):
    source, vma = filed()
    record(source, tmp_path / "without")
    with pmcore.open("recording", tmp_path / "without") as copy, pytest.raises(NotSupported, match="--files"):
        copy.process(5).file_residency(vma, vma.start, vma.end)
    record(source, tmp_path / "with", files=True)
    with pmcore.open("recording", tmp_path / "with") as copy:
        for kernel in (source, copy):
            assert shared_states(kernel.process(5), vma).tolist() == [3, 2, 1, 0]
        with pytest.raises(InvalidArgument):
            copy.process(5).file_residency(vma, vma.start, vma.end + PAGE)


class Changing(SnapshotKernel):
    """A machine whose process 7 may not be looked at, and whose process 8 ends at once."""

    def pids(self):
        return [5, 7, 8]

    def process(self, pid):
        if pid == 8:
            raise ProcessGone(3, "process(8)")
        process = super().process(5)
        if pid == 7:
            process = type(process)(self, 7, {})

            def pread(name, offset, length):
                raise NotPermitted(13, f"open(/proc/7/{name})")

            process.pread = pread
        return process


def test_processes_that_end_or_refuse(tmp_path):
    source = Changing(kpageflags=np.zeros(8, np.uint64))
    source.add_process(5, {Vma(start=PAGE, end=2 * PAGE): np.array([1 << 63 | 1], np.uint64)})
    done = record(source, tmp_path / "r")
    assert (done.pids, done.refused, done.gone) == ((5,), (7,), (8,))
    with pmcore.open("recording", tmp_path / "r") as copy:
        assert list(copy.pids()) == [5, 7]
        for look in ("maps", "smaps"):
            with pytest.raises(NotPermitted, match="when the recording was made"):
                getattr(copy.process(7), look)()
        with pytest.raises(NotPermitted):
            copy.process(7).pagemap(PAGE, 2 * PAGE)
        with pytest.raises(Missing):
            copy.pread("kpagecount", 0, 8)


def test_frames_that_change_while_they_are_recorded_are_told(tmp_path):
    flags, counts = np.zeros(PIECE + 9, np.uint64), np.zeros(PIECE + 9, np.uint64)

    class Busy(SnapshotKernel):
        def process(self, pid):
            flags[5], flags[6], counts[PIECE + 3] = 1, int(PageFlag.IDLE), 2
            return super().process(pid)

    source = Busy(kpageflags=flags, kpagecount=counts)
    source.add_process(5, {Vma(start=PAGE, end=2 * PAGE): np.array([1 << 63 | 1], np.uint64)})
    record(source, tmp_path / "r")
    with pmcore.open("recording", tmp_path / "r") as copy:
        assert copy.changed_meanwhile().tolist() == [5, PIECE + 3]
        assert int(copy.kpageflags(5, 1).values[0]) == 0
    assert source.changed_meanwhile().tolist() == []


def test_entries_that_change_while_they_are_recorded_are_told(tmp_path):
    """The second look finds another entry: frames that its block names may be anybody's."""
    zeros = np.zeros(4096, np.uint64)

    class Busy(SnapshotKernel):
        looks = 0

        def process(self, pid):
            Busy.looks += 1
            if pid == 6 and Busy.looks > 3:
                raise ProcessGone(3, "process(6)")
            if Busy.looks > 2:
                words[700] = 1 << 63 | 99
            return super().process(pid)

    words = np.zeros(2048, np.uint64)
    words[[3, 600, 700, 1500]] = [1 << 63 | 10, 1 << 63 | 11, 1 << 63 | 12, 1 << 63 | 13]
    source = Busy(kpageflags=zeros, kpagecount=zeros)
    source.add_process(5, {Vma(start=PAGE, end=2049 * PAGE): words})
    source.add_process(6, {Vma(start=PAGE, end=2 * PAGE): np.array([1 << 63 | 20], np.uint64)})
    record(source, tmp_path / "r")
    with pmcore.open("recording", tmp_path / "r") as copy:
        assert copy.changed_meanwhile().tolist() == [11, 12, 20]


# -- other frame numbers ---------------------------------------------------------------------------------


def images(source, copy):
    """(old, new) frame numbers, from the entries of both."""
    pairs = set()
    for pid in source.pids():
        for vma in source.process(pid).maps():
            one, other = (k.process(pid).pagemap(vma.start, vma.end) for k in (source, copy))
            assert np.array_equal(one.has_pfn, other.has_pfn)
            field = np.uint64((1 << 55) - 1)
            assert np.array_equal(one.values & ~field, other.values & ~field)
            rest = ~one.present
            assert np.array_equal(one.values[rest], other.values[rest])
            pairs |= set(zip(one.pfn[one.has_pfn].tolist(), other.pfn[one.has_pfn].tolist(), strict=True))
    return pairs


@pytest.mark.parametrize("seed", range(4))
def test_other_numbers_say_the_same(tmp_path, seed):
    source = furnished()
    record(source, tmp_path / "r", anonymise=True, seed=seed)
    with pmcore.open("recording", tmp_path / "r") as copy:
        assert copy.anonymised
        pairs = images(source, copy)
        assert len({old for old, _ in pairs}) == len({new for _, new in pairs}) == len(pairs) > 500
        assert sum(old != new for old, new in pairs) > len(pairs) // 2
        for old, new in pairs:
            for file in FrameFile:
                if file != "kpagecgroup":
                    assert source.pread(file, old * 8, 8) == copy.pread(file, new * 8, 8)
        for file in ("kpageflags", "kpagecount"):
            words = [np.frombuffer(k.pread(file, 0, k.frame_count() * 8), np.uint64) for k in (source, copy)]
            assert np.array_equal(np.sort(words[0]), np.sort(words[1]))
            assert words[0][0] == words[1][0]
        for pid in source.pids():
            assert [o.values for o in huge_stats(source.process(pid))] == [
                o.values for o in huge_stats(copy.process(pid))
            ]
            rows = [residency(k.process(pid)).rows.tolist() for k in (source, copy)]
            assert rows[0] == rows[1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=60), st.integers(0, 90), st.integers(0, 99))
def test_compound_pages_stay_together(orders, more, seed):
    """Any mixture of compound pages: each is in order, aligned and whole afterwards."""
    from pmcore.recording.anonymise import FrameShuffle

    flags = []
    for order in orders:
        flags += [0] * (-len(flags) % (1 << order))
        flags += [int(PageFlag.COMPOUND_HEAD)] + [int(PageFlag.COMPOUND_TAIL)] * ((1 << order) - 1)
        if order == 0:
            flags[-1] = 0
    flags += [0] * (more + 1)
    words = np.array(flags, dtype=np.uint64)
    kernel = SnapshotKernel(kpageflags=words, kpagecount=np.arange(len(words), dtype=np.uint64))
    shuffle = FrameShuffle(len(words), np.random.default_rng(seed))
    blocks = list(shuffle.blocks(kernel, [FrameFile.KPAGEFLAGS, FrameFile.KPAGECOUNT]))
    shown, counts = (np.concatenate([block[file] for block in blocks]) for file in blocks[0])
    again = [block[FrameFile.KPAGECOUNT] for block in shuffle.blocks(kernel, [FrameFile.KPAGECOUNT])]
    assert np.array_equal(np.concatenate(again), counts)
    entries = np.arange(len(words), dtype=np.uint64) | np.uint64(1 << 63)
    shuffle.entries(entries)
    new = (entries & np.uint64((1 << 55) - 1)).astype(np.int64)
    assert sorted(new.tolist()) == list(range(len(words)))
    assert new[0] == 0
    assert np.array_equal(shown[new], words)
    assert np.array_equal(counts[new], np.arange(len(words)))
    place = 0
    for order in orders:
        place += -place % (1 << order)
        part = new[place : place + (1 << order)]
        assert part[0] % (1 << order) == 0
        assert np.array_equal(part, part[0] + np.arange(1 << order))
        place += 1 << order


def test_blocks_change_places(tmp_path):
    """More than one block of 2^18 frames: frames leave their blocks."""
    count = (1 << 18) * 5 + 77
    kernel = SnapshotKernel(kpageflags=np.arange(count, dtype=np.uint64) & np.uint64(0xFF))
    numbers = np.arange(1, count, 1000, dtype=np.uint64)
    vma = Vma(start=1 << 30, end=(1 << 30) + len(numbers) * PAGE)
    kernel.add_process(3, {vma: numbers | np.uint64(1 << 63)})
    record(kernel, tmp_path / "r", anonymise=True, seed=3)
    with pmcore.open("recording", tmp_path / "r") as copy:
        pfns = copy.process(3).pagemap(vma.start, vma.end).pfn
        assert len(set(pfns.tolist())) == len(numbers)
        assert np.array_equal(copy.frames_at(FrameFile.KPAGEFLAGS, pfns), numbers & np.uint64(0xFF))
        assert ((pfns >> np.uint64(18)) != (numbers >> np.uint64(18))).any()


# -- files -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=40))
def test_pieces_come_back(words):
    array = np.array(words, dtype=np.uint64)
    assert decode_piece(encode_piece(array)).tolist() == words


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "r"
    record(furnished(), path)
    with pytest.raises(ArgumentError, match="is there already"):
        record(furnished(), path)
    before = path.read_bytes()
    machine = furnished()

    def fail(pid):
        raise ZeroDivisionError

    monkeypatch.setattr(machine, "process", fail)
    with pytest.raises(ZeroDivisionError):
        record(machine, path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(Missing):
        record(furnished(), tmp_path / "nowhere" / "r")
    with pytest.raises(ProcessGone):
        record(furnished(), tmp_path / "q", pids=[99])
    assert list(tmp_path.iterdir()) == [path]


def everything(kernel):
    """Look at all of it."""
    for file in FrameFile:
        try:
            for first in range(0, kernel.frame_count(), PIECE):
                kernel.read_frames(file, first, np.zeros(PIECE, np.uint64))
        except Missing:
            continue
    for pid in kernel.pids():
        process = kernel.process(pid)
        process.smaps()
        for vma in process.maps():
            process.read_pagemap(vma.start >> 12, np.zeros(min(vma.length >> 12, PIECE), np.uint64))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "r"
    record(furnished(), path)
    return path.read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_say_so(small, tmp_path_factory, data):
    """Bytes changed, cut off, taken out or put in: a FormatError, or nothing changed that matters."""
    damaged = bytearray(small)
    kind = data.draw(st.sampled_from(["bytes", "tail bytes", "cut", "out", "in"]))
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    low = 0 if kind != "tail bytes" else max(len(small) - 4000, 0)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(min(low, len(damaged) - 1), len(damaged))
        if kind in ("bytes", "tail bytes"):
            damaged[place] = rng.randrange(256)
        elif kind == "cut":
            del damaged[max(place, 1) :]
        elif kind == "out":
            del damaged[place : place + rng.randint(1, 9)]
        else:
            damaged[place:place] = rng.randbytes(rng.randint(1, 9))
    path = tmp_path_factory.mktemp("damaged") / "r"
    path.write_bytes(damaged)
    with suppress(FormatError), open_recording(path) as kernel:
        everything(kernel)


def rewritten(small, path, change, *, members=()):
    """The recording with its index changed by `change`, and other members put in."""
    import io

    with zipfile.ZipFile(io.BytesIO(small)) as old, zipfile.ZipFile(path, "w") as new:
        replaced = dict(members)
        for info in old.infolist():
            if info.filename == "recording.json":
                index = json.loads(old.read(info))
                index = change(index) or index
                new.writestr(info.filename, json.dumps(index))
            else:
                new.writestr(info, replaced.pop(info.filename, old.read(info)))


def put(*path, value):
    def change(index):
        place = index
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


VALUES = [None, -1, 1 << 70, "x", [], {}, [[1 << 60]], [[-1, 0]], 1.5, float("nan"), True, [[]], [["a", "b"]]]


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize(
    "path",
    [
        ("pmcore_recording",),
        ("profile",),
        ("profile", "geometry"),
        ("profile", "geometry", "page_shift"),
        ("profile", "geometry", "task_size"),
        ("profile", "add"),
        ("profile", "config"),
        ("profile", "preset"),
        ("began",),
        ("frames",),
        ("frames", "count"),
        ("frames", "files"),
        ("frames", "files", "kpageflags", "words"),
        ("frames", "files", "kpageflags", "pieces"),
        ("frames", "files", "kpageflags", "name"),
        ("frames", "later"),
        ("frames", "refused"),
        ("processes",),
        ("processes", 0, "pid"),
        ("processes", 0, "texts"),
        ("processes", 0, "spans"),
        ("processes", 0, "pagemap"),
        ("processes", 0, "pagemap", "pieces"),
        ("processes", 0, "moved"),
        ("processes", 0, "files"),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_wrong_index_says_so(small, tmp_path, path, value):
    """Nothing but errors of ours, whatever stands in the index."""
    rewritten(small, tmp_path / "r", put(*path, value=value))
    with suppress(FormatError, SyscallError), open_recording(tmp_path / "r") as kernel:
        everything(kernel)


def test_a_file_cannot_claim_what_it_has_not(small, tmp_path):
    """No memory is asked for on the word of a small file."""
    huge = 1 << 45

    def change(index):
        index["frames"]["count"] = huge
        for row in index["frames"]["files"].values():
            row["words"], row["pieces"] = huge, [[huge, 0]]

    rewritten(small, tmp_path / "frames", change)
    with pytest.raises(FormatError):
        open_recording(tmp_path / "frames")
    # A text of 300 MB in a few hundred kB.
    bomb = bytes(300 << 20)
    with zipfile.ZipFile(tmp_path / "text", "w", zipfile.ZIP_DEFLATED) as new:
        rewritten(small, tmp_path / "base", lambda index: None)
        with zipfile.ZipFile(tmp_path / "base") as old:
            for info in old.infolist():
                if info.filename == "processes/1/smaps":
                    new.writestr(info.filename, bomb)
                else:
                    new.writestr(info, old.read(info))
    with open_recording(tmp_path / "text") as kernel, pytest.raises(FormatError, match="claims"):
        kernel.process(1).smaps()
    # A packed index.
    with zipfile.ZipFile(tmp_path / "index", "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("recording.json", b"[" * (1 << 20))
    with pytest.raises(FormatError):
        open_recording(tmp_path / "index")
    with zipfile.ZipFile(tmp_path / "deep", "w") as new:
        new.writestr("recording.json", b"[" * (1 << 20))
    with pytest.raises(FormatError):
        open_recording(tmp_path / "deep")


def test_no_recording_at_all(tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a", "b")
    for name in ("text", "empty", "zip"):
        with pytest.raises(FormatError, match="recording"):
            pmcore.open("recording", tmp_path / name)
    with pytest.raises(Missing):
        pmcore.open("recording", tmp_path / "nothing")
    with pytest.raises(SyscallError):
        pmcore.open("recording", tmp_path)


# -- the command --------------------- -----------------------------------------------------------------


def pmcore_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pmcore.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command(tmp_path):
    path = str(tmp_path / "r")
    done = pmcore_command("record", path, "--backend", "sim", "--format", "json")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)
    assert (row["frames"], row["processes"], row["refused"]) == (16384, 0, 0)
    assert pmcore_command("record", path, "--backend", "sim").returncode == 2
    assert pmcore_command("record", path, "--backend", "sim", "--force").returncode == 0
    assert pmcore_command("types", "--backend", f"recording:{path}").returncode == 0
    assert pmcore_command("types", "--backend", "recording").returncode == 2
    assert (
        pmcore_command("types", "--backend", "recording", "--backend-option", f"path={path}").returncode == 0
    )
    (tmp_path / "bad").write_text("x")
    bad = pmcore_command("types", "--backend", f"recording:{tmp_path / 'bad'}")
    assert bad.returncode == 5
    assert "not a whole recording" in bad.stderr
