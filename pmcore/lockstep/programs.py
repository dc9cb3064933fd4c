"""Random page-table programs: a Hypothesis strategy, biased to the edges of huge pages, mappings and buffers.

Needs the `test` extra (Hypothesis).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from hypothesis import strategies as st

from pmcore.profile import KernelProfile
from pmcore.program import Program
from pmcore.program import steps as s
from pmcore.uapi import Madvise, MapFlag, MremapFlag, UffdFeature

__all__ = ["FOCUSES", "programs"]

_HUGE = 512
_FLAGS = int(MapFlag.PRIVATE | MapFlag.ANONYMOUS)
_MAX_AREAS = 5
_MAX_TASKS = 3

#: Advice by how often it is drawn.
_ADVICE = (
    *(Madvise.DONTNEED,) * 4,
    *(Madvise.FREE,) * 3,
    *(Madvise.PAGEOUT,) * 6,
    *(Madvise.COLD,) * 2,
    *(Madvise.HUGEPAGE,) * 3,
    *(Madvise.NOHUGEPAGE,) * 2,
    *(Madvise.COLLAPSE,) * 3,
    *(Madvise.POPULATE_READ,) * 2,
    *(Madvise.POPULATE_WRITE,) * 2,
    *(Madvise.GUARD_INSTALL,) * 2,
    *(Madvise.GUARD_REMOVE,) * 2,
    Madvise.WILLNEED,
    Madvise.DONTFORK,
    Madvise.DOFORK,
    Madvise.WIPEONFORK,
    Madvise.KEEPONFORK,
    Madvise.NORMAL,
    Madvise.RANDOM,
    Madvise.SEQUENTIAL,
    Madvise.DONTDUMP,
    Madvise.DODUMP,
    Madvise.REMOVE,
    Madvise.DONTNEED_LOCKED,
    *(Madvise.MERGEABLE,) * 2,
    Madvise.UNMERGEABLE,
)
_UFFD = (
    UffdFeature.WP_ASYNC,
    UffdFeature.WP_ASYNC,
    UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED,
    UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.SIGBUS,
    UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_UNPOPULATED | UffdFeature.SIGBUS,
    UffdFeature.SIGBUS,
    1 << 40,
)


@attrs.define
class _State:
    """What a program under construction has."""

    areas: dict[str, int] = attrs.field(factory=dict)
    tasks: list[str] = attrs.field(factory=lambda: ["main"])
    fds: list[str] = attrs.field(factory=list)
    made: int = 0

    def name(self, kind: str) -> str:
        self.made += 1
        return f"{kind}{self.made}"


@st.composite
def programs(
    draw: st.DrawFn, profile: KernelProfile | None = None, *, max_steps: int = 40, focus: str = ""
) -> Program:
    """A program of up to `max_steps` steps that the kernel of `profile` could be asked to run.

    `focus` names one of FOCUSES: a subject that its steps are biased to.
    """
    often, advice = FOCUSES[focus] if focus else ((), 0)
    kinds = (*_KINDS, *often)
    state = _State()
    first = _map(draw, state)
    assert isinstance(first, s.Map)
    steps: list[s.Step] = [first]
    if advice:
        steps.append(s.Advise(area=first.area, pages=first.pages, advice=advice))
    if first.pages >= _HUGE and draw(st.booleans()):
        steps.append(s.Advise(area=first.area, pages=first.pages, advice=int(Madvise.HUGEPAGE)))
    length = draw(st.sampled_from([n for n in (1, 12, 20, 28, 36, 40, 40) if n <= max_steps] or [max_steps]))
    while len(steps) < length:
        kind = draw(st.sampled_from(kinds))
        step = kind(draw, state)
        if step is not None:
            steps.append(step)
        if isinstance(step, s.Map) and advice and draw(st.integers(0, 3)):
            steps.append(s.Advise(area=step.area, pages=step.pages, advice=advice))
        if isinstance(step, s.Map) and step.pages >= _HUGE and draw(st.integers(0, 2)):
            steps.append(s.Advise(area=step.area, pages=step.pages, advice=int(Madvise.HUGEPAGE)))
    return Program(name="random", steps=tuple(steps))


_Maker = Callable[[st.DrawFn, _State], s.Step | None]


def _pick_area(draw: st.DrawFn, state: _State) -> str:
    return draw(st.sampled_from(sorted(state.areas)))


def _task(draw: st.DrawFn, state: _State) -> str:
    return draw(st.sampled_from(state.tasks))


def _range(draw: st.DrawFn, state: _State) -> tuple[str, int, int]:
    """An area, and a range in it that likes edges."""
    area = _pick_area(draw, state)
    pages = state.areas[area]
    edges = sorted(
        {e for e in (0, 1, pages // 2, pages - 1, _HUGE - 1, _HUGE, _HUGE + 1, 2 * _HUGE) if 0 <= e < pages}
    )
    page = draw(st.one_of(st.sampled_from(edges), st.integers(0, pages - 1)))
    left = pages - page
    spans = sorted({n for n in (1, 2, left, left - 1, left // 2, _HUGE, _HUGE - 1, 8) if 1 <= n <= left})
    return area, page, draw(st.one_of(st.sampled_from(spans), st.integers(1, left)))


def _map(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.areas) >= _MAX_AREAS:
        return None
    name = state.name("a")
    huge = draw(st.booleans())
    pages = draw(st.sampled_from((_HUGE, 2 * _HUGE, 2 * _HUGE + 7) if huge else (1, 2, 3, 5, 8, 16, 33, 64)))
    extra = draw(st.sampled_from((0,) * 8 + (MapFlag.POPULATE, MapFlag.LOCKED, MapFlag.NORESERVE)))
    prot = draw(st.sampled_from((3,) * 8 + (1, 0, 2, 7)))
    state.areas[name] = pages
    return s.Map(
        area=name, pages=pages, prot=prot, flags=_FLAGS | int(extra), align=_HUGE * 4096 if huge else 4096
    )


def _map_over(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.areas) >= _MAX_AREAS:
        return None
    area, page, pages = _range(draw, state)
    name = state.name("a")
    state.areas[name] = pages
    flags = _FLAGS | draw(st.sampled_from((MapFlag.FIXED, MapFlag.FIXED, MapFlag.FIXED_NOREPLACE)))
    return s.Map(
        task=_task(draw, state),
        area=name,
        pages=pages,
        within=area,
        page=page,
        prot=draw(st.sampled_from((3, 3, 3, 1))),
        flags=int(flags),
    )


def _ranged(kind: Any, **fields: Any) -> _Maker:
    """A step over a range, with these fields drawn."""

    def make(draw: st.DrawFn, state: _State) -> s.Step | None:
        area, page, pages = _range(draw, state)
        drawn = {name: draw(strategy) for name, strategy in fields.items()}
        step: s.Step = kind(task=_task(draw, state), area=area, page=page, pages=pages, **drawn)
        return step

    return make


def _write(draw: st.DrawFn, state: _State) -> s.Step | None:
    area, page, pages = _range(draw, state)
    offset = page * 4096 + draw(st.sampled_from((0, 1, 100, 4090, 4095)))
    text = draw(st.sampled_from(("x", "hello", "0123456789")))
    same = draw(st.sampled_from((1, 1, 2, 3, 8)))
    if draw(st.booleans()):
        return s.Read(
            task=_task(draw, state), area=area, offset=offset, length=min(len(text) * 700, pages * 4096)
        )
    return s.Write(task=_task(draw, state), area=area, offset=offset, text=text, pages=min(same, pages))


def _equal(draw: st.DrawFn, state: _State) -> s.Step | None:
    """Equal pages: the same short text at the same place of each."""
    area, page, pages = _range(draw, state)
    return s.Write(
        task=_task(draw, state),
        area=area,
        offset=page * 4096 + draw(st.sampled_from((0, 0, 4088))),
        text=draw(st.sampled_from(("x", "y"))),
        pages=min(pages, draw(st.sampled_from((1, 2, 3, 9)))),
    )


def _ksm_scan(draw: st.DrawFn, state: _State) -> s.Step | None:
    return s.KsmScan(
        scans=draw(st.sampled_from((1, 1, 2, 2, 3))),
        zero_pages=draw(st.sampled_from((False, False, True))),
        sharing=draw(st.sampled_from((256,) * 6 + (2, 3))),
    )


def _ksm_unmerge(draw: st.DrawFn, state: _State) -> s.Step | None:
    return s.KsmUnmerge()


def _move(draw: st.DrawFn, state: _State) -> s.Step | None:
    area, page, pages = _range(draw, state)
    new = draw(
        st.sampled_from(sorted({pages, max(1, pages - 1), pages + 1, pages + _HUGE, max(1, pages // 2)}))
    )
    way = draw(st.sampled_from(("grow", "to", "to", "dontunmap")))
    task = _task(draw, state)
    if way == "grow":
        if new > pages:
            state.areas[area] = max(state.areas[area], page + new)
        return s.Move(task=task, area=area, page=page, pages=pages, new_pages=new, flags=0)
    if len(state.areas) >= _MAX_AREAS:
        return None
    to = state.name("a")
    flags = int(MremapFlag.MAYMOVE)
    if way == "dontunmap":
        flags |= int(MremapFlag.DONTUNMAP)
        new = pages
    state.areas[to] = new
    align = draw(st.sampled_from((4096, _HUGE * 4096)))
    return s.Move(
        task=task, area=area, page=page, pages=pages, new_pages=new, flags=flags, to=to, align=align
    )


def _fork(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.tasks) >= _MAX_TASKS:
        return None
    parent, child = _task(draw, state), state.name("t")
    state.tasks.append(child)
    return s.Fork(task=parent, child=child)


def _exit(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.tasks) < 2:
        return None
    task = _task(draw, state)
    state.tasks.remove(task)
    return s.Exit(task=task)


def _uffd_open(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.fds) >= 2:
        return None
    fd = state.name("u")
    state.fds.append(fd)
    return s.UffdOpen(task=state.tasks[0], fd=fd, features=int(draw(st.sampled_from(_UFFD))))


def _uffd(draw: st.DrawFn, state: _State) -> s.Step | None:
    if not state.fds:
        return _uffd_open(draw, state)
    area, page, pages = _range(draw, state)
    fd = draw(st.sampled_from(state.fds))
    common: dict[str, Any] = {"task": state.tasks[0], "area": area, "page": page, "pages": pages, "fd": fd}
    what = draw(st.sampled_from(("register",) * 4 + ("protect",) * 5 + ("unregister", "close")))
    if what == "register":
        return s.UffdRegister(**common, mode=draw(st.sampled_from((2,) * 6 + (0, 8))))
    if what == "protect":
        return s.UffdProtect(**common, protect=draw(st.sampled_from((True, True, False))))
    if what == "close":
        state.fds.remove(fd)
        return s.CloseFd(task=state.tasks[0], fd=fd)
    return s.UffdUnregister(**common)


def _scan(draw: st.DrawFn, state: _State) -> s.Step | None:
    area, page, pages = _range(draw, state)
    masks = st.sampled_from((0, 0, 0, 1, 2, 3, 8, 10, 16, 24, 32, 64, 0x7F, 1 << 8, 1 << 40))
    return s.Scan(
        task=_task(draw, state),
        area=area,
        page=page,
        pages=pages,
        vec_len=draw(st.sampled_from((0, 1, 2, 3, 512, 513, 4096))),
        max_pages=draw(st.sampled_from((0, 0, 0, 1, 7, 511, 512, pages))),
        flags=draw(st.sampled_from((0, 0, 1, 1, 2, 3, 4))),
        category_inverted=draw(masks),
        category_mask=draw(masks),
        category_anyof_mask=draw(masks),
        return_mask=draw(st.sampled_from((0x7F, 0x7F, 2, 8, 0x1FF, 0))),
    )


def _clear_refs(draw: st.DrawFn, state: _State) -> s.Step | None:
    return s.ClearRefs(task=_task(draw, state), what=draw(st.sampled_from((1, 2, 3, 5, 9))))


_advise = _ranged(s.Advise, advice=st.sampled_from([int(advice) for advice in _ADVICE]))
_KINDS: tuple[_Maker, ...] = (
    *(_map,) * 2,
    _map_over,
    _ranged(s.Unmap),
    *(_ranged(s.Protect, prot=st.sampled_from((1, 3, 3, 0, 2, 8, 64))),) * 2,
    *(_advise,) * 10,
    *(_ranged(s.Touch, write=st.booleans(), stride=st.sampled_from((1, 1, 2, 7))),) * 8,
    *(_write,) * 4,
    *(_move,) * 3,
    *(_fork,) * 2,
    _exit,
    *(_uffd,) * 5,
    *(_scan,) * 5,
    _ranged(s.Lock, onfault=st.booleans()),
    _ranged(s.Unlock),
    _ranged(s.Mincore),
    _clear_refs,
    _ksm_scan,
)
#: What programs may be biased to: steps that are drawn more often, and what is advised of new mappings.
FOCUSES: dict[str, tuple[tuple[_Maker, ...], int]] = {
    "ksm": (
        (*(_ksm_scan,) * 12, *(_equal,) * 8, *(_fork,) * 2, _ksm_unmerge),
        int(Madvise.MERGEABLE),
    ),
}
