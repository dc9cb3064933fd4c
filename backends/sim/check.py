"""Whether a machine is well: every invariant of its state, verified anew. Reads everything, changes nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.check_disk import Finding, disk_findings
from pmcore.backends.sim.check_disk import some as _some
from pmcore.backends.sim.check_groups import group_findings
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED, MOVED_YOUNG, RAW_HWPOISON
from pmcore.backends.sim.physical.memory import COMPOUND, HEAD, TAIL
from pmcore.backends.sim.services import blocks, ksm_state
from pmcore.backends.sim.services.hugetlb import HugeFile
from pmcore.backends.sim.services.pagecache import OpenFile
from pmcore.backends.sim.services.userfaultfd import Userfaultfd
from pmcore.backends.sim.virtual import hugetlb
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SPECIAL, TABLE, UFFD_WP, WRITE, is_hwpoison
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries, swap_entries
from pmcore.errors import PmcoreError
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["BrokenInvariant", "Finding", "check", "findings"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
_BUDDY, _PGTABLE, _LRU = int(PageFlag.BUDDY), int(PageFlag.PGTABLE), int(PageFlag.LRU)
_SWAPCACHE = int(PageFlag.SWAPCACHE)
_KERNEL = int(PageFlag.RESERVED | PageFlag.SLAB | PageFlag.ZERO_PAGE | PageFlag.OFFLINE | PageFlag.HWPOISON)


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
    yield from _offline(core)
    yield from _out_of_use(core)
    yield from _pools(core, spaces, maps)
    yield from _files(core, spaces)
    yield from disk_findings(core, spaces)
    yield from _swap(core, maps)
    yield from _owners(core, maps)
    yield from _idle(core)
    yield from _contents(core)
    yield from group_findings(core, spaces)
    place = core.khugepaged.address
    if place % core.geometry.pmd_size or not 0 <= place <= core.geometry.task_size:
        yield Finding("khugepaged goes on at the start of a block", f"{place:#x}")
    for name, where in ksm_state.findings(core, spaces):
        yield Finding(name, where)


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
            if isinstance(vma.uffd, Userfaultfd) and vma.uffd.mm is not mm:
                yield Finding("a VMA's userfaultfd watches its own address space", f"{vma.start:#x}")
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
    left = [row for row in core.pool.free_rows if core.pool.rows[row].any()]
    if left:
        yield Finding("a page table that was given back holds nothing", str(left[:8]))
    pfns = core.pool.pfns[rows]
    wrong = np.flatnonzero(core.memory.frames.flags[pfns] != _PGTABLE)
    if len(wrong):
        yield Finding("a page table's frame shows PGTABLE", _some(pfns[wrong]))


class _Mappings:
    """Who maps what, counted from the page tables."""

    def __init__(self, core: Core, spaces: list[AddressSpace]) -> None:
        self.core = core
        #: Whether write protection means what it says: no registration without it has followed one with (UF-011).
        self.protected = "uffd_wp_left" not in core.numbers
        frames = core.memory.frames
        self.counts = np.zeros(frames.rows, dtype=np.int64)
        self.entire: Counter[int] = Counter()
        self.by_mm: dict[int, Counter[int]] = {}
        self.slots: Counter[int] = Counter()
        self.bad: list[Finding] = []
        for mm in spaces:
            self._space(mm)
        for inode in core.inodes.values():
            words = inode.index.used()[1]
            self.slots.update((words[swap_entries(words)] & _FIELD).tolist())

    def _space(self, mm: AddressSpace) -> None:
        core, total = self.core, 0
        for vma in mm.vmas:
            if vma.huge is not None:
                total += self._hugetlb(mm, vma)
                continue
            for extent in mm.tables.extents(vma.start, vma.end):
                entries = extent.entries
                total += int(np.count_nonzero(entries))
                present = entries[(entries & _PRESENT) != 0]
                both = present & np.uint64(WRITE | UFFD_WP) == np.uint64(WRITE | UFFD_WP)
                if self.protected and both.any():
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
                self._poisoned(extent.start, entries)
                swap = entries[swap_entries(entries)] & _FIELD
                self.slots.update(swap.tolist())
        everywhere = sum(
            int(np.count_nonzero(e.entries)) for e in mm.tables.extents(0, core.geometry.task_size)
        )
        if everywhere != total:
            self.bad.append(Finding("entries lie inside VMAs", f"{everywhere - total} do not"))

    def _poisoned(self, start: int, entries: U64Array) -> None:
        named = entries[hwpoison_entries(entries)] & _FIELD
        pfns = np.minimum((named >> np.uint64(5)).view(np.int64), self.core.memory.frames.rows - 1)
        if (self.core.memory.frames.flags[pfns] & np.uint64(PageFlag.HWPOISON) == 0).any():
            self.bad.append(Finding("an hwpoison entry names a poisoned frame", f"{start:#x}"))

    def _hugetlb(self, mm: AddressSpace, vma: VmArea) -> int:
        """Entries of a hugetlb VMA; how many of them lie in tables of PMDs."""
        core, found = self.core, 0
        assert vma.huge is not None
        pool = vma.huge.file.pool
        for addr, slot in hugetlb.entries(mm, vma, vma.start, vma.end):
            entry = core.pool.at[slot] if slot >= 0 else 0
            found += bool(entry) and pool.level == 1
            if not entry & PRESENT:
                if entry not in (0, hugetlb.HUGE_MARKER, hugetlb.HUGE_POISON) and not is_hwpoison(entry):
                    self.bad.append(Finding("an empty hugetlb entry is none or a marker", f"{addr:#x}"))
                continue
            head = entry & FIELD
            if self.protected and entry & (WRITE | UFFD_WP) == WRITE | UFFD_WP:
                self.bad.append(Finding("a write-protected entry may not be written", f"{addr:#x}"))
            if entry & WRITE and not vma.flags & VmFlag.WRITE:
                self.bad.append(Finding("an entry allows no more than its VMA", f"{addr:#x}"))
            if core.hugetlb.folios.get(head) is not pool:
                self.bad.append(Finding("a hugetlb entry maps a page of its pool", f"{addr:#x}"))
                continue
            self.counts[head : head + pool.pages] += 1
            anonymous = core.memory.frames.flags_at[head] & int(PageFlag.ANON)
            index = vma.pgoff + (addr - vma.start >> core.geometry.page_shift) >> pool.order
            if bool(anonymous) == (vma.huge.file.pages.get(index) == head):
                self.bad.append(Finding("a hugetlb page is anonymous or its file's", f"{addr:#x}"))
            if anonymous and vma.shared:
                self.bad.append(Finding("a shared hugetlb mapping maps its file", f"{addr:#x}"))
        return found

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
    folios += [(head, pool.pages) for head, pool in core.hugetlb.folios.items()]
    for head, pages in folios:
        if head % pages:
            yield Finding("a compound page is aligned to its size", f"{head:#x}")
        expected[head : head + pages] = np.arange(pages)
        flags = frames.flags[head : head + pages] & np.uint64(COMPOUND)
        if flags[0] != HEAD or (flags[1:] != TAIL).any():
            yield Finding("a compound page is one head and tails", f"{head:#x}")
        own = COMPOUND | ANON_EXCLUSIVE | RAW_HWPOISON
        if frames.flags_at[head] & int(PageFlag.ZERO_PAGE):
            own |= int(PageFlag.HWPOISON)
        rest = frames.flags[head : head + pages] & np.uint64(~own & (1 << 64) - 1)
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
        if any(count > counted[mm] for mm, count in folio.known.items()) or len(folio.known) > 2:
            yield Finding(
                "a large folio knows at most two address spaces, with no more than they map", f"{head:#x}"
            )
        if folio.mapped > 1 and (
            (not folio.shared and len(counted) > 1)
            or (folio.shared and folio.known == dict(counted) and len(counted) == 1)
        ):
            yield Finding(
                "a large folio is shared where several map it, or one more than is known", f"{head:#x}"
            )
    words = np.flatnonzero(frames.whole)
    if len(words) != core.memory.large.words or (frames.behind[words] != 0).any():
        yield Finding("large folios that are words have them at their heads, and are counted", _some(words))


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
    position = 0
    for low, high in sorted([*frames.touched.items(), (frames.rows, frames.rows)]):
        for name, _ in frames.COLUMNS:
            wrong = np.flatnonzero(getattr(frames, name)[position:low]) + position
            if len(wrong):
                yield Finding("frames that were never used hold nothing", f"{name}: {_some(wrong)}")
        position = max(position, high)


def _out_of_use(core: Core) -> Iterator[Finding]:
    frames = core.memory.frames
    pfns = np.flatnonzero((frames.flags & np.uint64(PageFlag.HWPOISON)) != 0)
    pfns = pfns[(frames.flags[pfns] & np.uint64(PageFlag.ZERO_PAGE)) == 0]  # which stay what they are
    has = (frames.flags[pfns] & np.uint64(_LRU | _BUDDY)) != 0
    has |= (frames.mapcount[pfns] != 0) | (frames.lru[pfns] != 0)
    small = (frames.flags[pfns] & np.uint64(PageFlag.HUGE)) == 0  # the rest of a file's huge page can be read
    has |= small & (frames.content[pfns] != 0)
    if has.any():
        yield Finding(
            "a poisoned frame is not mapped, free or on a list, and holds nothing", _some(pfns[has])
        )


def _offline(core: Core) -> Iterator[Finding]:
    """What is offline is nobody's, and what a balloon has is nothing else."""
    memory, frames = core.memory, core.memory.frames
    zones = sorted((zone.start, zone.end) for zone in memory.zones)
    if any(low[1] > high[0] for low, high in itertools.pairwise(zones)):
        yield Finding("zones do not overlap", f"{zones}")
    for number in memory.offline:
        first, end = number * memory.block_pages, (number + 1) * memory.block_pages
        if end > frames.count or any(low < end and first < high for low, high in zones):
            yield Finding("a block that is offline belongs to no zone", f"block {number}")
        for name in ("flags", "mapcount", "content", "free_order", "swap"):
            lost = (frames.flags[first:end] & np.uint64(PageFlag.HWPOISON)) != 0  # what is poisoned stays so
            used = np.flatnonzero((getattr(frames, name)[first:end] != 0) & ~lost)
            if len(used):
                yield Finding("frames that are offline hold nothing", f"{name} of {_some(used + first)}")
    flags = frames.flags
    held = (flags & np.uint64(PageFlag.OFFLINE)) != 0
    wrong = np.flatnonzero(held & ((flags != np.uint64(PageFlag.OFFLINE)) | (frames.mapcount != 0)))
    if len(wrong):
        yield Finding("a page of the balloon is nothing else, and nobody maps it", _some(wrong))


def _pools(core: Core, spaces: list[AddressSpace], maps: _Mappings) -> Iterator[Finding]:
    """hugetlb: pages and promises are counted, and every page has one place."""
    frames, files = core.memory.frames, {}
    promised: Counter[int] = Counter()
    users: Counter[tuple[int, int]] = Counter()
    for mm in spaces:
        for vma in mm.vmas:
            if vma.huge is None:
                continue
            file = vma.huge.file
            files[id(file)] = file
            users[id(file), mm.number] += 1
            if vma.huge.promise is not None:
                first = vma.pgoff >> file.pool.order
                last = first + vma.length // file.pool.size
                consumed = sum(1 for index in vma.huge.promise.consumed if first <= index < last)
                promised[file.pool.size] += last - first - consumed
        files |= {id(file): file for file in mm.files.values() if isinstance(file, HugeFile)}
    held: list[int] = []
    for file in files.values():
        held += file.pages.values()
        promised[file.pool.size] += len(file.reserved) - len(file.pages)
        if not file.pages.keys() <= file.reserved:
            yield Finding("the pages of a hugetlb file are promised to it", f"{sorted(file.pages)}")
        counted = {mm.number: count for mm, count in file.users.items()}
        if counted != {number: n for (which, number), n in users.items() if which == id(file)}:
            yield Finding("a hugetlb file counts the VMAs that map it", f"{counted}")
    for pool in core.hugetlb.pools.values():
        heads = [head for head, owner in core.hugetlb.folios.items() if owner is pool]
        if len(heads) != pool.total or not 0 <= pool.surplus <= pool.total:
            yield Finding("the pages of a pool are counted", f"{pool.total} is not {len(heads)}")
        waiting = len(core.hugetlb.restored.intersection(heads))
        if promised[pool.size] != pool.reserved + waiting:  # more of them than are free: DV-042
            yield Finding(
                "promised huge pages are counted",
                f"{pool.reserved} and {waiting} still in use, not {promised[pool.size]}",
            )
        free = set(pool.free)
        if free & core.hugetlb.restored:
            yield Finding("a free huge page waits for no promise", f"{sorted(free & core.hugetlb.restored)}")
        if len(free) != len(pool.free) or not free <= set(heads):
            yield Finding("free huge pages are the pool's", f"{pool.free}")
        for head in heads:
            flags = frames.flags_at[head]
            # A poisoned one that its file has lost is nobody's, for good.
            used = bool(maps.counts[head]) or head in held or bool(flags & int(PageFlag.HWPOISON))
            if used == (head in free) or not flags & int(PageFlag.HUGE):
                yield Finding("a huge page is free, or somebody's", f"{head:#x}")
    if len(set(held)) != len(held):
        yield Finding("a huge page is one file's", f"{held}")


def _files(core: Core, spaces: list[AddressSpace]) -> Iterator[Finding]:
    """Page caches and frame table name each other; mappings of files map the pages that they should."""
    frames, shift = core.memory.frames, core.geometry.page_shift
    owner, index = np.zeros(frames.rows, dtype=np.int32), np.zeros(frames.rows, dtype=np.int64)
    for inode in core.inodes.values():
        pages, words = inode.index.used()
        present = (words & _PRESENT) != 0
        pfns = (words[present] & _FIELD).astype(np.int64)
        owner[pfns], index[pfns] = inode.number, pages[present]
        if len(np.unique(pfns)) != len(pfns):
            yield Finding("a frame is one page of one file", f"inode {inode.number}")
        if not present.all() and not swap_entries(words[~present]).all():
            yield Finding("a page of a file is a hole, in memory or in swap", f"inode {inode.number}")
    wrong = np.flatnonzero((owner != frames.owner) | (index != frames.index))
    wrong_flag = np.flatnonzero((frames.owner != 0) != ((frames.flags & np.uint64(CACHED)) != 0))
    if len(wrong) or len(wrong_flag):
        yield Finding("page cache and frame table name each other", _some(np.append(wrong, wrong_flag)))
    used = set()
    for mm in spaces:
        used |= {file.inode.number for file in mm.files.values() if isinstance(file, OpenFile)}
        for vma in mm.vmas:
            if vma.file is None:
                continue
            used.add(vma.file.number)
            for extent in mm.tables.extents(vma.start, vma.end):
                pfns = (extent.entries[(extent.entries & _PRESENT) != 0] & _FIELD).astype(np.int64)
                places = np.flatnonzero((extent.entries & _PRESENT) != 0) * (extent.size >> shift) + (
                    extent.start - vma.start >> shift
                )
                cached = (frames.flags[pfns] & np.uint64(CACHED)) != 0
                bad = cached & (
                    (frames.owner[pfns] != vma.file.number) | (frames.index[pfns] != places + vma.pgoff)
                )
                if bad.any():
                    yield Finding("a mapping of a file maps its pages, each at its place", _some(pfns[bad]))
    used |= set(core.names.values())
    if used != core.inodes.keys():
        yield Finding("a file is there while something refers to it", f"{used ^ core.inodes.keys()}")


def _swap(core: Core, maps: _Mappings) -> Iterator[Finding]:
    frames = core.memory.frames
    numbers = {area.number for area in core.swap.there}
    for field in [*maps.slots, *(frames.swap[frames.swap != 0] - 1).tolist()]:
        if field & 0x1F not in numbers:
            yield Finding("a swap entry names no swap area", f"{field:#x}")
            break
    for area in core.swap.areas:
        if area is None:
            continue
        if area.closing or area.number != core.swap.areas.index(area):
            yield Finding("an area is open, at the place of its number", f"area {area.number}")
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
    owned = (
        (maps.counts > 0)
        | (frames.owner != 0)
        | ((flags & np.uint64(_KERNEL | _PGTABLE | _BUDDY | _SWAPCACHE)) != 0)
    )
    for folio in core.memory.large.values():
        if folio.mapped:
            owned[folio.head : folio.head + folio.pages] = True
    for head, pool in core.hugetlb.folios.items():
        owned[head : head + pool.pages] = True
    for zone in core.memory.zones:
        part = slice(zone.start, zone.frontier)
        wrong = np.flatnonzero(~owned[part]) + zone.start
        if len(wrong):
            yield Finding("every frame is free, the kernel's, mapped or cached", _some(wrong))
    wrong = np.flatnonzero((frames.lru != 0) != ((flags & np.uint64(_LRU)) != 0))
    if len(wrong):
        yield Finding("pages on an LRU list, and no others, show LRU", _some(wrong))


def _idle(core: Core) -> Iterator[Finding]:
    """What idle page tracking marks: folios on LRU lists, whole ones, and none before anybody has marked any."""
    frames = core.memory.frames
    marks = frames.flags & np.uint64(int(PageFlag.IDLE) | MOVED_YOUNG)
    # What a page is marked with when it is poisoned stays on its frame.
    wrong = (marks != 0) & ((frames.flags & np.uint64(_LRU | int(PageFlag.HWPOISON))) == 0)
    if "page_idle" not in core.numbers:
        wrong |= marks != 0
    wrong |= marks != marks[np.arange(frames.rows) - frames.behind]
    if wrong.any():
        yield Finding("only whole folios on LRU lists are idle or young", _some(np.flatnonzero(wrong)))


def _contents(core: Core) -> Iterator[Finding]:
    rows = [core.memory.frames.content, *(area.content for area in core.swap.areas if area is not None)]
    rows += [blocks.rows(inode.blocks.used()[1]) for inode in core.inodes.values()]
    held = np.concatenate([column[column != 0] for column in rows])
    if len(np.unique(held)) != len(held) or len(held) != core.memory.contents.in_use:
        yield Finding("contents have one owner", f"{core.memory.contents.in_use} pages, {len(held)} owners")
