"""Large folios of other sizes than a PMD maps: which one a write fault gives, one at a time and for whole ranges.

A fault takes the largest size that policy allows whose block lies inside the VMA and has nothing but empty entries; all
PTEs of the folio are set at once (rules TH-002 to TH-005).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.backends.sim.services import thp
from pmcore.backends.sim.virtual import mapping
from pmcore.backends.sim.virtual.pte import DIRTY, PRESENT, WRITE, YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["fault", "fault_many", "orders"]


def orders(core: Core, vma: VmArea) -> int:
    """Bits of the orders below a PMD's that a fault in the VMA may give; none under userfaultfd, which counts pages."""
    if not core.policy.thp_sizes or vma.flags & VmFlag.UFFD:
        return 0
    return thp.orders(core, vma) & (1 << core.geometry.pmd_order) - 1


def _flags(vma: VmArea) -> int:
    return mapping.NEW_ANON | thp.THP | ANON_EXCLUSIVE | (mapping.MLOCKED if vma.flags & VmFlag.LOCKED else 0)


def _bits(core: Core, vma: VmArea) -> int:
    """What the entries of a fresh folio say: all of them as if each page had been written."""
    return PRESENT | YOUNG | (WRITE | DIRTY | core.soft_dirty if vma.flags & VmFlag.WRITE else 0)


def fault(core: Core, mm: AddressSpace, vma: VmArea, addr: int, slot: int, allowed: int) -> bool:
    """Map a large folio around the address, whose PTE is at `slot`; False where a small page has to do."""
    size = core.geometry.page_size
    page = addr // size
    while allowed:
        order = allowed.bit_length() - 1
        pages = 1 << order
        first = page & -pages
        place = slot - (page - first)
        entries = core.pool.flat[place : place + pages]
        if vma.start <= first * size and (first + pages) * size <= vma.end and not entries.any():
            break
        allowed &= ~pages
    while allowed:
        order = allowed.bit_length() - 1
        pages = 1 << order
        heads = core.memory.folios(order, 1, _flags(vma), mm.number)
        if len(heads):
            head, place = int(heads[0]), slot - (page & pages - 1)
            core.memory.on_lru(head, pages)
            core.pool.flat[place : place + pages] = np.arange(
                head, head + pages, dtype=np.uint64
            ) | np.uint64(_bits(core, vma))
            core.count("mthp_fault")
            return True
        core.count("mthp_fallback")
        allowed &= ~pages
    return False


def fault_many(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, slot: int, count: int, allowed: int
) -> None:
    """Write faults at all empty entries of `count` from `start` (their PTEs from `slot` on), ascending.

    The same as one fault after the other: what one maps around itself the next ones find. Raises NoMemory.
    """
    memory, size = core.memory, core.geometry.page_size
    largest = 1 << allowed.bit_length() - 1
    lead = start // size & largest - 1
    span = lead + count + largest - 1 & -largest
    window = core.pool.flat[slot - lead : slot - lead + span]
    base = start - lead * size
    empty = window == 0
    empty[: max(0, vma.start - base) // size] = False
    empty[max(0, vma.end - base) // size :] = False
    wanted = np.zeros(span, dtype=np.bool_)
    wanted[lead : lead + count] = empty[lead : lead + count]
    flags, bits = _flags(vma), np.uint64(_bits(core, vma))
    heads: list[Pfns] = []
    sizes: list[int] = []
    places: list[Pfns] = []
    for order in reversed(range(allowed.bit_length())):
        if not allowed >> order & 1 or not wanted.any():
            continue
        pages = 1 << order
        blocks = empty.reshape(-1, pages).all(axis=1) & wanted.reshape(-1, pages).any(axis=1)
        where = np.flatnonzero(blocks)
        if not len(where):
            continue
        got = memory.folios(order, len(where), flags, mm.number)
        core.count("mthp_fault", len(got))
        if len(got) < len(where):
            core.count("mthp_fallback", len(where) - len(got))
            where = where[: len(got)]
        offsets = np.arange(pages, dtype=np.uint64) | bits
        if len(where) == len(blocks):
            np.add(got.view(np.uint64)[:, None], offsets, out=window.reshape(-1, pages))
            wanted[:] = False
        else:
            window.reshape(-1, pages)[where] = got.view(np.uint64)[:, None] + offsets
            empty.reshape(-1, pages)[where] = False
            wanted.reshape(-1, pages)[where] = False
        heads.append(got)
        sizes.append(order)
        places.append(where << order)
    left = np.flatnonzero(wanted)
    pfns = memory.pages(len(left), flags & ~thp.THP) if len(left) else left
    memory.frames.mapcount[pfns] = 1
    window[left[: len(pfns)]] = pfns.view(np.uint64) | bits
    heads.append(pfns)
    sizes.append(0)
    places.append(left[: len(pfns)])
    turns = np.empty(sum(map(len, places)), dtype=np.int64)
    order_of = np.argsort(np.concatenate(places), kind="stable")
    turns[order_of] = np.arange(len(turns))
    cuts = np.cumsum([len(place) for place in places])[:-1]
    memory.on_lru_folios(heads, sizes, np.split(turns, cuts))
    if len(pfns) < len(left):
        raise NoMemory
