"""Many pages are taken as arrays: what a page costs, coarsely. tests/bench/sim.py has the figures."""

from __future__ import annotations

import time

import numpy as np

import pmcore
from pmcore import ScanRequest
from pmcore.uapi import Madvise, UffdFeature

PAGE = 4096
PAGES = 1 << 14
LENGTH = PAGES * PAGE
START = 1 << 40
#: Seconds a page that no Python code for each page keeps to; arrays take a tenth of it or less.
BAR = 1e-6


def best(function, times=3):
    """The least processor time of a call, a page."""
    took = []
    for _ in range(times):
        began = time.process_time()
        function()
        took.append(time.process_time() - began)
    return min(took) / PAGES


def costs(flags):
    """What touching, reading pagemap, scanning and unmapping cost a page."""
    machine = pmcore.open("sim", memory="256 MiB", kernel="6.18")
    task, out = machine.spawn(), np.zeros(PAGES, dtype=np.uint64)
    request = ScanRequest(start=START, end=START + LENGTH, vec_len=PAGES, category_mask=8, return_mask=8)
    found = {}

    def least(name, function):
        found[name] = min(found.get(name, 1.0), best(function, 1))

    for _ in range(5):
        task.mmap(LENGTH, addr=START, flags=flags)
        least("touch", lambda: task.touch(START, LENGTH))
        least("pagemap", lambda: task.process.read_pagemap(START // PAGE, out))
        least("scan", lambda: task.process.pagemap_scan(request))
        children = []
        least("fork", lambda children=children: children.append(task.fork()))
        children[0].exit()
        least("munmap", lambda: task.munmap(START, LENGTH))
    assert np.count_nonzero(out >> np.uint64(63)) == PAGES
    return found


def test_shared_memory_costs_what_private_does():
    """Within twice as much on a quiet machine; the bar leaves room for one that is not."""
    private, shared = costs(0x32), costs(0x31)
    for name, figure in shared.items():
        assert figure < BAR, name
        assert figure < 5 * max(private[name], 5e-9), (name, figure, private[name])


def test_filling_copying_and_reading_back_take_arrays():
    """What one page after the other takes 4 to 40 us a page takes a fraction of that."""
    machine = pmcore.open("sim", memory="512 MiB", swap="256 MiB", kernel="6.18")
    task = machine.spawn()
    fd = task.userfaultfd(UffdFeature.MISSING_SHMEM | UffdFeature.MINOR_SHMEM)
    memfd, source, second = task.memfd_create("many"), 2 * START, 3 * START
    task.mmap(LENGTH, addr=START, flags=0x32)
    task.mmap(LENGTH, addr=source, flags=0x31)
    took = {"touch": best(lambda: task.touch(START, LENGTH), 1)}
    child = task.fork()
    took["copied after fork"] = best(lambda: task.touch(START, LENGTH), 1)
    child.exit()
    task.touch(source, LENGTH)
    task.madvise(source, LENGTH, Madvise.PAGEOUT)
    took["shared memory swapped in"] = best(lambda: task.touch(source, LENGTH), 1)
    task.mmap(LENGTH, addr=second, flags=0x32)
    task.uffd_register(fd, second, LENGTH, 1)
    took["UFFDIO_COPY"] = best(lambda: task.uffd_copy(fd, second, source, LENGTH), 1)
    task.munmap(second, LENGTH)
    task.madvise(source, LENGTH, Madvise.DONTNEED)
    task.uffd_register(fd, source, LENGTH, 4)
    took["UFFDIO_CONTINUE"] = best(lambda: task.uffd_continue(fd, source, LENGTH), 1)
    took["fallocate"] = best(lambda: task.fallocate(memfd, 0, 0, LENGTH), 1)
    machine.check()
    assert machine.counters["copy_on_write"] == PAGES
    for name, figure in took.items():
        assert figure < 3 * BAR, (name, figure)
