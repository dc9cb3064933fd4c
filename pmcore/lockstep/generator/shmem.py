"""Steps that bias a program to huge pages of shared memory: large mappings of memfds, collapsed and cut into."""

from __future__ import annotations

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.files import pick_file
from pmcore.lockstep.generator.mappings import map_shared
from pmcore.lockstep.generator.state import HUGE, MAX_AREAS, Maker, State, pick_task
from pmcore.program import steps as s
from pmcore.uapi import Madvise

__all__ = ["SHMEM"]

#: What is done to a part of a huge page, mostly.
_PARTS = (
    *(Madvise.DONTNEED, Madvise.REMOVE, Madvise.PAGEOUT, Madvise.COLD) * 2,
    *(Madvise.NOHUGEPAGE, Madvise.HUGEPAGE, Madvise.POPULATE_READ, Madvise.WILLNEED),
)


def _file(draw: Draw, state: State) -> s.Step | None:
    """A memfd of a huge page or two, as long as there are few."""
    if len(state.files) >= 2:
        return None
    fd, task = state.name("m"), pick_task(draw, state)
    pages = draw.of((HUGE, HUGE, 2 * HUGE, HUGE - 100, 20))
    state.files[fd] = (pages, [task])
    return s.MemfdCreate(task=task, fd=fd, pages=pages)


def _map(draw: Draw, state: State) -> s.Step | None:
    """A large mapping of a memfd or of shared anonymous memory."""
    if len(state.areas) >= MAX_AREAS:
        return None
    return map_shared(draw, state, state.name("a"), True, draw.of((HUGE, HUGE, 2 * HUGE, HUGE + 70)))


def _collapse(draw: Draw, state: State) -> s.Step | None:
    """Pages written, and made a huge page of, which is then used in part."""
    large = sorted(area for area in state.shared if state.areas.get(area, 0) >= HUGE)
    if not large:
        return None
    area, task = draw.of(large), pick_task(draw, state)
    page = draw.of((0, 0, 3, 100, HUGE - 1))
    whole = s.Advise(task=task, area=area, pages=HUGE, advice=int(Madvise.COLLAPSE))
    part = s.Advise(
        task=pick_task(draw, state),
        area=draw.of(large),
        page=page,
        pages=draw.of((1, 3, 16, 100, HUGE)),
        advice=int(draw.of(_PARTS)),
    )
    access = s.Touch(task=pick_task(draw, state), area=draw.of(large), page=page, pages=1, write=draw.flip())
    follow: tuple[list[s.Step], ...] = ([], [access], [part], [part, access], [access, part])
    state.next = [whole, *draw.of(follow)]
    return s.Touch(task=task, area=area, page=page, pages=draw.of((1, 5, HUGE - page)), write=draw.flip())


def _cut(draw: Draw, state: State) -> s.Step | None:
    """A hole or a new end inside a huge page, or pages set aside."""
    if not state.files:
        return None
    fd, size, tasks = pick_file(draw, state)
    offset = draw.integer(0, max(size, 1)) * 4096 + draw.of((0, 0, 0, 10))
    what = draw.of(("punch", "punch", "truncate", "grow", "aside"))
    task = draw.of(tasks)
    if what in ("truncate", "grow"):
        return s.Ftruncate(task=task, fd=fd, length=offset if what == "truncate" else size * 4096)
    length = draw.of((1, 4096, 2 * 4096, 50 * 4096, HUGE * 4096))
    mode = 3 if what == "punch" else draw.of((0, 1))
    return s.Fallocate(task=task, fd=fd, mode=mode, offset=offset, length=length)


SHMEM: tuple[Maker, ...] = (*(_file,) * 4, *(_map,) * 8, *(_collapse,) * 12, *(_cut,) * 8)
