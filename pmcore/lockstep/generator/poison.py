"""Steps that poison pages, or have them moved away from where memory is about to fail."""

from __future__ import annotations

from pmcore.lockstep.generator.accesses import fork
from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import HUGE, PRIVATE_ANONYMOUS, State, pick_task
from pmcore.program import steps as s
from pmcore.uapi import Madvise, MapFlag

__all__ = ["POISON"]

#: What is done to the pages before: accesses, advice that has them paged out, a child that has them, too.
_BEFORE: tuple[tuple[str, ...], ...] = (
    ("write",),
    ("write",),
    ("write",),
    ("write", "out", "read"),
    ("write", "out", "read", "write"),
    ("write", "out"),
    ("write", "fork"),
)


def _area(draw: Draw, state: State) -> str | None:
    """Private or shared memory, or a private mapping of hugetlb; no file of a disk."""
    small = [area for area in state.areas if area not in state.huge and area not in state.mapped]
    # Pages of hugetlb files would be lost to the pool for good, whatever comes after this program.
    private = PRIVATE_ANONYMOUS | MapFlag.HUGETLB
    huge = [area for area, flags in state.huge.items() if flags & private == private and area in state.areas]
    areas = huge if huge and draw.integer(0, 4) == 0 else small
    return draw.of(sorted(areas)) if areas else None


def poison(draw: Draw, state: State) -> s.Step | None:
    """A few pages poisoned or soft-offlined; mostly written before, perhaps paged out, and touched afterwards."""
    area = _area(draw, state)
    if area is None:
        return None
    task = pick_task(draw, state)
    page = draw.integer(0, state.areas[area] - 1)
    pages = draw.integer(1, min(draw.of((1, 3, 3, 20)), state.areas[area] - page))
    advice = draw.of((Madvise.HWPOISON, Madvise.HWPOISON, Madvise.SOFT_OFFLINE))
    doing = s.Advise(task=task, area=area, page=page, pages=pages, advice=int(advice))
    if draw.integer(0, 3) == 0:
        return doing
    steps: list[s.Step] = []
    for what in draw.of(_BEFORE):
        if what == "out":
            steps.append(s.Advise(task=task, area=area, page=page, pages=pages, advice=int(Madvise.PAGEOUT)))
        elif what == "fork":
            child = fork(draw, state)
            steps += [child] if child is not None else []
        else:
            steps.append(s.Touch(task=task, area=area, page=page, pages=pages, write=what == "write"))
    steps.append(doing)
    if draw.flip():
        near = max(0, page - 1)
        reach = min(HUGE, state.areas[area] - near, pages + 1)
        steps.append(
            s.Touch(task=pick_task(draw, state), area=area, page=near, pages=reach, write=draw.flip())
        )
    state.next = steps[1:]
    return steps[0]


#: By how often it is drawn, among all others.
POISON = (poison,) * 12
