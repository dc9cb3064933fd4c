"""pmcore mount: a machine on a directory, as long as pmcore runs, and no longer."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

import pmcore
from pmcore.procview import ProcView
from pmcore.program import run

from .conftest import PROGRAM, mounts, wait_for


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting on a directory needs root")
    probe = subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True)
    if probe.returncode:
        pytest.skip("this root may not mount")


@pytest.fixture
def mounted(started, program, tmp_path):
    """A mounted machine: its directory, and pmcore."""
    place = tmp_path / "machine"
    place.mkdir()

    def go(*options):
        server = started("mount", str(place), "--machine", program, *options)
        assert server.stdout.readline().startswith("mounted on ")
        return place, server

    yield go
    subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def test_bytes_at_any_offset(mounted):
    """1,000 random reads of words and texts are those of the same machine here."""
    place, _ = mounted()
    machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB")
    run(PROGRAM, machine)
    view, chance = ProcView(machine), random.Random(7)
    names = [
        "1/pagemap",
        "2/pagemap",
        "kpageflags",
        "kpagecount",
        "kpagecgroup",
        "1/smaps",
        "meminfo",
        "2/maps",
    ]
    files = {name: os.open(place / "proc" / name, os.O_RDONLY) for name in names}
    for _ in range(1000):
        name = chance.choice(names)
        if name.endswith("pagemap"):
            base, spread = 0x1000_0000_0000 // 512, 100 * 8
        else:
            base, spread = 0, 20_000
        size = chance.choice((0, 1, 7, 8, 64, 4096, 4100, 600_000))
        offset = base + chance.choice((0, 8, 16, 3, chance.randrange(spread)))
        answers = []
        for read in (
            lambda n, s, o: os.pread(files[n], s, o),
            lambda n, s, o: view.open(f"/proc/{n}").read(o, s),
        ):
            try:
                answers.append(read(name, size, offset))
            except OSError as error:
                answers.append(error.errno)
        # A read of no bytes never reaches a file system.
        assert answers[0] == answers[1] or size == 0, (name, offset, size)
    for fd in files.values():
        os.close(fd)


def test_ends_with_the_signal_and_leaves_nothing(mounted):
    """Interrupted, terminated, killed, unmounted from outside: nothing stays mounted."""
    before = mounts()
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, "umount"):
        place, server = mounted()
        assert len(mounts()) == len(before) + 1
        held = os.open(place / "proc/1/maps", os.O_RDONLY)
        if how == "umount":
            subprocess.run(["umount", "-l", str(place)], check=True)
            os.close(held)
            assert server.wait(timeout=10) == 0
        else:
            os.kill(server.pid, how)
            server.wait(timeout=10)
            with contextlib.suppress(OSError):  # the kernel says that nobody answers any more
                os.close(held)
        wait_for(lambda: mounts() == before)
        assert list(place.iterdir()) == []


def test_steps_and_self(mounted):
    """proc/self by option; steps by a file; what other files say changes with them."""
    place, _ = mounted("--self", "2", "--step")
    assert (place / "proc/self").readlink() == Path("2")
    assert not (place / "proc/self/maps").exists()
    (place / "proc/pmcore/step").write_text("3\n")
    assert (place / "proc/self/maps").read_text() == (place / "proc/1/maps").read_text()
    before = (place / "proc/2/smaps").read_text()
    (place / "proc/pmcore/step").write_text("1\n")
    assert (place / "proc/2/smaps").read_text() != before


def test_a_word_at_a_time_shows_every_change(mounted):
    """Short reads are answered from what was read around them, until something is written."""
    place, _ = mounted("--step")
    take = place / "proc/pmcore/step"
    take.write_text("2\n")
    names = ("1/pagemap", "kpageflags", "kpagecount")
    words, flags, counts = (os.open(place / "proc" / name, os.O_RDONLY) for name in names)
    area = 0x1000_0000_0000 // 512

    def word(page):
        return int.from_bytes(os.pread(words, 8, area + page * 8), "little")

    assert [bool(word(page) >> 63) for page in (0, 19, 20, 63)] == [True, True, False, False]
    assert [word(page) >> 56 & 1 for page in range(3)] == [1, 1, 1]
    take.write_text("1\n")  # fork: nothing is exclusive any more
    assert [word(page) >> 56 & 1 for page in range(3)] == [0, 0, 0]
    assert word(0) >> 55 & 1
    (place / "proc/1/clear_refs").write_text("4")
    assert not word(0) >> 55 & 1
    pfn = word(0) & (1 << 55) - 1
    assert os.pread(counts, 8, pfn * 8)[0] == 2
    take.write_text("1\n")  # the child writes to it, and has a copy
    assert os.pread(counts, 8, pfn * 8)[0] == 1
    assert os.pread(flags, 64, 16384 * 8 - 24) == os.pread(flags, 4096, 16384 * 8 - 24)
    assert len(os.pread(flags, 64, 16384 * 8 - 24)) == 24
    for fd in (words, flags, counts):
        os.close(fd)


def test_where_it_cannot_be(started, program, tmp_path):
    """A place that is no directory: one line, exit code 3."""
    (tmp_path / "file").touch()
    for place in ("none", "file"):
        server = started("mount", str(tmp_path / place), "--machine", program, stderr=subprocess.PIPE)
        _, told = server.communicate(timeout=20)
        assert server.returncode in (2, 3), told
        assert "Traceback" not in told


@pytest.mark.rule("ID-001", "ID-002", "ID-003")
def test_the_idle_bitmap_through_the_mount(mounted):
    """Marked by a write, shown by both files; errors are the kernel's; a word that was read ahead is forgotten."""
    place, _ = mounted()
    machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB")
    run(PROGRAM, machine)
    vma = machine.process(1).maps()[0]
    pfns = machine.process(1).pagemap(vma.start, vma.end).pfn
    pfn = int(pfns[pfns > 0][0])
    bitmap = os.open(place / "sys/kernel/mm/page_idle/bitmap", os.O_RDWR)
    flags = os.open(place / "proc/kpageflags", os.O_RDONLY)

    def idle():
        return bool(int.from_bytes(os.pread(flags, 8, pfn * 8), "little") >> 25 & 1)

    assert not idle()
    for call in (lambda: os.pread(bitmap, 8, 4), lambda: os.pwrite(bitmap, b"123", 0)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError) as caught:
        os.pwrite(bitmap, bytes(8), 1 << 30)
    assert caught.value.errno == errno.ENXIO
    assert os.pread(bitmap, 8, 1 << 30) == b""
    assert os.pwrite(bitmap, (1 << pfn % 64).to_bytes(8, "little"), pfn // 64 * 8) == 8
    assert idle()
    word = int.from_bytes(os.pread(bitmap, 8, pfn // 64 * 8), "little")
    assert word == 1 << pfn % 64
    os.close(bitmap)
    os.close(flags)
