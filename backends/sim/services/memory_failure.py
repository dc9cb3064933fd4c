"""Memory failure: frames that are taken out of use because what they hold is, or soon may be, corrupted.

Modelled for private anonymous memory, and for free frames; the entries that mapped a poisoned page are hwpoison entries
from then on, and whoever accesses one is sent SIGBUS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import COMPOUND, LargeFolio
from pmcore.backends.sim.services import migrate, thp
from pmcore.backends.sim.virtual import rmap
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, LEAF, PRESENT, SPECIAL, SWAP, is_hwpoison
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import AddressSpaceFault, NotModelled, SyscallError
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["hwpoison", "inject", "unpoison"]

_BUDDY, _HWPOISON, _DIRTY = int(PageFlag.BUDDY), int(PageFlag.HWPOISON), int(PageFlag.DIRTY)
_REFERENCED = int(PageFlag.REFERENCED)
#: What a page loses that is taken off its LRU list.
_LISTED = int(PageFlag.LRU | PageFlag.ACTIVE | PageFlag.UNEVICTABLE | PageFlag.MLOCKED)
_OTHER = int(PageFlag.SWAPCACHE | PageFlag.KSM | PageFlag.HUGE)
_KERNEL = int(PageFlag.RESERVED | PageFlag.SLAB | PageFlag.PGTABLE | PageFlag.ZERO_PAGE | PageFlag.OFFLINE)


def inject(core: Core, mm: AddressSpace, call: Call, start: int, end: int, *, soft: bool) -> None:
    """MADV_HWPOISON, or MADV_SOFT_OFFLINE, of each page of the range, until one is refused (rules HW-001 to HW-006).

    Raises AddressSpaceFault, all being done, where whoever asks had a dirty page poisoned.
    """
    if not core.privileged:
        refuse(Errno.EPERM, call, "memory is poisoned by the administrator only")
    _check(core, mm, call, start, end, soft=soft)
    signal: AddressSpaceFault | None = None
    try:
        for addr in range(start, end, core.geometry.page_size):
            pfn = _page(core, mm, call, addr)
            _refer(core, pfn)
            if soft:
                _soft_offline(core, pfn)
            elif _poison(core, pfn, mm) and signal is None:
                signal = AddressSpaceFault(
                    "SIGBUS", addr, "its page has been poisoned", lsb=core.geometry.page_shift
                )
    finally:
        if signal is not None:
            raise signal


def _page(core: Core, mm: AddressSpace, call: Call, addr: int) -> int:
    """The frame of the page at the address. Raises NotModelled for all but anonymous pages."""
    vma = mm.vmas.at(addr)
    if vma is None or not vma.flags & VmFlag.ACCESS:
        refuse(Errno.EFAULT, call, f"no page can be had at {addr:#x}")
    if vma.flags & VmFlag.HUGETLB:
        raise NotModelled("poisoning hugetlb pages")
    slot = mm.tables.pmd_slot(addr)
    pmd = core.pool.at[slot] if slot >= 0 else 0
    entry, within = pmd, addr >> core.geometry.page_shift & core.geometry.pmd_pages - 1
    if not pmd & LEAF:
        slot, within = mm.tables.leaf_slot(addr, 0), 0
        entry = core.pool.at[slot] if slot >= 0 else 0
    if is_hwpoison(entry):
        refuse(Errno.EFAULT, call, f"the page at {addr:#x} is poisoned")
    if not entry & PRESENT or entry & SPECIAL:
        raise NotModelled("poisoning what has to be faulted in, or the zero page")
    pfn = (entry & FIELD) + within
    _anonymous(core, pfn)
    return pfn


def _check(core: Core, mm: AddressSpace, call: Call, start: int, end: int, *, soft: bool) -> None:
    """Raise NotModelled if any page of the range, up to the first that is refused, is such: nothing is done then."""
    memory, pages, taken = core.memory, 0, set()
    for addr in range(start, end, core.geometry.page_size):
        try:
            pfn = _page(core, mm, call, addr)
        except SyscallError:
            break
        pages += 1
        folio = _folio(core, pfn)
        if folio is None:
            continue
        if folio.head in taken and memory.contents.zero(memory.frames.content[pfn : pfn + 1]).all():
            raise NotModelled(
                "poisoning the zero page, which takes the place of a huge page's page meanwhile"
            )
        taken.add(folio.head)
    if soft and memory.spare < pages:
        raise NotModelled("soft-offlining pages of a machine that has no others")


def _refer(core: Core, pfn: int) -> None:
    """Whoever gets hold of a page marks it as referenced."""
    folio = _folio(core, pfn)
    first, pages = (pfn, 1) if folio is None else (folio.head, folio.pages)
    core.memory.frames.set_bits(first, pages, _REFERENCED)


def _folio(core: Core, pfn: int) -> LargeFolio | None:
    frames = core.memory.frames
    return core.memory.large[pfn - frames.behind_at[pfn]] if frames.flags_at[pfn] & COMPOUND else None


def _anonymous(core: Core, pfn: int) -> None:
    """Raise NotModelled for any other page, or one that is known elsewhere."""
    flags = core.memory.frames.flags_at[pfn]
    if flags & _OTHER or not flags & int(PageFlag.ANON):
        raise NotModelled("poisoning pages of files, of the swap cache, and merged ones")


def _mappings(core: Core, pfns: range) -> rmap.Mappings:
    chosen = np.zeros(core.memory.frames.rows, dtype=np.bool_)
    chosen[pfns.start : pfns.stop] = True
    return rmap.find(core, core.spaces.values(), chosen)


def _apart(core: Core, pfn: int, *, keep: bool) -> None:
    """Take the folio of the page apart (rule HW-004). `keep`: the page stays, though it may hold nothing but zeros."""
    folio = _folio(core, pfn)
    if folio is None:
        return
    maps = _mappings(core, range(folio.head, folio.head + folio.pages))
    for place in np.flatnonzero(maps.huge).tolist():
        mm, addr = maps.mms[int(maps.owners[place])], int(maps.addresses[place])
        vma = mm.vmas.at(addr)
        assert vma is not None
        thp.split_pmd(core, mm, vma, addr, migrating=True)
    memory = core.memory
    if keep:  # what it holds is lost in any case
        memory.frames.content_at[pfn] = memory.contents.write(memory.frames.content_at[pfn], 0, b"\1")
    first, *others = (core.spaces[number] for number in sorted(folio.by_mm))
    thp.split_folio(core, first, folio, 0, others=others)


def _poison(core: Core, pfn: int, mm: AddressSpace | None) -> bool:
    """Poison an anonymous page; whether `mm` is sent a signal at once (rule HW-002)."""
    frames, flat = core.memory.frames, core.pool.flat
    folio = _folio(core, pfn)
    by_pmd = folio is None
    if folio is not None:
        maps = _mappings(core, range(folio.head, folio.head + 1))
        by_pmd = any(maps.huge[i] and maps.mms[int(maps.owners[i])] is mm for i in range(len(maps.huge)))
        if not maps.huge.any():  # unmapped on the way already, as if it were to be moved
            frames.flags_at[pfn] &= ~ANON_EXCLUSIVE
        _apart(core, pfn, keep=True)
        flat = core.pool.flat
    maps = _mappings(core, range(pfn, pfn + 1))
    if (flat[maps.slots] & np.uint64(DIRTY)).any():
        frames.flags_at[pfn] |= _DIRTY
    flat[maps.slots] = np.uint64(SWAP | core.caps.hwpoison_type | pfn << 5)
    frames.mapcount_at[pfn] = 0
    dirty = bool(frames.flags_at[pfn] & _DIRTY)
    _out_of_use(core, pfn)
    core.count("memory_failure")
    return dirty and by_pmd and mm is not None


def _out_of_use(core: Core, pfn: int) -> None:
    """The frame is nobody's any more, and stays what it was but for that."""
    memory, frames = core.memory, core.memory.frames
    frames.flags_at[pfn] = frames.flags_at[pfn] & ~_LISTED | _HWPOISON
    core.mlocks.pop(pfn, None)
    if frames.content_at[pfn]:
        memory.contents.give_back(frames.content[pfn : pfn + 1])
        frames.content_at[pfn] = 0
    frames.lru_at[pfn] = 0
    if memory.grouped:
        memory.charges.drop_one(pfn)


def _soft_offline(core: Core, pfn: int) -> None:
    """Move the page elsewhere, and take its frame out of use (rule HW-005)."""
    memory, frames = core.memory, core.memory.frames
    _apart(core, pfn, keep=False)
    if not frames.flags_at[pfn] & _BUDDY:
        old = np.array([pfn], dtype=np.int64)
        flags = frames.flags_at[pfn] & ~ANON_EXCLUSIVE
        if (core.pool.flat[_mappings(core, range(pfn, pfn + 1)).slots] & np.uint64(DIRTY)).any():
            flags |= _DIRTY
        migrate.move(core, *migrate.take(core, memory.zones, old, np.zeros(1, dtype=np.int64)))
    else:  # it held nothing but zeros, and the zero page is mapped instead
        memory.zone_of(pfn).take_off(pfn)
        flags = 0
    frames.flags_at[pfn] = flags
    _out_of_use(core, pfn)
    core.count("soft_offline")


def hwpoison(core: Core, pfns: U64Array) -> None:
    """Write frame numbers to hwpoison/corrupt-pfn: nobody is sent a signal (rule HW-006). Refused with EBUSY."""
    for pfn in pfns.tolist():
        call = f"hwpoison({pfn:#x})"
        zone = next((zone for zone in core.memory.zones if zone.start <= pfn < zone.end), None)
        if zone is None:
            refuse(Errno.ENXIO, call, "no such memory")
        flags = core.memory.frames.flags_at[pfn] if pfn < zone.frontier else _BUDDY
        if flags & _HWPOISON:
            refuse(Errno.EBUSY, call, "it is poisoned already")
        if flags & _BUDDY:
            zone.take_off(pfn)
            core.memory.frames.flags_at[pfn] = _HWPOISON
            core.count("memory_failure")
            continue
        if flags & _KERNEL:
            raise NotModelled("poisoning what the kernel itself uses")
        _anonymous(core, pfn)
        _poison(core, pfn, None)


def unpoison(core: Core, pfns: U64Array) -> None:
    """Write frame numbers to hwpoison/unpoison-pfn: they are free. Refused with EBUSY for one that is not poisoned.

    Raises NotModelled while there are hwpoison entries of it: they would stay.
    """
    frames = core.memory.frames
    for pfn in pfns.tolist():
        call = f"unpoison({pfn:#x})"
        if not 0 <= pfn < frames.rows or not frames.flags_at[pfn] & _HWPOISON:
            refuse(Errno.EBUSY, call, "it is not poisoned")
        word = np.uint64(SWAP | core.caps.hwpoison_type | pfn << 5)
        mask = np.uint64(PRESENT | SWAP | FIELD)
        for mm in core.spaces.values():
            for extent in mm.tables.extents(0, core.geometry.task_size):
                if ((extent.entries & mask) == word).any():
                    raise NotModelled("unpoisoning a page that entries still call poisoned")
        core.memory.free(pfn)
        core.count("unpoison")
