"""Steps that ask where pages are, or move them between nodes of memory."""

from __future__ import annotations

from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.state import State, pick_range, pick_task
from pmcore.program import steps as s

__all__ = ["NODES", "move_pages"]

#: At most about so many pages are asked for in one call.
_MOST = 48


def move_pages(draw: Draw, state: State) -> s.Step | None:
    """move_pages: mostly to a node that there may be, now and then with flags or a node that there are not."""
    area, page, pages = pick_range(draw, state)
    return s.MovePages(
        task=pick_task(draw, state),
        area=area,
        page=page,
        pages=pages,
        node=draw.of((0, 0, 0, 1, 1, 1, 9, (1 << 32) - 1)),
        query=draw.of((False, False, True)),
        flags=draw.of((2, 2, 2, 4, 4, 0, 8)),
        stride=max(draw.of((1, 1, 2, 7)), -(-pages // _MOST)),
        of=draw.of(("", pick_task(draw, state))),
    )


#: By how often each is drawn, among all others.
NODES = (move_pages,) * 16
