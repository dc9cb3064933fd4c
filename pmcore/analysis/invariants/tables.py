"""The rules that concern page tables and frames together: every process's entries, beside flags and counts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.analysis.invariants.frames import Frames
from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import Missing, NotPermitted, ProcessGone
from pmcore.pagemap import PagemapEntries
from pmcore.profile import KernelProfile
from pmcore.protocols import FrameFile, Kernel, Process
from pmcore.uapi import PM_FILE, PM_MMAP_EXCLUSIVE, PM_PFRAME_MASK, PM_PRESENT
from pmcore.uapi import PageFlag as F
from pmcore.vma import Vma

__all__ = [
    "Spot",
    "Tables",
    "Walk",
    "mapped_by_number",
    "recheck_spots",
    "recount",
    "table_rules",
]

_BATCH = 1 << 17
_FIELD = np.uint64(PM_PFRAME_MASK)
_KERNELS = np.uint64(F.SLAB | F.PGTABLE | F.OFFLINE)
_COMPOUND = np.uint64(F.COMPOUND_HEAD | F.COMPOUND_TAIL)
#: Codes of VmFlags for memory that is, or can be, mapped by number alone.
_BY_NUMBER = ("pf", "mm", "io")


@attrs.frozen
class Spot:
    """An entry that breaks a rule, and what it and its frame showed."""

    pid: int
    vpn: int
    entry: int
    flags: int
    count: int


class Walk:
    """All processes of a machine, VMA by VMA, in pieces of bounded size. Notes who could not be read."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.read: set[int] = set()
        self.unreadable: set[int] = set()
        self.entries = 0
        self._buffer = np.empty(_BATCH, dtype=np.uint64)

    def processes(self, pids: Iterable[int] | None = None) -> Iterator[tuple[Process, tuple[Vma, ...]]]:
        """The processes with their VMAs; one that ends is passed over."""
        for pid in self.kernel.pids() if pids is None else pids:
            try:
                process = self.kernel.process(pid)
                vmas = process.maps()
            except ProcessGone:
                continue
            except (NotPermitted, Missing):
                self.unreadable.add(pid)
                continue
            if vmas:
                self.read.add(pid)
                yield process, vmas

    def words(self, process: Process, vmas: Iterable[Vma]) -> Iterator[tuple[int, U64Array]]:
        """(first page, entries), piece by piece; neighbouring VMAs together. The array is used again."""
        geometry = process.kernel.geometry
        spans: list[list[int]] = []
        for vma in vmas:
            if vma.end > geometry.task_size or vma.name.startswith("[vvar"):
                continue
            first, end = vma.start >> geometry.page_shift, vma.end >> geometry.page_shift
            if spans and spans[-1][1] == first:
                spans[-1][1] = end
            else:
                spans.append([first, end])
        for first, end in spans:
            for vpn in range(first, end, _BATCH):
                out = self._buffer[: min(_BATCH, end - vpn)]
                with suppress(ProcessGone, NotPermitted):
                    got = process.read_pagemap(vpn, out)
                    self.entries += got
                    yield vpn, out[:got]


class Tables:
    """What the entries of all processes say of the frames, added up process by process."""

    def __init__(self, frames: Frames, profile: KernelProfile) -> None:
        self.frames = frames
        self.profile = profile
        #: Present entries that name each frame.
        self.seen = np.zeros(len(frames), dtype=np.uint32)
        #: By rule, the pages that break it at this look, by process.
        self.spots: dict[str, dict[int, list[U64Array]]] = {}

    def add(self, pid: int, vpn: int, words: U64Array) -> tuple[U64Array, NDArray[np.uint32]]:
        """Count a piece of a process's entries; flags and counts of the frames that the present ones name."""
        where = np.flatnonzero(words.view(np.int64) < 0)  # bit 63: present
        entries = words[where]
        pfns = entries & _FIELD
        inside = pfns < np.uint64(len(self.frames))
        if not inside.all():
            where, entries, pfns = where[inside], entries[inside], pfns[inside]
        index = pfns.view(np.int64)
        np.add.at(self.seen, index, np.uint32(1))
        flags, counts = self.frames.flags[index], self.frames.counts[index]
        for rule, broken in broken_entries(entries, flags, counts, self.profile).items():
            if broken.any():
                pages = np.uint64(vpn) + where[broken].astype(np.uint64)
                self.spots.setdefault(rule, {}).setdefault(pid, []).append(pages)
        return flags, counts

    def miscounted(self) -> U64Array:
        """Frames whose count is not the number of entries seen."""
        counts = self.frames.counts
        wrong = np.flatnonzero(self.seen != counts)
        flags = self.frames.flags[wrong]
        wrong = wrong[_counted(flags, self.seen[wrong], counts[wrong], self.profile)]
        return wrong.astype(np.uint64)


def table_rules(profile: KernelProfile) -> tuple[str, ...]:
    """The rules about entries that are checked on that kernel."""
    rules = ["IN-010", "IN-011", "IN-012", "IN-015", "IN-016"]
    rules += ["IN-013"] if profile.has("pagemap.mmap_exclusive") else []
    rules += ["IN-014"] if profile.has("pagemap.file") else []
    return tuple(rules)


def _counted(
    flags: U64Array,
    seen: NDArray[np.uint32],
    counts: NDArray[np.uint32] | U64Array,
    profile: KernelProfile,
) -> BoolArray:
    """Where a difference between entries seen and count breaks IN-011."""
    wrong: BoolArray = (seen != counts) & ((flags & np.uint64(F.ZERO_PAGE)) == 0)
    if profile.has("kpagecount.average"):
        wrong &= (flags & _COMPOUND) == 0
    # Processes can share the tables of hugetlb: one entry is then seen in each of them, and counted once.
    hugetlb = (flags & np.uint64(F.HUGE)) != 0
    wrong &= ~(hugetlb & (seen > counts) & (counts > 0))
    return wrong


def broken_entries(
    entries: U64Array, flags: U64Array, counts: NDArray[np.uint32] | U64Array, profile: KernelProfile
) -> dict[str, BoolArray]:
    """By rule, which of these present entries break it, given their frames' flags and counts."""
    exclusive = (entries & np.uint64(PM_MMAP_EXCLUSIVE)) != 0
    zero = (flags & np.uint64(F.ZERO_PAGE)) != 0
    rest = ~zero
    found = {
        "IN-012": (flags & np.uint64(F.BUDDY)) != 0,
        "IN-015": (flags & _KERNELS) != 0,
        "IN-010": PagemapEntries(entries, profile=profile).unknown_bits != 0,
    }
    if profile.has("pagemap.mmap_exclusive"):
        found["IN-016"] = zero & exclusive
        # The first page of a huge page speaks for all that a PMD maps: then only single pages and heads are sure.
        if profile.has("quirk.thp_exclusive_of_head"):
            rest &= (flags & np.uint64(F.COMPOUND_TAIL)) == 0
        wrong = exclusive != (counts == 1)
        wrong &= exclusive | ((flags & np.uint64(F.HUGE)) == 0)
        if profile.has("kpagecount.average"):
            wrong &= (flags & _COMPOUND) == 0
        found["IN-013"] = wrong & rest
    if profile.has("pagemap.file"):
        anon = (flags & np.uint64(F.ANON)) != 0
        file = (entries & np.uint64(PM_FILE)) != 0
        found["IN-014"] = (file == anon) & ~zero
    return found


def recheck_spots(
    kernel: Kernel, pid: int, rule: str, pages: U64Array, profile: KernelProfile
) -> tuple[list[Spot], U64Array]:
    """Those of `pages` whose entries break `rule` at a fresh look, and those that changed while they were looked at."""
    none = np.zeros(0, dtype=np.uint64)
    try:
        process = kernel.process(pid)
        before = _entries_at(process, pages)
        pfns = before & _FIELD
        flags, counts = (
            kernel.frames_at(FrameFile.KPAGEFLAGS, pfns),
            kernel.frames_at(FrameFile.KPAGECOUNT, pfns),
        )
        after = _entries_at(process, pages)
        again = kernel.frames_at(FrameFile.KPAGECOUNT, pfns)
        still = (before == after) & (counts == again)
        broken = broken_entries(before, flags, counts, profile)[rule]
        broken &= (before & np.uint64(PM_PRESENT)) != 0
        if broken.any():
            broken &= ~_in_ranges(pages, _special_ranges(process))
    except (ProcessGone, NotPermitted):
        return [], none
    chosen = np.flatnonzero(still & broken)
    spots = [
        Spot(pid, *(int(column[i]) for column in (pages, before, flags, counts))) for i in chosen.tolist()
    ]
    return spots, pages[~still]


def _entries_at(process: Process, pages: U64Array) -> U64Array:
    """Entries of single pages, ascending; runs of neighbours are read together."""
    out = np.zeros(len(pages), dtype=np.uint64)
    cuts = np.flatnonzero(np.diff(pages) > 64) + 1
    bounds = [0, *cuts.tolist(), len(pages)]
    for low, high in itertools.pairwise(bounds):
        if low == high:
            continue
        first = int(pages[low])
        words = np.zeros(int(pages[high - 1]) - first + 1, dtype=np.uint64)
        process.read_pagemap(first, words)
        out[low:high] = words[(pages[low:high] - np.uint64(first)).astype(np.int64)]
    return out


def _special_ranges(process: Process) -> U64Array:
    """[first page, end] of the VMAs that hold memory mapped by number alone."""
    shift = process.kernel.geometry.page_shift
    rows = []
    with suppress(Missing):
        for entry in process.smaps():
            if any(entry.has_flag(code) for code in _BY_NUMBER):
                rows.append((entry.vma.start >> shift, entry.vma.end >> shift))
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


def _in_ranges(pages: U64Array, ranges: U64Array) -> BoolArray:
    place = np.searchsorted(ranges[:, 0], pages, side="right") - 1
    found: BoolArray = np.zeros(len(pages), dtype=np.bool_)
    if len(ranges):
        found = (place >= 0) & (pages < ranges[np.maximum(place, 0), 1])
    return found


# -- counting again --------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Recount:
    """A fresh count of entries for some frames."""

    pfns: U64Array
    #: Entries over all processes, and over all address spaces: processes that show the same VMAs and the same entries
    #: (vfork, CLONE_VM, but also a child that has written nothing yet) may be one.
    seen: NDArray[np.uint32]
    least: NDArray[np.uint32]
    counts: U64Array
    #: Where entries and count are unequal; 0 elsewhere.
    flags: U64Array
    #: Whether the kernel's count was the same before and after the entries were counted.
    still: BoolArray
    #: Processes that map at least one of the frames.
    mappers: tuple[int, ...]

    def over(self, profile: KernelProfile) -> BoolArray:
        """Where more entries name the frame than its count says, against IN-011."""
        return _counted(self.flags, self.least, np.minimum(self.counts, self.least), profile)

    def under(self, profile: KernelProfile) -> BoolArray:
        """Where fewer do."""
        return _counted(self.flags, self.seen, np.maximum(self.counts, self.seen), profile)


def recount(walk: Walk, pfns: U64Array, frames: int) -> Recount:
    """Count the entries that name `pfns` (ascending) in all processes there are now."""
    kernel = walk.kernel
    before = kernel.frames_at(FrameFile.KPAGECOUNT, pfns)
    place = np.full(frames, -1, dtype=np.int32)
    place[pfns.astype(np.int64)] = np.arange(len(pfns), dtype=np.int32)
    seen, least = np.zeros((2, len(pfns)), dtype=np.uint32)
    mappers = []
    known: set[bytes] = set()
    for process, vmas in walk.processes():
        parts = []
        digest = hashlib.blake2b(repr([(vma.start, vma.end) for vma in vmas]).encode())
        for vpn, words in walk.words(process, vmas):
            digest.update(vpn.to_bytes(8, "little"))
            digest.update(words.data)
            present = words[words.view(np.int64) < 0] & _FIELD
            index = place[present[present < np.uint64(frames)].view(np.int64)]
            index = index[index >= 0]
            if len(index):
                parts.append(index)
        if parts:
            index = np.concatenate(parts)
            mappers.append(process.pid)
            np.add.at(seen, index, np.uint32(1))
            if digest.digest() not in known:
                np.add.at(least, index, np.uint32(1))
            known.add(digest.digest())
    after = kernel.frames_at(FrameFile.KPAGECOUNT, pfns)
    flags = np.zeros(len(pfns), dtype=np.uint64)
    unequal = (seen != after) | (least != after)
    flags[unequal] = kernel.frames_at(FrameFile.KPAGEFLAGS, pfns[unequal])
    return Recount(pfns, seen, least, after, flags, before == after, tuple(mappers))


def mapped_by_number(walk: Walk, pfns: U64Array, mappers: Iterable[int]) -> NDArray[np.uint32]:
    """How many entries that name each of `pfns` lie in VMAs mapped by number alone."""
    found = np.zeros(len(pfns), dtype=np.uint32)
    shift = walk.kernel.geometry.page_shift
    for process, vmas in walk.processes(mappers):
        with suppress(ProcessGone, NotPermitted):
            special = _special_ranges(process)
            chosen = [
                vma for vma in vmas if _in_ranges(np.array([vma.start >> shift], np.uint64), special)[0]
            ]
            for _, words in walk.words(process, chosen):
                present = words[(words & np.uint64(PM_PRESENT)) != 0] & _FIELD
                inside = np.isin(present, pfns)
                np.add.at(found, np.searchsorted(pfns, present[inside]), np.uint32(1))
    return found
