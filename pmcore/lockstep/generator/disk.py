"""Steps about files on a disk: made, mapped, written back, dropped from the cache, reclaimed."""

from __future__ import annotations

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import MAX_AREAS, State, pick_task
from pmcore.program import steps as s
from pmcore.uapi import Madvise, MapFlag

__all__ = ["DISK", "disk_compared", "open_disk_file"]

#: Pages that files are made with.
_PAGES = (1, 3, 8, 17, 20, 40, 64)
_MOST = 2
#: Pages that files opened from then on read ahead.
_AHEAD = (0, 4, 8, 16, 32)
#: Pages that are accessed one after the other, each in a step, where others are read ahead.
_APART = 9
#: What is done to a range of a mapping, one after the other.
_SEQUENCES: tuple[tuple[Madvise | str, ...], ...] = (
    ("write", "fsync", "write"),
    ("write", "fsync", Madvise.PAGEOUT, "read"),
    ("write", Madvise.PAGEOUT, "read", "fsync"),
    ("write", Madvise.PAGEOUT, "fsync", "drop", "read"),
    ("read", Madvise.PAGEOUT, "read", Madvise.COLD),
    ("read", Madvise.DONTNEED, "read", Madvise.DONTNEED, "read"),
    ("write", Madvise.DONTNEED, "fsync", "drop", "read"),
    ("read", Madvise.PAGEOUT, "pwrite", "read"),
    (Madvise.WILLNEED, "read", "write"),
    ("write", Madvise.REMOVE, "read", "fsync"),
    ("write", "msync", "write", "msync"),
    ("read", "fork", "write", "fsync"),
)


def _disk_fds(state: State) -> list[str]:
    return sorted(fd for fd in state.files if fd in state.disk)


def open_disk_file(draw: Draw, state: State) -> s.Step | None:
    """A new file on the disk, or one that is there opened once more."""
    known = sorted(set(state.disk.values()))
    if known and draw.integer(0, 3) == 0:
        name = draw.of(known)
        task, fd = pick_task(draw, state), state.name("d")
        state.disk[fd] = name
        made = [pages for other, (pages, _) in state.files.items() if state.disk.get(other) == name]
        state.files[fd] = (made[0] if made else 8, [task])
        return s.OpenFile(task=task, fd=fd, file=name)
    if len(known) >= _MOST:
        return None
    task, fd, pages = pick_task(draw, state), state.name("d"), draw.of(_PAGES)
    name = f"f{len(known)}"
    state.disk[fd], state.files[fd] = name, (pages, [task])
    step = s.OpenFile(task=task, fd=fd, file=name, pages=pages, new=True)
    ahead = draw.of((None,) * 4 + _AHEAD)
    if ahead is None:
        return step
    state.next = [step]
    return s.ReadAhead(length=ahead * 4096)


def _pick(draw: Draw, state: State) -> tuple[str, int, str] | None:
    """A descriptor of a file on the disk, the pages that it was made with, and a task that has it."""
    fds = _disk_fds(state)
    if not fds:
        return None
    fd = draw.of(fds)
    pages, tasks = state.files[fd]
    return fd, pages, draw.of(tasks)


def _map(draw: Draw, state: State) -> s.Step | None:
    picked = _pick(draw, state)
    if picked is None or state.locked_all:
        return open_disk_file(draw, state)
    if len(state.areas) >= MAX_AREAS:
        return None
    fd, pages, task = picked
    name = state.name("a")
    state.areas[name] = length = max(1, pages + draw.of((0, 0, 0, 2, -1, -pages // 2)))
    state.shared.add(name)
    state.mapped[name] = fd
    return s.Map(
        task=task,
        area=name,
        pages=length,
        fd=fd,
        prot=draw.of((3, 3, 3, 3, 1)),
        flags=int(
            draw.of((MapFlag.SHARED, MapFlag.SHARED, MapFlag.PRIVATE))
            | draw.of((0,) * 6 + (0 if state.ahead else MapFlag.POPULATE,))
        ),
        page_offset=draw.of((0, 0, 0, 1, pages // 2)),
    )


def _call(draw: Draw, state: State) -> s.Step | None:
    """Something done through a descriptor."""
    picked = _pick(draw, state)
    if picked is None:
        return open_disk_file(draw, state)
    fd, pages, task = picked
    page = draw.integer(0, pages + 2)
    offset = page * 4096 + draw.of((0, 0, 0, 1, 100, 4090))
    length = draw.of((1, 10, 4096, 4096, 8192, 3 * 4096 + 5, 20 * 4096))
    what = draw.of(
        ("pwrite",) * 5
        + ("pread",) * 5
        + ("fsync",) * 4
        + (
            "truncate",
            "truncate",
            "punch",
            "punch",
            "punch",
            "falloc",
            "lseek",
            "lseek",
            "sync",
            "drop",
            "ahead",
            "caches",
        )
    )
    if what == "pwrite":
        return s.Pwrite(task=task, fd=fd, offset=offset, text=draw.of(("x", "hello", "0123456789" * 500)))
    if what == "pread":
        return s.Pread(task=task, fd=fd, offset=offset, length=length)
    if what == "fsync":
        return s.Fsync(task=task, fd=fd)
    if what == "sync":
        return s.Sync(task=task)
    if what == "truncate":
        return s.Ftruncate(task=task, fd=fd, length=offset)
    if what == "lseek":
        return s.Lseek(task=task, fd=fd, offset=offset, whence=draw.of((3, 3, 4, 4, 9)))
    if what == "drop":
        return _drop(draw, state, task, fd, offset, length)
    if what == "caches":
        if draw.flip():
            return s.DropCaches(task=task)  # what is dirty, or mapped, stays
        state.next = [s.DropCaches(task=task)]
        return s.Fsync(task=task, fd=fd)
    if what == "ahead":
        return s.Fadvise(task=task, fd=fd, offset=offset, length=length, advice=3)
    mode = 3 if what == "punch" else draw.of((0, 0, 1, 2))
    return s.Fallocate(task=task, fd=fd, mode=mode, offset=offset, length=length)


def _drop(draw: Draw, state: State, task: str, fd: str, offset: int, length: int) -> s.Step:
    """The cache dropped, after all was written: what is being written at that moment stays or goes."""
    if draw.flip():
        offset = length = 0
    state.next = [
        s.Fadvise(task=task, fd=fd, offset=offset, length=length, advice=draw.of((4, 4, 4, 0, 1, 2, 9)))
    ]
    return s.Fsync(task=task, fd=fd)


def _sequence(draw: Draw, state: State) -> s.Step | None:
    """One thing after the other over a range of a mapping of a file on the disk."""
    areas = sorted(area for area in state.areas if area in state.mapped)
    if not areas:
        return _map(draw, state)
    area = draw.of(areas)
    fd = state.mapped[area]
    if fd not in state.files:
        return None
    pages = state.areas[area]
    page = draw.integer(0, pages - 1)
    count = draw.integer(1, min(_APART, pages - page) if state.ahead else pages - page)
    steps: list[s.Step] = []
    task = pick_task(draw, state)
    owner = draw.of(state.files[fd][1])
    for what in draw.of(_SEQUENCES):
        if isinstance(what, Madvise):
            steps.append(s.Advise(task=task, area=area, page=page, pages=count, advice=int(what)))
        elif what == "fsync":
            steps.append(s.Fsync(task=owner, fd=fd))
        elif what == "msync":
            steps.append(s.Msync(task=task, area=area, page=page, pages=count, flags=4))
        elif what == "drop":
            steps.append(s.Fadvise(task=owner, fd=fd))
        elif what == "pwrite":
            steps.append(s.Pwrite(task=owner, fd=fd, offset=page * 4096 + 7, text="again"))
        elif what == "fork":
            continue
        else:
            steps += _touches(state, task, area, page, count, write=what == "write")
    state.next = steps[1:]
    return steps[0]


def _touches(state: State, task: str, area: str, page: int, pages: int, *, write: bool) -> list[s.Step]:
    """Accesses to pages: in one step, or page by page where each may have others read ahead of the next."""
    if not state.ahead:
        return [s.Touch(task=task, area=area, page=page, pages=pages, write=write)]
    return [s.Touch(task=task, area=area, page=page + n, pages=1, write=write) for n in range(pages)]


def _touch(draw: Draw, state: State) -> s.Step | None:
    """An access to one page of a mapping of a file on the disk, often one after the last."""
    areas = sorted(area for area in state.areas if area in state.mapped)
    if not areas:
        return _map(draw, state)
    area, task = draw.of(areas), pick_task(draw, state)
    pages = state.areas[area]
    page = draw.integer(0, pages - 1)
    write = draw.of((False, False, True))
    first, *rest = (
        s.Touch(task=task, area=area, page=one, pages=1, write=write)
        for one in range(page, min(pages, page + draw.of((1, 1, 2, 4, _APART))))
    )
    state.next = [*rest]
    return first


#: By how often each is drawn, among all others.
DISK = (*(open_disk_file,) * 3, *(_map,) * 8, *(_call,) * 22, *(_sequence,) * 14, *(_touch,) * 6)


def disk_compared(step: s.Step, state: State) -> bool:
    """Whether a step about files on a disk can be compared."""
    if isinstance(step, s.Fallocate) and step.fd in state.disk and step.mode & 0x38:
        return False  # blocks moved or zeroed are not modelled
    if not state.slow_disk:
        return True
    area = getattr(step, "area", "")
    files = area in state.shared or (state.mixed and bool(area))
    if _makes_holes(step, state, files=files):
        state.holes |= not state.ahead
        return not state.ahead
    if (isinstance(step, s.ReadAhead) and step.length) or (
        isinstance(step, s.Advise) and step.advice == Madvise.HUGEPAGE and files
    ):
        state.ahead |= not state.holes
        return not state.holes
    return not state.ahead or not files or _one_page(step)


def _makes_holes(step: s.Step, state: State, *, files: bool) -> bool:
    """Whether the blocks of a file on the disk lie in several pieces after a step: each is read by itself."""
    if isinstance(step, s.Fallocate | s.Ftruncate):
        return step.fd in state.disk
    if isinstance(step, s.Pwrite):
        return step.fd in state.disk and step.offset + len(step.text) > 4096 * state.files[step.fd][0]
    return isinstance(step, s.Advise) and step.advice == Madvise.REMOVE and files


def _one_page(step: s.Step) -> bool:
    """Whether a step has faults in one page alone: what is being read ahead may be there for the next, or not yet."""
    if isinstance(step, s.Touch):
        return step.pages == 1
    if isinstance(step, s.Advise):
        return step.pages == 1 or step.advice not in (Madvise.POPULATE_READ, Madvise.POPULATE_WRITE)
    if isinstance(step, s.Read):
        return step.offset % 4096 + step.length <= 4096
    if isinstance(step, s.Write):
        return step.offset % 4096 + len(step.text) <= 4096
    return True
