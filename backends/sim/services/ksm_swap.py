"""Merged pages and swap: what is read back is one ordinary page, which only one place may map; others get copies.

An ordinary anonymous page lies at one offset of mappings that come from each other by forks; a merged one lay anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pmcore.backends.sim.virtual import mapping
from pmcore.backends.sim.virtual.pte import DIRTY as PTE_DIRTY
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SOFT_DIRTY, UFFD_WP, WRITE, YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import swap_entries
from pmcore.errors import NotModelled
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.services.swap import SwapArea
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["Copy", "copied", "copies", "copy_back"]

_DIRTY, _KSM = int(PageFlag.DIRTY), int(PageFlag.KSM)


def _place(core: Core, vma: VmArea, addr: int) -> tuple[int, int]:
    """Where an anonymous page at the address belongs: the root of its anon_vma, and its offset."""
    assert vma.anon_vma is not None
    return vma.anon_vma.root, vma.pgoff + (addr - vma.start >> core.geometry.page_shift)


def _copy(core: Core, vma: VmArea, pfn: int) -> int:
    """A page of one's own with the same contents. Raises NoMemory."""
    frames = core.memory.frames
    copy = mapping.take_page(core, vma)
    frames.flags_at[copy] |= _DIRTY
    frames.mapcount_at[copy] = 1
    if frames.content_at[pfn]:
        frames.content_at[copy] = core.memory.contents.copy_one(frames.content_at[pfn])
    core.count("ksm_swapin_copy")
    return copy


def copied(core: Core, vma: VmArea, slot: int, pte: int, pfn: int, addr: int, *, write: bool) -> bool:
    """Whether a swap entry got a copy of `pfn`, the page of the swap cache, because it belongs elsewhere (KS-016).

    Else the page may be mapped, and belongs there from now on. Raises NoMemory.
    """
    area, number = core.swap.area(pte & FIELD), (pte & FIELD) >> 5
    if core.memory.frames.flags_at[pfn] & _KSM:
        if pfn in core.ksm.by_pfn:
            return False
    elif number not in area.merged:
        return False
    else:
        place = _place(core, vma, addr)
        reader = area.merged[number]
        if not reader or reader == place:
            area.merged[number] = place
            return False
    entry = _copy(core, vma, pfn) | PRESENT | YOUNG | pte & (SOFT_DIRTY | UFFD_WP)
    protected = pte & UFFD_WP and vma.flags & VmFlag.UFFD_WP
    clean = core.soft_dirty and not vma.flags & VmFlag.SOFTDIRTY and not pte & SOFT_DIRTY
    if vma.flags & VmFlag.WRITE and not protected and not clean:
        entry |= WRITE | (PTE_DIRTY | core.soft_dirty if write else 0)
    area.counts[number] -= 1
    core.pool.at[slot] = entry
    return True


class Copy(NamedTuple):
    """An entry that gets a copy when its area is switched off: its mapping, its place in the pool."""

    vma: VmArea
    slot: int


def copies(core: Core, area: SwapArea) -> list[Copy]:
    """The entries that get copies when the area is switched off.

    Raises NotModelled where it depends on which process is looked at first.
    """
    found: list[Copy] = []
    readers = {
        number: reader
        for number, reader in area.merged.items()
        if not area.cached[number] or not core.memory.frames.flags_at[int(area.cached[number]) - 1] & _KSM
    }
    first: dict[int, int] = {}
    for mm in core.spaces.values() if readers else ():
        for vma in mm.vmas:
            for extent in mm.tables.extents(vma.start, vma.end) if vma.anon_vma is not None else ():
                if extent.huge:
                    continue
                entries = extent.entries
                index = np.flatnonzero(swap_entries(entries) & ((entries & np.uint64(0x1F)) == area.number))
                for place in index.tolist():
                    number = (int(entries[place]) & FIELD) >> 5
                    if number not in readers:
                        continue
                    here = _place(core, vma, extent.start + place * extent.size)
                    if not readers[number]:
                        readers[number], first[number] = here, mm.number
                    elif readers[number] != here:
                        if first.get(number, mm.number) != mm.number:
                            raise NotModelled(
                                "swapoff of a merged page that several processes have",
                                remedy="have one of them read it back before",
                            )
                        found.append(Copy(vma, mm.tables.pte_slot(extent.start) + place))
    return found


def copy_back(core: Core, area: SwapArea, wanted: list[Copy]) -> None:
    """Give them their copies; what the area holds is in the swap cache. There is memory for it."""
    for vma, slot in wanted:
        pte = core.pool.at[slot]
        number = (pte & FIELD) >> 5
        copy = _copy(core, vma, int(area.cached[number]) - 1)
        core.pool.at[slot] = copy | PRESENT | pte & (SOFT_DIRTY | UFFD_WP)
        area.counts[number] -= 1
