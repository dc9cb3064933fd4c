"""Steps on files through their descriptors."""

from __future__ import annotations

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import HUGE, State, pick_task
from pmcore.program import steps as s

__all__ = ["file", "pick_file"]


def pick_file(draw: Draw, state: State) -> tuple[str, int, list[str]]:
    """A descriptor, how many pages its file was made with, and the tasks that have it."""
    fd = draw.of(sorted(state.files))
    return fd, *state.files[fd]


def file(draw: Draw, state: State) -> s.Step | None:
    """Something done to a file through its descriptor; the file itself, as long as there are few."""
    if not state.files or (len(state.files) < 2 and draw.integer(0, 3) == 0):
        fd, task = state.name("m"), pick_task(draw, state)
        pages = draw.of((0, 1, 3, 8, 20, 64, HUGE, HUGE + 5))
        state.files[fd] = (pages, [task])
        return s.MemfdCreate(task=task, fd=fd, pages=pages, flags=draw.of((0, 0, 0, 2, 64)))
    fd, size, tasks = pick_file(draw, state)
    task = draw.of(tasks)
    page = draw.integer(0, size + 2)
    offset = page * 4096 + draw.of((0, 0, 0, 1, 4090))
    length = draw.of((1, 10, 4096, 8192, 3 * 4096 + 5, HUGE * 4096))
    what = draw.of(("pwrite",) * 4 + ("pread", "lseek", "lseek", "truncate", "punch", "punch", "falloc"))
    if what == "pwrite":
        text = draw.of(("x", "hello", "0123456789"))
        return s.Pwrite(task=task, fd=fd, offset=offset, text=text)
    if what == "pread":
        return s.Pread(task=task, fd=fd, offset=offset, length=min(length, 20000))
    if what == "lseek":
        return s.Lseek(task=task, fd=fd, offset=offset, whence=draw.of((0, 3, 3, 4, 4, 9)))
    if what == "truncate":
        return s.Ftruncate(task=task, fd=fd, length=offset)
    mode = 3 if what == "punch" else draw.of((0, 0, 1, 2, 8))
    return s.Fallocate(task=task, fd=fd, mode=mode, offset=offset, length=length)
