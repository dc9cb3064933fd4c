"""All physical memory: who gets frames, what kind of folio they are, and giving them back."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.buddy import MAX_ORDER, Pfns, Zone
from pmcore.backends.sim.physical.charges import Charges
from pmcore.backends.sim.physical.contents import Contents
from pmcore.backends.sim.physical.folios import LargeFolio, LargeFolios
from pmcore.backends.sim.physical.frames import Frames
from pmcore.backends.sim.physical.runs import runs
from pmcore.uapi import PageFlag

__all__ = ["LargeFolio", "Memory", "NoMemory", "min_watermark"]

HEAD, TAIL = int(PageFlag.COMPOUND_HEAD), int(PageFlag.COMPOUND_TAIL)
COMPOUND = HEAD | TAIL
_PGTABLE = int(PageFlag.PGTABLE)


def min_watermark(memory: int) -> int:
    """The kernel's min_free_kbytes for that much memory, in bytes."""
    kilobytes = int((memory / 1024 * 16) ** 0.5)
    return min(max(kilobytes, 128), 262144) * 1024


class NoMemory(Exception):
    """No frame is left, and none could be reclaimed."""


class Memory:
    """Frames, zones and contents together."""

    def __init__(
        self, frames: Frames, zones: list[Zone], contents: Contents, *, block_pages: int = 1 << 15
    ) -> None:
        self.frames = frames
        self.zones = zones
        self.contents = contents
        #: Large folios by their head.
        self.large = LargeFolios(frames)
        #: Order of the compound pages that the kernel keeps for itself, by head.
        self.kernel_folios: dict[int, int] = {}
        #: Counts upwards with every page that goes on an LRU list.
        self.lru_clock = 1
        #: Counts downwards with every page that goes to the tail of its list.
        self.lru_tail = 0
        #: Left for the kernel itself: requests of processes fail below (the min watermark).
        self.reserve = 0
        #: Counts evictions and activations: how far apart an eviction and a refault are.
        self.age = 0
        #: The memory cgroup that whoever runs is charged to (0: the root); whether there ever was one beside the root.
        self.charging = 0
        self.grouped = False
        self.charges = Charges(frames)
        #: Frames in a memory block; blocks that are offline, with name and node of the zone that they come from.
        self.block_pages = block_pages
        self.offline: dict[int, tuple[str, int]] = {}

    # -- taking ----------------------------------------------------------------------------------------

    @property
    def short(self) -> bool:
        """Whether the kernel lives on its reserve: calls reclaim before they begin, to have it for page tables."""
        left = self.reserve
        for zone in self.zones:
            left -= zone.free_pages
        return left > 0

    def has_room(self, pages: int) -> bool:
        """Whether a process gets so many frames in one piece of a zone, as far as watermarks go."""
        pages += self.reserve // len(self.zones)
        return any(zone.free_pages >= pages for zone in self.zones)

    def block(self, order: int, *, kernel: bool = False) -> int:
        """The first frame of 2**order free ones. Raises NoMemory: who asks may reclaim and ask again."""
        pages = (1 << order) + (0 if kernel else self.reserve // len(self.zones))
        for zone in self.zones:
            if zone.free_pages >= pages:
                pfn = zone.take(order)
                if pfn >= 0:
                    return pfn
        raise NoMemory

    def page(self, flags: int) -> int:
        """One frame with these flags, of zeros. Raises NoMemory."""
        if self.charging and not self.charges.room(self.charging, 1):
            raise NoMemory
        pfn = self.block(0)
        self.frames.flags_at[pfn] = flags
        if self.charging:
            self.charges.add(self.charging, pfn, 1)
        return pfn

    def pages(self, count: int, flags: int) -> Pfns:
        """Up to `count` frames with these flags, of zeros: fewer only when memory runs out."""
        found: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
        left = self.charges.room(self.charging, count) if self.charging else count
        for zone in self.zones:
            spare = zone.free_pages - self.reserve // len(self.zones)
            if spare > 0 and left:
                got = zone.take_pages(min(left, spare))
                left -= len(got)
                found.append(got)
        pfns = np.concatenate(found) if len(found) != 2 else found[1]
        for _, where in runs(pfns):
            self.frames.flags[where] = flags
        if self.charging and len(pfns):
            self.charges.add(self.charging, pfns, len(pfns))
            if len(pfns) < count:
                self.charges.room(self.charging, 1)  # whether for the limit
        return pfns

    def folio(self, order: int, flags: int) -> LargeFolio:
        """A compound page, not mapped yet. Raises NoMemory without reclaiming: smaller pages will do."""
        if self.charging and self.charges.room(self.charging, 1 << order) < 1 << order:
            raise NoMemory
        head, pages = self.block(order), 1 << order
        frames = self.frames
        frames.flags[head] = flags | HEAD
        frames.flags[head + 1 : head + pages] = flags | TAIL
        frames.behind[head : head + pages] = np.arange(pages, dtype=np.int32)
        if self.charging:
            self.charges.add(self.charging, slice(head, head + pages), pages)
        folio = self.large[head] = LargeFolio(head, order)
        return folio

    def folios(self, order: int, count: int, flags: int, mm: int) -> Pfns:
        """The heads of up to `count` compound pages that `mm` is about to map whole, ascending as they are taken.

        Fewer where no more blocks are free: as for `folio`, nothing is reclaimed for them.
        """
        found: list[Pfns] = []
        if self.charging:
            count = self.charges.room(self.charging, count << order) >> order
        for zone in self.zones:
            spare = max(0, zone.free_pages - self.reserve // len(self.zones)) >> order
            if count and spare:
                got = zone.take_blocks(order, min(count, spare))
                count -= len(got)
                found.append(got)
        heads = np.concatenate([np.zeros(0, dtype=np.int64), *found]) if len(found) != 1 else found[0]
        frames, pages = self.frames, 1 << order
        tail = np.arange(pages, dtype=np.int64)
        if (
            len(heads)
            and int(heads[-1]) - int(heads[0]) == (len(heads) - 1) << order
            and (np.diff(heads) > 0).all()
        ):
            part = slice(int(heads[0]), int(heads[-1]) + pages)
            frames.flags[part] = flags | TAIL
            frames.mapcount[part] = 1
            frames.behind[part].reshape(-1, pages)[:] = tail
        else:
            every = (heads[:, None] + tail).reshape(-1)
            frames.flags[every] = flags | TAIL
            frames.mapcount[every] = 1
            frames.behind[every] = np.tile(tail, len(heads))
        frames.flags[heads] = flags | HEAD
        if self.charging:
            self.charges.add(self.charging, (heads[:, None] + tail).reshape(-1), len(heads) << order)
        self.large.add_whole(heads, mm, order)
        return heads

    def kernel_folio(self, order: int, flags: int) -> int:
        """The head of a compound page that the kernel keeps for itself."""
        charging, self.charging = self.charging, 0
        try:
            folio = self.folio(order, flags)
        finally:
            self.charging = charging
        del self.large[folio.head]  # processes do not map it
        self.kernel_folios[folio.head] = order
        return folio.head

    def bare_compound(self, order: int, flags: int) -> int:
        """The head of a compound page of any order that whoever asks keeps account of. Raises NoMemory."""
        if order <= MAX_ORDER:
            head = self.block(order)
        else:
            runs = (zone.take_run(1 << order) for zone in self.zones)
            head = next((pfn for pfn in runs if pfn >= 0), -1)
            if head < 0:
                raise NoMemory
        pages = 1 << order
        self.frames.flags[head] = flags | HEAD
        self.frames.flags[head + 1 : head + pages] = flags | TAIL
        self.frames.behind[head : head + pages] = np.arange(pages, dtype=np.int32)
        return head

    def free_compound(self, head: int, order: int) -> None:
        """Free what `bare_compound` gave."""
        step = min(order, MAX_ORDER)
        for pfn in range(head, head + (1 << order), 1 << step):
            self.free(pfn, step)

    def on_lru(self, first: int, pages: int = 1) -> None:
        """Put a folio at the head of its LRU list."""
        if pages == 1:
            self.frames.lru_at[first] = self.lru_clock
        else:
            self.frames.lru[first : first + pages] = self.lru_clock
        self.lru_clock += 1

    def on_lru_pages(self, pfns: Pfns) -> None:
        """Put single pages at the head of their LRU list, one after the other."""
        clock = np.arange(self.lru_clock, self.lru_clock + len(pfns), dtype=np.int64)
        for part, where in runs(pfns):
            self.frames.lru[where] = clock[part]
        self.lru_clock += len(pfns)

    def on_lru_folios(self, heads: list[Pfns], orders: list[int], turns: list[NDArray[np.int64]]) -> None:
        """Put folios at the head of their LRU list, in the order of their turns (0, 1, ... over all arrays)."""
        for firsts, order, turn in zip(heads, orders, turns, strict=True):
            clock = turn + self.lru_clock
            if order:
                every = firsts[:, None] + np.arange(1 << order, dtype=np.int64)
                self.frames.lru[every] = clock[:, None]
            else:
                self.frames.lru[firsts] = clock
        self.lru_clock += sum(map(len, heads))

    def recently(self, shadow: int) -> bool:
        """Whether fewer pages were evicted since that time (plus 1; 0: never) than there is memory.

        The kernel compares with what lies on the LRU lists; here nothing else, no page cache, fills memory.
        """
        return bool(shadow) and self.age - (shadow - 1) <= self.managed

    @property
    def free_total(self) -> int:
        """Free frames of all zones."""
        return sum(zone.free_pages for zone in self.zones)

    @property
    def managed(self) -> int:
        """Frames of all zones."""
        return sum(zone.end - zone.start for zone in self.zones)

    @property
    def spare(self) -> int:
        """Free frames above what the kernel keeps for itself."""
        return sum(max(0, zone.free_pages - self.reserve // len(self.zones)) for zone in self.zones)

    # -- giving back -----------------------------------------------------------------------------------

    def zone_of(self, pfn: int) -> Zone:
        """The zone that owns the frame."""
        for zone in self.zones:
            if zone.start <= pfn < zone.end:
                return zone
        raise AssertionError(f"frame {pfn:#x} belongs to no zone")

    def free(self, pfn: int, order: int = 0) -> None:
        """Free a block that nobody uses any more, with its contents."""
        frames = self.frames
        if order:
            part = slice(pfn, pfn + (1 << order))
            rows = frames.content[part]
            if rows.any():
                self.contents.give_back(rows)
                frames.content[part] = 0
            frames.behind[part] = 0
            frames.lru[part] = 0
            if self.grouped:
                self.charges.drop(part)
        else:
            row = frames.content_at[pfn]
            if row:
                self.contents.give_back(frames.content[pfn : pfn + 1])
                frames.content_at[pfn] = 0
            frames.lru_at[pfn] = 0
            if self.grouped:
                self.charges.drop_one(pfn)
        self.zone_of(pfn).give(pfn, order)

    def free_pages(self, pfns: Pfns) -> None:
        """Free single pages, with their contents."""
        frames = self.frames
        for _, where in runs(pfns):
            rows = frames.content[where]
            if rows.any():
                self.contents.give_back(rows)
                frames.content[where] = 0
            frames.lru[where] = 0
        if self.grouped:
            self.charges.drop(pfns)
        if len(self.zones) == 1:
            self.zones[0].give_pages(pfns)
            return
        for zone in self.zones:
            mine = pfns[(pfns >= zone.start) & (pfns < zone.end)]
            if len(mine):
                zone.give_pages(mine)

    def free_any(self, pfns: Pfns) -> None:
        """Free pages, of large folios all of theirs, that nobody maps."""
        compound = (self.frames.flags[pfns] & np.uint64(COMPOUND)) != 0 if self.large else None
        if compound is not None and compound.any():
            heads = pfns[compound & (self.frames.behind[pfns] == 0)]
            for head in heads.tolist():
                self.free_folio(self.large[head])
            pfns = pfns[~compound]
        if len(pfns):
            self.free_pages(pfns)

    def free_folio(self, folio: LargeFolio) -> None:
        """Free a compound page."""
        del self.large[folio.head]
        self.free(folio.head, folio.order)

    def free_whole(self, heads: Pfns, order: int) -> None:
        """Free compound pages of that order that one process mapped whole, and whose entries are empty now."""
        frames, pages = self.frames, 1 << order
        every = (heads[:, None] + np.arange(pages, dtype=np.int64)).reshape(-1)
        rows = frames.content[every]
        if rows.any():
            self.contents.give_back(rows)
            frames.content[every] = 0
        frames.mapcount[every] = frames.behind[every] = frames.lru[every] = 0
        if self.grouped:
            self.charges.drop(every)
        self.large.drop(heads)
        for zone in self.zones:
            mine = heads[(heads >= zone.start) & (heads < zone.end)]
            if len(mine):
                zone.give_pages(mine, order)

    def whole_folios(self, pfns: Pfns) -> Pfns:
        """These pages, and all others of the large folios that they belong to: flags are a folio's."""
        if not self.large:
            return pfns
        compound = (self.frames.flags[pfns] & np.uint64(COMPOUND)) != 0
        if not compound.any():
            return pfns
        heads = np.unique(pfns[compound] - self.frames.behind[pfns[compound]]).tolist()
        parts = [np.arange(head, head + self.large[head].pages, dtype=np.int64) for head in heads]
        return np.concatenate([pfns[~compound], *parts])

    def dissolve(self, folio: LargeFolio) -> None:
        """Make single pages of a compound page (what is mapped of it stays mapped)."""
        part = slice(folio.head, folio.head + folio.pages)
        self.frames.flags[part] &= np.uint64(~(COMPOUND | int(PageFlag.THP)) & (1 << 64) - 1)
        self.frames.behind[part] = 0
        del self.large[folio.head]

    def divide(self, folio: LargeFolio, parts: list[tuple[int, int]]) -> None:
        """Make smaller compound pages, and single ones, of one that nobody maps: first page and order of each."""
        self.dissolve(folio)
        flags, behind = self.frames.flags, self.frames.behind
        for first, order in parts:
            if order:
                head, pages = folio.head + first, 1 << order
                flags[head] |= np.uint64(HEAD | int(PageFlag.THP))
                flags[head + 1 : head + pages] |= np.uint64(TAIL | int(PageFlag.THP))
                behind[head : head + pages] = np.arange(pages, dtype=np.int32)
                self.large[head] = LargeFolio(head, order)

    def dissolve_many(self, pfns: Pfns) -> int:
        """The same for compound pages of which these are all the pages; how many there were."""
        frames = self.frames
        heads = pfns[frames.behind[pfns] == 0]
        words = frames.whole[heads] != 0
        self.large.drop(heads[words])
        for head in heads[~words].tolist():
            del self.large[head]
        frames.flags[pfns] &= np.uint64(~(COMPOUND | int(PageFlag.THP)) & (1 << 64) - 1)
        frames.behind[pfns] = 0
        return len(heads)

    # -- page tables -----------------------------------------------------------------------------------

    def table_page(self) -> int:
        """A frame for a page table. Raises NoMemory."""
        if self.charging and not self.charges.room(self.charging, 1):
            raise NoMemory
        for zone in self.zones:
            pfn = zone.take_one()
            if pfn >= 0:
                self.frames.flags_at[pfn] = _PGTABLE
                if self.charging:
                    self.charges.add(self.charging, pfn, 1)
                return pfn
        raise NoMemory

    def table_pages(self, count: int) -> list[int]:
        """Frames for page tables."""
        if self.charging and self.charges.room(self.charging, count) < count:
            raise NoMemory
        if count > 8 and self.zones[0].free_pages >= count:
            found = self.zones[0].take_pages(count)
            self.frames.flags[found] = _PGTABLE
            if self.charging:
                self.charges.add(self.charging, found, count)
            return [int(pfn) for pfn in found]
        pfns: list[int] = []
        try:
            for _ in range(count):
                pfns.append(self.table_page())
        except NoMemory:
            self.free_tables(pfns)
            raise
        return pfns

    def free_table(self, pfn: int) -> None:
        """Free the frame of a page table."""
        if self.grouped:
            self.charges.drop_one(pfn)
        for zone in self.zones:
            if zone.start <= pfn < zone.end:
                zone.give_one(pfn)
                return

    def free_tables(self, pfns: Iterable[int]) -> None:
        """Free frames of page tables."""
        for pfn in pfns:
            if self.grouped:
                self.charges.drop_one(pfn)
            self.zone_of(pfn).give(pfn, 0)

    def fits(self, order: int) -> bool:
        """Whether a block of that order exists in the buddy allocator."""
        return order <= MAX_ORDER
