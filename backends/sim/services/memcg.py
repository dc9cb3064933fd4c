"""Memory cgroups: the tree of groups, and whom a page is charged to that comes back from swap.

A frame's group is a number in the frame table: the allocator puts that of whoever runs there (`Memory.charging`). The
root is number 0, as is nobody: which of both a frame belongs to is said by what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.physical.charges import Limit
from pmcore.backends.sim.services import shrink
from pmcore.errors import ArgumentError, NotModelled
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.services.swap import SwapArea
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["ROOT", "UNCHARGED", "Group", "Groups", "charged"]

#: The group of whatever is in no other.
ROOT = 0
#: Inode numbers of directories are so far apart: files have the ones between.
_INODES = 64
#: Kernel's memory, pages of hugetlb pools and free frames: charged to no group, page tables but to one below the root.
UNCHARGED = np.uint64(
    PageFlag.BUDDY
    | PageFlag.RESERVED
    | PageFlag.SLAB
    | PageFlag.PGTABLE
    | PageFlag.ZERO_PAGE
    | PageFlag.HUGE
    | PageFlag.OFFLINE
    | PageFlag.HWPOISON
)


@attrs.define
class Group:
    """One group. `path` is that of its directory below the root's; the root's own is ""."""

    number: int
    parent: int
    path: str
    inode: int
    #: False once its directory is removed; pages may still be charged to it.
    online: bool = True
    #: Pages that it and those below it may have; None: as many as there are.
    limit: int | None = None


class Groups:
    """All groups of a machine, by number."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.there: dict[int, Group] = {ROOT: Group(ROOT, ROOT, "", 1)}
        #: Pages of removed groups that came back when their swap area was switched off, until somebody has them.
        self._orphans: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        #: The groups whose pages reclaim looks at; None: all pages.
        self.reclaimed: NDArray[np.int32] | None = None
        self._find()

    def _find(self) -> None:
        """Renew what is looked up by number: the nearest ancestor that is online, and its inode."""
        count = max(self.there) + 1
        self._online: NDArray[np.int32] = np.zeros(count, dtype=np.int32)
        self._inodes: U64Array = np.zeros(count, dtype=np.uint64)
        for number, group in sorted(self.there.items()):  # parents are older
            self._online[number] = number if group.online else self._online[group.parent]
            self._inodes[number] = self.there[int(self._online[number])].inode
        memory = self._core.memory
        memory.grouped = count > 1
        memory.charges.pages += [0] * (count - len(memory.charges.pages))
        memory.charges.limits = {n: limits for n in self.there if n and (limits := self._limits(n))}

    def _limits(self, number: int) -> tuple[Limit, ...]:
        """Those that a group is under, its own first. The limit of a group that was removed holds on."""
        found = []
        while number:
            group = self.there[number]
            if group.limit is not None:
                found.append(Limit(number, group.limit, self.below(number)))
            number = group.parent
        return tuple(found)

    def below(self, number: int) -> tuple[int, ...]:
        """The group and all in it, removed ones too."""
        found = {number}
        for other, group in sorted(self.there.items()):
            if group.parent in found:
                found.add(other)
        return tuple(sorted(found))

    def restore(self, rows: list[list[Any]] | None) -> None:
        """The groups of these rows, as `checkpoint.py` writes them; None: the root alone."""
        groups = [Group(*row) for row in rows or ([ROOT, ROOT, "", 1],)]
        self.there = {group.number: group for group in groups}
        self._find()
        self._core.memory.charges.recount(max(self.there) + 1)

    # -- the tree --------------------------------------------------------------------------------------

    @property
    def online(self) -> list[Group]:
        """The groups that have a directory, parents before children."""
        return [group for group in self.there.values() if group.online]

    def find(self, path: str, call: str) -> Group:
        """The group with that directory. Refused with ENOENT."""
        found = next((group for group in self.online if group.path == path), None)
        if found is None:
            refuse(Errno.ENOENT, f"{call}({path!r})", "no such group: make it first")
        return found

    def children(self, group: Group) -> list[Group]:
        """The groups whose directories lie in that of the group."""
        return [other for other in self.online if other.parent == group.number and other is not group]

    def members(self, group: Group) -> list[AddressSpace]:
        """The address spaces of the tasks that are in the group."""
        return [mm for mm in self._core.spaces.values() if mm.group == group.number]

    def make(self, path: str) -> Group:
        """mkdir. Refused with ENOENT, EEXIST, and EBUSY (see `_no_internal`). Raises ArgumentError."""
        if (
            not isinstance(path, str)
            or not re.fullmatch(r"[^/\0\n]+(/[^/\0\n]+)*", path)
            or not {".", ".."}.isdisjoint(path.split("/"))
        ):
            raise ArgumentError(f"make_group({path!r})", remedy='a path below the root group, as in "a/b"')
        above, _, _ = path.rpartition("/")
        parent = self.find(above, "make_group")
        if any(group.path == path for group in self.online):
            refuse(Errno.EEXIST, f"make_group({path!r})")
        if self._no_internal(parent) and self.members(parent):
            refuse(Errno.EBUSY, f"make_group({path!r})", f"tasks are in {above!r}: move them first")
        number = self._core.number("cgroup")
        group = self.there[number] = Group(number, parent.number, path, 1 + number * _INODES)
        self._find()
        return group

    def remove(self, path: str) -> None:
        """rmdir: what is charged to the group stays charged. Refused with ENOENT, and EBUSY while it is in use."""
        group = self.find(path, "remove_group")
        if group.number == ROOT or self.children(group) or self.members(group):
            refuse(Errno.EBUSY, f"remove_group({path!r})", "tasks or groups are in it")
        group.online = False
        self._find()

    def move(self, mm: AddressSpace, path: str) -> None:
        """Put a task into the group: it is charged there from now on. Refused with ENOENT and EBUSY."""
        group = self.find(path, "move_task")
        if self._no_internal(group) and self.children(group):
            refuse(Errno.EBUSY, f"move_task({path!r})", "groups are in it: one below may have the task")
        mm.group = group.number

    def limit(self, path: str, pages: int | None) -> None:
        """Let the group and those below it have so many pages; None: any number. What is over that is reclaimed.

        Refused with ENOENT, EINVAL for the root, and in version 1 with EBUSY where too much is left, with the limit
        as it was. Raises NotModelled where version 2 would kill a process.
        """
        group = self.find(path, "limit_group")
        if group.number == ROOT:
            refuse(Errno.EINVAL, f"limit_group({path!r})", "the root has no limit")
        before, group.limit = group.limit, pages
        self._find()
        if pages is None or shrink.shrink_to(self._core, self.below(group.number), pages):
            return
        group.limit = before
        self._find()
        if self._core.caps.memcg_v1:
            refuse(Errno.EBUSY, f"limit_group({path!r}, {pages} pages)", "more than that cannot be reclaimed")
        raise NotModelled(
            f"killing a process of the group {path!r}, which has more than {pages} pages",
            remedy="a larger limit, or swap",
        )

    def pages(self, path: str) -> int:
        """Pages charged to the group and those below it; the root's are those of all."""
        group, core = self.find(path, "pages"), self._core
        if group.number == ROOT:
            return int(charged(core, 0, core.memory.frames.rows).sum())
        return core.memory.charges.used(self.below(group.number))

    def _no_internal(self, group: Group) -> bool:
        """Whether tasks and groups in one group exclude each other (version 2, the root excepted; rule CG-011)."""
        return group.number != ROOT and not self._core.caps.memcg_v1

    # -- charges ---------------------------------------------------------------------------------------

    def inodes(self, groups: NDArray[np.int32]) -> U64Array:
        """What kpagecgroup shows for frames that are charged: of a removed group the nearest ancestor that is not."""
        found: U64Array = self._inodes[groups]
        return found

    def slots_given(self, area: SwapArea, slots: Any, pfns: Any) -> None:
        """Pages have slots: in version 2 those remember whom the page is charged to, for as long as they are in use."""
        if not self._core.caps.memcg_v1:
            new = area.group[slots] == 0
            area.group[slots[new]] = self._remembered(self._core.memory.frames.group[pfns[new]])

    def swapped_out(self, area: SwapArea, slots: Any, pfns: Any) -> None:
        """Pages leave memory for their slots, which in version 1 remember the group until they are read back."""
        if self._core.caps.memcg_v1:
            area.group[slots] = self._remembered(self._core.memory.frames.group[pfns])

    def read_back(self, area: SwapArea, slots: Any) -> None:
        """Pages of slots are in memory again."""
        if self._core.caps.memcg_v1:
            area.group[slots] = 0

    def _remembered(self, groups: Any) -> Any:
        """What slots remember for pages of these groups: of a removed one, which no slot remembers, one above it."""
        online = self._online == np.arange(len(self._online))
        if online[groups].all():
            return groups
        for area in self._core.swap.there:
            online[area.group] = True
        nearest = np.zeros_like(self._online)
        for number, group in sorted(self.there.items()):
            nearest[number] = number if online[number] else nearest[group.parent]
        return nearest[groups]

    def owners(self, area: SwapArea, slots: Any) -> Any:
        """Whom pages are charged to that are read back: the group they left from; is it gone, whoever runs."""
        groups = area.group[slots]
        return np.where(self._online[groups] == groups, groups, np.int32(self._core.memory.charging))

    @contextmanager
    def charging(self, group: int) -> Iterator[None]:
        """Have another group charged meanwhile."""
        memory = self._core.memory
        before, memory.charging = memory.charging, group
        try:
            yield
        finally:
            memory.charging = before

    def may_bring_back(self, area: SwapArea) -> None:
        """Raises NotModelled where a limit stands against all pages of the area being in memory."""
        there = np.flatnonzero((area.counts != 0) & (area.cached == 0))
        charges = self._core.memory.charges
        counts = np.bincount(self.owners(area, there), minlength=max(self.there) + 1)
        for limits in charges.limits.values():
            for limit in limits:
                if charges.used(limit.groups) + int(counts[list(limit.groups)].sum()) > limit.pages:
                    raise NotModelled(
                        f"swapoff where the group {self.there[limit.number].path!r} would be over its limit",
                        remedy="a larger limit",
                    )

    def bring_back(self, area: SwapArea, slots: NDArray[np.int64], pfns: NDArray[np.int64]) -> None:
        """The same when the area is switched off: for pages of groups that are gone it is seen later (`adopt`)."""
        groups = area.group[slots]
        there = self._online[groups] == groups
        self._core.memory.charges.replace(pfns, np.where(there, groups, ROOT))
        area.group[slots] = 0
        self._orphans = np.sort(pfns[~there])

    def adopt(self, pfns: NDArray[np.int64], group: int) -> None:
        """Charge those of the pages to `group` that are still charged to nobody that there is."""
        if not len(self._orphans):
            return
        mine = np.isin(self._orphans, pfns)
        self._core.memory.charges.replace(self._orphans[mine], group)
        self._orphans = self._orphans[~mine]


def charged(core: Core, first: int, end: int) -> BoolArray:
    """Which frames of a range that has rows are charged to a group, the root included."""
    frames = core.memory.frames
    flags = frames.flags[first:end]
    found: BoolArray = (flags != 0) & ((flags & UNCHARGED) == 0)
    found |= frames.group[first:end] != 0
    return found
