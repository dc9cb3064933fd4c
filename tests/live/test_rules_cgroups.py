"""Rules about memory cgroups (CG), on the running kernel and on the simulated machine."""

from __future__ import annotations

import errno
import itertools

import numpy as np
import pytest

from pmcore.errors import BackendUnavailable, SyscallError
from pmcore.protocols import FrameFile
from pmcore.uapi import Madvise, PageFlag

PAGE, PMD = 4096, 1 << 21
_names = itertools.count(1)


@pytest.fixture
def group(bench):
    """Make a group, below another one or not; they are removed at the end, the tasks in them back where they were."""
    made = []

    def make(name: str = "", below: str = "") -> str:
        path = f"{below}/{name}".strip("/") if name else f"g{next(_names)}"
        try:
            bench.make_group(path)
        except BackendUnavailable as error:
            pytest.skip(str(error))
        made.append(path)
        return path

    yield make
    for task in bench.tasks():
        bench.move_task(task, "")
    for path in sorted(made, key=lambda path: -path.count("/")):
        if path in bench.groups():
            bench.remove_group(path)


@pytest.fixture
def owners(bench, kernel):
    """Whom pages of a task are charged to: paths of groups, "" for those that we did not make, None for nobody."""

    def look(task, start, pages):
        bench.settle()
        pfns = task.process.pagemap(start, start + pages * PAGE).pfn
        names = {inode: path for path, inode in bench.groups().items()}
        words = kernel.frames_at(FrameFile.KPAGECGROUP, np.asarray(pfns, dtype=np.uint64))
        return [names.get(word, "") if word else None for word in words.tolist()]

    return look


@pytest.mark.rule("CG-001", "CG-002", "KG-002")
def test_charged_to_the_group_of_the_first_touch(bench, task, area, group, owners):
    first, second = group(), group()
    start = area(8)
    task.write(start, b"x")
    bench.move_task(task, first)
    task.touch(start, 3 * PAGE)
    bench.move_task(task, second)
    task.touch(start, 4 * PAGE)
    task.touch(start + 4 * PAGE, PAGE, write=False)
    assert owners(task, start, 5) == ["", first, first, second, None]


@pytest.mark.rule("CG-003")
def test_a_child_begins_in_its_parents_group_and_pays_for_its_copies(bench, task, area, group, owners):
    mine, other = group(), group()
    bench.move_task(task, mine)
    start = area(4)
    task.touch(start, 3 * PAGE)
    child = task.fork()
    try:
        child.touch(start + 3 * PAGE, PAGE)
        bench.move_task(child, other)
        child.touch(start, PAGE)
        task.touch(start + PAGE, PAGE)
        assert owners(child, start, 4) == [other, mine, mine, mine]
        assert owners(task, start, 3) == [mine, mine, mine]
    finally:
        child.exit()


@pytest.mark.rule("CG-004", "CG-005")
def test_a_removed_group_shows_as_the_one_above(bench, task, area, group, owners):
    above = group()
    below = group("below", above)
    start = area(2)
    bench.move_task(task, below)
    task.write(start, b"x")
    for path in (above, below):
        with pytest.raises(SyscallError) as caught:
            bench.remove_group(path)
        assert caught.value.errno == errno.EBUSY
    bench.move_task(task, "")
    bench.remove_group(below)
    assert owners(task, start, 1) == [above]
    again = group("below", above)
    assert owners(task, start, 1) == [above]
    bench.remove_group(again)
    bench.remove_group(above)
    assert owners(task, start, 1) == [""]


@pytest.mark.rule("CG-005")
def test_what_is_refused(bench, task, group):
    path = group()
    for call, number in (
        (lambda: bench.make_group(path), errno.EEXIST),
        (lambda: bench.make_group("nowhere/x"), errno.ENOENT),
        (lambda: bench.remove_group("nowhere"), errno.ENOENT),
        (lambda: bench.move_task(task, "nowhere"), errno.ENOENT),
    ):
        with pytest.raises(SyscallError) as caught:
            call()
        assert caught.value.errno == number
    for bad in ("", "/x", "x/", "x//y", "x/../y"):
        with pytest.raises(ValueError, match="make_group"):
            bench.make_group(bad)


@pytest.mark.rule("CG-006")
def test_page_tables_are_charged_and_huge_page_pools_are_not(bench, task, area, kernel, group):
    path = group()
    bench.move_task(task, path)
    start = area(1)
    task.write(start, b"x")
    inode = np.uint64(bench.groups()[path])
    count = kernel.frame_count()
    flags, owner, after = (np.zeros(count, dtype=np.uint64) for _ in range(3))
    kernel.read_frames(FrameFile.KPAGEFLAGS, 0, flags)
    kernel.read_frames(FrameFile.KPAGECGROUP, 0, owner)
    kernel.read_frames(FrameFile.KPAGEFLAGS, 0, after)
    assert (flags[owner == inode] & np.uint64(PageFlag.PGTABLE)).any()
    # Others take and free memory meanwhile: of what stayed what it was.
    for flag in (PageFlag.SLAB, PageFlag.HUGE):
        assert not owner[(flags & after & np.uint64(flag)) != 0].any()


@pytest.mark.rule("CG-007")
def test_pages_of_files_are_charged_to_who_brings_them(bench, task, area, group, owners):
    first, second = group(), group()
    fd = task.memfd_create("shared")
    task.ftruncate(fd, 4 * PAGE)
    start = area(4, flags=1, fd=fd)
    child = task.fork()
    try:
        bench.move_task(task, first)
        bench.move_task(child, second)
        task.write(start, b"x")
        child.touch(start, 2 * PAGE)
        child.pwrite(fd, b"x", 2 * PAGE)
        task.touch(start, 4 * PAGE, write=False)
        assert owners(task, start, 4) == [*owners(child, start, 4)[:2], second, first]
        assert owners(child, start, 2) == [first, second]
    finally:
        child.exit()
    assert owners(task, start, 4) == [first, second, second, first]


@pytest.mark.rule("CG-009", "KG-004")
def test_a_huge_page_and_what_it_is_taken_apart_into(bench, task, area, group, owners):
    first, second = group(), group()
    bench.move_task(task, first)
    start = area(1024, huge=True)
    task.write(start, b"x")
    if not task.process.pagemap(start + PAGE, start + 2 * PAGE).present.all():
        pytest.skip("no huge page was to be had")
    assert owners(task, start, 512) == [first] * 512
    bench.move_task(task, second)
    task.madvise(start + PMD // 2, PAGE, Madvise.DONTNEED)
    task.touch(start + PMD // 2, PAGE)
    assert owners(task, start, 512) == [first] * 256 + [second] + [first] * 255
    bench.move_task(task, first)
    task.madvise(start, PMD, Madvise.COLLAPSE)
    assert owners(task, start, 512) == [first] * 512
    bench.move_task(task, second)
    task.touch(start, PMD, write=False)
    assert owners(task, start, 512) == [first] * 512


@pytest.mark.rule("CG-010")
def test_a_process_says_in_which_group_it_is(bench, task, group):
    path = group()
    bench.move_task(task, path)
    lines = [line.split(":", 2) for line in task.process.pread("cgroup", 0, 4096).decode().splitlines()]
    v1 = bench.kernel.profile.has("memcg.v1")
    assert [
        row[2].endswith(f"/{path}")
        for row in lines
        if ("memory" in row[1].split(",") if v1 else row[0] == "0")
    ] == [True]
    assert [row for row in lines if row[0] == "0" and row[1]] == []


@pytest.mark.rule("CG-011")
def test_tasks_beside_groups(bench, task, group):
    above = group()
    bench.move_task(task, above)
    if bench.kernel.profile.has("memcg.v1"):
        group("below", above)
        bench.move_task(task, above)
        return
    with pytest.raises(SyscallError) as caught:
        group("below", above)
    assert caught.value.errno == errno.EBUSY
    bench.move_task(task, "")
    group("below", above)
    with pytest.raises(SyscallError) as caught:
        bench.move_task(task, above)
    assert caught.value.errno == errno.EBUSY
