"""The cgroup file system: a directory for each group that is there, with the files that say something of memory.

Only what is modelled: no events, no pressure, no knobs but the limit. There once a group was made.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.services.memcg import ROOT, Group, charged
from pmcore.errors import syscall_error
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["group_at", "names", "root", "text", "to_limit"]

#: What version 1 shows for no limit: the largest number of whole pages.
_NO_LIMIT = (1 << 63) - 1
_LRU, _ACTIVE, _STUCK = int(PageFlag.LRU), int(PageFlag.ACTIVE), int(PageFlag.UNEVICTABLE)
_BACKED, _ANON, _THP = int(PageFlag.SWAPBACKED), int(PageFlag.ANON), int(PageFlag.THP)
_SWAPCACHE, _PGTABLE = int(PageFlag.SWAPCACHE), int(PageFlag.PGTABLE)

_Members = Mapping[int, int]
_Make = Callable[["Core", Group, _Members], str]


def root(core: Core) -> str:
    """Where the hierarchy is mounted."""
    return "/sys/fs/cgroup/memory" if core.caps.memcg_v1 else "/sys/fs/cgroup"


def _directory(core: Core, group: Group) -> str:
    return f"{root(core)}/{group.path}" if group.path else root(core)


def names(core: Core) -> tuple[str, ...]:
    """Paths of all files."""
    if not core.memory.grouped:
        return ()
    return tuple(
        f"{_directory(core, group)}/{name}" for group in core.groups.online for name in _files(core, group)
    )


def group_at(core: Core, path: str) -> Group | None:
    """The group whose directory is at the path."""
    if not core.memory.grouped:
        return None
    return next((group for group in core.groups.online if _directory(core, group) == path), None)


def text(core: Core, path: str, members: _Members) -> bytes | None:
    """The text of a file, None where there is none; `members`: the group's number of each process, by its own."""
    directory, _, name = path.rpartition("/")
    group = group_at(core, directory)
    make = None if group is None else _files(core, group).get(name)
    return None if group is None or make is None else make(core, group, members).encode()


def to_limit(core: Core, data: bytes) -> int | None:
    """The bytes that are written to the file of the limit; None for no limit. Refused with EINVAL."""
    word = data.decode("ascii", "replace").strip()
    if word == ("-1" if core.caps.memcg_v1 else "max"):
        return None
    number, unit = (word[:-1], word[-1:].upper()) if word[-1:].upper() in tuple("KMGTPE") else (word, "")
    if not number.isdecimal() or not number.isascii():
        raise syscall_error(errno.EINVAL, f"write({word!r})", remedy="bytes, as in 65536 or 64K")
    value = int(number) << (10 * (" KMGTPE".index(unit) if unit else 0))
    return value if value < _NO_LIMIT else None


# -- the files -------------------------------------------------------------------------------------------


def _files(core: Core, group: Group) -> dict[str, _Make]:
    if core.caps.memcg_v1:
        return {
            "cgroup.procs": _procs,
            "tasks": _procs,
            "memory.usage_in_bytes": _usage,
            "memory.limit_in_bytes": _limit_v1,
            "memory.use_hierarchy": lambda _core, _group, _members: "1\n",
            "memory.stat": _stat_v1,
        }
    found: dict[str, _Make] = {
        "cgroup.procs": _procs,
        "cgroup.controllers": lambda _core, _group, _members: "memory\n",
        "cgroup.subtree_control": lambda core, group, _: "memory\n" if core.groups.children(group) else "\n",
        "memory.stat": _stat_v2,
    }
    if group.number != ROOT:
        found |= {"memory.current": _usage, "memory.max": _limit_v2, "memory.swap.current": _swap}
    return found


def _procs(_core: Core, group: Group, members: _Members) -> str:
    return "".join(f"{pid}\n" for pid, number in sorted(members.items()) if number == group.number)


def _usage(core: Core, group: Group, _members: _Members) -> str:
    return f"{core.groups.pages(group.path) * core.geometry.page_size}\n"


def _limit_v1(core: Core, group: Group, _members: _Members) -> str:
    return f"{_bytes(core, group.limit)}\n"


def _bytes(core: Core, limit: int | None) -> int:
    size = core.geometry.page_size
    return _NO_LIMIT & -size if limit is None else limit * size


def _limit_v2(core: Core, group: Group, _members: _Members) -> str:
    return "max\n" if group.limit is None else f"{group.limit * core.geometry.page_size}\n"


def _swap(core: Core, group: Group, _members: _Members) -> str:
    return f"{_Counts(core, core.groups.below(group.number)).swap * core.geometry.page_size}\n"


class _Counts:
    """Pages charged to one of some groups, by what they are."""

    def __init__(self, core: Core, groups: tuple[int, ...]) -> None:
        frames = core.memory.frames
        chosen = np.isin(frames.group, groups) & charged(core, 0, frames.rows)
        self._flags = frames.flags[chosen]
        self._mapped = frames.mapcount[chosen] > 0
        self.anon = self._count(_ANON, self._mapped)
        self.anon_huge = self._count(_ANON | _THP, self._mapped) if core.caps.thp else 0
        self.file = self._count(CACHED) + self._count(_SWAPCACHE)
        self.shmem = self._count(CACHED | _BACKED)
        self.mapped = self._count(CACHED, self._mapped)
        self.tables = self._count(_PGTABLE)
        lists = (("anon", _BACKED), ("file", 0))
        self.lists = {
            f"{word}_{kind}": self._listed(backed | active)
            for kind, backed in lists
            for word, active in (("inactive", 0), ("active", _ACTIVE))
        }
        self.lists["unevictable"] = self._count(_LRU | _STUCK)
        self.swap = 0
        for area in core.swap.there:
            used, cached = (area.counts != 0) | (area.cached != 0), area.cached != 0
            if core.caps.memcg_v1:  # the page in the cache is charged, too
                self.swap += int(np.isin(frames.group[area.cached[cached] - 1], groups).sum())
                used &= ~cached
            self.swap += int(np.isin(area.group[used], groups).sum())

    def _count(self, bits: int, also: object = True) -> int:
        return int((((self._flags & np.uint64(bits)) == np.uint64(bits)) & also).sum())

    def _listed(self, bits: int) -> int:
        mask = np.uint64(_LRU | _STUCK | _ACTIVE | _BACKED)
        return int(((self._flags & mask) == np.uint64(_LRU | bits)).sum())


def _stat_v1(core: Core, group: Group, _members: _Members) -> str:
    """The group's own pages, its limit, then the pages of all below it as well (rule CG-016)."""
    size, rows = core.geometry.page_size, []
    for prefix, groups in (("", (group.number,)), ("total_", core.groups.below(group.number))):
        counts = _Counts(core, groups)
        found = {
            "cache": counts.file,
            "rss": counts.anon,
            "rss_huge": counts.anon_huge,
            "shmem": counts.shmem,
            "mapped_file": counts.mapped,
            "swap": counts.swap,
            **counts.lists,
        }
        rows += [f"{prefix}{name} {pages * size}\n" for name, pages in found.items()]
        if not prefix:
            limits = [limit.pages for limit in core.memory.charges.limits.get(group.number, ())]
            rows.append(f"hierarchical_memory_limit {_bytes(core, min(limits, default=None))}\n")
    return "".join(rows)


def _stat_v2(core: Core, group: Group, _members: _Members) -> str:
    """Pages of the group and all below it, in bytes (rule CG-016)."""
    counts, size = _Counts(core, core.groups.below(group.number)), core.geometry.page_size
    found = {
        "anon": counts.anon,
        "file": counts.file,
        "pagetables": counts.tables,
        "shmem": counts.shmem,
        "file_mapped": counts.mapped,
        "anon_thp": counts.anon_huge,
        **counts.lists,
    }
    return "".join(f"{name} {pages * size}\n" for name, pages in found.items())
