"""KSM: equal anonymous pages of mappings that asked for it (MADV_MERGEABLE) become one page, write-protected.

Nothing is merged by itself: `step` and `run` are what ksmd does when it is let. The order is the kernel's, address
spaces as they asked, pages by address, so that the same of equal pages stays.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import U64Array
from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.backends.sim.services import ksm_merge as merging
from pmcore.backends.sim.services import migrating
from pmcore.backends.sim.services.ksm_stable import STABLE, UNSTABLE, Slot, StableTree
from pmcore.backends.sim.services.ksm_tree import Place, UnstableTree
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import ArgumentError
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["Ksm"]

_KSM = int(PageFlag.KSM)


class Ksm(StableTree):
    """What /sys/kernel/mm/ksm shows and sets, and ksmd."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        #: Pages that `step` looks at when not told otherwise.
        self.pages_to_scan = 100
        #: Whether pages of nothing but zeros are merged with the zero page.
        self.use_zero_pages = False
        self.full_scans = 0
        self.pages_scanned = 0
        self.tree = UnstableTree()
        #: Where the scan is: the slot (None: between two scans), the address, and up to where items have been seen.
        self.cursor: Slot | None = None
        self.address = self.passed = 0
        #: Pages that a scan has locked or unlocked and that a batch still holds.
        self.batch: list[int] = []
        #: Places in the unstable tree by hash, as far as somebody may look for them.
        self._found: dict[int, Place] = {}

    # -- knobs and counters ----------------------------------------------------------------------------

    @property
    def max_page_sharing(self) -> int:
        """How many items may map one page; more equal pages become another one. Set: raises Busy, ArgumentError."""
        return self._sharing

    @max_page_sharing.setter
    def max_page_sharing(self, value: int) -> None:
        if not isinstance(value, int) or value < 2:
            raise ArgumentError(f"max_page_sharing={value!r}", remedy="at least 2")
        if value != self._sharing:
            self._forget_nodes("max_page_sharing")
            self._sharing = value

    @property
    def merge_across_nodes(self) -> bool:
        """Whether pages of different nodes of memory are merged. Set: raises Busy."""
        return self._across

    @merge_across_nodes.setter
    def merge_across_nodes(self, value: bool) -> None:
        if bool(value) != self._across:
            self._forget_nodes("merge_across_nodes")
            self._across = bool(value)

    def _forget_nodes(self, knob: str) -> None:
        if self.pages_shared or not self._drop_nodes():
            refuse(Errno.EBUSY, f"write(/sys/kernel/mm/ksm/{knob})", "pages are shared: unmerge first")

    @property
    def pages_shared(self) -> int:
        """Pages of the stable tree that items map."""
        return sum(node.items > 0 for node in self.nodes.values())

    @property
    def pages_sharing(self) -> int:
        """Items beyond the first of each such page: pages saved."""
        return sum(node.items for node in self.nodes.values()) - self.pages_shared

    @property
    def pages_unshared(self) -> int:
        """Pages that were unlike all others."""
        return sum(int((slot.states == UNSTABLE).sum()) for slot in self.slots)

    @property
    def pages_volatile(self) -> int:
        """Pages that changed since the scan before, or were not seen twice yet."""
        total = sum(len(slot.addresses) for slot in self.slots)
        return total - self.pages_shared - self.pages_sharing - self.pages_unshared

    @property
    def ksm_zero_pages(self) -> int:
        """Entries that map the zero page because ksmd found nothing but zeros: dirty ones."""
        count = 0
        zero = np.uint64(self._core.zero_pfn)
        bits = np.uint64(PRESENT | DIRTY)
        for mm in self._core.spaces.values():
            for extent in mm.tables.extents(0, self._core.geometry.task_size):
                if not extent.huge:
                    placed = (extent.entries & bits) == bits
                    count += int((placed & (extent.entries & np.uint64(FIELD) == zero)).sum())
        return count

    def counters(self) -> dict[str, int]:
        """The counters of pages that are looked at, by the kernel's names."""
        names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
        return {name: getattr(self, name) for name in names}

    # -- address spaces come and go --------------------------------------------------------------------

    def enter(self, mm: AddressSpace) -> None:
        """The address space is to be looked at, after all others."""
        if mm.number not in self.by_mm:
            slot = self.by_mm[mm.number] = Slot(mm)
            self.slots.insert(len(self.slots) if self.cursor is None else self.slots.index(self.cursor), slot)

    def forked(self, parent: AddressSpace, child: AddressSpace) -> None:
        """A child is looked at if its parent is."""
        if parent.number in self.by_mm:
            self.enter(child)

    def exited(self, mm: AddressSpace) -> None:
        """Forget an address space; what is known of its pages is dropped when ksmd comes next, first of all."""
        slot = self.by_mm.get(mm.number)
        if slot is None or slot is self.cursor:
            return
        self.slots.remove(slot)
        if len(slot.addresses):
            self.slots.insert(0 if self.cursor is None else self.slots.index(self.cursor) + 1, slot)
        else:
            del self.by_mm[mm.number]

    def _drop(self, slot: Slot) -> None:
        self.slots.remove(slot)
        del self.by_mm[slot.mm.number]

    # -- what the administrator does -------------------------------------------------------------------

    def run(self, full_scans: int = 1) -> dict[str, int]:
        """Scan everything so many times; the counters afterwards. A scan that was begun counts when it ends."""
        migrating.still(self._core, "a scan of ksmd")
        self._there()
        if not isinstance(full_scans, int) or full_scans < 0:
            raise ArgumentError(f"full_scans={full_scans!r}", remedy="a number of scans, from 0")
        for _ in range(full_scans):
            before = self.full_scans
            while self.slots and self.full_scans == before:
                self._scan(1 << 62)
        return self.counters()

    def step(self, pages: int | None = None) -> int:
        """Look at so many pages (default: `pages_to_scan`), no further than to the end of a scan; how many it were."""
        migrating.still(self._core, "a step of ksmd")
        self._there()
        wanted = self.pages_to_scan if pages is None else pages
        if not isinstance(wanted, int) or wanted < 0:
            raise ArgumentError(f"pages={pages!r}", remedy="a number of pages, from 0")
        return self._scan(wanted)

    def unmerge(self) -> dict[str, int]:
        """Everybody gets pages of their own again, and all that was known is forgotten (2 to run).

        Raises OutOfMemory where there are not enough frames for that, with what came before it done.
        """
        migrating.still(self._core, "unmerging")
        self._there()
        for slot in list(self.slots):
            for vma in slot.mm.vmas if slot.mm.alive else ():
                if merging.mergeable(vma):
                    try:
                        merging.unmerge(self._core, slot.mm, vma, vma.start, vma.end)
                    except NoMemory:
                        refuse(Errno.ENOMEM, "write(/sys/kernel/mm/ksm/run, 2)")
            for item in range(len(slot.addresses)):
                self._out(slot, item)
            slot.keep(np.zeros(len(slot.addresses), dtype=np.bool_))
            if not slot.mm.alive:
                self._drop(slot)
        self._drop_nodes()
        self.full_scans, self.cursor = 0, None
        self.tree.clear()
        return self.counters()

    def _there(self) -> None:
        if not self._core.profile.has("mm.ksm"):
            refuse(Errno.ENOENT, "open(/sys/kernel/mm/ksm/run)", "this kernel has no KSM")

    # -- the scan --------------------------------------------------------------------------------------

    def _scan(self, budget: int) -> int:
        scanned = 0
        self.batch.clear()
        if self.cursor is not None:
            self.tree.shape(self._content, again=True)  # the program went on meanwhile: pages may be gone
        while budget > scanned and self.slots:
            if self.cursor is None:
                self.tree.clear()
                self._found.clear()
                self.cursor, self.address, self.passed = self.slots[0], 0, 0
            slot = self.cursor
            place = self.slots.index(slot)
            looked, done = self._scan_slot(slot, budget - scanned)
            scanned += looked
            if not done:
                break
            if not self.address:
                self._drop(slot)  # nothing of it is to be merged any more
            else:
                place += 1
            self.address = self.passed = 0
            self.cursor = self.slots[place] if place < len(self.slots) else None
            if self.cursor is None:
                self.full_scans += 1
                self.tree.clear()
                break
        self.pages_scanned += scanned
        return scanned

    def _scan_slot(self, slot: Slot, budget: int) -> tuple[int, bool]:
        """Look at pages of one address space: how many, and whether there are no more."""
        mm, looked = slot.mm, 0
        if not mm.alive:
            self.address = self.passed = 0
        for vma in list(mm.vmas) if mm.alive else ():
            if not vma.flags & VmFlag.MERGEABLE or vma.end <= self.address:
                continue
            self.address = max(self.address, vma.start)
            while vma.anon_vma is not None and self.address < vma.end:
                addresses, pfns = self._pages_of(mm, self.address, vma.end, cached=vma.file is not None)
                if not len(addresses):
                    break
                left = budget - looked
                looked += self._pages(slot, vma, addresses[:left], pfns[:left])
                if looked >= budget:
                    return looked, False
            self.address = vma.end
        rest = slot.addresses >= self.passed
        for item in np.flatnonzero(rest & (slot.states == STABLE)).tolist():
            self._out(slot, item)
        slot.keep(~rest)
        return looked, True

    def _pages_of(
        self, mm: AddressSpace, start: int, end: int, *, cached: bool
    ) -> tuple[NDArray[np.int64], Pfns]:
        """Addresses and frames of the anonymous pages of a range; `cached`: pages of a file may be among them."""
        core, size = self._core, self._core.geometry.page_size
        places, pfns = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for extent in mm.tables.extents(start, end):
            entries = extent.entries
            if extent.huge and cached:
                continue
            if extent.huge:
                pages = core.geometry.pmd_pages
                steps = np.arange(pages, dtype=np.int64)
                for index, entry in enumerate(entries.tolist()):
                    if entry & FIELD != core.huge_zero_pfn:
                        places.append(extent.start + index * extent.size + steps * size)
                        pfns.append((entry & FIELD) + steps)
                continue
            there = (entries & np.uint64(PRESENT)) != 0
            there &= (entries & np.uint64(FIELD)) != np.uint64(core.zero_pfn)
            if cached:  # of a file's pages only private copies
                pfns_there = (entries[there] & np.uint64(FIELD)).view(np.int64)
                there[there] = (core.memory.frames.flags[pfns_there] & np.uint64(CACHED)) == 0
            places.append(extent.start + np.flatnonzero(there) * size)
            pfns.append((entries[there] & np.uint64(FIELD)).view(np.int64))
        addresses, frames = np.concatenate(places), np.concatenate(pfns)
        inside = (addresses >= start) & (addresses < end)
        return addresses[inside], frames[inside]

    def _pages(self, slot: Slot, vma: VmArea, addresses: NDArray[np.int64], pfns: Pfns) -> int:
        """Look at pages in order; how many (the rest is to be gathered anew when a folio was split)."""
        core, number = self._core, slot.mm.number
        frames = core.memory.frames
        merged = (frames.flags[pfns] & np.uint64(_KSM)) != 0
        hashes = core.memory.contents.hashes(frames.content[pfns])
        items, fresh, gone = self._items(slot, addresses)
        known = slot.states[items]
        settled = merged & (known == STABLE)
        owners, which = np.unique(slot.nodes[items[settled]], return_inverse=True)
        homes = np.array([self.nodes[node].pfn for node in owners.tolist()], dtype=np.int64)
        settled[settled] = homes[which] == pfns[settled]
        candidates = ~merged & ~fresh & (slot.sums[items] == hashes)
        special = merged & ~settled | ~merged & (known == STABLE)
        special |= self._likely(slot, candidates, hashes, int(addresses[0]))
        if not core.caps.ksm_checks_change_first:
            special |= ~merged & np.isin(hashes, np.array([key[1] for key in self.stable], dtype=np.uint64))
        # What happens in between concerns nobody else: many pages at once.
        events = [(index, 1, -1) for index in np.flatnonzero(special).tolist()]
        before = np.searchsorted(addresses, slot.addresses[gone]).tolist()
        events += [(index, 0, item) for index, item in zip(before, gone.tolist(), strict=True)]
        done = 0
        for index, _, item in sorted(events):
            self._plain(slot, number, items, addresses, hashes, settled, candidates, done, index)
            done = index
            if item >= 0:
                self._out(slot, item)
                continue
            done = index + 1
            split = self._page(
                slot, vma, int(addresses[index]), int(pfns[index]), int(hashes[index]), int(items[index])
            )
            if split:
                break
        else:
            self._plain(slot, number, items, addresses, hashes, settled, candidates, done, len(addresses))
            done = len(addresses)
        self.passed = self.address = int(addresses[done - 1]) + core.geometry.page_size
        keep = np.ones(len(slot.addresses), dtype=np.bool_)
        keep[items[done:][fresh[done:]]] = False
        keep[gone[slot.addresses[gone] < self.passed]] = False
        slot.keep(keep)
        return done

    def _items(
        self, slot: Slot, addresses: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
        """Have an item for each address: (its index, whether it is new, items of the stable tree without a page)."""
        low, high = np.searchsorted(slot.addresses, [self.passed, int(addresses[-1]) + 1]).tolist()
        old = slot.addresses[low:high]
        there = np.isin(old, addresses)
        keep = there | (slot.states[low:high] == STABLE)
        every = np.union1d(old[keep], addresses)
        source = np.searchsorted(every, old[keep])
        for name in ("sums", "states", "nodes"):
            column = getattr(slot, name)
            new = np.zeros(len(every), dtype=column.dtype)
            new[source] = column[low:high][keep]
            setattr(slot, name, np.concatenate((column[:low], new, column[high:])))
        slot.addresses = np.concatenate((slot.addresses[:low], every, slot.addresses[high:]))
        gone = low + source[~there[keep]]
        return low + np.searchsorted(every, addresses), ~np.isin(addresses, old), gone

    def _likely(
        self, slot: Slot, candidates: NDArray[np.bool_], hashes: U64Array, start: int
    ) -> NDArray[np.bool_]:
        """Which candidates may find an equal page, or be found by one: by their hashes."""
        if self.tree.shaped:
            return candidates
        likely = np.zeros(len(candidates), dtype=np.bool_)
        if not candidates.any():
            return likely
        values, inverse, counts = np.unique(hashes[candidates], return_inverse=True, return_counts=True)
        chosen = counts > 1
        chosen |= np.isin(values, np.array([key[1] for key in self.stable], dtype=np.uint64))
        if self.use_zero_pages:
            chosen |= values == self._core.memory.contents.hashes(np.zeros(1, dtype=np.int32))
        for earlier in self.slots[: self.slots.index(slot) + 1]:
            unstable = earlier.states == UNSTABLE
            if earlier is slot:
                unstable &= slot.addresses < start
            index = np.flatnonzero(unstable)
            index = index[np.isin(earlier.sums[index], values)]
            chosen |= np.isin(values, earlier.sums[index])
            for item in index.tolist():
                place = earlier.mm.number, int(earlier.addresses[item])
                self._found.setdefault(int(earlier.sums[item]), place)
        likely[candidates] = chosen[inverse]
        return likely

    def _plain(
        self,
        slot: Slot,
        number: int,
        items: NDArray[np.int64],
        addresses: NDArray[np.int64],
        hashes: U64Array,
        settled: NDArray[np.bool_],
        candidates: NDArray[np.bool_],
        low: int,
        high: int,
    ) -> None:
        """Pages `low` to `high` that are like no other: changed, or in the unstable tree now."""
        if low >= high:
            return
        part = slice(low, high)
        moving = ~settled[part]
        index = items[part][moving]
        slot.sums[index] = hashes[part][moving]
        lonely = candidates[part][moving]
        slot.states[index] = np.where(lonely, np.int8(UNSTABLE), np.int8(0))
        if lonely.any():
            self.tree.put(number, addresses[part][moving][lonely])

    # -- one page --------------------------------------------------------------------------------------

    def _page(self, slot: Slot, vma: VmArea, address: int, pfn: int, value: int, item: int) -> bool:
        """cmp_and_merge_page: whether a folio was taken apart on the way."""
        core = self._core
        frames = core.memory.frames
        if frames.flags_at[pfn] & _KSM:
            node = self.by_pfn[pfn]
            if slot.states[item] != STABLE or slot.nodes[item] != node:
                self._out(slot, item)
                self._append(slot, item, node)  # of a fork: no limit for those
            return False
        self._out(slot, item)
        splits = core.counters["split_folio"]
        content = self._bytes(pfn)
        joined = not core.caps.ksm_checks_change_first and self._joined(
            slot, vma, address, pfn, value, item, content
        )
        if not joined and slot.sums[item] != value:
            slot.sums[item] = value
            return False
        if not joined:
            self._merge(slot, vma, address, pfn, value, item, content)
        if core.counters["split_folio"] == splits:
            return False
        self.tree.shape(self._content)
        return True

    def _joined(
        self, slot: Slot, vma: VmArea, address: int, pfn: int, value: int, item: int, content: bytes
    ) -> bool:
        """Whether the stable tree has a page like this one, which is then merged with it, if that can be."""
        core = self._core
        node = self._stable_search((0 if self._across else core.memory.zone_of(pfn).node, value), content)
        if node and merging.merge(core, slot.mm, vma, address, pfn, self.nodes[node].pfn):
            self._append(slot, item, node)
        return bool(node)

    def _merge(
        self, slot: Slot, vma: VmArea, address: int, pfn: int, value: int, item: int, content: bytes
    ) -> None:
        core, mm = self._core, slot.mm
        if (
            self.use_zero_pages
            and not any(content)
            and merging.merge(core, mm, vma, address, pfn, core.zero_pfn)
        ):
            return
        key = (0 if self._across else core.memory.zone_of(pfn).node, value)
        if self._joined(slot, vma, address, pfn, value, item, content):
            return
        place = (mm.number, address)
        other = self._unstable_search(place, value, content)
        if other is None:
            slot.states[item] = UNSTABLE
        if not isinstance(other, tuple):
            return
        theirs = self.by_mm[other[0]]
        area = theirs.mm.vmas.at(other[1])
        page = merging.page_at(core, theirs.mm, other[1])
        if area is None or page in (-1, pfn) or not merging.mergeable(area):
            return
        if not self._across and core.memory.zone_of(page).node != key[0]:
            return
        frames = core.memory.frames
        head = frames.head(pfn)
        if page != pfn and head == frames.head(page):
            # Both were held: not taken apart for merging, but once they are let go.
            with suppress(NoMemory):
                if merging.split(core, mm, address, pfn):
                    self.batch.clear()
            return
        if not merging.merge(core, mm, vma, address, pfn, None):
            return
        if not merging.merge(core, theirs.mm, area, other[1], page, pfn):
            try:
                merging.unshare(core, mm, vma, address)
            except NoMemory:
                frames.flags_at[pfn] &= ~_KSM
            return
        self.tree.take(other)
        self._found.pop(value, None)
        found = int(np.searchsorted(theirs.addresses, other[1]))
        theirs.states[found] = 0
        number = self._insert(key, pfn)
        self._append(theirs, found, number)
        self._append(slot, item, number)

    def _unstable_search(self, place: Place, value: int, content: bytes) -> Place | bool | None:
        if self.tree.shaped:
            return self.tree.search(place, content, self._alive)
        found = self._found.get(value)
        if found is not None and self._content(found) == content:
            return found
        self._found[value] = place
        self.tree.put(place[0], np.array([place[1]], dtype=np.int64))
        return None

    def _alive(self, place: Place) -> bool:
        """Whether a page of the unstable tree is there still."""
        slot = self.by_mm.get(place[0])
        if slot is None or not slot.mm.alive:
            return False
        area = slot.mm.vmas.at(place[1])
        if area is None or not merging.mergeable(area):
            return False
        return merging.page_at(self._core, slot.mm, place[1]) >= 0

    def _content(self, place: Place) -> bytes:
        """What the page at a place holds; zeros where there is none, or the zero page."""
        slot = self.by_mm.get(place[0])
        pfn = -1 if slot is None or not slot.mm.alive else merging.page_at(self._core, slot.mm, place[1])
        return bytes(self._core.geometry.page_size) if pfn < 0 else self._bytes(pfn)
