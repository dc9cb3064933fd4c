"""/proc/PID/pagemap, derived from the page tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SHOWN, SOFT_DIRTY
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PM_MMAP_EXCLUSIVE, PM_PFRAME_MASK, PM_UFFD_WP

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["fill"]

_ALL = (1 << 64) - 1
_FIELD, _PRESENT, _SHOWN = np.uint64(FIELD), np.uint64(PRESENT), np.uint64(SHOWN)
#: Entries converted at a time: as many as stay in a processor's cache.
_PIECE = 1 << 15


def fill(core: Core, mm: AddressSpace, start_vpn: int, out: U64Array, *, visible: bool) -> int:
    """Fill `out` from page `start_vpn` on; `visible` shows frames and swap entries."""
    geometry = core.geometry
    shift = geometry.page_shift
    count = min(len(out), max(0, (geometry.task_size >> shift) - start_vpn))
    out[:count] = 0
    start, end = start_vpn << shift, start_vpn + count << shift
    hidden = 0 if visible else PM_PFRAME_MASK
    if not core.caps.pagemap_uffd_wp:
        hidden |= PM_UFFD_WP
    shown = np.uint64(SHOWN & ~hidden & _ALL)
    for extent in mm.tables.extents(start, end):
        entries = extent.entries
        if extent.huge:
            entries = _as_ptes(core, entries)
            skip = max(start - extent.start, 0) >> shift
            entries = entries[skip : skip + (min(end, extent.end) - max(start, extent.start) >> shift)]
        first = (max(extent.start, start) >> shift) - start_vpn
        target = out[first : first + len(entries)]
        for position in range(0, len(entries), _PIECE):
            part = slice(position, position + _PIECE)
            _convert(core, entries[part], target[part], shown)
    if core.caps.soft_dirty:
        bit = np.uint64(SOFT_DIRTY)
        for vma in mm.vmas.within(start, end):
            if vma.flags & VmFlag.SOFTDIRTY:
                low, high = max(vma.start, start), min(vma.end, end)
                out[(low >> shift) - start_vpn : (high >> shift) - start_vpn] |= bit
    return count


def _as_ptes(core: Core, pmds: U64Array) -> U64Array:
    """PMDs that map huge pages, as the entries of their pages."""
    pages = core.geometry.pmd_pages
    words: U64Array = (pmds[:, None] + np.arange(pages, dtype=np.uint64)[None, :]).reshape(-1)
    return words


def _convert(core: Core, entries: U64Array, out: U64Array, shown: np.uint64) -> None:
    np.bitwise_and(entries, shown, out=out)
    if not core.caps.mmap_exclusive:
        return
    # A swap entry's field is no frame: clipped into range, then masked by the present bit.
    pfns = (entries & _FIELD).view(np.int64)
    counts = core.memory.frames.mapcount.take(pfns, mode="clip")
    once = (counts == 1).view(np.uint8).astype(np.uint64)
    once &= entries >> np.uint64(63)
    once <<= np.uint64(PM_MMAP_EXCLUSIVE.bit_length() - 1)
    out |= once
