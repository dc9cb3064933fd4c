"""The tree of paths over a simulated machine and a recording: what opening, reading, writing and ioctl of them do."""

from __future__ import annotations

import errno
import os
import struct

import numpy as np
import pytest

import pmcore
from pmcore.errors import NotModelled
from pmcore.procview import Opener, ProcView
from pmcore.profile import preset
from pmcore.protocols import IDLE_BITMAP
from pmcore.recording import record
from pmcore.scan import ScanRequest
from pmcore.uapi import PAGEMAP_SCAN, PM_PFRAME_MASK, PROCMAP_QUERY, PageCategory
from pmcore.vma import parse_maps

PAGE = 4096
USER = Opener.user(1000)


class Memory:
    """A caller's memory: one buffer at an address."""

    def __init__(self, address=0x5000, size=24 * 64):
        self.address, self.bytes = address, bytearray(size)

    def write(self, address, data):
        place = address - self.address
        if place < 0 or place + len(data) > len(self.bytes):
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        self.bytes[place : place + len(data)] = data


@pytest.fixture
def machine():
    machine = pmcore.open("sim", memory="32 MiB", swap="4 MiB")
    task = machine.spawn()
    start = task.mmap(64 * PAGE)
    task.touch(start, 8 * PAGE)
    task.mprotect(start + 32 * PAGE, PAGE, 1)
    yield machine
    machine.check()


@pytest.fixture
def view(machine):
    return ProcView(machine, self_pid=1)


def refused(call, *arguments):
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def scan_argument(start, end, *, vec=0x5000, vec_len=64, flags=0, masks=(0, 0, 0, 8), most=0, size=96):
    return bytearray(struct.pack("=12Q", size, flags, start, end, 0, vec, vec_len, most, *masks))


@pytest.mark.rule("FS-001")
def test_sizes_and_modes(view):
    """Sizes are 0, modes the kernel's."""
    assert view.node("/proc/1").is_dir
    for path, mode in (
        ("/proc/1/pagemap", 0o100400),
        ("/proc/1/maps", 0o100444),
        ("/proc/1/clear_refs", 0o100200),
        ("/proc/kpageflags", 0o100400),
    ):
        node = view.node(path)
        assert (node.mode, node.size, node.uid) == (mode, 0, 0)
    assert view.node("/proc/self").target == "1"


@pytest.mark.rule("FS-008", "AC-009")
def test_what_is_not_there(machine, view):
    """Unknown processes, names and trees are ENOENT; listing shows what there is."""
    for path in (
        "/proc/9/maps",
        "/proc/01/maps",
        "/proc/1/nothing",
        "/proc/1/maps/x",
        "/proc/nothing",
        "/etc/passwd",
        "/sys/kernel/mm/lru_gen/enabled",
    ):
        assert refused(view.node, path) == errno.ENOENT
    assert refused(ProcView(machine).node, "/proc/self") == errno.ENOENT
    names = view.node("/proc").names()
    assert {"1", "self", "kpageflags", "kpagecount"} <= set(names)
    for name in view.node("/proc/1").names():
        assert not view.node(f"/proc/1/{name}").is_dir
    assert refused(view.node("/proc/1/maps").names) == errno.ENOTDIR
    assert refused(view.open, "/proc/1", os.O_RDWR) == errno.EISDIR


@pytest.mark.rule("ID-001", "ID-002", "ID-003", "ID-011", "FS-001")
def test_the_idle_bitmap(machine, view):
    """Root's, of size 0, read and written in words; where the kernel has none, there is none."""
    node = view.node(IDLE_BITMAP)
    assert (node.mode, node.size, node.uid) == (0o100600, 0, 0)
    assert refused(node.open, os.O_RDONLY, USER) == errno.EACCES == refused(node.open, os.O_WRONLY, USER)
    vma = machine.process(1).maps()[0]
    pfn = int(machine.process(1).pagemap(vma.start, vma.start + PAGE).pfn[0])
    file = node.open(os.O_RDWR)
    assert refused(file.read, 4, 8) == errno.EINVAL == refused(file.write, 0, b"1")
    assert refused(file.write, machine.frame_count() // 8, bytes(8)) == errno.ENXIO
    assert refused(file.ioctl, 1, bytearray(8), None) == errno.ENOTTY
    assert not any(file.read(0, 1 << 20))
    assert file.write(pfn // 64 * 8, (1 << pfn % 64).to_bytes(8, "little")) == 8
    assert int.from_bytes(view.open(IDLE_BITMAP).read(0, 1 << 20), "little") == 1 << pfn
    other = pmcore.open("sim", memory="16 MiB", kernel=pmcore.preset("6.12").changed(remove=["page_idle"]))
    assert refused(ProcView(other).node, IDLE_BITMAP) == errno.ENOENT


@pytest.mark.rule("FS-002", "AC-010")
def test_words(machine, view):
    """Whole words only; nothing behind the end."""
    process = machine.process(1)
    vma = process.maps()[0]
    file = view.open("/proc/self/pagemap")
    data = file.read(vma.start // PAGE * 8, 64)
    assert data == process.pagemap(vma.start, vma.start + 8 * PAGE).values.tobytes()
    for path in ("/proc/1/pagemap", "/proc/kpageflags", "/proc/kpagecount", "/proc/kpagecgroup"):
        file = view.open(path)
        for offset, size in ((4, 8), (0, 7), (4, 0)):
            assert refused(file.read, offset, size) == errno.EINVAL
        assert file.read(1 << 60, 8) == b""
        assert file.read(0, 0) == b""
    frames = machine.frame_count()
    assert len(view.open("/proc/kpageflags").read(0, 1 << 24)) == 8 * frames


@pytest.mark.rule("FS-003", "AC-001", "AC-003", "AC-004")
def test_the_opener_counts(machine):
    """Frame numbers by who opened; other users' processes and the frame files not at all."""
    view = ProcView(machine, owner=1000)
    vma = machine.process(1).maps()[0]
    offset = vma.start // PAGE * 8
    whole, hidden = (
        np.frombuffer(view.open("/proc/1/pagemap", os.O_RDONLY, opener).read(offset, 64), dtype=np.uint64)
        for opener in (Opener(), USER)
    )
    assert (whole & np.uint64(PM_PFRAME_MASK)).all()
    assert (hidden == whole & ~np.uint64(PM_PFRAME_MASK)).all()
    stranger = Opener.user(1001)
    for path in ("/proc/1/pagemap", "/proc/1/maps", "/proc/1/smaps", "/proc/kpageflags"):
        assert refused(view.open, path, os.O_RDONLY, stranger) == errno.EACCES
    assert refused(view.open, "/proc/1/clear_refs", os.O_WRONLY, stranger) == errno.EACCES
    assert refused(view.open, "/proc/kpagecount", os.O_RDONLY, USER) == errno.EACCES
    view.open("/proc/1/clear_refs", os.O_WRONLY, USER).write(0, b"1\n")


@pytest.mark.rule("AC-002")
def test_opening_pagemap_on_old_kernels():
    """4.0 and 4.1 refuse whoever may not see frame numbers, kernels before show them to everybody."""
    for kernel, answer in (("3.10", "shown"), ("4.1", "refused"), ("4.4", "hidden")):
        machine = pmcore.open("sim", memory="16 MiB", kernel=kernel)
        task = machine.spawn()
        start = task.mmap(PAGE)
        task.write(start, b"x")
        view = ProcView(machine, owner=1000)
        if answer == "refused":
            assert refused(view.open, "/proc/1/pagemap", os.O_RDONLY, USER) == errno.EPERM
            continue
        data = view.open("/proc/1/pagemap", os.O_RDONLY, USER).read(start // PAGE * 8, 8)
        word = int.from_bytes(data, "little")
        assert bool(word & PM_PFRAME_MASK & (1 << 40) - 1) == (answer == "shown")


@pytest.mark.rule("FS-004", "FS-005")
def test_texts_come_in_whole_records(machine, view):
    """Reads of maps end at lines, less than a page each; what was cut comes first; at 0 the text is new."""
    task = next(iter(machine.tasks()))
    for number in range(100):
        task.mmap(PAGE, addr=0x2000_0000_0000 + number * 0x10_0000)
    text = machine.process(1).pread("maps", 0, 1 << 30)
    file = view.open("/proc/1/maps")
    pieces, position = [], 0
    while piece := file.read(position, 1 << 20):
        assert len(piece) < PAGE
        assert piece.endswith(b"\n")
        pieces.append(piece)
        position += len(piece)
    assert b"".join(pieces) == text
    assert len(pieces) == -(-len(text) // PAGE)
    assert file.read(0, 10) == text[:10]
    line = text.index(b"\n") + 1
    task.munmap(0x2000_0000_0000, PAGE)
    assert file.read(10, 1 << 20)[: line - 10] == text[10:line]
    assert file.read(0, 1 << 20) != pieces[0]
    whole, parsed = b"", ()
    while piece := file.read(len(whole), 100):
        whole += piece
        parsed = parse_maps(whole[: whole.rindex(b"\n") + 1]) if b"\n" in whole else ()
    assert parsed == machine.process(1).maps()


@pytest.mark.rule("FS-006", "AC-005")
def test_numbers_written_to_clear_refs(view):
    """As strictly as the kernel, and the return value it gives."""
    file = view.open("/proc/1/clear_refs", os.O_WRONLY)
    for data, taken in (
        (b"1", 1),
        (b"1\n", 2),
        (b" 1 ", 3),
        (b"+1", 2),
        (b"4", 1),
        (b"5", 1),
        (b"1            ", 12),
        (b"000000000001", 12),
        (b"1\0junk", 6),
    ):
        assert file.write(100, data) == taken
    for data, number in (
        (b"-1", errno.EINVAL),
        (b"0", errno.EINVAL),
        (b"6", errno.EINVAL),
        (b"0x1", errno.EINVAL),
        (b"", errno.EINVAL),
        (b"1 2", errno.EINVAL),
        (b"0000000000001", errno.EINVAL),
        (b"99999999999", errno.ERANGE),
    ):
        assert refused(file.write, 0, data) == number, data


@pytest.mark.rule("FS-007")
def test_unknown_ioctls(view):
    """EINVAL on pagemap, ENOTTY elsewhere; before 6.7 ENOTTY on pagemap too."""
    for path, number in (("pagemap", errno.EINVAL), ("maps", errno.ENOTTY), ("smaps", errno.ENOTTY)):
        assert refused(view.open(f"/proc/1/{path}").ioctl, 0x5401, bytearray(96), Memory()) == number
    assert refused(view.open("/proc/kpageflags").ioctl, PAGEMAP_SCAN, bytearray(96), Memory()) == errno.ENOTTY
    machine = pmcore.open("sim", memory="16 MiB", kernel="6.1")
    machine.spawn()
    file = ProcView(machine).open("/proc/1/pagemap")
    assert refused(file.ioctl, PAGEMAP_SCAN, scan_argument(0, PAGE), Memory()) == errno.ENOTTY


@pytest.mark.rule("SC-001", "FS-009")
def test_pagemap_scan(machine, view):
    """Regions in the caller's memory, walk_end in the argument, the number as return value."""
    process = machine.process(1)
    vma = process.maps()[0]
    start, end = vma.start, vma.start + 32 * PAGE
    present = int(PageCategory.PRESENT)
    argument, memory = scan_argument(start, end, masks=(0, present, 0, present)), Memory()
    file = view.open("/proc/1/pagemap")
    assert file.ioctl(PAGEMAP_SCAN, argument, memory) == 1
    assert struct.unpack("=3Q", memory.bytes[:24]) == (start, start + 8 * PAGE, present)
    request = ScanRequest(start=start, end=end, vec_len=64, category_mask=present, return_mask=present)
    assert struct.unpack_from("=Q", argument, 32)[0] == process.pagemap_scan(request).walk_end
    for bad, number in (
        (scan_argument(start + 1, end), errno.EINVAL),
        (scan_argument(start, end, size=88), errno.EINVAL),
        (scan_argument(start, end, vec=0), errno.EINVAL),
        (scan_argument(start, end, vec=(1 << 47) - 16), errno.EFAULT),
        (scan_argument(start, end, vec=0x1000, masks=(0, present, 0, present)), errno.EFAULT),
        (bytearray(8), errno.EFAULT),
    ):
        before = bytes(bad)
        assert refused(file.ioctl, PAGEMAP_SCAN, bad, Memory()) == number
        assert bytes(bad) == before
    next(iter(machine.tasks())).exit()
    assert refused(file.ioctl, PAGEMAP_SCAN, scan_argument(start + 1, end), Memory()) == errno.ESRCH
    assert file.read(0, 8) == b""
    assert refused(view.open, "/proc/1/pagemap") == errno.ENOENT


def query(flags=0x10, address=0, size=104, name=0x5000, room=200):
    return bytearray(
        struct.pack("=9Q4L2Q", size, flags, address, 0, 0, 0, 0, 0, 0, 0, 0, room, 0, name if room else 0, 0)
    )


@pytest.mark.rule("AC-013", "FS-009")
def test_procmap_query(machine, view):
    """One VMA after the other, with its name; refusals as the kernel's."""
    task = next(iter(machine.tasks()))
    fd = task.memfd_create("name")
    task.ftruncate(fd, PAGE)
    task.mmap(PAGE, addr=0x3000_0000_0000, flags=1, fd=fd)
    file = view.open("/proc/1/maps")
    found, address = [], 0
    while True:
        argument, memory = query(address=address), Memory()
        if address == machine.process(1).maps()[-1].end:
            assert refused(file.ioctl, PROCMAP_QUERY, argument, memory) == errno.ENOENT
            break
        assert file.ioctl(PROCMAP_QUERY, argument, memory) == 0
        fields = struct.unpack("=9Q4L2Q", argument)
        address = fields[4]
        name = bytes(memory.bytes[: max(fields[11] - 1, 0)]).decode()
        assert fields[6] == PAGE
        found.append((fields[3], fields[4], fields[5] & 15, fields[8], name))
    expected = [
        (v.start, v.end, v.readable | v.writable << 1 | v.executable << 2 | v.shared << 3, v.inode, v.name)
        for v in machine.process(1).maps()
    ]
    assert found == expected
    shared = 0x3000_0000_0000
    for argument, number in (
        (query(size=16), errno.EINVAL),
        (query(size=8192), errno.E2BIG),
        (query(flags=64), errno.EINVAL),
        (query(flags=0, address=shared - PAGE), errno.ENOENT),
        (query(flags=0x14), errno.ENOENT),
        (query(flags=0, address=shared, room=3), errno.ENAMETOOLONG),
        (query(flags=0, address=shared, name=0x10), errno.EFAULT),
    ):
        assert refused(file.ioctl, PROCMAP_QUERY, argument, Memory()) == number
    argument = query(flags=0x38)
    file.ioctl(PROCMAP_QUERY, argument, Memory())
    assert struct.unpack_from("=Q", argument, 24)[0] == shared
    small = query(room=0)[:40]
    small[:8] = struct.pack("=Q", 40)
    file.ioctl(PROCMAP_QUERY, small, Memory())
    assert struct.unpack_from("=Q", small, 24)[0] == expected[0][0]


@pytest.mark.rule("FS-017", "FS-014")
def test_a_block_goes_offline_by_a_write():
    machine = pmcore.open("sim", memory="64 MiB", block_size="16 MiB")
    view = ProcView(machine)
    place = "/sys/devices/system/memory"
    assert view.node(place).names() == ["block_size_bytes", *(f"memory{n}" for n in range(4))]
    state = view.open(f"{place}/memory2/state", os.O_RDWR)
    assert state.write(0, b"offline\n") == 8
    assert state.read(0, 100) == b"offline\n"
    assert [block.state for block in machine.memory_blocks()] == ["online", "online", "offline", "online"]
    assert set(machine.kpageflags(8192, 4096).values.tolist()) == {1 << 20}
    for word, number in ((b"offline", errno.EINVAL), (b"nowhere", errno.EINVAL)):
        assert refused(state.write, 0, word) == number
    assert state.write(0, b"online") == 6
    with pytest.raises(NotModelled):
        state.write(0, b"online_movable")
    assert refused(view.open, f"{place}/memory2/phys_index", os.O_WRONLY) == errno.EACCES
    assert refused(view.node, f"{place}/memory4/state") == errno.ENOENT


@pytest.mark.rule("FS-018")
def test_ksm_counts_are_shown():
    machine = pmcore.open("sim", memory="16 MiB", kernel="6.12")
    task = machine.spawn()
    start = task.mmap(8 * PAGE)
    task.madvise(start, 8 * PAGE, 12)
    for page in range(6):
        task.write(start + page * PAGE, b"same" if page < 4 else b"other")
    machine.ksm_scan(3)
    view = ProcView(machine)

    def number(name):
        return int(view.open(f"/sys/kernel/mm/ksm/{name}").read(0, 100))

    assert (number("pages_shared"), number("pages_sharing"), number("full_scans")) == (2, 4, 3)
    assert number("pages_unshared") == machine.ksm.pages_unshared
    assert refused(view.open, "/sys/kernel/mm/ksm/run", os.O_WRONLY) == errno.EACCES
    old = ProcView(pmcore.open("sim", memory="16 MiB", kernel="2.6.32")).node("/sys/kernel/mm/ksm").names()
    assert "max_page_sharing" not in old
    assert "run" in old
    without = ProcView(pmcore.open("sim", memory="16 MiB", config=["!CONFIG_KSM"]))
    assert refused(without.node, "/sys/kernel/mm/ksm/run") == errno.ENOENT


@pytest.mark.rule("FS-010")
@pytest.mark.parametrize("quirk", [False, True])
def test_scanning_a_process_that_has_ended(quirk):
    """ESRCH before anything is looked at; or, with the quirk, the argument is checked and nothing is found."""
    profile = preset("6.18").changed(add=["quirk.scan_of_ended"] if quirk else [])
    machine = pmcore.open("sim", memory="16 MiB", kernel=profile)
    task = machine.spawn()
    start = task.mmap(PAGE)
    task.touch(start, PAGE)
    file, process = ProcView(machine).open(f"/proc/{task.pid}/pagemap"), task.process
    task.exit()
    wrong = bytearray(struct.pack("=12Q", 96, 0, 1, 0, *[0] * 8))
    right = bytearray(struct.pack("=12Q", 96, 0, start, start + 100, 0, 0, 0, 0, 0, 0, 0, 15))
    request = ScanRequest(start=start, end=start + 100, vec_len=1, return_mask=15)
    if not quirk:
        for argument in (wrong, right):
            with pytest.raises(ProcessLookupError):
                file.ioctl(PAGEMAP_SCAN, argument, None)
        assert process.pagemap_scan_raw(request).errno == errno.ESRCH
        return
    with pytest.raises(OSError) as caught:
        file.ioctl(PAGEMAP_SCAN, wrong, None)
    assert caught.value.errno == errno.EINVAL
    assert file.ioctl(PAGEMAP_SCAN, right, None) == 0
    assert struct.unpack_from("=Q", right, 32) == (start + PAGE,)
    assert process.pagemap_scan_raw(request).walk_end == start + PAGE


def test_a_recording_stands_where_the_machine_stood(machine, tmp_path):
    """Words, texts and scans of the recording are those of the machine; it does not change (EROFS)."""
    record(machine, tmp_path / "a.rec")
    with pmcore.open("recording", tmp_path / "a.rec") as kernel:
        recorded, view = ProcView(kernel), ProcView(machine)
        vma = machine.process(1).maps()[0]
        for path, offset in (
            ("/proc/1/pagemap", vma.start // PAGE * 8),
            ("/proc/kpageflags", 0),
            ("/proc/kpagecount", 0),
            ("/proc/1/maps", 0),
            ("/proc/1/smaps", 0),
        ):
            assert recorded.open(path).read(offset, 512) == view.open(path).read(offset, 512)
        answers = []
        for each in (recorded, view):
            argument, memory = scan_argument(vma.start, vma.end, masks=(0, 8, 0, 8)), Memory()
            answers.append((each.open("/proc/1/pagemap").ioctl(PAGEMAP_SCAN, argument, memory), memory.bytes))
        assert answers[0] == answers[1]
        assert refused(recorded.open("/proc/1/clear_refs", os.O_WRONLY).write, 0, b"1") == errno.EROFS
