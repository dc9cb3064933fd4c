"""Pages of hugetlb pools that are poisoned, or moved away from frames that may fail (rules HW-011, HW-013)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import Call, refuse
from pmcore.backends.sim.physical.frames import RAW_HWPOISON
from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.backends.sim.services import migrate
from pmcore.backends.sim.services.hugetlb import file_range
from pmcore.backends.sim.virtual import hugetlb
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, LEAF, PRESENT, SWAP
from pmcore.errors import NotModelled
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.services.hugetlb import Pool
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["poison", "soft_offline"]

_ANON, _DIRTY, _HWPOISON = int(PageFlag.ANON), int(PageFlag.DIRTY), int(PageFlag.HWPOISON)


def _maps(core: Core, head: int) -> Iterator[tuple[AddressSpace, VmArea, int, int]]:
    """Who maps the page: address space, VMA, address, place of the entry."""
    for mm in core.spaces.values():
        for vma in mm.vmas:
            if vma.huge is None:
                continue
            for addr, slot in hugetlb.entries(mm, vma, vma.start, vma.end):
                if slot >= 0 and core.pool.at[slot] & (PRESENT | FIELD) == PRESENT | head:
                    yield mm, vma, addr, slot


def poison(core: Core, pfn: int, mm: AddressSpace) -> int:
    """Poison a small page of a mapped huge one, which nobody can use any more; the address told to `mm`, -1 for none.

    The page of a file stays its file's, another leaves its pool: but for the small page it is free memory again.
    """
    frames = core.memory.frames
    head = frames.head(pfn)
    pool = core.hugetlb.folios[head]
    anonymous = bool(frames.flags_at[head] & _ANON)
    if anonymous:
        _may_leave(pool, head, core)
    elif not core.caps.memory_failure_keeps_hugetlb:
        raise NotModelled(
            "poisoning huge pages of files on kernels that drop them, or read none of them any more"
        )
    told = -1
    for who, vma, addr, slot in list(_maps(core, head)):
        if core.pool.at[slot] & DIRTY:
            frames.set_bits(head, pool.pages, _DIRTY)
        if who is mm and (told < 0 or not anonymous):
            told = _covering(core, mm, vma, head) if not anonymous else addr
        core.pool.at[slot] = SWAP | core.caps.hwpoison_type | head << 5 | LEAF
        core.hugetlb.map(head, -1)
    dirty = frames.flags_at[head] & _DIRTY
    if anonymous:
        core.hugetlb.give(head)
        if head in core.hugetlb.folios:
            pool.free.remove(head)
            core.hugetlb.dissolve(head)
        _take(core, pfn)
    else:
        frames.set_bits(head, pool.pages, _HWPOISON)
        frames.flags_at[pfn] |= RAW_HWPOISON
    core.count("memory_failure")
    return told + (pfn - head << core.geometry.page_shift) if dirty and told >= 0 else -1


def _may_leave(pool: Pool, head: int, core: Core) -> None:
    """Raise NotModelled where the page would have to stay in its pool, poisoned."""
    promised = pool.reserved + (head in core.hugetlb.restored)
    if not pool.surplus and len(pool.free) + 1 <= promised:
        raise NotModelled("poisoning a hugetlb page where all free ones are promised: it stays in its pool")


def _covering(core: Core, mm: AddressSpace, mapped: VmArea, head: int) -> int:
    """Where the mapping that begins first in the page's file has it."""
    assert mapped.huge is not None
    file = mapped.huge.file
    index = next(index for index, page in file.pages.items() if page == head)
    covering = [
        (vma.pgoff, vma.start + (index - file_range(vma)[0]) * file.pool.size)
        for vma in mm.vmas
        if vma.huge is not None and vma.huge.file is file and file_range(vma)[0] <= index < file_range(vma)[1]
    ]
    return min(covering, key=lambda found: found[0])[1]


def _take(core: Core, pfn: int) -> None:
    """Take a frame that is free out of use."""
    core.memory.zone_of(pfn).take_off(pfn)
    core.memory.frames.flags_at[pfn] = _HWPOISON


def soft_offline(core: Core, call: Call, pfn: int) -> None:
    """Move a huge page to a free one of its pool, or a fresh one, and take the small page out of use.

    The old page leaves its pool. Refused with ENOMEM where there is no other.
    """
    frames, memory = core.memory.frames, core.memory
    head = frames.head(pfn)
    pool = core.hugetlb.folios[head]
    if head in core.hugetlb.restored:
        raise NotModelled("migrating a huge page whose promise holds again once it is free")
    spare = len(pool.free) > pool.reserved
    if spare:
        target = pool.free.pop()
    else:
        try:
            target = memory.bare_compound(pool.order, int(PageFlag.HUGE))
        except NoMemory:
            refuse(Errno.ENOMEM, call, "no other huge page")
        core.hugetlb.folios[target] = pool
    pages = np.arange(pool.pages, dtype=np.int64)
    frames.flags[target + pages] = frames.flags[head + pages]  # as a page that is in use
    migrate.move(core, head + pages, target + pages)
    core.hugetlb.moved(head, target)
    if spare:
        pool.total -= 1
        if pool.surplus:
            pool.surplus -= 1
    memory.free_compound(head, pool.order)
    _take(core, pfn)
    core.count("soft_offline")
