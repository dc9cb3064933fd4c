"""Faults in mappings of files: fault-around, pages of the cache, private copies.

`fault` is the law, one address at a time; `touch` does the same to whole ranges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.arrays import BoolArray
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.physical.runs import at
from pmcore.backends.sim.services import diskfile, filesystem, pagecache, readahead, shmem, userfaultfd
from pmcore.backends.sim.virtual import filepmd, mapping
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, LEAF, PRESENT, SWAP, UFFD_WP, WRITE, YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import hwpoison_entries
from pmcore.errors import AddressSpaceFault
from pmcore.uapi import MAX_SWAPFILES_SHIFT, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = [
    "cached_only",
    "dirty",
    "end_address",
    "fault",
    "fault_pmd",
    "inside",
    "told",
    "touch",
    "unprotect",
    "window",
]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
#: RECLAIM and the mark of readahead are one bit: fault-around leaves such pages alone.
_UPTODATE, _READAHEAD = np.uint64(PageFlag.UPTODATE), np.uint64(PageFlag.RECLAIM)
_IS_UPTODATE, _HWPOISON = int(PageFlag.UPTODATE), int(PageFlag.HWPOISON)
#: With UPTODATE alone of these a page of the cache is mapped around a fault.
_READY = int(PageFlag.UPTODATE | PageFlag.RECLAIM | PageFlag.HWPOISON | PageFlag.LOCKED)
#: Of a page that is on its way.
_LOCKED = int(PageFlag.LOCKED)
#: fault_around_bytes.
_AROUND = 1 << 16
#: Where nothing is mapped around a fault: who watches accesses is told of each.
_NO_AROUND = VmFlag.UFFD_WP | VmFlag.UFFD_MINOR
_WATCHED = VmFlag.UFFD_MISSING | VmFlag.UFFD_MINOR


def _page(core: Core, vma: VmArea, addr: int) -> int:
    """Which page of its file the address maps."""
    return vma.pgoff + (addr - vma.start >> core.geometry.page_shift)


def _end(core: Core, vma: VmArea) -> int:
    """Pages of the file: accesses from there on are SIGBUS."""
    assert vma.file is not None
    return vma.file.size + core.geometry.page_size - 1 >> core.geometry.page_shift


def fault(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    addr: int,
    slot: int,
    pte: int,
    *,
    write: bool,
    fresh: bool = False,
) -> None:
    """An access to an address whose entry is empty, or a uffd-wp marker; `fresh`: its page table was made for it."""
    inode = vma.file
    assert inode is not None
    if not write and not vma.flags & _NO_AROUND:
        fresh = not map_around(core, mm, vma, addr, fresh=fresh) and fresh
        if core.pool.at[slot] & PRESENT:
            return
    page = _page(core, vma, addr)
    if page >= _end(core, vma):
        if write and not vma.flags & VmFlag.SHARED:
            mm.prepare_anon(vma)  # what a copy needs comes first
        raise _behind(addr)
    if vma.flags & _WATCHED:
        _tell(core, mm, vma, addr, page, write=write)
    protected = pte & UFFD_WP
    shared = vma.flags & VmFlag.SHARED
    if write and not shared:
        mm.prepare_anon(vma)
    if vma.opened is not None:

        def again() -> None:
            if not write and not vma.flags & _NO_AROUND:
                map_around(core, mm, vma, addr, fresh=fresh)

        readahead.for_fault(core, vma, page, again, anew=mm.populating)
        if core.pool.at[slot] & PRESENT:
            return
    frames = core.memory.frames
    retried = fresh and inode.on_disk and not write and not vma.flags & _NO_AROUND
    if retried:
        word = inode.index.get(page)
        retried = not (word & PRESENT and frames.flags_at[word & FIELD] & _UPTODATE)
    pfn = filesystem.get_page(core, inode, page)
    if frames.flags_at[pfn] & _LOCKED:
        raise AddressSpaceFault("SIGSTOP", addr, "the access waits for the end of a migration")
    if frames.flags_at[pfn] & _HWPOISON:
        raise AddressSpaceFault("SIGBUS", addr, "the file's page is poisoned", lsb=core.geometry.page_shift)
    if (
        retried
    ):  # who waits for a disk begins again: the page that has come makes a page table for those around it
        map_around(core, mm, vma, addr, fresh=True)
        if core.pool.at[slot] & PRESENT:
            return
    if write and not shared:
        copy = mapping.take_page(core, vma)
        if frames.content_at[pfn]:
            frames.content_at[copy] = core.memory.contents.copy_one(frames.content_at[pfn])
        frames.mapcount_at[copy] = 1
        entry = copy | PRESENT | YOUNG | DIRTY | core.soft_dirty | protected
        core.pool.at[slot] = entry if protected else entry | WRITE
        core.count("copy_on_write")
        return
    entry = pfn | PRESENT | YOUNG | protected
    large = frames.flags_at[pfn] & COMPOUND
    if write:
        entry |= DIRTY | core.soft_dirty | (0 if protected else WRITE)
        if inode.on_disk:
            told(core, vma, addr, pfn)
        dirty(core, pfn)
    elif not protected and filepmd.may_write(core, vma):
        entry |= WRITE
    if large and _map_folio(core, mm, vma, addr, page, entry ^ pfn):
        return
    mapping.add_page(core, mm, pfn)
    if vma.flags & VmFlag.LOCKED and not large:
        mapping.mlock(core, pfn, 1)
    core.pool.at[slot] = entry


def fault_pmd(core: Core, mm: AddressSpace, vma: VmArea, addr: int, *, write: bool) -> bool:
    """An access where there is no page table: map the huge page that the file has there by a PMD, if it can be.

    What lies behind the end of the file is mapped with it where a read comes to it by fault-around.
    """
    slot = mm.tables.pmd_slot(addr)
    mapped = slot >= 0 and bool(core.pool.at[slot] & LEAF)  # by those who looked who is to be told
    if not mapped:
        if write and not vma.flags & VmFlag.SHARED:
            return False
        folio = filepmd.folio_at(core, vma, _page(core, vma, addr))
        if folio is None or not filepmd.map_pmd(
            core, mm, vma, addr, folio, write=write, writable=filepmd.may_write(core, vma)
        ):
            return False
        told = int(PageFlag.UPTODATE) | (int(PageFlag.DIRTY) if write else 0)
        core.memory.frames.set_bits(folio.head, folio.pages, told)
    if core.on_fault is not None:
        core.on_fault(mm, addr, write)
    return True


def dirty(core: Core, pfn: int) -> None:
    """The page was written, and with it the folio that it belongs to."""
    frames = core.memory.frames
    if frames.flags_at[pfn] & COMPOUND:
        folio = core.memory.large[pfn - frames.behind_at[pfn]]
        frames.set_bits(folio.head, folio.pages, int(PageFlag.DIRTY))
    else:
        frames.flags_at[pfn] |= int(PageFlag.DIRTY)


def _map_folio(core: Core, mm: AddressSpace, vma: VmArea, addr: int, page: int, bits: int) -> bool:
    """Map all of the large folio that the page belongs to by PTEs, if none of them is there (finish_fault)."""
    folio = filepmd.folio_at(core, vma, page)
    if folio is None or not core.caps.fault_maps_folio or vma.uffd is not None:
        return False
    start = filepmd.place_of(core, vma, addr, folio)
    if start < 0:
        return False
    slot = mm.tables.pte_slot(start)
    entries = core.pool.flat[slot : slot + folio.pages]
    if entries.any():
        return False
    pfns = np.arange(folio.head, folio.head + folio.pages, dtype=np.int64)
    mapping.add_pages(core, mm, pfns)
    entries[:] = pfns.view(np.uint64) | np.uint64(bits)
    _lock(core, vma, pfns)
    return True


def _lock(core: Core, vma: VmArea, pfns: Pfns) -> None:
    """Pages were mapped in a VMA: if it is locked, so are they; of large folios those that are mapped whole at once."""
    if not vma.flags & VmFlag.LOCKED:
        return
    frames = core.memory.frames
    compound = (frames.flags[pfns] & np.uint64(COMPOUND)) != 0
    for pfn in pfns[~compound].tolist():
        mapping.mlock(core, pfn, 1)
    if core.caps.mlock_whole_folios and compound.any():
        heads, counts = np.unique(pfns[compound] - frames.behind[pfns[compound]], return_counts=True)
        for head, count in zip(heads.tolist(), counts.tolist(), strict=True):
            if core.memory.large[head].pages == count:
                mapping.mlock(core, head, count)


def told(core: Core, vma: VmArea, addr: int, pfn: int) -> None:
    """Tell the file system that a page of its disk is written through the shared mapping (page_mkwrite)."""
    assert vma.file is not None
    diskfile.written_one(core, vma.file, _page(core, vma, addr), pfn)


def _behind(addr: int) -> AddressSpaceFault:
    return AddressSpaceFault("SIGBUS", addr, "the file ends before that page")


def _tell(core: Core, mm: AddressSpace, vma: VmArea, addr: int, page: int, *, write: bool) -> None:
    """Whoever is told of missing pages, or of those that the file has, has to answer. Raises AddressSpaceFault."""
    assert vma.file is not None
    if write and not vma.flags & VmFlag.SHARED:
        mm.prepare_anon(vma)
    if vma.flags & (VmFlag.UFFD_MINOR if vma.file.index.get(page) else VmFlag.UFFD_MISSING):
        raise userfaultfd.blocked(vma, addr)


def inside(core: Core, mm: AddressSpace, vma: VmArea, addr: int, *, write: bool) -> None:
    """Refuse an access behind the end of the file, or that somebody has to answer for, before there is a page table."""
    if _page(core, vma, addr) >= _end(core, vma):
        if not write and not vma.flags & _NO_AROUND:
            map_around(core, mm, vma, addr)
            slot = mm.tables.pmd_slot(addr)
            if slot >= 0 and core.pool.at[slot] & LEAF:
                return  # a huge page that reaches beyond the end
        elif write and not vma.flags & VmFlag.SHARED:
            mm.prepare_anon(vma)
        raise _behind(addr)
    if vma.flags & _WATCHED and (write or vma.flags & _NO_AROUND or not map_around(core, mm, vma, addr)):
        _tell(core, mm, vma, addr, _page(core, vma, addr), write=write)


def end_address(core: Core, vma: VmArea) -> int:
    """Where the pages of the file end in the VMA, or would."""
    return vma.start + (_end(core, vma) - vma.pgoff << core.geometry.page_shift)


def window(core: Core, vma: VmArea, addr: int) -> tuple[int, int]:
    """What a read fault at the address maps around it: sixteen pages from an aligned place or the VMA's start on."""
    around = max(_AROUND, core.geometry.page_size)
    table = addr & -core.geometry.pmd_size
    low = max(addr & -around, vma.start, table)
    return low, min(low + around, vma.end, table + core.geometry.pmd_size)


def map_around(core: Core, mm: AddressSpace, vma: VmArea, addr: int, *, fresh: bool = False) -> bool:
    """Map the pages of the cache around the address whose entries are empty (do_fault_around); whether any was."""
    return _map_cached(core, mm, vma, *window(core, vma, addr), fresh=fresh)


def _map_cached(
    core: Core, mm: AddressSpace, vma: VmArea, low: int, high: int, *, fresh: bool = False
) -> bool:
    """Map what is in the cache and up to date of one range below one PMD, where entries are empty; whether any was."""
    assert vma.file is not None
    first, end = _page(core, vma, low), _end(core, vma)
    count = min(high - low >> core.geometry.page_shift, end - first)
    if count <= 0:
        return False
    frames = core.memory.frames
    # Sixteen pages at most: one by one is faster than arrays.
    words = vma.file.index.load(first, count).tolist()
    ready = [
        (place, word & FIELD)
        for place, word in enumerate(words)
        if word & PRESENT and frames.flags_at[word & FIELD] & _READY == _IS_UPTODATE
    ]
    if not ready:
        return False
    slot = mm.tables.pte_slot(low)
    if (
        (slot < 0 or fresh)
        and vma.file.on_disk
        and core.caps.around_last_page_no_table
        and ready[0][0] >= end - first - 1
    ):
        return False  # a page table comes with what could be part of a larger folio: not with the last page of the file
    if core.memory.large and any(frames.flags_at[pfn] & COMPOUND for _, pfn in ready):
        return _map_large(core, mm, vma, low, words, [place for place, _ in ready])
    if slot >= 0:
        at = core.pool.at
        ready = [(place, pfn) for place, pfn in ready if not at[slot + place]]
        if not ready:
            return False
    slot, at = mm.tables.make_pte_slot(low), core.pool.at
    bits = PRESENT | YOUNG | (WRITE if filepmd.may_write(core, vma) else 0)
    for place, pfn in ready:
        frames.mapcount_at[pfn] += 1
        if vma.flags & VmFlag.LOCKED:
            mapping.mlock(core, pfn, 1)
        at[slot + place] = pfn | bits
    return True


def _map_large(
    core: Core, mm: AddressSpace, vma: VmArea, low: int, words: list[int], places: list[int]
) -> bool:
    """`_map_cached` of pages some of which belong to large folios: by a PMD, or all of a folio if it fits."""
    frames, size = core.memory.frames, core.geometry.page_size
    pfns = (np.array(words, dtype=np.uint64) & _FIELD).view(np.int64)
    ready = np.zeros(len(pfns), dtype=np.bool_)
    ready[places] = True
    first = int(np.argmax(ready))
    addr = low + first * size
    folio = filepmd.folio_at(core, vma, _page(core, vma, addr))
    slot = mm.tables.pmd_slot(addr)
    if (
        folio is not None
        and not (slot >= 0 and core.pool.at[slot])
        and filepmd.map_pmd(core, mm, vma, addr, folio, write=False, writable=filepmd.may_write(core, vma))
    ):
        return True
    assert vma.file is not None
    begin, end = low, low + len(pfns) * size
    compound = ready & ((frames.flags[pfns] & np.uint64(COMPOUND)) != 0)
    if core.caps.around_maps_folio and compound.any():
        heads = np.unique(pfns[compound] - frames.behind[pfns[compound]])
        for head in heads.tolist():
            folio = core.memory.large[head]
            within = int(frames.index[head]) - vma.pgoff
            start = filepmd.place_of(core, vma, vma.start + within * size, folio)
            if start >= 0:
                begin, end = min(begin, start), max(end, start + folio.pages * size)
        around = vma.file.index.load(_page(core, vma, begin), end - begin >> core.geometry.page_shift)
        offset = low - begin >> core.geometry.page_shift
        wider = np.zeros(len(around), dtype=np.bool_)
        wider[offset : offset + len(pfns)] = ready
        pfns = (around & _FIELD).view(np.int64)
        there = (around & _PRESENT) != 0
        wider[there] |= np.isin(pfns[there] - frames.behind[pfns[there]], heads)
        ready = wider
    slot = mm.tables.pte_slot(begin)
    if slot >= 0:
        ready &= core.pool.flat[slot : slot + len(ready)] == 0
    if not ready.any():
        return False
    slot = mm.tables.make_pte_slot(begin)
    core.pool.flat[slot : slot + len(ready)][ready] = _map(core, mm, vma, pfns[ready])
    return True


def _map(core: Core, mm: AddressSpace, vma: VmArea, pfns: Pfns) -> U64Array:
    """Count one mapping more of each page of the cache; the entries for them, not written."""
    mapping.add_pages(core, mm, pfns)
    _lock(core, vma, pfns)
    bits = PRESENT | YOUNG | (WRITE if filepmd.may_write(core, vma) else 0)
    entries: U64Array = pfns.view(np.uint64) | np.uint64(bits)
    return entries


def touch(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, *, write: bool) -> int:
    """Access neighbouring pages whose entries are all empty, as one after the other; how many pages were done.

    Fewer than all where the file ends, a page lies in swap or comes from fallocate, or a private copy is to be made.
    """
    inode = vma.file
    assert inode is not None
    if vma.flags & (VmFlag.UFFD_MISSING | VmFlag.UFFD_MINOR):
        return 0
    if write and not vma.flags & VmFlag.SHARED:
        return _copy_cached(core, mm, vma, start, end)
    shift = core.geometry.page_shift
    first = _page(core, vma, start)
    count = min(end - start >> shift, _end(core, vma) - first)
    if count <= 0:
        return 0
    slot = mm.tables.pte_slot(start)
    ahead = readahead.stops(core, vma)
    mapped = core.pool.flat[slot : slot + count]
    if mapped.any():  # an access before this one has mapped some of them
        count = int(np.argmax(mapped != 0))
        if not ahead or not count:
            return 0
    words = inode.index.load(first, count)
    swapped = bool(words[0] & np.uint64(SWAP))
    if swapped:
        words = words[: pagecache.run(words)]
        count = len(words)
        if not shmem.simple(core, words):
            return 0
    bare = not swapped and not ahead and not words.any()
    if not swapped and not bare:
        count = _ready(core, words, ahead=ahead)
        words = words[:count]
    if not count:
        return 0
    pages, short = np.arange(first, first + count, dtype=np.int64), False
    pfns = (words & _FIELD).view(np.int64)
    cached = words != 0
    if swapped:
        cached[:] = False
        pfns = shmem.swap_in_many(core, inode, pages, words)
        short = len(pfns) < count
    elif bare or not cached.any():
        pfns = filesystem.fill_holes(core, inode, pages)
        short = len(pfns) < count
    elif not cached.all():
        holes = np.flatnonzero(~cached)
        made = filesystem.fill_holes(core, inode, pages[holes])
        pfns[holes[: len(made)]] = made
        if len(made) < len(holes):
            pfns, short = pfns[: int(holes[len(made)])], True
    count = len(pfns)
    slot = mm.tables.pte_slot(start)
    entries = core.pool.flat[slot : slot + count]
    np.bitwise_or(
        _map(core, mm, vma, pfns), np.uint64(DIRTY | WRITE | core.soft_dirty if write else 0), out=entries
    )
    if write:
        filesystem.written(core, inode, pages[:count], pfns)
    elif not vma.flags & VmFlag.UFFD_WP:
        _map_outside(core, mm, vma, start, cached[:count])
    if short:
        raise NoMemory
    return count


def _copy_cached(core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int) -> int:
    """Write to pages of a private mapping whose entries are empty: copies of the cache, as far as it has them all."""
    inode, memory = vma.file, core.memory
    assert inode is not None
    first = _page(core, vma, start)
    count = min(end - start >> core.geometry.page_shift, _end(core, vma) - first)
    slot = mm.tables.pte_slot(start)
    if count <= 0 or vma.flags & VmFlag.LOCKED or core.pool.flat[slot : slot + count].any():
        return 0
    words = inode.index.load(first, count)
    present = (words & _PRESENT) != 0
    count = count if present.all() else int(np.argmin(present))
    count = _ready(core, words[:count], ahead=readahead.stops(core, vma)) if count else 0
    if not count:
        return 0
    mm.prepare_anon(vma)
    copies = memory.pages(count, mapping.NEW_ANON | ANON_EXCLUSIVE)
    memory.on_lru_pages(copies)
    frames, pfns = memory.frames, (words[: len(copies)] & _FIELD).view(np.int64)
    frames.content[copies] = memory.contents.copies(frames.content[pfns])
    frames.mapcount[copies] = 1
    bits = np.uint64(PRESENT | YOUNG | DIRTY | WRITE | core.soft_dirty)
    core.pool.flat[slot : slot + len(copies)] = copies.view(np.uint64) | bits
    if len(copies):
        core.count("copy_on_write", len(copies))
    if len(copies) < count:
        raise NoMemory
    return count


def _ready(core: Core, words: U64Array, *, ahead: bool) -> int:
    """How many pages of a file, from the first on, are up to date or (unless reading goes `ahead`) holes."""
    flags = core.memory.frames.flags
    wanted = (_UPTODATE | _READAHEAD if ahead else _UPTODATE) | np.uint64(_HWPOISON | _LOCKED)
    large = np.uint64(COMPOUND if core.memory.large else 0)  # those are mapped at one fault
    present = (words & _PRESENT) != 0
    if present.all():
        odd = (at(flags, (words & _FIELD).view(np.int64)) & (wanted | large)) != _UPTODATE
    else:
        odd = ~present if ahead else ~present & (words != 0)
        odd[present] = (flags[(words[present] & _FIELD).view(np.int64)] & (wanted | large)) != _UPTODATE
    return int(np.argmax(odd)) if odd.any() else len(words)


def unprotect(core: Core, vma: VmArea, start: int, entries: U64Array) -> None:
    """First writes through a shared mapping to neighbouring pages that are there; protection resolves itself."""
    assert vma.file is not None
    watched = (entries & np.uint64(UFFD_WP)) != 0
    if watched.any():
        entries &= np.uint64(~UFFD_WP & (1 << 64) - 1)
        core.count("wp_async", int(np.count_nonzero(watched)))
    entries |= np.uint64(DIRTY | WRITE | YOUNG | core.soft_dirty)
    first = _page(core, vma, start)
    pages = np.arange(first, first + len(entries), dtype=np.int64)
    filesystem.written(core, vma.file, pages, (entries & _FIELD).view(np.int64))


def _map_outside(core: Core, mm: AddressSpace, vma: VmArea, start: int, cached: BoolArray) -> None:
    """What read faults in neighbouring pages from `start` on, `cached` or not, mapped around them outside the range."""
    shift = core.geometry.page_shift
    map_around(core, mm, vma, start)
    first_end = window(core, vma, start)[1]
    last = start + (len(cached) - 1 << shift)
    low = max(last & -max(_AROUND, 1 << shift), start)
    if last >= first_end or not cached[low - start >> shift :].all():
        map_around(core, mm, vma, last)


def cached_only(core: Core, entries: U64Array) -> BoolArray:
    """Which entries map a page of a file's cache (the others: nothing, swap, private copies)."""
    found: BoolArray = (entries & _PRESENT) != 0
    pfns = (entries[found] & _FIELD).view(np.int64)
    found[found] = (core.memory.frames.flags[pfns] & np.uint64(CACHED)) != 0
    if core.names_frames:  # a poisoned page, or one that is on its way
        named = np.flatnonzero(hwpoison_entries(entries))
        pfns = (entries[named] & _FIELD).view(np.int64) >> MAX_SWAPFILES_SHIFT
        found[named] = (core.memory.frames.flags[pfns] & np.uint64(PageFlag.ANON)) == 0
    return found
