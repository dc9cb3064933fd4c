"""Memory cgroups: the tree of groups, and whom a page is charged to that comes back from swap.

A frame's group is a number in the frame table: the allocator puts that of whoever runs there (`Memory.charging`). The
root is number 0, as is nobody: which of both a frame belongs to is said by what it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.errors import ArgumentError
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.services.swap import SwapArea
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["NOBODY", "ROOT", "UNCHARGED", "Group", "Groups", "charged"]

#: The group of whatever is in no other.
ROOT = 0
#: Whom pages are charged to, for a moment, whose group is gone.
NOBODY = -1
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


class Groups:
    """All groups of a machine, by number."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.there: dict[int, Group] = {ROOT: Group(ROOT, ROOT, "", 1)}
        self._find()

    def _find(self) -> None:
        """Renew what is looked up by number: the nearest ancestor that is online, and its inode."""
        count = max(self.there) + 1
        self._online: NDArray[np.int32] = np.zeros(count, dtype=np.int32)
        self._inodes: U64Array = np.zeros(count, dtype=np.uint64)
        for number, group in sorted(self.there.items()):  # parents are older
            self._online[number] = number if group.online else self._online[group.parent]
            self._inodes[number] = self.there[int(self._online[number])].inode
        self._core.memory.grouped = count > 1

    def restore(self, rows: list[list[Any]] | None) -> None:
        """The groups of these rows, as `checkpoint.py` writes them; None: the root alone."""
        groups = [Group(*row) for row in rows or ([ROOT, ROOT, "", 1, True],)]
        self.there = {group.number: group for group in groups}
        self._find()

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

    def _no_internal(self, group: Group) -> bool:
        """Whether tasks and groups in one group exclude each other (version 2, the root excepted; rule CG-011)."""
        return group.number != ROOT and not self._core.caps.memcg_v1

    # -- charges ---------------------------------------------------------------------------------------

    def inodes(self, groups: NDArray[np.int32]) -> U64Array:
        """What kpagecgroup shows for frames that are charged: of a removed group the nearest ancestor that is not."""
        found: U64Array = self._inodes[groups]
        return found

    def swapped_out(self, area: SwapArea, slots: Any, pfns: Any) -> None:
        """Pages leave memory for their slots: the group is remembered, or its nearest ancestor that is online."""
        area.group[slots] = self._online[self._core.memory.frames.group[pfns]]

    def swapped_in(self, area: SwapArea, slots: Any, pfns: Any) -> None:
        """Pages are read back: charged to the group that they were charged to; is it gone, to whoever runs."""
        memory = self._core.memory
        memory.frames.group[pfns] = self.back_to(area.group[slots], memory.charging)
        area.group[slots] = 0

    def back_to(self, groups: NDArray[np.int32], other: int) -> NDArray[np.int32]:
        """These groups, `other` in the place of those that are not online."""
        return np.where(self._online[groups] == groups, groups, np.int32(other)).astype(np.int32)


def charged(core: Core, first: int, end: int) -> BoolArray:
    """Which frames of a range that has rows are charged to a group, the root included."""
    frames = core.memory.frames
    flags = frames.flags[first:end]
    found: BoolArray = (flags != 0) & ((flags & UNCHARGED) == 0)
    found |= frames.group[first:end] != 0
    return found
