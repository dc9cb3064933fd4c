"""Texts of /proc and /sys of a simulated machine: what they count, against what the tables and frames show."""

from __future__ import annotations

import errno

import pytest

import pmcore
from pmcore.errors import Missing, NotSupported
from pmcore.procmap import MapQuery
from pmcore.procview import ProcView
from pmcore.protocols import HEAP
from pmcore.smaps import parse_smaps
from pmcore.uapi import Madvise

PAGE, KB = 4096, 1024


def numbers(text):
    """Name -> number, of lines that are a name, a colon and a number."""
    rows = [line.split() for line in text.decode().splitlines()]
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


@pytest.fixture
def machine():
    return pmcore.open(
        "sim",
        memory="64 MiB",
        swap="8 MiB",
        hugepages={"2 MiB": 4},
        policy={"pmd": "always", "thp_sizes": {"64kB": "madvise"}},
    )


@pytest.fixture
def task(machine):
    """Anonymous memory, a huge page, shmem, hugetlb, swap, a page that is shared by fork."""
    task = machine.spawn()
    start = task.mmap(40 * PAGE)
    task.touch(start, 40 * PAGE)
    task.madvise(start, 8 * PAGE, Madvise.PAGEOUT)
    task.touch(start + 4 * PAGE, PAGE, write=False)
    huge = task.mmap(4 << 20, addr=0x4000_0000_0000)
    task.touch(huge, 1 << 20)
    task.mlock(start + 20 * PAGE, PAGE)
    fd = task.memfd_create("m")
    task.ftruncate(fd, 16 * PAGE)
    shared = task.mmap(16 * PAGE, addr=0x5000_0000_0000, flags=1, fd=fd)
    task.touch(shared, 5 * PAGE)
    pool = task.mmap(2 << 20, flags=0x40022)
    task.touch(pool, PAGE)
    zero = task.mmap(PAGE, addr=0x6000_0000_0000)
    task.touch(zero, PAGE, write=False)
    task.fork()
    return task


@pytest.mark.rule("FS-011", "FS-012")
def test_texts_of_a_process_agree_with_smaps(machine, task):
    """The rollup is the sum of smaps, status and statm say the same as both, and as the tables."""
    entries = task.process.smaps()

    def total(name):
        return sum(entry.counters[name] for entry in entries)

    [rollup] = parse_smaps(task.process.pread("smaps_rollup", 0, 1 << 16))
    assert (rollup.vma.start, rollup.vma.end) == (entries[0].vma.start, entries[-1].vma.end)
    assert rollup.vma.name == "[rollup]"
    for name in set(rollup.counters) & set(entries[0].counters):
        slack = len(entries) * KB if "Pss" in name or name == "Locked" else 0
        assert abs(rollup.counters[name] - total(name)) <= slack, name
    parts = sum(rollup.counters[f"Pss_{kind}"] for kind in ("Anon", "File", "Shmem"))
    assert abs(parts - rollup.counters["Pss"]) <= 3 * KB
    assert rollup.plain == {}
    status = numbers(task.process.pread("status", 0, 1 << 16))
    assert status["VmRSS"] * KB == total("Rss") == (status["RssAnon"] + status["RssShmem"]) * KB
    assert status["RssShmem"] * KB == 5 * PAGE
    assert status["VmSwap"] * KB == total("Swap") > 0
    assert status["VmSize"] * KB == total("Size")
    assert status["VmLck"] * KB == PAGE
    assert status["HugetlbPages"] * KB == 2 << 20
    statm = [int(field) for field in task.process.pread("statm", 0, 100).split()]
    assert statm[:3] == [total("Size") // PAGE, total("Rss") // PAGE, 5]
    assert statm[5] * PAGE == status["VmData"] * KB
    assert task.process.pread("cmdline", 0, 100) == b"task-1\0"


@pytest.mark.rule("FS-013")
def test_texts_of_the_machine_agree_with_its_frames(machine, task):
    """Free blocks, LRU lists, tables, swap and pools, as the other views show them."""
    memory = numbers(machine.pread("meminfo", 0, 1 << 16))
    flags = machine.kpageflags()
    from pmcore.uapi import PageFlag

    def pages(*having, lacking=()):
        chosen = flags.has(having[0])
        for flag in having[1:]:
            chosen &= flags.has(flag)
        for flag in lacking:
            chosen &= ~flags.has(flag)
        return int(chosen.sum()) * PAGE // KB

    assert memory["MemFree"] == pages(PageFlag.BUDDY)
    free = 0
    for line in machine.pread("buddyinfo", 0, 1 << 16).decode().splitlines():
        words = line.split()
        assert words[0] == "Node"
        free += sum(int(count) << order for order, count in enumerate(words[4:]))
    assert free * PAGE // KB == memory["MemFree"]
    assert memory["Active"] + memory["Inactive"] + memory["Unevictable"] == pages(PageFlag.LRU)
    assert memory["Unevictable"] == memory["Mlocked"] == 4
    assert memory["AnonPages"] == pages(PageFlag.ANON, PageFlag.MMAP, lacking=[PageFlag.HUGE])
    assert memory["Shmem"] == memory["Cached"] == 5 * PAGE // KB
    assert memory["Mapped"] == memory["Shmem"]
    assert memory["PageTables"] == pages(PageFlag.PGTABLE)
    assert memory["AnonHugePages"] == 2048
    assert (memory["HugePages_Total"], memory["HugePages_Free"]) == (4, 3)
    [area] = machine.swaps()
    assert memory["SwapTotal"] - memory["SwapFree"] == area.used // KB > 0
    swaps = machine.pread("swaps", 0, 1 << 16).decode().splitlines()
    assert swaps[1].split()[1:] == ["file", str(area.size // KB), str(area.used // KB), str(area.priority)]


@pytest.mark.rule("FS-001", "FS-008")
def test_files_of_sysfs(machine):
    """Settings of huge pages, pools and KSM; 4096 bytes long as all of sysfs, not writable; nothing else."""
    view = ProcView(machine)
    where = "/sys/kernel/mm/transparent_hugepage"

    def read(path):
        return view.open(path).read(0, 4096).decode()

    assert read(f"{where}/enabled") == "[always] madvise never\n"
    assert read(f"{where}/hpage_pmd_size") == "2097152\n"
    assert read(f"{where}/hugepages-64kB/enabled") == "always inherit [madvise] never\n"
    assert read(f"{where}/hugepages-2048kB/enabled") == "always [inherit] madvise never\n"
    assert read(f"{where}/khugepaged/max_ptes_none") == "511\n"
    assert read("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages") == "4\n"
    assert view.node(f"{where}/enabled").size == 4096
    assert sorted(view.node("/sys/kernel/mm").names()) == [
        "hugepages",
        "ksm",
        "page_idle",
        "transparent_hugepage",
    ]
    assert view.node("/sys/kernel").is_dir
    for path in (f"{where}/defrag", f"{where}/hugepages-8kB", "/sys/kernel/mm/lru_gen", "/sys/x"):
        with pytest.raises(Missing):
            view.node(path)
    with pytest.raises(OSError) as caught:
        view.open(f"{where}/enabled", 1)
    assert caught.value.errno == errno.EACCES


def test_texts_by_kernel():
    """A file that the kernel does not have yet is not there; no swap, no tasks, no huge pages."""
    machine = pmcore.open("sim", memory="16 MiB", kernel="4.4")
    view = ProcView(machine)
    task = machine.spawn()
    assert "smaps_rollup" not in view.node("/proc/1").names()
    with pytest.raises(Missing):
        task.process.pread("smaps_rollup", 0, 1)
    assert not [name for name in view.kernel.files() if "kB/enabled" in name]
    assert machine.pread("swaps", 0, 1000).decode().count("\n") == 1
    assert "Linux version 4.4 " in machine.pread("version", 0, 1000).decode()
    modern = pmcore.open("sim", memory="16 MiB").spawn()
    text = modern.process.pread("smaps_rollup", 0, 1000)
    assert text.startswith(b"00000000-00000000 ---p 00000000 00:00 0 ")


def test_zones_and_holes_in_buddyinfo():
    """One line a zone and node, divided by a hole or not."""
    machine = pmcore.open("sim", memory="6 GiB", nodes=2, holes=[("1 GiB", "2 GiB")])
    lines = machine.pread("buddyinfo", 0, 1000).decode().splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["Node", "0,", "zone", "DMA32"],
        ["Node", "1,", "zone", "DMA32"],
        ["Node", "1,", "zone", "Normal"],
    ]
    blocks = sum(int(n) << i for line in lines for i, n in enumerate(line.split()[4:]))
    assert blocks * PAGE // KB == numbers(machine.pread("meminfo", 0, 4000))["MemFree"]


@pytest.mark.rule("AC-013", "AC-015")
def test_maps_by_query():
    """The same VMAs as the text; without the call it is refused."""
    with pmcore.open("sim", memory="16 MiB", kernel="6.12", hugepages={"2 MiB": 1}) as machine:
        task = machine.spawn()
        task.brk(HEAP + 8192)
        task.mmap(4096, flags=0x21)
        huge = task.mmap(2 << 20, flags=0x40022)
        fd = task.memfd_create("a")
        task.mmap(8192, flags=1, fd=fd)
        maps = task.process.maps()
        assert [(v.start, v.perms, v.inode, v.name) for v in task.process.maps_by_query()] == [
            (v.start, v.perms, v.inode, v.name) for v in maps
        ]
        assert task.process.query_maps(MapQuery(address=huge + 5)).page_size == 2 << 20
    with pmcore.open("sim", memory="16 MiB", kernel="6.10") as machine:
        process = machine.spawn().process
        with pytest.raises(NotSupported):
            process.maps_by_query()
