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

__all__ = ["KEPT", "programs", "thp_settings"]

_HUGE = 512
#: Pages of a mapping that reaches over the gap between two areas.
_WIDE = 1024 + 40
#: PROT_GROWSDOWN, PROT_GROWSUP.
_DOWN, _UP = 0x01000000, 0x02000000
_FLAGS = int(MapFlag.PRIVATE | MapFlag.ANONYMOUS)
_MAX_AREAS = 5
#: A page that every program with hugetlb mappings touches first and then leaves alone: on a running kernel of before
#: 2026-07 a scan that write-protects a hugetlb mapping where the level above the PMDs is empty never ends (DV-026).
KEPT = "kept"
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
    #: Userfaultfds, and the task that opened each.
    fds: dict[str, str] = attrs.field(factory=dict)
    #: Descriptors of files: how many pages the file was made with, and the tasks that have it.
    files: dict[str, tuple[int, list[str]]] = attrs.field(factory=dict)
    #: Areas that map files.
    shared: set[str] = attrs.field(factory=set)
    #: Areas of hugetlb, and the flags that they were mapped with.
    huge: dict[str, int] = attrs.field(factory=dict)
    #: Whether areas may lie in each other.
    mixed: bool = False
    #: Whether mlockall was asked for: what is mapped from then on may be locked.
    locked_all: bool = False
    made: int = 0
    #: Pages of the smaller huge pages that may be met: ranges like their edges.
    folios: tuple[int, ...] = ()
    #: Steps that have to follow at once.
    next: list[s.Step] = attrs.field(factory=list)

    def name(self, kind: str) -> str:
        self.made += 1
        return f"{kind}{self.made}"


@st.composite
def thp_settings(draw: st.DrawFn) -> dict[str, str]:
    """What an administrator may set of huge pages (`Program.thp`): one to three sizes below 2 MiB, perhaps more.

    Small pages of 4 KiB are assumed. The size that a PMD maps is never switched off: that would end khugepaged.
    """
    sizes = st.sampled_from([f"{16 << n}kB" for n in (0, 0, 1, 2, 2, 3, 4, 5, 6)])
    hows = st.sampled_from(("always",) * 4 + ("madvise", "madvise", "inherit", "never"))
    found = draw(st.dictionaries(sizes, hows, min_size=1, max_size=3))
    for what, choices in (
        ("2048kB", ("always", "madvise", "inherit")),
        ("enabled", ("always", "madvise")),
    ):
        if draw(st.integers(0, 3)) == 0:
            found[what] = draw(st.sampled_from(choices))
    return found


@st.composite
def programs(
    draw: st.DrawFn,
    profile: KernelProfile | None = None,
    *,
    max_steps: int = 40,
    hugetlb: bool | None = None,
    thp: st.SearchStrategy[dict[str, str]] | None = None,
) -> Program:
    """A program of up to `max_steps` steps for the kernel of `profile`: with soft-dirty that is cleared often.

    `hugetlb`: with mappings of it, without, or now and then.
    `thp` draws what it says of huge pages (`thp_settings()`, or `just` one); without, it says nothing of them.
    """
    state = _State()
    settings = draw(thp) if thp is not None else {}
    named = (int(size.removesuffix("kB")) // 4 for size in settings if size != "enabled")
    state.folios = tuple(sorted(pages for pages in named if 0 < pages < _HUGE))
    soft_dirty = profile is not None and profile.has("clear_refs.soft_dirty")
    kinds = (*_KINDS, *(_clear_soft_dirty,) * 6) if soft_dirty else _KINDS
    first = _map(draw, state)
    assert isinstance(first, s.Map)
    steps: list[s.Step] = [first]
    if first.pages >= _HUGE and draw(st.booleans()):
        steps.append(s.Advise(area=first.area, pages=first.pages, advice=int(Madvise.HUGEPAGE)))
    if hugetlb or (hugetlb is None and draw(st.sampled_from((False, False, True)))):
        steps = [s.Map(area=KEPT, pages=1), s.Touch(area=KEPT, pages=1), *steps]
        kinds = (*kinds, *_HUGETLB)
    length = draw(st.sampled_from([n for n in (1, 12, 20, 28, 36, 40, 40) if n <= max_steps] or [max_steps]))
    while len(steps) < length:
        kind = draw(st.sampled_from(kinds))
        step = kind(draw, state)
        steps += [one for one in (step, *state.next) if one is not None and _compared(one, state)]
        state.next.clear()
        if isinstance(step, s.Map) and step.pages >= _HUGE and draw(st.integers(0, 2)):
            steps.append(s.Advise(area=step.area, pages=step.pages, advice=int(Madvise.HUGEPAGE)))
    return Program(name="random", steps=tuple(steps), thp=settings)


_Maker = Callable[[st.DrawFn, _State], s.Step | None]


def _pick_area(draw: st.DrawFn, state: _State) -> str:
    return draw(st.sampled_from(sorted(state.areas)))


def _task(draw: st.DrawFn, state: _State) -> str:
    return draw(st.sampled_from(state.tasks))


def _range(draw: st.DrawFn, state: _State) -> tuple[str, int, int]:
    """An area, and a range in it: all of it, or one that likes edges."""
    area = _pick_area(draw, state)
    pages = state.areas[area]
    if draw(st.integers(0, 3)) == 3:
        return area, 0, pages
    edges = sorted(
        {e for e in (0, 1, pages // 2, pages - 1, _HUGE - 1, _HUGE, _HUGE + 1, 2 * _HUGE) if 0 <= e < pages}
    )
    near = (n + k for n in state.folios for k in (-1, 0, 1, n, pages // n // 2 * n))
    edges = sorted({*edges, *(e for e in near if 0 <= e < pages)})
    page = draw(st.one_of(st.sampled_from(edges), st.integers(0, pages - 1)))
    left = pages - page
    lengths = (1, 2, left, left - 1, left // 2, _HUGE, _HUGE - 1, 8, *state.folios)
    spans = sorted({n for n in lengths if 1 <= n <= left})
    return area, page, draw(st.one_of(st.sampled_from(spans), st.integers(1, left)))


def _map(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.areas) >= _MAX_AREAS:
        return None
    name = state.name("a")
    huge = draw(st.booleans())
    pages = draw(st.sampled_from((_HUGE, 2 * _HUGE, 2 * _HUGE + 7) if huge else (1, 2, 3, 5, 8, 16, 33, 64)))
    if draw(st.integers(0, 3)) == 0 and not state.locked_all:
        return _map_shared(draw, state, name, huge, pages)
    extra = draw(st.sampled_from((0,) * 8 + (MapFlag.POPULATE, MapFlag.LOCKED, MapFlag.NORESERVE)))
    prot = draw(st.sampled_from((3,) * 8 + (1, 0, 2, 7)))
    state.areas[name] = pages
    return s.Map(
        area=name, pages=pages, prot=prot, flags=_FLAGS | int(extra), align=_HUGE * 4096 if huge else 4096
    )


def _map_huge(draw: st.DrawFn, state: _State) -> s.Step | None:
    """A hugetlb mapping, now and then of the wrong size or in the wrong place."""
    if len(state.areas) >= _MAX_AREAS:
        return None
    over = draw(st.integers(0, 5)) == 0 and state.areas
    sizes = (_HUGE, 2 * _HUGE, 2 * _HUGE, 3 * _HUGE, 4 * _HUGE, 8 * _HUGE, 16 * _HUGE, 1, _HUGE + 7)
    pages = draw(st.sampled_from(sizes))
    flags = MapFlag.ANONYMOUS | MapFlag.HUGETLB
    flags |= draw(st.sampled_from((MapFlag.PRIVATE, MapFlag.PRIVATE, MapFlag.SHARED)))
    extra = (MapFlag.NORESERVE, MapFlag.NORESERVE, MapFlag.POPULATE, MapFlag.LOCKED)
    flags |= draw(st.sampled_from((*(0,) * 6, *extra, MapFlag.HUGE_2MB, MapFlag.HUGE_1GB)))
    if flags & MapFlag.NORESERVE:  # more than there are, often
        pages = draw(st.sampled_from((16, 16, 12, 8, 3))) * _HUGE
    prot = draw(st.sampled_from((3,) * 8 + (1, 0, 7)))
    name = state.name("a")
    common: dict[str, Any] = {"area": name, "prot": prot}
    if over:
        area, page, _ = _range(draw, state)
        page = page // _HUGE * _HUGE if draw(st.integers(0, 3)) else page
        flags |= draw(st.sampled_from((MapFlag.FIXED, MapFlag.FIXED, MapFlag.FIXED_NOREPLACE)))
        pages = min(pages, 2 * _HUGE)
        common |= {"task": _task(draw, state), "within": area, "page": page}
        if area in state.shared:  # where it is refused, that is what lies there
            state.shared.add(name)
    else:
        common["align"] = draw(st.sampled_from((_HUGE * 4096,) * 9 + (4096,)))
        common["page_offset"] = draw(st.sampled_from((0,) * 12 + (_HUGE, 3)))
    state.areas[name] = pages
    state.huge[name] = int(flags)
    return s.Map(**common, pages=pages, flags=int(flags))


def _range_huge(draw: st.DrawFn, state: _State) -> tuple[str, int, int]:
    """A range of whole huge pages of a hugetlb area, or what looks like one."""
    area = draw(st.sampled_from(sorted(state.huge)))
    whole = max(1, state.areas[area] // _HUGE)
    first = draw(st.integers(0, whole - 1))
    return area, first * _HUGE, draw(st.integers(1, whole - first)) * _HUGE


def _track_huge(draw: st.DrawFn, state: _State) -> s.Step | None:
    """Registering or protecting hugetlb areas, mostly as a whole, and scans of them."""
    if not state.huge:
        return None
    if not state.fds:
        fd = state.name("u")
        state.fds[fd] = state.tasks[0]
        return s.UffdOpen(task=state.tasks[0], fd=fd, features=int(draw(st.sampled_from(_UFFD[:4]))))
    area, page, pages = _range_huge(draw, state)
    fd, owner = next(iter(state.fds.items()))
    common: dict[str, Any] = {"task": owner, "area": area}
    what = draw(st.sampled_from(("register", "register", "protect", "protect", "scan", "scan")))
    if what == "register":
        return s.UffdRegister(**common, pages=-(-state.areas[area] // _HUGE) * _HUGE, fd=fd)
    common |= {"page": page, "pages": pages}
    if what == "protect":
        return s.UffdProtect(**common, fd=fd, protect=draw(st.sampled_from((True, True, False))))
    cut = draw(st.sampled_from((0, 0, 0, 1, 100)))
    return s.Scan(
        **(common | {"page": page + cut, "pages": pages}),
        vec_len=draw(st.sampled_from((0, 1, 3, 512))),
        max_pages=draw(st.sampled_from((0, 0, 7, _HUGE, _HUGE + 1))),
        flags=draw(st.sampled_from((0, 1, 1, 1, 3))),
        category_mask=draw(st.sampled_from((0, 2, 2, 8, 64))),
        return_mask=0x7F,
    )


def _touch_huge(draw: st.DrawFn, state: _State) -> s.Step | None:
    """Accesses to most of a hugetlb area, so that pools are exhausted."""
    if not state.huge:
        return None
    area, page, pages = _range_huge(draw, state)
    task, write = _task(draw, state), draw(st.booleans())
    stride = draw(st.sampled_from((1, _HUGE, _HUGE - 1)))
    return s.Touch(task=task, area=area, page=page, pages=pages, write=write, stride=stride)


def _map_shared(draw: st.DrawFn, state: _State, name: str, huge: bool, pages: int) -> s.Step:
    """Shared anonymous memory, or a file."""
    align = _HUGE * 4096 if huge else 4096
    extra = int(draw(st.sampled_from((0,) * 8 + (MapFlag.POPULATE, MapFlag.NORESERVE))))
    prot = draw(st.sampled_from((3,) * 8 + (1, 0, 2)))
    state.areas[name] = pages
    state.shared.add(name)
    if not state.files or draw(st.integers(0, 2)) == 0:
        flags = int(MapFlag.SHARED | MapFlag.ANONYMOUS) | extra
        return s.Map(area=name, pages=pages, prot=prot, flags=flags, align=align)
    fd, size, tasks = _pick_file(draw, state)
    return s.Map(
        task=draw(st.sampled_from(tasks)),
        area=name,
        pages=pages,
        prot=prot,
        flags=int(draw(st.sampled_from((MapFlag.SHARED, MapFlag.SHARED, MapFlag.PRIVATE)))) | extra,
        align=align,
        fd=fd,
        page_offset=draw(st.sampled_from((0, 0, 0, 1, size // 2, max(size - 1, 0)))),
    )


def _pick_file(draw: st.DrawFn, state: _State) -> tuple[str, int, list[str]]:
    fd = draw(st.sampled_from(sorted(state.files)))
    return fd, *state.files[fd]


def _file(draw: st.DrawFn, state: _State) -> s.Step | None:
    """Something done to a file through its descriptor; the file itself, as long as there are few."""
    if not state.files or (len(state.files) < 2 and draw(st.integers(0, 3)) == 0):
        fd, task = state.name("m"), _task(draw, state)
        pages = draw(st.sampled_from((0, 1, 3, 8, 20, 64, _HUGE, _HUGE + 5)))
        state.files[fd] = (pages, [task])
        return s.MemfdCreate(task=task, fd=fd, pages=pages, flags=draw(st.sampled_from((0, 0, 0, 2, 64))))
    fd, size, tasks = _pick_file(draw, state)
    task = draw(st.sampled_from(tasks))
    page = draw(st.integers(0, size + 2))
    offset = page * 4096 + draw(st.sampled_from((0, 0, 0, 1, 4090)))
    length = draw(st.sampled_from((1, 10, 4096, 8192, 3 * 4096 + 5, _HUGE * 4096)))
    what = draw(
        st.sampled_from(("pwrite",) * 4 + ("pread", "lseek", "lseek", "truncate", "punch", "punch", "falloc"))
    )
    if what == "pwrite":
        text = draw(st.sampled_from(("x", "hello", "0123456789")))
        return s.Pwrite(task=task, fd=fd, offset=offset, text=text)
    if what == "pread":
        return s.Pread(task=task, fd=fd, offset=offset, length=min(length, 20000))
    if what == "lseek":
        return s.Lseek(task=task, fd=fd, offset=offset, whence=draw(st.sampled_from((0, 3, 3, 4, 4, 9))))
    if what == "truncate":
        return s.Ftruncate(task=task, fd=fd, length=offset)
    mode = 3 if what == "punch" else draw(st.sampled_from((0, 0, 1, 2, 8)))
    return s.Fallocate(task=task, fd=fd, mode=mode, offset=offset, length=length)


def _map_over(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.areas) >= _MAX_AREAS:
        return None
    area, page, pages = _range(draw, state)
    name = state.name("a")
    if area in state.shared:
        state.shared.add(name)
    state.areas[name] = pages
    if draw(st.integers(0, 15)) == 0:
        pages = _WIDE  # over the end of the area, and over what lies behind the gap
        state.areas[name] = pages
    grows = draw(st.sampled_from((0, 0, MapFlag.GROWSDOWN)))
    flags = _FLAGS | grows | draw(st.sampled_from((MapFlag.FIXED, MapFlag.FIXED, MapFlag.FIXED_NOREPLACE)))
    return s.Map(
        task=_task(draw, state),
        area=name,
        pages=pages,
        within=area,
        page=page,
        prot=draw(st.sampled_from((3, 3, 3, 1))),
        flags=int(flags),
    )


def _map_anywhere(draw: st.DrawFn, state: _State) -> s.Step | None:
    """A place of the kernel's choice, or a hint that may be free."""
    if len(state.areas) >= _MAX_AREAS:
        return None
    hint, page, _ = _range(draw, state)
    name = state.name("a")
    within = draw(st.sampled_from(("", hint, hint)))
    state.areas[name] = pages = draw(st.sampled_from((1, 2, 16, _HUGE, 2 * _HUGE, 2 * _HUGE + 7)))
    return s.Map(
        task=_task(draw, state),
        area=name,
        pages=pages,
        anywhere=True,
        within=within,
        page=page if within else 0,
        align=_HUGE * 4096 if pages >= _HUGE else 4096,
    )


def _stack(draw: st.DrawFn, state: _State) -> s.Step | None:
    """A mapping that grows downwards at the end of an area that is unmapped otherwise."""
    area, page, _ = _range(draw, state)
    pages, task = state.areas[area], _task(draw, state)
    if not page or len(state.areas) >= _MAX_AREAS:
        return None
    name = state.name("a")
    state.areas[name] = pages - page
    flags = int(_FLAGS | MapFlag.FIXED | MapFlag.GROWSDOWN)
    state.next = [
        s.Map(task=task, area=name, pages=pages - page, within=area, page=page, flags=flags),
        s.Touch(task=task, area=area, page=draw(st.integers(0, page)), pages=1),
    ]
    return s.Unmap(task=task, area=area, pages=pages)


def _brk(draw: st.DrawFn, state: _State) -> s.Step:
    lengths = (0, 1, 4096, 5 * 4096 + 1, 64 * 4096, _HUGE * 4096 - 1, 2 * _HUGE * 4096)
    length = draw(st.sampled_from(lengths))
    state.areas["heap"] = max(state.areas.get("heap", 1), -(-length // 4096))
    return s.Brk(task=_task(draw, state), length=length)


def _pagemap_read(draw: st.DrawFn, state: _State) -> s.Step:
    area, page, pages = _range(draw, state)
    task = _task(draw, state)
    if draw(st.integers(0, 4)) == 0:
        offset, length = draw(st.sampled_from((0, 0, 8, 1, 4096))), draw(st.sampled_from((0, 8, 64, 3)))
        return s.PagemapRead(task=task, area=area, offset=offset, length=length, from_end=True)
    shift = draw(st.sampled_from((0,) * 8 + (1, 4, 7)))
    length = draw(
        st.sampled_from((0, 8, 8, 16, 8 * pages, 8 * pages, 8 * pages + 4, 4096, 8 * (pages + 600), 5))
    )
    return s.PagemapRead(task=task, area=area, offset=8 * page + shift, length=length)


#: What leads to rare states: advice, "read" and "write" accesses, one after the other over one range.
_SEQUENCES: tuple[tuple[Madvise | str, ...], ...] = (
    ("write", Madvise.PAGEOUT, "read", "write"),
    ("write", Madvise.PAGEOUT, Madvise.WILLNEED, "write"),
    ("write", Madvise.FREE, "write", Madvise.PAGEOUT),
    ("write", Madvise.FREE, Madvise.PAGEOUT, "read"),
    ("write", Madvise.GUARD_INSTALL, "read", Madvise.GUARD_REMOVE, "write"),
    ("read", Madvise.COLD, "write"),
    (Madvise.POPULATE_WRITE, Madvise.PAGEOUT, Madvise.COLLAPSE),
    ("write", "fork", "write", Madvise.PAGEOUT),
)


def _sequence(draw: st.DrawFn, state: _State) -> s.Step:
    area, page, pages = _range(draw, state)
    task = _task(draw, state)
    steps: list[s.Step] = []
    for what in draw(st.sampled_from(_SEQUENCES)):
        if what == "fork":
            steps += [step] if (step := _fork(draw, state)) else []
        elif isinstance(what, Madvise):
            steps.append(s.Advise(task=task, area=area, page=page, pages=pages, advice=int(what)))
        else:
            steps.append(s.Touch(task=task, area=area, page=page, pages=pages, write=what == "write"))
    state.next = steps[1:]
    return steps[0]


def _huge(draw: st.DrawFn, state: _State) -> s.Step | None:
    """A huge page: mapped, collapsed or shared, then advised of in part, and paged out."""
    large = sorted(area for area, pages in state.areas.items() if pages >= _HUGE)
    if not large:
        return None
    area, task = draw(st.sampled_from(large)), _task(draw, state)
    way = draw(st.sampled_from((Madvise.HUGEPAGE, Madvise.COLLAPSE)))
    small = draw(st.sampled_from((1, 8, _HUGE // 2, _HUGE)))
    part = draw(st.sampled_from((Madvise.FREE, Madvise.COLD, Madvise.PAGEOUT, Madvise.DONTNEED, None)))
    first = s.Advise(task=task, area=area, pages=_HUGE, advice=int(way))
    touch = s.Touch(task=task, area=area, pages=small, write=draw(st.sampled_from((True, True, False))))
    text = s.Write(task=task, area=area, offset=draw(st.sampled_from((0, 0, 5 * 4096))), text="huge")
    state.next = [touch, text] if way == Madvise.HUGEPAGE else [text, first]
    if part is None:
        state.next.append(
            s.Protect(task=task, area=area, page=small // 2, pages=1, prot=draw(st.integers(0, 3)))
        )
    else:
        state.next.append(s.Advise(task=task, area=area, page=small // 2, pages=small, advice=int(part)))
    if draw(st.booleans()):
        state.next.append(s.Advise(task=task, area=area, pages=_HUGE, advice=int(Madvise.PAGEOUT)))
    return first if way == Madvise.HUGEPAGE else touch


def _arm(draw: st.DrawFn, state: _State) -> s.Step | None:
    """Write protection over a range that is populated in part: put on, written, put on again, by either way."""
    area, page, pages = _range(draw, state)
    steps: list[s.Step] = []
    if not state.fds:
        opened = state.name("u")
        state.fds[opened] = state.tasks[0]
        features = draw(st.sampled_from((_UFFD[0], _UFFD[2], _UFFD[4])))
        steps.append(s.UffdOpen(task=state.tasks[0], fd=opened, features=int(features)))
    fd, task = next(iter(state.fds.items()))
    if draw(st.booleans()):
        part = max(1, pages // 2)
        steps.append(s.Touch(task=task, area=area, page=page, pages=part))
        if draw(st.booleans()):
            steps.append(s.Advise(task=task, area=area, page=page, pages=part, advice=int(Madvise.PAGEOUT)))
    steps.append(
        s.UffdRegister(task=task, fd=fd, area=area, pages=state.areas[area], mode=2),
    )
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.booleans()):
            steps.append(s.UffdProtect(task=task, fd=fd, area=area, page=page, pages=pages))
        else:
            steps.append(
                s.Scan(task=task, area=area, page=page, pages=pages, flags=1, category_mask=2, return_mask=2)
            )
        write = draw(st.sampled_from((True, True, False)))
        steps.append(s.Touch(task=task, area=area, page=page, pages=pages, write=write))
    state.next = steps[1:]
    return steps[0]


def _bounce(draw: st.DrawFn, state: _State) -> s.Step | None:
    """Every second page of an area present: its scans fill the kernel's buffer of 512 regions, or nearly."""
    large = sorted(area for area, pages in state.areas.items() if pages >= 2 * _HUGE)
    if not large:
        return None
    more = [
        area for area in large if state.areas[area] > 2 * _HUGE + 2
    ]  # the buffer is filled, and begun anew
    area, task = draw(st.sampled_from(more or large)), _task(draw, state)
    pages = state.areas[area]
    regions = -(-pages // 2)
    scan = s.Scan(
        task=task,
        area=area,
        page=draw(st.sampled_from((0, 0, 1))),
        pages=pages - 1,
        vec_len=draw(st.sampled_from((_HUGE - 1, _HUGE, _HUGE + 1, regions, regions - 1, *(2 * _HUGE,) * 4))),
        max_pages=draw(st.sampled_from((0, 0, 0, 0, _HUGE - 1, _HUGE, _HUGE + 1, regions))),
        flags=draw(st.sampled_from((0, 0, 1))),
        category_mask=draw(st.sampled_from((8, 8, 2))),
        return_mask=draw(st.sampled_from((8, 0x7F))),
    )
    state.next = [s.Touch(task=task, area=area, pages=pages, stride=2), scan]
    return s.Advise(task=task, area=area, pages=pages, advice=int(Madvise.DONTNEED))


def _ranged(kind: Any, **fields: Any) -> _Maker:
    """A step over a range, with these fields drawn."""

    def make(draw: st.DrawFn, state: _State) -> s.Step | None:
        aligned = bool(state.huge) and draw(st.booleans())
        area, page, pages = (_range_huge if aligned else _range)(draw, state)
        drawn = {name: draw(strategy) for name, strategy in fields.items()}
        step: s.Step = kind(task=_task(draw, state), area=area, page=page, pages=pages, **drawn)
        return step

    return make


def _compared(step: s.Step, state: _State) -> bool:
    """Whether a step can be compared: nothing that is not modelled of files, or that never returns (DV-026).

    Nor is shared memory locked: the locks of a page are counted no better than in batches (DV-027).
    """
    if isinstance(step, s.LockAll):
        return not state.shared
    if isinstance(step, s.Map) and (step.within or step.anywhere):
        state.mixed = True
    if not isinstance(step, s.Advise | s.Lock) or not state.shared:
        return True
    if step.area not in state.shared and not state.mixed:
        return True
    if isinstance(step, s.Lock) or step.advice == Madvise.COLLAPSE:
        return False
    return step.advice != Madvise.GUARD_INSTALL or not state.fds


def _write(draw: st.DrawFn, state: _State) -> s.Step | None:
    area, page, pages = _range(draw, state)
    offset = page * 4096 + draw(st.sampled_from((0, 1, 100, 4090, 4095)))
    text = draw(st.sampled_from(("x", "hello", "0123456789")))
    if draw(st.booleans()):
        return s.Read(
            task=_task(draw, state), area=area, offset=offset, length=min(len(text) * 700, pages * 4096)
        )
    return s.Write(task=_task(draw, state), area=area, offset=offset, text=text)


def _move(draw: st.DrawFn, state: _State) -> s.Step | None:
    area, page, pages = _range(draw, state)
    huge = state.huge.get(area)
    if huge is not None:
        # A kernel loses the promises to the rest of a private mapping, and loops without end where the pool is
        # exhausted and a child has the page at another address: neither may happen on a machine that others use.
        if len(state.tasks) > 1:
            return None
        if not huge & (MapFlag.SHARED | MapFlag.NORESERVE) or draw(st.booleans()):
            page, pages = 0, state.areas[area]
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
    if huge is not None:
        state.huge[to] = huge
    if area in state.shared:
        state.shared.add(to)
    align = draw(st.sampled_from((4096, _HUGE * 4096)))
    return s.Move(
        task=task, area=area, page=page, pages=pages, new_pages=new, flags=flags, to=to, align=align
    )


def _fork(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.tasks) >= _MAX_TASKS:
        return None
    parent, child = _task(draw, state), state.name("t")
    state.tasks.append(child)
    for _, tasks in state.files.values():
        if parent in tasks:
            tasks.append(child)
    return s.Fork(task=parent, child=child)


def _exit(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.tasks) < 2:
        return None
    task = _task(draw, state)
    state.tasks.remove(task)
    state.fds = {fd: owner for fd, owner in state.fds.items() if owner != task}
    for fd, (_, tasks) in list(state.files.items()):
        if task in tasks:
            tasks.remove(task)
        if not tasks:
            del state.files[fd]
    return s.Exit(task=task)


def _uffd_open(draw: st.DrawFn, state: _State) -> s.Step | None:
    if len(state.fds) >= 2:
        return None
    fd = state.name("u")
    state.fds[fd] = state.tasks[0]
    return s.UffdOpen(task=state.tasks[0], fd=fd, features=int(draw(st.sampled_from(_UFFD))))


def _uffd(draw: st.DrawFn, state: _State) -> s.Step | None:
    if not state.fds:
        return _uffd_open(draw, state)
    area, page, pages = (_range_huge if bool(state.huge) and draw(st.booleans()) else _range)(draw, state)
    fd = draw(st.sampled_from(sorted(state.fds)))
    common: dict[str, Any] = {"task": state.fds[fd], "area": area, "page": page, "pages": pages, "fd": fd}
    what = draw(st.sampled_from(("register",) * 4 + ("protect",) * 5 + ("unregister", "close")))
    if what == "register":
        return s.UffdRegister(**common, mode=draw(st.sampled_from((2,) * 6 + (0, 8))))
    if what == "protect":
        return s.UffdProtect(**common, protect=draw(st.sampled_from((True, True, False))))
    if what == "close":
        return s.CloseFd(task=state.fds.pop(fd), fd=fd)
    return s.UffdUnregister(**common)


def _scan(draw: st.DrawFn, state: _State) -> s.Step:
    area, page, pages = _range(draw, state)
    masks = st.sampled_from((0, 0, 0, 1, 2, 3, 8, 10, 16, 24, 32, 64, 0x7F, 1 << 8, 1 << 40))
    return s.Scan(
        task=_task(draw, state),
        area=area,
        page=page,
        pages=pages,
        shift=draw(st.sampled_from((0,) * 20 + (1, 4095))),
        vec_len=draw(st.sampled_from((0, 1, 2, 3, 511, 512, 513, 4096))),
        max_pages=draw(st.sampled_from((0, 0, 0, 1, 7, 511, 512, 513, pages, max(pages - 1, 1), pages + 1))),
        flags=draw(st.sampled_from((0, 0, 1, 1, 2, 3, 4))),
        category_inverted=draw(masks),
        category_mask=draw(masks),
        category_anyof_mask=draw(masks),
        return_mask=draw(st.sampled_from((0x7F, 0x7F, 2, 8, 0x1FF, 0))),
    )


def _clear_refs(draw: st.DrawFn, state: _State) -> s.Step | None:
    return s.ClearRefs(task=_task(draw, state), what=draw(st.sampled_from((1, 2, 3, 4, 4, 4, 4, 5, 9))))


def _clear_soft_dirty(draw: st.DrawFn, state: _State) -> s.Step | None:
    return s.ClearRefs(task=_task(draw, state))


def _lock_all(draw: st.DrawFn, state: _State) -> s.Step:
    task = _task(draw, state)
    if draw(st.booleans()):
        return s.UnlockAll(task=task)
    state.locked_all = True
    return s.LockAll(task=task, flags=draw(st.sampled_from((1, 2, 3, 5, 6, 7, 0, 4, 8))))


_advise = _ranged(s.Advise, advice=st.sampled_from([int(advice) for advice in _ADVICE]))
_KINDS: tuple[_Maker, ...] = (
    *(_map,) * 2,
    _map_over,
    _ranged(s.Unmap),
    _map_anywhere,
    _stack,
    _brk,
    *(_bounce,) * 3,
    *(_sequence,) * 3,
    *(_huge,) * 2,
    *(_arm,) * 3,
    *(_pagemap_read,) * 3,
    *(_ranged(s.Protect, prot=st.sampled_from((1, 3, 3, 0, 2, 8, 64, _DOWN | 1, _DOWN | 3, _UP | 1))),) * 2,
    *(_advise,) * 10,
    *(_ranged(s.Touch, write=st.booleans(), stride=st.sampled_from((1, 1, 2, 7))),) * 8,
    *(_write,) * 4,
    *(_file,) * 5,
    *(_move,) * 3,
    *(_fork,) * 2,
    _exit,
    *(_uffd,) * 5,
    *(_scan,) * 5,
    *(_ranged(s.Lock, onfault=st.booleans()),) * 2,
    _ranged(s.Unlock),
    _lock_all,
    _ranged(s.Msync, flags=st.sampled_from((0, 1, 2, 4, 4, 5, 6, 8))),
    _ranged(s.Mincore),
    *(_clear_refs,) * 2,
)
#: With hugetlb: mappings of it, and what does something to them.
_HUGETLB: tuple[_Maker, ...] = (*(_map_huge,) * 10, *(_touch_huge,) * 8, *(_track_huge,) * 8, _fork)
