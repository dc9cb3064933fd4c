"""Running a program on a workbench: names become addresses, refusals become outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import AddressSpaceFault, ArgumentError, Missing, SyscallError
from pmcore.geometry import align_up
from pmcore.procmap import MapQuery
from pmcore.program import steps as s
from pmcore.program.program import Program
from pmcore.protocols import HEAP, IDLE_BITMAP, Task, Workbench
from pmcore.scan.request import ScanRequest
from pmcore.uapi import (
    MAX_SWAPFILES,
    MAX_SWAPFILES_SHIFT,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SWAP,
    PM_SWAP_TYPE_MASK,
    MapFlag,
    MremapFlag,
    ProcmapFlag,
)

__all__ = ["ARENA", "Outcome", "Run", "frames_of", "named_frames", "run"]

#: Where areas are put, one after the other: free in any process, and the same on every workbench.
ARENA = 0x1000_0000_0000
#: Left free behind each area, so that neighbours neither merge nor share a page table by chance.
_GAP = 4 << 20


@attrs.frozen(kw_only=True)
class Outcome:
    """What came of one step: a value, or the errno of a refusal, or the signal that the access would have caused."""

    value: Any = None
    errno: int = 0
    signal: str | None = None
    #: Of a signal that tells of corrupted memory: how many low bits of the address say nothing.
    lsb: int = 0
    #: Page of the area at which the access failed, or the address where it lies in none.
    fault: str | None = None


@attrs.define
class Run:
    """A program under way, and its record: names, and the outcomes so far.

    Making one sets what the program says of huge pages (`Workbench.set_thp`).
    """

    program: Program
    workbench: Workbench
    tasks: dict[str, Task] = attrs.field(factory=dict)
    #: Area -> (start, length in bytes).
    areas: dict[str, tuple[int, int]] = attrs.field(factory=dict)
    fds: dict[str, int] = attrs.field(factory=dict)
    #: The tasks that hold userfaultfds, as they were opened: what comes of a fork is called DESCRIPTOR_CHILD.
    openers: dict[str, str] = attrs.field(factory=dict)
    outcomes: list[Outcome] = attrs.field(factory=list)
    #: Paths of the memory cgroups that it has made, in that order.
    groups: list[str] = attrs.field(factory=list)
    _next: int = ARENA

    def __attrs_post_init__(self) -> None:
        self.workbench.set_thp(dict(self.program.thp))

    def place(self, length: int, align: int) -> int:
        """An address of the arena, aligned, with a gap behind it."""
        start = align_up(self._next, max(align, 4096))
        self._next = start + align_up(max(length, 1), 4096) + _GAP
        return start

    def task(self, name: str) -> Task:
        """The task of that name; "main" is spawned when first asked for. Raises ArgumentError."""
        if name not in self.tasks:
            if name != "main":
                raise ArgumentError(f"no task {name!r}: fork it first")
            self.tasks[name] = self.workbench.spawn()
        return self.tasks[name]

    def area(self, name: str) -> tuple[int, int]:
        """Start and length of the area. Raises ArgumentError for one that was never mapped."""
        if name not in self.areas:
            raise ArgumentError(f"no area {name!r}: map it first")
        return self.areas[name]

    def fd(self, name: str) -> int:
        """The descriptor. A name that stands for none is -1, as after a refused open."""
        return self.fds.get(name, -1)

    def advance(self, step: s.Step) -> Outcome:
        """Do one step, and record what came of it. Raises ArgumentError for one that names what there is not."""
        try:
            outcome = Outcome(value=_DO[type(step)](self, step))
        except AddressSpaceFault as fault:
            outcome = Outcome(signal=fault.signal, fault=self.where(fault.address), lsb=fault.lsb)
        except SyscallError as error:
            outcome = Outcome(errno=error.errno)
        self.outcomes.append(outcome)
        return outcome

    def end(self) -> None:
        """End the tasks, and remove the cgroups that it made."""
        for task in list(self.tasks.values()):
            task.exit()
        if self.groups:
            there = self.workbench.groups()
            for path in sorted(self.groups, key=lambda path: -path.count("/")):
                if path in there:
                    self.workbench.remove_group(path)

    def where(self, address: int) -> str:
        """An address in words that do not depend on where the areas lie."""
        for name, (start, length) in self.areas.items():
            if start <= address < start + length:
                return f"{name}+{address - start:#x}"
        return f"{address:#x}"


def run(
    program: Program,
    workbench: Workbench,
    *,
    observer: Callable[[Run, s.Step, Outcome], object] | None = None,
) -> Run:
    """Run all steps. `observer` is called after each with the run, the step and its outcome.

    The tasks are left alive, to be looked at; the workbench ends them. Raises ArgumentError for a program that names
    what it has not made.
    """
    state = Run(program, workbench)
    for step in program.steps:
        outcome = state.advance(step)
        if observer is not None:
            observer(state, step, outcome)
    return state


def _range(state: Run, step: Any) -> tuple[int, int]:
    size = state.workbench.kernel.profile.geometry.page_size
    start, _ = state.area(step.area)
    return start + step.page * size, step.pages * size


def _map(state: Run, step: s.Map) -> dict[str, Any] | None:
    size = state.workbench.kernel.profile.geometry.page_size
    length, flags, addr = step.pages * size, step.flags, 0
    if step.anywhere:
        return _map_anywhere(state, step, length)
    if step.within:
        addr = state.area(step.within)[0] + step.page * size
    else:
        addr = state.place(length, step.align)
        flags |= MapFlag.FIXED_NOREPLACE
    fd = state.fd(step.fd) if step.fd else -1
    if addr:
        state.areas[step.area] = (addr, length)  # also where the kernel refuses: later steps may name it
    start = state.task(step.task).mmap(
        length, addr=addr, prot=step.prot, flags=flags, fd=fd, offset=step.page_offset * size
    )
    state.areas[step.area] = (start, length)
    return None


def _map_anywhere(state: Run, step: s.Map, length: int) -> dict[str, Any]:
    """Map where the kernel wants to: at the hint, or at a place that is as good as any other of the same alignment."""
    geometry, task = state.workbench.kernel.profile.geometry, state.task(step.task)
    hint = state.area(step.within)[0] + step.page * geometry.page_size if step.within else 0
    place = state.place(length, step.align)
    state.areas[step.area] = (place, length)
    fd = state.fd(step.fd) if step.fd else -1
    start = task.mmap(
        length,
        addr=hint,
        prot=step.prot,
        flags=step.flags,
        fd=fd,
        offset=step.page_offset * geometry.page_size,
    )
    if hint and start == hint:
        state.areas[step.area] = (start, length)
        return {"at": "the hint"}
    # Made anew elsewhere: what was moved would bring page tables along that it shared with its neighbours there.
    task.munmap(start, length)
    flags = step.flags | MapFlag.FIXED_NOREPLACE
    task.mmap(
        length, addr=place, prot=step.prot, flags=flags, fd=fd, offset=step.page_offset * geometry.page_size
    )
    if hint or length % geometry.pmd_size:
        return {"at": "elsewhere"}
    return {"at": "elsewhere", "aligned": not start % geometry.pmd_size}


def _brk(state: Run, step: s.Brk) -> int:
    size = state.workbench.kernel.profile.geometry.page_size
    length = align_up(step.length, size)
    state.areas[step.area] = (HEAP, max(state.areas.get(step.area, (HEAP, size))[1], length))
    return state.task(step.task).brk(HEAP + step.length) - HEAP


def named_frames(words: U64Array) -> BoolArray:
    """Which entries are not present but name a frame: those of poisoned pages, and migration entries.

    Of types that are no swap area those whose offset is no set of markers: nobody's frame is one of the first 16.
    """
    special: BoolArray = (words & np.uint64(PM_PRESENT | PM_SWAP)) == np.uint64(PM_SWAP)
    special &= (words & np.uint64(PM_SWAP_TYPE_MASK)) >= MAX_SWAPFILES
    special &= (words & np.uint64(PM_PFRAME_MASK)) >= np.uint64(16 << MAX_SWAPFILES_SHIFT)
    return special


def frames_of(words: U64Array) -> U64Array:
    """The frames, or swap entries, that entries name."""
    field = words & np.uint64(PM_PFRAME_MASK)
    found: U64Array = np.where(named_frames(words), field >> np.uint64(MAX_SWAPFILES_SHIFT), field)
    return found


def _pagemap_read(state: Run, step: s.PagemapRead) -> dict[str, Any]:
    process, geometry = state.task(step.task).process, state.workbench.kernel.profile.geometry
    first = (geometry.task_size if step.from_end else state.area(step.area)[0]) >> geometry.page_shift
    data = process.pread("pagemap", first * 8 + step.offset, step.length)
    words = np.frombuffer(data[: len(data) & -8], dtype=np.uint64)
    # The same range through the other way to ask for it: frames agree within a side, across sides by the looks.
    again = np.zeros(len(words), dtype=np.uint64)
    process.read_pagemap(first + step.offset // 8, again)
    special = ((words & np.uint64(PM_PRESENT | PM_SWAP)) == np.uint64(PM_SWAP)) & (
        (words & np.uint64(PM_SWAP_TYPE_MASK)) >= MAX_SWAPFILES
    )
    shown = np.where(special & ~named_frames(words), words, words & ~np.uint64(PM_PFRAME_MASK))
    return {"bytes": len(data), "agree": bool((words == again).all()), "words": shown.tolist()}


#: Where programs map: the heap and the arena, far below what loaders and the kernel choose.
_PROGRAM = range(HEAP, 2 * ARENA)


def _query_maps(state: Run, step: s.QueryMaps) -> dict[str, Any]:
    process, base = state.task(step.task).process, state.area(step.area)[0]
    query = MapQuery(
        address=base + step.offset,
        flags=step.flags,
        size=step.size,
        name_room=step.name_room,
        build_id_room=step.build_id_room,
    )
    if step.flags & ProcmapFlag.COVERING_OR_NEXT_VMA:
        try:
            first = process.query_maps(MapQuery(address=query.address, flags=step.flags))
        except Missing:
            return {"at": "elsewhere"}
        if first.start not in _PROGRAM:
            return {"at": "elsewhere"}
    found = process.query_maps(query)
    file = bool(found.inode or found.dev_major or found.dev_minor)
    # Paths of files on a disk are the workbench's own.
    named = "" if found.name.startswith(b"/") and b"(deleted)" not in found.name else found.name.decode()
    return {
        "at": state.where(found.start),
        "bytes": found.end - found.start,
        "permissions": found.permissions,
        "page_size": found.page_size,
        "offset": found.offset,
        "file": file,
        "name": named,
        "build_id": found.build_id_size,
    }


def _move(state: Run, step: s.Move) -> None:
    size = state.workbench.kernel.profile.geometry.page_size
    start, length = _range(state, step)
    whole = state.area(step.area)
    new_length, flags, target = step.new_pages * size, step.flags, 0
    if step.to:
        target = state.place(new_length, max(step.align, size))
        flags |= MremapFlag.FIXED | MremapFlag.MAYMOVE
        state.areas[step.to] = (target, new_length)
    moved = state.task(step.task).mremap(start, length, new_length, flags=flags, new_addr=target)
    if step.to:
        state.areas[step.to] = (moved, new_length)
    elif moved != start:
        state.areas[step.area] = (moved, new_length)
    else:
        state.areas[step.area] = (whole[0], max(whole[1], start + new_length - whole[0]))


def _move_pages(state: Run, step: s.MovePages) -> dict[str, Any]:
    start, length = _range(state, step)
    size = state.workbench.kernel.profile.geometry.page_size
    pages = range(start, start + length, max(step.stride, 1) * size)
    nodes = None if step.query else [step.node] * len(pages)
    other = state.task(step.of).pid if step.of else 0
    left, status = state.task(step.task).move_pages(pages, nodes, flags=step.flags, pid=other)
    return {"left": left, "status": status}


def _memfd(state: Run, step: s.MemfdCreate) -> None:
    task = state.task(step.task)
    state.fds[step.fd] = task.memfd_create(step.fd, flags=step.flags)
    if step.pages:
        size = state.workbench.kernel.profile.geometry.page_size
        task.ftruncate(state.fds[step.fd], step.pages * size)


def _fork(state: Run, step: s.Fork) -> None:
    child = state.task(step.task).fork()
    state.tasks[step.child] = child
    for name, fd in list(state.fds.items()):
        holder = state.tasks.get(state.openers.get(name, ""))
        if holder is not None and (holder.pid, fd) in child.watched_by:
            again = f"{name}_{step.child}"
            state.fds[again], state.openers[again] = child.watched_by[holder.pid, fd], state.openers[name]


def _exit(state: Run, step: s.Exit) -> None:
    state.task(step.task).exit()
    del state.tasks[step.task]


def _make_group(state: Run, step: s.MakeGroup) -> None:
    state.workbench.make_group(step.group)
    if step.group not in state.groups:
        state.groups.append(step.group)


def _frames(state: Run, step: s.MarkIdle | s.ReadIdle) -> U64Array:
    """The frames of the pages, 0 for what is not present. Raises FramesHidden."""
    start, length = _range(state, step)
    entries = state.task(step.task).process.pagemap(start, start + length)
    return np.where(entries.present, entries.pfn, np.uint64(0))


def _mark_idle(state: Run, step: s.MarkIdle) -> None:
    kernel, pfns = state.workbench.kernel, _frames(state, step)
    kernel.pwrite(IDLE_BITMAP, 0, b"")  # where it is not there, that is what is told
    words, place = np.unique(pfns[pfns != 0] >> np.uint64(6), return_inverse=True)
    bits = np.zeros(len(words), dtype=np.uint64)
    np.bitwise_or.at(bits, place, np.uint64(1) << (pfns[pfns != 0] & np.uint64(63)))
    for word, value in zip(words.tolist(), bits, strict=True):
        kernel.pwrite(IDLE_BITMAP, word * 8, value.tobytes())


def _read_idle(state: Run, step: s.ReadIdle) -> list[int]:
    kernel, pfns = state.workbench.kernel, _frames(state, step)
    kernel.pread(IDLE_BITMAP, 0, 0)
    words = {
        word: int.from_bytes(kernel.pread(IDLE_BITMAP, word * 8, 8), "little")
        for word in np.unique(pfns[pfns != 0] >> np.uint64(6)).tolist()
    }
    return [words[pfn >> 6] >> (pfn & 63) & 1 if pfn else -1 for pfn in pfns.tolist()]


def _limit_group(state: Run, step: s.LimitGroup) -> None:
    size = state.workbench.kernel.profile.geometry.page_size
    state.workbench.limit_group(step.group, step.pages * size if step.pages else None)


def _scan(state: Run, step: s.Scan) -> dict[str, Any]:
    start, length = _range(state, step)
    result = state.task(step.task).process.pagemap_scan(
        ScanRequest(
            start=start + step.shift,
            end=start + length,
            vec_len=step.vec_len,
            vec=step.vec == "there" or (step.vec == "" and step.vec_len > 0),
            max_pages=step.max_pages,
            flags=step.flags,
            category_inverted=step.category_inverted,
            category_mask=step.category_mask,
            category_anyof_mask=step.category_anyof_mask,
            return_mask=step.return_mask,
        )
    )
    size = np.uint64(state.workbench.kernel.profile.geometry.page_size)
    base = np.uint64(state.area(step.area)[0])
    first, last = (result.regions["start"] - base) // size, (result.regions["end"] - base) // size
    regions = list(zip(first.tolist(), last.tolist(), result.regions["categories"].tolist(), strict=True))
    return {"regions": regions, "walk_end": (result.walk_end - int(base)) // int(size)}


def _touch(state: Run, step: s.Touch) -> None:
    start, length = _range(state, step)
    size = state.workbench.kernel.profile.geometry.page_size
    state.task(step.task).touch(start, length, write=step.write, step=max(step.stride, 1) * size)


def _write(state: Run, step: s.Write) -> None:
    size = state.workbench.kernel.profile.geometry.page_size
    start, task = state.area(step.area)[0] + step.offset, state.task(step.task)
    for page in range(step.pages):
        task.write(start + page * size, step.text.encode())


def _bound(method: str, *extra: str) -> Callable[[Run, Any], Any]:
    """A step over a range that is one call of the task's, with these fields as further arguments."""

    def do(state: Run, step: Any) -> Any:
        function = getattr(state.task(step.task), method)
        return function(*_range(state, step), *(getattr(step, field) for field in extra))

    return do


def _open_file(state: Run, step: s.OpenFile) -> None:
    state.fds[step.fd] = state.task(step.task).open_file(step.file, pages=step.pages if step.new else None)


def _open_uffd(state: Run, step: s.UffdOpen) -> None:
    state.fds[step.fd] = state.task(step.task).userfaultfd(step.features)
    state.openers[step.fd] = step.task


def _register(state: Run, step: s.UffdRegister) -> int | None:
    found = state.task(step.task).uffd_register(state.fd(step.fd), *_range(state, step), step.mode)
    return found if step.ioctls else None


def _fill(method: str) -> Callable[[Run, Any], int]:
    """A step through a userfaultfd that fills a range, from another one if it names that; the pages done."""

    def do(state: Run, step: Any) -> int:
        size = state.workbench.kernel.profile.geometry.page_size
        start, length = _range(state, step)
        places = [start]
        if hasattr(step, "source"):
            shift = getattr(step, "shift", 0)
            places.append(state.area(step.source)[0] + step.source_page * size + shift)
        function = getattr(state.task(step.task), method)
        return int(function(state.fd(step.fd), *places, length, mode=step.mode)) // size

    return do


def _touch_answered(state: Run, step: s.TouchAnswered) -> int:
    start, length = _range(state, step)
    size = state.workbench.kernel.profile.geometry.page_size
    task, fd, end, answers = state.task(step.task), state.fd(step.fd), start + length, 0
    source = state.area(step.source)[0] + step.source_page * size if step.source else start
    at, answered = start, -1
    while at < end:
        try:
            task.touch(at, end - at, write=step.write)
            break
        except AddressSpaceFault as fault:
            at = fault.address & -size
            if fault.signal != "SIGBUS" or at == answered:
                raise
            answered = at
        if step.answer == "unprotect":
            task.uffd_writeprotect(fd, at, size, protect=False)
        elif step.answer in ("copy", "move"):
            getattr(task, f"uffd_{step.answer}")(fd, at, source + at - start, size)
        else:
            getattr(task, f"uffd_{step.answer}")(fd, at, size)
        answers += 1
    return answers


def _close(state: Run, step: s.CloseFd) -> None:
    state.task(step.task).close(state.fd(step.fd))
    del state.fds[step.fd]


_DO: dict[type[s.Step], Callable[[Run, Any], Any]] = {
    s.Map: _map,
    s.Unmap: _bound("munmap"),
    s.Protect: _bound("mprotect", "prot"),
    s.Advise: _bound("madvise", "advice"),
    s.Lock: lambda r, st: r.task(st.task).mlock(*_range(r, st), onfault=st.onfault),
    s.Unlock: _bound("munlock"),
    s.LockAll: lambda r, st: r.task(st.task).mlockall(st.flags),
    s.UnlockAll: lambda r, st: r.task(st.task).munlockall(),
    s.Brk: _brk,
    s.Msync: _bound("msync", "flags"),
    s.Mincore: lambda r, st: r.task(st.task).mincore(*_range(r, st)).tolist(),
    s.Move: _move,
    s.MovePages: _move_pages,
    s.Touch: _touch,
    s.Read: lambda r, st: r.task(st.task).read(r.area(st.area)[0] + st.offset, st.length),
    s.Write: _write,
    s.MemfdCreate: _memfd,
    s.OpenFile: _open_file,
    s.Ftruncate: lambda r, st: r.task(st.task).ftruncate(r.fd(st.fd), st.length),
    s.Fallocate: lambda r, st: r.task(st.task).fallocate(r.fd(st.fd), st.mode, st.offset, st.length),
    s.Pwrite: lambda r, st: r.task(st.task).pwrite(r.fd(st.fd), st.text.encode(), st.offset),
    s.Pread: lambda r, st: r.task(st.task).pread(r.fd(st.fd), st.length, st.offset),
    s.Lseek: lambda r, st: r.task(st.task).lseek(r.fd(st.fd), st.offset, st.whence),
    s.Fsync: lambda r, st: r.task(st.task).fsync(r.fd(st.fd)),
    s.Sync: lambda r, st: r.task(st.task).sync(),
    s.Fadvise: lambda r, st: r.task(st.task).fadvise(r.fd(st.fd), st.offset, st.length, st.advice),
    s.ReadAhead: lambda r, st: r.workbench.set_readahead(st.length),
    s.DropCaches: lambda r, st: [r.workbench.drop_caches(), None][1],  # how many pages is no outcome
    s.CloseFd: _close,
    s.Compact: lambda r, st: [r.workbench.compact(), None][1],  # how many pages is no outcome
    s.UffdOpen: _open_uffd,
    s.UffdRegister: _register,
    s.UffdCopy: _fill("uffd_copy"),
    s.UffdZeropage: _fill("uffd_zeropage"),
    s.UffdContinue: _fill("uffd_continue"),
    s.UffdPoison: _fill("uffd_poison"),
    s.UffdMove: _fill("uffd_move"),
    s.TouchAnswered: _touch_answered,
    s.UffdWake: lambda r, st: r.task(st.task).uffd_wake(r.fd(st.fd), *_range(r, st)),
    s.UffdUnregister: lambda r, st: r.task(st.task).uffd_unregister(r.fd(st.fd), *_range(r, st)),
    s.UffdProtect: lambda r, st: r.task(st.task).uffd_writeprotect(
        r.fd(st.fd), *_range(r, st), protect=st.protect
    ),
    s.Fork: _fork,
    s.Exit: _exit,
    s.ClearRefs: lambda r, st: r.task(st.task).process.clear_refs(st.what),
    s.MarkIdle: _mark_idle,
    s.ReadIdle: _read_idle,
    s.Scan: _scan,
    s.PagemapRead: _pagemap_read,
    s.QueryMaps: _query_maps,
    s.KsmScan: lambda r, st: r.workbench.ksm_scan(
        st.scans, use_zero_pages=st.zero_pages, max_page_sharing=st.sharing
    ),
    s.KsmUnmerge: lambda r, st: r.workbench.ksm_unmerge(),
    s.MakeGroup: _make_group,
    s.RemoveGroup: lambda r, st: r.workbench.remove_group(st.group),
    s.LimitGroup: _limit_group,
    s.MoveTask: lambda r, st: r.workbench.move_task(r.task(st.task), st.group),
}
