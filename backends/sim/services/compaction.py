"""Compaction: pages move to one end of a zone, so that what is free lies together at the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services import migrate, migrating
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns, Zone

__all__ = ["compact"]

_LRU = int(PageFlag.LRU)


def compact(core: Core) -> int:
    """Write 1 to compact_memory (rule MG-010): the lowest single pages go to the highest free frames; how many did.

    Large folios stay, and so does memory that was never used: which frames are chosen is this machine's own business.
    """
    migrating.still(core, "compaction")
    moved = 0
    for zone in core.memory.zones:
        moved += _zone(core, zone)
    core.count("compact")
    return moved


def _zone(core: Core, zone: Zone) -> int:
    frames = core.memory.frames
    flags = frames.flags[zone.start : zone.frontier]
    pages = np.flatnonzero((flags & np.uint64(_LRU | COMPOUND)) == np.uint64(_LRU)) + zone.start
    free = np.flatnonzero((flags & np.uint64(PageFlag.BUDDY)) != 0)[::-1] + zone.start
    both = min(len(pages), len(free))
    count = int((pages[:both] < free[:both]).sum())
    old: Pfns = pages[:count].copy()
    new: Pfns = free[:count].copy()
    for pfn in new.tolist():
        zone.take_off(pfn)
    migrate.move(core, old, new)
    core.memory.free_pages(old)
    return count
