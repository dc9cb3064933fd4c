"""Memory cgroups as the administrator of a simulated machine has them: the workbench's calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pmcore.backends.sim.views import cgroups
from pmcore.errors import syscall_error
from pmcore.geometry import parse_size
from pmcore.protocols import Task, Workbench
from pmcore.uapi import Errno

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.task import SimTask

__all__ = ["Grouping"]


class Grouping(Workbench):
    """The part of a machine that makes groups and puts tasks into them."""

    core: Core
    _tasks: dict[int, SimTask]

    def make_group(self, path: str) -> None:
        """mkdir of a memory cgroup (rules CG-001 to CG-017). Raises ArgumentError, SyscallError as mkdir(2) does."""
        if not self.core.caps.memcg:
            raise syscall_error(
                int(Errno.ENOENT), f"make_group({path!r})", remedy="a kernel with CONFIG_MEMCG"
            )
        self.core.groups.make(path)

    def remove_group(self, path: str) -> None:
        """rmdir of it."""
        self.core.groups.remove(path)

    def move_task(self, task: Task, path: str) -> None:
        """Write the task's number to the group's cgroup.procs; "" is the root."""
        if self._tasks.get(task.pid) is not task:
            raise syscall_error(int(Errno.ESRCH), f"move_task({task.pid})", remedy="the task is gone")
        self.core.groups.move(self._tasks[task.pid].mm, path)

    def limit_group(self, path: str, length: int | str | None) -> None:
        """Write bytes to the group's memory.limit_in_bytes, or memory.max in version 2; None for no limit.

        In whole pages, the rest is left out (rules CG-013, CG-014). Raises SyscallError, ArgumentError; NotModelled
        where version 2 would kill a process. What was reclaimed until then stays in swap.
        """
        pages = None if length is None else parse_size(length) // self.core.geometry.page_size
        self.core.memory.charging = 0
        self.core.groups.limit(path, pages)

    def group_usage(self, path: str) -> int:
        """Bytes that are charged to the group and those below it: pages that processes and caches have, page tables.

        A kernel's memory.usage_in_bytes and memory.current are larger: by slabs and stacks, and by what processors
        have put by for the next pages (rule CG-015).
        """
        return self.core.groups.pages(path) * self.core.geometry.page_size

    def inode(self, path: str) -> int:
        """The inode number of a group's directory, or of a file in one; 0 for any other path."""
        group = cgroups.group_at(self.core, path)
        if group is not None:
            return group.inode
        directory, _, name = path.rpartition("/")
        group = cgroups.group_at(self.core, directory)
        paths = (
            [] if group is None else [p for p in cgroups.names(self.core) if p.startswith(f"{directory}/")]
        )
        files = [p.rpartition("/")[2] for p in paths if p.count("/") == path.count("/")]
        return 0 if group is None or name not in files else group.inode + 1 + files.index(name)

    def _group_text(self, path: str) -> bytes | None:
        return cgroups.text(self.core, path, {pid: task.mm.group for pid, task in self._tasks.items()})

    def _write_group(self, path: str, data: bytes) -> int:
        """write(2) to a file of the cgroup file system. Refused with EINVAL where it takes nothing."""
        directory, _, name = path.rpartition("/")
        group = cgroups.group_at(self.core, directory)
        if group is None or self._group_text(path) is None:
            raise syscall_error(int(Errno.ENOENT), f"open({path})")
        if name in ("memory.limit_in_bytes", "memory.max"):
            self.limit_group(group.path, cgroups.to_limit(self.core, data))
            return len(data)
        word = data.decode("ascii", "replace").strip()
        if name not in ("cgroup.procs", "tasks") or not word.isdecimal():
            raise syscall_error(int(Errno.EINVAL), f"write({path}, {word!r})")
        task = self._tasks.get(int(word))
        if task is None:
            raise syscall_error(
                int(Errno.ESRCH), f"write({path}, {word!r})", remedy="see pids() for those there are"
            )
        self.move_task(task, group.path)
        return len(data)

    def groups(self) -> Mapping[str, int]:
        """The groups by path, with the inode numbers of their directories."""
        return {group.path: group.inode for group in self.core.groups.online}
