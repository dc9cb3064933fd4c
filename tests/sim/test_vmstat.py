"""vmstat and pagetypeinfo of the simulated machine: pages by their frames, events by what was done."""

from __future__ import annotations

import pytest

import pmcore
from pmcore import PageFlag
from pmcore.procview import ProcView
from pmcore.uapi import Madvise

PAGE, PMD = 4096, 1 << 21


def vmstat(machine):
    return {
        name: int(value)
        for name, value in (
            line.split() for line in machine.pread("vmstat", 0, 1 << 20).decode().splitlines()
        )
    }


def changes(machine, call):
    before = vmstat(machine)
    call()
    after = vmstat(machine)
    assert after.keys() == before.keys()
    machine.check()
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


@pytest.fixture
def machine():
    with pmcore.open(
        "sim", memory="64 MiB", swap="32 MiB", kernel="6.12", policy={"pmd": "madvise"}
    ) as machine:
        yield machine


@pytest.mark.rule("FS-015")
def test_pages_are_those_of_kpageflags_and_meminfo(machine):
    task = machine.spawn()
    start = task.mmap(64 * PAGE)
    task.touch(start, 64 * PAGE)
    task.mlock(start, 3 * PAGE)
    fd, shared = task.open_file("f", pages=20), task.memfd_create("s")
    task.pread(fd, 20 * PAGE, 0)
    task.pwrite(fd, b"x", 0)
    task.pwrite(shared, b"x" * 5 * PAGE, 0)
    task.touch(task.mmap(8 * PAGE, flags=1, fd=fd), 8 * PAGE, write=False)
    found, flags = vmstat(machine), machine.kpageflags()
    assert found["nr_free_pages"] == int(flags.has(PageFlag.BUDDY).sum())
    assert found["nr_anon_pages"] == 64
    assert found["nr_file_pages"] == 25
    assert found["nr_mapped"] == 8 == int((flags.has(PageFlag.MMAP) & ~flags.has(PageFlag.ANON)).sum())
    assert found["nr_shmem"] == 5
    assert found["nr_mlock"] == 3 == found["nr_unevictable"]
    assert found["nr_dirty"] == 1
    lists = sum(found[f"nr_{way}_{kind}"] for way in ("active", "inactive") for kind in ("anon", "file"))
    assert lists + found["nr_unevictable"] == int(flags.has(PageFlag.LRU).sum())
    assert found["nr_page_table_pages"] == int(flags.has(PageFlag.PGTABLE).sum())
    meminfo = dict(line.split(":") for line in machine.pread("meminfo", 0, 1 << 20).decode().splitlines())
    for name, line in (("nr_free_pages", "MemFree"), ("nr_file_pages", "Cached"), ("nr_shmem", "Shmem")):
        assert int(meminfo[line].split()[0]) == 4 * found[name]
    task.fsync(fd)
    assert vmstat(machine)["nr_dirty"] == 0


@pytest.mark.rule("FS-015")
def test_events_of_huge_pages(machine):
    task = machine.spawn()
    start = task.mmap(4 * PMD, addr=1 << 40, flags=0x32)
    task.madvise(start, 2 * PMD, Madvise.HUGEPAGE)
    found = changes(machine, lambda: task.touch(start, 2 * PMD))
    assert (found["thp_fault_alloc"], found["nr_anon_transparent_hugepages"]) == (2, 2)
    assert found["nr_anon_pages"] == 1024 == -found["nr_free_pages"] - found.get("nr_page_table_pages", 0)
    found = changes(machine, lambda: task.mprotect(start, PAGE, 1))
    assert found["thp_split_pmd"] == 1
    assert "thp_split_page" not in found
    found = changes(machine, lambda: task.madvise(start + PMD, PAGE, Madvise.PAGEOUT))
    assert (found["thp_split_pmd"], found["thp_split_page"]) == (1, 1)
    assert found["nr_anon_transparent_hugepages"] == -1
    task.touch(start + 2 * PMD, PMD)
    assert (
        changes(machine, lambda: task.madvise(start + 2 * PMD, PMD, Madvise.COLLAPSE))["thp_collapse_alloc"]
        == 1
    )
    task.madvise(start + 3 * PMD, PMD, Madvise.HUGEPAGE)
    assert (
        changes(machine, lambda: task.touch(start + 3 * PMD, PAGE, write=False))["thp_zero_page_alloc"] == 1
    )


@pytest.mark.rule("FS-015")
@pytest.mark.parametrize(("kind", "moved"), [("device", 7), ("disk", 7), ("compressed", 0)])
def test_swapping_counts_what_a_device_does(kind, moved):
    """Eight pages, of which one is zeros and is noted, not written."""
    with pmcore.open("sim", memory="64 MiB", swap="32 MiB", swap_kind=kind, kernel="6.12") as machine:
        task = machine.spawn()
        start = task.mmap(8 * PAGE)
        task.touch(start, 8 * PAGE)
        for page in range(7):
            task.write(start + page * PAGE, b"x")
        assert (
            changes(machine, lambda: task.madvise(start, 8 * PAGE, Madvise.PAGEOUT)).get("pswpout", 0)
            == moved
        )
        machine.reclaim(100)
        assert not task.process.pagemap(start, start + 8 * PAGE).present.any()
        assert changes(machine, lambda: task.touch(start, 8 * PAGE, write=False)).get("pswpin", 0) == moved


@pytest.mark.rule("FS-015")
def test_lazily_freed_pages(machine):
    task = machine.spawn()
    start = task.mmap(8 * PAGE)
    task.touch(start, 8 * PAGE)
    task.madvise(start, 4 * PAGE, Madvise.FREE)
    assert changes(machine, lambda: machine.reclaim(4))["pglazyfreed"] == 4


@pytest.mark.rule("FS-016")
def test_nothing_by_migrate_type(machine):
    view = ProcView(machine)
    assert view.node("/proc/pagetypeinfo").mode == 0o100400
    lines = machine.pread("pagetypeinfo", 0, 1 << 20).decode().splitlines()
    assert lines[:3] == ["Page block order: 9", "Pages per block:  512", ""]
    assert lines[3].split()[-11:] == [str(order) for order in range(11)]
    assert len(lines) == 4
