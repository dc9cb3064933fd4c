"""Finding the entries that map a folio (the reverse map): looked for when needed, not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.memory import LargeFolio
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["pte_slots"]


def pte_slots(core: Core, mm: AddressSpace, folio: LargeFolio, near: int) -> tuple[Pfns, Pfns]:
    """Places in the pool of the PTEs of `mm` that map pages of the folio, and their addresses.

    Looked for around `near` first; all of the address space only if some are elsewhere.
    """
    size = core.geometry.pmd_size
    wanted = folio.by_mm.get(mm.number, 0)
    low = max(0, (near & -size) - size)
    slots, addresses = _between(core, mm, folio, low, low + 3 * size)
    if len(slots) < wanted:
        slots, addresses = _between(core, mm, folio, 0, core.geometry.task_size)
    return slots, addresses


def _between(core: Core, mm: AddressSpace, folio: LargeFolio, start: int, end: int) -> tuple[Pfns, Pfns]:
    slots = [np.zeros(0, dtype=np.int64)]
    addresses = [np.zeros(0, dtype=np.int64)]
    for extent in mm.tables.extents(start, end):
        if extent.huge:
            continue
        fields = (extent.entries & np.uint64(FIELD)).view(np.int64) - folio.head
        there = (fields >= 0) & (fields < folio.pages) & ((extent.entries & np.uint64(PRESENT)) != 0)
        index = np.flatnonzero(there)
        if len(index):
            slots.append(mm.tables.pte_slot(extent.start) + index)
            addresses.append(extent.start + index * extent.size)
    return np.concatenate(slots), np.concatenate(addresses)
