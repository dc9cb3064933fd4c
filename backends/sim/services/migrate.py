"""Migration: pages get other frames, and whoever knows them by the old ones knows them by the new ones from then on.

Contents, counts, flags and entries stay what they were, but for what the kernel's way over migration entries leaves
behind: a page whose entries were dirty is DIRTY itself, and comes to the head of its LRU list.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services import lru
from pmcore.backends.sim.virtual import rmap
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT
from pmcore.errors import NotModelled
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns, Zone
    from pmcore.backends.sim.physical.folios import LargeFolio

__all__ = ["check_room", "move", "take", "to_zones", "torn_first"]

_ALL = (1 << 64) - 1
_DIRTY, _LRU = int(PageFlag.DIRTY), int(PageFlag.LRU)
_COLUMNS = ("flags", "mapcount", "behind", "content", "swap", "whole", "owner", "index", "group")


def torn_first(core: Core, folio: LargeFolio) -> bool:
    """Whether nobody maps some pages of a mapped folio: the kernel takes it apart instead of copying those (HP-005).

    Raises NotModelled where moving it would mark it as such for later.
    """
    if not core.caps.migrate_splits_partly_mapped:
        return False
    if folio.entire and (folio.mapped - folio.entire) % folio.pages:
        raise NotModelled("migrating a huge page that a PMD maps, and elsewhere PTEs do in part")
    if folio.entire or not folio.mapped:
        return False
    part = slice(folio.head, folio.head + folio.pages)
    return bool((core.memory.frames.mapcount[part] == 0).any())


def check_room(core: Core, zones: Iterable[Zone], orders: NDArray[np.int64], single: int = 0) -> None:
    """Raise NotModelled unless these zones have blocks for folios of these orders, and for so many pages more."""
    places = tuple(zones)
    spare = sum(zone.free_pages for zone in places) - core.memory.reserve
    if int((np.int64(1) << orders).sum()) + single > spare:
        raise NotModelled("moving pages where there is no room for them")
    free = [sum(counts) for counts in zip(*(zone.free_counts() for zone in places), strict=True)]
    wanted = np.bincount(orders, minlength=len(free)).tolist()
    have = need = 0
    for order in range(len(free) - 1, 0, -1):
        have, need = 2 * have + free[order], 2 * need + wanted[order]
        if need > have:
            raise NotModelled("moving a large folio where there is no block for it: it is taken apart")


def take(core: Core, zones: Iterable[Zone], heads: Pfns, orders: NDArray[np.int64]) -> tuple[Pfns, Pfns]:
    """Free frames of these zones for folios, the largest ones first: their pages, and the frame of each.

    That there is room has been seen to.
    """
    places = tuple(zones)
    place = np.zeros(len(heads), dtype=np.int64)
    for index in np.argsort(-orders, kind="stable").tolist():
        if not orders[index]:
            break
        found = (zone.take(int(orders[index])) for zone in places)
        place[index] = next(pfn for pfn in found if pfn >= 0)
    single = np.flatnonzero(orders == 0)
    place[single] = _take_pages(places, len(single))
    sizes = np.int64(1) << orders
    within = np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(heads, sizes) + within, np.repeat(place, sizes) + within


def _take_pages(zones: tuple[Zone, ...], count: int) -> Pfns:
    """Single free frames."""
    pieces = [np.zeros(0, dtype=np.int64)]
    for zone in zones:
        pieces.append(zone.take_pages(count))
        count -= len(pieces[-1])
    assert not count
    return np.concatenate(pieces)


def to_zones(core: Core, zones: Iterable[Zone], heads: Pfns, orders: NDArray[np.int64]) -> None:
    """Move folios to free frames of these zones, where there is room, and free the old ones."""
    move(core, *take(core, zones, heads, orders))
    core.memory.free_pages(heads[orders == 0])
    for index in np.flatnonzero(orders).tolist():
        core.memory.free(int(heads[index]), int(orders[index]))


def move(core: Core, old: Pfns, new: Pfns) -> None:
    """Move the page of each frame of `old` to the frame of `new` at the same place, which was free (rule HP-004).

    `old` holds folios whole, `new` the places of their pages in order. The old frames hold nothing after.
    """
    if not len(old):
        return
    frames = core.memory.frames
    heads = old[frames.behind[old] == 0]
    _mark_dirty(core, old)
    for name in _COLUMNS:
        column = getattr(frames, name)
        column[new] = column[old]
        column[old] = 0
    frames.lru[old] = 0
    place = np.full(frames.rows, -1, dtype=np.int64)
    place[old] = new
    _entries(core, place)
    _caches(core, place, new)
    moved = place[heads]
    for head in heads[(frames.flags[moved] & np.uint64(COMPOUND)) != 0].tolist():
        core.memory.large.move(head, int(place[head]))
    for head in [head for head in core.mlocks if place[head] >= 0]:
        core.mlocks[int(place[head])] = core.mlocks.pop(head)
    listed = moved[(frames.flags[moved] & np.uint64(_LRU)) != 0]
    lru.to_head(core, listed)
    core.count("migrate", len(old))


def _mark_dirty(core: Core, pfns: Pfns) -> None:
    """Folios are dirty from here on if an entry that maps them is: the entries come and go."""
    frames, flat = core.memory.frames, core.pool.flat
    chosen = np.zeros(frames.rows, dtype=np.bool_)
    chosen[pfns] = True
    maps = rmap.find(core, core.spaces.values(), chosen)
    dirty = (flat[maps.slots] & np.uint64(DIRTY)) != 0
    if core.caps.migration_makes_soft_dirty:
        flat[maps.slots[dirty]] |= np.uint64(core.soft_dirty)
    written = np.zeros(frames.rows, dtype=np.bool_)
    written[maps.pfns[dirty] - frames.behind[maps.pfns[dirty]]] = True
    frames.flags[pfns[written[pfns - frames.behind[pfns]]]] |= np.uint64(_DIRTY)


def _entries(core: Core, place: Pfns) -> None:
    """Have all entries that name an old frame name the new one."""
    chosen = place >= 0
    flat = core.pool.flat
    maps = rmap.find(core, core.spaces.values(), chosen)
    flat[maps.slots] = flat[maps.slots] & np.uint64(~FIELD & _ALL) | place[maps.pfns].view(np.uint64)


def _caches(core: Core, place: Pfns, new: Pfns) -> None:
    """Have swap cache, page caches and KSM's stable tree name the new frames."""
    frames = core.memory.frames
    for area in core.swap.there:
        fields = frames.swap[new] - 1
        mine = (fields >= 0) & (fields & 0x1F == area.number)
        area.cached[fields[mine] >> 5] = new[mine] + 1
    core.ksm.moved(place)
    owners = frames.owner[new]
    for number in np.unique(owners[owners != 0]).tolist():
        mine = new[owners == number]
        mine = mine[np.argsort(frames.index[mine])]
        core.inodes[number].index.put(frames.index[mine], mine.view(np.uint64) | np.uint64(PRESENT))
