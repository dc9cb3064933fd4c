"""Machines in any state that a random program leaves: files and ioctl show what the machine shows directly."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmcore.scan import ScanRequest
from pmcore.testing import fake_proc
from pmcore.testing.strategies import machines
from pmcore.uapi import PAGEMAP_SCAN

PAGE = 4096
UNHURRIED = settings(deadline=None, suppress_health_check=list(HealthCheck))


def whole(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        pieces = []
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


@settings(UNHURRIED, max_examples=40)
@given(machines(max_steps=15, memory="64 MiB", kernel="6.18"), st.integers(1, 700))
def test_files(machine, words):
    """maps and smaps whole, pagemap in pieces, the frame files."""
    with fake_proc(machine):
        for name in ("kpageflags", "kpagecount"):
            assert whole(f"/proc/{name}") == machine.pread(name, 0, machine.frame_count() * 8)
        for pid in machine.pids():
            process = machine.process(pid)
            for name in ("maps", "smaps"):
                assert whole(f"/proc/{pid}/{name}") == process.pread(name, 0, 1 << 30)
            with open(f"/proc/{pid}/pagemap", "rb") as file:  # noqa: PTH123
                for vma in process.maps():
                    shown = b""
                    file.seek(vma.start // PAGE * 8)
                    while len(shown) < vma.length // PAGE * 8:
                        shown += file.read(min(words * 8, vma.length // PAGE * 8 - len(shown)))
                    assert shown == process.pagemap(vma.start, vma.end).values.tobytes()


@settings(UNHURRIED, max_examples=100)
@given(machines(max_steps=15, memory="64 MiB", kernel="6.18"), st.data())
def test_scans_in_pieces(machine, data):
    """Small buffers, few pages at a time, write-protecting: each call, and the machine afterwards, as without files."""
    flags = data.draw(st.sampled_from([0, 1, 2, 3]))
    masks = [data.draw(st.integers(0, 0xFF)) for _ in range(3)] + [data.draw(st.integers(1, 0xFF))]
    room, most = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 60))
    before = machine.checkpoint()
    answers, digests = [], []
    for through_files in (False, True):
        answers.append([])
        for pid in machine.pids():
            vmas = machine.process(pid).maps()
            if not vmas:
                continue
            start, end = vmas[0].start, vmas[-1].end
            for _ in range(20):
                ask = _by_ioctl if through_files else _directly
                answer = ask(machine, pid, start, end, flags, room, most, masks)
                answers[-1].append(answer)
                if isinstance(answer, int) or answer[0] >= end or answer[0] <= start:
                    break
                start = answer[0]
        digests.append(machine.digest())
        machine.restore(before)
    assert answers[0] == answers[1]
    assert digests[0] == digests[1]


def _directly(machine, pid, start, end, flags, room, most, masks):
    inverted, mask, anyof, shown = masks
    request = ScanRequest(
        start=start,
        end=end,
        vec=True,
        vec_len=room,
        max_pages=most,
        flags=flags,
        category_inverted=inverted,
        category_mask=mask,
        category_anyof_mask=anyof,
        return_mask=shown,
    )
    result = machine.process(pid).pagemap_scan_raw(request)
    if result.errno:
        return result.errno
    return result.walk_end, [list(region) for region in result.regions.tolist()]


def _by_ioctl(machine, pid, start, end, flags, room, most, masks):
    vec = np.zeros((room, 3), dtype=np.uint64)
    argument = bytearray(struct.pack("=12Q", 96, flags, start, end, 0, vec.ctypes.data, room, most, *masks))
    with fake_proc(machine, pid=pid):
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        try:
            number = fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
        except OSError as error:
            return error.errno
        finally:
            os.close(fd)
    return struct.unpack("=12Q", argument)[4], vec[:number].tolist()


def test_a_buffer_of_the_callers_is_no_longer_than_it_says():
    """What lies behind `vec` stays as it was."""
    import pmcore

    machine = pmcore.open("sim", memory="32 MiB")
    task = machine.spawn()
    start = task.mmap(64 * PAGE)
    task.touch(start, 64 * PAGE, step=2 * PAGE)
    vec = (ctypes.c_uint64 * 30)(*[7] * 30)
    argument = struct.pack(
        "=12Q", 96, 0, start, start + 64 * PAGE, 0, ctypes.addressof(vec), 4, 0, 0, 8, 0, 8
    )
    with fake_proc(machine, pid=task.pid), open("/proc/self/pagemap", "rb") as file:  # noqa: PTH123
        assert fcntl.ioctl(file, PAGEMAP_SCAN, bytearray(argument)) == 4
    assert list(vec[12:]) == [7] * 18
