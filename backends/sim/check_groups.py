"""Whether memory cgroups are well: the tree, who is in which group, and what is charged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.check_disk import Finding, some
from pmcore.backends.sim.services import memcg
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["group_findings"]

_PGTABLE = np.uint64(PageFlag.PGTABLE)


def group_findings(core: Core, spaces: list[AddressSpace]) -> Iterator[Finding]:
    """Every invariant that does not hold."""
    frames, groups = core.memory.frames, core.groups
    yield from _tree(core, spaces)
    used = np.flatnonzero(frames.group)
    if len(used) and not core.memory.grouped:
        yield Finding("without groups nothing is charged to one", some(used))
    unknown = used[~np.isin(frames.group[used], list(groups.there))]
    if len(unknown):
        yield Finding("a frame is charged to a group that there is, or was", some(unknown))
    flags = frames.flags[used]
    wrong = ((flags & memcg.UNCHARGED) != 0) & ((flags & _PGTABLE) == 0) | (flags == 0)
    if wrong.any():
        yield Finding("what is charged to a group is a page of somebody's", some(used[wrong]))
    counts = np.bincount(frames.group, minlength=len(core.memory.charges.pages))[1:].tolist()
    if core.memory.charges.pages[1:] != counts:
        yield Finding("charges are counted", f"{core.memory.charges.pages[1:]} is not {counts}")
    tables = np.bincount(frames.group[(frames.flags & _PGTABLE) != 0], minlength=len(counts) + 1)
    for number, limits in core.memory.charges.limits.items():
        for limit in limits:
            # Reclaim itself may need tables, whatever the limit is.
            if core.memory.charges.used(limit.groups) - int(tables[list(limit.groups)].sum()) > limit.pages:
                yield Finding("no group has more than its limit", f"{groups.there[number].path}: {limit}")
    tails = np.flatnonzero(frames.behind)
    apart = tails[frames.group[tails] != frames.group[tails - frames.behind[tails]]]
    if len(apart):
        yield Finding("a folio is charged to one group", some(apart))
    for area in core.swap.there:
        slots = np.flatnonzero(area.group)
        cached = area.cached[slots] != 0
        bad = (area.counts[slots] == 0) & ~cached
        if core.caps.memcg_v1:
            bad |= cached
        bad |= ~np.isin(area.group[slots], list(groups.there))
        if bad.any():
            yield Finding(
                "a slot remembers a group while it is in use, in version 1 while its page is nowhere else",
                f"area {area.number}: {some(slots[bad])}",
            )


def _tree(core: Core, spaces: list[AddressSpace]) -> Iterator[Finding]:
    there = core.groups.there
    for number, group in there.items():
        parent = there.get(group.parent)
        if number != group.number or parent is None or (number and group.parent >= number):
            yield Finding("a group has a parent that is older", f"{number}")
        elif group.online and not parent.online:
            yield Finding("a group that is there lies in one that is there", f"{group.path}")
        elif number and group.online and group.path.rpartition("/")[0] != parent.path:
            yield Finding("a group's directory lies in its parent's", f"{group.path}")
    online = core.groups.online
    for what in ("path", "inode"):
        values = [getattr(group, what) for group in online]
        if len(set(values)) != len(values):
            yield Finding("groups have directories of their own", f"{what}: {values}")
    numbers = {group.number for group in online}
    for mm in spaces:
        if mm.group not in numbers:
            yield Finding("a task is in a group that is there", f"address space {mm.number}: {mm.group}")
