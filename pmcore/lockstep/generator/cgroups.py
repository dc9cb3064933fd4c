"""Steps about memory cgroups: a small tree of them, tasks that move about in it, groups that go while pages stay."""

from __future__ import annotations

from pmcore.lockstep.generator.accesses import fork, write
from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import Maker, State, pick_range, pick_task, ranged
from pmcore.program import steps as s
from pmcore.uapi import Madvise

__all__ = ["CGROUPS"]

_PATHS = ("g", "g", "h", "g/i", "g/i", "h/j", "g/i/k")


def _make(draw: Draw, state: State) -> s.Step:
    """A group; what lies in another one comes after that mostly, for it would be refused otherwise."""
    path = draw.of(_PATHS)
    above = path.rpartition("/")[0]
    if above and above not in state.groups and draw.integer(0, 3):
        path = above.rpartition("/")[0] or above
    if path not in state.groups:
        state.groups.append(path)
    if draw.flip():
        state.next = [s.MoveTask(task=pick_task(draw, state), group=path)]
    return s.MakeGroup(group=path)


def _move(draw: Draw, state: State) -> s.Step | None:
    """A task into a group, now and then into one that is gone, and an access of it."""
    if not state.groups:
        return _make(draw, state)
    task = pick_task(draw, state)
    area, page, pages = pick_range(draw, state)
    if draw.flip():
        state.next = [s.Touch(task=task, area=area, page=page, pages=pages, write=bool(draw.integer(0, 3)))]
    return s.MoveTask(task=task, group=draw.of((*state.groups, *state.groups, "")))


def _remove(draw: Draw, state: State) -> s.Step | None:
    """A group that may still have tasks, groups or pages; often its tasks are moved away first."""
    if not state.groups:
        return None
    path = draw.of(state.groups)
    if draw.integer(0, 3) == 0:
        return s.RemoveGroup(group=path)
    first, *others = [s.MoveTask(task=task, group=draw.of(("", "", "h"))) for task in state.tasks]
    state.next = [*others, s.RemoveGroup(group=path)]
    area, page, pages = pick_range(draw, state)
    if draw.flip():
        state.next.append(s.Touch(task=pick_task(draw, state), area=area, page=page, pages=pages))
    return first


def _swapped(draw: Draw, state: State) -> s.Step:
    """Pages that leave memory in one group and come back in another, or when theirs is gone."""
    area, page, pages = pick_range(draw, state)
    task = pick_task(draw, state)
    groups = (*state.groups, "")
    state.next = [
        s.Advise(task=task, area=area, page=page, pages=pages, advice=int(Madvise.PAGEOUT)),
        s.MoveTask(task=task, group=draw.of(groups)),
        *([s.RemoveGroup(group=draw.of(state.groups))] if state.groups and draw.flip() else []),
        s.Touch(task=pick_task(draw, state), area=area, page=page, pages=pages, write=draw.flip()),
    ]
    return s.Touch(task=task, area=area, page=page, pages=pages)


#: By how often each is drawn, among all others.
CGROUPS: tuple[Maker, ...] = (
    *(_make,) * 6,
    *(_move,) * 10,
    *(_remove,) * 4,
    *(_swapped,) * 4,
    *(fork,) * 2,
    *(write,) * 2,
    *(ranged(s.Touch, write=(True,)),) * 4,
)
