"""Steps that watch writes: userfaultfds, scans, clear_refs, raw reads of pagemap."""

from __future__ import annotations

from typing import Any

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import FEATURES, HUGE, State, pick_huge, pick_range, pick_task
from pmcore.program import steps as s
from pmcore.uapi import Madvise

__all__ = [
    "arm",
    "bounce",
    "clear_refs",
    "clear_soft_dirty",
    "idle",
    "pagemap_read",
    "query_maps",
    "scan",
    "uffd",
    "uffd_open",
]


def arm(draw: Draw, state: State) -> s.Step | None:
    """Write protection over a range that is populated in part: put on, written, put on again, by either way."""
    area, page, pages = pick_range(draw, state)
    steps: list[s.Step] = []
    if not state.fds:
        features = draw.of((FEATURES[0], FEATURES[2], FEATURES[4], FEATURES[7]))
        steps.append(state.open_uffd(int(features)))
    fd, task = next(iter(state.fds.items()))
    if draw.flip():
        part = max(1, pages // 2)
        steps.append(s.Touch(task=task, area=area, page=page, pages=part))
        if draw.flip():
            steps.append(s.Advise(task=task, area=area, page=page, pages=part, advice=int(Madvise.PAGEOUT)))
    steps.append(
        s.UffdRegister(task=task, fd=fd, area=area, pages=state.areas[area], mode=2),
    )
    for _ in range(draw.integer(1, 2)):
        if draw.flip():
            steps.append(s.UffdProtect(task=task, fd=fd, area=area, page=page, pages=pages))
        else:
            steps.append(
                s.Scan(task=task, area=area, page=page, pages=pages, flags=1, category_mask=2, return_mask=2)
            )
        write = draw.of((True, True, False))
        steps.append(s.Touch(task=task, area=area, page=page, pages=pages, write=write))
    state.next = steps[1:]
    return steps[0]


def bounce(draw: Draw, state: State) -> s.Step | None:
    """Every second page of an area present: its scans fill the kernel's buffer of 512 regions, or nearly."""
    large = sorted(area for area, pages in state.areas.items() if pages >= 2 * HUGE)
    if not large:
        return None
    more = [
        area for area in large if state.areas[area] > 2 * HUGE + 2
    ]  # the buffer is filled, and begun anew
    area, task = draw.of(more or large), pick_task(draw, state)
    pages = state.areas[area]
    regions = -(-pages // 2)
    scan = s.Scan(
        task=task,
        area=area,
        page=draw.of((0, 0, 1)),
        pages=pages - 1,
        vec_len=draw.of((HUGE - 1, HUGE, HUGE + 1, regions, regions - 1, *(2 * HUGE,) * 4)),
        max_pages=draw.of((0, 0, 0, 0, HUGE - 1, HUGE, HUGE + 1, regions)),
        flags=draw.of((0, 0, 1)),
        category_mask=draw.of((8, 8, 2)),
        return_mask=draw.of((8, 0x7F)),
    )
    state.next = [s.Touch(task=task, area=area, pages=pages, stride=2), scan]
    return s.Advise(task=task, area=area, pages=pages, advice=int(Madvise.DONTNEED))


def uffd_open(draw: Draw, state: State) -> s.Step | None:
    """A userfaultfd of the first task, with one set of features or another."""
    if len(state.fds) >= 2:
        return None
    return state.open_uffd(int(draw.of(FEATURES)))


def uffd(draw: Draw, state: State) -> s.Step | None:
    """Something done through a userfaultfd, or one opened."""
    if not state.fds:
        return uffd_open(draw, state)
    area, page, pages = (pick_huge if bool(state.huge) and draw.flip() else pick_range)(draw, state)
    fd = draw.of(sorted(state.fds))
    common: dict[str, Any] = {"task": state.fds[fd], "area": area, "page": page, "pages": pages, "fd": fd}
    what = draw.of(("register",) * 4 + ("protect",) * 5 + ("unregister", "close"))
    if what == "register":
        return s.UffdRegister(**common, mode=draw.of((2,) * 6 + (0, 8)))
    if what == "protect":
        return s.UffdProtect(**common, protect=draw.of((True, True, False)))
    if what == "close":
        return s.CloseFd(task=state.fds.pop(fd), fd=fd)
    return s.UffdUnregister(**common)


def scan(draw: Draw, state: State) -> s.Step:
    """A PAGEMAP_SCAN of any masks, into a vector that is often too small."""
    area, page, pages = pick_range(draw, state)
    masks = (0, 0, 0, 1, 2, 3, 8, 10, 16, 24, 32, 64, 0x7F, 1 << 8, 1 << 40)
    return s.Scan(
        task=pick_task(draw, state),
        area=area,
        page=page,
        pages=pages,
        shift=draw.of((0,) * 20 + (1, 4095)),
        vec_len=draw.of((0, 1, 2, 3, 511, 512, 513, 4096)),
        max_pages=draw.of((0, 0, 0, 1, 7, 511, 512, 513, pages, max(pages - 1, 1), pages + 1)),
        flags=draw.of((0, 0, 1, 1, 2, 3, 4)),
        category_inverted=draw.of(masks),
        category_mask=draw.of(masks),
        category_anyof_mask=draw.of(masks),
        return_mask=draw.of((0x7F, 0x7F, 2, 8, 0x1FF, 0)),
    )


def clear_refs(draw: Draw, state: State) -> s.Step | None:
    """A number written to clear_refs, now and then one that it refuses."""
    return s.ClearRefs(task=pick_task(draw, state), what=draw.of((1, 2, 3, 4, 4, 4, 4, 5, 9)))


def clear_soft_dirty(draw: Draw, state: State) -> s.Step | None:
    """Soft-dirty bits cleared."""
    return s.ClearRefs(task=pick_task(draw, state))


def pagemap_read(draw: Draw, state: State) -> s.Step:
    """A read of pagemap at any offset, aligned or not, and at the end of user space."""
    area, page, pages = pick_range(draw, state)
    task = pick_task(draw, state)
    if draw.integer(0, 4) == 0:
        offset, length = draw.of((0, 0, 8, 1, 4096)), draw.of((0, 8, 64, 3))
        return s.PagemapRead(task=task, area=area, offset=offset, length=length, from_end=True)
    shift = draw.of((0,) * 8 + (1, 4, 7))
    length = draw.of((0, 8, 8, 16, 8 * pages, 8 * pages, 8 * pages + 4, 4096, 8 * (pages + 600), 5))
    return s.PagemapRead(task=task, area=area, offset=8 * page + shift, length=length)


def query_maps(draw: Draw, state: State) -> s.Step:
    """A PROCMAP_QUERY near a boundary of an area: of flags that fit or not, with room for the name or too little."""
    area, page, pages = pick_range(draw, state)
    offset = draw.of((page, page, page + pages, state.areas[area])) * 4096 + draw.of((0, 0, 1, 4095))
    # Names of files on a disk are as long as the workbench's directory is.
    rooms = (0, 4096, 4096) if state.disk else (0, 4096, 4096, 1, 9, 17, 20)
    return s.QueryMaps(
        task=pick_task(draw, state),
        area=area,
        offset=offset,
        flags=draw.of((0, 0, 16, 16, 16, 17, 18, 20, 24, 32, 48, 1, 2, 3, 8, 64, 1 << 40)),
        size=draw.of((104,) * 8 + (96, 24, 23, 40, 4096, 4097)),
        name_room=draw.of(rooms),
        build_id_room=draw.of((0, 0, 0, 20, 1)),
    )


def idle(draw: Draw, state: State) -> s.Step:
    """Pages marked idle, or the bitmap read; where the kernel tracks idle pages."""
    area, page, pages = pick_range(draw, state)
    kind = draw.of((s.MarkIdle, s.ReadIdle))
    step: s.Step = kind(task=pick_task(draw, state), area=area, page=page, pages=pages)
    return step
