"""Swapping in at a fault, and out on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.virtual import mapping
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    PRESENT,
    SOFT_DIRTY,
    SWAP_EXCLUSIVE,
    UFFD_WP,
    WRITE,
    YOUNG,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["bring_in", "swap_in"]

_ANON = int(PageFlag.ANON)
_SWAPCACHE, _DIRTY = int(PageFlag.SWAPCACHE), int(PageFlag.DIRTY)


def bring_in(core: Core, field: int) -> int:
    """The page of a slot, in the swap cache: the one that is there, or one read anew. Raises NoMemory."""
    pfn = core.swap.cached(field)
    if pfn >= 0:
        return pfn
    area = core.swap.area(field)
    slot = field >> 5
    # It belongs to nobody before it is mapped.
    flags = mapping.NEW_ANON & ~_ANON
    if area.immediate and not core.memory.contents.zero(area.content[slot : slot + 1])[0]:
        flags |= _DIRTY  # read from compressed memory, which gives its copy away
    if core.memory.recently(int(area.shadow[slot])):
        flags |= int(PageFlag.ACTIVE)
    pfn = core.memory.page(flags)
    core.memory.on_lru(pfn)
    area.shadow[slot] = 0
    core.memory.frames.content_at[pfn] = int(area.content[slot])
    area.content[slot] = 0
    core.swap.cache(np.array([pfn], dtype=np.int64), np.array([field], dtype=np.int64))
    core.count("swap_in")
    return pfn


def swap_in(core: Core, mm: AddressSpace, vma: VmArea, slot: int, pte: int, *, write: bool) -> None:
    """Map the page of a swap entry (do_swap_page). A write that still may not be is asked again by the caller."""
    field = pte & FIELD
    pfn = bring_in(core, field)
    frames, area = core.memory.frames, core.swap.area(field)
    mm.prepare_anon(vma)
    area.counts[field >> 5] -= 1
    flags = frames.flags_at[pfn]
    wanted = core.swap.half_full or vma.flags & VmFlag.LOCKED or flags & int(PageFlag.MLOCKED)
    if wanted or (write and frames.mapcount_at[pfn] == 0):
        core.swap.uncache(pfn)
    exclusive = bool(pte & SWAP_EXCLUSIVE) or (
        frames.mapcount_at[pfn] == 0 and not frames.flags_at[pfn] & _SWAPCACHE
    )
    entry = pfn | PRESENT | YOUNG | pte & (SOFT_DIRTY | UFFD_WP)
    if exclusive:
        frames.flags_at[pfn] |= ANON_EXCLUSIVE
        protected = pte & UFFD_WP and vma.flags & VmFlag.UFFD_WP
        clean = core.soft_dirty and not vma.flags & VmFlag.SOFTDIRTY and not pte & SOFT_DIRTY
        if vma.flags & VmFlag.WRITE and not protected and not clean:
            entry |= WRITE
            if write:
                entry |= DIRTY | core.soft_dirty
    frames.mapcount_at[pfn] += 1
    fresh = not frames.flags_at[pfn] & _ANON
    frames.flags_at[pfn] |= _ANON
    if vma.flags & VmFlag.LOCKED and not (fresh and core.caps.swapin_not_mlocked):
        mapping.mlock(core, pfn, 1)
    core.pool.at[slot] = entry
