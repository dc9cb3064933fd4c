"""What a program under construction has, and the ranges that its steps are about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from pmcore.lockstep.generator.draw import Draw
from pmcore.program import steps as s
from pmcore.uapi import MapFlag, UffdFeature

__all__ = [
    "FEATURES",
    "HUGE",
    "KEPT",
    "MAX_AREAS",
    "MAX_TASKS",
    "PRIVATE_ANONYMOUS",
    "Maker",
    "State",
    "pick_area",
    "pick_huge",
    "pick_range",
    "pick_task",
    "ranged",
]

HUGE = 512
PRIVATE_ANONYMOUS = int(MapFlag.PRIVATE | MapFlag.ANONYMOUS)
MAX_AREAS = 5
MAX_TASKS = 3
#: A page that every program with hugetlb mappings touches first and then leaves alone: on a running kernel of before
#: 2026-07 a scan that write-protects a hugetlb mapping where the level above the PMDs is empty never ends (DV-026).
KEPT = "kept"
_EVENTS = (
    UffdFeature.EVENT_FORK | UffdFeature.EVENT_REMAP | UffdFeature.EVENT_REMOVE | UffdFeature.EVENT_UNMAP
)
FEATURES = (
    UffdFeature.WP_ASYNC,
    UffdFeature.WP_ASYNC,
    UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED,
    UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.SIGBUS,
    UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_UNPOPULATED | UffdFeature.SIGBUS,
    UffdFeature.SIGBUS,
    UffdFeature.WP_ASYNC | UffdFeature.EVENT_FORK,
    UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED | _EVENTS,
    UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.SIGBUS | _EVENTS,
    1 << 40,
)


@attrs.define
class State:
    """What a program under construction has."""

    areas: dict[str, int] = attrs.field(factory=dict)
    tasks: list[str] = attrs.field(factory=lambda: ["main"])
    #: Userfaultfds, and the task that opened each.
    fds: dict[str, str] = attrs.field(factory=dict)
    #: Those of them with which a fault that nobody answers is SIGBUS.
    sigbus: set[str] = attrs.field(factory=set)
    #: Those that tell of forks, and the task that each watches.
    forking: dict[str, str] = attrs.field(factory=dict)
    #: Descriptors of hugetlb files, and the tasks that have each.
    huge_files: dict[str, list[str]] = attrs.field(factory=dict)
    #: Descriptors of files: how many pages the file was made with, and the tasks that have it.
    files: dict[str, tuple[int, list[str]]] = attrs.field(factory=dict)
    #: Descriptors of files on the disk, with their names; areas that map such, with a descriptor that did it.
    disk: dict[str, str] = attrs.field(factory=dict)
    mapped: dict[str, str] = attrs.field(factory=dict)
    #: Whether what the disk reads ahead in a second piece comes later, if nobody waits for it.
    slow_disk: bool = False
    #: On a slow disk: whether anything may be read ahead.
    ahead: bool = False
    #: On a slow disk: whether its files may have holes.
    holes: bool = False
    #: Areas that map files.
    shared: set[str] = attrs.field(factory=set)
    #: Areas of hugetlb, and the flags that they were mapped with.
    huge: dict[str, int] = attrs.field(factory=dict)
    #: Whether areas may lie in each other.
    mixed: bool = False
    #: Whether mlockall was asked for: what is mapped from then on may be locked.
    locked_all: bool = False
    #: Whether there may be children.
    may_fork: bool = True
    #: Paths of memory cgroups that may be there.
    groups: list[str] = attrs.field(factory=list)
    made: int = 0
    #: Pages of the smaller huge pages that may be met: ranges like their edges.
    folios: tuple[int, ...] = ()
    #: Steps that have to follow at once.
    next: list[s.Step] = attrs.field(factory=list)

    def name(self, kind: str) -> str:
        """A new name of this kind."""
        self.made += 1
        return f"{kind}{self.made}"

    def open_uffd(self, features: int) -> s.UffdOpen:
        """A userfaultfd of the first task with these features."""
        fd, task = self.name("u"), self.tasks[0]
        self.fds[fd] = task
        if features & UffdFeature.SIGBUS:
            self.sigbus.add(fd)
        if features & UffdFeature.EVENT_FORK:
            self.forking[fd] = task
        return s.UffdOpen(task=task, fd=fd, features=int(features))

    def forked(self, parent: str, child: str) -> None:
        """A child: it has its parent's descriptors, and is watched by new userfaultfds where the parent's tell."""
        for fd, watched in list(self.forking.items()):
            if watched != parent or fd not in self.fds:
                continue
            new = f"{fd}_{child}"
            self.fds[new], self.forking[new] = self.fds[fd], child
            if fd in self.sigbus:
                self.sigbus.add(new)
        for tasks in (*(tasks for _, tasks in self.files.values()), *self.huge_files.values()):
            if parent in tasks:
                tasks.append(child)

    def ended(self, task: str) -> None:
        """A task has exited: descriptors that it alone had are gone."""
        self.tasks.remove(task)
        self.fds = {fd: owner for fd, owner in self.fds.items() if owner != task}
        for tasks in (*(tasks for _, tasks in self.files.values()), *self.huge_files.values()):
            if task in tasks:
                tasks.remove(task)
        self.files = {fd: file for fd, file in self.files.items() if file[1]}
        self.huge_files = {fd: tasks for fd, tasks in self.huge_files.items() if tasks}


Maker = Callable[[Draw, State], s.Step | None]


def pick_area(draw: Draw, state: State) -> str:
    """An area of the program."""
    return draw.of(sorted(state.areas))


def pick_task(draw: Draw, state: State) -> str:
    """A task of the program."""
    return draw.of(state.tasks)


def pick_range(draw: Draw, state: State) -> tuple[str, int, int]:
    """An area, and a range in it: all of it, or one that likes edges."""
    area = pick_area(draw, state)
    pages = state.areas[area]
    if draw.integer(0, 3) == 3:
        return area, 0, pages
    edges = sorted(
        {e for e in (0, 1, pages // 2, pages - 1, HUGE - 1, HUGE, HUGE + 1, 2 * HUGE) if 0 <= e < pages}
    )
    near = (n + k for n in state.folios for k in (-1, 0, 1, n, pages // n // 2 * n))
    edges = sorted({*edges, *(e for e in near if 0 <= e < pages)})
    page = draw.of(edges) if draw.flip() else draw.integer(0, pages - 1)
    left = pages - page
    lengths = (1, 2, left, left - 1, left // 2, HUGE, HUGE - 1, 8, *state.folios)
    spans = sorted({n for n in lengths if 1 <= n <= left})
    return area, page, draw.of(spans) if draw.flip() else draw.integer(1, left)


def pick_huge(draw: Draw, state: State) -> tuple[str, int, int]:
    """A range of whole huge pages of a hugetlb area, or what looks like one."""
    area = draw.of(sorted(state.huge))
    whole = max(1, state.areas[area] // HUGE)
    first = draw.integer(0, whole - 1)
    return area, first * HUGE, draw.integer(1, whole - first) * HUGE


def ranged(kind: Any, **fields: Sequence[Any]) -> Maker:
    """A step over a range, with each of these fields one of the values given."""

    def make(draw: Draw, state: State) -> s.Step | None:
        aligned = bool(state.huge) and draw.flip()
        area, page, pages = (pick_huge if aligned else pick_range)(draw, state)
        drawn = {name: draw.of(values) for name, values in fields.items()}
        step: s.Step = kind(task=pick_task(draw, state), area=area, page=page, pages=pages, **drawn)
        return step

    return make
