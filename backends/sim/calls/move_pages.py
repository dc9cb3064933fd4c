"""move_pages: where pages are, and moving them to another node of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services import migrate, thp
from pmcore.backends.sim.virtual.pte import FIELD, LEAF, PRESENT, SPECIAL
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import NotModelled
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["move_pages"]

#: MPOL_MF_MOVE, MPOL_MF_MOVE_ALL.
_MOVE, _MOVE_ALL = 2, 4
_LRU, _SWAPCACHE = int(PageFlag.LRU), int(PageFlag.SWAPCACHE)
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
    if nodes is None:
        return [_status(core, mm, addr, _frame(core, mm, addr)) for addr in pages]
    if len(nodes) != len(pages):
        refuse(Errno.EFAULT, call, f"{len(nodes)} nodes for {len(pages)} pages")
    there = {zone.node for zone in core.memory.zones}
    status: list[int | None] = [None] * len(pages)
    batch = _Batch(core, status)
    for index, (addr, node) in enumerate(zip(pages, nodes, strict=True)):
        if node not in there:
            batch.move()
            refuse(Errno.ENODEV, call, f"no node {node}")
        if batch.node not in (None, node):
            batch.move()
        batch.node = node
        pfn = _frame(core, mm, addr)
        word = _status(core, mm, addr, pfn)
        if word >= 0 and word != node:
            word = batch.add(index, pfn, everywhere=bool(flags & _MOVE_ALL))
            if not word:
                continue
        status[index] = word
        batch.move()
    batch.move()
    return status


def _frame(core: Core, mm: AddressSpace, addr: int) -> int:
    """The frame of the page at the address."""
    vma = mm.vmas.at(addr)
    if vma is None:
        return _NO_PAGE
    slot = _leaf(core, mm, vma, addr)
    entry = core.pool.at[slot] if slot >= 0 else 0
    if not entry & PRESENT:
        return _NO_PAGE
    if not core.caps.move_pages_walks_folios and not vma.flags & VmFlag.ACCESS and vma.huge is None:
        return _NO_PAGE  # an entry that may not be accessed is taken for one of NUMA balancing
    if entry & SPECIAL:
        return _ZERO
    pages = vma.huge.file.pool.pages if vma.huge is not None else core.geometry.pmd_pages
    within = addr >> core.geometry.page_shift & pages - 1 if entry & LEAF else 0
    return (entry & FIELD) + within


def _leaf(core: Core, mm: AddressSpace, vma: VmArea, addr: int) -> int:
    if vma.huge is not None:
        return mm.tables.leaf_slot(addr, vma.huge.file.pool.level)
    slot = mm.tables.pmd_slot(addr)
    if slot >= 0 and core.pool.at[slot] & LEAF:
        return slot
    return mm.tables.leaf_slot(addr, 0)


def _status(core: Core, mm: AddressSpace, addr: int, pfn: int) -> int:
    """What the kernel says of a page that nobody moves: its node, or why it has none, as an errno below 0 (MG-002)."""
    if pfn >= 0:
        return core.memory.zone_of(pfn).node
    if pfn == _ZERO:
        return -int(Errno.EFAULT)
    vma = mm.vmas.at(addr)
    if vma is None:
        return -int(Errno.EFAULT)
    if not core.caps.move_pages_walks_folios and vma.file is None and vma.huge is None:
        slot = _leaf(core, mm, vma, addr)
        if slot < 0 or not core.pool.at[slot] or core.pool.at[slot] & LEAF:
            return -int(Errno.EFAULT)
    return -int(Errno.ENOENT)


class _Batch:
    """Pages that go to the same node together; they are off their LRU lists until they have moved."""

    def __init__(self, core: Core, status: list[int | None]) -> None:
        self.core = core
        self.status = status
        self.node: int | None = None
        #: Heads of folios, in the order of the pages that brought them, and which pages those were.
        self.heads: dict[int, int] = {}

    def add(self, index: int, pfn: int, *, everywhere: bool) -> int:
        """Take the page's folio along; 0, or an errno below 0 where it stays (MG-003)."""
        core, frames = self.core, self.core.memory.frames
        head = pfn - frames.behind_at[pfn]
        if not everywhere and _shared(core, pfn, head):
            return -int(Errno.EACCES)
        if head in core.hugetlb.folios:
            raise NotModelled("moving hugetlb pages to another node: each has a pool of its own")
        if head in self.heads or not frames.flags_at[head] & _LRU:
            return -int(Errno.EBUSY)
        self.heads[head] = index
        return 0

    def move(self) -> None:
        """Move them; their pages are where they should be."""
        if self.heads:
            assert self.node is not None
            _move(self.core, np.array(list(self.heads), dtype=np.int64), self.node)
            for index in self.heads.values():
                self.status[index] = self.node
        self.heads.clear()
        self.node = None


def _shared(core: Core, pfn: int, head: int) -> bool:
    """Whether the kernel takes the page to be mapped by more than one process."""
    frames = core.memory.frames
    if frames.flags_at[head] & COMPOUND and head not in core.hugetlb.folios:
        if not core.caps.move_pages_walks_folios:
            return frames.mapcount_at[pfn] > 1
        return thp.maybe_shared(core, core.memory.large[head])
    return frames.mapcount_at[pfn] > 1


def _move(core: Core, heads: np.ndarray, node: int) -> None:
    memory, frames = core.memory, core.memory.frames
    zones = [zone for zone in memory.zones if zone.node == node]
    torn, whole = [], []
    for head in heads.tolist():
        folio = memory.large.get(head)
        if folio is None or not migrate.torn_first(core, folio):
            whole.append(head)
        elif frames.swap_at[head]:
            raise NotModelled("migrating a large folio of the swap cache of which a part is mapped")
        else:
            torn.append(folio)
    orders = np.zeros(len(whole), dtype=np.int64)
    chosen = np.array(whole, dtype=np.int64)
    compound = np.flatnonzero((frames.flags[chosen] & np.uint64(COMPOUND)) != 0)
    orders[compound] = memory.large.orders(chosen[compound])
    migrate.check_room(core, zones, orders, sum(folio.pages for folio in torn))
    migrate.to_zones(core, zones, chosen, orders)
    for folio in torn:  # after all others
        first, pages = folio.head, folio.pages
        mm, *others = (core.spaces[number] for number in sorted(folio.by_mm))
        thp.split_folio(core, mm, folio, 0, others=others)
        left = np.flatnonzero(frames.mapcount[first : first + pages]) + first
        migrate.to_zones(core, zones, left, np.zeros(len(left), dtype=np.int64))
