"""Rules FS-: files of /proc as bytes at offsets, on the running kernel and through the view of a simulated machine."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import pytest

from pmcore.errors import AddressSpaceFault
from pmcore.procmap import MapQuery
from pmcore.procview import ProcView
from pmcore.procview.sequence import SequenceReader
from pmcore.uapi import PAGEMAP_SCAN, PROCMAP_QUERY, Prot

from .conftest import PAGE, PMD


class RealFile:
    """A file of the running kernel, called as one of a view."""

    def __init__(self, fd):
        self.fd = fd

    def __del__(self):
        os.close(self.fd)

    def read(self, offset, size):
        return os.pread(self.fd, size, offset)

    def write(self, offset, data):
        return os.write(self.fd, data)  # pwrite to a text is ESPIPE

    def ioctl(self, command, argument, memory):
        import fcntl

        return fcntl.ioctl(self.fd, command, argument)


@pytest.fixture
def opened(bench, task):
    """Open a file of the task, or of the machine where the name begins with a slash."""
    view = None if bench.kernel.name == "procfs" else ProcView(bench.kernel)

    def open_it(name, flags=os.O_RDONLY):
        path = name if name.startswith("/") else f"/proc/{task.pid}/{name}"
        return RealFile(os.open(path, flags)) if view is None else view.open(path, flags)

    return open_it


@pytest.fixture
def status(bench, task):
    view = None if bench.kernel.name == "procfs" else ProcView(bench.kernel)

    def ask(name):
        path = name if name.startswith("/") else f"/proc/{task.pid}/{name}"
        if view is None:
            found = Path(path).stat()
            return found.st_mode, found.st_size
        return view.node(path).mode, view.node(path).size

    return ask


def refused(call, *arguments):
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


@pytest.mark.rule("FS-001")
def test_sizes_and_permissions(bench, status):
    modes = {"pagemap": 0o400, "maps": 0o444, "smaps": 0o444, "clear_refs": 0o200}
    modes |= {"/proc/kpageflags": 0o400, "/proc/kpagecount": 0o400}
    for name, mode in modes.items():
        assert status(name) == (stat.S_IFREG | mode, 0), name


@pytest.mark.rule("FS-002", "PM-015")
def test_words_at_offsets(opened, area, task):
    start = area(4)
    task.touch(start, PAGE)
    for name in ("pagemap", "/proc/kpageflags", "/proc/kpagecount"):
        file = opened(name)
        for offset, size in ((4, 8), (0, 7), (4, 0)):
            assert refused(file.read, offset, size) == errno.EINVAL
        assert file.read(0, 0) == b""
        assert file.read(1 << 62, 8) == b""
        assert len(file.read(0, 1 << 18)) == 1 << 18
    words = struct.unpack("=4Q", opened("pagemap").read(start // PAGE * 8, 32))
    assert [word >> 63 for word in words] == [1, 0, 0, 0]


@pytest.mark.rule("FS-003", "FS-010", "AC-009")
def test_what_is_open_of_a_process_that_ended(opened, bench):
    task = bench.spawn()
    start = task.mmap(PAGE)
    task.write(start, b"x")
    file = opened(f"/proc/{task.pid}/pagemap")
    assert len(file.read(start // PAGE * 8, 8)) == 8
    task.exit()
    assert file.read(start // PAGE * 8, 8) == b""
    wrong = bytearray(struct.pack("=12Q", 96, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    right = bytearray(struct.pack("=12Q", 96, 0, start, start + PAGE, 0, 0, 0, 0, 0, 0, 0, 0))
    if not bench.kernel.profile.has("quirk.scan_of_ended"):
        assert refused(file.ioctl, PAGEMAP_SCAN, wrong, None) == errno.ESRCH
        assert refused(file.ioctl, PAGEMAP_SCAN, right, None) == errno.ESRCH
        return
    assert file.ioctl(PAGEMAP_SCAN, right, None) == 0
    assert struct.unpack_from("=Q", right, 32)[0] == start + PAGE
    assert refused(file.ioctl, PAGEMAP_SCAN, wrong, None) == errno.EINVAL


def sizes_read(file, sizes):
    position, found = 0, []
    for size in sizes:
        piece = file.read(position, size)
        position += len(piece)
        found.append(len(piece))
    return found


@pytest.mark.rule("FS-004", "FS-005")
@pytest.mark.parametrize("name", ["maps", "smaps"])
def test_texts_come_in_whole_records(opened, area, task, name):
    """The view's reader cuts the text that the kernel gives where the kernel cuts it."""
    from pmcore.procview.files import RECORDS

    for number in range(80):
        area(1 + number % 3, flags=0x22 if number % 2 else 0x21)
    file, text = opened(name), b""
    while piece := file.read(len(text), 1 << 20):
        text += piece
    for sizes in (
        [1 << 20] * 60,
        [100, 50, 5000, 3000, 1 << 20, 700, 1 << 20, 1, 4096, 4095, 4097] * 3,
        [1] * 200 + [1 << 20] * 3,
        [1000, 1 << 20] * 20,
        [3000] * 40,
    ):
        reader = SequenceReader(lambda: RECORDS[name](text), buffer=PAGE)
        assert sizes_read(opened(name), sizes) == sizes_read(reader, sizes)
    file = opened(name)
    assert file.read(0, 60) == text[:60]
    assert file.read(7, 30) == text[7:37]


@pytest.mark.rule("FS-006")
def test_numbers_written_to_clear_refs(opened):
    file = opened("clear_refs", os.O_WRONLY)
    for data in (
        *(b"1", b"2\n", b" 3 ", b"+1", b"4", b"5", b"1            ", b"000000000001", b"1\0junk"),
        *(b"-1", b"0", b"6", b"0x1", b"", b"1 2", b"0000000000001", b"99999999999", b"-99999999999", b"++1"),
    ):
        expected = {
            b"1            ": 12,
            b"99999999999": errno.ERANGE,
            b"-99999999999": errno.ERANGE,
        }
        refusals = (b"-1", b"0", b"6", b"0x1", b"", b"1 2", b"0000000000001", b"++1")
        if data in refusals or data.strip(b"-") == b"99999999999":
            assert refused(file.write, 0, data) == expected.get(data, errno.EINVAL), data
        else:
            assert file.write(0, data) == expected.get(data, len(data)), data


@pytest.mark.rule("FS-014")
def test_writing_to_what_takes_nothing(opened):
    for name, number in (
        ("pagemap", errno.EINVAL),
        ("maps", errno.EINVAL),
        ("smaps_rollup", errno.EINVAL),
        ("status", errno.EINVAL),
        ("/proc/kpageflags", errno.EIO),
        ("/proc/meminfo", errno.EIO),
    ):
        assert refused(opened(name, os.O_RDWR).write, 0, b"12345678") == number, name
    assert refused(opened, "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", os.O_RDWR) == errno.EACCES


@pytest.mark.rule("FS-007")
def test_unknown_ioctls(opened):
    argument = bytearray(96)
    assert refused(opened("pagemap").ioctl, PROCMAP_QUERY, bytearray(104), None) == errno.EINVAL
    for name in ("maps", "smaps", "/proc/kpageflags"):
        assert refused(opened(name).ioctl, PAGEMAP_SCAN, argument, None) == errno.ENOTTY


def text_of(file):
    text = b""
    while piece := file.read(len(text), 1 << 20):
        text += piece
    return text


def kilobytes(text):
    rows = [line.split() for line in text.decode().splitlines()]
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}


@pytest.mark.rule("FS-011")
def test_smaps_rollup(opened, area, task, bench):
    from pmcore.smaps import parse_smaps

    task.touch(area(50), 50 * PAGE)
    task.touch(area(9, flags=0x21), 9 * PAGE)
    task.fork()
    entries = parse_smaps(text_of(opened("smaps")))
    text = text_of(opened("smaps_rollup"))
    [whole] = parse_smaps(text)
    assert (whole.vma.start, whole.vma.name, whole.vma.perms) == (entries[0].vma.start, "[rollup]", "---p")
    assert text.index(b"[rollup]") == 73
    expected = [name for name in entries[0].counters if not name.endswith("Size")]
    expected[3:3] = ["Pss_Anon", "Pss_File", "Pss_Shmem"]
    assert list(whole.counters) == expected
    # A running process's own memory changes between the two looks, as does what others share with it.
    own = 64 * PAGE if bench.kernel.name == "procfs" else 0
    for name in ("Rss", "Anonymous", "LazyFree", "Swap", "Private_Hugetlb", "Referenced"):
        assert abs(whole.counters[name] - sum(e.counters[name] for e in entries)) <= own, name
    parts = sum(whole.counters[f"Pss_{kind}"] for kind in ("Anon", "File", "Shmem"))
    assert abs(parts - whole.counters["Pss"]) <= 3 << 10


@pytest.mark.rule("FS-012")
def test_status_counts_what_the_tables_hold(opened, area, task, bench):
    from pmcore.uapi import Madvise

    task.madvise(area(1), PAGE, Madvise.PAGEOUT)  # a running task's first calls make tables for itself
    before = kilobytes(text_of(opened("status")))
    plain = area(600)
    task.touch(plain, 600 * PAGE)
    shared = area(7, flags=0x21)
    task.touch(shared, 7 * PAGE)
    zero = area(5)
    task.touch(zero, 5 * PAGE, write=False)
    area(3, prot=1)
    swapped = 0
    if any(line for line in text_of(opened("/proc/swaps")).splitlines()[1:]):
        task.madvise(plain, 40 * PAGE, Madvise.PAGEOUT)
        bench.settle()
        swapped = int(task.process.pagemap(plain, plain + 40 * PAGE).swapped.sum())
    after = kilobytes(text_of(opened("status")))
    change = {name: after[name] - before[name] for name in before if name in after}
    kb = PAGE >> 10
    # A running task has memory of its own, which changes a little meanwhile.
    own = 40 * kb if bench.kernel.name == "procfs" else 0
    for name, pages in (
        ("RssAnon", 600 - swapped),
        ("RssShmem", 7),
        ("RssFile", 0),
        ("VmRSS", 607 - swapped),
        ("VmSwap", swapped),
        ("VmSize", 600 + 7 + 5 + 3),
        ("VmData", 600 + 5),
    ):
        # Of libraries it faults in some more on its way.
        if not own or name not in ("RssFile", "VmRSS"):
            assert abs(change[name] - pages * kb) <= own, name
    # Areas in page tables of their own: four tables of PTEs, three of PMDs, one of PUDs where there was none.
    assert change["VmPTE"] - 7 * kb in (0, kb)
    statm = [int(field) for field in text_of(opened("statm")).split()]
    assert statm[0] * kb == after["VmSize"]
    assert statm[1] * kb == after["VmRSS"]


def queried(task, address, **more):
    """What PROCMAP_QUERY says, or the errno."""
    try:
        return task.process.query_maps(MapQuery(address=address, **more))
    except OSError as error:
        return error.errno


@pytest.mark.rule("AC-014", "AC-017")
def test_what_procmap_query_refuses(task, area, needs):
    """By size, flags, room for a name and place for it; the name first counts where there is one."""
    needs("maps.procmap_query")
    start = area(2)
    fd = task.memfd_create("name")
    task.ftruncate(fd, PAGE)
    file = area(1, flags=1, fd=fd)
    name = len("/memfd:name (deleted)") + 1
    for address, query, expected in (
        (start, {"size": 4097}, errno.E2BIG),
        (start, {"size": 23}, errno.EINVAL),
        (start, {"flags": 64}, errno.EINVAL),
        (start, {"flags": 1 << 63}, errno.EINVAL),
        (start - PAGE, {}, errno.ENOENT),
        (start + 2 * PAGE, {}, errno.ENOENT),
        (file, {"name_room": name - 1}, errno.ENAMETOOLONG),
        (start - PAGE, {"name_room": 1}, errno.ENOENT),
        (start - PAGE, {"size": 23, "flags": 64}, errno.EINVAL),
    ):
        assert queried(task, address, **query) == expected, query
    for size in (24, 40, 104, 4096):
        assert not isinstance(queried(task, start, size=size), int), size
    assert queried(task, file, name_room=name).name == b"/memfd:name (deleted)"
    assert queried(task, start, name_room=1).name_size == 0
    for address in (start, file):
        assert queried(task, address, build_id_room=1).build_id_size == 0


@pytest.mark.rule("AC-013", "AC-015", "AC-016")
def test_what_procmap_query_answers(task, area, needs):
    needs("maps.procmap_query")
    fd = task.memfd_create("name")
    task.ftruncate(fd, 8 * PAGE)
    start = area(4)
    task.mprotect(start + PAGE, PAGE, 1)
    file = task.mmap(2 * PAGE, addr=start + (64 << 20), flags=1 | 0x100000, fd=fd, offset=3 * PAGE)
    shared = area(1, flags=0x21)
    found = queried(task, start + 2 * PAGE + 5, name_room=4096)
    assert (found.start, found.end, found.permissions) == (start + 2 * PAGE, start + 4 * PAGE, 3)
    assert (found.offset, found.inode, found.name_size, found.page_size) == (0, 0, 0, PAGE)
    assert queried(task, start + PAGE).permissions == 1
    assert queried(task, start + PAGE, flags=2) == errno.ENOENT
    assert queried(task, start + PAGE, flags=16 | 2).start == start + 2 * PAGE
    assert queried(task, start, flags=16 | 8).start == file
    found = queried(task, start, flags=16 | 32, name_room=4096)
    assert (found.start, found.permissions, found.offset) == (file, 11, 3 * PAGE)
    assert found.inode
    assert found.name_size == len(found.name) + 1
    assert queried(task, shared, flags=32).permissions == 11
    maps = {vma.start: vma for vma in task.process.maps()}
    assert found.vma() == maps[file]
    by_query = task.process.maps_by_query()
    end = task.process.kernel.geometry.task_size
    kept = [vma for vma in maps.values() if vma.start < end]
    # maps shows an offset of anonymous memory, too; and a name that the kernel makes up comes with neither.
    assert [(v.start, v.end, v.perms, v.inode, v.name) for v in by_query] == [
        (v.start, v.end, v.perms, v.inode, v.name) for v in kept
    ]


@pytest.mark.rule("AC-017")
@pytest.mark.procfs_only
def test_build_ids_of_files_that_have_them(task, needs):
    needs("maps.procmap_query")
    sizes = set()
    for vma in task.process.maps():
        if not vma.executable or not vma.name.startswith("/"):
            continue
        found = task.process.query_maps(MapQuery(address=vma.start, build_id_room=64)).build_id_size
        sizes.add(found)
        if found:
            assert queried(task, vma.start, build_id_room=found - 1) == errno.ENAMETOOLONG
    assert sizes <= {0, 16, 20}


def vmstat(bench):
    refresh = Path("/proc/sys/vm/stat_refresh")
    if bench.kernel.name == "procfs" and os.access(refresh, os.W_OK):
        refresh.write_text("1")  # processors keep some counts to themselves for a while
    lines = bench.kernel.pread("vmstat", 0, 1 << 20).decode().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


@pytest.mark.rule("FS-015")
def test_what_vmstat_counts_of_huge_and_locked_pages(bench, task, area, needs):
    """By differences. Others do the like meanwhile: once in ten tries nobody did."""
    needs("mm.thp")
    names = ("thp_fault_alloc", "thp_split_pmd", "nr_anon_transparent_hugepages", "nr_mlock")
    tries = []
    for _ in range(10):
        bench.settle()
        before = vmstat(bench)
        start = area(4 * 512, huge=True)
        task.touch(start, 4 * PMD)
        task.mprotect(start, PAGE, 1)
        locked = area(100)
        task.mlock(locked, 100 * PAGE)
        bench.settle()
        after = vmstat(bench)
        task.munmap(start, 4 * PMD)
        task.munmap(locked, 100 * PAGE)
        tries.append([after[name] - before[name] for name in names])
        if tries[-1] == [4, 1, 3, 100]:
            break
    assert tries[-1] == [4, 1, 3, 100], tries


@pytest.mark.rule("FS-016")
def test_pagetypeinfo(bench, status):
    assert status("/proc/pagetypeinfo") == (stat.S_IFREG | 0o400, 0)
    lines = bench.kernel.pread("pagetypeinfo", 0, 1 << 20).decode().splitlines()
    assert lines[:3] == ["Page block order: 9", "Pages per block:  512", ""]
    assert lines[3].split()[-12:] == ["order", *map(str, range(11))]


@pytest.mark.rule("VM-035")
def test_memory_that_may_only_be_executed(bench, task):
    start = task.mmap(2 * PAGE)
    task.write(start, b"code")
    task.mprotect(start, PAGE, Prot.EXEC)
    keys = bench.kernel.profile.has("smaps.protection_key")
    shown = [entry.plain.get("ProtectionKey") for entry in task.process.smaps(start, start + 2 * PAGE)]
    assert shown == ([1, 0] if keys else [None, None])
    if not keys:
        assert task.read(start, 4) == b"code"
        return
    with pytest.raises(AddressSpaceFault) as failed:
        task.read(start, 4)
    assert failed.value.signal == "SIGSEGV"
    task.mprotect(start, PAGE, Prot.READ | Prot.EXEC)
    assert task.read(start, 4) == b"code"


@pytest.mark.rule("FS-017")
def test_memory_blocks(bench, opened, status):
    """The size in hexadecimal, the state of each block, its number; what is no state is refused."""
    directory = Path("/sys/devices/system/memory")
    if bench.kernel.name == "procfs" and not (directory / "block_size_bytes").exists():
        pytest.skip("this kernel has no memory blocks")
    size = opened(f"{directory}/block_size_bytes").read(0, 100)
    assert int(size, 16) == bench.block_size if bench.kernel.name == "sim" else int(size, 16) >= 1 << 20
    assert size == b"%x\n" % int(size, 16)
    assert status(f"{directory}/block_size_bytes") == (stat.S_IFREG | 0o444, 4096)
    assert status(f"{directory}/memory0/state") == (stat.S_IFREG | 0o644, 4096)
    assert opened(f"{directory}/memory0/state").read(0, 100) == b"online\n"
    assert opened(f"{directory}/memory0/phys_index").read(0, 100) == b"00000000\n"
    for word in (b"of", b"offlinex", b"1", b"offline\n\n", b""):
        file = opened(f"{directory}/memory0/state", os.O_WRONLY)
        if word:
            assert refused(file.write, 0, word) == errno.EINVAL, word
    assert refused(opened, f"{directory}/memory0/phys_index", os.O_WRONLY) == errno.EACCES
    assert refused(opened, f"{directory}/memory99999999/state") == errno.ENOENT


@pytest.mark.rule("FS-018")
def test_files_of_ksm(bench, opened, status, needs):
    """What the simulated machine has of them, the kernel has: a number each."""
    needs("mm.ksm")
    from pmcore.registry import open_workbench

    simulated = ProcView(open_workbench("sim", memory="16 MiB", kernel=bench.kernel.profile))
    names = simulated.node("/sys/kernel/mm/ksm").names()
    assert {"run", "pages_shared", "pages_sharing", "full_scans"} <= set(names)
    for name in names:
        text = opened(f"/sys/kernel/mm/ksm/{name}").read(0, 100)
        assert text == b"%d\n" % int(text), name
        assert status(f"/sys/kernel/mm/ksm/{name}")[1] == 4096
