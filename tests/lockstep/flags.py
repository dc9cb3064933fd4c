"""Which program reaches which flag, and which kernels showed it: spec/flags.md, from the tables and recorded answers.

.venv/bin/python tests/lockstep/flags.py
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))  # at the end: the installed project comes first

from pmcore import spec  # noqa: E402
from pmcore.analysis.rows import RowOptions, frame_rows, process_rows  # noqa: E402
from pmcore.arrays import U64Array  # noqa: E402
from pmcore.lockstep.answers import answers_from_json  # noqa: E402
from pmcore.lockstep.look import Look  # noqa: E402
from pmcore.pagetypes import expand_overloaded  # noqa: E402
from pmcore.program import Program, Run, load_program  # noqa: E402
from pmcore.protocols import FrameFile  # noqa: E402
from pmcore.registry import open_workbench  # noqa: E402
from pmcore.uapi import PM_PFRAME_MASK, PM_PRESENT, PM_SWAP  # noqa: E402

TABLE = ROOT / "spec" / "flags.md"
KEPT = HERE / "kept"
KERNELS = ("6.18", "6.12", "6.1")
_HEAD = """# Every flag of kpageflags, and what reaches it

Made by `python tests/lockstep/flags.py` from `spec/tables/kpageflags.toml`, `flag_programs.toml` and the recorded
answers of three kernels (`tests/lockstep/answers`). A program is one of `tests/lockstep/kept`: on the simulated machine
it reaches the flag at the step that is named (the tests run it), and a kernel is named where its answer to that program
shows the flag on a page that the program has mapped. "elsewhere" stands for frames that no program maps: those of the
running kernel are looked at by the rule's tests. Bits from 32 on are for kernel developers, from 40 on most of them are
page-types' own.

| bit | flag | versions | rule | reached by | at step | kernels | meaning |
|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    TABLE.write_text(table(), encoding="utf-8")
    return 0


def table() -> str:
    """The text of spec/flags.md."""
    how = {(row.name, row.bit): row for row in spec.flag_programs()}
    text, reasons = _HEAD, ""
    for flag in spec.kpageflags():
        row = how[flag.name, flag.bit]
        step = kernels = ""
        if row.program:
            shown, mapped = reached(load_program(KEPT / f"{row.program}.json"))
            if not any(bits >> flag.bit & 1 for bits in shown):
                raise AssertionError(f"{row.program} does not reach {flag.name}")
            step = next((str(n) for n, bits in enumerate(mapped) if bits >> flag.bit & 1), "elsewhere")
            kernels = ", ".join(k for k in KERNELS if shown_by(k, row.program) >> flag.bit & 1)
        if row.reason:
            reasons += f"- {flag.name}: {row.reason}\n"
        versions = f"{flag.since} to {flag.until}" if flag.until else f"{flag.since}"
        by = row.program or (f"`{row.test}`" if row.test else "nothing, see below")
        cells = [str(flag.bit), flag.name, versions, flag.rule, by, step, kernels, flag.meaning]
        text += f"| {' | '.join(cells)} |\n"
    return f"{text}\nReached by nothing at hand:\n\n{reasons}"


def reached(program: Program) -> tuple[list[int], list[int]]:
    """After each step, the bits that any frame of a simulated machine shows, and those of pages of the program's."""
    options: dict[str, Any] = {"memory": "64 MiB", "swap": "32 MiB", "hugepages": {"2 MiB": (8, 2)}}
    shown, mapped = [], []
    with open_workbench("sim", kernel="6.18", **options) as machine:
        run = Run(program, machine)
        for step in program.steps:
            run.advance(step)
            raw = RowOptions(raw=True)
            own = 0
            for task in machine.tasks():
                for rows in process_rows(task.process, raw):
                    own |= _union(rows.flags)
            every = _union(machine.kernel.kpageflags().values) | own
            for rows in frame_rows(machine.kernel, raw):
                every |= _union(rows.flags)
            shown.append(every)
            mapped.append(own | _of_tasks(machine))
    return shown, mapped


def _of_tasks(machine: Any) -> int:
    found = 0
    for task in machine.tasks():
        for vma in task.process.maps():
            pfns = task.process.pagemap(vma.start, vma.end).pfn
            found |= _union(machine.kernel.frames_at(FrameFile.KPAGEFLAGS, pfns[pfns > 0]))
    return found


def _union(words: U64Array) -> int:
    return int(np.bitwise_or.reduce(words)) if len(words) else 0


@functools.cache
def shown_by(kernel: str, program: str) -> int:
    """All bits that a kernel's recorded answer to a program shows of its pages; 0 where it was not asked."""
    path = HERE / "answers" / kernel / f"{program}.json"
    if not path.exists():
        return 0
    answers = answers_from_json(path.read_text(encoding="utf-8"), source=str(path))
    return functools.reduce(lambda bits, look: bits | _bits(look), answers.looks, 0)


def _bits(look: Look) -> int:
    found = _union(look.kpageflags)
    for task in look.tasks.values():
        words = task.words[(task.words & np.uint64(PM_PRESENT | PM_SWAP)) != 0]
        present = (words & np.uint64(PM_PRESENT)) != 0
        flags = np.zeros(len(words), dtype=np.uint64)
        places = np.searchsorted(look.pfns, words[present] & np.uint64(PM_PFRAME_MASK))
        there = places < len(look.pfns)
        flags[np.flatnonzero(present)[there]] = look.kpageflags[places[there]]
        found |= _union(expand_overloaded(flags, words))
    return found


if __name__ == "__main__":
    sys.exit(main())
