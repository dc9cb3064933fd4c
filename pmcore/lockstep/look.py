"""A look: everything that the interfaces show of a program's tasks, as arrays, taken at one moment."""

from __future__ import annotations

import attrs
import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import SyscallError
from pmcore.pagemap import PagemapEntries
from pmcore.program import Run
from pmcore.program.run import frames_of, named_frames
from pmcore.protocols import FrameFile, Kernel, Task
from pmcore.smaps import SmapsEntry
from pmcore.uapi import PM_PFRAME_MASK, PM_PRESENT

__all__ = ["Look", "TaskLook", "take"]


@attrs.frozen(kw_only=True, eq=False)
class TaskLook:
    """One task: its entries span by span, in core or not, its VMAs there with their counters."""

    #: (start, end) in bytes, ascending: what the program's areas cover, neighbours joined.
    spans: tuple[tuple[int, int], ...]
    #: Entries of all spans, one after the other, and the address of each.
    words: U64Array
    addresses: U64Array
    #: mincore of each span, where all of it is mapped.
    in_core: tuple[BoolArray | None, ...]
    vmas: tuple[SmapsEntry, ...]


@attrs.frozen(kw_only=True, eq=False)
class Look:
    """All tasks of a run, and the frames that they map (`pfns` ascending, the words of each beside it)."""

    tasks: dict[str, TaskLook]
    pfns: U64Array
    kpageflags: U64Array
    kpagecount: U64Array
    #: Whom each is charged to: 0 nobody, 1 a cgroup that is not the program's, from 2 on the groups that it has made,
    #: in that order. Empty where it has made none.
    groups: U64Array = attrs.field(factory=lambda: np.zeros(0, dtype=np.uint64))
    #: The hugetlb pool as meminfo has it: its lines.
    pool: tuple[str, ...] = ()

    def flags_of(self, words: U64Array) -> U64Array:
        """kpageflags of the frames that pagemap entries name, 0 where they name none."""
        present = np.flatnonzero((words & np.uint64(PM_PRESENT)) != 0)
        found = np.zeros(len(words), dtype=np.uint64)
        if len(self.pfns):
            wanted = words[present] & np.uint64(PM_PFRAME_MASK)
            place = np.minimum(np.searchsorted(self.pfns, wanted), len(self.pfns) - 1)
            found[present] = np.where(self.pfns[place] == wanted, self.kpageflags[place], np.uint64(0))
        return found


def take(run: Run) -> Look:
    """Look at every task of `run`, at all that its areas cover. The workbench settles first."""
    run.workbench.settle()
    spans = _spans(run)
    tasks = {name: _task(task, spans) for name, task in run.tasks.items()}
    kernel = run.workbench.kernel
    seen = [PagemapEntries(t.words, profile=kernel.profile) for t in tasks.values()]
    named = [frames_of(t.words[named_frames(t.words)]) for t in tasks.values()]
    pfns = np.unique(np.concatenate([np.zeros(0, np.uint64), *(e.pfn[e.has_pfn] for e in seen), *named]))
    return Look(
        tasks=tasks,
        pfns=pfns,
        kpageflags=kernel.frames_at(FrameFile.KPAGEFLAGS, pfns),
        kpagecount=kernel.frames_at(FrameFile.KPAGECOUNT, pfns),
        groups=_groups(run, pfns),
        pool=_pool(kernel),
    )


def _groups(run: Run, pfns: U64Array) -> U64Array:
    if not run.groups:
        return np.zeros(0, dtype=np.uint64)
    words = run.workbench.kernel.frames_at(FrameFile.KPAGECGROUP, pfns)
    found: U64Array = (words != 0).astype(np.uint64)
    there = run.workbench.groups()
    for number, path in enumerate(run.groups):
        if path in there:
            found[words == np.uint64(there[path])] = number + 2
    return found


def _pool(kernel: Kernel) -> tuple[str, ...]:
    try:
        lines = kernel.pread("meminfo", 0, 1 << 16).decode().splitlines()
    except SyscallError:
        return ()
    return tuple(line for line in lines if line.startswith("HugePages_"))


def _spans(run: Run) -> tuple[tuple[int, int], ...]:
    size = run.workbench.kernel.profile.geometry.page_size
    joined: list[tuple[int, int]] = []
    for start, length in sorted(run.areas.values()):
        end = start + max(length, 1) + (-max(length, 1) % size)
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)


def _task(task: Task, spans: tuple[tuple[int, int], ...]) -> TaskLook:
    process = task.process
    empty = np.zeros(0, dtype=np.uint64)
    words, addresses = [empty], [empty]
    in_core: list[BoolArray | None] = []
    size = process.kernel.profile.geometry.page_size
    for start, end in spans:
        words.append(process.pagemap(start, end).values)
        addresses.append(np.arange(start, end, size, dtype=np.uint64))
        try:
            in_core.append(task.mincore(start, end - start))
        except SyscallError:
            in_core.append(None)
    vmas = process.smaps(spans[0][0], spans[-1][1]) if spans else ()
    return TaskLook(
        spans=spans,
        words=np.concatenate(words),
        addresses=np.concatenate(addresses),
        in_core=tuple(in_core),
        vmas=tuple(vma for vma in vmas if any(vma.vma.start < e and vma.vma.end > s for s, e in spans)),
    )
