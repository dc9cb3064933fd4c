"""Steps on hugetlb mappings, often as whole huge pages, often more of them than there are."""

from __future__ import annotations

from typing import Any

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import FEATURES, HUGE, MAX_AREAS, State, pick_huge, pick_range, pick_task
from pmcore.program import steps as s
from pmcore.uapi import MapFlag

__all__ = ["huge_file", "map_huge", "map_huge_file", "touch_huge", "track_huge"]


def map_huge(draw: Draw, state: State) -> s.Step | None:
    """A hugetlb mapping, now and then of the wrong size or in the wrong place."""
    if len(state.areas) >= MAX_AREAS:
        return None
    over = draw.integer(0, 5) == 0 and state.areas
    sizes = (HUGE, 2 * HUGE, 2 * HUGE, 3 * HUGE, 4 * HUGE, 8 * HUGE, 16 * HUGE, 1, HUGE + 7)
    pages = draw.of(sizes)
    flags = MapFlag.ANONYMOUS | MapFlag.HUGETLB
    flags |= draw.of((MapFlag.PRIVATE, MapFlag.PRIVATE, MapFlag.SHARED))
    extra = (MapFlag.NORESERVE, MapFlag.NORESERVE, MapFlag.POPULATE, MapFlag.LOCKED)
    flags |= draw.of((*(0,) * 6, *extra, MapFlag.HUGE_2MB, MapFlag.HUGE_1GB))
    if flags & MapFlag.NORESERVE:  # more than there are, often
        pages = draw.of((16, 16, 12, 8, 3)) * HUGE
    prot = draw.of((3,) * 8 + (1, 0, 7))
    name = state.name("a")
    common: dict[str, Any] = {"area": name, "prot": prot}
    if over:
        area, page, _ = pick_range(draw, state)
        page = page // HUGE * HUGE if draw.integer(0, 3) else page
        flags |= draw.of((MapFlag.FIXED, MapFlag.FIXED, MapFlag.FIXED_NOREPLACE))
        pages = min(pages, 2 * HUGE)
        common |= {"task": pick_task(draw, state), "within": area, "page": page}
        if area in state.shared:  # where it is refused, that is what lies there
            state.shared.add(name)
    else:
        common["align"] = draw.of((HUGE * 4096,) * 9 + (4096,))
        common["page_offset"] = draw.of((0,) * 12 + (HUGE, 3))
    state.areas[name] = pages
    state.huge[name] = int(flags)
    return s.Map(**common, pages=pages, flags=int(flags))


def track_huge(draw: Draw, state: State) -> s.Step | None:
    """Registering or protecting hugetlb areas, mostly as a whole, and scans of them."""
    if not state.huge:
        return None
    if not state.fds:
        return state.open_uffd(int(draw.of(FEATURES[:4])))
    area, page, pages = pick_huge(draw, state)
    fd, owner = next(iter(state.fds.items()))
    common: dict[str, Any] = {"task": owner, "area": area}
    what = draw.of(("register", "register", "protect", "protect", "scan", "scan"))
    if what == "register":
        return s.UffdRegister(**common, pages=-(-state.areas[area] // HUGE) * HUGE, fd=fd)
    common |= {"page": page, "pages": pages}
    if what == "protect":
        return s.UffdProtect(**common, fd=fd, protect=draw.of((True, True, False)))
    cut = draw.of((0, 0, 0, 1, 100))
    return s.Scan(
        **(common | {"page": page + cut, "pages": pages}),
        vec_len=draw.of((0, 1, 3, 512)),
        max_pages=draw.of((0, 0, 7, HUGE, HUGE + 1)),
        flags=draw.of((0, 1, 1, 1, 3)),
        category_mask=draw.of((0, 2, 2, 8, 64)),
        return_mask=0x7F,
    )


def touch_huge(draw: Draw, state: State) -> s.Step | None:
    """Accesses to most of a hugetlb area, so that pools are exhausted."""
    if not state.huge:
        return None
    area, page, pages = pick_huge(draw, state)
    task, write = pick_task(draw, state), draw.flip()
    stride = draw.of((1, HUGE, HUGE - 1))
    return s.Touch(task=task, area=area, page=page, pages=pages, write=write, stride=stride)


def map_huge_file(draw: Draw, state: State) -> s.Step | None:
    """A mapping of a hugetlb file, shared or private, now and then of what it does not have."""
    if len(state.areas) >= MAX_AREAS or not state.huge_files:
        return None
    fd = draw.of(sorted(state.huge_files))
    flags = int(draw.of((MapFlag.SHARED, MapFlag.SHARED, MapFlag.PRIVATE, MapFlag.PRIVATE)))
    flags |= int(draw.of((0,) * 6 + (MapFlag.NORESERVE, MapFlag.POPULATE)))
    name, pages = state.name("a"), draw.of((HUGE, 2 * HUGE, 3 * HUGE, 5 * HUGE))
    state.areas[name] = pages
    state.huge[name] = flags
    return s.Map(
        task=draw.of(state.huge_files[fd]),
        area=name,
        pages=pages,
        prot=draw.of((3,) * 6 + (1, 0)),
        flags=flags,
        fd=fd,
        page_offset=draw.of((0, 0, 0, HUGE, 3)),
        align=HUGE * 4096,
    )


def huge_file(draw: Draw, state: State) -> s.Step | None:
    """Something done to a hugetlb file through its descriptor; the file itself, as long as there are few."""
    if not state.huge_files or (len(state.huge_files) < 2 and draw.integer(0, 5) == 0):
        fd = state.name("g")
        state.huge_files[fd] = [state.tasks[0]]
        pages = draw.of((0, 0, HUGE, 2 * HUGE, 4 * HUGE))
        return s.MemfdCreate(task=state.tasks[0], fd=fd, pages=pages, flags=draw.of((4, 4, 6, 4 | 21 << 26)))
    fd = draw.of(sorted(state.huge_files))
    task, size = draw.of(state.huge_files[fd]), HUGE * 4096
    offset = draw.integer(0, 4) * size + draw.of((0, 0, 0, 4096, 100))
    length = draw.of((size, size, 2 * size, 4096, size + 4096, 8 * size))
    what = draw.of(("truncate", "punch", "punch", "falloc", "falloc", "pread", "lseek", "pwrite", "close"))
    if what == "truncate":
        return s.Ftruncate(task=task, fd=fd, length=offset)
    if what == "pread":
        return s.Pread(task=task, fd=fd, offset=offset, length=min(length, 20000))
    if what == "lseek":
        return s.Lseek(task=task, fd=fd, offset=offset, whence=draw.of((0, 3, 4, 9)))
    if what == "pwrite":
        return s.Pwrite(task=task, fd=fd, offset=offset)
    if what == "close":
        state.huge_files[fd].remove(task)
        if not state.huge_files[fd]:
            del state.huge_files[fd]
        return s.CloseFd(task=task, fd=fd)
    mode = 3 if what == "punch" else draw.of((0, 0, 1))
    return s.Fallocate(task=task, fd=fd, mode=mode, offset=offset, length=length)
