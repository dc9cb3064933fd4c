"""Accesses to many pages at once: the same as one access after the other, page by page, in ascending order."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.backends.sim.services import mthp, readahead, swapping, thp, userfaultfd
from pmcore.backends.sim.virtual import fault, filemap, filepmd, hugetlb, mapping, protected, zap
from pmcore.backends.sim.virtual.pte import DIRTY, LEAF, PRESENT, SPECIAL, UFFD_WP, WRITE, YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["touch"]

_PRESENT, _WRITE = np.uint64(PRESENT), np.uint64(WRITE)
#: Below this many pages one access after the other is faster.
_FEW = 6
#: Sorts of runs of entries, behind those of swap areas.
_PROTECTED, _MARKER = 40, 41
#: Whose faults are told to somebody: no page table is made before the first of them is answered.
_WATCHED = VmFlag.UFFD_MISSING | VmFlag.UFFD_MINOR


def touch(core: Core, mm: AddressSpace, start: int, end: int, *, write: bool) -> None:
    """Access one byte of every page from `start` (inside a page) to `end`. Raises as `access` does."""
    size = core.geometry.page_size
    while start < end:
        vma = fault.find(mm, start, write=write)
        stop = min(vma.end, end)
        if vma.flags & VmFlag.HUGETLB:
            hugetlb.touch(core, mm, vma, start, stop, write=write)
        elif stop - start <= _FEW * size or vma.flags & _WATCHED:
            for addr in range(start, stop, size):
                fault.access(core, mm, addr, write=write, vma=vma)
        else:
            _reclaiming(core, mm, vma, start & -size, -(-stop // size) * size, start & size - 1, write=write)
        start = (stop + size - 1 & -size) + (start & size - 1)


def _reclaiming(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, lead: int, *, write: bool
) -> None:
    """`_in_vma`; where memory runs out some is reclaimed, and it goes on at the page that got none."""
    while True:
        try:
            _in_vma(core, mm, vma, start, end, lead, write=write)
        except NoMemory:
            # Found before anything is reclaimed: until then all that was touched is there.
            start = _first_missing(mm, start, end, write=write)
            if not core.relieve(end - start >> core.geometry.page_shift):
                raise
        else:
            return


def _first_missing(mm: AddressSpace, start: int, end: int, *, write: bool) -> int:
    """The first page of the range that is not there for such an access."""
    wanted = np.uint64(PRESENT | WRITE if write else PRESENT)
    for extent in mm.tables.extents(start, end):
        if extent.start > start:
            return start
        missing = (extent.entries & wanted) != wanted
        if missing.any():
            return max(start, extent.start + int(np.argmax(missing)) * extent.size)
        start = extent.end
    return min(start, end)


def _in_vma(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, lead: int, *, write: bool
) -> None:
    """Whole pages of one VMA that allows the access; `lead` is where in each page."""
    pmd_size = core.geometry.pmd_size
    huge = core.caps.thp and thp.order_allowed(core, vma, -(-vma.start // pmd_size) * pmd_size)
    large = vma.file is not None and filepmd.any_large(core, vma, start, end)
    while start < end:
        # Blocks that may become huge pages, or are, go one by one; the rest in one piece of up to 1 GiB of PTEs.
        slot = mm.tables.pmd_slot(start)
        pmd = core.pool.at[slot] if slot >= 0 else 0
        block_end = (start & -pmd_size) + pmd_size
        if (
            pmd & LEAF
            or (huge and not pmd and thp.order_allowed(core, vma, start))
            or (large and not pmd and filepmd.any_large(core, vma, start, min(block_end, end)))
        ):
            fault.access(core, mm, start + lead, write=write)
            slot = mm.tables.pmd_slot(start)
            pmd = core.pool.at[slot]
            if pmd & LEAF and (not write or pmd & WRITE):
                core.pool.at[slot] = pmd | (YOUNG | DIRTY if write else YOUNG)
                start = min(block_end, end)
                continue
        stop = min(end, block_end if huge or large else start + (core.geometry.pmd_pages * pmd_size))
        if not huge and not large:
            stop = _before_leaf(core, mm, start, stop)
        if vma.file is not None:
            # No page table is made for what lies behind the end of the file.
            size = core.geometry.page_size
            stop = min(stop, max(filemap.end_address(core, vma), start))
            if stop == start:
                fault.access(core, mm, start + lead, write=write)
                start += size  # already mapped: a private copy outlives its page
                continue
        mm.tables.make(start, stop)
        for extent in mm.tables.extents(start, stop):
            _ptes(core, mm, vma, extent.start, len(extent.entries), lead, write=write)
        start = stop


def _before_leaf(core: Core, mm: AddressSpace, start: int, end: int) -> int:
    """The end of the range, or the first huge page in it."""
    for extent in mm.tables.extents(start, end):
        if extent.huge and extent.start > start:
            return extent.start
    return end


def _ptes(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, count: int, lead: int, *, write: bool
) -> None:
    """PTEs of one extent. Fresh and writable ones as arrays; the others one by one, in their place in the order."""
    size = core.geometry.page_size
    slot = mm.tables.pte_slot(start)
    entries = core.pool.flat[slot : slot + count]
    if vma.file is not None:
        _file(core, mm, vma, start, entries, lead, write=write)
        return
    present = (entries & _PRESENT) != 0
    fresh = entries == 0
    easy = present | fresh if not write else (present & ((entries & _WRITE) != 0)) | fresh
    if vma.flags & VmFlag.UFFD_MISSING:
        easy &= ~fresh
    orders = mthp.orders(core, vma) if write else 0
    if easy.all():
        if orders and fresh.any():
            _large(core, mm, vma, start, slot, count, orders)
        else:
            _tell(core, mm, start, fresh, write=write)
            _easy(core, mm, vma, entries, fresh, write=write)
        return
    # Runs of one sort, in the order of the addresses: easy, swapped out (by area), anything else one by one.
    sort = easy.astype(np.int8)
    swapped = zap.swap_entries(entries)
    if swapped.any() and not (write and vma.flags & VmFlag.UFFD_WP):
        chosen = swapping.simple(core, vma, entries, swapped)
        sort[chosen] = 2 + (entries[chosen] & np.uint64(0x1F)).astype(np.int8)
    if write and core.on_fault is None and not vma.flags & VmFlag.LOCKED:
        sort[protected.simple(core, vma, entries)] = _PROTECTED
        if not orders:
            sort[protected.markers(vma, entries)] = _MARKER
    bounds = [0, *(np.flatnonzero(np.diff(sort)) + 1).tolist(), count]
    for low, high in itertools.pairwise(bounds):
        slot = mm.tables.pte_slot(start + low * size)
        part = core.pool.flat[slot : slot + high - low]
        if sort[low] == 1 and orders:
            _large(core, mm, vma, start + low * size, slot, high - low, orders)
        elif sort[low] == 1:
            _tell(core, mm, start + low * size, fresh[low:high], write=write)
            _easy(core, mm, vma, part, fresh[low:high], write=write)
        elif sort[low] in (_PROTECTED, _MARKER) and high - low > _FEW:
            write_many = protected.write_many if sort[low] == _PROTECTED else protected.fill_many
            write_many(core, mm, vma, part)
        elif 2 <= sort[low] < _PROTECTED and high - low > _FEW:
            _tell(core, mm, start + low * size, swapped[low:high], write=write)
            swapping.swap_in_many(core, mm, vma, part, write=write)
            if write:  # what the mapping's flags kept from being writable at once is asked again
                for index in np.flatnonzero((part & _WRITE) == 0).tolist():
                    fault.access(core, mm, start + (low + index) * size + lead, write=True)
        else:
            for index in range(low, high):
                fault.access(core, mm, start + index * size + lead, write=write)


def _tell(core: Core, mm: AddressSpace, start: int, chosen: BoolArray, *, write: bool) -> None:
    """Tell whoever observes that the chosen pages, from `start` on, are faulted in."""
    if core.on_fault is not None:
        index = np.flatnonzero(chosen).astype(np.uint64)
        core.on_fault(mm, np.uint64(start) + index * np.uint64(core.geometry.page_size), write)


def _large(core: Core, mm: AddressSpace, vma: VmArea, start: int, slot: int, count: int, orders: int) -> None:
    """Writes to `count` pages that are empty or writable, where a fault may map more than one page."""
    mm.prepare_anon(vma)
    if core.on_fault is not None or core.memory.spare < count + (1 << orders.bit_length()):
        # Whoever observes is told of each, and memory may run out at any of them.
        for addr in range(start, start + count * core.geometry.page_size, core.geometry.page_size):
            fault.access(core, mm, addr, write=True)
        return
    mthp.fault_many(core, mm, vma, start, slot, count, orders)
    core.pool.flat[slot : slot + count] |= np.uint64(YOUNG | DIRTY)


def _file(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    start: int,
    entries: U64Array,
    lead: int,
    *,
    write: bool,
) -> None:
    """PTEs of a mapping of a file: runs of empty entries, of ones that allow the access, and of all others."""
    size = core.geometry.page_size
    wanted = _PRESENT | (_WRITE if write else np.uint64(0))
    sort = np.ones(1, dtype=np.int8)
    bounds = [0, len(entries)]
    if entries.any():
        allowed = (entries & wanted) == wanted
        sort = allowed.view(np.int8) << 1
        if not allowed.all():
            sort[entries == 0] = 1
            if write and vma.flags & VmFlag.SHARED:
                resolves = vma.flags & VmFlag.UFFD_WP and userfaultfd.resolves_itself(vma)
                told = np.uint64(0 if resolves and core.on_fault is None else UFFD_WP)
                sort[(entries & (wanted | told)) == _PRESENT] = 3
            elif write and core.on_fault is None and not vma.flags & VmFlag.LOCKED:
                sort[protected.simple(core, vma, entries)] = _PROTECTED
            bounds[1:1] = (np.flatnonzero(np.diff(sort)) + 1).tolist()
    for low, high in itertools.pairwise(bounds):
        place = low
        if sort[low] == 1:
            place += filemap.touch(core, mm, vma, start + low * size, start + high * size, write=write)
            _tell(core, mm, start + low * size, np.ones(place - low, dtype=np.bool_), write=write)
            if place < high and (
                readahead.stops(core, vma)
                or filepmd.any_large(core, vma, start + place * size, start + high * size)
            ):
                _ahead(core, mm, vma, start, place, high, lead, write=write)
                continue
        elif sort[low] == 2:
            slot = mm.tables.pte_slot(start)
            core.pool.flat[slot + low : slot + high] |= np.uint64(YOUNG | DIRTY if write else YOUNG)
            continue
        elif sort[low] == _PROTECTED and high - low > _FEW:
            slot = mm.tables.pte_slot(start)
            protected.write_many(core, mm, vma, core.pool.flat[slot + low : slot + high])
            continue
        elif sort[low] == 3:
            slot = mm.tables.pte_slot(start)
            _tell(core, mm, start + low * size, np.ones(high - low, dtype=np.bool_), write=True)
            filemap.unprotect(core, vma, start + low * size, core.pool.flat[slot + low : slot + high])
            continue
        for index in range(place, high):
            fault.access(core, mm, start + index * size + lead, write=write)


def _ahead(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    start: int,
    place: int,
    high: int,
    lead: int,
    *,
    write: bool,
) -> None:
    """Accesses to pages `place` to `high` from `start` that may read ahead: a fault, then what it mapped."""
    size = core.geometry.page_size
    wanted = _PRESENT | (_WRITE if write else np.uint64(0))
    while place < high:
        slot = mm.tables.pte_slot(start)
        entries = core.pool.flat[slot + place : slot + high]
        missing = np.flatnonzero((entries & wanted) != wanted)
        done = int(missing[0]) if len(missing) else len(entries)
        if done:
            entries[:done] |= np.uint64(YOUNG | DIRTY if write else YOUNG)
        else:
            done = filemap.touch(core, mm, vma, start + place * size, start + high * size, write=write)
            _tell(core, mm, start + place * size, np.ones(done, dtype=np.bool_), write=write)
        if not done:
            fault.access(core, mm, start + place * size + lead, write=write)
            done = 1
        place += done


def _easy(
    core: Core, mm: AddressSpace, vma: VmArea, entries: U64Array, fresh: np.ndarray, *, write: bool
) -> None:
    bits = np.uint64(YOUNG | DIRTY if write else YOUNG)
    missing = int(np.count_nonzero(fresh))
    if missing == 0:
        entries |= bits
        return
    if not write:
        entries[fresh] = core.zero_pfn | PRESENT | SPECIAL
        entries |= bits
        return
    mm.prepare_anon(vma)
    flags = mapping.NEW_ANON | ANON_EXCLUSIVE | (mapping.MLOCKED if vma.flags & VmFlag.LOCKED else 0)
    pfns = core.memory.pages(missing, flags)
    got = len(pfns)
    frames = core.memory.frames
    frames.mapcount[pfns] = 1
    core.memory.on_lru_pages(pfns)
    new = pfns.view(np.uint64) | np.uint64(
        PRESENT | YOUNG | DIRTY | core.soft_dirty | (WRITE if vma.flags & VmFlag.WRITE else 0)
    )
    if missing == len(entries) == got:
        entries[:] = new
        return
    where = np.flatnonzero(fresh)
    entries[where[:got]] = new
    if got < missing:
        entries[: where[got]] |= bits
        raise NoMemory
    entries |= bits
