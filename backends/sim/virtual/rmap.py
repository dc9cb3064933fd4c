"""Finding the entries that map a folio (the reverse map): looked for when needed, not kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.memory import LargeFolio
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["Mappings", "find", "pte_slots"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)


class Mappings(NamedTuple):
    """Entries that map chosen frames, as columns: by address space, then by address."""

    #: Places in the pool.
    slots: NDArray[np.int64]
    #: The frame; the first one where a PMD maps a huge page.
    pfns: NDArray[np.int64]
    addresses: NDArray[np.int64]
    #: Which of `mms`.
    owners: NDArray[np.int64]
    huge: BoolArray
    mms: tuple[AddressSpace, ...]


def find(core: Core, mms: Iterable[AddressSpace], chosen: BoolArray) -> Mappings:
    """All entries of these address spaces that map a frame for which `chosen` (by PFN) is true.

    A PMD is found by its first frame. One look at every entry there is: meant for many frames at a time.
    """
    columns: list[tuple[NDArray[np.int64], ...]] = []
    spaces = tuple(mms)
    last = len(chosen) - 1
    for owner, mm in enumerate(spaces):
        for extent in mm.tables.extents(0, core.geometry.task_size):
            entries = extent.entries
            # What a swap entry names is no frame: clipped into range, then masked by the present bit.
            pfns = (entries & _FIELD).view(np.int64)
            hit = chosen[np.minimum(pfns, last)]
            hit &= (entries & _PRESENT) != 0
            index = np.flatnonzero(hit)
            if len(index):
                tables = mm.tables
                first = tables.pmd_slot(extent.start) if extent.huge else tables.pte_slot(extent.start)
                columns.append(
                    (
                        index + first,
                        pfns[index],
                        index * extent.size + extent.start,
                        np.full(len(index), owner, dtype=np.int64),
                        np.full(len(index), extent.huge, dtype=np.int64),
                    )
                )
    if not columns:
        none = np.zeros(0, dtype=np.int64)
        return Mappings(none, none, none, none, none.astype(np.bool_), spaces)
    if len(columns) == 1:
        slots, frames, addresses, owners, huge = columns[0]
    else:
        slots, frames, addresses, owners, huge = (np.concatenate(c) for c in zip(*columns, strict=True))
    return Mappings(slots, frames, addresses, owners, huge.astype(np.bool_), spaces)


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
