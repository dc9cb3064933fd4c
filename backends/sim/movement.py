"""A machine's memory under way: blocks that go and come, pages that move, frames that fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmcore.arrays import U64Array
from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.physical import memory_blocks as blocks
from pmcore.backends.sim.services import compaction, hotplug, memory_failure, migrating
from pmcore.errors import ArgumentError, NotModelled
from pmcore.profile import KernelProfile
from pmcore.protocols import Task, Workbench
from pmcore.uapi import Errno

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.task import SimTask

__all__ = ["Movement", "number_of"]


def number_of(call: str, value: int) -> int:
    """The number of a block. Raises ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"{call}({value!r})", remedy="the number of a block, as in memory_blocks()")
    return value


class Movement(Workbench):
    """The part of a machine that moves pages, and takes memory out of use."""

    core: Core
    profile: KernelProfile
    _tasks: dict[int, SimTask]

    @property
    def block_size(self) -> int:
        """Bytes of a memory block (/sys/devices/system/memory/block_size_bytes)."""
        return self.core.memory.block_pages * self.profile.geometry.page_size

    def memory_blocks(self) -> list[blocks.MemoryBlock]:
        """The blocks that hold memory, by number: those that are online and those that are not."""
        return blocks.blocks(self.core.memory, self.profile.geometry.page_size)

    def offline_block(self, number: int) -> None:
        """Write "offline" to /sys/devices/system/memory/memoryN/state (rules HP-001 to HP-007).

        What processes have there is migrated away; free frames leave the buddy allocator. Refused with ENOENT where
        there is no such block, EINVAL for one that is offline or not of one zone alone, EBUSY where the kernel uses
        some of it; NotModelled where the kernel would try without end, or take large folios apart to have room for
        them. Refused or not modelled: nothing has changed.
        """
        migrating.still(self.core, "offline_block")
        hotplug.offline(self.core, number_of("offline_block", number))

    def online_block(self, number: int) -> None:
        """Write "online" to it: all its frames are free. Refused with ENOENT, or EINVAL for one that is online."""
        migrating.still(self.core, "online_block")
        hotplug.online(self.core, number_of("online_block", number))

    def _write_block(self, number: int, name: str, data: bytes) -> int:
        """What was written to a block's state: "online" or "offline", a line's end behind it or not (rule FS-017)."""
        word = data.partition(b"\0")[0].removesuffix(b"\n")
        if word == b"offline":
            self.offline_block(number)
        elif word == b"online":
            self.online_block(number)
        elif word in (b"online_kernel", b"online_movable"):
            raise NotModelled(
                "a block of memory that goes online in a zone of its own choice (online_movable)"
            )
        else:
            refuse(Errno.EINVAL, f"write({name}, {data[:40]!r})", '"online" or "offline"')
        return len(data)

    def compact(self) -> int:
        """Write 1 to compact_memory: pages move to the ends of their zones (rule MG-010); how many."""
        return compaction.compact(self.core)

    def start_migration(self, task: Task, start: int, length: int) -> int:
        """Begin to move all pages that a range of the task's maps, whoever maps them; how many (rules MG-006, MG-007).

        The machine stays in the middle of it until `finish_migration`: migration entries stand for the pages. Mappings
        change meanwhile, processes fork and end, what stays is accessed (MG-011 to MG-013); an access to a page that is
        on its way is an AddressSpaceFault, SIGSTOP. Raises ArgumentError where there is nothing to be moved.
        """
        if self._tasks.get(task.pid) is not task:
            raise ArgumentError(f"{task!r} is no living task of this machine")
        return migrating.start(self.core, self._tasks[task.pid].mm, start, start + length)

    def finish_migration(self) -> None:
        """Map the pages where they have gone: as if they had been moved in one step (rule MG-008)."""
        migrating.finish(self.core)

    def hwpoison(self, pfns: U64Array) -> None:
        """Write frame numbers to hwpoison/corrupt-pfn: free frames, and pages of anonymous memory (rule HW-006)."""
        migrating.still(self.core, "hwpoison")
        memory_failure.hwpoison(self.core, pfns)

    def unpoison(self, pfns: U64Array) -> None:
        """Write frame numbers to hwpoison/unpoison-pfn: the frames are free again."""
        migrating.still(self.core, "unpoison")
        memory_failure.unpoison(self.core, pfns)
