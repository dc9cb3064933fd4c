"""/proc/PID/pagemap, derived from the page tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.sim.views import hugetlb as huge_view
from pmcore.backends.sim.virtual import hugetlb
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, SHOWN, SOFT_DIRTY, SPECIAL
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries
from pmcore.uapi import (
    MAX_SWAPFILES_SHIFT,
    PM_FILE,
    PM_MMAP_EXCLUSIVE,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SWAP,
    PM_SWAP_TYPE_MASK,
    PM_UFFD_WP,
    SWP_PTE_MARKER,
    PageFlag,
)

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["fill"]

_ALL = (1 << 64) - 1
#: Where a PTE has no bit of its own for it: set on the way to the view.
_FILE = PM_FILE
#: From the present bit down to that.
_TO_FILE = np.uint64(PM_PRESENT.bit_length() - PM_FILE.bit_length())
_FIELD, _PRESENT, _SHOWN = np.uint64(FIELD), np.uint64(PRESENT), np.uint64(SHOWN)
_MARKER = np.uint64(PM_SWAP | SWP_PTE_MARKER)
_MARKER_MASK = np.uint64(PM_PRESENT | PM_SWAP | PM_SWAP_TYPE_MASK)
#: Where kernels before 4.2 have the page shift, in empty entries as well (rule PM-005).
_PAGE_SHIFT_AT = 55
_PAGE_SHIFT_FIELD = np.uint64(0x3F << _PAGE_SHIFT_AT)
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
    file = PM_FILE if core.caps.pagemap_file else 0
    show = (SHOWN | file) & ~hidden
    shown = np.uint64(show)
    few = mm.tables.few(start, end) if count else ()
    if few is not None:
        for index, slot in enumerate(few):
            pte = core.pool.at[slot]
            once = (
                pte & PRESENT
                and core.caps.mmap_exclusive
                and core.memory.frames.mapcount_at[pte & FIELD] == 1
            )
            out[index] = pte & show | (PM_MMAP_EXCLUSIVE if once else 0)
    for extent in mm.tables.extents(start, end) if few is None else ():
        entries = counted = extent.entries
        if extent.huge:
            skip = max(start - extent.start, 0) >> shift
            span = slice(skip, skip + (min(end, extent.end) - max(start, extent.start) >> shift))
            counted = np.repeat(entries, core.geometry.pmd_pages)[span]
            entries = _as_ptes(core, entries)[span]
            if not core.caps.thp_exclusive_of_head:
                counted = entries
        first = (max(extent.start, start) >> shift) - start_vpn
        target = out[first : first + len(entries)]
        for position in range(0, len(entries), _PIECE):
            part = slice(position, position + _PIECE)
            _convert(core, entries[part], counted[part], target[part], shown)
    if core.hugetlb.used:
        for vma in hugetlb.flagged(mm, start, end):
            low, high = max(vma.start, start), min(vma.end, end)
            words = out[(low >> shift) - start_vpn : (high >> shift) - start_vpn]
            huge_view.pagemap(core, mm, vma, low, high, words, int(shown) | PM_MMAP_EXCLUSIVE)
    for vma in mm.vmas.within(start, end) if file or core.caps.soft_dirty else ():
        if file and vma.file is not None:
            shared = bool(vma.flags & VmFlag.SHARED)
            _mark_files(core, mm, max(vma.start, start), min(vma.end, end), start_vpn, out, shared)
        if core.caps.soft_dirty and vma.flags & VmFlag.SOFTDIRTY:
            low, high = max(vma.start, start), min(vma.end, end)
            out[(low >> shift) - start_vpn : (high >> shift) - start_vpn] |= np.uint64(SOFT_DIRTY)
    if core.caps.marker_type != SWP_PTE_MARKER and visible:
        markers = out[:count] & _MARKER_MASK == _MARKER
        out[:count][markers] -= np.uint64(SWP_PTE_MARKER - core.caps.marker_type)
    if core.caps.page_shift and not core.numbers.get("soft_dirty_cleared"):
        out[:count] = out[:count] & ~_PAGE_SHIFT_FIELD | np.uint64(shift << _PAGE_SHIFT_AT)
    return count


def _mark_files(
    core: Core, mm: AddressSpace, start: int, end: int, start_vpn: int, out: U64Array, shared: bool
) -> None:
    """Show which pages of a range are a file's: all that are present but private copies."""
    shift, frames = core.geometry.page_shift, core.memory.frames
    for extent in mm.tables.extents(start, end):
        if extent.huge:
            low, high = max(extent.start, start), min(extent.end, end)
            out[(low >> shift) - start_vpn : (high >> shift) - start_vpn] |= np.uint64(_FILE)
            continue
        first = (extent.start >> shift) - start_vpn
        target = out[first : first + len(extent.entries)]
        if shared and not core.names_frames:  # there are no private copies
            for position in range(0, len(target), _PIECE):
                part = slice(position, position + _PIECE)
                target[part] |= (extent.entries[part] & _PRESENT) >> _TO_FILE
            continue
        pfns = (extent.entries & _FIELD).view(np.int64)
        anon = frames.flags.take(pfns, mode="clip") & np.uint64(PageFlag.ANON)
        mapped = (extent.entries & np.uint64(PRESENT | SPECIAL)) == _PRESENT
        target[mapped & (anon == 0)] |= np.uint64(_FILE)
        if core.names_frames:
            named = np.flatnonzero(hwpoison_entries(extent.entries))
            anon = frames.flags[pfns[named] >> MAX_SWAPFILES_SHIFT] & np.uint64(PageFlag.ANON)
            target[named[anon == 0]] |= np.uint64(_FILE)


def _as_ptes(core: Core, pmds: U64Array) -> U64Array:
    """PMDs that map huge pages, as the entries of their pages."""
    pages = core.geometry.pmd_pages
    # The huge zero page is nobody's anonymous page: it shows as a file's (rule VM-023).
    file = np.where((pmds & np.uint64(SPECIAL)) != 0, np.uint64(_FILE), np.uint64(0))
    # The offset of a migration entry is what counts the pages.
    step = np.where((pmds & _PRESENT) != 0, np.uint64(1), np.uint64(1 << MAX_SWAPFILES_SHIFT))
    within = step[:, None] * np.arange(pages, dtype=np.uint64)[None, :]
    words: U64Array = ((pmds | file)[:, None] + within).reshape(-1)
    return words


def _convert(core: Core, entries: U64Array, counted: U64Array, out: U64Array, shown: np.uint64) -> None:
    """Entries as pagemap shows them; whether one is exclusive is asked of the frame that `counted` names."""
    np.bitwise_and(entries, shown, out=out)
    if not core.caps.mmap_exclusive:
        return
    # A swap entry's field is no frame: clipped into range, then masked by the present bit.
    pfns = (counted & _FIELD).view(np.int64)
    counts = core.memory.frames.mapcount.take(pfns, mode="clip")
    once = (counts == 1).view(np.uint8).astype(np.uint64)
    once &= entries >> np.uint64(63)
    once <<= np.uint64(PM_MMAP_EXCLUSIVE.bit_length() - 1)
    out |= once
