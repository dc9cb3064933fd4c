"""Memory that goes and comes: blocks taken offline and online again, pages given to a balloon.

Offlining is planned before anything changes: what may not move, or has nowhere to go, is found out first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.physical import memory_blocks as blocks
from pmcore.backends.sim.physical.buddy import MAX_ORDER, Pfns
from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.physical.memory import COMPOUND, min_watermark
from pmcore.backends.sim.services import migrate, thp
from pmcore.backends.sim.services.hugetlb import Pool
from pmcore.errors import NotModelled
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.folios import LargeFolio

__all__ = ["deflate", "inflate", "offline", "online"]

_BUDDY, _OFFLINE = int(PageFlag.BUDDY), int(PageFlag.OFFLINE)
#: What no migration moves: what the kernel itself uses.
_UNMOVABLE = int(PageFlag.RESERVED | PageFlag.SLAB | PageFlag.PGTABLE | PageFlag.ZERO_PAGE)
_HWPOISON = int(PageFlag.HWPOISON)
#: What a poisoned page is that somebody has still.
_KEPT = int(PageFlag.SWAPCACHE | PageFlag.HUGE) | CACHED
_ENDLESS = "pages of a memory block that fit nowhere else: the kernel tries again without end"


@attrs.define
class _Plan:
    """What leaves a block, and how much room it takes elsewhere. Folios are named by their heads."""

    #: Large folios that are taken apart first, with the mappings that are found of them.
    torn: list[LargeFolio] = attrs.field(factory=list)
    #: Blocks of each order that are needed elsewhere.
    needs: list[int] = attrs.field(factory=lambda: [0] * (MAX_ORDER + 1))
    #: Pages of hugetlb pools: those in use, each with the free page that it moves to (-1: a fresh one).
    huge: list[tuple[Pool, int, int]] = attrs.field(factory=list)
    #: Free ones: they leave their pool.
    free: list[tuple[Pool, int]] = attrs.field(factory=list)


def offline(core: Core, number: int) -> None:
    """Write "offline" to a block's state (rules HP-001 to HP-007)."""
    call = f"offline_block({number})"
    block = blocks.block_of(core.memory, number, core.geometry.page_size)
    if block is None:
        refuse(Errno.ENOENT, call, "no memory there")
    if block.state == "offline":
        refuse(Errno.EINVAL, call, "it is offline")
    if not block.zone:
        refuse(Errno.EINVAL, call, "it has a hole, or frames of several zones")
    if not core.caps.offline_reads_as_hole:
        raise NotModelled("offline memory of a kernel whose kpageflags show what a block last held")
    first = number * core.memory.block_pages
    end = first + core.memory.block_pages
    plan = _plan(core, call, first, end)
    _check_room(core, plan, first, end)
    for folio in plan.torn:
        mm, *others = (core.spaces[number] for number in sorted(folio.by_mm))
        thp.split_folio(core, mm, folio, 0, others=others)
    blocks.carve(core.memory, number)
    _move_huge(core, plan)
    _move_rest(core, first, end)
    _watermark(core)
    core.count("offline_block")


def online(core: Core, number: int) -> None:
    """Write "online" to a block's state: all its frames are free (rule HP-003)."""
    call = f"online_block({number})"
    block = blocks.block_of(core.memory, number, core.geometry.page_size)
    if block is None:
        refuse(Errno.ENOENT, call, "no memory there")
    if block.state == "online":
        refuse(Errno.EINVAL, call, "it is online")
    first = number * core.memory.block_pages
    flags = core.memory.frames.flags[first : first + core.memory.block_pages]
    if (flags & np.uint64(_HWPOISON)).any():
        if not core.caps.poisoned_blocks_stay_offline:
            raise NotModelled("a block with poisoned pages online again on kernels that let it")
        refuse(Errno.EHWPOISON, call, "some of it is poisoned")
    blocks.give_back(core.memory, number)
    _watermark(core)
    core.count("online_block")


def _watermark(core: Core) -> None:
    memory, size = core.memory, core.geometry.page_size
    present = memory.frames.count - len(memory.offline) * memory.block_pages
    memory.reserve = min_watermark(present * size) // size


# -- planning --------------------------------------------------------------------------------------------


def _plan(core: Core, call: str, first: int, end: int) -> _Plan:
    memory, frames = core.memory, core.memory.frames
    used = _used(core, first, end)
    flags = frames.flags[used]
    if (flags & np.uint64(_UNMOVABLE)).any():
        refuse(Errno.EBUSY, call, "the kernel uses some of it")
    poisoned = (flags & np.uint64(_HWPOISON)) != 0  # those stay where they are (rule HW-014)
    if (flags[poisoned] & np.uint64(_KEPT)).any():
        raise NotModelled("offlining a block with poisoned pages that a file or the swap cache has")
    used = used[~poisoned]
    heads = used[frames.behind[used] == 0]
    if len(used) and frames.behind[used[0]] and used[0] == first:
        raise NotModelled("offlining a part of a gigantic page")
    plan = _Plan()
    hugetlb = core.hugetlb.folios
    compound = heads[(frames.flags[heads] & np.uint64(COMPOUND)) != 0]
    plan.needs[0] = len(heads) - len(compound)
    for head in compound.tolist():
        if head in hugetlb:
            continue
        folio = memory.large[head]
        if migrate.torn_first(core, folio):
            if frames.swap_at[head]:
                raise NotModelled("migrating a large folio of the swap cache of which a part is mapped")
            plan.torn.append(folio)
            plan.needs[0] += int(np.count_nonzero(frames.mapcount[head : head + folio.pages]))
        else:
            plan.needs[folio.order] += 1
    _plan_huge(core, call, plan, [head for head in compound.tolist() if head in hugetlb], first, end)
    memory.large.settle(compound)
    return plan


def _used(core: Core, first: int, end: int) -> Pfns:
    """Frames of the block that are not free."""
    zone = blocks.zone_around(core.memory, first, end)
    assert zone is not None
    touched = slice(first, min(max(zone.frontier, first), end))
    return np.flatnonzero((core.memory.frames.flags[touched] & np.uint64(_BUDDY)) == 0) + first


def _plan_huge(core: Core, call: str, plan: _Plan, heads: list[int], first: int, end: int) -> None:
    """Pages in use take free ones of their pool, or fresh ones; free ones, also those that come free so, leave it."""
    for pool in core.hugetlb.pools.values():
        mine = [head for head in heads if core.hugetlb.folios[head] is pool]
        if core.hugetlb.restored.intersection(mine):
            raise NotModelled("migrating a huge page whose promise holds again once it is free")
        if any(head + pool.pages > end for head in mine):
            raise NotModelled("offlining a part of a gigantic page")
        inside = [head for head in pool.free if first <= head < end]
        outside = [head for head in pool.free if not first <= head < end]
        spare = len(pool.free) - pool.reserved
        surplus = pool.surplus
        leaving = len(inside)
        for head in mine:
            if head in inside:
                plan.free.append((pool, head))
                continue
            if outside and spare > 0:
                plan.huge.append((pool, head, outside.pop()))
                if surplus:
                    surplus -= 1  # the old page is not kept
                    spare -= 1
                else:
                    leaving += 1
                continue
            if pool.order > MAX_ORDER:
                raise NotModelled(_ENDLESS)
            plan.huge.append((pool, head, -1))
            plan.needs[pool.order] += 1
        if leaving > max(spare, 0):
            refuse(Errno.EBUSY, call, "huge pages in it are promised, and there are no others")


def _check_room(core: Core, plan: _Plan, first: int, end: int) -> None:
    """Raise NotModelled unless what leaves the block has room elsewhere, above what the kernel keeps for itself."""
    memory = core.memory
    zone = blocks.zone_around(memory, first, end)
    assert zone is not None
    free = [sum(counts) for counts in zip(*(z.free_counts() for z in memory.zones), strict=True)]
    inside = memory.frames.free_order[first : min(max(zone.frontier, first), end)]
    for order, count in enumerate(np.bincount(inside, minlength=MAX_ORDER + 2)[1:].tolist()):
        free[order] -= count
    free[MAX_ORDER] -= (end - min(max(zone.frontier, first), end)) >> MAX_ORDER
    room = sum(count << order for order, count in enumerate(free)) - memory.reserve
    if sum(count << order for order, count in enumerate(plan.needs)) > max(room, 0):
        raise NotModelled(_ENDLESS, remedy="more memory, or reclaim some")
    there = wanted = 0
    for order in range(MAX_ORDER, 0, -1):
        there, wanted = 2 * there + free[order], 2 * wanted + plan.needs[order]
        if wanted > there:
            raise NotModelled(
                "migrating a large folio where no free block is large enough: it is taken apart"
            )


# -- moving ----------------------------------------------------------------------------------------------


def _move_huge(core: Core, plan: _Plan) -> None:
    """Pages of hugetlb pools; those that are left in the block leave their pool."""
    hugetlb, frames = core.hugetlb, core.memory.frames
    for pool, head, chosen in plan.huge:
        target = chosen
        if chosen >= 0:
            pool.free.remove(chosen)
            pool.total -= 1
            if pool.surplus:
                pool.surplus -= 1
        else:
            target = core.memory.block(pool.order, kernel=True)
        pages = np.arange(pool.pages, dtype=np.int64)
        migrate.move(core, head + pages, target + pages)
        hugetlb.moved(head, target)
    for pool, head in plan.free:
        pool.free.remove(head)
        pool.total -= 1
        del hugetlb.folios[head]
        part = slice(head, head + pool.pages)
        frames.flags[part] = frames.behind[part] = 0


def _move_rest(core: Core, first: int, end: int) -> None:
    """Everything else, the largest folios first."""
    memory, frames = core.memory, core.memory.frames
    rows = min(end, frames.rows)
    used = np.flatnonzero(frames.flags[first:rows] != 0) + first
    used = used[(frames.flags[used] & np.uint64(_HWPOISON)) == 0]
    heads = used[frames.behind[used] == 0]
    orders = np.zeros(len(heads), dtype=np.int64)
    compound = np.flatnonzero((frames.flags[heads] & np.uint64(COMPOUND)) != 0)
    if len(compound):
        orders[compound] = memory.large.orders(heads[compound])
    migrate.move(core, *migrate.take(core, memory.zones, heads, orders))


# -- the balloon -----------------------------------------------------------------------------------------


def inflate(core: Core, pages: int) -> int:
    """Give free pages to the balloon, as many as there are above the watermark; how many (rule HP-008)."""
    memory = core.memory
    count = min(pages, memory.spare)
    got = memory.pages(count, _OFFLINE)
    core.count("balloon_inflate", len(got))
    return len(got)


def deflate(core: Core, pages: int) -> int:
    """Take pages back from the balloon, those of the highest numbers first; how many."""
    frames = core.memory.frames
    held = np.flatnonzero((frames.flags & np.uint64(_OFFLINE)) != 0)
    back = held[max(0, len(held) - pages) :] if pages else held[:0]
    frames.flags[back] = 0
    core.memory.free_pages(back)
    core.count("balloon_deflate", len(back))
    return len(back)
