"""A machine's whole state as plain values and arrays: to go back to, to save in a file, to compare by one digest."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.buddy import Zone
from pmcore.backends.sim.physical.folios import LargeFolio
from pmcore.backends.sim.services import ksm_state
from pmcore.backends.sim.services.hugetlb import HugeFile, HugeMap, Hugetlb, Promise
from pmcore.backends.sim.services.migrating import Migration
from pmcore.backends.sim.services.pagecache import FileSystem, Inode, OpenFile
from pmcore.backends.sim.services.swap import SwapArea
from pmcore.backends.sim.services.userfaultfd import Userfaultfd
from pmcore.backends.sim.virtual.space import AddressSpace
from pmcore.backends.sim.virtual.vma import AnonVma, VmArea
from pmcore.errors import FormatError

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["State", "capture", "load", "rebuild", "save"]

_VERSION = 1
_FRAMES = ("flags", "mapcount", "behind", "content", "swap", "lru", "whole", "owner", "index", "free_order")
_AREA = ("counts", "cached", "content", "shadow")
#: Of a file on a disk.
_DISK = ("blocks", "shadows")
_SCALARS = ("zero_pfn", "huge_zero_pfn", "mmap_min", "mmap_base", "stack_limit")


@attrs.frozen(eq=False)
class State:
    """Words (plain values that JSON can hold) and arrays by name."""

    words: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    def digest(self) -> str:
        """SHA-256 of all of it: equal states, equal digests, on every platform."""
        total = hashlib.sha256(json.dumps(self.words, sort_keys=True).encode())
        for name, array in sorted(self.arrays.items()):
            total.update(name.encode())
            total.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return total.hexdigest()


def capture(core: Core, tasks: dict[int, AddressSpace]) -> State:
    """The state now; later changes do not touch it."""
    memory, pool = core.memory, core.pool
    frames, contents = memory.frames, memory.contents
    large, rows = memory.large.capture(), frames.rows
    arrays: dict[str, NDArray[Any]] = {
        f"frames.{name}": getattr(frames, name)[:rows].copy() for name in _FRAMES
    }
    arrays["pool.rows"], arrays["pool.pfns"] = pool.capture()
    arrays["contents"] = contents.capture()
    if memory.grouped:
        arrays["frames.group"] = frames.group[:rows].copy()
    uffds: dict[int, tuple[int, Userfaultfd]] = {}

    def uffd(context: object) -> int | None:
        if not isinstance(context, Userfaultfd):
            return None
        return uffds.setdefault(id(context), (len(uffds), context))[0]

    files = HugeFiles()
    opened: dict[int, tuple[int, OpenFile]] = {}

    def descriptor(file: object) -> list[Any]:
        if isinstance(file, OpenFile):
            return ["file", opened.setdefault(id(file), (len(opened), file))[0]]
        if isinstance(file, HugeFile):
            return ["huge", files.number(file)]
        return ["uffd", uffd(file)]

    spaces = [_space(mm, uffd, descriptor, files) for mm in tasks.values()]
    for inode in core.inodes.values():
        arrays[f"inode.{inode.number}.pages"], arrays[f"inode.{inode.number}.words"] = inode.index.used()
        for name in _DISK if inode.on_disk else ():
            pages, held = getattr(inode, name).used()
            arrays[f"inode.{inode.number}.{name}.pages"], arrays[f"inode.{inode.number}.{name}"] = pages, held
    for area in core.swap.areas:
        if area is not None:
            names = (*_AREA, "group") if memory.grouped else _AREA
            arrays |= {f"swap.{area.number}.{name}": getattr(area, name).copy() for name in names}
    words = {
        "pmcore_sim_state": _VERSION,
        "scalars": {name: getattr(core, name) for name in _SCALARS},
        "numbers": dict(sorted(core.numbers.items())),
        "counters": dict(sorted(core.counters.items())),
        "mlocks": sorted(core.mlocks.items()),
        "policy": attrs.asdict(core.policy),
        "memory": {name: getattr(memory, name) for name in ("lru_clock", "lru_tail", "age", "reserve")},
        "frames": [frames.count, rows],
        "zones": [_zone(zone) for zone in memory.zones],
        "kernel_folios": sorted(memory.kernel_folios.items()),
        "large": [_folio(folio) for folio in large],
        "contents_free": list(contents.free_rows),
        "pool_free": list(pool.free_rows),
        "khugepaged": {name: getattr(core.khugepaged, name) for name in core.khugepaged.STATE},
        "swap_next": [core.swap.turn, core.swap.least],
        "swap": [None if area is None else _area(area) for area in core.swap.areas],
        "spaces": spaces,
        "pids": list(tasks),
        "inodes": [
            [i.number, str(i.kind), i.name, i.size, *([i.fallocend] if i.fallocend else [])]
            for i in core.inodes.values()
        ],
        "opened": [file.inode.number for _, file in sorted(opened.values(), key=lambda o: o[0])],
        "anon_roots": sorted(
            {(v.anon_vma.number, v.anon_vma.root) for mm in tasks.values() for v in mm.vmas if v.anon_vma}
        ),
        "uffds": [
            [context.mm.number, context.features] for _, context in sorted(uffds.values(), key=lambda u: u[0])
        ],
    }
    if core.pages_ahead or any(inode.on_disk for inode in core.inodes.values()):
        ahead = [
            [file.position, file.pages_ahead, file.random, list(file.window)]
            for _, file in sorted(opened.values(), key=lambda o: o[0])
        ]
        words["disk"] = {
            "names": sorted(core.names.items()),
            "opened": ahead,
            "pages_ahead": core.pages_ahead,
        }
    if files.files or core.hugetlb.folios or any(pool.overcommit for pool in core.hugetlb.pools.values()):
        words["hugetlb"] = _hugetlb(core, files)
    if core.migration is not None:
        arrays |= {f"migration.{name}": getattr(core.migration, name).copy() for name in Migration.ARRAYS}
    if memory.offline:
        words["offline"] = [[number, *zone] for number, zone in sorted(memory.offline.items())]
    if memory.grouped:
        words["groups"] = [list(attrs.astuple(g)) for g in core.groups.there.values()]
    more, columns = ksm_state.capture(core)
    return State(words | more, arrays | columns)


class HugeFiles:
    """Files of hugetlbfs and promises, numbered as they are met."""

    def __init__(self) -> None:
        self.files: dict[int, tuple[int, HugeFile]] = {}
        self.promises: dict[int, tuple[int, Promise]] = {}

    def number(self, file: HugeFile) -> int:
        """The number of a file."""
        return self.files.setdefault(id(file), (len(self.files), file))[0]

    def words(self, huge: HugeMap) -> list[int | None]:
        """The numbers of a VMA's file and promise."""
        file = self.number(huge.file)
        if huge.promise is None:
            return [file, None]
        return [file, self.promises.setdefault(id(huge.promise), (len(self.promises), huge.promise))[0]]


def _hugetlb(core: Core, files: HugeFiles) -> dict[str, Any]:
    return {
        "pools": [
            [p.size, list(p.free), p.total, p.reserved, p.surplus, p.overcommit]
            for p in core.hugetlb.pools.values()
        ],
        "folios": [[head, pool.size] for head, pool in sorted(core.hugetlb.folios.items())],
        "files": [
            [f.pool.size, f.length, f.name, f.inode, sorted(f.pages.items()), sorted(f.reserved)]
            for _, f in files.files.values()
        ],
        "promises": [sorted(promise.consumed) for _, promise in files.promises.values()],
        "restored": sorted(core.hugetlb.restored),
    }


def _rebuild_hugetlb(core: Core, words: dict[str, Any] | None) -> list[list[Any]]:
    """Pools as they were; files and promises by number."""
    hugetlb = core.hugetlb = Hugetlb(core)
    if words is None:
        return [[], []]
    for size, free, total, reserved, surplus, overcommit in words["pools"]:
        pool = hugetlb.pools[size]
        pool.free, pool.total, pool.reserved = list(free), total, reserved
        pool.surplus, pool.overcommit = surplus, overcommit
    hugetlb.folios = {head: hugetlb.pools[size] for head, size in words["folios"]}
    hugetlb.restored = set(words["restored"])
    files = [
        HugeFile(hugetlb.pools[size], length, name, dict(map(tuple, pages)), set(reserved), inode=inode)
        for size, length, name, inode, pages, reserved in words["files"]
    ]
    return [files, [Promise(set(consumed)) for consumed in words["promises"]]]


def _folio(folio: LargeFolio) -> list[Any]:
    maps = [sorted(folio.by_mm.items()), sorted(folio.known.items()), folio.shared]
    return [folio.head, folio.order, folio.entire, folio.mapped, *maps]


def _zone(zone: Zone) -> list[Any]:
    return [zone.start, zone.end, zone.name, zone.node, zone.frontier, zone.free_pages]


def _area(area: SwapArea) -> list[Any]:
    return [
        area.slots,
        area.priority,
        area.immediate,
        area.large_folios,
        area.compressed,
        area.used,
        area.hint,
        sorted([slot, *reader] for slot, reader in area.merged.items()),
    ]


def _space(mm: AddressSpace, uffd: Any, descriptor: Any, files: HugeFiles) -> dict[str, Any]:
    vmas = [
        [
            v.start,
            v.end,
            v.flags,
            v.pgoff,
            v.anon_vma.number if v.anon_vma else None,
            v.chain,
            uffd(v.uffd),
            v.name,
            v.file.number if v.file else None,
            *([files.words(v.huge)] if v.huge is not None else []),
            *([["opened", descriptor(v.opened)[1]]] if v.opened is not None else []),
        ]
        for v in mm.vmas
    ]
    return {
        "number": mm.number,
        "vmas": vmas,
        "root": mm.tables.root,
        "tables": list(mm.tables.tables),
        "def_flags": mm.def_flags,
        "brk": [mm.brk_start, mm.brk],
        "soft_dirty_cleared": mm.soft_dirty_cleared,
        "files": [[fd, *descriptor(file)] for fd, file in sorted(mm.files.items())],
        **({"group": mm.group} if mm.group else {}),
    }


def rebuild(core: Core, state: State) -> dict[int, AddressSpace]:
    """Put a captured state into a core of the same settings; the address spaces by task number."""
    words, arrays = state.words, state.arrays
    memory = core.memory
    count, rows = words["frames"]
    frames = memory.frames
    frames.count = count
    touched = {start: min(frontier, rows) for start, _, _, _, frontier, _ in words["zones"]}
    columns = {name: arrays[f"frames.{name}"].copy() for name in _FRAMES}
    group = arrays.get("frames.group")
    columns["group"] = np.zeros(rows, dtype=np.int32) if group is None else group.copy()
    frames.replace(columns, rows, touched)
    memory.zones[:] = [_rebuild_zone(core, *zone) for zone in words["zones"]]
    for name, value in words["memory"].items():
        setattr(memory, name, value)
    memory.offline = {number: (name, node) for number, name, node in words.get("offline", [])}
    memory.kernel_folios = dict(map(tuple, words["kernel_folios"]))
    memory.large.restore(
        [
            LargeFolio(head, order, entire, mapped, dict(map(tuple, by_mm)), dict(map(tuple, known)), shared)
            for head, order, entire, mapped, by_mm, known, shared in words["large"]
        ]
    )
    memory.contents.restore(arrays["contents"], words["contents_free"])
    core.pool.restore(arrays["pool.rows"], arrays["pool.pfns"], words["pool_free"])
    for name, value in words["scalars"].items():
        setattr(core, name, value)
    core.numbers.clear()
    core.numbers.update(words["numbers"])
    core.counters.clear()
    core.counters.update(words["counters"])
    core.mlocks = dict(map(tuple, words["mlocks"]))
    core.migration = None
    if "migration.slots" in arrays:
        core.migration = Migration(*(arrays[f"migration.{name}"].copy() for name in Migration.ARRAYS))
    for name, value in words["policy"].items():
        setattr(core.policy, name, value)
    for name in core.khugepaged.STATE:
        setattr(core.khugepaged, name, words["khugepaged"][name])
    core.swap.turn, core.swap.least = words["swap_next"]
    core.swap.areas = [
        None if area is None else _rebuild_area(number, area, arrays)
        for number, area in enumerate(words["swap"])
    ]
    anon = {number: AnonVma(number, root) for number, root in words["anon_roots"]}
    huge = _rebuild_hugetlb(core, words.get("hugetlb"))
    core.spaces.clear()
    core.inodes.clear()
    for number, kind, name, size, *fallocend in words["inodes"]:
        inode = core.inodes[number] = Inode(number, FileSystem(kind), name, size, *fallocend)
        inode.index.put(arrays[f"inode.{number}.pages"], arrays[f"inode.{number}.words"])
        for part in _DISK if inode.on_disk else ():
            getattr(inode, part).put(arrays[f"inode.{number}.{part}.pages"], arrays[f"inode.{number}.{part}"])
    blank: dict[str, Any] = {"names": [], "opened": [[]] * len(words["opened"]), "pages_ahead": 0}
    disk = words.get("disk", blank)
    core.names, core.pages_ahead = dict(map(tuple, disk["names"])), disk["pages_ahead"]
    opened = [
        OpenFile(core.inodes[number], *ahead[:-1], *(tuple(window) for window in ahead[-1:]))
        for number, ahead in zip(words["opened"], disk["opened"], strict=True)
    ]
    spaces = {space["number"]: AddressSpace.bare(core, space["number"]) for space in words["spaces"]}
    contexts = [
        Userfaultfd(spaces.get(number) or AddressSpace.gone(core, number), f) for number, f in words["uffds"]
    ]
    core.spaces = dict(spaces)
    for space in words["spaces"]:
        _rebuild_space(spaces[space["number"]], space, anon, contexts, huge, opened)
    core.groups.restore(words.get("groups"))
    memory.charging = 0
    ksm_state.rebuild(core, words, arrays, spaces)
    return {pid: spaces[space["number"]] for pid, space in zip(words["pids"], words["spaces"], strict=True)}


def _rebuild_zone(
    core: Core, start: int, end: int, name: str, node: int, frontier: int, free_pages: int
) -> Zone:
    zone = Zone(core.memory.frames, start, end, name=name, node=node)
    zone.frontier, zone.free_pages = frontier, free_pages
    zone.find_blocks()
    return zone


def _rebuild_area(number: int, words: list[Any], arrays: dict[str, NDArray[Any]]) -> SwapArea:
    slots, priority, immediate, large_folios, compressed, used, hint, merged = words
    area = SwapArea(number, slots, priority, immediate, large_folios, compressed)
    area.used, area.hint = used, hint
    area.merged = {slot: tuple(reader) for slot, *reader in merged}
    for name in _AREA:
        setattr(area, name, arrays[f"swap.{number}.{name}"].copy())
    group = arrays.get(f"swap.{number}.group")
    if group is not None:
        area.group = group.copy()
    return area


def _rebuild_space(
    mm: AddressSpace,
    words: dict[str, Any],
    anon: dict[int, AnonVma],
    contexts: list[Userfaultfd],
    huge: list[list[Any]],
    opened: list[OpenFile],
) -> None:
    for start, end, flags, pgoff, number, chain, uffd, name, inode, *mapped in words["vmas"]:
        owner = None if number is None else anon.setdefault(number, AnonVma(number))
        context = None if uffd is None else contexts[uffd]
        file_of = None if inode is None else mm.core.inodes[inode]
        vma = VmArea(start, end, flags, pgoff, owner, chain, context, name, file_of)
        for file, promise in mapped:
            if file == "opened":
                vma.opened = opened[promise]
                continue
            vma.huge = HugeMap(huge[0][file], None if promise is None else huge[1][promise])
            vma.huge.file.add_user(mm, 1)
        mm.vmas.add(vma)
    mm.tables.root = words["root"]
    mm.tables.tables = list(words["tables"])
    mm.def_flags = words["def_flags"]
    mm.brk_start, mm.brk = words["brk"]
    mm.soft_dirty_cleared = words["soft_dirty_cleared"]
    mm.group = words.get("group", 0)
    kinds: dict[str, list[Any]] = {"file": opened, "huge": huge[0], "uffd": contexts}
    mm.files = {fd: kinds[kind][n] for fd, kind, n in words["files"]}


def save(state: State, settings: dict[str, Any], path: str | Path) -> None:
    """Write a state and its machine's settings to a file: a zip of JSON and plain arrays."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("state.json", json.dumps({"settings": settings, **state.words}))
        for name, array in sorted(state.arrays.items()):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            archive.writestr(f"{name}.npy", buffer.getvalue())


def load(path: str | Path) -> tuple[State, dict[str, Any]]:
    """Read a state and its settings. Raises FormatError for what is none, OSError."""
    try:
        with zipfile.ZipFile(path) as archive:
            words = json.loads(archive.read("state.json"))
            if words.get("pmcore_sim_state") != _VERSION:
                raise FormatError(f"not a state of version {_VERSION}", source=str(path))
            arrays = {
                name.removesuffix(".npy"): np.lib.format.read_array(
                    io.BytesIO(archive.read(name)), allow_pickle=False
                )
                for name in archive.namelist()
                if name.endswith(".npy")
            }
    except (zipfile.BadZipFile, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"not a saved machine: {error}", source=str(path)) from None
    settings = words.pop("settings", None)
    if not isinstance(settings, dict):
        raise FormatError("no settings", source=str(path))
    return State(words, arrays), settings
