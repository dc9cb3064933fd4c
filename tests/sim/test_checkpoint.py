"""Going back, saving, digests."""

from __future__ import annotations

import hashlib
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcore
from pmcore.backends.sim.machine import load_machine
from pmcore.errors import FormatError
from pmcore.lockstep.programs import programs
from pmcore.program import Program, Run, program_from_json
from pmcore.uapi import Madvise

PAGE = 4096
SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@SLOW
@given(programs(max_steps=20), st.integers(0, 19))
def test_going_back_is_as_if_nothing_had_happened(program, cut):
    """Run, go back to any step, run on again: the same outcomes and the same state."""
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB")
    run = Run(program, machine)
    for step in program.steps[:cut]:
        run.advance(step)
    state = machine.checkpoint()
    before = dict(run.areas), dict(run.fds), dict(run.tasks), run._next
    digest = machine.digest()
    seen = []
    for _ in range(2):
        outcomes = [run.advance(step) for step in program.steps[cut:]]
        machine.check()
        seen.append((outcomes, machine.digest()))
        machine.restore(state)
        run.areas, run.fds, run.tasks, run._next = (
            dict(before[0]),
            dict(before[1]),
            dict(before[2]),
            before[3],
        )
        assert machine.digest() == digest
        machine.check()
    assert seen[0] == seen[1]


@SLOW
@given(programs(max_steps=20))
def test_saved_and_loaded(tmp_path_factory, program):
    path = tmp_path_factory.mktemp("saved") / "machine.zip"
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
    machine.save(path)
    again = load_machine(path)
    assert again.digest() == machine.digest()
    for task in machine.tasks():
        assert again.process(task.pid).smaps() == task.process.smaps()
        for vma in task.process.maps():
            mine, theirs = (p.pagemap(vma.start, vma.end) for p in (task.process, again.process(task.pid)))
            assert mine.values.tolist() == theirs.values.tolist()


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 5000])
def test_files_that_are_no_machine(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(FormatError):
        load_machine(tmp_path / "m")


@pytest.mark.parametrize(
    "words", ["[]", "{}", '{"pmcore_sim_state": 1}', '{"pmcore_sim_state": 1, "settings": {}}']
)
def test_archives_that_are_no_machine(tmp_path, words):
    with zipfile.ZipFile(tmp_path / "m", "w") as archive:
        archive.writestr("state.json", words)
    with pytest.raises(FormatError):
        load_machine(tmp_path / "m")


GOLDEN = """{"pmcore_program": 1, "name": "golden", "steps": [
 {"step": "map", "area": "a", "pages": 1024, "align": 2097152},
 {"step": "advise", "area": "a", "pages": 512, "advice": 14},
 {"step": "touch", "area": "a", "pages": 700},
 {"step": "write", "area": "a", "offset": 2500000, "text": "golden"},
 {"step": "fork", "child": "c"},
 {"step": "write", "task": "c", "area": "a", "offset": 5, "text": "child"},
 {"step": "advise", "area": "a", "page": 600, "pages": 50, "advice": 21},
 {"step": "protect", "area": "a", "page": 3, "pages": 9, "prot": 1},
 {"step": "move", "area": "a", "page": 512, "pages": 40, "new_pages": 60, "to": "b"},
 {"step": "unmap", "task": "c", "area": "a", "page": 1, "pages": 5}]}"""


def test_golden_digest():
    """The same bytes on every platform, Python and numpy; changed only together with the model."""
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.12")
    program = program_from_json(GOLDEN)
    assert isinstance(program, Program)
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
    machine.check()
    assert machine.digest() == "1c0ba3be788d81bea683ff2afe813835c9cd6381f6216caa4a6063184f1e7e0a"


SHOWN = """{"pmcore_program": 1, "name": "shown", "steps": [
 {"step": "map", "area": "a", "pages": 1032, "align": 2097152},
 {"step": "advise", "area": "a", "pages": 1024, "advice": 14},
 {"step": "touch", "area": "a", "pages": 600},
 {"step": "write", "area": "a", "offset": 2097150, "text": "across"},
 {"step": "uffdopen", "features": 32768},
 {"step": "uffdregister", "area": "a", "pages": 1032},
 {"step": "scan", "area": "a", "page": 500, "pages": 20, "flags": 1, "category_mask": 2},
 {"step": "touch", "area": "a", "page": 505, "pages": 10},
 {"step": "fork", "child": "c"},
 {"step": "write", "task": "c", "area": "a", "offset": 77, "text": "child"},
 {"step": "advise", "task": "c", "area": "a", "page": 900, "pages": 20, "advice": 23},
 {"step": "advise", "area": "a", "page": 1024, "pages": 8, "advice": 23},
 {"step": "advise", "area": "a", "page": 1024, "pages": 8, "advice": 21},
 {"step": "touch", "area": "a", "page": 1026, "pages": 2, "write": false},
 {"step": "touch", "area": "a", "page": 1028, "pages": 1},
 {"step": "advise", "area": "a", "page": 1030, "pages": 1, "advice": 102},
 {"step": "lock", "area": "a", "page": 300, "pages": 5},
 {"step": "move", "task": "c", "area": "a", "page": 512, "pages": 40, "new_pages": 60, "to": "b"},
 {"step": "advise", "task": "c", "area": "a", "pages": 3, "advice": 4},
 {"step": "brk", "length": 20000},
 {"step": "touch", "area": "heap", "pages": 3},
 {"step": "map", "area": "z", "pages": 512, "align": 2097152},
 {"step": "touch", "area": "z", "pages": 7},
 {"step": "advise", "area": "z", "pages": 512, "advice": 25}]}"""


def test_golden_views():
    """The same bytes of every file on every platform: fork, swap, huge pages, uffd; changed only with the model."""
    machine = pmcore.open("sim", memory="64 MiB", swap="8 MiB", kernel="6.18")
    program = program_from_json(SHOWN)
    run = Run(program, machine)
    for step in program.steps:
        outcome = run.advance(step)
        assert not outcome.errno, step
    machine.check()
    total = hashlib.sha256()
    for name in ("kpagecount", "kpageflags"):
        total.update(machine.pread(name, 0, 8 * machine.frame_count()))
    for task in machine.tasks():
        for name in ("maps", "smaps"):
            total.update(task.process.pread(name, 0, 1 << 20))
        for vma in task.process.maps():
            total.update(task.process.pread("pagemap", vma.start >> 9, (vma.end - vma.start) >> 9))
    assert total.hexdigest() == "d44357e8cd71c51fdf18b4b2bfb6c5c04fcd47757e3fae8db753852bff81a7f5"


def test_policies_are_part_of_the_state():
    machine = pmcore.open("sim")
    state = machine.checkpoint()
    machine.core.policy.pmd = "always"
    assert machine.digest() != state.digest()
    machine.restore(state)
    assert machine.core.policy.pmd == "madvise"
    assert Madvise.HUGEPAGE == 14


def test_paging_out_beside_a_huge_page_that_is_taken_apart():
    """A pool of tables without room to spare, as after going back, moves when the huge page gets its table."""
    with pmcore.open("sim", memory="64 MiB", swap="128 MiB", kernel="6.18") as machine:
        task = machine.spawn()
        start = task.mmap(1031 * 4096, addr=1 << 40, flags=0x32)
        task.madvise(start, 1031 * 4096, Madvise.HUGEPAGE)
        for pages in (1031, 1030):
            task.touch(start, pages * 4096)
            machine.reclaim(1)  # the first huge page, then one page
            machine.restore(machine.checkpoint())
        task.madvise(start, 1030 * 4096, Madvise.PAGEOUT)
        machine.check()
