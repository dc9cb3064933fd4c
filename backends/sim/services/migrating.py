"""A machine in the middle of a migration: pages unmapped already, and not yet mapped where they go (MG-006 to MG-008).

Between `start` and `finish` mappings change, processes fork and end, and what is not on its way is accessed: an access
to what is waits. Whatever else the machine does waits for the end, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services import migrate
from pmcore.backends.sim.virtual import rmap
from pmcore.backends.sim.virtual.mapping import MLOCKED
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    LEAF,
    PRESENT,
    SOFT_DIRTY,
    SPECIAL,
    SWAP,
    UFFD_WP,
    WRITE,
    YOUNG,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries
from pmcore.errors import AddressSpaceFault, ArgumentError, NotModelled
from pmcore.uapi import Madvise, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = [
    "ADVICE",
    "Migration",
    "as_before",
    "beside",
    "finish",
    "forked",
    "may_write",
    "put_back",
    "put_on",
    "start",
    "still",
    "wait",
    "waits",
]

_ALL = (1 << 64) - 1
_LOCKED, _LRU = int(PageFlag.LOCKED), int(PageFlag.LRU)
#: Advice that may be given meanwhile: what it does to mappings, or to entries whatever they are.
ADVICE = frozenset(
    int(advice)
    for advice in (
        Madvise.NORMAL,
        Madvise.RANDOM,
        Madvise.SEQUENTIAL,
        Madvise.DONTNEED,
        Madvise.DONTNEED_LOCKED,
        Madvise.DONTFORK,
        Madvise.DOFORK,
        Madvise.HUGEPAGE,
        Madvise.NOHUGEPAGE,
        Madvise.DONTDUMP,
        Madvise.DODUMP,
        Madvise.WIPEONFORK,
        Madvise.KEEPONFORK,
    )
)


@attrs.define(eq=False)
class Migration:
    """Pages that are on their way: the entries that mapped them, and their frames, as they were."""

    slots: NDArray[np.int64]
    entries: U64Array
    pfns: Pfns
    flags: U64Array
    counts: NDArray[np.int32]

    ARRAYS = ("slots", "entries", "pfns", "flags", "counts")


def start(core: Core, mm: AddressSpace, first: int, end: int) -> int:
    """Unmap the pages that the range maps, whoever maps them, and lock them; how many.

    Raises ArgumentError where none can be moved, NotModelled for what no migration here takes.
    """
    still(core, "a second migration")
    frames, chosen = core.memory.frames, np.zeros(core.memory.frames.rows, dtype=np.bool_)
    for vma in mm.vmas.within(first, end):
        if vma.flags & VmFlag.HUGETLB:
            raise NotModelled("a migration of hugetlb pages under way")
    for extent in mm.tables.extents(first, end):
        entries = extent.entries
        there = entries[(entries & np.uint64(PRESENT | SPECIAL)) == np.uint64(PRESENT)] & np.uint64(FIELD)
        pfns = there.view(np.int64)
        chosen[pfns - frames.behind[pfns]] = True
    heads = np.flatnonzero(chosen & ((frames.flags & np.uint64(_LRU)) != 0))
    if not len(heads):
        raise ArgumentError(
            f"nothing to migrate in {first:#x}-{end:#x}", remedy="pages that are mapped, and on a list"
        )
    orders = _orders(core, heads)
    if (frames.flags[heads] & np.uint64(MLOCKED)).any():
        raise NotModelled("a migration of locked pages under way")
    if any(
        folio is not None and migrate.torn_first(core, folio)
        for folio in map(core.memory.large.get, heads.tolist())
    ):
        raise NotModelled("a migration under way of a folio of which a part is mapped")
    migrate.check_room(core, core.memory.zones, orders)
    pfns = _pages(heads, orders)
    _unmap(core, pfns)
    core.count("migration_start")
    return len(pfns)


def _unmap(core: Core, pfns: Pfns) -> None:
    """Have the pages on their way, whoever maps them now."""
    frames = core.memory.frames
    inside = np.zeros(frames.rows, dtype=np.bool_)
    inside[pfns] = True
    maps = rmap.find(core, core.spaces.values(), inside)
    core.migration = Migration(
        maps.slots, core.pool.flat[maps.slots], pfns, frames.flags[pfns], frames.mapcount[pfns]
    )
    put_on(core)


def finish(core: Core) -> None:
    """Map the pages where they have moved to, as a whole migration would have left them. Raises ArgumentError."""
    if core.migration is None:
        raise ArgumentError("no migration is under way", remedy="start one")
    pfns = core.migration.pfns
    put_back(core)
    core.migration = None
    heads = pfns[core.memory.frames.behind[pfns] == 0]
    migrate.to_zones(core, core.memory.zones, heads, _orders(core, heads))


def put_on(core: Core) -> None:
    """Have entries and frames look as they do on the way."""
    moving, frames = core.migration, core.memory.frames
    assert moving is not None
    old = moving.entries
    heads = (old & np.uint64(FIELD)).view(np.int64)
    exclusive = (frames.flags[heads] & np.uint64(ANON_EXCLUSIVE)) != 0 if core.caps.anon_exclusive else None
    kind = np.full(len(old), core.caps.migration_type, dtype=np.uint64)
    if exclusive is not None:
        kind[exclusive] += np.uint64(1)
    kind[(old & np.uint64(WRITE)) != 0] = core.caps.migration_type + (1 if exclusive is None else 2)
    kept = old & np.uint64(SOFT_DIRTY | UFFD_WP | LEAF)
    new = kept | np.uint64(SWAP) | kind | (old & np.uint64(FIELD)) << np.uint64(5)
    core.pool.flat[moving.slots] = new
    dirty = heads[(old & np.uint64(DIRTY)) != 0]
    dirty = np.unique(dirty - frames.behind[dirty])
    written = np.isin(moving.pfns - frames.behind[moving.pfns], dirty)
    frames.flags[moving.pfns] &= np.uint64(~(_LRU | ANON_EXCLUSIVE) & _ALL)
    frames.flags[moving.pfns] |= np.uint64(_LOCKED)
    frames.flags[moving.pfns[written]] |= np.uint64(PageFlag.DIRTY)
    frames.mapcount[moving.pfns] = 0


def put_back(core: Core) -> None:
    """Have them look as they did before."""
    moving, frames = core.migration, core.memory.frames
    assert moving is not None
    core.pool.flat[moving.slots] = moving.entries
    frames.flags[moving.pfns] = moving.flags
    frames.mapcount[moving.pfns] = moving.counts


@contextlib.contextmanager
def as_before(core: Core) -> Iterator[None]:
    """Whatever is counted elsewhere is what it was before the migration began: as long as this lasts all look so."""
    if core.migration is None:
        yield
        return
    put_back(core)
    try:
        yield
    finally:
        put_on(core)


@contextlib.contextmanager
def beside(core: Core) -> Iterator[None]:
    """Change mappings while a migration is under way: what maps pages on their way goes along (MG-011 to MG-013).

    As long as this lasts all look as before. A page that nobody maps any more, and no file has, is free then.
    """
    moving = core.migration
    if moving is None:
        yield
        return
    put_back(core)
    frames, flat = core.memory.frames, core.pool.flat
    cached = (frames.flags[moving.pfns] & np.uint64(CACHED)) != 0
    heads = moving.pfns - frames.behind[moving.pfns]
    # Emptied ones do not tell their files of accesses, as those that map pages do.
    owned = (frames.flags[(moving.entries & np.uint64(FIELD)).view(np.int64)] & np.uint64(CACHED)) != 0
    young = moving.slots[owned & ((moving.entries & np.uint64(YOUNG)) != 0)]
    flat[young] &= np.uint64(~YOUNG & _ALL)
    try:
        yield
    finally:
        there = moving.pfns[cached & ((frames.flags[moving.pfns] & np.uint64(CACHED)) != 0)]
        mapped = np.zeros(frames.rows, dtype=np.bool_)
        mapped[heads[frames.mapcount[moving.pfns] > 0]] = True
        left = np.union1d(there, moving.pfns[mapped[heads]])
        core.pool.flat[young] |= np.where(
            (core.pool.flat[young] & np.uint64(PRESENT)) != 0, np.uint64(YOUNG), np.uint64(0)
        )
        _unmap(core, left)


def forked(core: Core, parent: AddressSpace, child: AddressSpace) -> None:
    """A child has been made beside a migration: entries of pages on their way are inherited as they are."""
    moving = core.migration
    if moving is None:
        return
    chosen = np.zeros(core.memory.frames.rows, dtype=np.bool_)
    chosen[moving.pfns] = True
    maps = rmap.find(core, (child,), chosen)
    mine = rmap.find(core, (parent,), chosen)
    place = np.searchsorted(mine.addresses, maps.addresses)
    core.pool.flat[maps.slots] |= core.pool.flat[mine.slots[place]] & np.uint64(YOUNG)


def may_write(core: Core, entries: U64Array) -> None:
    """Entries whose protection is changed beside a migration: those of pages on their way allow no writes (MG-012)."""
    if core.migration is None:
        return
    chosen = np.zeros(core.memory.frames.rows, dtype=np.bool_)
    chosen[core.migration.pfns] = True
    present = np.flatnonzero((entries & np.uint64(PRESENT)) != 0)
    hit = present[chosen[(entries[present] & np.uint64(FIELD)).view(np.int64)]]
    entries[hit] &= np.uint64(~WRITE & _ALL)


def still(core: Core, call: str) -> None:
    """Refuse a call while a migration is under way. Raises NotModelled."""
    if core.migration is not None:
        raise NotModelled(f"{call} while a migration is under way", remedy="finish it first")


def wait(core: Core, mm: AddressSpace, first: int, end: int) -> int:
    """Where an access to the range has to wait for the end of a migration: the first address; `end` for nowhere."""
    moving = core.migration
    if moving is None or not len(moving.slots):
        return end
    size = core.geometry.page_size
    for extent in mm.tables.extents(first & -size, end + size - 1 & -size):
        entries = extent.entries
        there = hwpoison_entries(entries) & (
            (entries & np.uint64(0x1F)) != np.uint64(core.caps.hwpoison_type)
        )
        if there.any():
            return min(max(extent.start + int(np.argmax(there)) * extent.size, first), end)
    return end


def waits(address: int) -> AddressSpaceFault:
    """An access that waits for the end of a migration, which no step of one program can."""
    return AddressSpaceFault("SIGSTOP", address, "the access waits for the end of a migration")


def _orders(core: Core, heads: Pfns) -> NDArray[np.int64]:
    orders = np.zeros(len(heads), dtype=np.int64)
    compound = np.flatnonzero((core.memory.frames.flags[heads] & np.uint64(COMPOUND)) != 0)
    if len(compound):
        orders[compound] = core.memory.large.orders(heads[compound])
    return orders


def _pages(heads: Pfns, orders: NDArray[np.int64]) -> Pfns:
    sizes = np.int64(1) << orders
    within = np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    pages: Pfns = np.repeat(heads, sizes) + within
    return pages
