"""Writes to many present pages of private mappings that may not be written: reused, or copied; and to markers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, CACHED
from pmcore.backends.sim.physical.memory import COMPOUND, NoMemory
from pmcore.backends.sim.services import userfaultfd
from pmcore.backends.sim.virtual import mapping
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT, UFFD_MARKER, UFFD_WP, WRITE, YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["fill_many", "markers", "simple", "write_many"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)
#: Pages with any of these go one by one.
_ODD = np.uint64(COMPOUND | int(PageFlag.SWAPCACHE | PageFlag.KSM | PageFlag.MLOCKED))


def simple(core: Core, vma: VmArea, entries: U64Array) -> BoolArray:
    """Which entries `write_many` can take: present, not writable, and of no page that needs a closer look."""
    chosen: BoolArray = (entries & np.uint64(PRESENT | WRITE)) == _PRESENT
    if vma.flags & VmFlag.UFFD_WP and not userfaultfd.resolves_itself(vma):
        chosen &= (entries & np.uint64(UFFD_WP)) == 0
    if chosen.any():
        flags = core.memory.frames.flags[(entries[chosen] & _FIELD).view(np.int64)]
        chosen[chosen] = (flags & _ODD) == 0
    return chosen


def write_many(core: Core, mm: AddressSpace, vma: VmArea, entries: U64Array) -> None:
    """Write to the pages of entries that `simple` allows: what nobody else has is reused, the others are copied.

    Raises NoMemory with those before the page that got none done.
    """
    memory, frames = core.memory, core.memory.frames
    pfns = (entries & _FIELD).view(np.int64)
    flags = frames.flags[pfns]
    zero = pfns == core.zero_pfn
    mine = (frames.mapcount[pfns] == 1) & ((flags & np.uint64(CACHED)) == 0)
    mine |= (flags & np.uint64(ANON_EXCLUSIVE)) != 0
    places = np.flatnonzero(zero | ~mine)
    copies = places[:0]
    if len(places):
        mm.prepare_anon(vma)
        copies = memory.pages(len(places), mapping.NEW_ANON | ANON_EXCLUSIVE)
        memory.on_lru_pages(copies)
        frames = memory.frames
    short = len(copies) < len(places)
    done = int(places[len(copies)]) if short else len(entries)
    places, entries, pfns, zero = places[: len(copies)], entries[:done], pfns[:done], zero[:done]
    watched = entries & np.uint64(UFFD_WP) if vma.flags & VmFlag.UFFD_WP else entries[:0]
    if watched.any():
        core.count("wp_async", int(np.count_nonzero(watched)))
        entries &= np.uint64(~UFFD_WP & (1 << 64) - 1)
    entries |= np.uint64(WRITE | DIRTY | YOUNG | core.soft_dirty)
    reused = np.ones(done, dtype=np.bool_)
    reused[places] = False
    frames.flags[pfns[reused]] |= np.uint64(ANON_EXCLUSIVE)
    if len(places):
        frames.content[copies] = memory.contents.copies(frames.content[pfns[places]])
        frames.mapcount[copies] = 1
        entries[places] = copies.view(np.uint64) | np.uint64(
            PRESENT | YOUNG | WRITE | DIRTY | core.soft_dirty
        )
        frames.mapcount[pfns[places[~zero[places]]]] -= 1
        core.count("copy_on_write", len(places))
    if short:
        raise NoMemory


def markers(vma: VmArea, entries: U64Array) -> BoolArray:
    """Which entries `fill_many` can take: markers of a userfaultfd whose protection resolves itself."""
    found: BoolArray = entries == np.uint64(UFFD_MARKER)
    if (
        not vma.flags & VmFlag.UFFD_WP
        or vma.flags & VmFlag.UFFD_MISSING
        or not userfaultfd.resolves_itself(vma)
    ):
        found[:] = False
    return found


def fill_many(core: Core, mm: AddressSpace, vma: VmArea, entries: U64Array) -> None:
    """Write where `markers` are: a page is faulted in protected, then the protection resolves itself."""
    mm.prepare_anon(vma)
    pfns = core.memory.pages(len(entries), mapping.NEW_ANON | ANON_EXCLUSIVE)
    core.memory.on_lru_pages(pfns)
    core.memory.frames.mapcount[pfns] = 1
    bits = np.uint64(PRESENT | YOUNG | DIRTY | WRITE | core.soft_dirty)
    entries[: len(pfns)] = pfns.view(np.uint64) | bits
    if len(pfns):
        core.count("wp_async", len(pfns))
    if len(pfns) < len(entries):
        raise NoMemory
