"""Swap areas, their slots, and the swap cache: pages that are in memory and have a slot as well.

A page in the swap cache owns its contents; a slot owns them only while no page does.
"""

from __future__ import annotations

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import U64Array
from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.memory import Memory
from pmcore.uapi import PageFlag

__all__ = ["SwapArea", "SwapSpace", "field_of", "offset_of", "type_of"]

#: In the swap cache; the kernel's bit for that is the one shown as OWNER_PRIVATE, too.
_SWAPCACHE, _DIRTY = int(PageFlag.SWAPCACHE | PageFlag.OWNER_PRIVATE), int(PageFlag.DIRTY)
_HWPOISON = int(PageFlag.HWPOISON)


def field_of(kind: int, offset: int) -> int:
    """A swap entry's field in a PTE: type in bits 0-4, offset above."""
    return kind | offset << 5


def type_of(field: int) -> int:
    """The number of the swap area."""
    return field & 0x1F


def offset_of(field: int) -> int:
    """The slot in the area."""
    return field >> 5


@attrs.define(slots=True, eq=False)
class SwapArea:
    """One area. Slot 0 holds its header and is never used."""

    number: int
    slots: int
    priority: int
    #: Whether a page is gone as soon as it is written (compressed in memory), or stays until it is reclaimed (a disk).
    immediate: bool
    #: Whether a large folio gets neighbouring slots and stays whole, or is taken apart first (no clusters, a file).
    large_folios: bool = False
    #: Whether it is memory that gives its copy away when a page is read back (zswap): that page is dirty then.
    compressed: bool = True
    #: Entries in page tables that name the slot.
    counts: NDArray[np.int32] = attrs.field(init=False)
    #: The page in the swap cache, plus 1.
    cached: NDArray[np.int64] = attrs.field(init=False)
    content: NDArray[np.int32] = attrs.field(init=False)
    #: The clock of evictions when its page was reclaimed, plus 1: what refaults are measured with.
    shadow: NDArray[np.int64] = attrs.field(init=False)
    #: The memory cgroup that its page was charged to when it left memory, see `Groups`.
    group: NDArray[np.int32] = attrs.field(init=False)
    used: int = 0
    #: No slot below this one is free.
    hint: int = 1
    #: Slots of merged pages that several entries named when they left: the place of the page that was read back, as the
    #: root of its anon_vma and its offset; () while none was. Entries of other places get copies of it (rule KS-016).
    merged: dict[int, tuple[int, ...]] = attrs.field(factory=dict)
    #: While it is being switched off nothing more is written to it.
    closing: bool = False

    def __attrs_post_init__(self) -> None:
        self.counts = np.zeros(self.slots, dtype=np.int32)
        self.cached = np.zeros(self.slots, dtype=np.int64)
        self.content = np.zeros(self.slots, dtype=np.int32)
        self.shadow = np.zeros(self.slots, dtype=np.int64)
        self.group = np.zeros(self.slots, dtype=np.int32)

    @property
    def free(self) -> int:
        """Slots that are free."""
        return self.slots - 1 - self.used

    def take(self, count: int) -> NDArray[np.int64]:
        """Up to `count` free slots, the lowest; each is to be given a count or a page at once."""
        if (
            count == 1
            and self.hint < self.slots
            and not self.counts.item(self.hint)
            and not self.cached.item(self.hint)
        ):
            self.used += 1
            self.hint += 1
            return np.array([self.hint - 1], dtype=np.int64)
        found: list[NDArray[np.int64]] = []
        position = self.hint
        while count and position < self.slots:
            stop = min(self.slots, position + max(1024, 2 * count))
            taken = (self.counts[position:stop] != 0) | (self.cached[position:stop] != 0)
            free = (np.flatnonzero(~taken) + position)[:count]
            found.append(free)
            count -= len(free)
            position = int(free[-1]) + 1 if count == 0 and len(free) else stop
        slots = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        self.hint = position
        self.used += len(slots)
        return slots

    def take_block(self, head: int, order: int) -> int:
        """The first of 2**order free slots, aligned, which the large folio is cached in now; -1 for none."""
        pages = 1 << order
        if not self.large_folios or self.free < pages:
            return -1
        whole = self.slots >> order << order
        taken = (self.counts[:whole] != 0) | (self.cached[:whole] != 0)
        taken[0] = True  # the header
        blocks = np.flatnonzero(~taken.reshape(-1, pages).any(axis=1))
        if not len(blocks):
            return -1
        self.used += pages
        first = int(blocks[0]) << order
        self.cached[first : first + pages] = np.arange(head + 1, head + 1 + pages)
        return first

    def give_back(self, slots: NDArray[np.int64]) -> None:
        """Slots that nothing names and no page caches any more."""
        if len(slots):
            self.used -= len(slots)
            self.group[slots] = 0
            self.hint = min(self.hint, int(slots.min()))
            for slot in slots.tolist() if self.merged else ():
                self.merged.pop(slot, None)


class SwapSpace:
    """All swap areas of a machine, by number; the highest priority is used first."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.areas: list[SwapArea | None] = []
        #: The area that begins, of those whose priority is the highest, if they are several.
        self.turn = 0
        #: The priority that an area got last because none was asked for.
        self.least = -1

    @property
    def there(self) -> list[SwapArea]:
        """All areas, by number."""
        return [area for area in self.areas if area is not None]

    @property
    def order(self) -> list[SwapArea]:
        """The areas in the order in which they are filled."""
        there = [area for area in self.areas if area is not None and not area.closing]
        return there if len(there) < 2 else sorted(there, key=lambda area: (-area.priority, area.number))

    @property
    def total(self) -> int:
        """Slots of all areas."""
        return sum(area.slots - 1 for area in self.order)

    @property
    def free(self) -> int:
        """Free slots of all areas."""
        return sum(area.free for area in self.order)

    @property
    def half_full(self) -> bool:
        """Whether slots are kept no longer than needed (vm_swap_full)."""
        left = 0
        for area in self.areas:
            if area is not None and not area.closing:
                left += 2 * area.free - area.slots + 1
        return left < 0

    def on(
        self,
        slots: int,
        *,
        priority: int | None,
        immediate: bool,
        large_folios: bool = False,
        compressed: bool = True,
    ) -> SwapArea:
        """A new area, with the lowest number that is free. Without a priority it comes after all there were so far."""
        if priority is None:
            self.least -= 1
            priority = self.least
        number = next((i for i, area in enumerate(self.areas) if area is None), len(self.areas))
        area = SwapArea(number, slots, priority, immediate, large_folios, compressed)
        self.areas[number : number + 1] = [area]
        return area

    def area(self, field: int) -> SwapArea:
        """The area that a swap entry names."""
        area = self.areas[field & 0x1F]
        assert area is not None
        return area

    def takes_folios(self, pfns: Pfns) -> bool:
        """Whether large folios may have slots: they have some, or an area has blocks of them."""
        return any(area.large_folios for area in self.order) or bool(self.memory.frames.swap[pfns].any())

    def take_block(self, head: int, order: int) -> int:
        """The field of the first slot of a block for a large folio, in the first area that has one; -1 if none has."""
        for area in self.order:
            slot = area.take_block(head, order)
            if slot >= 0:
                return field_of(area.number, slot)
        return -1

    # -- slots -----------------------------------------------------------------------------------------

    def take(self, count: int) -> NDArray[np.int64]:
        """Fields of up to `count` free slots, each to be given a count or a page at once.

        Areas of the same priority take turns, a slot each.
        """
        pieces: list[NDArray[np.int64]] = []
        order = self.order
        while order and count:
            peers = [area for area in order if area.priority == order[0].priority]
            order = order[len(peers) :]
            while count:
                open_to = [area for area in peers if area.free]
                if not open_to:
                    break
                if len(open_to) == 1:
                    got = open_to[0].take(count) << 5 | open_to[0].number
                else:
                    got = self._in_turns(open_to, count)
                pieces.append(got)
                count -= len(got)
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def take_one(self) -> int:
        """The field of a free slot, to be given a count or a page at once; -1 for none."""
        found = self.take(1)
        return int(found[0]) if len(found) else -1

    def _in_turns(self, peers: list[SwapArea], count: int) -> NDArray[np.int64]:
        """A slot of each area, over and over, until one is full; the area after the last one begins next time."""
        first = next((i for i, area in enumerate(peers) if area.number >= self.turn), 0)
        peers = peers[first:] + peers[:first]
        rounds = min(min(area.free for area in peers), -(-count // len(peers)))
        each = [area.take(min(rounds, -(-(count - i) // len(peers)))) for i, area in enumerate(peers)]
        found = np.zeros(sum(map(len, each)), dtype=np.int64)
        for place, (area, slots) in enumerate(zip(peers, each, strict=True)):
            found[place :: len(peers)] = slots << 5 | area.number
        self.turn = peers[len(found) % len(peers)].number
        return found

    def duplicate(self, fields: U64Array) -> None:
        """Count one more entry for each (fork)."""
        for area, slots in self._by_area(fields):
            np.add.at(area.counts, slots, 1)

    def release(self, fields: U64Array) -> None:
        """Count one entry less for each; slots that nobody needs are freed, with what they hold or cache unmapped."""
        for area, slots in self._by_area(fields):
            np.subtract.at(area.counts, slots, 1)
            slots = np.unique(slots)
            done = slots[area.counts[slots] == 0]
            cached = area.cached[done]
            bare = done[cached == 0]
            self.memory.contents.give_back(area.content[bare])
            area.content[bare] = 0
            area.give_back(bare)
            for pfn in (cached[cached != 0] - 1).tolist():
                if self.memory.frames.swap_at[pfn]:  # a large folio goes at once
                    self.drop_if_unused(pfn)

    def drop_if_unused(self, pfn: int) -> None:
        """Take a page that is neither mapped nor named by an entry out of the swap cache, and free it."""
        memory, head = self.memory, self.memory.frames.head(pfn)
        folio = memory.large.get(head)
        if folio.mapped if folio else memory.frames.mapcount_at[pfn]:
            return
        if self.uncache(head, folio.order if folio else 0):
            if memory.frames.flags_at[head] & _HWPOISON:
                return  # out of use for good
            if folio:
                memory.free_folio(folio)
            else:
                memory.free(pfn)

    def _by_area(self, fields: U64Array) -> list[tuple[SwapArea, NDArray[np.int64]]]:
        offsets = (fields >> np.uint64(5)).view(np.int64)
        if len(self.areas) == 1 and self.areas[0] is not None:
            return [(self.areas[0], offsets)]
        types = (fields & np.uint64(0x1F)).astype(np.int64)
        found = []
        for kind in np.unique(types).tolist():
            area = self.areas[kind]
            assert area is not None
            found.append((area, offsets[types == kind]))
        return found

    # -- the swap cache --------------------------------------------------------------------------------

    def cached(self, field: int) -> int:
        """The page that caches the slot; -1 for none."""
        return int(self.area(field).cached[field >> 5]) - 1

    def cache(self, pfns: Pfns, fields: NDArray[np.int64]) -> None:
        """Put pages in the swap cache, each for its slot. The pages own their contents already."""
        frames = self.memory.frames
        frames.swap[pfns] = fields + 1
        frames.flags[pfns] |= np.uint64(_SWAPCACHE)
        for area, slots in self._by_area(fields.astype(np.uint64)):
            mine = (fields & 0x1F) == area.number
            area.cached[slots] = pfns[mine] + 1

    def uncache(self, head: int, order: int = 0) -> bool:
        """Take a folio out of the swap cache unless entries name its slots (folio_free_swap); it is dirty then."""
        frames, pages = self.memory.frames, 1 << order
        if not order:
            return self._uncache_one(head)
        fields = frames.swap[head : head + pages] - 1
        area = self.area(int(fields[0]))
        slots = fields >> 5
        if area.counts[slots].any():
            return False
        frames.swap[head : head + pages] = 0
        frames.set_bits(head, pages, _DIRTY)
        frames.clear_bits(head, pages, _SWAPCACHE)
        area.cached[slots] = 0
        area.give_back(slots)
        return True

    def _uncache_one(self, pfn: int) -> bool:
        """`uncache` for a single page."""
        frames = self.memory.frames
        field = frames.swap_at[pfn] - 1
        area, slot = self.area(field), field >> 5
        if area.counts.item(slot):
            return False
        frames.swap_at[pfn] = 0
        frames.flags_at[pfn] = (frames.flags_at[pfn] | _DIRTY) & ~_SWAPCACHE
        area.cached[slot] = 0
        area.used -= 1
        area.group[slot] = 0
        area.hint = min(area.hint, slot)
        area.merged.pop(slot, None)
        return True

    def uncache_many(self, area: SwapArea, pfns: Pfns) -> None:
        """`uncache` for single pages of one area whose slots no entry names."""
        frames = self.memory.frames
        slots = frames.swap[pfns] - 1 >> 5
        frames.swap[pfns] = 0
        frames.flags[pfns] = frames.flags[pfns] & np.uint64(~_SWAPCACHE & (1 << 64) - 1) | np.uint64(_DIRTY)
        area.cached[slots] = area.group[slots] = 0
        area.give_back(slots)

    def cache_one(self, pfn: int, field: int) -> None:
        """`cache` for a single page."""
        frames = self.memory.frames
        frames.swap_at[pfn] = field + 1
        frames.flags_at[pfn] |= _SWAPCACHE
        self.area(field).cached[field >> 5] = pfn + 1
