"""Steps that use memory: accesses, advice in orders that lead to rare states, forks."""

from __future__ import annotations

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import HUGE, MAX_TASKS, State, pick_range, pick_task
from pmcore.program import steps as s
from pmcore.uapi import Madvise

__all__ = ["exit_task", "fork", "huge_page", "lock_all", "sequence", "write"]

#: What leads to rare states: advice, "read" and "write" accesses, one after the other over one range.
_SEQUENCES: tuple[tuple[Madvise | str, ...], ...] = (
    ("write", Madvise.PAGEOUT, "read", "write"),
    ("write", Madvise.PAGEOUT, Madvise.WILLNEED, "write"),
    ("write", Madvise.FREE, "write", Madvise.PAGEOUT),
    ("write", Madvise.FREE, Madvise.PAGEOUT, "read"),
    ("write", Madvise.GUARD_INSTALL, "read", Madvise.GUARD_REMOVE, "write"),
    ("read", Madvise.COLD, "write"),
    (Madvise.POPULATE_WRITE, Madvise.PAGEOUT, Madvise.COLLAPSE),
    ("write", "fork", "write", Madvise.PAGEOUT),
)


def sequence(draw: Draw, state: State) -> s.Step:
    """Accesses and advice over one range, in an order that leads to a rare state; the rest follows at once."""
    area, page, pages = pick_range(draw, state)
    task = pick_task(draw, state)
    steps: list[s.Step] = []
    for what in draw.of(_SEQUENCES):
        if what == "fork":
            steps += [step] if (step := fork(draw, state)) else []
        elif isinstance(what, Madvise):
            steps.append(s.Advise(task=task, area=area, page=page, pages=pages, advice=int(what)))
        else:
            steps.append(s.Touch(task=task, area=area, page=page, pages=pages, write=what == "write"))
    state.next = steps[1:]
    return steps[0]


def huge_page(draw: Draw, state: State) -> s.Step | None:
    """A huge page: mapped, collapsed or shared, then advised of in part, and paged out."""
    large = sorted(area for area, pages in state.areas.items() if pages >= HUGE)
    if not large:
        return None
    area, task = draw.of(large), pick_task(draw, state)
    way = draw.of((Madvise.HUGEPAGE, Madvise.COLLAPSE))
    small = draw.of((1, 8, HUGE // 2, HUGE))
    part = draw.of((Madvise.FREE, Madvise.COLD, Madvise.PAGEOUT, Madvise.DONTNEED, None))
    first = s.Advise(task=task, area=area, pages=HUGE, advice=int(way))
    touch = s.Touch(task=task, area=area, pages=small, write=draw.of((True, True, False)))
    text = s.Write(task=task, area=area, offset=draw.of((0, 0, 5 * 4096)), text="huge")
    state.next = [touch, text] if way == Madvise.HUGEPAGE else [text, first]
    if part is None:
        state.next.append(s.Protect(task=task, area=area, page=small // 2, pages=1, prot=draw.integer(0, 3)))
    else:
        state.next.append(s.Advise(task=task, area=area, page=small // 2, pages=small, advice=int(part)))
    if draw.flip():
        state.next.append(s.Advise(task=task, area=area, pages=HUGE, advice=int(Madvise.PAGEOUT)))
    return first if way == Madvise.HUGEPAGE else touch


def write(draw: Draw, state: State) -> s.Step | None:
    """Bytes written or read, across the edges of pages."""
    area, page, pages = pick_range(draw, state)
    offset = page * 4096 + draw.of((0, 1, 100, 4090, 4095))
    text = draw.of(("x", "hello", "0123456789"))
    if draw.flip():
        return s.Read(
            task=pick_task(draw, state), area=area, offset=offset, length=min(len(text) * 700, pages * 4096)
        )
    return s.Write(task=pick_task(draw, state), area=area, offset=offset, text=text)


def fork(draw: Draw, state: State) -> s.Step | None:
    """A child, as long as there are few tasks."""
    if len(state.tasks) >= MAX_TASKS or not state.may_fork:
        return None
    parent, child = pick_task(draw, state), state.name("t")
    state.tasks.append(child)
    state.forked(parent, child)
    return s.Fork(task=parent, child=child)


def exit_task(draw: Draw, state: State) -> s.Step | None:
    """The end of a task, but never of the last."""
    if len(state.tasks) < 2:
        return None
    task = pick_task(draw, state)
    state.ended(task)
    return s.Exit(task=task)


def lock_all(draw: Draw, state: State) -> s.Step:
    """mlockall or munlockall, the flags often wrong."""
    task = pick_task(draw, state)
    if draw.flip():
        return s.UnlockAll(task=task)
    state.locked_all = True
    return s.LockAll(task=task, flags=draw.of((1, 2, 3, 5, 6, 7, 0, 4, 8)))
