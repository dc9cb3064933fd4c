"""Reclaim: looking at the LRU lists from their tails until enough is free, on request and when memory runs out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.services import filereclaim, lru
from pmcore.backends.sim.services.evict import Evicted, evict, mlock_found
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["Reclaimed", "reclaim", "reclaim_of", "relieve", "relieve_group", "shrink_to"]

_ACTIVE, _REFERENCED, _DIRTY = int(PageFlag.ACTIVE), int(PageFlag.REFERENCED), int(PageFlag.DIRTY)
_SWAPBACKED, _SWAPCACHE = int(PageFlag.SWAPBACKED), int(PageFlag.SWAPCACHE)
#: Pages looked at in one go, at least; the kernel's batch for moving pages between its lists.
_BATCH, _CLUSTER = 1024, 32
#: How often the lists are gone through: the kernel's growing shares of them come to about two whole ones.
_ROUNDS = 4


@attrs.frozen(kw_only=True)
class Reclaimed:
    """What reclaim came to, in pages."""

    #: Frames that are free now and were not before.
    pages: int = 0
    #: Looked at on the inactive lists.
    scanned: int = 0
    #: Freed because they were lazily free (MADV_FREE) and not written since.
    discarded: int = 0
    #: Freed because they were a file's, and clean; the other freed ones went to swap.
    dropped: int = 0
    #: Of files, written to their disk.
    cleaned: int = 0
    #: Written to an area that completes later, and still in the swap cache.
    written: int = 0
    #: Moved to the active list, or found locked, or without room in swap.
    activated: int = 0
    #: Spared, because they were accessed since the last look.
    referenced: int = 0
    #: Moved from the active list to the inactive one.
    deactivated: int = 0


class _Tally:
    """The same, while it is being counted."""

    def __init__(self) -> None:
        self.scanned = self.written = self.activated = self.referenced = self.deactivated = 0
        self.discarded = self.dropped = self.cleaned = 0


def reclaim(core: Core, target: int) -> Reclaimed:
    """Free `target` frames, or as many as can be; more where a large folio goes as a whole.

    Pages of files on a disk, and lazily freed ones, go first; what is dirty of files is written after each round.
    """
    before = core.memory.free_total
    tally = _Tally()
    for swapbacked in (False, True):
        for _ in range(_ROUNDS):
            missing = target - (core.memory.free_total - before)
            if missing <= 0 or (swapbacked and not core.swap.free and not _cached(core)):
                break
            tally.deactivated += lru.deactivate(core, max(missing, _CLUSTER), swapbacked=swapbacked)
            if not _round(core, missing, tally, swapbacked=swapbacked):
                break
            if not swapbacked:
                tally.cleaned += filereclaim.write_marked(core)
    freed = core.memory.free_total - before
    core.count("reclaim")
    return Reclaimed(
        pages=freed,
        scanned=tally.scanned,
        discarded=tally.discarded,
        dropped=tally.dropped,
        cleaned=tally.cleaned,
        written=tally.written,
        activated=tally.activated,
        referenced=tally.referenced,
        deactivated=tally.deactivated,
    )


def reclaim_of(core: Core, groups: tuple[int, ...], target: int) -> Reclaimed:
    """The same of pages that are charged to one of the groups alone, as if they had one list; no limit counts."""
    charges = core.memory.charges
    limits, charges.limits = charges.limits, {}
    core.groups.reclaimed = np.array(groups, dtype=np.int32)
    try:
        return reclaim(core, target)
    finally:
        core.groups.reclaimed, charges.limits = None, limits


def shrink_to(core: Core, groups: tuple[int, ...], pages: int) -> bool:
    """Reclaim of the groups until they have no more than so many pages; whether that could be reached (CG-013)."""
    charges = core.memory.charges
    while charges.used(groups) > pages:
        if not reclaim_of(core, groups, _CLUSTER).pages:
            return False
    return True


def relieve_group(core: Core) -> bool:
    """A group has reached its limit: reclaim a batch of its pages; whether an attempt makes sense now (CG-014)."""
    charges = core.memory.charges
    limit, charges.full = charges.full, None
    assert limit is not None
    if reclaim_of(core, limit.groups, _CLUSTER).pages and charges.used(limit.groups) < limit.pages:
        return True
    charges.full = limit
    return False


def _cached(core: Core) -> bool:
    return any(bool(area.cached.any()) for area in core.swap.there)


def _round(core: Core, target: int, tally: _Tally, *, swapbacked: bool) -> bool:
    """Go once through the inactive list, from its tail, as far as needed; whether there was anything on it."""
    heads = lru.inactive(core, swapbacked=swapbacked)
    there, start = len(heads), 0
    before, written = core.memory.free_total, tally.written
    batch = max(_BATCH, target)
    while start < there:
        # What is on its way to a disk counts here: the next round finds it at the tail.
        missing = target - (core.memory.free_total - before) - (tally.written - written)
        if missing <= 0 or (swapbacked and not core.swap.free and not _cached(core)):
            break
        looked = _some(core, heads[start : start + batch], missing, tally)
        start += looked
        batch *= 2
    return bool(there)


def _some(core: Core, heads: Pfns, target: int, tally: _Tally) -> int:
    """Look at folios from the tail of a list until `target` pages of them may go; how many were looked at."""
    frames = core.memory.frames
    seen, pages = lru.look(core, heads), lru.sizes(core, heads)
    flags = frames.flags[heads]
    marked = (flags & np.uint64(_REFERENCED)) != 0
    used = (seen.references > 0) & ~seen.locked
    of_file = (flags & np.uint64(CACHED)) != 0
    # What was accessed by read(2) goes if it is clean; what is dirty is left for another time.
    spared = of_file & marked & ((flags & np.uint64(_DIRTY)) != 0) & ~used & ~seen.locked
    goes = ~used & ~seen.locked & ~spared
    # Without room in swap looking on makes no sense; what has a slot, or needs none, goes all the same.
    needs = goes & ((flags & np.uint64(_SWAPBACKED | _SWAPCACHE)) == np.uint64(_SWAPBACKED))
    ends = [target, core.swap.free]
    cuts = [
        int(np.searchsorted(np.cumsum(np.where(chosen, pages, 0)), limit)) + 1
        for chosen, limit in zip((goes, needs), ends, strict=True)
        if limit
    ]
    if not core.swap.free:
        goes &= ~needs
    count = min([len(heads), *cuts])
    inside = np.arange(len(heads)) < count
    lru.forget(core, seen, inside)
    used, goes, locked = used & inside, goes & inside, seen.locked & inside
    again = used & (marked | (seen.references > 1) | (of_file & seen.executed))
    spared &= inside
    lru.set_flags(core, heads[inside], remove=_REFERENCED)
    lru.set_flags(core, heads[used], add=_REFERENCED)
    lru.set_flags(core, heads[again], add=_ACTIVE)
    lru.to_head(core, heads[used | spared])
    if locked.any():
        mlock_found(core, heads[locked])
    result = evict(core, heads[goes], seen.maps) if goes.any() else Evicted()
    tally.scanned += int(pages[inside].sum())
    tally.referenced += int(pages[used & ~again].sum())
    tally.activated += int(pages[again | locked].sum()) + result.kept
    tally.discarded += result.discarded
    tally.dropped += result.dropped
    tally.written += result.written
    return count


def relieve(core: Core, pages: int) -> bool:
    """Memory has run out: reclaim up to the high watermark, or what is asked for; whether an attempt makes sense now.

    Of what there is to reclaim no more than an eighth at a time: what was used last is to stay.
    """
    memory = core.memory
    free = memory.free_total
    evictable = sum(
        len(found)
        for found in (
            lru.inactive(core, swapbacked=True),
            lru.inactive(core, swapbacked=False),
            lru.active(core),
            lru.active(core, swapbacked=False),
        )
    )
    high = memory.reserve + memory.reserve // 2 + _CLUSTER
    target = max(high - free, min(pages, evictable // 8), _CLUSTER)
    for _ in range(2):
        done = reclaim(core, target)
        if memory.has_room(1):
            return True
        if not done.pages:
            break
    return memory.has_room(1)
