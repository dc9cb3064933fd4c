"""Steps that make, move and take away mappings of anonymous memory."""

from __future__ import annotations

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.files import pick_file
from pmcore.lockstep.generator.state import HUGE, MAX_AREAS, PRIVATE_ANONYMOUS, State, pick_range, pick_task
from pmcore.program import steps as s
from pmcore.uapi import MapFlag, MremapFlag

__all__ = ["brk", "map_anywhere", "map_memory", "map_over", "map_shared", "move", "stack"]

#: Pages of a mapping that reaches over the gap between two areas.
_WIDTH = 1024 + 40


def map_memory(draw: Draw, state: State) -> s.Step | None:
    """A mapping of its own place, private and anonymous mostly."""
    if len(state.areas) >= MAX_AREAS:
        return None
    name = state.name("a")
    huge = draw.flip()
    pages = draw.of((HUGE, 2 * HUGE, 2 * HUGE + 7) if huge else (1, 2, 3, 5, 8, 16, 33, 64))
    if draw.integer(0, 3) == 0 and not state.locked_all:
        return map_shared(draw, state, name, huge, pages)
    extra = draw.of((0,) * 8 + (MapFlag.POPULATE, MapFlag.LOCKED, MapFlag.NORESERVE))
    prot = draw.of((3,) * 8 + (1, 0, 2, 7))
    state.areas[name] = pages
    return s.Map(
        area=name,
        pages=pages,
        prot=prot,
        flags=PRIVATE_ANONYMOUS | int(extra),
        align=HUGE * 4096 if huge else 4096,
    )


def map_shared(draw: Draw, state: State, name: str, huge: bool, pages: int) -> s.Step:
    """Shared anonymous memory, or a file."""
    align = HUGE * 4096 if huge else 4096
    extra = int(draw.of((0,) * 8 + (0 if state.ahead else MapFlag.POPULATE, MapFlag.NORESERVE)))
    prot = draw.of((3,) * 8 + (1, 0, 2))
    state.areas[name] = pages
    state.shared.add(name)
    if not state.files or draw.integer(0, 2) == 0:
        flags = int(MapFlag.SHARED | MapFlag.ANONYMOUS) | extra
        return s.Map(area=name, pages=pages, prot=prot, flags=flags, align=align)
    fd, size, tasks = pick_file(draw, state)
    return s.Map(
        task=draw.of(tasks),
        area=name,
        pages=pages,
        prot=prot,
        flags=int(draw.of((MapFlag.SHARED, MapFlag.SHARED, MapFlag.PRIVATE))) | extra,
        align=align,
        fd=fd,
        page_offset=draw.of((0, 0, 0, 1, size // 2, max(size - 1, 0))),
    )


def map_over(draw: Draw, state: State) -> s.Step | None:
    """A mapping over a part of another, or over all and what lies behind it."""
    if len(state.areas) >= MAX_AREAS:
        return None
    area, page, pages = pick_range(draw, state)
    name = state.name("a")
    if area in state.shared:
        state.shared.add(name)
    state.areas[name] = pages
    if draw.integer(0, 15) == 0:
        pages = _WIDTH  # over the end of the area, and over what lies behind the gap
        state.areas[name] = pages
    grows = draw.of((0, 0, MapFlag.GROWSDOWN))
    flags = PRIVATE_ANONYMOUS | grows | draw.of((MapFlag.FIXED, MapFlag.FIXED, MapFlag.FIXED_NOREPLACE))
    return s.Map(
        task=pick_task(draw, state),
        area=name,
        pages=pages,
        within=area,
        page=page,
        prot=draw.of((3, 3, 3, 1)),
        flags=int(flags),
    )


def map_anywhere(draw: Draw, state: State) -> s.Step | None:
    """A place of the kernel's choice, or a hint that may be free."""
    if len(state.areas) >= MAX_AREAS:
        return None
    hint, page, _ = pick_range(draw, state)
    name = state.name("a")
    within = draw.of(("", hint, hint))
    state.areas[name] = pages = draw.of((1, 2, 16, HUGE, 2 * HUGE, 2 * HUGE + 7))
    return s.Map(
        task=pick_task(draw, state),
        area=name,
        pages=pages,
        anywhere=True,
        within=within,
        page=page if within else 0,
        align=HUGE * 4096 if pages >= HUGE else 4096,
    )


def stack(draw: Draw, state: State) -> s.Step | None:
    """A mapping that grows downwards at the end of an area that is unmapped otherwise."""
    area, page, _ = pick_range(draw, state)
    pages, task = state.areas[area], pick_task(draw, state)
    if not page or len(state.areas) >= MAX_AREAS:
        return None
    name = state.name("a")
    state.areas[name] = pages - page
    flags = int(PRIVATE_ANONYMOUS | MapFlag.FIXED | MapFlag.GROWSDOWN)
    state.next = [
        s.Map(task=task, area=name, pages=pages - page, within=area, page=page, flags=flags),
        s.Touch(task=task, area=area, page=draw.integer(0, page), pages=1),
    ]
    return s.Unmap(task=task, area=area, pages=pages)


def brk(draw: Draw, state: State) -> s.Step:
    """The heap grown or shrunk, by whole pages or not."""
    lengths = (0, 1, 4096, 5 * 4096 + 1, 64 * 4096, HUGE * 4096 - 1, 2 * HUGE * 4096)
    length = draw.of(lengths)
    state.areas["heap"] = max(state.areas.get("heap", 1), -(-length // 4096))
    return s.Brk(task=pick_task(draw, state), length=length)


def move(draw: Draw, state: State) -> s.Step | None:
    """mremap: grown where it lies, moved, or moved with the old range left."""
    area, page, pages = pick_range(draw, state)
    huge = state.huge.get(area)
    if huge is not None:
        # A kernel loses the promises to the rest of a private mapping, and loops without end where the pool is
        # exhausted and a child has the page at another address: neither may happen on a machine that others use.
        if len(state.tasks) > 1:
            return None
        if not huge & (MapFlag.SHARED | MapFlag.NORESERVE) or draw.flip():
            page, pages = 0, state.areas[area]
    new = draw.of(sorted({pages, max(1, pages - 1), pages + 1, pages + HUGE, max(1, pages // 2)}))
    way = draw.of(("grow", "to", "to", "dontunmap"))
    task = pick_task(draw, state)
    if way == "grow":
        if new > pages:
            state.areas[area] = max(state.areas[area], page + new)
        return s.Move(task=task, area=area, page=page, pages=pages, new_pages=new, flags=0)
    if len(state.areas) >= MAX_AREAS:
        return None
    to = state.name("a")
    flags = int(MremapFlag.MAYMOVE)
    if way == "dontunmap":
        flags |= int(MremapFlag.DONTUNMAP)
        new = pages
    state.areas[to] = new
    if huge is not None:
        state.huge[to] = huge
    if area in state.shared:
        state.shared.add(to)
    align = draw.of((4096, HUGE * 4096))
    return s.Move(
        task=task, area=area, page=page, pages=pages, new_pages=new, flags=flags, to=to, align=align
    )
