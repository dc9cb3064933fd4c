"""Short reads of words are those of the file, whatever was read before, and whatever has changed."""

from __future__ import annotations

import random

import pytest

import pmcore
from pmcore.mounted.nearby import Words, words_of
from pmcore.procview import ProcView
from pmcore.program import run

from .conftest import PROGRAM


@pytest.fixture
def view():
    machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB")
    run(PROGRAM, machine)
    return ProcView(machine)


@pytest.mark.parametrize("name", ["kpageflags", "kpagecount", "kpagecgroup", "1/pagemap"])
def test_short_reads_are_the_files(view, name):
    """2,000 reads at random places, far and near, at ends of blocks and of the file; writes between them."""
    file, chance, changes = view.open(f"/proc/{name}"), random.Random(name), 0
    words, task = words_of(file), view.kernel.tasks()[0]
    start = task.process.maps()[0].start
    base = start // 512 if name.endswith("pagemap") else 0
    for number in range(2000):
        near = chance.choice((0, 1 << 16, (16384 * 8) - 16, chance.randrange(1 << 18) & -8))
        offset = base + near + chance.choice((-8, 0, 8, 64)) * (base + near > 64)
        size = 8 * chance.randrange(1, 9)
        assert words.read(offset, size, changes) == file.read(offset, size), (number, offset, size)
        if number % 97 == 0:
            task.write(start + number * 4096 % (64 * 4096), b"x")
            changes += 1


class _Counting:
    """A file of words, which counts how often it is read."""

    def __init__(self):
        self.sizes = []

    def read(self, offset, size):
        self.sizes.append(size)
        return bytes(size)


def test_blocks_are_read_where_they_pay():
    """The first word alone; of frames then whole blocks; of pages only near the last one."""
    frames, pages = _Counting(), _Counting()
    of_frames, of_pages = Words(frames, always=True), Words(pages, always=False)
    for offset in range(0, 1 << 30, 1 << 22):
        of_frames.read(offset, 8, 0)
        of_pages.read(offset, 8, 0)
    assert frames.sizes[:2] == [8, 65536]
    assert set(pages.sizes) == {8}
    del pages.sizes[:]
    for offset in range(0, 4096, 8):
        of_pages.read(offset, 8, 0)
    assert pages.sizes == [8, 65536]


def test_texts_have_no_words(view):
    """What is read in order, or moves bits when it is read, is never answered from before."""
    for path in ("/proc/1/maps", "/sys/kernel/mm/page_idle/bitmap", "/proc/1/clear_refs"):
        assert words_of(view.open(path, 1 if path.endswith("clear_refs") else 0)) is None
