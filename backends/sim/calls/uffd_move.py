"""UFFDIO_MOVE: pages of private anonymous memory, from one place of an address space to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.calls.uffd_common import context_of, range_of
from pmcore.backends.sim.calls.uffd_fill import outcome
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.services import thp
from pmcore.backends.sim.services.userfaultfd import Userfaultfd
from pmcore.backends.sim.virtual import hugetlb
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    LEAF,
    PRESENT,
    SPECIAL,
    SWAP_EXCLUSIVE,
    WRITE,
    YOUNG,
)
from pmcore.backends.sim.virtual.vma import VmArea, VmFlag
from pmcore.backends.sim.virtual.zap import swap_entries
from pmcore.uapi import Errno

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["move"]

_DONTWAKE, _ALLOW_SRC_HOLES = 1, 2
_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)


def move(core: Core, mm: AddressSpace, fd: int, target: int, source: int, length: int, mode: int) -> int:
    """UFFDIO_MOVE; the bytes that were moved."""
    call = f"UFFDIO_MOVE({target:#x}, {source:#x}, {length:#x}, mode {mode:#x})"
    context = context_of(mm, fd, call)
    if not core.caps.uffd_move:
        refuse(Errno.EINVAL, call, "this kernel does not know it")
    if context.mm is not mm:
        refuse(Errno.EINVAL, call, "only inside the caller's own address space")
    range_of(core, call, target, length)
    range_of(core, call, source, length)
    if mode & ~(_DONTWAKE | _ALLOW_SRC_HOLES):
        refuse(Errno.EINVAL, call)
    into, origin = _mappings(core, mm, call, target, source)
    _validate(call, context, into, origin, target + length, source + length)
    holes, done = bool(mode & _ALLOW_SRC_HOLES), 0
    errno: Errno | None = None
    while done < length and errno is None:
        try:
            step, errno = _some(core, mm, origin, target + done, source + done, length - done, holes=holes)
        except NoMemory:
            if not core.relieve(1):
                errno = Errno.ENOMEM
            continue
        done += step
    return outcome(call, done, length, errno)


def _mappings(core: Core, mm: AddressSpace, call: str, target: int, source: int) -> tuple[VmArea, VmArea]:
    into = mm.vmas.at(target)
    if into is None:
        refuse(Errno.ENOENT, call, "nothing is mapped at the target")
    if not into.flags & VmFlag.SHARED:
        if into.huge is not None:
            hugetlb.prepare(core, into)
        else:
            mm.prepare_anon(into)
    origin = mm.vmas.at(source)
    if origin is None:
        refuse(Errno.ENOENT, call, "nothing is mapped at the source")
    return into, origin


def _validate(
    call: str, context: Userfaultfd, into: VmArea, origin: VmArea, target_end: int, source_end: int
) -> None:
    """validate_move_areas, and that both ranges lie in one mapping each: all of it is EINVAL."""
    forbidden = VmFlag.SHARED | VmFlag.PFNMAP | VmFlag.IO | VmFlag.HUGETLB
    if (
        source_end > origin.end
        or target_end > into.end
        or (into.flags | origin.flags) & forbidden
        or into.file is not None
        or origin.file is not None
        or (into.flags ^ origin.flags) & (VmFlag.ACCESS | VmFlag.LOCKED)
        or not origin.flags & VmFlag.WRITE
        or into.uffd is not context
    ):
        refuse(Errno.EINVAL, call, "not two writable private anonymous mappings, the target's registered")


def _some(
    core: Core, mm: AddressSpace, vma: VmArea, target: int, source: int, left: int, *, holes: bool
) -> tuple[int, Errno | None]:
    """Move a huge page, or pages of one page table; the bytes, and what stopped it."""
    size = core.geometry.pmd_size
    if mm.tables.pmd_slot(source) < 0:
        if not holes:
            return 0, Errno.ENOENT
        mm.tables.make_pmd_slot(source)
    slot = mm.tables.make_pmd_slot(target)
    there, pmd = core.pool.at[slot], core.pool.at[mm.tables.pmd_slot(source)]
    if there & LEAF:
        return 0, Errno.EEXIST
    if pmd & LEAF:
        zero = pmd & FIELD == core.huge_zero_pfn
        if not zero and not core.memory.frames.flags_at[pmd & FIELD] & ANON_EXCLUSIVE:
            return 0, Errno.EBUSY
        if there or source % size or target % size or left < size:
            thp.split_pmd(core, mm, vma, source & -size)
            return 0, None
        bits = PRESENT | LEAF | YOUNG | (SPECIAL if zero else DIRTY | WRITE | core.soft_dirty)
        core.pool.at[slot] = pmd & FIELD | bits
        core.pool.at[mm.tables.pmd_slot(source)] = 0
        return size, None
    if not pmd and not holes:
        return 0, Errno.ENOENT
    mm.tables.make_pte_slot(source)
    mm.tables.make_pte_slot(target)
    span = min(left, size - source % size, size - target % size)
    if abs(target - source) < span:
        span = core.geometry.page_size  # one after the other: what was moved makes room
    return _ptes(core, mm, target, source, span >> core.geometry.page_shift, holes=holes)


def _ptes(
    core: Core, mm: AddressSpace, target: int, source: int, count: int, *, holes: bool
) -> tuple[int, Errno | None]:
    into, origin = mm.tables.pte_slot(target), mm.tables.pte_slot(source)
    frames, old = core.memory.frames, core.pool.flat[origin : origin + count].copy()
    present, swap = (old & _PRESENT) != 0, swap_entries(old)
    zero = present & ((old & _FIELD) == np.uint64(core.zero_pfn))
    normal = present & ~zero
    flags = np.zeros(count, dtype=np.uint64)
    flags[normal] = frames.flags[(old[normal] & _FIELD).view(np.int64)]
    used = core.pool.flat[into : into + count] != 0
    hole = (old == 0) & ~used if not holes else np.zeros(count, dtype=np.bool_)
    shared = normal & ((flags & np.uint64(ANON_EXCLUSIVE)) == 0)
    shared |= swap & ((old & np.uint64(SWAP_EXCLUSIVE)) == 0)
    for index in np.flatnonzero(swap & ~shared).tolist():
        cached = core.swap.cached(int(old[index]) & FIELD)
        shared[index] = cached >= 0 and bool(frames.flags_at[cached] & COMPOUND)
    large = normal & ((flags & np.uint64(COMPOUND)) != 0)
    marker = (old != 0) & ~present & ~swap
    stops = np.flatnonzero(used | hole | shared | large | marker)
    first = int(stops[0]) if len(stops) else count
    if first:
        _move(core, into, origin, old[:first], normal[:first], zero[:first])
    done = first << core.geometry.page_shift
    if first == count:
        return done, None
    if used[first]:
        return done, Errno.EEXIST
    if hole[first]:
        return done, Errno.ENOENT
    if shared[first]:
        return done, Errno.EBUSY
    if marker[first]:
        return done, Errno.EFAULT
    pfn = int(old[first]) & FIELD
    folio = core.memory.large[pfn - frames.behind_at[pfn]]
    others = [core.spaces[number] for number in folio.by_mm if number != mm.number]
    thp.split_folio(core, mm, folio, source + done, others=others)
    return done, None


def _move(
    core: Core,
    into: int,
    origin: int,
    old: np.ndarray[tuple[int], np.dtype[np.uint64]],
    normal: np.ndarray[tuple[int], np.dtype[np.bool_]],
    zero: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> None:
    """Entries that may be moved: those of pages are made anew, without their accessed bit; swap entries stay."""
    new, count = old.copy(), len(old)
    new[old != 0] |= np.uint64(core.soft_dirty)
    kept = np.uint64(FIELD | DIRTY)
    new[normal] = old[normal] & kept | np.uint64(PRESENT | YOUNG | WRITE | core.soft_dirty)
    new[zero] = core.zero_pfn | PRESENT | SPECIAL | YOUNG
    core.pool.flat[into : into + count] = new
    core.pool.flat[origin : origin + count] = 0
