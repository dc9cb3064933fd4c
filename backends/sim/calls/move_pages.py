"""move_pages: where pages are, and moving them to another node of memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services import migrate, thp
from pmcore.backends.sim.virtual.pte import FIELD, LEAF, PRESENT, SPECIAL
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import NotModelled
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.physical.folios import LargeFolio
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["move_pages"]

_ALL = (1 << 64) - 1
#: MPOL_MF_MOVE, MPOL_MF_MOVE_ALL.
_MOVE, _MOVE_ALL = 2, 4
_LRU = int(PageFlag.LRU)
#: What a page is that cannot be looked at.
_NO_PAGE, _ZERO = -1, -2


def move_pages(
    core: Core, mm: AddressSpace, pages: Sequence[int], nodes: Sequence[int] | None, flags: int
) -> list[int | None]:
    """move_pages(2) of pages of `mm`: the status of each (rules MG-001 to MG-006).

    Refused with EINVAL for other flags, EPERM for all of a page's mappings without privilege, ENODEV at a node that has
    no memory (what came before has been moved); NotModelled where a node has no room.
    """
    call: Call = ("move_pages({} pages, flags={:#x})", len(pages), flags)
    if flags & ~(_MOVE | _MOVE_ALL):
        refuse(Errno.EINVAL, call, "unknown flags")
    if flags & _MOVE_ALL and not core.privileged:
        refuse(Errno.EPERM, call, "pages that others map are moved by the administrator only")
    where = np.array(pages, dtype=np.uint64)
    if nodes is None:
        return list(_looked(core, mm, where)[1].tolist())
    if len(nodes) != len(pages):
        refuse(Errno.EFAULT, call, f"{len(nodes)} nodes for {len(pages)} pages")
    there = np.array(sorted({zone.node for zone in core.memory.zones}), dtype=np.int64)
    targets = np.array(nodes, dtype=np.int64)
    wrong = np.flatnonzero(~np.isin(targets, there))
    count = int(wrong[0]) if len(wrong) else len(targets)
    batch = _Batch(core, mm, everywhere=bool(flags & _MOVE_ALL), count=len(pages))
    begins = [0, *(np.flatnonzero(np.diff(targets[:count])) + 1).tolist()]
    for low, high in itertools.pairwise([*begins, count] if count else ()):
        batch.node = int(targets[low])
        batch.pages(low, where[low:high])
        batch.move()
    if len(wrong):
        refuse(Errno.ENODEV, call, f"no node {nodes[count]}")
    return [*batch.status.tolist()]


def _looked(core: Core, mm: AddressSpace, addresses: U64Array) -> tuple[Pfns, NDArray[np.int64]]:
    """Frames of the pages at the addresses, or below 0 what there is instead; and the status of each (MG-002)."""
    pfns = np.full(len(addresses), _NO_PAGE, dtype=np.int64)
    status = np.full(len(addresses), -int(Errno.EFAULT), dtype=np.int64)
    order = np.argsort(addresses, kind="stable")
    ordered = addresses[order]
    low, high = (int(ordered[0]), int(ordered[-1]) + 1) if len(ordered) else (0, 0)
    for vma in mm.vmas.within(low, high):
        bounds = np.searchsorted(ordered, np.array([vma.start, vma.end], dtype=np.uint64))
        mine = order[bounds[0] : bounds[1]]
        if not len(mine):
            continue
        entries, within = _entries(core, mm, vma, ordered[bounds[0] : bounds[1]])
        found = (entries & np.uint64(PRESENT)) != 0
        if not core.caps.move_pages_walks_folios and not vma.flags & VmFlag.ACCESS and vma.huge is None:
            found[:] = False  # an entry that may not be accessed is taken for one of NUMA balancing
        zero = found & ((entries & np.uint64(SPECIAL)) != 0)
        fields = (entries & np.uint64(FIELD)).view(np.int64)
        pfns[mine] = np.where(zero, _ZERO, np.where(found, fields + within, _NO_PAGE))
        none = np.full(len(mine), -int(Errno.ENOENT), dtype=np.int64)
        if not core.caps.move_pages_walks_folios and vma.file is None and vma.huge is None:
            none[(entries == 0) | ((entries & np.uint64(LEAF)) != 0)] = -int(Errno.EFAULT)
        none[zero] = -int(Errno.EFAULT)
        status[mine] = none
    for zone in core.memory.zones:
        status[(pfns >= zone.start) & (pfns < zone.end)] = zone.node
    return pfns, status


def _entries(
    core: Core, mm: AddressSpace, vma: VmArea, addresses: U64Array
) -> tuple[U64Array, NDArray[np.int64]]:
    """The entry of each address of the VMA (ascending), and which page of a huge one it is."""
    shift = core.geometry.page_shift
    entries = np.zeros(len(addresses), dtype=np.uint64)
    within = np.zeros(len(addresses), dtype=np.int64)
    if vma.huge is not None:
        pool = vma.huge.file.pool
        starts, inverse = np.unique(addresses & np.uint64(-pool.size & _ALL), return_inverse=True)
        slots = [mm.tables.leaf_slot(start, pool.level) for start in starts.tolist()]
        words = [core.pool.at[slot] if slot >= 0 else 0 for slot in slots]
        entries[:] = np.array(words, dtype=np.uint64)[inverse]
        within[:] = (addresses >> np.uint64(shift)).view(np.int64) & pool.pages - 1
        return entries, within
    for extent in mm.tables.extents(vma.start, vma.end):
        low, high = np.searchsorted(addresses, np.array([extent.start, extent.end], dtype=np.uint64)).tolist()
        if low == high:
            continue
        part = addresses[low:high].view(np.int64)
        entries[low:high] = extent.entries[(part - extent.start) // extent.size]
        if extent.huge:
            within[low:high] = part >> shift & core.geometry.pmd_pages - 1
    return entries, within


class _Batch:
    """Pages that go to the same node together; they are off their LRU lists until they have moved."""

    def __init__(self, core: Core, mm: AddressSpace, *, everywhere: bool, count: int) -> None:
        self.core = core
        self.mm = mm
        self.everywhere = everywhere
        self.status = np.zeros(count, dtype=np.int64)
        self.node = -1
        #: Heads of folios, in the order of the pages that brought them, and which pages those were: in pieces.
        self.heads: list[tuple[NDArray[np.int64], Pfns]] = []
        #: Those of them that may be met again.
        self.known: set[int] = set()

    def pages(self, first: int, addresses: U64Array) -> None:
        """Take pages along, in their order; those that stay end the batch before them. `first`: place of the first."""
        pfns, status = _looked(self.core, self.mm, addresses)
        frames, odd = self.core.memory.frames, np.zeros(len(pfns), dtype=np.bool_)
        there = np.flatnonzero(pfns >= 0)
        odd[there] = (frames.flags[pfns[there]] & np.uint64(COMPOUND)) != 0
        met = np.bincount(pfns[there] - int(pfns[there].min(initial=0)), minlength=1)
        odd[there] |= met[pfns[there] - int(pfns[there].min(initial=0))] > 1
        bounds = [0, *(np.flatnonzero(np.diff(odd)) + 1).tolist(), len(odd)]
        for low, high in itertools.pairwise(bounds):
            if low < high and not odd[low]:
                self._plain(np.arange(first + low, first + high), pfns[low:high], status[low:high])
                continue
            for index in range(low, high):
                self._one(first + index, addresses[index : index + 1])

    def _plain(self, places: NDArray[np.int64], pfns: Pfns, status: NDArray[np.int64]) -> None:
        """Single pages, none of which is met twice."""
        frames = self.core.memory.frames
        goes = (pfns >= 0) & (status != self.node)
        moving = pfns[goes]
        why = np.zeros(len(moving), dtype=np.int64)
        why[(frames.flags[moving] & np.uint64(_LRU)) == 0] = -int(Errno.EBUSY)
        if not self.everywhere:
            why[frames.mapcount[moving] > 1] = -int(Errno.EACCES)
        status = status.copy()
        status[goes] = why
        goes[goes] = why == 0
        self.status[places] = status
        stays = np.flatnonzero(~goes)
        end = int(stays[-1]) + 1 if len(stays) else 0
        for part in (slice(0, end), slice(end, len(places))):
            chosen = np.flatnonzero(goes[part])
            if len(chosen):
                self.heads.append((places[part][chosen], pfns[part][chosen]))
            if part.start == 0 and end:
                self.move()

    def _one(self, place: int, address: U64Array) -> None:
        """A page of a large folio, or one that is met more than once."""
        pfns, status = _looked(self.core, self.mm, address)
        word = int(status[0])
        if word >= 0 and word != self.node:
            word = self._add(place, int(pfns[0]))
            if not word:
                return
        self.status[place] = word
        self.move()

    def _add(self, place: int, pfn: int) -> int:
        """Take the page's folio along; 0, or an errno below 0 where it stays (MG-003)."""
        core, frames = self.core, self.core.memory.frames
        head = pfn - frames.behind_at[pfn]
        if not self.everywhere and _shared(core, pfn, head):
            return -int(Errno.EACCES)
        if head in core.hugetlb.folios:
            raise NotModelled("moving hugetlb pages to another node: each has a pool of its own")
        if head in self.known or not frames.flags_at[head] & _LRU:
            return -int(Errno.EBUSY)
        self.heads.append((np.array([place]), np.array([head], dtype=np.int64)))
        self.known.add(head)
        return 0

    def move(self) -> None:
        """Move them; their pages are where they should be."""
        if self.heads:
            _move(self.core, np.concatenate([heads for _, heads in self.heads]), self.node)
            for places, _ in self.heads:
                self.status[places] = self.node
        self.heads.clear()
        self.known.clear()


def _shared(core: Core, pfn: int, head: int) -> bool:
    """Whether the kernel takes the page to be mapped by more than one process."""
    frames = core.memory.frames
    if frames.flags_at[head] & COMPOUND and head not in core.hugetlb.folios:
        if not core.caps.move_pages_walks_folios:
            return frames.mapcount_at[pfn] > 1
        return thp.maybe_shared(core, core.memory.large[head])
    return frames.mapcount_at[pfn] > 1


def _move(core: Core, heads: Pfns, node: int) -> None:
    memory, frames = core.memory, core.memory.frames
    zones = [zone for zone in memory.zones if zone.node == node]
    torn: list[LargeFolio] = []
    compound = (frames.flags[heads] & np.uint64(COMPOUND)) != 0
    whole = np.ones(len(heads), dtype=np.bool_)
    for index in np.flatnonzero(compound).tolist():
        folio = memory.large[int(heads[index])]
        if not migrate.torn_first(core, folio):
            continue
        if frames.swap_at[folio.head]:
            raise NotModelled("migrating a large folio of the swap cache of which a part is mapped")
        torn.append(folio)
        whole[index] = False
    chosen = heads[whole]
    orders = np.zeros(len(chosen), dtype=np.int64)
    large = np.flatnonzero(compound[whole])
    orders[large] = memory.large.orders(chosen[large])
    migrate.check_room(core, zones, orders, sum(folio.pages for folio in torn))
    migrate.to_zones(core, zones, chosen, orders)
    for folio in torn:  # after all others
        first, pages = folio.head, folio.pages
        mm, *others = (core.spaces[number] for number in sorted(folio.by_mm))
        thp.split_folio(core, mm, folio, 0, others=others)
        left = np.flatnonzero(frames.mapcount[first : first + pages]) + first
        migrate.to_zones(core, zones, left, np.zeros(len(left), dtype=np.int64))
