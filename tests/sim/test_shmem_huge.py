"""Huge pages of shared memory on the simulated machine: collapsed, mapped, cut into, paged out."""

from __future__ import annotations

import numpy as np
import pytest

import pmcore
from pmcore import PageFlag
from pmcore.backends.sim.machine import SwapSettings
from pmcore.errors import AddressSpaceFault, InvalidArgument, NotModelled, OutOfMemory, SyscallError
from pmcore.scan.request import ScanRequest
from pmcore.uapi import Errno, Madvise, PageCategory, Prot

PAGE, PMD, PAGES = 4096, 1 << 21, 512
BASE = 1 << 40
SHARED, PRIVATE = 1, 2
PUNCH = 3


def machine_of(kernel="6.18", **options):
    return pmcore.open("sim", **{"memory": "64 MiB", "swap": "16 MiB", "kernel": kernel, **options})


@pytest.fixture
def machine():
    """A machine that is well at the end of each test."""
    made = machine_of()
    yield made
    made.check()


def mapped(task, fd, at=BASE, pages=PAGES, *, flags=SHARED, prot=Prot.READ | Prot.WRITE, page=0):
    """A mapping of a memfd at an aligned address."""
    return task.mmap(pages * PAGE, addr=at, prot=int(prot), flags=flags | 0x100000, fd=fd, offset=page * PAGE)


def memfd(task, pages=PAGES):
    fd = task.memfd_create("huge")
    task.ftruncate(fd, pages * PAGE)
    return fd


def collapsed(machine, pages=PAGES):
    """A task with a memfd, a mapping of all of it, and its first block collapsed."""
    task = machine.spawn()
    fd = memfd(task, pages)
    start = mapped(task, fd, pages=max(pages, PAGES))
    task.write(start + 3 * PAGE, b"text")
    task.madvise(start, PMD, Madvise.COLLAPSE)
    return task, fd, start


def by_pmd(machine, task, addr):
    """Whether a PMD maps the address."""
    regions = task.process.pagemap_scan(
        ScanRequest(start=addr, end=addr + PAGE, return_mask=PageCategory.HUGE, vec_len=8)
    ).regions
    return any(int(word) & PageCategory.HUGE for word in regions["categories"])


def flags_of(machine, task, addr):
    [entry] = task.process.pagemap(addr, addr + PAGE)
    assert entry.present
    return PageFlag(int(machine.kpageflags().values[entry.pfn]))


def orders(machine, task, start, pages=PAGES):
    """Of each page the order of the folio that its entry maps: -1 where nothing is mapped."""
    found = []
    frames, large = machine.core.memory.frames, machine.core.memory.large
    for entry in task.process.pagemap(start, start + pages * PAGE):
        folio = large.get(frames.head(entry.pfn)) if entry.present else None
        found.append(-1 if not entry.present else folio.order if folio else 0)
    return found


def present(task, start, pages=PAGES):
    return int(np.count_nonzero(task.process.pagemap(start, start + pages * PAGE).present))


# -- collapsing ------------------------------------------------------------------------------------------


@pytest.mark.rule("HS-001")
@pytest.mark.rule("HS-003")
def test_one_huge_page_in_place_of_all(machine):
    task = machine.spawn()
    fd = memfd(task, 2 * PAGES)
    start, other = mapped(task, fd), mapped(task, fd, BASE + 2 * PMD)
    task.write(start + 3 * PAGE, b"text")
    task.read(other + 3 * PAGE, 1)
    task.fallocate(fd, 0, 9 * PAGE, PAGE)
    task.madvise(start, PMD, Madvise.COLLAPSE)
    entries = task.process.pagemap(start, start + PMD)
    assert entries.present.all()
    assert (np.diff(entries.pfn) == 1).all()
    assert entries.pfn[0] % PAGES == 0
    assert present(task, other) == 0
    flags = flags_of(machine, task, start + 7 * PAGE)
    assert flags & PageFlag.DIRTY
    assert flags & PageFlag.UPTODATE
    assert flags & PageFlag.COMPOUND_TAIL
    assert not flags & PageFlag.REFERENCED
    assert task.mincore(other, PMD).all()
    assert task.lseek(fd, 0, 3) == 0
    assert task.lseek(fd, 0, 4) == PMD
    assert task.read(other + 3 * PAGE, 4) == b"text"
    assert task.read(other + 9 * PAGE, 4) == bytes(4)
    assert by_pmd(machine, task, other)


@pytest.mark.rule("HS-001")
def test_what_lies_in_swap_is_read_back(machine):
    task = machine.spawn()
    start = task.mmap(PMD, addr=BASE, flags=0x100021)
    task.write(start, b"kept")
    task.madvise(start, PAGE, Madvise.PAGEOUT)
    task.madvise(start, PMD, Madvise.COLLAPSE)
    assert task.read(start, 4) == b"kept"
    assert by_pmd(machine, task, start)


@pytest.mark.rule("HS-002")
@pytest.mark.parametrize(
    ("pages", "page", "end"), [(PAGES, 3, PAGES), (PAGES + 7, 0, PAGES + 7), (100, 0, 100)]
)
def test_a_mapping_that_does_not_fit(machine, pages, page, end):
    """Refused for where the mapping lies in the file, or where it ends, before a block is looked at."""
    task = machine.spawn()
    fd = memfd(task, PAGES)
    start = mapped(task, fd, pages=pages, page=page)
    task.write(start, b"x")
    if (
        pages == PAGES + 7
    ):  # its last block is whole: where the mapping ends in the middle of one is no matter
        task.madvise(start, end * PAGE, Madvise.COLLAPSE)
        assert by_pmd(machine, task, start)
        return
    with pytest.raises(InvalidArgument):
        task.madvise(start, end * PAGE, Madvise.COLLAPSE)
    assert present(task, start, pages) > 0


@pytest.mark.rule("HS-002")
def test_what_refuses_to_be_collapsed(machine):
    task = machine.spawn()
    fd = memfd(task, 2 * PAGES)
    start = mapped(task, fd, pages=2 * PAGES)
    with pytest.raises(InvalidArgument):  # nothing but holes
        task.madvise(start, PMD, Madvise.COLLAPSE)
    task.write(start, b"x")
    task.madvise(start, PMD, Madvise.NOHUGEPAGE)
    with pytest.raises(InvalidArgument):
        task.madvise(start, PMD, Madvise.COLLAPSE)


@pytest.mark.rule("HS-002")
def test_set_aside_behind_the_end(machine):
    task = machine.spawn()
    fd = memfd(task, 2)
    start = mapped(task, fd)
    task.fallocate(fd, 1, 0, 5 * PAGE)
    task.write(start, b"x" * (2 * PAGE))
    with pytest.raises(InvalidArgument):
        task.madvise(start, PMD, Madvise.COLLAPSE)
    assert present(task, start) == 0
    task.ftruncate(fd, 5 * PAGE)
    task.read(start, 1)
    assert task.read(start, 2) == b"xx"


@pytest.mark.rule("HS-002")
@pytest.mark.parametrize(("kernel", "errno"), [("6.18", Errno.EBUSY), ("6.1", None)])
def test_who_waits_for_missing_pages(kernel, errno):
    machine = machine_of(kernel)
    task = machine.spawn()
    fd = memfd(task, 2 * PAGES)
    start, behind = mapped(task, fd), mapped(task, fd, BASE + 2 * PMD, page=PAGES)
    task.write(start, b"x")
    task.uffd_register(task.userfaultfd(0), behind, PMD, 1)
    if errno is None:  # does not ask
        task.madvise(start, PMD, Madvise.COLLAPSE)
        assert by_pmd(machine, task, start)
        return
    with pytest.raises(SyscallError) as refused:
        task.madvise(start, PMD, Madvise.COLLAPSE)
    assert refused.value.errno == errno
    machine.check()


@pytest.mark.rule("HS-002")
def test_no_huge_page_is_left():
    machine = pmcore.open("sim", memory="4 MiB", kernel="6.18")
    task = machine.spawn()
    fd = memfd(task)
    start = mapped(task, fd)
    task.write(start, b"x")
    task.write(task.mmap(600 * PAGE), b"x" * (600 * PAGE))
    with pytest.raises(OutOfMemory):
        task.madvise(start, PMD, Madvise.COLLAPSE)
    assert present(task, start) == 1
    machine.check()


@pytest.mark.rule("HS-003")
def test_private_copies_keep_the_caller_from_it(machine):
    task = machine.spawn()
    fd = memfd(task)
    start, other = mapped(task, fd, flags=PRIVATE), mapped(task, fd, BASE + PMD)
    task.write(other, b"y")
    task.write(start + 5 * PAGE, b"mine")
    with pytest.raises(InvalidArgument):
        task.madvise(start, PMD, Madvise.COLLAPSE)
    assert task.read(start + 5 * PAGE, 4) == b"mine"
    task.read(other, 1)
    assert by_pmd(machine, task, other)
    assert not by_pmd(machine, task, start + 5 * PAGE)


@pytest.mark.rule("HS-003")
def test_protected_entries_leave_markers(machine):
    task = machine.spawn()
    fd = memfd(task)
    start, other = mapped(task, fd), mapped(task, fd, BASE + PMD)
    task.write(start, b"x" * (8 * PAGE))
    uffd = task.userfaultfd(0)
    task.uffd_register(uffd, start, PMD, 2)
    task.uffd_writeprotect(uffd, start + 4 * PAGE, 2 * PAGE, protect=True)
    with pytest.raises(InvalidArgument):
        task.madvise(start, PMD, Madvise.COLLAPSE)
    entries = task.process.pagemap(start, start + 8 * PAGE)
    assert entries.uffd_wp.tolist() == [index in (4, 5) for index in range(8)]
    assert not entries.present.any()
    task.madvise(other, PMD, Madvise.COLLAPSE)
    assert by_pmd(machine, task, other)


# -- faults ----------------------------------------------------------------------------------------------


@pytest.mark.rule("HS-004")
@pytest.mark.parametrize(("kernel", "read", "written"), [("6.18", PAGES, PAGES), ("6.12", 16, PAGES)])
def test_where_ptes_map_it(kernel, read, written):
    machine = machine_of(kernel)
    task, fd, _start = collapsed(machine)
    one, two = mapped(task, fd, BASE + 2 * PMD), mapped(task, fd, BASE + 4 * PMD)
    for at in (one, two):
        task.madvise(at, PMD, Madvise.NOHUGEPAGE)
    task.read(one + 20 * PAGE, 1)
    task.write(two + 20 * PAGE, b"x")
    assert (present(task, one), present(task, two)) == (read, written)
    assert not by_pmd(machine, task, one + 20 * PAGE)
    machine.check()


@pytest.mark.rule("HS-004")
def test_part_of_it_is_mapped_as_before(machine):
    """A mapping that does not cover the folio gets what lies around a read, and one page for a write."""
    task, fd, _start = collapsed(machine)
    part = mapped(task, fd, BASE + 2 * PMD, 300, page=100)
    task.read(part + 25 * PAGE, 1)
    assert present(task, part, 300) == 16
    task.write(part + 100 * PAGE, b"x")
    assert present(task, part, 300) == 17


@pytest.mark.rule("HS-004")
def test_a_huge_page_reaches_beyond_the_end(machine):
    task, fd, _start = collapsed(machine, 100)
    other = mapped(task, fd, BASE + 2 * PMD)
    with pytest.raises(AddressSpaceFault):
        task.read(other + 200 * PAGE, 1)
    assert task.read(other + 100 * PAGE, 1) == b"\0"  # fault-around finds the page before it
    assert task.read(other + 200 * PAGE, 1) == b"\0"


# -- dropped ---------------------------------------------------------------------------------------------


@pytest.mark.rule("HS-005")
@pytest.mark.parametrize(
    "part",
    [
        lambda task, start: task.munmap(start + 9 * PAGE, PAGE),
        lambda task, start: task.mprotect(start + 9 * PAGE, PAGE, 1),
        lambda task, start: task.madvise(start + 9 * PAGE, PAGE, Madvise.DONTNEED),
        lambda task, start: task.mremap(start + 9 * PAGE, PAGE, PAGE, flags=3, new_addr=BASE + 8 * PMD),
    ],
)
def test_a_part_of_it_empties_all(machine, part):
    task, _fd, start = collapsed(machine)
    part(task, start)
    assert present(task, start, 9) == 0
    assert present(task, start + 10 * PAGE, 100) == 0
    task.read(start, 1)
    assert flags_of(machine, task, start) & PageFlag.REFERENCED


@pytest.mark.rule("HS-005")
def test_a_private_write_copies_one_page(machine):
    task, fd, start = collapsed(machine)
    private = mapped(task, fd, BASE + 2 * PMD, flags=PRIVATE)
    task.read(private, 1)
    assert by_pmd(machine, task, private)
    task.write(private + 40 * PAGE, b"mine")
    assert present(task, private) == 1
    assert task.read(private + 40 * PAGE, 4) == b"mine"
    assert task.read(start + 40 * PAGE, 4) == bytes(4)
    child = task.fork()
    assert present(child, start) == 0
    assert child.read(start + 3 * PAGE, 4) == b"text"


@pytest.mark.rule("HS-006")
@pytest.mark.parametrize(("kernel", "noted"), [("6.18", True), ("6.12", False)])
def test_unmapping_a_pmd_notes_an_access(kernel, noted):
    machine = machine_of(kernel)
    task, _fd, start = collapsed(machine)
    task.madvise(start, PMD, Madvise.DONTNEED)
    task.read(start, 1)
    assert bool(flags_of(machine, task, start) & PageFlag.REFERENCED) == noted


@pytest.mark.rule("HS-006")
@pytest.mark.parametrize(("kernel", "active"), [("6.18", False), ("6.12", True)])
def test_reading_notes_one_access_to_a_folio(kernel, active):
    machine = machine_of(kernel)
    task, fd, start = collapsed(machine)
    task.pread(fd, 3 * PAGE, 0)
    assert bool(flags_of(machine, task, start) & PageFlag.ACTIVE) == active


@pytest.mark.rule("HS-007")
@pytest.mark.parametrize(("kernel", "locked"), [("6.18", True), ("6.12", False)])
def test_locking(kernel, locked):
    machine = machine_of(kernel)
    task, fd, start = collapsed(machine)
    task.mlock(start, PMD)
    assert flags_of(machine, task, start) & PageFlag.MLOCKED
    task.munlock(start, PMD)
    assert not flags_of(machine, task, start) & PageFlag.MLOCKED
    other = mapped(task, fd, BASE + 2 * PMD)
    task.mlock(other, PMD)  # faulted in by a mapping that is locked already
    assert bool(flags_of(machine, task, other) & PageFlag.MLOCKED) == locked
    machine.check()


# -- cut into --------------------------------------------------------------------------------------------


@pytest.mark.rule("HS-008")
def test_halves_of_halves_around_a_hole(machine):
    task, fd, start = collapsed(machine)
    task.fallocate(fd, PUNCH, 100 * PAGE, PAGE)
    assert present(task, start) == 0
    for page in (0, 64, 96, 101, 102, 104, 112, 128, 256):
        task.read(start + page * PAGE, 1)
    found = orders(machine, task, start)
    sizes = ((6, 64), (5, 32), (2, 4), (-1, 1), (0, 1), (1, 2), (3, 8), (4, 16), (7, 128), (8, 256))
    assert found == [order for order, pages in sizes for _ in range(pages)]
    assert flags_of(machine, task, start) & PageFlag.DIRTY
    task.madvise(start, PMD, Madvise.COLLAPSE)
    assert by_pmd(machine, task, start)
    assert task.read(start + 3 * PAGE, 4) == b"text"


@pytest.mark.rule("HS-008")
def test_older_kernels_make_single_pages():
    machine = machine_of("6.12")
    task, fd, start = collapsed(machine)
    task.fallocate(fd, PUNCH, 100 * PAGE, PAGE)
    for page in range(0, PAGES, 16):
        task.read(start + page * PAGE, 1)
    assert (
        orders(machine, task, start) == [0] * 100 + [-1] + [0] * 411 or max(orders(machine, task, start)) == 0
    )
    machine.check()


@pytest.mark.rule("HS-008")
def test_a_new_end_inside_it(machine):
    task, fd, start = collapsed(machine)
    task.ftruncate(fd, 3 * PAGE)
    task.read(start, 1)
    assert orders(machine, task, start, 4) == [1, 1, 0, -1]
    assert machine.core.memory.frames.owner.astype(bool).sum() == 3


@pytest.mark.rule("HS-008")
def test_what_was_set_aside_behind_the_end_stays(machine):
    task = machine.spawn()
    fd = memfd(task, 300)
    start = mapped(task, fd)
    task.write(start, b"x")
    task.madvise(start, PMD, Madvise.COLLAPSE)
    task.fallocate(fd, 1, 0, 350 * PAGE)
    task.fallocate(fd, PUNCH, 100 * PAGE, PAGE)
    kept = machine.core.memory.frames.index[machine.core.memory.frames.owner != 0]
    assert sorted(kept.tolist()) == [
        *range(100),
        *range(101, 512),
    ]  # the part from 256 on begins before page 350


# -- advice ----------------------------------------------------------------------------------------------


@pytest.mark.rule("HS-009")
@pytest.mark.parametrize("advice", [Madvise.COLD, Madvise.PAGEOUT])
def test_advice_on_a_part(machine, advice):
    task, _fd, start = collapsed(machine)
    child = task.fork()
    child.read(start, 1)
    task.madvise(start + 10 * PAGE, 20 * PAGE, advice)
    assert present(task, start) == PAGES
    child.exit()
    task.madvise(start + 10 * PAGE, 20 * PAGE, advice)
    assert present(task, start) == 0
    assert task.mincore(start, PMD).all()
    task.read(start, 1)
    assert orders(machine, task, start, 16) == [0] * 16


@pytest.mark.rule("HS-010")
def test_paged_out_page_by_page(machine):
    task, _fd, start = collapsed(machine)
    task.madvise(start, PMD, Madvise.PAGEOUT)
    assert present(task, start) == 0
    assert not task.mincore(start, PMD).any()
    assert task.read(start + 3 * PAGE, 4) == b"text"
    assert orders(machine, task, start, 8)[3] == 0


@pytest.mark.rule("HS-010")
def test_whole_to_swap_is_not_modelled():
    area = SwapSettings(length=16 << 20, immediate=False, large_folios=True)
    machine = machine_of(swap=[area])
    task, _fd, start = collapsed(machine)
    with pytest.raises(NotModelled, match="whole"):
        task.madvise(start, PMD, Madvise.PAGEOUT)


@pytest.mark.rule("HS-011")
def test_where_it_is_counted(machine):
    task, fd, start = collapsed(machine)
    part = mapped(task, fd, BASE + 2 * PMD, 300, page=100)
    task.read(part, 1)
    by_start = {entry.vma.start: entry.counters for entry in task.process.smaps()}
    assert by_start[start]["ShmemPmdMapped"] == PMD
    assert by_start[part]["ShmemPmdMapped"] == 0
    lines = dict(line.split(":") for line in machine.pread("meminfo", 0, 1 << 16).decode().splitlines())
    assert lines["ShmemHugePages"].split() == lines["ShmemPmdMapped"].split() == ["2048", "kB"]
    task.munmap(start, PMD)
    lines = dict(line.split(":") for line in machine.pread("meminfo", 0, 1 << 16).decode().splitlines())
    assert lines["ShmemHugePages"].split() == ["2048", "kB"]
    assert lines["ShmemPmdMapped"].split() == lines["AnonHugePages"].split() == ["0", "kB"]


def test_a_checkpoint_holds_it_all(machine):
    task, fd, start = collapsed(machine, 300)
    task.fallocate(fd, 1, 0, 400 * PAGE)
    task.fallocate(fd, PUNCH, 100 * PAGE, PAGE)
    saved = machine.checkpoint()
    task.read(start, 1)
    again = orders(machine, task, start)
    machine.restore(saved)
    machine.check()
    task.read(start, 1)
    assert orders(machine, task, start) == again
