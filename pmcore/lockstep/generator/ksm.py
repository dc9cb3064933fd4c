"""Steps about merging of equal pages (KSM): equal pages, asking for it, and scans of ksmd."""

from __future__ import annotations

import attrs

from pmcore.lockstep.generator.accesses import fork
from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import Maker, State, pick_range, pick_task, ranged
from pmcore.program import steps as s
from pmcore.uapi import Madvise, MapFlag

__all__ = ["KSM", "ask", "compared"]

#: What is done to pages that are merged, or about to be.
_MERGED: tuple[Madvise | str, ...] = (
    *("write", "read", "fork"),
    *(Madvise.PAGEOUT, Madvise.PAGEOUT, Madvise.FREE, Madvise.COLD, Madvise.DONTNEED),
    *(Madvise.COLLAPSE, Madvise.UNMERGEABLE, Madvise.POPULATE_WRITE, Madvise.WILLNEED),
)


def ask(draw: Draw, step: s.Map) -> list[s.Step]:
    """Mostly, the advice to merge a new mapping."""
    if not draw.integer(0, 3):
        return []
    return [s.Advise(task=step.task, area=step.area, pages=step.pages, advice=int(Madvise.MERGEABLE))]


def compared(step: s.Step, state: State) -> s.Step | None:
    """The step as it can be compared: who locks memory has no children, and who has children locks none.

    When ksmd takes a locked page from one process, it depends on a processor's batches whether another's is taken in
    the same scan (DV-027).
    """
    if len(state.tasks) == 1 and state.may_fork:
        state.may_fork = not _locks(step)
    elif state.may_fork and _locks(step):
        return attrs.evolve(step, flags=step.flags & ~MapFlag.LOCKED) if isinstance(step, s.Map) else None
    return step


def _locks(step: s.Step) -> bool:
    if isinstance(step, s.Map):
        return bool(step.flags & MapFlag.LOCKED)
    return isinstance(step, s.Lock | s.LockAll)


def _equal(draw: Draw, state: State) -> s.Step:
    """Equal pages: the same short text at the same place of each."""
    area, page, pages = pick_range(draw, state)
    return s.Write(
        task=pick_task(draw, state),
        area=area,
        offset=page * 4096 + draw.of((0, 0, 4088)),
        text=draw.of(("x", "y")),
        pages=min(pages, draw.of((1, 2, 3, 9))),
    )


def _scan(draw: Draw, state: State) -> s.Step:
    """ksmd, for one full scan or a few."""
    return s.KsmScan(
        scans=draw.of((1, 1, 2, 2, 3)),
        zero_pages=draw.of((False, False, True)),
        sharing=draw.of((256,) * 6 + (2, 3)),
    )


def _unmerge(draw: Draw, state: State) -> s.Step:
    return s.KsmUnmerge()


def _merged(draw: Draw, state: State) -> s.Step:
    """Equal pages that are merged, something done to some of them, and more of ksmd."""
    first = _equal(draw, state)
    area, page, pages = pick_range(draw, state)
    task = pick_task(draw, state)
    steps: list[s.Step | None] = [s.KsmScan(scans=draw.of((1, 2, 2)), zero_pages=draw.of((False, True)))]
    for _ in range(draw.integer(1, 2)):
        what = draw.of(_MERGED)
        if what == "fork":
            steps.append(fork(draw, state))
        elif isinstance(what, Madvise):
            steps.append(s.Advise(task=task, area=area, page=page, pages=pages, advice=int(what)))
        else:
            steps.append(s.Touch(task=task, area=area, page=page, pages=pages, write=what == "write"))
    steps.append(draw.of((s.KsmScan(), s.KsmScan(scans=2), None)))
    state.next = [step for step in steps if step is not None]
    return first


#: By how often each is drawn, among all others.
KSM: tuple[Maker, ...] = (
    *(_scan,) * 12,
    *(_equal,) * 8,
    *(_merged,) * 4,
    *(ranged(s.Advise, advice=(int(Madvise.MERGEABLE), int(Madvise.UNMERGEABLE))),) * 2,
    *(fork,) * 2,
    _unmerge,
)
