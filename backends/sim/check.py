"""Whether a machine is well: every invariant of its state, verified anew. Reads everything, changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs
import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import COMPOUND, HEAD, TAIL
from pmcore.backends.sim.services import ksm_state
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SPECIAL, TABLE, UFFD_WP, WRITE
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import swap_entries
from pmcore.errors import PmcoreError
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["BrokenInvariant", "Finding", "check", "findings"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_BUDDY, _PGTABLE, _LRU = int(PageFlag.BUDDY), int(PageFlag.PGTABLE), int(PageFlag.LRU)
_SWAPCACHE = int(PageFlag.SWAPCACHE)
_KERNEL = int(PageFlag.RESERVED | PageFlag.SLAB | PageFlag.ZERO_PAGE | PageFlag.OFFLINE | PageFlag.HWPOISON)


@attrs.frozen
class Finding:
    """An invariant that does not hold: its name, and where."""

    invariant: str
    where: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.where}"


class BrokenInvariant(PmcoreError, AssertionError):
    """The simulated machine's state contradicts itself: a mistake of the simulator's, never of its user's."""


def check(core: Core, spaces: list[AddressSpace]) -> None:
    """Raise BrokenInvariant that names everything found, if anything is."""
    found = list(findings(core, spaces))
    if found:
        raise BrokenInvariant("; ".join(str(finding) for finding in found[:20]))


def findings(core: Core, spaces: list[AddressSpace]) -> Iterator[Finding]:
    """Every invariant that does not hold."""
    yield from _vmas(core, spaces)
    yield from _tables(core, spaces)
    maps = _Mappings(core, spaces)
    yield from maps.findings()
    yield from _compound(core, maps)
    yield from _free(core)
    yield from _swap(core, maps)
    yield from _owners(core, maps)
    yield from _contents(core)
    for name, where in ksm_state.findings(core, spaces):
        yield Finding(name, where)


def _some(index: np.ndarray[tuple[int], np.dtype[np.intp]]) -> str:
    shown = ", ".join(f"{value:#x}" for value in index[:4].tolist())
    return f"{shown}{'...' if len(index) > 4 else ''}"


def _vmas(core: Core, spaces: list[AddressSpace]) -> Iterator[Finding]:
    for mm in spaces:
        position = 0
        for vma in mm.vmas:
            if (
                vma.start < position
                or vma.end <= vma.start
                or (vma.start | vma.end) & core.geometry.page_size - 1
            ):
                yield Finding("VMAs are ascending, disjoint and page-aligned", f"{vma.start:#x}-{vma.end:#x}")
            if bool(vma.flags & VmFlag.UFFD) != (vma.uffd is not None):
                yield Finding(
                    "a VMA has userfaultfd flags if and only if it has a context", f"{vma.start:#x}"
                )
            position = vma.end


def _tables(core: Core, spaces: list[AddressSpace]) -> Iterator[Finding]:
    rows: list[int] = []
    for mm in spaces:
        counts, level_rows = [], [mm.tables.root]
        for level in range(core.geometry.levels - 1, -1, -1):
            counts.append(len(level_rows))
            rows += level_rows
            if level:
                entries = core.pool.rows[level_rows].reshape(-1)
                level_rows = (entries[(entries & np.uint64(TABLE)) != 0] & _FIELD).astype(np.int64).tolist()
        if counts[::-1] != mm.tables.tables:
            yield Finding("page tables are counted by level", f"{mm.tables.tables} is not {counts[::-1]}")
    if len(set(rows)) != len(rows) or len(rows) != core.pool.in_use:
        yield Finding("each page table has one owner", f"{core.pool.in_use} tables, {len(rows)} reachable")
    pfns = core.pool.pfns[rows]
    wrong = np.flatnonzero(core.memory.frames.flags[pfns] != _PGTABLE)
    if len(wrong):
        yield Finding("a page table's frame shows PGTABLE", _some(pfns[wrong]))


class _Mappings:
    """Who maps what, counted from the page tables."""

    def __init__(self, core: Core, spaces: list[AddressSpace]) -> None:
        self.core = core
        frames = core.memory.frames
        self.counts = np.zeros(frames.rows, dtype=np.int64)
        self.entire: Counter[int] = Counter()
        self.by_mm: dict[int, Counter[int]] = {}
        self.slots: Counter[int] = Counter()
        self.bad: list[Finding] = []
        for mm in spaces:
            self._space(mm)

    def _space(self, mm: AddressSpace) -> None:
        core, total = self.core, 0
        for vma in mm.vmas:
            for extent in mm.tables.extents(vma.start, vma.end):
                entries = extent.entries
                total += int(np.count_nonzero(entries))
                present = entries[(entries & _PRESENT) != 0]
                if (present & np.uint64(WRITE | UFFD_WP) == np.uint64(WRITE | UFFD_WP)).any():
                    self.bad.append(
                        Finding("a write-protected entry may not be written", f"{extent.start:#x}")
                    )
                if not vma.flags & VmFlag.WRITE and (present & np.uint64(WRITE)).any():
                    self.bad.append(Finding("an entry allows no more than its VMA", f"{extent.start:#x}"))
                pfns = (present & _FIELD).astype(np.int64)
                zero = core.huge_zero_pfn if extent.huge else core.zero_pfn
                if (present[pfns == zero] & np.uint64(WRITE)).any():
                    self.bad.append(Finding("the zero page is never writable", f"{extent.start:#x}"))
                if ((pfns == zero) != ((present & np.uint64(SPECIAL)) != 0)).any():
                    where = f"{extent.start:#x}"
                    self.bad.append(Finding("entries of the zero page, and no others, are special", where))
                pfns = pfns[pfns != zero]
                if extent.huge:
                    for head in pfns.tolist():
                        self.counts[head : head + core.geometry.pmd_pages] += 1
                        self.entire[head] += 1
                        self._of(mm, head, 1)
                    continue
                np.add.at(self.counts, pfns, 1)
                compound = pfns[(core.memory.frames.flags[pfns] & np.uint64(COMPOUND)) != 0]
                heads, counts = np.unique(compound - core.memory.frames.behind[compound], return_counts=True)
                for head, count in zip(heads.tolist(), counts.tolist(), strict=True):
                    self._of(mm, head, count)
                swap = entries[swap_entries(entries)] & _FIELD
                self.slots.update(swap.tolist())
        everywhere = sum(
            int(np.count_nonzero(e.entries)) for e in mm.tables.extents(0, core.geometry.task_size)
        )
        if everywhere != total:
            self.bad.append(Finding("entries lie inside VMAs", f"{everywhere - total} do not"))

    def _of(self, mm: AddressSpace, head: int, count: int) -> None:
        self.by_mm.setdefault(head, Counter())[mm.number] += count

    def findings(self) -> Iterator[Finding]:
        """What is wrong with counts of mappings."""
        yield from self.bad
        frames = self.core.memory.frames
        wrong = np.flatnonzero(frames.mapcount != self.counts)
        if len(wrong):
            yield Finding("mapcount is the number of entries that map the frame", _some(wrong))
        exclusive = (frames.flags & np.uint64(ANON_EXCLUSIVE)) != 0
        wrong = np.flatnonzero(exclusive & (self.counts > 1))
        if len(wrong):
            yield Finding("an exclusive page is mapped once", _some(wrong))


def _compound(core: Core, maps: _Mappings) -> Iterator[Finding]:
    frames = core.memory.frames
    expected = np.zeros(frames.rows, dtype=np.int32)
    folios = [(f.head, f.pages) for f in core.memory.large.values()]
    folios += [(head, 1 << order) for head, order in core.memory.kernel_folios.items()]
    for head, pages in folios:
        if head % pages:
            yield Finding("a compound page is aligned to its size", f"{head:#x}")
        expected[head : head + pages] = np.arange(pages)
        flags = frames.flags[head : head + pages] & np.uint64(COMPOUND)
        if flags[0] != HEAD or (flags[1:] != TAIL).any():
            yield Finding("a compound page is one head and tails", f"{head:#x}")
        rest = frames.flags[head : head + pages] & np.uint64(~(COMPOUND | ANON_EXCLUSIVE) & (1 << 64) - 1)
        if (rest != rest[0]).any():
            yield Finding("the pages of a folio show the same flags", f"{head:#x}")
    wrong = np.flatnonzero(frames.behind != expected)
    if len(wrong):
        yield Finding("tails follow their head", _some(wrong))
    for head, folio in core.memory.large.items():
        counted = maps.by_mm.get(head, Counter())
        if (
            dict(counted) != folio.by_mm
            or folio.mapped != sum(counted.values())
            or folio.entire != maps.entire[head]
        ):
            yield Finding("a large folio counts its mappings by address space", f"{head:#x}")


def _free(core: Core) -> Iterator[Finding]:
    frames = core.memory.frames
    free = np.zeros(frames.rows, dtype=np.bool_)
    for zone in core.memory.zones:
        total = zone.end - zone.frontier
        heads = np.flatnonzero(frames.free_order[zone.start : zone.frontier]) + zone.start
        for head in heads.tolist():
            order = int(frames.free_order[head]) - 1
            if head % (1 << order) or free[head : head + (1 << order)].any():
                yield Finding("free blocks are aligned and do not overlap", f"{head:#x}")
            free[head : head + (1 << order)] = True
            total += 1 << order
            buddy = head ^ 1 << order
            if order < 10 and zone.start <= buddy < zone.frontier and frames.free_order[buddy] == order + 1:
                yield Finding("two free buddies are one block", f"{head:#x}")
        if total != zone.free_pages:
            yield Finding("free pages are counted", f"zone {zone.name}: {zone.free_pages} is not {total}")
        part = slice(zone.start, zone.frontier)
        wrong = np.flatnonzero(free[part] != ((frames.flags[part] & np.uint64(_BUDDY)) != 0)) + zone.start
        if len(wrong):
            yield Finding("free frames, and no others, show BUDDY", _some(wrong))
    wrong = np.flatnonzero(free & (frames.mapcount != 0))
    if len(wrong):
        yield Finding("no free frame is mapped", _some(wrong))


def _swap(core: Core, maps: _Mappings) -> Iterator[Finding]:
    frames = core.memory.frames
    for area in core.swap.areas:
        if area is None:
            continue
        expected = np.zeros(area.slots, dtype=np.int64)
        for field, count in maps.slots.items():
            if field & 0x1F == area.number:
                expected[field >> 5] = count
        wrong = np.flatnonzero(area.counts != expected)
        if len(wrong):
            yield Finding("a slot's count is the number of entries that name it", _some(wrong))
        used = int(((area.counts != 0) | (area.cached != 0)).sum())
        if used != area.used:
            yield Finding("used slots are counted", f"area {area.number}: {area.used} is not {used}")
        cached = np.flatnonzero(area.cached)
        back = frames.swap[area.cached[cached] - 1] - 1
        if (back != (cached << 5 | area.number)).any():
            yield Finding("slot and page of the swap cache name each other", f"area {area.number}")
    wrong = np.flatnonzero((frames.swap != 0) != ((frames.flags & np.uint64(_SWAPCACHE)) != 0))
    if len(wrong):
        yield Finding("pages of the swap cache, and no others, show SWAPCACHE", _some(wrong))


def _owners(core: Core, maps: _Mappings) -> Iterator[Finding]:
    """Every frame that is not free belongs to somebody."""
    frames = core.memory.frames
    flags = frames.flags
    owned = (maps.counts > 0) | ((flags & np.uint64(_KERNEL | _PGTABLE | _BUDDY | _SWAPCACHE)) != 0)
    for folio in core.memory.large.values():
        if folio.mapped:
            owned[folio.head : folio.head + folio.pages] = True
    for zone in core.memory.zones:
        part = slice(zone.start, zone.frontier)
        wrong = np.flatnonzero(~owned[part]) + zone.start
        if len(wrong):
            yield Finding("every frame is free, the kernel's, mapped or cached", _some(wrong))
    wrong = np.flatnonzero((frames.lru != 0) != ((flags & np.uint64(_LRU)) != 0))
    if len(wrong):
        yield Finding("pages on an LRU list, and no others, show LRU", _some(wrong))


def _contents(core: Core) -> Iterator[Finding]:
    rows = [core.memory.frames.content, *(area.content for area in core.swap.areas if area is not None)]
    held = np.concatenate([column[column != 0] for column in rows])
    if len(np.unique(held)) != len(held) or len(held) != core.memory.contents.in_use:
        yield Finding("contents have one owner", f"{core.memory.contents.in_use} pages, {len(held)} owners")
