"""Compaction of the simulated machine."""

from __future__ import annotations

import numpy as np
import pytest

from pmcore.registry import open_workbench
from pmcore.uapi import PM_PFRAME_MASK, Madvise

PAGE = 4096


@pytest.mark.rule("MG-010")
@pytest.mark.parametrize("nodes", [1, 2])
def test_what_is_free_lies_together(nodes):
    machine = open_workbench("sim", memory="64 MiB", kernel="6.12", swap="8 MiB", nodes=nodes)
    task = machine.spawn()
    start = task.mmap(2048 * PAGE)
    task.touch(start, 2048 * PAGE)
    for page in range(0, 2048, 2):
        task.madvise(start + page * PAGE, PAGE, Madvise.DONTNEED)
    for page in range(1, 2048, 512):
        task.write(start + page * PAGE, b"%d" % page)
    task.mlock(start + 3 * PAGE, PAGE)
    child = task.fork()
    child.touch(start + 5 * PAGE, PAGE)
    before = task.process.pagemap(start, start + 2048 * PAGE).values
    blocks = [
        sum(counts) for counts in zip(*(z.free_counts() for z in machine.core.memory.zones), strict=True)
    ]
    free = machine.core.memory.free_total
    moved = machine.compact()
    machine.check()
    assert moved > 400
    assert machine.core.memory.free_total == free
    after = [
        sum(counts) for counts in zip(*(z.free_counts() for z in machine.core.memory.zones), strict=True)
    ]
    assert after[0] < 20 < 900 < blocks[0]
    assert after[9] + 2 * after[10] > blocks[9] + 2 * blocks[10]
    words = task.process.pagemap(start, start + 2048 * PAGE).values
    assert ((before ^ words) & ~np.uint64(PM_PFRAME_MASK)).max() == 0
    assert int(((before ^ words) != 0).sum()) > 400
    for page in range(1, 2048, 512):
        text = b"%d" % page
        assert task.read(start + page * PAGE, len(text)) == child.read(start + page * PAGE, len(text)) == text
    assert machine.compact() == 0
    machine.check()
