"""A random program: which steps, how often, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping

from pmcore.errors import ArgumentError
from pmcore.lockstep.generator.accesses import exit_task, fork, huge_page, lock_all, sequence, write
from pmcore.lockstep.generator.cgroups import CGROUPS
from pmcore.lockstep.generator.disk import DISK, disk_compared
from pmcore.lockstep.generator.draw import Draw
from pmcore.lockstep.generator.files import file
from pmcore.lockstep.generator.hugetlb import huge_file, map_huge, map_huge_file, touch_huge, track_huge
from pmcore.lockstep.generator.ksm import KSM, ask, compared
from pmcore.lockstep.generator.mappings import brk, map_anywhere, map_memory, map_over, move, stack
from pmcore.lockstep.generator.missing import fill, watch
from pmcore.lockstep.generator.nodes import NODES, move_pages
from pmcore.lockstep.generator.poison import POISON
from pmcore.lockstep.generator.shmem import SHMEM
from pmcore.lockstep.generator.state import HUGE, KEPT, Maker, State, ranged
from pmcore.lockstep.generator.tracking import (
    arm,
    bounce,
    clear_refs,
    clear_soft_dirty,
    idle,
    pagemap_read,
    query_maps,
    scan,
    uffd,
)
from pmcore.profile import KernelProfile
from pmcore.program import Program
from pmcore.program import steps as s
from pmcore.uapi import Madvise

__all__ = ["FOCUSES", "random_program", "random_thp"]

#: Subjects that programs may be biased to.
FOCUSES = ("cgroups", "disk", "ksm", "nodes", "poison", "shmem")

_EITHER = (False, True)
#: PROT_GROWSDOWN, PROT_GROWSUP.
_DOWN, _UP = 0x01000000, 0x02000000
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
_advise = ranged(s.Advise, advice=tuple(int(advice) for advice in _ADVICE))
_KINDS: tuple[Maker, ...] = (
    *(map_memory,) * 2,
    map_over,
    ranged(s.Unmap),
    map_anywhere,
    stack,
    brk,
    *(bounce,) * 3,
    *(sequence,) * 3,
    *(huge_page,) * 2,
    *(arm,) * 3,
    *(pagemap_read,) * 3,
    *(query_maps,) * 2,
    *(ranged(s.Protect, prot=(1, 3, 3, 0, 2, 4, 5, 8, 64, _DOWN | 1, _DOWN | 3, _UP | 1)),) * 2,
    *(_advise,) * 10,
    *(ranged(s.Touch, write=_EITHER, stride=(1, 1, 2, 7)),) * 8,
    *(write,) * 4,
    *(file,) * 5,
    *(move,) * 3,
    *(fork,) * 2,
    exit_task,
    *(uffd,) * 5,
    *(watch,) * 2,
    *(fill,) * 4,
    *(scan,) * 5,
    *(ranged(s.Lock, onfault=_EITHER),) * 2,
    ranged(s.Unlock),
    lock_all,
    ranged(s.Msync, flags=(0, 1, 2, 4, 4, 5, 6, 8)),
    ranged(s.Mincore),
    move_pages,
    *(clear_refs,) * 2,
)
#: With hugetlb: mappings of it, and what does something to them.
_HUGETLB: tuple[Maker, ...] = (
    *(map_huge,) * 8,
    *(touch_huge,) * 8,
    *(track_huge,) * 8,
    *(map_huge_file,) * 3,
    *(huge_file,) * 4,
    fork,
)


def random_thp(draw: Draw) -> dict[str, str]:
    """What an administrator may set of huge pages (`Program.thp`): one to three sizes below 2 MiB, perhaps more.

    Small pages of 4 KiB are assumed. The size that a PMD maps is never switched off: that would end khugepaged.
    """
    hows = ("always",) * 4 + ("madvise", "madvise", "inherit", "never")
    found: dict[str, str] = {}
    for _ in range(draw.integer(1, 3)):
        found[f"{16 << draw.of((0, 0, 1, 2, 2, 3, 4, 5, 6))}kB"] = draw.of(hows)
    for what, choices in (
        ("2048kB", ("always", "madvise", "inherit")),
        ("enabled", ("always", "madvise")),
    ):
        if draw.integer(0, 3) == 0:
            found[what] = draw.of(choices)
    return found


def random_program(
    draw: Draw,
    profile: KernelProfile | None = None,
    *,
    max_steps: int = 40,
    hugetlb: bool | None = None,
    thp: Mapping[str, str] | None = None,
    focus: str = "",
    slow_disk: bool = False,
) -> Program:
    """A program of up to `max_steps` steps for the kernel of `profile`: with soft-dirty that is cleared often.

    `hugetlb`: with mappings of it, without, or (None) now and then. `thp` is what it says of huge pages.
    `focus`, one of FOCUSES, is a subject that its steps are biased to. `slow_disk`: without what depends on when a disk
    has read.
    """
    if focus and focus not in FOCUSES:
        raise ArgumentError(f"focus={focus!r}", remedy=f"known: {', '.join(FOCUSES)}")
    settings = dict(thp or {})
    state = State(slow_disk=slow_disk)
    named = (int(size.removesuffix("kB")) // 4 for size in settings if size != "enabled")
    state.folios = tuple(sorted(pages for pages in named if 0 < pages < HUGE))
    soft_dirty = profile is not None and profile.has("clear_refs.soft_dirty")
    kinds = (*_KINDS, *(clear_soft_dirty,) * 6) if soft_dirty else _KINDS
    if profile is not None and profile.has("page_idle"):
        kinds = (*kinds, *(idle,) * 3)
    first = map_memory(draw, state)
    assert isinstance(first, s.Map)
    merging = focus == "ksm"
    if merging:
        kinds = (*kinds, *KSM)
        compared(first, state)
    elif focus == "disk":
        kinds = (*kinds, *DISK)
    elif focus == "cgroups":
        kinds = (*kinds, *CGROUPS)
    elif focus == "nodes":
        kinds = (*kinds, *NODES)
    elif focus == "poison":
        kinds = (*kinds, *POISON)
    elif focus == "shmem":
        kinds = (*kinds, *SHMEM)
    steps: list[s.Step] = [first, *(ask(draw, first) if merging else ())]
    if first.pages >= HUGE and draw.flip():
        steps.append(s.Advise(area=first.area, pages=first.pages, advice=int(Madvise.HUGEPAGE)))
    if hugetlb or (hugetlb is None and draw.of((False, False, True))):
        steps = [s.Map(area=KEPT, pages=1), s.Touch(area=KEPT, pages=1), *steps]
        kinds = (*kinds, *_HUGETLB)
    length = draw.of([n for n in (1, 12, 20, 28, 36, 40, 40) if n <= max_steps] or [max_steps])
    while len(steps) < length:
        kind = draw.of(kinds)
        step = kind(draw, state)
        for one in (step, *state.next):
            if one is not None and merging:
                one = compared(one, state)
            if one is not None and _compared(one, state):
                steps.append(one)
        state.next.clear()
        if merging and isinstance(step, s.Map):
            steps += ask(draw, step)
        if isinstance(step, s.Map) and step.pages >= HUGE and draw.integer(0, 2):
            steps.append(s.Advise(area=step.area, pages=step.pages, advice=int(Madvise.HUGEPAGE)))
    return Program(name="random", steps=tuple(steps[:max_steps]), thp=settings)


def _compared(step: s.Step, state: State) -> bool:
    """Whether a step can be compared: nothing that is not modelled of files, or that never returns (DV-026).

    Nor is shared memory locked: the locks of a page are counted no better than in batches (DV-027).
    """
    if state.disk and not disk_compared(step, state):
        return False
    if isinstance(step, s.LockAll):
        return not state.shared
    if isinstance(step, s.Map) and (step.within or step.anywhere):
        state.mixed = True
    if not isinstance(step, s.Advise | s.Lock) or not state.shared:
        return True
    if step.area not in state.shared and not state.mixed:
        return True
    if isinstance(step, s.Lock) or (step.advice == Madvise.COLLAPSE and state.disk):
        return False
    return step.advice != Madvise.GUARD_INSTALL or not state.fds
