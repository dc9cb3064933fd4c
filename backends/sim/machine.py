"""A simulated machine: memory, swap, policies and processes. It is the kernel that is looked at and the workbench."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from pmcore.arrays import U64Array
from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.capabilities import Capabilities, capabilities
from pmcore.backends.sim.check import check
from pmcore.backends.sim.checkpoint import State, capture, load, rebuild, save
from pmcore.backends.sim.events import Event, observing
from pmcore.backends.sim.grouping import Grouping
from pmcore.backends.sim.movement import Movement
from pmcore.backends.sim.physical.buddy import MAX_ORDER, Zone
from pmcore.backends.sim.physical.contents import Contents
from pmcore.backends.sim.physical.frames import Frames
from pmcore.backends.sim.physical.memory import Memory, NoMemory, min_watermark
from pmcore.backends.sim.policy import Policy, as_policy, check_sizes, thp_orders
from pmcore.backends.sim.process import SimProcess
from pmcore.backends.sim.services import (
    hotplug,
    migrating,
    page_idle,
    shrink,
    writeback,
)
from pmcore.backends.sim.services import swapoff as swapping_areas
from pmcore.backends.sim.services.hugetlb import Hugetlb
from pmcore.backends.sim.services.khugepaged import Khugepaged
from pmcore.backends.sim.services.ksm import Ksm
from pmcore.backends.sim.services.memcg import Groups
from pmcore.backends.sim.services.migrating import Migration
from pmcore.backends.sim.services.pagecache import Inode
from pmcore.backends.sim.services.readahead import DISKS
from pmcore.backends.sim.services.shrink import Reclaimed
from pmcore.backends.sim.services.swap import SwapArea, SwapSpace
from pmcore.backends.sim.task import SimTask
from pmcore.backends.sim.views import blocks as block_files
from pmcore.backends.sim.views import cgroups, texts
from pmcore.backends.sim.views import frames as frame_view
from pmcore.backends.sim.virtual.space import AddressSpace
from pmcore.backends.sim.virtual.tables import TablePool
from pmcore.errors import ArgumentError, FormatError, syscall_error
from pmcore.geometry import Geometry, parse_size
from pmcore.profile import KernelProfile, preset
from pmcore.protocols import IDLE_BITMAP, FrameFile, Kernel
from pmcore.uapi import Errno, PageFlag

__all__ = ["Core", "Policy", "SimMachine", "SwapSettings", "load_machine", "make_machine"]

#: Below 4 GiB lies ZONE_DMA32.
_DMA32_END = 4 << 30
_BLOCK = 1 << MAX_ORDER


class Core:
    """What all rooms of one machine share."""

    NoMemory = NoMemory

    def __init__(self, profile: KernelProfile, memory: Memory, policy: Policy, *, privileged: bool) -> None:
        self.profile = profile
        self.geometry: Geometry = profile.geometry
        self.caps: Capabilities = capabilities(profile)
        self.policy = policy
        self.privileged = privileged
        self.memory = memory
        self.swap = SwapSpace(memory)
        self.groups = Groups(self)
        self.hugetlb = Hugetlb(self)
        _boot(memory)
        self.zero_pfn = memory.block(0, kernel=True)
        memory.frames.flags_at[self.zero_pfn] = self.caps.zero_flags
        self.huge_zero_pfn = 0
        self.pool = TablePool(memory, profile.geometry)
        #: Address spaces of living tasks, by their number.
        self.spaces: dict[int, AddressSpace] = {}
        #: Files that anything still refers to, by inode number.
        self.inodes: dict[int, Inode] = {}
        #: Files of the disk: inode numbers by name.
        self.names: dict[str, int] = {}
        #: Pages that files of the disk which are opened from now on read ahead.
        self.pages_ahead = 0
        self.disk = DISKS["compressed"]
        self.khugepaged = Khugepaged(self)
        self.ksm = Ksm(self)
        #: The last number given, by what was numbered.
        self.numbers: dict[str, int] = {}
        #: Locked mappings of a folio by its first frame, where there is more than one.
        self.mlocks: dict[int, int] = {}
        #: Bit that a written entry gets, 0 where soft-dirty is not tracked.
        self.soft_dirty = 1 << 55 if self.caps.soft_dirty else 0
        self.mmap_min = 65536
        self.stack_limit = 8 << 20
        self.mmap_base = self.geometry.task_size - (1 << 36) & -self.geometry.page_size
        #: The migration that is under way, if any.
        self.migration: Migration | None = None
        #: What happened, counted.
        self.counters: Counter[str] = Counter()
        #: Told of page faults (address space, address or addresses, write) before they are handled; None: nobody looks.
        self.on_fault: Callable[[AddressSpace, int | U64Array, bool], object] | None = None

    def thp_orders(self) -> tuple[int, int]:
        """Bits of the orders of huge pages that policy gives to any mapping, and to one under MADV_HUGEPAGE."""
        policy, geometry = self.policy, self.geometry
        return thp_orders(policy.pmd, policy.thp_sizes, geometry.page_shift, geometry.pmd_order)

    @property
    def names_frames(self) -> bool:
        """Whether entries may name frames without mapping them: ever a page was poisoned, or some are on their way."""
        return self.counters["memory_failure"] > 0 or self.migration is not None

    def count(self, event: str, times: int = 1) -> None:
        """Count something that happened."""
        self.counters[event] += times

    def relieve(self, pages: int) -> bool:
        """Reclaim because memory has run out; whether trying again makes sense."""
        if self.memory.charges.full is not None:
            return shrink.relieve_group(self)
        return shrink.relieve(self, pages)

    def number(self, what: str) -> int:
        """A number that nothing of that sort had before."""
        self.numbers[what] = self.numbers.get(what, 0) + 1
        return self.numbers[what]

    def may_lock(self, mm: AddressSpace, length: int) -> bool:
        """Whether RLIMIT_MEMLOCK lets so many bytes more be locked."""
        return self.policy.memlock is None or mm.locked + length <= self.policy.memlock

    def knows_advice(self, advice: int) -> bool:
        """Whether this kernel knows an madvise number."""
        return advice in self.caps.advice

    def knows_vm_flag(self, code: str) -> bool:
        """Whether smaps of this kernel has that code; a flag without one shows as ??."""
        return code not in self.caps.unknown_vm_flags


class SimMachine(Grouping, Movement, Kernel):
    """See `pmcore.backends.sim.open_machine`."""

    name = "sim"
    concurrency = 1

    def __init__(
        self,
        *,
        memory: int,
        swap: Sequence[SwapSettings],
        profile: KernelProfile,
        policy: Policy,
        nodes: int,
        holes: Sequence[tuple[int, int]],
        privileged: bool,
        hugepages: Mapping[int | str, int | tuple[int, int]],
        block_size: int,
        disk_kind: str,
    ) -> None:
        self.profile = profile
        self.pfn_visible = privileged
        size = profile.geometry.page_size
        frames = Frames(memory // size)
        zones = _zones(frames, memory, size, nodes, holes)
        store = Memory(frames, zones, Contents(size), block_pages=block_size // size)
        self.core = Core(profile, store, policy, privileged=privileged)
        self.core.disk = DISKS[disk_kind]
        store.reserve = min_watermark(memory) // size
        for area in swap:
            self.swapon(
                area.length,
                priority=area.priority,
                immediate=area.immediate,
                large_folios=area.large_folios,
                compressed=area.compressed and area.immediate,
            )
        for huge, wanted in hugepages.items():
            count, surplus = wanted if isinstance(wanted, tuple) else (wanted, 0)
            if surplus:
                self.core.hugetlb.overcommit(huge, surplus)
            if self.core.hugetlb.resize(huge, count) < count:
                raise ArgumentError(
                    f"{count} huge pages of {huge!r} in {memory} bytes of memory",
                    remedy="more memory, or fewer",
                )
        self._tasks: dict[int, SimTask] = {}
        #: Every task there ever was: who holds one finds it alive again after `restore`.
        self._known: dict[int, SimTask] = {}
        self._settings = {
            "memory": memory,
            "profile": {
                "name": profile.name,
                "capabilities": sorted(profile.capabilities),
                "config": sorted(profile.config),
                "arch": profile.arch,
                "geometry": attrs.asdict(profile.geometry),
            },
            "privileged": privileged,
            "block_size": block_size,
            "disk_kind": disk_kind,
        }
        self._closed = False
        #: What was set of huge pages before `set_thp` was first called.
        self._opened_thp: tuple[str, tuple[tuple[str, str], ...]] | None = None

    # -- the workbench ---------------------------------------------------------------------------------

    @property
    def kernel(self) -> SimMachine:
        """Itself."""
        return self

    def spawn(self) -> SimTask:
        """A fresh task with an empty address space."""
        self.core.memory.charging = 0
        return self.adopt(AddressSpace(self.core, self.core.number("space")))

    def adopt(self, mm: AddressSpace) -> SimTask:
        """A task for an address space."""
        task = SimTask(self, self.core.number("pid"), mm)
        self._tasks[task.pid] = self._known[task.pid] = task
        return task

    def tasks(self) -> Iterable[SimTask]:
        """The tasks that are alive, oldest first."""
        return tuple(self._tasks.values())

    @property
    def disk_kind(self) -> str:
        """What its regular files lie on."""
        return str(self._settings["disk_kind"])

    def forget(self, task: SimTask) -> None:
        """Take a task that has ended off the list."""
        self._tasks.pop(task.pid, None)

    def settle(self) -> None:
        """Nothing is put off here."""

    def set_readahead(self, length: int | str) -> None:
        """Write to the disk's read_ahead_kb: files opened from now on read so many bytes ahead; at first none."""
        self.core.pages_ahead = parse_size(length) // self.profile.geometry.page_size

    def drop_caches(self) -> int:
        """Write 1 to drop_caches: what files on the disk have clean and unmapped in the cache goes; how many pages."""
        migrating.still(self.core, "drop_caches")
        return writeback.drop_caches(self.core)

    def set_thp(self, settings: Mapping[str, str]) -> None:
        """Sizes of huge pages from here on, as `Policy` names them; "enabled" is its `pmd`. Raises ArgumentError."""
        policy = self.core.policy
        if self._opened_thp is None:
            if not settings:
                return
            self._opened_thp = (policy.pmd, policy.thp_sizes)
        pmd, sizes = self._opened_thp
        wanted: dict[str | int, str] = {
            **dict(sizes),
            **{size: how for size, how in settings.items() if size != "enabled"},
        }
        changed = attrs.evolve(policy, pmd=settings.get("enabled", pmd), thp_sizes=wanted)
        check_sizes(changed, self.core.geometry, mthp=self.core.caps.mthp)
        policy.pmd, policy.thp_sizes = changed.pmd, changed.thp_sizes

    def close(self) -> None:
        """End all tasks."""
        if self.core.migration is not None:
            migrating.finish(self.core)
        for task in list(self._tasks.values()):
            task.exit()
        self._closed = True

    def ksm_scan(
        self, full_scans: int = 1, *, use_zero_pages: bool = False, max_page_sharing: int = 256
    ) -> dict[str, int]:
        """So many full scans of ksmd; the counters afterwards. Raises Busy for another `max_page_sharing` too late."""
        migrating.still(self.core, "ksm_scan")
        ksm = self.core.ksm
        ksm.max_page_sharing = max_page_sharing
        before, ksm.use_zero_pages = ksm.use_zero_pages, use_zero_pages
        try:
            return ksm.run(full_scans)
        finally:
            ksm.use_zero_pages = before

    def ksm_unmerge(self) -> dict[str, int]:
        """Unmerge all pages; the counters afterwards."""
        migrating.still(self.core, "ksm_unmerge")
        return self.core.ksm.unmerge()

    # -- the kernel ------------------------------------------------------------------------------------

    def frame_count(self) -> int:
        """All frames, holes included."""
        return self.core.memory.frames.count

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of kpagecount, kpageflags, kpagecgroup, or of a text (meminfo, buddyinfo, swaps, /sys/...)."""
        if name == IDLE_BITMAP:
            self._may_look(name)
            return page_idle.read(self.core, offset, length)
        if name not in tuple(FrameFile):
            text = self._group_text(name) if name.startswith("/sys/fs/") else texts.text(self.core, name)
            if text is None:
                raise syscall_error(int(Errno.ENOENT), f"open(/proc/{name})")
            return text[offset : offset + length]
        self._may_look(name)
        if offset % 8 or length % 8 or offset < 0 or length < 0:
            refuse(Errno.EINVAL, f"pread(/proc/{name}, {length}, {offset})")
        out = np.zeros(min(length // 8, max(0, self.frame_count() - offset // 8)), dtype=np.uint64)
        return out[: self.read_frames(FrameFile(name), offset // 8, out)].tobytes()

    def files(self) -> Sequence[str]:
        """The frame files that the kernel has, and its texts."""
        bitmap = (IDLE_BITMAP,) if self.profile.has("page_idle") else ()
        return (*super().files(), *texts.names(self.core), *bitmap, *cgroups.names(self.core))

    def pwrite(self, name: str, offset: int, data: bytes) -> int:
        """Write to page_idle/bitmap: frames whose bits are set become idle; the bytes taken (ID-001 to ID-004).

        Or to cgroup.procs or the limit of a memory cgroup (CG-017), or to the state of a memory block (FS-017).
        """
        if name.startswith("/sys/fs/"):
            return self._write_group(name, data)
        block = block_files.state_of(name)
        if block is not None:
            return self._write_block(block, name, data)
        if name != IDLE_BITMAP:
            return super().pwrite(name, offset, data)
        self._may_look(name)
        return page_idle.write(self.core, offset, data)

    def mark_idle(self, pfns: U64Array) -> None:
        """Mark frames idle: what writing their bits to page_idle/bitmap does. Raises Missing, NotPermitted."""
        self._may_look(IDLE_BITMAP)
        page_idle.mark(self.core, np.unique(np.asarray(pfns, dtype=np.int64)))

    def _may_look(self, name: str) -> None:
        path = name if name.startswith("/") else f"/proc/{name}"
        if not self.profile.has("page_idle" if name == IDLE_BITMAP else name):
            remedy = "needs a kernel with CONFIG_IDLE_PAGE_TRACKING" if name == IDLE_BITMAP else ""
            raise syscall_error(int(Errno.ENOENT), f"open({path})", remedy=remedy)
        if not self.pfn_visible:
            raise syscall_error(
                int(Errno.EACCES), f"open({path})", remedy="open the machine with privileged=True"
            )

    def read_frames(self, file: FrameFile, start_pfn: int, out: U64Array) -> int:
        """Raw words from frame `start_pfn` on."""
        self._may_look(file)
        return frame_view.fill(self.core, file, start_pfn, out)

    def pids(self) -> Sequence[int]:
        """The tasks' numbers."""
        return sorted(self._tasks)

    def process(self, pid: int) -> SimProcess:
        """The process of that number."""
        if pid not in self._tasks:
            raise syscall_error(int(Errno.ESRCH), f"process({pid})", remedy="see pids() for those there are")
        return self._tasks[pid].process

    # -- going back ------------------------------------------------------------------------------------

    def checkpoint(self) -> State:
        """The whole state now, to go back to."""
        return capture(self.core, {pid: task.mm for pid, task in self._tasks.items()})

    def restore(self, state: State) -> None:
        """Go back to a checkpoint of this machine; tasks that ended since live again, younger ones are gone."""
        spaces = rebuild(self.core, state)
        for pid, task in list(self._tasks.items()):
            if pid not in spaces:
                task.alive = False
                self.forget(task)
        for pid, mm in spaces.items():
            task = self._known.get(pid) or SimTask(self, pid, mm)
            task.mm, task.alive = mm, True
            self._known[pid] = self._tasks[pid] = task
        self._tasks = dict(sorted(self._tasks.items()))

    def digest(self) -> str:
        """SHA-256 of the whole state, the same on every platform for the same history."""
        return self.checkpoint().digest()

    def save(self, path: str | Path) -> None:
        """Write the machine to a file that `load_machine` reads."""
        save(self.checkpoint(), self._settings, path)

    def check(self) -> None:
        """Verify every invariant of the state. Raises BrokenInvariant that names what does not hold."""
        with migrating.as_before(self.core):
            check(self.core, [task.mm for task in self._tasks.values()])

    # -- looking on ------------------------------------------------------------------------------------

    def observe(self, tell: Callable[[Event], object] | None = None) -> AbstractContextManager[list[Event]]:
        """As long as the context lasts, tell of each fault, allocation, change of an entry or of flags (`events.py`).

        `tell` is called with each event after the call that caused it; without it the events are collected in the
        list that the context gives. Observing costs time, and changes nothing of the state.
        """
        return observing(self, tell)

    # -- the administrator -----------------------------------------------------------------------------

    def reclaim(self, amount: int | str, *, group: str = "") -> Reclaimed:
        """Reclaim anonymous memory: so many pages, or bytes ("4 MiB"). What came of it; less is no error.

        From the tails of the LRU lists, whoever maps what is there (rules RC-001 to RC-010); of a memory cgroup and
        those below it alone, if one is named. Raises ArgumentError, or SyscallError for a group that there is not.
        """
        migrating.still(self.core, "reclaim")
        pages, core = self._pages("reclaim", amount), self.core
        core.memory.charging = 0
        if group:
            return shrink.reclaim_of(
                core, core.groups.below(core.groups.find(group, "reclaim").number), pages
            )
        return shrink.reclaim(core, pages)

    def _pages(self, call: str, amount: int | str) -> int:
        """A number of pages, or of bytes in whole pages. Raises ArgumentError."""
        if isinstance(amount, bool) or not isinstance(amount, int | str):
            raise ArgumentError(f"{call}({amount!r})", remedy='a number of pages, or bytes as in "4 MiB"')
        size = self.profile.geometry.page_size
        pages = -(-parse_size(amount) // size) if isinstance(amount, str) else amount
        if pages < 0:
            raise ArgumentError(f"{call}({amount!r})", remedy="0 pages or more")
        return pages

    def balloon_inflate(self, amount: int | str) -> int:
        """Give so many pages, or bytes ("4 MiB"), to a balloon that the hypervisor has instead; how many it got.

        Only what is free above the watermark: for a balloon nothing is reclaimed (rule HP-008). Raises ArgumentError.
        """
        migrating.still(self.core, "balloon_inflate")
        self.core.memory.charging = 0
        return hotplug.inflate(self.core, self._pages("balloon_inflate", amount))

    def balloon_deflate(self, amount: int | str) -> int:
        """Take so many pages, or bytes, back from the balloon; how many there were."""
        migrating.still(self.core, "balloon_deflate")
        return hotplug.deflate(self.core, self._pages("balloon_deflate", amount))

    @property
    def counters(self) -> Counter[str]:
        """What happened so far, counted: "copy_on_write", "swap_out", "split_pmd", ..."""
        return self.core.counters

    @property
    def hugetlb(self) -> Hugetlb:
        """The pools of huge pages: `pools`, `resize(size, count)`, `overcommit(size, count)`."""
        return self.core.hugetlb

    @property
    def ksm(self) -> Ksm:
        """ksmd, its knobs and its counters."""
        return self.core.ksm

    def swap_areas(self) -> tuple[SwapArea, ...]:
        """The swap areas, by number."""
        return tuple(self.core.swap.there)

    @property
    def khugepaged(self) -> Khugepaged:
        """khugepaged: its settings, and `step` to have it look at some pages."""
        return self.core.khugepaged

    def swapon(
        self,
        length: int | str,
        *,
        priority: int | None = None,
        immediate: bool = True,
        large_folios: bool = False,
        compressed: bool = True,
    ) -> SwapArea:
        """Switch a swap area on, see `SwapSettings`.

        Refused with EINVAL without room for a page, EPERM when there are too many; ArgumentError for a priority that
        is none.
        """
        migrating.still(self.core, "swapon")
        return swapping_areas.swapon(
            self.core,
            parse_size(length),
            priority=priority,
            immediate=immediate,
            large_folios=large_folios,
            compressed=compressed and immediate,
        )

    def swapoff(self, number: int) -> int:
        """Switch an area off: its pages come back into memory, its entries are replaced everywhere; how many pages.

        Refused with EINVAL if there is none of that number; with ENOMEM, nothing half-done, if they do not fit.
        """
        migrating.still(self.core, "swapoff")
        self.core.memory.charging = 0
        return swapping_areas.swapoff(self.core, number)

    def swaps(self) -> tuple[SwapRow, ...]:
        """What /proc/swaps shows, by number."""
        size = self.profile.geometry.page_size
        return tuple(
            SwapRow(
                number=area.number,
                size=(area.slots - 1) * size,
                used=area.used * size,
                priority=area.priority,
            )
            for area in self.core.swap.there
        )


@attrs.frozen(kw_only=True)
class SwapRow:
    """A line of /proc/swaps. Sizes in bytes."""

    number: int
    size: int
    used: int
    priority: int


@attrs.frozen(kw_only=True)
class SwapSettings:
    """A swap area to be switched on."""

    length: int
    #: 0 to 32767, the highest is filled first; None for the kernel's choice: after all others.
    priority: int | None = None
    #: Whether a page is gone as soon as it is written, as with zswap; else it stays cached until it is reclaimed.
    immediate: bool = True
    #: Whether that is memory that gives its copy away when a page is read back; a device keeps it.
    compressed: bool = True
    #: Whether large folios are swapped out whole, as on devices with clusters; else they are taken apart first.
    large_folios: bool = False


#: Sorts of swap area by name: memory behind zswap, a device whose writes complete at once, a disk.
_SWAP_KINDS: dict[str, dict[str, bool]] = {
    "compressed": {},
    "device": {"compressed": False},
    "disk": {"compressed": False, "immediate": False},
}


def _boot(memory: Memory) -> None:
    """What the kernel keeps from the start: the first frames (frame 0 is never anybody's), and its slabs."""
    for _ in range(16):
        pfn = memory.block(0, kernel=True)
        memory.frames.flags_at[pfn] = int(PageFlag.RESERVED)
    for _ in range(2):
        memory.kernel_folio(3, int(PageFlag.SLAB))


def _zones(
    frames: Frames, memory: int, size: int, nodes: int, holes: Sequence[tuple[int, int]]
) -> list[Zone]:
    """Zones between the holes: DMA32 below 4 GiB, Normal above, each node its share. Normal is used first."""
    end = memory // size // _BLOCK * _BLOCK
    if not end:
        raise ArgumentError(f"{memory} bytes of memory", remedy=f"at least {_BLOCK * size} are needed")
    cuts = {0, end, *(min(end, n * (end // nodes) // _BLOCK * _BLOCK) for n in range(1, nodes))}
    if memory > _DMA32_END:
        cuts.add(_DMA32_END // size // _BLOCK * _BLOCK)
    gaps = []
    for low, high in holes:
        if low % (_BLOCK * size) or high % (_BLOCK * size) or not 0 <= low < high <= memory:
            raise ArgumentError(
                f"hole {low:#x}-{high:#x}", remedy=f"whole blocks of {_BLOCK * size} bytes inside memory"
            )
        gaps.append((low // size, high // size))
        cuts |= {low // size, high // size}
    zones = []
    per_node = end // nodes // _BLOCK * _BLOCK or end
    for low, high in itertools.pairwise(sorted(cuts)):
        if any(a <= low < b for a, b in gaps):
            continue
        name = "DMA32" if memory > _DMA32_END and high * size <= _DMA32_END else "Normal"
        zones.append(Zone(frames, low, high, name=name, node=min(low // per_node, nodes - 1)))
    if not zones:
        raise ArgumentError("all of memory is holes")
    return sorted(zones, key=lambda zone: (zone.name == "DMA32", zone.node, zone.start))


def make_machine(
    *,
    memory: int | str,
    swap: int | str | Sequence[SwapSettings],
    swap_kind: str = "compressed",
    disk_kind: str = "compressed",
    kernel: str | KernelProfile,
    config: Iterable[str] = (),
    policy: Policy | Mapping[str, Any] | None = None,
    nodes: int = 1,
    holes: Sequence[tuple[int | str, int | str]] = (),
    privileged: bool = True,
    geometry: Geometry | None = None,
    hugepages: Mapping[int | str, int | tuple[int, int]] | None = None,
    block_size: int | str = "128 MiB",
) -> SimMachine:
    """Check the settings and build the machine. Raises ArgumentError, UnknownCapability."""
    profile = preset(kernel, config=config, geometry=geometry) if isinstance(kernel, str) else kernel
    areas: Any = swap
    if isinstance(swap, int | str):
        length = parse_size(swap)
        if swap_kind not in _SWAP_KINDS:
            raise ArgumentError(f"swap_kind={swap_kind!r}", remedy=f"known: {', '.join(_SWAP_KINDS)}")
        areas = [SwapSettings(length=length, **_SWAP_KINDS[swap_kind])] if length else []
    if disk_kind not in DISKS:
        raise ArgumentError(f"disk_kind={disk_kind!r}", remedy=f"known: {', '.join(DISKS)}")
    if not isinstance(nodes, int) or nodes < 1:
        raise ArgumentError(f"nodes={nodes!r}", remedy="at least one")
    settings = as_policy(policy)
    check_sizes(settings, profile.geometry, mthp=profile.has("mm.mthp"))
    return SimMachine(
        memory=parse_size(memory),
        swap=tuple(areas),
        profile=profile,
        policy=settings,
        nodes=nodes,
        holes=[(parse_size(low), parse_size(high)) for low, high in holes],
        privileged=privileged,
        hugepages=hugepages or {},
        block_size=_block_size(block_size, profile.geometry.page_size),
        disk_kind=disk_kind,
    )


def _block_size(value: int | str, page_size: int) -> int:
    size = parse_size(value)
    if size & size - 1 or size < _BLOCK * page_size:
        raise ArgumentError(f"block_size={value!r}", remedy=f"a power of two, {_BLOCK * page_size} or more")
    return size


def load_machine(path: str | Path) -> SimMachine:
    """The machine that `SimMachine.save` wrote, with its tasks. Raises FormatError, OSError."""
    state, settings = load(path)
    try:
        shape = settings["profile"]
        profile = KernelProfile(
            name=shape["name"],
            capabilities=frozenset(shape["capabilities"]),
            config=frozenset(shape["config"]),
            arch=shape["arch"],
            geometry=Geometry(**shape["geometry"]),
        )
        machine = make_machine(
            memory=settings["memory"],
            swap=0,
            kernel=profile,
            privileged=settings["privileged"],
            block_size=settings.get("block_size", 128 << 20),
            disk_kind=settings.get("disk_kind", "compressed"),
        )
        machine.restore(state)
        machine.check()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise FormatError(f"not a saved machine: {type(error).__name__}: {error}", source=str(path)) from None
    return machine
