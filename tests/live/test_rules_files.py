"""Rules FM-: memfds and shared anonymous memory, on the running kernel and on the simulated machine."""

from __future__ import annotations

import numpy as np
import pytest

from pmcore.errors import AddressSpaceFault, SyscallError
from pmcore.uapi import Errno, Madvise, PageFlag, UffdFeature

from .conftest import PAGE

SHARED, PRIVATE, ANONYMOUS = 0x01, 0x02, 0x20


@pytest.fixture
def memfd(task):
    """A memfd of `pages` pages."""

    def make(pages: int) -> int:
        fd = task.memfd_create("rule")
        task.ftruncate(fd, pages * PAGE)
        return fd

    return make


@pytest.mark.rule("FM-001", "VM-017")
def test_shared_memory_shows_as_a_files(task, area, look):
    start = area(2, flags=SHARED | ANONYMOUS)
    task.touch(start, 2 * PAGE)
    entries, flags, counts = look(task, start, 2)
    assert entries.file.all()
    assert entries.exclusive.all()
    assert flags.has(PageFlag.SWAPBACKED).all()
    assert not flags.has(PageFlag.ANON).any()
    assert counts.tolist() == [1, 1]
    assert [vma.name for vma in task.process.maps() if vma.start == start] == ["/dev/zero (deleted)"]


@pytest.mark.rule("FM-002")
def test_a_read_maps_what_lies_around_it(task, area, memfd, look):
    fd = memfd(40)
    for page in (0, 3, 17, 20, 39):
        task.pwrite(fd, b"x", page * PAGE)
    start = area(40, flags=SHARED, fd=fd)
    task.touch(start + 18 * PAGE, PAGE, write=False)
    assert np.flatnonzero(look(task, start, 40)[0].present).tolist() == [17, 18, 20]
    task.touch(start + 38 * PAGE, PAGE, write=True)
    assert np.flatnonzero(look(task, start, 40)[0].present).tolist() == [17, 18, 20, 38]


@pytest.mark.rule("FM-002")
def test_a_mapping_that_begins_between_boundaries_is_mapped_from_its_start(task, memfd, look):
    fd = memfd(40)
    for page in range(40):
        task.pwrite(fd, b"x", page * PAGE)
    start = task.mmap(40 * PAGE, addr=(1 << 45) + 15 * PAGE, flags=SHARED | 0x100000, fd=fd)
    task.touch(start, PAGE, write=False)
    assert np.flatnonzero(look(task, start, 40)[0].present).tolist() == list(range(16))


@pytest.mark.rule("FM-003")
def test_reading_a_hole_gives_a_clean_page(task, area, memfd, look):
    fd = memfd(4)
    start = area(4, flags=SHARED, fd=fd)
    assert task.pread(fd, 8, PAGE) == bytes(8)
    assert not task.mincore(start, 4 * PAGE).any()
    task.touch(start, PAGE, write=False)
    task.touch(start + PAGE, PAGE, write=True)
    _, flags, _ = look(task, start, 2)
    assert flags.has(PageFlag.DIRTY).tolist() == [False, True]
    assert task.mincore(start, 4 * PAGE).tolist() == [True, True, False, False]


@pytest.mark.rule("FM-004", "VM-018")
def test_a_private_write_copies(task, area, memfd, look):
    fd = memfd(2)
    task.pwrite(fd, b"file", 0)
    start = area(2, flags=PRIVATE, fd=fd)
    task.write(start, b"mine")
    entries, flags, _ = look(task, start, 2)
    assert (entries.file[0], entries.exclusive[0]) == (False, True)
    assert flags.has(PageFlag.ANON)[0]
    assert (task.read(start, 4), task.pread(fd, 4, 0)) == (b"mine", b"file")


@pytest.mark.rule("FM-005")
def test_behind_the_end_is_a_bus_error(task, area, memfd):
    fd = memfd(2)
    start = area(4, flags=SHARED, fd=fd)
    with pytest.raises(AddressSpaceFault) as caught:
        task.touch(start, 4 * PAGE, write=False)
    assert (caught.value.signal, caught.value.address) == ("SIGBUS", start + 2 * PAGE)


@pytest.mark.rule("FM-006")
@pytest.mark.parametrize("by", ["fallocate", "madvise"])
def test_a_hole_spares_private_copies(task, area, memfd, look, by):
    fd = memfd(4)
    shared, private = area(4, flags=SHARED, fd=fd), area(4, flags=PRIVATE, fd=fd)
    task.write(shared, b"x" * 4 * PAGE)
    task.write(private + PAGE, b"mine")
    task.touch(private + 2 * PAGE, PAGE, write=False)
    if by == "fallocate":
        task.fallocate(fd, 3, PAGE, 2 * PAGE)
    else:
        task.madvise(shared + PAGE, 2 * PAGE, Madvise.REMOVE)
    assert look(task, shared, 4)[0].present.tolist() == [True, False, False, True]
    # The copy; page 0 and 3 came with the read, by fault-around.
    assert look(task, private, 4)[0].present.tolist() == [True, True, False, True]
    assert task.read(private + PAGE, 4) == b"mine"
    assert task.pread(fd, 2, PAGE) == bytes(2)


@pytest.mark.rule("FM-006")
def test_parts_of_pages_are_zeroed(task, area, memfd):
    fd = memfd(3)
    task.pwrite(fd, b"x" * 3 * PAGE, 0)
    task.fallocate(fd, 3, 100, 2 * PAGE)
    assert task.pread(fd, 101, 0) == b"x" * 100 + b"\0"
    assert task.pread(fd, 102, 2 * PAGE) == bytes(100) + b"xx"


@pytest.mark.rule("FM-007", "FM-005")
def test_truncating_takes_private_copies(task, area, memfd, look):
    fd = memfd(4)
    shared, private = area(4, flags=SHARED, fd=fd), area(4, flags=PRIVATE, fd=fd)
    task.write(shared, b"x" * 4 * PAGE)
    task.touch(private, 4 * PAGE)
    task.ftruncate(fd, 2 * PAGE + 10)
    assert look(task, shared, 4)[0].present.tolist() == [True, True, True, False]
    assert look(task, private, 4)[0].present.tolist() == [True, True, True, False]
    assert task.read(shared + 2 * PAGE, 12) == b"x" * 10 + bytes(2)


@pytest.mark.rule("FM-008")
def test_a_child_begins_with_empty_entries(task, area, look):
    start = area(3, flags=SHARED | ANONYMOUS)
    task.touch(start, 3 * PAGE)
    child = task.fork()
    try:
        assert not look(child, start, 3)[0].present.any()
        child.write(start, b"both")
        assert task.read(start, 4) == b"both"
        assert look(task, start, 3)[2].tolist() == [2, 1, 1]
    finally:
        child.exit()


@pytest.mark.rule("FM-010")
def test_zapping_notes_the_access(task, area, look):
    start = area(2, flags=SHARED | ANONYMOUS)
    task.touch(start, 2 * PAGE)
    for expected in ((True, False), (False, True)):
        task.madvise(start, 2 * PAGE, Madvise.DONTNEED)
        task.touch(start, 2 * PAGE, write=False)
        _, flags, _ = look(task, start, 2)
        assert flags.has(PageFlag.DIRTY).all()
        assert (flags.has(PageFlag.REFERENCED)[0], flags.has(PageFlag.ACTIVE)[0]) == expected


@pytest.mark.rule("FM-011", "FM-012")
def test_what_fallocate_sets_aside_is_no_data(task, area, memfd, look):
    fd = memfd(8)
    task.fallocate(fd, 0, 2 * PAGE, 2 * PAGE)
    task.pwrite(fd, b"x", 5 * PAGE)
    start = area(8, flags=SHARED, fd=fd)
    assert task.lseek(fd, 0, 3) == 5 * PAGE
    assert task.lseek(fd, 5 * PAGE, 4) == 6 * PAGE
    assert np.flatnonzero(task.mincore(start, 8 * PAGE)).tolist() == [5]
    task.touch(start + PAGE, PAGE, write=False)
    assert np.flatnonzero(look(task, start, 8)[0].present).tolist() == [1, 5]
    task.touch(start + 2 * PAGE, PAGE, write=False)
    assert look(task, start, 8)[1].has(PageFlag.DIRTY)[2]
    for offset in (6 * PAGE, 8 * PAGE):
        with pytest.raises(SyscallError) as caught:
            task.lseek(fd, offset, 3)
        assert caught.value.errno == Errno.ENXIO


@pytest.mark.rule("FM-013")
def test_writing_twice_activates(task, area, memfd, look):
    fd = memfd(2)
    for page in (0, 1, 1):
        task.pwrite(fd, b"x", page * PAGE)
    start = area(2, flags=SHARED, fd=fd)
    task.touch(start, PAGE, write=False)
    _, flags, _ = look(task, start, 2)
    assert flags.has(PageFlag.REFERENCED).tolist() == [True, False]
    assert flags.has(PageFlag.ACTIVE).tolist() == [False, True]


@pytest.mark.rule("FM-014", "VM-019")
def test_protection_outlives_the_page(task, area, look, needs):
    needs("uffd.wp_async")
    start = area(3, flags=SHARED | ANONYMOUS)
    fd = task.userfaultfd(UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_HUGETLBFS_SHMEM)
    task.uffd_register(fd, start, 3 * PAGE, 2)
    task.touch(start, 2 * PAGE)
    task.uffd_writeprotect(fd, start, 3 * PAGE, protect=True)
    task.madvise(start, PAGE, Madvise.DONTNEED)
    entries = look(task, start, 3)[0]
    assert entries.uffd_wp.all()
    assert entries.present.tolist() == [False, True, False]
    task.touch(start, PAGE, write=False)
    assert look(task, start, 3)[0].uffd_wp.all()
    task.close(fd)


@pytest.mark.rule("FM-015")
def test_populating_reads_what_is_shared(task, area, look):
    flags = look(task, area(2, flags=SHARED | ANONYMOUS | 0x8000), 2)[1]
    assert not flags.has(PageFlag.DIRTY).any()
    start = area(3, flags=SHARED | ANONYMOUS | 0x2000)
    assert look(task, start, 3)[1].has(PageFlag.REFERENCED).all()
    task.madvise(start, 2 * PAGE, Madvise.DONTNEED_LOCKED)
    assert not look(task, start, 2)[0].present.any()
    task.madvise(start, 3 * PAGE, Madvise.POPULATE_WRITE)
    assert look(task, start, 3)[1].has(PageFlag.REFERENCED).tolist() == [False, False, True]


@pytest.mark.rule("FM-016")
def test_a_file_ends_with_its_last_user(task, area, memfd):
    fd = memfd(1)
    task.pwrite(fd, b"kept", 0)
    child = task.fork()
    try:
        task.close(fd)
        assert child.pread(fd, 4, 0) == b"kept"
        start = child.mmap(PAGE, flags=SHARED, fd=fd)
        child.close(fd)
        assert child.read(start, 4) == b"kept"
    finally:
        child.exit()


@pytest.mark.rule("FM-017")
def test_mincore_sees_what_others_brought_in(task, area, memfd):
    fd = memfd(3)
    one, other = area(3, flags=SHARED, fd=fd), area(3, flags=PRIVATE, fd=fd)
    task.touch(one + PAGE, PAGE)
    assert task.mincore(other, 3 * PAGE).tolist() == [False, True, False]
