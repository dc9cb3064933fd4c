"""A simulated task: the system calls and accesses of a page-table program's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pmcore.arrays import BoolArray
from pmcore.backends.sim.calls import files as file_calls
from pmcore.backends.sim.calls import madvise as madvise_call
from pmcore.backends.sim.calls import mlock as mlock_call
from pmcore.backends.sim.calls import mmap as mmap_call
from pmcore.backends.sim.calls import move_pages as numa_call
from pmcore.backends.sim.calls import mremap as mremap_call
from pmcore.backends.sim.calls import uffd as uffd_call
from pmcore.backends.sim.calls import uffd_fill, uffd_move
from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.backends.sim.process import SimProcess
from pmcore.backends.sim.services import migrating, mincore
from pmcore.backends.sim.virtual import copying, fault, touch
from pmcore.backends.sim.virtual import fork as forking
from pmcore.backends.sim.virtual.space import AddressSpace
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import ArgumentError, syscall_error
from pmcore.protocols import MADE_PAGES, Task
from pmcore.uapi import Errno, Madvise, MapFlag, MremapFlag, Prot, UffdFeature

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import SimMachine

__all__ = ["SimTask"]


#: Calls that change nothing but mappings, and so go on while a migration is under way.
_BESIDE = frozenset({"brk", "madvise", "memfd_create", "mmap", "mprotect", "mremap", "munmap"})


class SimTask(Task):
    """One process of a simulated machine."""

    def __init__(self, machine: SimMachine, pid: int, mm: AddressSpace) -> None:
        self._machine = machine
        self._core = machine.core
        self.pid = pid
        self.mm = mm
        self.alive = True
        self._process = SimProcess(machine, self)
        self._watched_by: dict[tuple[int, int], int] = {}

    @property
    def watched_by(self) -> Mapping[tuple[int, int], int]:
        """See `Task`."""
        return self._watched_by

    @property
    def process(self) -> SimProcess:
        """The same process, looked at from outside."""
        return self._process

    def _ready(self, call: str) -> None:
        if not self.alive:
            raise syscall_error(int(Errno.ESRCH), call, remedy="the task is gone")
        if self._core.memory.grouped:
            self._core.memory.charging = self.mm.group
            self._core.memory.charges.full = None

    def _call(self, what: Any, *arguments: Any, **named: Any) -> Any:
        core, mm = self._core, self.mm
        if not self.alive or core.memory.grouped:
            self._ready(what.__name__)
        if core.migration is not None:
            return self._beside(what, *arguments, **named)
        if core.memory.short:
            core.relieve(1)
        try:
            return what(core, mm, *arguments, **named)
        except NoMemory:
            raise self._out_of_memory(what.__name__) from None

    def _beside(self, what: Any, *arguments: Any, **named: Any) -> Any:
        """A call while a migration is under way (MG-011 to MG-013). Raises NotModelled for those that may wait."""
        core, name = self._core, what.__name__
        if name == "mincore":
            return what(core, self.mm, *arguments, **named)
        filled = int(MapFlag.POPULATE | MapFlag.LOCKED)
        waits = name not in _BESIDE or bool(self.mm.def_flags & VmFlag.LOCKED)
        waits |= name == "mmap" and bool(arguments[3] & filled)
        waits |= name == "madvise" and arguments[2] not in migrating.ADVICE
        if waits:
            migrating.still(core, name)
        try:
            with migrating.beside(core):
                return what(core, self.mm, *arguments, **named)
        except NoMemory:
            raise self._out_of_memory(name) from None

    def _out_of_memory(self, what: str) -> Exception:
        full = self._core.memory.charges.full
        if full is None:
            remedy = "the machine is out of memory: give it more, or swap, or reclaim"
        else:
            path = self._core.groups.there[full.number].path
            remedy = f"the cgroup {path!r} is at its limit (a kernel kills one of its processes): a larger one, or swap"
        return syscall_error(int(Errno.ENOMEM), what, remedy=remedy)

    def _access_to(self, what: str, start: int, length: int) -> None:
        core = self._core
        if core.migration is not None and core.memory.spare < (length >> core.geometry.page_shift) + 64:
            migrating.still(core, "an access that may have memory reclaimed")
        self._ready(what)

    # -- memory ----------------------------------------------------------------------------------------

    def mmap(
        self,
        length: int,
        *,
        addr: int = 0,
        prot: Prot | int = 3,
        flags: MapFlag | int = 0x22,
        fd: int = -1,
        offset: int = 0,
    ) -> int:
        """mmap(2)."""
        _words(addr, length, offset)
        return int(self._call(mmap_call.mmap, addr, length, int(prot), int(flags), fd, offset))

    def munmap(self, start: int, length: int) -> None:
        """munmap(2)."""
        _words(start, length)
        self._call(mmap_call.munmap, start, length)

    def mprotect(self, start: int, length: int, prot: Prot | int) -> None:
        """mprotect(2)."""
        _words(start, length)
        self._call(mmap_call.mprotect, start, length, int(prot))

    def mremap(
        self, start: int, old_length: int, new_length: int, *, flags: MremapFlag | int = 0, new_addr: int = 0
    ) -> int:
        """mremap(2)."""
        _words(start, old_length, new_length, new_addr)
        return int(self._call(mremap_call.mremap, start, old_length, new_length, int(flags), new_addr))

    def madvise(self, start: int, length: int, advice: Madvise | int) -> None:
        """madvise(2)."""
        _words(start, length)
        self._call(madvise_call.madvise, start, length, int(advice))

    def mlock(self, start: int, length: int, *, onfault: bool = False) -> None:
        """mlock(2), mlock2(2)."""
        _words(start, length)
        self._call(mlock_call.mlock, start, length, onfault=onfault)

    def munlock(self, start: int, length: int) -> None:
        """munlock(2)."""
        _words(start, length)
        self._call(mlock_call.munlock, start, length)

    def mlockall(self, flags: int) -> None:
        """mlockall(2)."""
        self._call(mlock_call.mlockall, flags)

    def munlockall(self) -> None:
        """munlockall(2)."""
        self._call(mlock_call.munlockall)

    def brk(self, addr: int) -> int:
        """brk(2)."""
        _words(addr)
        return int(self._call(mmap_call.brk, addr))

    def mincore(self, start: int, length: int) -> BoolArray:
        """mincore(2)."""
        _words(start, length)
        found: BoolArray = self._call(mincore.mincore, start, length)
        return found

    def msync(self, start: int, length: int, flags: int) -> None:
        """msync(2)."""
        _words(start, length)
        self._call(mincore.msync, start, length, flags)

    def move_pages(
        self, pages: Sequence[int], nodes: Sequence[int] | None, *, flags: int = 2, pid: int = 0
    ) -> tuple[int, list[int | None]]:
        """move_pages(2)."""
        if not isinstance(pages, range) or not pages or not 0 <= min(pages) <= max(pages) < 1 << 64:
            _words(*pages)
        self._ready("move_pages")
        migrating.still(self._core, "move_pages")
        named = [self] if not pid else [task for task in self._machine.tasks() if task.pid == pid]
        if not named:
            raise syscall_error(int(Errno.ESRCH), f"move_pages({pid})", remedy="the task is gone")
        return 0, numa_call.move_pages(self._core, named[0].mm, pages, nodes, int(flags))

    # -- accesses --------------------------------------------------------------------------------------

    def read(self, start: int, length: int) -> bytes:
        """The bytes at `start`."""
        self._access_to("read", start, length)
        end = migrating.wait(self._core, self.mm, start, start + length)
        if end < start + length:
            copying.read(self._core, self.mm, start, end - start, self._access)
            raise migrating.waits(end)
        return copying.read(self._core, self.mm, start, length, self._access)

    def write(self, start: int, data: bytes) -> None:
        """Write bytes."""
        self._access_to("write", start, len(data))
        end = migrating.wait(self._core, self.mm, start, start + len(data))
        copying.write(self._core, self.mm, start, data[: end - start], self._access)
        if end < start + len(data):
            raise migrating.waits(end)

    def _access(self, addr: int, write: bool) -> int:
        try:
            return fault.access(self._core, self.mm, addr, write=write)
        except NoMemory:
            raise self._out_of_memory(f"access at {addr:#x}") from None

    def touch(self, start: int, length: int, *, write: bool = True, step: int | None = None) -> None:
        """One access every `step` bytes."""
        self._access_to("touch", start, length)
        size = self._core.geometry.page_size
        stride = step or size
        if stride <= 0 or length < 0:
            raise ArgumentError(f"touch every {stride} of {length} bytes")
        if stride != size:
            for addr in range(start, start + length, stride):
                if migrating.wait(self._core, self.mm, addr, addr + 1) == addr:
                    raise migrating.waits(addr)
                self._access(addr, write)
            return
        end = migrating.wait(self._core, self.mm, start, start + length)
        try:
            touch.touch(self._core, self.mm, start, end, write=write)
        except NoMemory:
            raise self._out_of_memory(f"touch from {start:#x}") from None
        if end < start + length:
            raise migrating.waits(end)

    # -- files -----------------------------------------------------------------------------------------

    def memfd_create(self, name: str, *, flags: int = 0) -> int:
        """memfd_create(2)."""
        return int(self._call(file_calls.memfd_create, name, flags))

    def open_file(self, name: str, *, pages: int | None = None) -> int:
        """open(2) of a file of the machine's disk."""
        if "/" in name or name in {"", ".", ".."}:
            raise ArgumentError(f"{name!r} is no plain file name")
        if pages is not None and (not isinstance(pages, int) or not 0 <= pages <= MADE_PAGES):
            raise ArgumentError(f"a file of {pages!r} pages", remedy=f"0 to {MADE_PAGES}")
        return int(self._call(file_calls.open_file, name, pages))

    def ftruncate(self, fd: int, length: int) -> None:
        """ftruncate(2)."""
        self._call(file_calls.ftruncate, fd, length)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        self._call(file_calls.fallocate, fd, mode, offset, length)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """pread(2)."""
        found: bytes = self._call(file_calls.pread, fd, length, offset)
        return found

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """pwrite(2)."""
        return int(self._call(file_calls.pwrite, fd, data, offset))

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        """lseek(2)."""
        return int(self._call(file_calls.lseek, fd, offset, whence))

    def fsync(self, fd: int) -> None:
        """fsync(2)."""
        self._call(file_calls.fsync, fd)

    def sync(self) -> None:
        """sync(2)."""
        self._call(file_calls.sync)

    def fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        """posix_fadvise(2)."""
        self._call(file_calls.fadvise, fd, offset, length, advice)

    def close(self, fd: int) -> None:
        """close(2): what nothing refers to any more is gone; see `uffd.close` for userfaultfds."""
        self._call(file_calls.close, fd, self._machine.tasks())

    # -- userfaultfd -----------------------------------------------------------------------------------

    def userfaultfd(self, features: UffdFeature | int = 0) -> int:
        """userfaultfd(2) with UFFDIO_API."""
        context = self._call(uffd_call.api, int(features))
        return file_calls.install(self.mm, context)

    def uffd_register(self, fd: int, start: int, length: int, mode: int) -> int:
        """UFFDIO_REGISTER."""
        _words(start, length, mode)
        return int(self._call(uffd_call.register, fd, start, length, mode))

    def uffd_unregister(self, fd: int, start: int, length: int) -> None:
        """UFFDIO_UNREGISTER."""
        _words(start, length)
        self._call(uffd_call.unregister, fd, start, length)

    def uffd_writeprotect(self, fd: int, start: int, length: int, *, protect: bool) -> None:
        """UFFDIO_WRITEPROTECT."""
        _words(start, length)
        self._call(uffd_call.writeprotect, fd, start, length, protect_it=protect)

    def uffd_copy(self, fd: int, start: int, source: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_COPY."""
        _words(start, source, length, mode)
        return int(self._call(uffd_fill.copy, fd, start, source, length, mode))

    def uffd_zeropage(self, fd: int, start: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_ZEROPAGE."""
        _words(start, length, mode)
        return int(self._call(uffd_fill.zeropage, fd, start, length, mode))

    def uffd_continue(self, fd: int, start: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_CONTINUE."""
        _words(start, length, mode)
        return int(self._call(uffd_fill.continue_, fd, start, length, mode))

    def uffd_poison(self, fd: int, start: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_POISON."""
        _words(start, length, mode)
        return int(self._call(uffd_fill.poison, fd, start, length, mode))

    def uffd_move(self, fd: int, start: int, source: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_MOVE."""
        _words(start, source, length, mode)
        return int(self._call(uffd_move.move, fd, start, source, length, mode))

    def uffd_wake(self, fd: int, start: int, length: int) -> None:
        """UFFDIO_WAKE."""
        _words(start, length)
        self._call(uffd_fill.wake, fd, start, length)

    # -- coming and going ------------------------------------------------------------------------------

    def fork(self) -> SimTask:
        """fork(2)."""
        self._ready("fork")
        memory, free = self._core.memory, -1
        while True:
            child = AddressSpace(self._core, self._core.number("space"))
            child.files = dict(self.mm.files)
            child.group = self.mm.group
            try:
                with migrating.beside(self._core):
                    try:
                        watching = forking.fork(self._core, self.mm, child)
                    except NoMemory:
                        child.tear_down()
                        raise
                    migrating.forked(self._core, self.mm, child)
                break
            except NoMemory:
                # Each attempt has to begin with more free memory than the one before.
                if memory.free_total <= free or not self._core.relieve(1):
                    raise self._out_of_memory("fork") from None
                free = memory.free_total
        task = self._machine.adopt(child)
        for old, new in watching.items():
            holder = next(other for other in self._machine.tasks() if old in other.mm.files.values())
            number = next(fd for fd, file in holder.mm.files.items() if file is old)
            task._watched_by[holder.pid, number] = file_calls.install(holder.mm, new)
        return task

    def exit(self) -> None:
        """End the task; everything that it alone had is free."""
        if not self.alive:
            return
        self.alive = False
        self._machine.forget(self)
        with migrating.beside(self._core):
            for fd in list(self.mm.files):
                file_calls.close(self._core, self.mm, fd, self._machine.tasks())
            self.mm.tear_down()


def _words(*values: int) -> None:
    for value in values:
        if not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise ArgumentError(f"{value!r} is not an unsigned 64-bit number")
