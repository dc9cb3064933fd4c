"""Page tables in words: runs of pages that look alike, one line each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pmcore.lockstep import Look, TaskLook
from pmcore.pageflags import FrameFlags
from pmcore.pagemap import PagemapEntries, PagemapEntry
from pmcore.profile import KernelProfile
from pmcore.uapi import PM_PFRAME_MASK

__all__ = ["FrameNames", "describe"]

_FLAGS = ("present", "swapped", "file", "exclusive", "soft_dirty", "uffd_wp", "guard")


class FrameNames:
    """Short names for frames, in the order in which they are first seen: comparable between machines."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def name(self, pfn: int) -> str:
        """F1, F2, ..."""
        return self._names.setdefault(pfn, f"F{len(self._names) + 1}")


def describe(look: Look, profile: KernelProfile, names: FrameNames) -> Iterator[str]:
    """One line for each run of pages that is not empty, task by task."""
    for task, seen in look.tasks.items():
        lines = list(_task(look, seen, profile, names))
        yield f"  {task}: {'nothing is mapped or touched' if not lines else ''}".rstrip()
        yield from lines


def _task(look: Look, seen: TaskLook, profile: KernelProfile, names: FrameNames) -> Iterator[str]:
    words = seen.words
    size = profile.geometry.page_size
    entries = PagemapEntries(words, profile=profile)
    pfns = entries.pfn
    place = np.searchsorted(look.pfns, pfns)
    inside = entries.has_pfn & (place < len(look.pfns))
    flags = np.zeros(len(words), dtype=np.uint64)
    counts = np.zeros(len(words), dtype=np.uint64)
    flags[inside], counts[inside] = look.kpageflags[place[inside]], look.kpagecount[place[inside]]
    high = words & ~np.uint64(PM_PFRAME_MASK)
    field = words & np.uint64(PM_PFRAME_MASK)
    step = np.where(entries.has_pfn, np.uint64(1), np.uint64(32))
    shown = np.flatnonzero(words)
    if not len(shown):
        return
    breaks = np.ones(len(shown), dtype=np.bool_)
    a, b = shown[:-1], shown[1:]
    same = (seen.addresses[b] - seen.addresses[a] == np.uint64(size)) & (high[a] == high[b])
    same &= (flags[a] == flags[b]) & (counts[a] == counts[b])
    same &= (field[b] == field[a] + step[a]) | (field[b] == field[a])
    breaks[1:] = ~same
    first = shown[breaks]
    length = np.diff(np.append(np.flatnonzero(breaks), len(shown)))
    for index, pages in zip(first.tolist(), length.tolist(), strict=True):
        entry = PagemapEntry(int(words[index]), profile=profile)
        bits = ",".join(name for name in _FLAGS if getattr(entry, name))
        text = f"    {int(seen.addresses[index]):#x} {pages:5d} page{'s' if pages > 1 else ' '} {bits}"
        if inside[index]:
            shows = FrameFlags(int(flags[index]), profile=profile)
            text += f"  {names.name(int(pfns[index]))} x{int(counts[index])} {shows}"
        yield text
