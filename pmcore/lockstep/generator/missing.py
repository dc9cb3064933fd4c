"""Steps on ranges whose missing pages or minor faults a userfaultfd is told of, and the ioctls that answer them."""

from __future__ import annotations

from typing import Any

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import HUGE, State, pick_huge, pick_range
from pmcore.program import steps as s
from pmcore.uapi import UffdFeature

__all__ = ["fill", "watch"]

#: With each of them a fault that nobody answers is SIGBUS: it does not wait.
_FEATURES = (
    UffdFeature.SIGBUS,
    UffdFeature.SIGBUS | UffdFeature.WP_UNPOPULATED,
    UffdFeature.SIGBUS | UffdFeature.WP_ASYNC,
    UffdFeature.SIGBUS | UffdFeature.EVENT_FORK,
    UffdFeature.SIGBUS | UffdFeature.EVENT_REMAP | UffdFeature.EVENT_UNMAP | UffdFeature.EVENT_REMOVE,
)
_KINDS: tuple[Any, ...] = (
    *(s.UffdCopy,) * 4,
    *(s.UffdZeropage,) * 2,
    *(s.UffdContinue,) * 3,
    *(s.UffdPoison,) * 2,
    *(s.UffdMove,) * 4,
)


def watch(draw: Draw, state: State) -> s.Step | None:
    """A range registered for missing pages or minor faults, then accesses to it and answers."""
    fds = sorted(state.sigbus & state.fds.keys())
    steps: list[s.Step] = []
    if not fds:
        if len(state.fds) >= 3:
            return None
        opened = state.open_uffd(int(draw.of(_FEATURES)))
        steps.append(opened)
        fd, task = opened.fd, opened.task
    else:
        fd = draw.of(fds)
        task = state.fds[fd]
    area, page, pages = (pick_huge if bool(state.huge) and draw.flip() else pick_range)(draw, state)
    mode = draw.of((1, 1, 1, 3, 4, 5, 6, 7) if area in state.shared or area in state.huge else (1, 1, 3, 4))
    common: dict[str, Any] = {"task": task, "area": area}
    whole: dict[str, Any] = (
        {"page": 0, "pages": state.areas[area]} if draw.flip() else {"page": page, "pages": pages}
    )
    steps.append(s.UffdRegister(**common, **whole, fd=fd, mode=mode, ioctls=True))
    if draw.flip():
        steps.append(s.Touch(**common, page=page, pages=pages, write=draw.flip()))
    else:
        steps.append(_answered(draw, state, fd, common, page, pages))
    state.next = steps[1:]
    return steps[0]


def fill(draw: Draw, state: State) -> s.Step | None:
    """One of the ioctls that fill holes, mostly from or to something that is there."""
    if not state.fds:
        return None
    fd = draw.of(sorted(state.sigbus & state.fds.keys()) or sorted(state.fds))
    aligned = bool(state.huge) and draw.flip()
    area, page, pages = (pick_huge if aligned else pick_range)(draw, state)
    if not aligned:
        pages = min(pages, draw.of((1, 2, 3, 8, 40, HUGE, HUGE)))
    kind = draw.of(_KINDS)
    common: dict[str, Any] = {"task": state.fds[fd], "fd": fd, "area": area, "page": page, "pages": pages}
    if draw.integer(0, 30) == 0:
        return s.UffdWake(**common)
    if kind not in (s.UffdCopy, s.UffdMove):
        return _step(kind, **common, mode=draw.of((0, 0, 0, 1, 2)))
    source, first, _ = pick_range(draw, state)
    if draw.flip():
        first = page if page < state.areas[source] else 0
    mode = draw.of((0, 0, 0, 2, 2, 3, 4))
    return _step(kind, **common, source=source, source_page=first, mode=mode)


def _answered(
    draw: Draw, state: State, fd: str, common: dict[str, Any], page: int, pages: int
) -> s.TouchAnswered:
    """Accesses whose faults are answered, few of them: each is a call of its own."""
    answer = draw.of(s.ANSWERS)
    if answer in ("copy", "move"):
        source, first, _ = pick_range(draw, state)
        common = common | {"source": source, "source_page": first}
    pages = min(pages, draw.of((1, 3, 20)))
    write = draw.flip()
    return s.TouchAnswered(**common, page=page, pages=pages, fd=fd, answer=answer, write=write)


def _step(kind: type[s.Step], **fields: Any) -> s.Step:
    return kind(**fields)
