"""What memory cgroups are charged, in pages, and how much of it they may be charged."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np

from pmcore.backends.sim.physical.frames import Frames

__all__ = ["Charges", "Limit"]


@attrs.frozen
class Limit:
    """At most `pages` for the group `number` and all below it: `groups`, itself among them."""

    number: int
    pages: int
    groups: tuple[int, ...]


class Charges:
    """Pages by group number; the root's (0) are not counted. A number in the frame table is one of these."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self.pages: list[int] = [0]
        #: By group the limits that it is under, its own and those of the groups above; groups without any are left out.
        self.limits: dict[int, tuple[Limit, ...]] = {}
        #: The limit that a page was refused for last, until one is charged again.
        self.full: Limit | None = None

    def used(self, groups: tuple[int, ...]) -> int:
        """Pages charged to any of the groups."""
        return sum(self.pages[number] for number in groups)

    def room(self, group: int, wanted: int) -> int:
        """How many of so many pages the group may be charged; fewer than wanted: `full` says why."""
        for limit in self.limits.get(group, ()):
            left = max(0, limit.pages - self.used(limit.groups))
            if left < wanted:
                wanted, self.full = left, limit
        return wanted

    def add(self, group: int, pfns: Any, count: int) -> None:
        """Charge frames (a number, a slice, an array) that were charged to nobody."""
        self._frames.group[pfns] = group
        self.pages[group] += count
        self.full = None

    def drop_one(self, pfn: int) -> None:
        """One frame is charged to nobody any more."""
        group = self._frames.group_at[pfn]
        if group:
            self.pages[group] -= 1
            self._frames.group_at[pfn] = 0

    def drop(self, pfns: Any) -> None:
        """The same for many."""
        groups = self._frames.group[pfns]
        if groups.any():
            self._count(groups, -1)
            self._frames.group[pfns] = 0

    def replace(self, pfns: Any, groups: Any) -> None:
        """Charge frames to other groups, one for each or one for all."""
        self._count(self._frames.group[pfns], -1)
        self._frames.group[pfns] = groups
        self._count(self._frames.group[pfns], 1)

    def _count(self, groups: Any, sign: int) -> None:
        counts = np.bincount(np.atleast_1d(groups), minlength=1)
        for number in np.flatnonzero(counts[1:]).tolist():
            self.pages[number + 1] += sign * int(counts[number + 1])

    def recount(self, groups: int) -> None:
        """Count anew, for groups below that number."""
        counts = np.bincount(self._frames.group, minlength=groups)
        self.pages = [0, *counts[1:].tolist()]
        self.full = None
