"""Emptying entries: what munmap, MADV_DONTNEED and exit do to a range of one VMA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.backends.sim.services import thp
from pmcore.backends.sim.virtual.mapping import remove_page, remove_pages
from pmcore.backends.sim.virtual.pte import FIELD, GUARD, PRESENT, SWAP
from pmcore.uapi import SWP_PTE_MARKER

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["swap_entries", "zap"]

_FIELD, _PRESENT, _SWAP = np.uint64(FIELD), np.uint64(PRESENT), np.uint64(SWAP)
_STATE = _PRESENT | _SWAP


def swap_entries(entries: U64Array) -> BoolArray:
    """Which entries name a slot of a swap area (markers do not)."""
    swap: BoolArray = (entries & _STATE) == _SWAP
    if swap.any():
        swap &= (entries & np.uint64(0x1F)) != SWP_PTE_MARKER
    return swap


def zap(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, *, keep_guards: bool = False
) -> None:
    """Empty all entries of the range; pages that nobody maps any more are freed.

    A huge page that the range covers in part is mapped by PTEs first. `keep_guards`: guard markers stay.
    """
    thp.split_at(core, mm, vma, start)
    thp.split_at(core, mm, vma, end)
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        if extent.huge:
            for entry in entries.tolist():
                thp.zap_pmd(core, mm, vma, entry)
            entries[:] = 0
            continue
        if len(entries) == 1:
            _zap_one(core, mm, vma, entries, keep_guards)
            continue
        present = (entries & _PRESENT) != 0
        pfns = (entries[present] & _FIELD).view(np.int64)
        fields = None
        if len(pfns) != len(entries):
            swap = swap_entries(entries)
            if swap.any():
                fields = entries[swap] & _FIELD
        if keep_guards:
            entries[(entries & np.uint64(GUARD)) == 0] = 0
        else:
            entries[:] = 0
        if len(pfns):
            normal = pfns[pfns != core.zero_pfn]
            if len(normal):
                remove_pages(core, mm, vma, normal)
        if fields is not None:
            core.swap.release(fields)


def _zap_one(core: Core, mm: AddressSpace, vma: VmArea, entries: U64Array, keep_guards: bool) -> None:
    entry = int(entries[0])
    if not entry or (keep_guards and entry & GUARD):
        return
    entries[0] = 0
    if entry & PRESENT:
        if entry & FIELD != core.zero_pfn:
            remove_page(core, mm, vma, entry & FIELD)
    elif entry & 0x1F != SWP_PTE_MARKER:
        core.swap.release(np.array([entry & FIELD], dtype=np.uint64))
