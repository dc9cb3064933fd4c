"""Accesses and page faults: what reading or writing an address does to its entry.

`access` is the law, one address at a time; `touch.py` does the same to whole ranges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.services import mthp, swapping, thp, userfaultfd
from pmcore.backends.sim.virtual import filemap, filepmd, hugetlb, mapping
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    GUARD,
    LEAF,
    PRESENT,
    SPECIAL,
    TABLE,
    UFFD_WP,
    WRITE,
    YOUNG,
    is_hwpoison,
    is_marker,
    poisoned,
)
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import AddressSpaceFault
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["access", "find", "segfault"]

_SWAPCACHE, _KSM = int(PageFlag.SWAPCACHE), int(PageFlag.KSM)


def segfault(addr: int, cause: str) -> AddressSpaceFault:
    """SIGSEGV at the address."""
    return AddressSpaceFault("SIGSEGV", addr, cause)


def find(mm: AddressSpace, addr: int, *, write: bool) -> VmArea:
    """The VMA that allows the access. Raises AddressSpaceFault."""
    vma = mm.vmas.at(addr)
    if vma is None:
        vma = mm.grow_stack(addr)
        if vma is None:
            raise segfault(addr, "nothing is mapped there")
    if write:
        if not vma.flags & VmFlag.WRITE:
            raise segfault(addr, "the mapping may not be written")
    elif not vma.flags & VmFlag.ACCESS:
        raise segfault(addr, "the mapping may not be accessed")
    elif mm.has_key(vma):
        raise segfault(addr, "the mapping may only be executed: its protection key forbids to read it")
    return vma


def access(core: Core, mm: AddressSpace, addr: int, *, write: bool, vma: VmArea | None = None) -> int:
    """One access; the PFN that it reached. Where memory runs out, some is reclaimed and the access tried again.

    `vma`: the one that allows it, if that is known.
    Raises AddressSpaceFault, with everything before it done; NoMemory if nothing could be reclaimed.
    """
    while True:
        try:
            return _access(core, mm, vma or find(mm, addr, write=write), addr, write=write)
        except NoMemory:
            if not core.relieve(1):
                raise


def _access(core: Core, mm: AddressSpace, vma: VmArea, addr: int, *, write: bool) -> int:
    if vma.flags & VmFlag.HUGETLB:
        return hugetlb.access(core, mm, vma, addr, write=write)
    at = core.pool.at
    while True:
        slot = mm.tables.pmd_slot(addr)
        pmd = at[slot] if slot >= 0 else 0
        if pmd & LEAF:
            if not write or pmd & WRITE:
                at[slot] = pmd | (YOUNG | DIRTY if write else YOUNG)
                return (pmd & FIELD) + (addr >> core.geometry.page_shift & core.geometry.pmd_pages - 1)
            if core.on_fault is not None:
                core.on_fault(mm, addr, write)
            if vma.file is not None:
                filepmd.drop(core, mm, vma, addr & -core.geometry.pmd_size)
            elif pmd & UFFD_WP and vma.flags & VmFlag.UFFD_WP:
                if not userfaultfd.resolves_itself(vma):
                    raise userfaultfd.blocked(vma, addr)
                thp.split_pmd(core, mm, vma, addr & -core.geometry.pmd_size)
            else:
                thp.wp_fault(core, mm, vma, addr, slot)
            at = core.pool.at
            continue
        if not pmd and thp.order_allowed(core, vma, addr):
            if core.on_fault is not None:
                core.on_fault(mm, addr, write)
            slot = mm.tables.make_pmd_slot(addr)
            if vma.flags & VmFlag.UFFD_MISSING:
                mm.prepare_anon(vma)
                raise userfaultfd.blocked(vma, addr)
            if thp.fault(core, mm, vma, addr, slot, write=write):
                at = core.pool.at
                continue
        if vma.file is not None and not pmd:
            filemap.inside(core, mm, vma, addr, write=write)
            if core.memory.large and filemap.fault_pmd(core, mm, vma, addr, write=write):
                at = core.pool.at
                continue
        if pmd & TABLE:
            slot = mm.tables.slot_in(pmd, addr)
        else:
            slot = mm.tables.make_pte_slot(addr)
            at = core.pool.at
        pte = at[slot]
        if pte & PRESENT and (not write or pte & WRITE):
            at[slot] = pte | (YOUNG | DIRTY if write else YOUNG)
            return pte & FIELD
        if core.on_fault is not None:
            core.on_fault(mm, addr, write)
        if pte & PRESENT:
            _write_protected(core, mm, vma, addr, slot, pte)
        elif not pte or is_marker(pte):
            _missing(core, mm, vma, addr, slot, pte, write=write, fresh=not pmd)
        elif is_hwpoison(pte):
            raise AddressSpaceFault("SIGBUS", addr, "the page is poisoned", lsb=core.geometry.page_shift)
        else:
            swapping.swap_in(core, mm, vma, slot, pte, write=write, addr=addr)


def _missing(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    addr: int,
    slot: int,
    pte: int,
    *,
    write: bool,
    fresh: bool,
) -> None:
    if pte & GUARD:
        raise segfault(addr, "a guard region")
    if pte and poisoned(pte):
        raise userfaultfd.poisoned_access(core, addr, core.geometry.page_shift)
    if pte and not vma.flags & VmFlag.UFFD_WP:
        pte = core.pool.at[slot] = 0  # a marker that nobody stands behind any more
    if vma.flags & VmFlag.UFFD_MISSING and vma.file is None:
        if write:
            mm.prepare_anon(vma)  # what a page needs comes first
        raise userfaultfd.blocked(vma, addr)
    if vma.file is not None:
        filemap.fault(core, mm, vma, addr, slot, pte, write=write, fresh=fresh)
        return
    protected = pte & UFFD_WP
    if not write:
        core.pool.at[slot] = core.zero_pfn | PRESENT | SPECIAL | YOUNG | protected
        return
    mm.prepare_anon(vma)
    orders = mthp.orders(core, vma)
    if orders and mthp.fault(core, mm, vma, addr, slot, orders):
        return
    pfn = mapping.take_page(core, vma)
    entry = pfn | PRESENT | YOUNG | protected
    if vma.flags & VmFlag.WRITE:
        entry |= DIRTY | core.soft_dirty | (0 if protected else WRITE)
    core.memory.frames.mapcount_at[pfn] = 1
    core.pool.at[slot] = entry


def _write_protected(core: Core, mm: AddressSpace, vma: VmArea, addr: int, slot: int, pte: int) -> None:
    """A write to a present page that may not be written."""
    if pte & UFFD_WP and vma.flags & VmFlag.UFFD_WP:
        if not userfaultfd.resolves_itself(vma):
            raise userfaultfd.blocked(vma, addr)
        pte &= ~UFFD_WP
        core.pool.at[slot] = pte
        core.count("wp_async")
    pfn = pte & FIELD
    frames = core.memory.frames
    if vma.flags & VmFlag.SHARED:
        core.pool.at[slot] = pte | WRITE | DIRTY | YOUNG | core.soft_dirty
        if vma.file is not None and vma.file.on_disk:
            filemap.told(core, vma, addr, pfn)
        filemap.dirty(core, pfn)
        return
    if pfn != core.zero_pfn and (frames.flags_at[pfn] & ANON_EXCLUSIVE or _reusable(core, mm, pfn)):
        frames.flags_at[pfn] |= ANON_EXCLUSIVE
        core.pool.at[slot] = pte | WRITE | DIRTY | YOUNG | core.soft_dirty
        return
    mm.prepare_anon(vma)
    copy = mapping.take_page(core, vma)
    frames = core.memory.frames
    if frames.content_at[pfn]:
        frames.content_at[copy] = core.memory.contents.copy_one(frames.content_at[pfn])
    frames.mapcount_at[copy] = 1
    core.pool.at[slot] = copy | PRESENT | YOUNG | WRITE | DIRTY | core.soft_dirty
    core.count("copy_on_write")
    if pfn != core.zero_pfn:
        mapping.remove_page(core, mm, vma, pfn)


def _reusable(core: Core, mm: AddressSpace, pfn: int) -> bool:
    """Whether nobody else has the page, though it was once shared (wp_can_reuse_anon_folio)."""
    frames = core.memory.frames
    flags = frames.flags_at[pfn]
    if flags & CACHED:
        return False
    if flags & COMPOUND:
        folio = core.memory.large[pfn - frames.behind_at[pfn]]
        if not core.caps.large_folio_reuse or folio.mapped <= 1 or thp.maybe_shared(core, folio):
            return False
        return not flags & _SWAPCACHE or core.swap.uncache(folio.head, folio.order)
    if frames.mapcount_at[pfn] != 1 or flags & _KSM:
        return False
    return not flags & _SWAPCACHE or core.swap.uncache(pfn)


__all__ += ["NoMemory"]
