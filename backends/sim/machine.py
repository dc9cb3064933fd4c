"""A simulated machine: memory, swap, policies and processes. It is the kernel that is looked at and the workbench."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from pmcore.backends.sim.physical.buddy import MAX_ORDER, Zone
from pmcore.backends.sim.physical.contents import Contents
from pmcore.backends.sim.physical.frames import Frames
from pmcore.backends.sim.physical.memory import Memory, NoMemory
from pmcore.backends.sim.process import SimProcess
from pmcore.backends.sim.services.ksm import Ksm
from pmcore.backends.sim.services.swap import SwapArea, SwapSpace
from pmcore.backends.sim.task import SimTask
from pmcore.backends.sim.views import frames as frame_view
from pmcore.backends.sim.virtual.space import AddressSpace
from pmcore.backends.sim.virtual.tables import TablePool
from pmcore.errors import ArgumentError, FormatError, syscall_error
from pmcore.geometry import Geometry, parse_size
from pmcore.profile import KernelProfile, preset
from pmcore.protocols import FrameFile, Kernel, Workbench
from pmcore.uapi import Errno, PageFlag

__all__ = ["Core", "Policy", "SimMachine", "SwapSettings", "load_machine", "make_machine"]

#: Below 4 GiB lies ZONE_DMA32.
_DMA32_END = 4 << 30
_BLOCK = 1 << MAX_ORDER


@attrs.define(slots=True, kw_only=True)
class Policy:
    """What a machine's administrator sets."""

    #: /sys/kernel/mm/transparent_hugepage/enabled: "always", "madvise", "never".
    pmd: str = attrs.field(default="madvise", validator=attrs.validators.in_(("always", "madvise", "never")))
    #: .../use_zero_page
    use_zero_page: bool = True
    #: /proc/sys/vm/overcommit_memory, as far as it matters: "never" makes MAP_NORESERVE void.
    overcommit: str = attrs.field(
        default="guess", validator=attrs.validators.in_(("guess", "always", "never"))
    )
    #: RLIMIT_MEMLOCK in bytes; None for a process with CAP_IPC_LOCK.
    memlock: int | None = None


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
        _boot(memory)
        self.zero_pfn = memory.block(0, kernel=True)
        memory.frames.flags_at[self.zero_pfn] = self.caps.zero_flags
        self.huge_zero_pfn = 0
        self.pool = TablePool(memory, profile.geometry)
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
        #: What happened, counted.
        self.counters: Counter[str] = Counter()
        #: Told of page faults (address space, address or addresses, write) before they are handled; None: nobody looks.
        self.on_fault: Callable[[AddressSpace, int | U64Array, bool], object] | None = None

    def count(self, event: str, times: int = 1) -> None:
        """Count something that happened."""
        self.counters[event] += times

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
        """Whether smaps of this kernel writes that code."""
        return code not in self.caps.unknown_vm_flags


class SimMachine(Kernel, Workbench):
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
    ) -> None:
        self.profile = profile
        self.pfn_visible = privileged
        size = profile.geometry.page_size
        frames = Frames(memory // size)
        zones = _zones(frames, memory, size, nodes, holes)
        store = Memory(frames, zones, Contents(size))
        self.core = Core(profile, store, policy, privileged=privileged)
        self.core.ksm.spaces = lambda: [task.mm for task in self._tasks.values()]
        store.reserve = _min_watermark(memory) // size
        for area in swap:
            self.core.swap.on(
                area.length // size,
                priority=area.priority,
                immediate=area.immediate,
                large_folios=area.large_folios,
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
        }
        self._closed = False

    # -- the workbench ---------------------------------------------------------------------------------

    @property
    def kernel(self) -> SimMachine:
        """Itself."""
        return self

    def spawn(self) -> SimTask:
        """A fresh task with an empty address space."""
        return self.adopt(AddressSpace(self.core, self.core.number("space")))

    def adopt(self, mm: AddressSpace) -> SimTask:
        """A task for an address space."""
        task = SimTask(self, self.core.number("pid"), mm)
        self._tasks[task.pid] = self._known[task.pid] = task
        return task

    def tasks(self) -> Iterable[SimTask]:
        """The tasks that are alive, oldest first."""
        return tuple(self._tasks.values())

    def forget(self, task: SimTask) -> None:
        """Take a task that has ended off the list."""
        self._tasks.pop(task.pid, None)

    def settle(self) -> None:
        """Nothing is put off here."""

    def close(self) -> None:
        """End all tasks."""
        for task in list(self._tasks.values()):
            task.exit()
        self._closed = True

    def ksm_scan(
        self, full_scans: int = 1, *, use_zero_pages: bool = False, max_page_sharing: int = 256
    ) -> dict[str, int]:
        """So many full scans of ksmd; the counters afterwards. Raises Busy for another `max_page_sharing` too late."""
        ksm = self.core.ksm
        ksm.max_page_sharing = max_page_sharing
        before, ksm.use_zero_pages = ksm.use_zero_pages, use_zero_pages
        try:
            return ksm.run(full_scans)
        finally:
            ksm.use_zero_pages = before

    def ksm_unmerge(self) -> dict[str, int]:
        """Unmerge all pages; the counters afterwards."""
        return self.core.ksm.unmerge()

    # -- the kernel ------------------------------------------------------------------------------------

    def frame_count(self) -> int:
        """All frames, holes included."""
        return self.core.memory.frames.count

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of kpagecount, kpageflags or kpagecgroup."""
        if name not in tuple(FrameFile):
            raise syscall_error(int(Errno.ENOENT), f"open(/proc/{name})")
        self._may_look(name)
        if offset % 8 or length % 8 or offset < 0 or length < 0:
            refuse(Errno.EINVAL, f"pread(/proc/{name}, {length}, {offset})")
        out = np.zeros(min(length // 8, max(0, self.frame_count() - offset // 8)), dtype=np.uint64)
        return out[: self.read_frames(FrameFile(name), offset // 8, out)].tobytes()

    def _may_look(self, name: str) -> None:
        if not self.pfn_visible:
            raise syscall_error(
                int(Errno.EACCES), f"open(/proc/{name})", remedy="open the machine with privileged=True"
            )
        if not self.profile.has(name):
            raise syscall_error(int(Errno.ENOENT), f"open(/proc/{name})")

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
        check(self.core, [task.mm for task in self._tasks.values()])

    # -- looking on ------------------------------------------------------------------------------------

    def observe(self, tell: Callable[[Event], object] | None = None) -> AbstractContextManager[list[Event]]:
        """As long as the context lasts, tell of each fault, allocation, change of an entry or of flags (`events.py`).

        `tell` is called with each event after the call that caused it; without it the events are collected in the
        list that the context gives. Observing costs time, and changes nothing of the state.
        """
        return observing(self, tell)

    # -- the administrator -----------------------------------------------------------------------------

    @property
    def counters(self) -> Counter[str]:
        """What happened so far, counted: "copy_on_write", "swap_out", "split_pmd", ..."""
        return self.core.counters

    @property
    def ksm(self) -> Ksm:
        """ksmd, its knobs and its counters."""
        return self.core.ksm

    def swap_areas(self) -> tuple[SwapArea, ...]:
        """The swap areas, by number."""
        return tuple(area for area in self.core.swap.areas if area is not None)


@attrs.frozen(kw_only=True)
class SwapSettings:
    """A swap area to be switched on."""

    length: int
    priority: int = -1
    #: Whether a page is gone as soon as it is written, as with zswap; else it stays cached until it is reclaimed.
    immediate: bool = True
    #: Whether large folios are swapped out whole, as on devices with clusters; else they are taken apart first.
    large_folios: bool = False


def _min_watermark(memory: int) -> int:
    """The kernel's min_free_kbytes for that much memory, in bytes."""
    kilobytes = int((memory / 1024 * 16) ** 0.5)
    return min(max(kilobytes, 128), 262144) * 1024


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
    kernel: str | KernelProfile,
    config: Iterable[str] = (),
    policy: Policy | None = None,
    nodes: int = 1,
    holes: Sequence[tuple[int | str, int | str]] = (),
    privileged: bool = True,
    geometry: Geometry | None = None,
) -> SimMachine:
    """Check the settings and build the machine. Raises ArgumentError, UnknownCapability."""
    profile = preset(kernel, config=config, geometry=geometry) if isinstance(kernel, str) else kernel
    areas: Any = swap
    if isinstance(swap, int | str):
        length = parse_size(swap)
        areas = [SwapSettings(length=length)] if length else []
    if not isinstance(nodes, int) or nodes < 1:
        raise ArgumentError(f"nodes={nodes!r}", remedy="at least one")
    return SimMachine(
        memory=parse_size(memory),
        swap=tuple(areas),
        profile=profile,
        policy=policy or Policy(),
        nodes=nodes,
        holes=[(parse_size(low), parse_size(high)) for low, high in holes],
        privileged=privileged,
    )


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
            memory=settings["memory"], swap=0, kernel=profile, privileged=settings["privileged"]
        )
        machine.restore(state)
        machine.check()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise FormatError(f"not a saved machine: {type(error).__name__}: {error}", source=str(path)) from None
    return machine
