"""Rules KF-, KC- and KG- shown on the running kernel's frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pmcore.errors import InvalidArgument, Missing
from pmcore.protocols import IDLE_BITMAP
from pmcore.uapi import PageFlag

from .conftest import PAGE


@pytest.mark.rule("KF-046", "KF-049", "KC-004", "KG-002")
def test_frame_files_end_together_and_read_whole_words(kernel):
    count = kernel.frame_count()
    for name in ("kpageflags", "kpagecount", "kpagecgroup"):
        assert len(kernel.pread(name, (count - 1) * 8, 16)) == 8
        assert kernel.pread(name, count * 8, 8) == b""
        assert kernel.pread(name, 1 << 62, 8) == b""
        for offset, length in ((1, 8), (8, 9), (4, 4)):
            with pytest.raises(InvalidArgument):
                kernel.pread(name, offset, length)


@pytest.mark.rule("KF-011", "KC-004")
@pytest.mark.procfs_only
def test_free_blocks_show_buddy_on_every_page(kernel, needs):
    needs("kpageflags.buddy_all_pages")
    flags = kernel.kpageflags()
    buddy = int(flags.has(PageFlag.BUDDY).sum())
    blocks = sum(
        int(number)
        for line in Path("/proc/buddyinfo").read_text().splitlines()
        for number in line.split()[4:]
    )
    assert buddy > 2 * blocks
    free = np.flatnonzero(flags.has(PageFlag.BUDDY))[::4097]
    still = kernel.kpageflags(int(free[0]), 1).has(PageFlag.BUDDY)[0]
    if still:
        assert int(kernel.kpagecount(int(free[0]), 1)[0]) == 0


@pytest.mark.rule("KF-027")
def test_page_tables_are_frames_too(task, area, kernel):
    def tables() -> int:
        return int(kernel.kpageflags().has(PageFlag.PGTABLE).sum())

    before = tables()
    start = area(512 * 2000)
    task.touch(start, 512 * 2000 * PAGE, step=512 * PAGE)
    assert tables() >= before + 1500


@pytest.mark.rule("KF-008", "KF-047", "KF-048", "KF-016", "KF-017", "KF-050")
def test_slab_and_compound_frames(kernel, needs):
    needs("kpageflags.folio_flags")
    flags = kernel.kpageflags()
    slab = flags.has(PageFlag.SLAB)
    assert slab.any()
    assert (slab & flags.has(PageFlag.COMPOUND_TAIL)).any()
    other = flags.any(PageFlag.COMPOUND_HEAD | PageFlag.COMPOUND_TAIL) & ~flags.any(
        PageFlag.HUGE | PageFlag.THP
    )
    assert other.any()


@pytest.mark.rule("KF-028", "KF-002", "KF-021")
def test_reserved_frames_and_flags_that_are_not_set(kernel):
    flags = kernel.kpageflags()
    assert flags.has(PageFlag.RESERVED).any()
    assert not flags.has(PageFlag.ERROR).any()
    if not kernel.profile.has("kpageflags.nopage"):
        assert not flags.has(PageFlag.NOPAGE).any()


@pytest.mark.rule("KF-022")
def test_anonymous_pages_show_ksm_by_chance_only(task, area, look, kernel):
    start = area(8)
    for page in range(8):
        task.write(start + page * PAGE, bytes([page + 1]))
    _, flags, _ = look(task, start, 8)
    everywhere = kernel.profile.has("quirk.ksm_on_every_anon")
    assert flags.has(PageFlag.KSM).tolist() == [everywhere] * 8


@pytest.mark.rule("KF-003", "KF-007")
def test_file_pages_become_referenced_and_active(task, area, look):
    fd = task.open_file("active")
    task.pwrite(fd, bytes(PAGE), 0)
    start = area(1, flags=1, fd=fd)
    for _ in range(6):
        task.pread(fd, 1, 0)
        task.pread(fd, 1, PAGE // 2)
    task.read(start, 1)
    _, flags, _ = look(task, start, 1)
    assert flags.any(PageFlag.ACTIVE | PageFlag.REFERENCED)[0]


@pytest.mark.rule("KF-005", "KF-009", "KF-004")
def test_file_pages_are_dirty_until_written_out(task, area, look):
    fd = task.open_file("dirty")
    task.ftruncate(fd, PAGE)
    start = area(1, flags=1, fd=fd)
    task.write(start, b"new")
    task.msync(start, PAGE, 1)
    task.pwrite(fd, b"newer", 0)
    _, flags, _ = look(task, start, 1)
    assert flags.has(PageFlag.DIRTY | PageFlag.UPTODATE)[0]
    task.fsync(fd)
    _, flags, _ = look(task, start, 1)
    assert not flags.any(PageFlag.DIRTY | PageFlag.WRITEBACK)[0]


@pytest.mark.rule("KG-001", "KG-003")
@pytest.mark.procfs_only
def test_cgroup_of_a_frame(task, area, kernel, needs):
    needs("kpagecgroup")
    lines = Path(f"/proc/{task.pid}/cgroup").read_text().splitlines()
    roots = {"memory": Path("/sys/fs/cgroup/memory"), "": Path("/sys/fs/cgroup")}
    found = None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") or (controllers == "" and found is None):
            directory = roots["memory" if controllers else ""] / path.lstrip("/")
            found = directory if directory.is_dir() else found
    if found is None:
        pytest.skip("the task's memory cgroup is not mounted where it can be seen")
    start = area(1)
    task.write(start, b"x")
    pfn = int(task.process.pagemap(start, start + PAGE).pfn[0])
    assert int(kernel.kpagecgroup(pfn, 1)[0]) == found.stat().st_ino


@pytest.mark.rule("ID-011")
@pytest.mark.procfs_only
def test_without_the_option_there_is_no_idle_bitmap(kernel):
    """The capability says what is there; asking for what is not says which option is missing."""
    there = Path(IDLE_BITMAP).exists()
    assert kernel.profile.has("page_idle") == there
    if there:
        assert len(kernel.pread(IDLE_BITMAP, 0, 8)) == 8
        return
    for call in (
        lambda: kernel.pread(IDLE_BITMAP, 0, 8),
        lambda: kernel.pwrite(IDLE_BITMAP, 0, bytes(8)),
        lambda: kernel.mark_idle(np.ones(1, dtype=np.uint64)),
    ):
        with pytest.raises(Missing, match="CONFIG_IDLE_PAGE_TRACKING"):
            call()
