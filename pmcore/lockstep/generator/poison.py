"""Steps that poison pages, or have them moved away from where memory is about to fail."""

from __future__ import annotations

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import State, pick_task
from pmcore.program import steps as s
from pmcore.uapi import Madvise

__all__ = ["POISON"]


def poison(draw: Draw, state: State) -> s.Step | None:
    """A few pages of private memory poisoned or soft-offlined; mostly written before, and touched afterwards."""
    private = sorted(area for area in state.areas if area not in state.shared and area not in state.huge)
    if not private:
        return None
    area, task = draw.of(private), pick_task(draw, state)
    page = draw.integer(0, state.areas[area] - 1)
    pages = draw.integer(1, min(3, state.areas[area] - page))
    advice = draw.of((Madvise.HWPOISON, Madvise.HWPOISON, Madvise.SOFT_OFFLINE))
    doing = s.Advise(task=task, area=area, page=page, pages=pages, advice=int(advice))
    if draw.integer(0, 3) == 0:
        return doing
    near = max(0, page - 1)
    after = s.Touch(task=pick_task(draw, state), area=area, page=near, pages=pages, write=draw.flip())
    state.next = [doing, *([after] if draw.flip() else [])]
    return s.Touch(task=task, area=area, page=page, pages=pages)


#: By how often it is drawn, among all others.
POISON = (poison,) * 12
