"""Collapsing small pages into a huge one: MADV_COLLAPSE, and khugepaged's step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from pmcore.backends.sim.physical.folios import LargeFolio
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, MOVED_YOUNG
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.services import lru, swapping, thp
from pmcore.backends.sim.virtual import mapping
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    GUARD,
    LEAF,
    POISON_MARKER,
    PRESENT,
    SWAP,
    UFFD_WP,
    WRITE,
    YOUNG,
    is_hwpoison,
    poisoned,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries, swap_entries
from pmcore.errors import AddressSpaceFault
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["Limits", "collapse_range", "scan_block"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
#: What a page knows of accesses.
_ACCESSED = np.uint64(int(PageFlag.REFERENCED) | MOVED_YOUNG)
#: Folios in a batch (PAGEVEC_SIZE).
_BATCH = 31


def collapse_range(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> Errno | None:
    """MADV_COLLAPSE of whole blocks in the range; the errno of the last that failed, or None."""
    size = core.geometry.pmd_size
    if not core.caps.thp or vma.flags & VmFlag.NOHUGEPAGE or core.policy.pmd == "never":
        return Errno.EINVAL
    first, last = -(-start // size) * size, end // size * size
    low, high = -(-vma.start // size) * size, vma.end // size * size
    if vma.anon_vma is None or low >= high or first > last:
        return Errno.EINVAL
    failed: Errno | None = None
    waiting: list[int] = []
    for addr in range(first, last, size):
        result, stop = _one(core, mm, vma, addr, waiting)
        if result is not None:
            failed = result
            if stop:
                break
    return failed


def _one(
    core: Core, mm: AddressSpace, vma: VmArea, addr: int, waiting: list[int]
) -> tuple[Errno | None, bool]:
    """Collapse one block: (errno or None, whether to give up on the rest). `waiting`: see `_met_twice`."""
    slot = mm.tables.pmd_slot(addr)
    pmd = core.pool.at[slot] if slot >= 0 else 0
    if pmd & LEAF:
        return None, False
    if not pmd:
        return Errno.EINVAL, slot >= 0  # a missing table of PMDs is gone past, an empty PMD in one is not
    pages, size = core.geometry.pmd_pages, core.geometry.page_size
    first = mm.tables.pte_slot(addr)
    entries = core.pool.flat[first : first + pages]
    present = (entries & _PRESENT) != 0
    normal = present & ((entries & _FIELD) != np.uint64(core.zero_pfn))
    # The first entry that stands in the way decides: an empty one that a userfaultfd waits for, or a protected one.
    protected = (entries & np.uint64(UFFD_WP)) != 0
    missing = (~normal & ((entries == 0) | present)) if vma.uffd is not None else np.zeros_like(present)
    unlisted = normal & _waiting(core, entries, waiting)
    first_bad = int(np.argmax(protected | missing | unlisted))
    if missing[first_bad]:
        return Errno.EBUSY if core.caps.collapse_empty_busy else Errno.EINVAL, True
    if protected[first_bad]:
        return Errno.EINVAL, False
    if unlisted[first_bad]:
        return Errno.EAGAIN, False
    if core.caps.collapse_needs_writable and not (entries[present] & np.uint64(WRITE)).any():
        return Errno.EINVAL, False
    try:
        folio = core.memory.folio(core.geometry.pmd_order, mapping.NEW_ANON | thp.THP | ANON_EXCLUSIVE)
    except NoMemory:
        return Errno.ENOMEM, True
    core.count("thp_collapse_alloc")
    guard = ((entries & np.uint64(GUARD)) != 0) | _poisoned(entries) | hwpoison_entries(entries)
    for index in np.flatnonzero(guard | swap_entries(entries)).tolist():
        if guard[index]:  # what came before it has been read back
            core.memory.free_folio(folio)
            return Errno.EINVAL, True
        try:
            swapping.swap_in(
                core,
                mm,
                vma,
                first + index,
                int(entries[index]),
                write=False,
                addr=addr + index * size,
                whole=False,
            )
        except NoMemory:
            core.memory.free_folio(folio)
            raise
        except AddressSpaceFault:  # a poisoned page of the swap cache
            core.memory.free_folio(folio)
            return Errno.EINVAL, True
    if _met_twice(core, entries, waiting):
        core.memory.free_folio(folio)
        return Errno.EAGAIN, False
    _copy(core, mm, vma, addr, folio)
    waiting.clear()  # a huge page does not wait, nor do others any longer
    return None, False


@attrs.frozen(kw_only=True)
class Limits:
    """What khugepaged accepts in a block: pages that are empty or zero pages, swapped out, or shared with others."""

    none: int
    swap: int
    shared: int


def scan_block(
    core: Core, mm: AddressSpace, vma: VmArea, addr: int, limits: Limits, waiting: list[int]
) -> str:
    """khugepaged's look at a block: "collapsed", or why not. `waiting`: see `_met_twice`; as long as one step takes."""
    slot = mm.tables.pmd_slot(addr)
    pmd = core.pool.at[slot] if slot >= 0 else 0
    if not pmd:
        return "pmd_null"
    if pmd & LEAF:
        return "pmd_mapped"
    pages, frames, size = core.geometry.pmd_pages, core.memory.frames, core.geometry.page_size
    first = mm.tables.pte_slot(addr)
    entries = core.pool.flat[first : first + pages]
    present = (entries & _PRESENT) != 0
    swapped = np.flatnonzero(~present & (entries != 0))  # markers among them
    normal = present & ((entries & _FIELD) != np.uint64(core.zero_pfn))
    empty = pages - len(swapped) - int(normal.sum())
    pfns = (entries[normal] & _FIELD).view(np.int64)
    flags = frames.flags[pfns]
    young = ((entries[normal] & np.uint64(YOUNG)) != 0) | ((flags & _ACCESSED) != 0)
    refusal = ""
    if (entries & np.uint64(UFFD_WP)).any():
        refusal = "pte_uffd_wp"
    elif len(swapped) > limits.swap:
        refusal = "exceed_swap_pte"
    elif empty > limits.none or (empty and vma.uffd is not None):
        refusal = "exceed_none_pte"
    elif int(_shared(core, pfns).sum()) > limits.shared:
        refusal = "exceed_shared_pte"
    elif (normal & _waiting(core, entries, waiting)).any():
        refusal = "page_lru"
    elif core.caps.collapse_needs_writable and not (entries[present] & np.uint64(WRITE)).any():
        refusal = "page_ro"
    elif not young.any() or (len(swapped) and int(young.sum()) < pages // 2):
        refusal = "lack_referenced_page"
    elif vma.anon_vma is None:
        refusal = "page_anon"
    if refusal:
        return refusal
    try:
        folio = core.memory.folio(core.geometry.pmd_order, mapping.NEW_ANON | thp.THP | ANON_EXCLUSIVE)
    except NoMemory:
        return "alloc_huge_page_fail"
    core.count("thp_collapse_alloc")
    try:
        for index in swapped.tolist():
            entry = int(entries[index])
            if entry & GUARD or poisoned(entry) or is_hwpoison(entry):
                core.memory.free_folio(folio)
                return "fail"
            swapping.swap_in(
                core, mm, vma, first + index, entry, write=False, addr=addr + index * size, whole=False
            )
    except (NoMemory, AddressSpaceFault):
        core.memory.free_folio(folio)
        return "fail"
    if _met_twice(core, entries, waiting):
        core.memory.free_folio(folio)
        return "page_lock"
    _copy(core, mm, vma, addr, folio)
    waiting.clear()
    return "collapsed"


def _poisoned(entries: U64Array) -> BoolArray:
    found: BoolArray = (entries & np.uint64(FIELD | PRESENT | SWAP)) == np.uint64(POISON_MARKER)
    return found


def _met_twice(core: Core, entries: U64Array, waiting: list[int]) -> bool:
    """Whether a page is met that is mapped further up in the block, too: a merged one, locked since (rule KS-015).

    What was isolated from the LRU lists by then goes back, the last first, and is on none as long as it is `waiting`
    in a batch.
    """
    if not core.ksm.nodes:
        return False
    normal = ((entries & _PRESENT) != 0) & ((entries & _FIELD) != np.uint64(core.zero_pfn))
    pfns = (entries[normal] & _FIELD).view(np.int64)
    firsts = np.unique(pfns, return_index=True)[1]
    if len(firsts) == len(pfns):
        return False
    isolated = np.ones(len(pfns), dtype=np.bool_)
    isolated[firsts] = False
    heads = pfns[: int(np.argmax(isolated))]
    heads = heads - core.memory.frames.behind[heads]
    heads = heads[np.sort(np.unique(heads, return_index=True)[1])][::-1]
    lru.to_head(core, heads)
    for head in heads.tolist():
        waiting.append(head)
        if len(waiting) == _BATCH or core.memory.frames.flags_at[head] & COMPOUND:
            waiting.clear()
    return True


def _waiting(core: Core, entries: U64Array, waiting: list[int]) -> BoolArray:
    """Which entries, of those that map a page, map one that waits in a batch."""
    if not waiting:
        return np.zeros(len(entries), dtype=np.bool_)
    heads = (entries & _FIELD).view(np.int64)
    heads = np.where((entries & _PRESENT) != 0, heads, 0)
    return np.isin(heads - core.memory.frames.behind[heads], waiting)


def _shared(core: Core, pfns: np.ndarray[tuple[int], np.dtype[np.int64]]) -> BoolArray:
    """Which pages belong to folios that other processes map, too."""
    frames = core.memory.frames
    shared: BoolArray = frames.mapcount[pfns] > 1
    for index in np.flatnonzero((frames.flags[pfns] & np.uint64(COMPOUND)) != 0).tolist():
        folio = core.memory.large[int(pfns[index]) - int(frames.behind[pfns[index]])]
        shared[index] = folio.shared or len(folio.by_mm) > 1
    return shared


def _copy(core: Core, mm: AddressSpace, vma: VmArea, addr: int, folio: LargeFolio) -> None:
    frames, pages = core.memory.frames, core.geometry.pmd_pages
    first = mm.tables.pte_slot(addr)
    entries = core.pool.flat[first : first + pages]
    normal = ((entries & _PRESENT) != 0) & ((entries & _FIELD) != np.uint64(core.zero_pfn))
    index = np.flatnonzero(normal)
    pfns = (entries[index] & _FIELD).view(np.int64)
    rows = frames.content[pfns]
    # What nobody else maps gives its contents away; the rest, also what others may still read from swap, is copied.
    kept = np.uint64(COMPOUND | int(PageFlag.SWAPCACHE))
    alone = (frames.mapcount[pfns] == 1) & ((frames.flags[pfns] & kept) == 0)
    new = np.where(alone, rows, 0)
    new[~alone] = core.memory.contents.copies(rows[~alone])
    frames.content[pfns[alone]] = 0
    frames.content[folio.head + index] = new
    entries[:] = 0
    slot = mm.tables.pmd_slot(addr)
    row = core.pool.at[slot] & FIELD
    core.pool.at[slot] = 0
    mm.tables.tables[0] -= 1
    core.pool.give_back([row])
    mapping.remove_pages(core, mm, vma, pfns)
    thp.map_huge(core, mm, vma, folio, slot, write=True)
    core.pool.at[slot] |= DIRTY | core.soft_dirty  # also where the mapping may not be written
    core.count("collapse")
