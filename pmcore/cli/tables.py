"""Page tables in words: runs of pages that look alike, one line each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import BoolArray, U64Array
from pmcore.lockstep import Look, TaskLook
from pmcore.pageflags import FrameFlags
from pmcore.pagemap import PagemapEntries, PagemapEntry
from pmcore.profile import KernelProfile
from pmcore.uapi import MAX_SWAPFILES, PM_PFRAME_MASK, PM_PRESENT, PM_SWAP, PM_SWAP_TYPE_MASK

__all__ = ["FrameNames", "describe"]

_FLAGS = ("present", "swapped", "file", "exclusive", "soft_dirty", "uffd_wp", "guard")


class FrameNames:
    """Short names for frames and swap slots, in the order in which they are first seen: comparable between machines."""

    def __init__(self) -> None:
        self._frames: dict[int, int] = {}
        self._slots: dict[int, int] = {}
        self._last = [0, 0]

    def keep(self, look: Look) -> None:
        """Forget what this look does not show: when it is seen again, it may be another page by the same number."""
        frames = set(look.pfns.tolist())
        slots: set[int] = set()
        for seen in look.tasks.values():
            slots.update((seen.words[_slots(seen.words)] & np.uint64(PM_PFRAME_MASK)).tolist())
        self._frames = {pfn: name for pfn, name in self._frames.items() if pfn in frames}
        self._slots = {slot: name for slot, name in self._slots.items() if slot in slots}

    def frames(self, pfns: U64Array) -> NDArray[np.int64]:
        """The numbers behind the F of each."""
        return self._numbers(self._frames, 0, pfns)

    def slots(self, fields: U64Array) -> NDArray[np.int64]:
        """The numbers behind the S of each."""
        return self._numbers(self._slots, 1, fields)

    def _numbers(self, known: dict[int, int], kind: int, values: U64Array) -> NDArray[np.int64]:
        for value in values.tolist():
            if value not in known:
                self._last[kind] += 1
                known[value] = self._last[kind]
        return np.array([known[value] for value in values.tolist()], dtype=np.int64)


def _slots(words: U64Array) -> BoolArray:
    """Which entries name slots of a swap area."""
    swapped = (words & np.uint64(PM_PRESENT | PM_SWAP)) == np.uint64(PM_SWAP)
    found: BoolArray = swapped & ((words & np.uint64(PM_SWAP_TYPE_MASK)) < np.uint64(MAX_SWAPFILES))
    return found


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
    # What is compared of a frame or slot is its name; of a marker what it says.
    field = (words & np.uint64(PM_PFRAME_MASK)).view(np.int64)
    slots = _slots(words)
    field[inside], field[slots] = names.frames(pfns[inside]), names.slots(field[slots].view(np.uint64))
    shown = np.flatnonzero(words)
    if not len(shown):
        return
    breaks = np.ones(len(shown), dtype=np.bool_)
    a, b = shown[:-1], shown[1:]
    same = (seen.addresses[b] - seen.addresses[a] == np.uint64(size)) & (high[a] == high[b])
    same &= (flags[a] == flags[b]) & (counts[a] == counts[b]) & (slots[a] == slots[b])
    same &= (field[b] == field[a] + (inside[a] | slots[a])) | (field[b] == field[a])
    breaks[1:] = ~same
    first = shown[breaks]
    length = np.diff(np.append(np.flatnonzero(breaks), len(shown)))
    for index, pages in zip(first.tolist(), length.tolist(), strict=True):
        entry = PagemapEntry(int(words[index]), profile=profile)
        bits = ",".join(name for name in _FLAGS if getattr(entry, name))
        text = f"    {int(seen.addresses[index]):#x} {pages:5d} page{'s' if pages > 1 else ' '} {bits}"
        low, top = int(field[index]), int(field[index + pages - 1])
        if inside[index]:
            shows = FrameFlags(int(flags[index]), profile=profile)
            text += f"  {_span('F', low, top)} x{int(counts[index])} {shows}"
        elif slots[index]:
            text += f"  {_span('S', low, top)}"
        yield text


def _span(kind: str, low: int, top: int) -> str:
    return f"{kind}{low}" if low == top else f"{kind}{low}-{kind}{top}"
