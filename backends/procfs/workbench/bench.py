"""The workbench: a fork server, and the tasks that it forks, driven over socket pairs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pmcore.arrays import BoolArray
from pmcore.backends.procfs import open_kernel
from pmcore.backends.procfs.kernel import ProcfsKernel
from pmcore.backends.procfs.process import ProcfsProcess
from pmcore.backends.procfs.workbench.disk import Disk
from pmcore.backends.procfs.workbench.groups import Groups
from pmcore.backends.procfs.workbench.ksm import Ksmd
from pmcore.backends.procfs.workbench.monitor import Monitor, Watch
from pmcore.backends.procfs.workbench.steady import drain_lru, monitors, steady, turn_thp
from pmcore.errors import AddressSpaceFault, ArgumentError, BackendUnavailable, SyscallError, syscall_error
from pmcore.geometry import parse_size
from pmcore.protocols import HEAP, MADE_PAGES, FrameFile, Task, Workbench
from pmcore.uapi import ClearRefs, Madvise, MapFlag, MremapFlag, Prot, UffdFeature

__all__ = ["ProcfsTask", "ProcfsWorkbench", "open_workbench"]

_HEADER = struct.Struct("=II")
#: Seconds after which a silent task is taken for lost and killed.
_PATIENCE = 60.0
_UFFD_WP_MODE_WP = 1
#: In the array of move_pages before the call: no node and no errno.
_UNWRITTEN = 0x7FFF_FFFF


class _Channel:
    """One end of a socket pair to a task."""

    def __init__(self, end: socket.socket, pid: int) -> None:
        self._socket = end
        self.pid = pid
        # Taken while the task surely lives: a number alone could be somebody else's by the time it is ended.
        self._close = weakref.finalize(self, _end, end, os.pidfd_open(pid))

    def close(self) -> None:
        """End the task: it exits on the end of file; it is killed should it not."""
        self._close()

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def ask(
        self, op: str, args: dict[str, Any], payload: bytes = b"", watch: Watch | None = None
    ) -> tuple[dict[str, Any], bytes, list[int]]:
        """Send a request; the answer, its payload, and descriptors that came with it. Raises ProcessGone.

        Events of `watch` are read meanwhile.
        """
        if self.closed:
            raise self._gone(op)
        text = json.dumps({"op": op, "args": args}).encode()
        try:
            self._socket.sendall(_HEADER.pack(len(text), len(payload)) + text + payload)
            if watch is not None and watch.held and not watch.wait(self._socket.fileno(), _PATIENCE):
                raise EOFError
            head, fds = self._receive(_HEADER.size, descriptors=True)
            text_length, data_length = _HEADER.unpack(head)
            answer = json.loads(self._receive(text_length)[0])
            return answer, self._receive(data_length)[0], fds
        except (ConnectionError, EOFError):
            self.close()
            raise self._gone(op) from None
        except BaseException:
            self.close()  # interrupted midway, its next answer would be to the wrong question
            raise

    def _gone(self, op: str) -> Exception:
        return syscall_error(errno.ESRCH, f"{op} in task {self.pid}", remedy="the task is gone")

    def _receive(self, length: int, *, descriptors: bool = False) -> tuple[bytes, list[int]]:
        pieces, fds = [], []
        while length:
            if not select.select([self._socket], [], [], _PATIENCE)[0]:
                raise EOFError
            if descriptors:
                piece, received, _, _ = socket.recv_fds(self._socket, length, 1)
                fds += received
            else:
                piece = self._socket.recv(length)
            if not piece:
                raise EOFError
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces), fds


def _end(channel: socket.socket, handle: int) -> None:
    """Close the channel and see that the task behind the pidfd is gone."""
    channel.close()
    try:
        if not select.select([handle], [], [], 5)[0]:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)


class ProcfsTask(Task):
    """A real process that runs steps."""

    def __init__(self, bench: ProcfsWorkbench, channel: _Channel) -> None:
        self._bench = bench
        self._channel = channel
        self.pid = channel.pid
        self._process: ProcfsProcess | None = None
        self._watched_by: Mapping[tuple[int, int], int] = {}

    @property
    def process(self) -> ProcfsProcess:
        """The process, looked at from outside."""
        if self._process is None:
            self._process = _TaskProcess(self)
        return self._process

    @property
    def watched_by(self) -> Mapping[tuple[int, int], int]:
        """See `Task`."""
        return self._watched_by

    def _ask(self, op: str, call: str, payload: bytes = b"", **args: Any) -> tuple[Any, bytes]:
        with self._bench.monitor.watching() as watch:
            answer, data, _ = self._channel.ask(op, args, payload, watch)
        if "errno" in answer:
            raise syscall_error(answer["errno"], call)
        if "fault" in answer:
            number, address, _, lsb = answer["fault"]
            raise AddressSpaceFault(
                signal.Signals(number).name, address, f"{call} by task {self.pid}", lsb=lsb
            )
        return answer["value"], data

    def _call(self, name: str, *arguments: int) -> int:
        words = [int(value) & (1 << 64) - 1 for value in arguments]
        shown = ", ".join(f"{word:#x}" for word in words)
        return int(self._ask("call", f"{name}({shown})", name=name, arguments=words)[0])

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
        return self._call("mmap", addr, length, prot, flags, fd, offset)

    def munmap(self, start: int, length: int) -> None:
        """munmap(2)."""
        self._call("munmap", start, length)

    def mprotect(self, start: int, length: int, prot: Prot | int) -> None:
        """mprotect(2)."""
        self._call("mprotect", start, length, prot)

    def mremap(
        self, start: int, old_length: int, new_length: int, *, flags: MremapFlag | int = 0, new_addr: int = 0
    ) -> int:
        """mremap(2)."""
        return self._call("mremap", start, old_length, new_length, flags, new_addr)

    def madvise(self, start: int, length: int, advice: Madvise | int) -> None:
        """madvise(2)."""
        self._bench.may_poison(advice)
        if advice == Madvise.HWPOISON:  # it sends signals
            call = f"madvise({start:#x}, {length:#x}, {int(advice)})"
            self._ask("poison", call, start=start, length=length, advice=int(advice))
            return
        self._call("madvise", start, length, advice)

    def mlock(self, start: int, length: int, *, onfault: bool = False) -> None:
        """mlock(2), mlock2(2)."""
        if onfault:
            self._call("mlock2", start, length, 1)
        else:
            self._call("mlock", start, length)

    def munlock(self, start: int, length: int) -> None:
        """munlock(2)."""
        self._call("munlock", start, length)

    def mlockall(self, flags: int) -> None:
        """mlockall(2)."""
        self._call("mlockall", flags)

    def munlockall(self) -> None:
        """munlockall(2)."""
        self._call("munlockall")

    def brk(self, addr: int) -> int:
        """brk(2), on a heap of the program's own at `HEAP`."""
        return int(self._ask("brk", f"brk({addr:#x})", heap=HEAP, addr=addr)[0])

    def mincore(self, start: int, length: int) -> BoolArray:
        """mincore(2)."""
        _, data = self._ask("mincore", f"mincore({start:#x}, {length:#x})", start=start, length=length)
        return (np.frombuffer(data, dtype=np.uint8) & 1).astype(np.bool_)

    def msync(self, start: int, length: int, flags: int) -> None:
        """msync(2)."""
        self._call("msync", start, length, flags)

    def move_pages(
        self, pages: Sequence[int], nodes: Sequence[int] | None, *, flags: int = 2, pid: int = 0
    ) -> tuple[int, list[int | None]]:
        """move_pages(2)."""
        to = "None" if nodes is None else f"{len(nodes)} nodes"
        left, data = self._ask(
            "move_pages",
            f"move_pages({pid}, {len(pages)} pages, {to}, flags={flags:#x})",
            pid=pid,
            pages=list(pages),
            nodes=None if nodes is None else list(nodes),
            flags=flags,
        )
        status = np.frombuffer(data, dtype=np.int32).tolist()
        return int(left), [None if word == _UNWRITTEN else word for word in status]

    def read(self, start: int, length: int) -> bytes:
        """Bytes, read in user mode."""
        return self._ask("read", f"read of {length} bytes at {start:#x}", start=start, length=length)[1]

    def write(self, start: int, data: bytes) -> None:
        """Bytes, written in user mode."""
        self._ask("write", f"write of {len(data)} bytes at {start:#x}", data, start=start)

    def touch(self, start: int, length: int, *, write: bool = True, step: int | None = None) -> None:
        """One byte every `step` bytes."""
        stride = step or self._bench.kernel.profile.geometry.page_size
        if stride <= 0 or length < 0:
            raise ArgumentError(f"touch every {stride} of {length} bytes")
        kind = "write" if write else "read"
        call = f"{kind} access every {stride} bytes from {start:#x}"
        self._ask("touch", call, start=start, step=stride, count=-(-length // stride), write=int(write))

    def memfd_create(self, name: str, *, flags: int = 0) -> int:
        """memfd_create(2)."""
        return int(self._ask("memfd", f"memfd_create({name!r}, {flags:#x})", name=name, flags=flags)[0])

    def open_file(self, name: str, *, pages: int | None = None) -> int:
        """A regular file in the workbench's directory."""
        if "/" in name or name in {"", ".", ".."}:
            raise ArgumentError(f"{name!r} is no plain file name")
        if pages is not None and (not isinstance(pages, int) or not 0 <= pages <= MADE_PAGES):
            raise ArgumentError(f"a file of {pages!r} pages", remedy=f"0 to {MADE_PAGES}")
        path = str(self._bench.directory / name)
        return int(self._ask("open", f"open({name!r})", path=path, pages=-1 if pages is None else pages)[0])

    def ftruncate(self, fd: int, length: int) -> None:
        """ftruncate(2)."""
        self._ask("ftruncate", f"ftruncate({fd}, {length})", fd=fd, length=length)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        call = f"fallocate({fd}, {mode:#x}, {offset}, {length})"
        self._ask("fallocate", call, fd=fd, mode=mode, offset=offset, length=length)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """pread(2)."""
        return self._ask("pread", f"pread({fd}, {length}, {offset})", fd=fd, length=length, offset=offset)[1]

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """pwrite(2)."""
        return int(self._ask("pwrite", f"pwrite({fd}, {len(data)}, {offset})", data, fd=fd, offset=offset)[0])

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        """lseek(2)."""
        call = f"lseek({fd}, {offset}, {whence})"
        return int(self._ask("lseek", call, fd=fd, offset=offset, whence=whence)[0])

    def fsync(self, fd: int) -> None:
        """fsync(2)."""
        self._ask("fsync", f"fsync({fd})", fd=fd)

    def sync(self) -> None:
        """syncfs(2) of the workbench's directory."""
        self._ask("sync", "syncfs()", directory=str(self._bench.directory))

    def fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        """posix_fadvise(2)."""
        call = f"posix_fadvise({fd}, {offset}, {length}, {advice})"
        self._ask("fadvise", call, fd=fd, offset=offset, length=length, advice=advice)
        if self._bench.disk is not None:
            self._bench.disk.settle()

    def close(self, fd: int) -> None:
        """close(2)."""
        self._bench.monitor.closed(self.pid, fd)  # nobody holds it for us while it is closed
        self._ask("close", f"close({fd})", fd=fd)

    def userfaultfd(self, features: UffdFeature | int = 0) -> int:
        """userfaultfd(2) with UFFDIO_API."""
        fd = int(self._ask("userfaultfd", f"userfaultfd({int(features):#x})", features=int(features))[0])
        self._bench.monitor.opened(self.pid, fd, int(features))
        return fd

    def take(self, fd: int) -> int:
        """Have the task hold a descriptor of ours, too; its number there."""
        return int(self._ask("take", f"pidfd_getfd({fd})", pid=os.getpid(), fd=fd)[0])

    def _uffd(self, fd: int, what: str, *words: int) -> int:
        shown = ", ".join(f"{word:#x}" for word in words)
        return int(
            self._ask("uffd", f"UFFDIO_{what.upper()}({shown})", fd=fd, what=what, words=list(words))[0]
        )

    def uffd_register(self, fd: int, start: int, length: int, mode: int) -> int:
        """UFFDIO_REGISTER."""
        return self._uffd(fd, "register", start, length, mode, 0)

    def uffd_unregister(self, fd: int, start: int, length: int) -> None:
        """UFFDIO_UNREGISTER."""
        self._uffd(fd, "unregister", start, length)

    def uffd_writeprotect(self, fd: int, start: int, length: int, *, protect: bool) -> None:
        """UFFDIO_WRITEPROTECT."""
        self._uffd(fd, "writeprotect", start, length, _UFFD_WP_MODE_WP if protect else 0)

    def uffd_copy(self, fd: int, start: int, source: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_COPY."""
        return self._uffd(fd, "copy", start, source, length, mode, 0)

    def uffd_zeropage(self, fd: int, start: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_ZEROPAGE."""
        return self._uffd(fd, "zeropage", start, length, mode, 0)

    def uffd_continue(self, fd: int, start: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_CONTINUE."""
        return self._uffd(fd, "continue", start, length, mode, 0)

    def uffd_poison(self, fd: int, start: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_POISON."""
        return self._uffd(fd, "poison", start, length, mode, 0)

    def uffd_move(self, fd: int, start: int, source: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_MOVE."""
        return self._uffd(fd, "move", start, source, length, mode, 0)

    def uffd_wake(self, fd: int, start: int, length: int) -> None:
        """UFFDIO_WAKE."""
        self._uffd(fd, "wake", start, length)

    def fork(self) -> ProcfsTask:
        """fork(2)."""
        return self._bench.forked_from(self._channel)

    def exit(self) -> None:
        """End the task."""
        if self._process is not None:
            self._process.close()
        self._channel.close()
        self._bench.forget(self)

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return not self._channel.closed


class _TaskProcess(ProcfsProcess):
    """A task's process: clearing its accessed bits also empties its TLB.

    The kernel leaves that be, and a processor that has an entry in its TLB notes no further access.
    """

    def __init__(self, task: ProcfsTask) -> None:
        kernel = task._bench.kernel
        super().__init__(kernel, task.pid, f"{kernel.root}/{task.pid}")
        self._task = task

    def clear_refs(self, what: ClearRefs | int) -> None:
        super().clear_refs(what)
        self._task._ask("flush_tlb", "munmap")


class ProcfsWorkbench(Workbench):
    """Spawns tasks by forking a small server process, in about a millisecond each."""

    def __init__(
        self,
        kernel: ProcfsKernel,
        *,
        directory: str | None = None,
        held: ExitStack | None = None,
        pools: Mapping[str, str] | None = None,
        disk: Disk | None = None,
        poison: bool = False,
    ) -> None:
        self._kernel = kernel
        self._poison = poison
        #: What regular files lie on, if that was made for this workbench.
        self.disk = disk
        #: Knobs of hugetlb pools, and how many pages are set aside by them.
        self._pools = dict(pools or {})
        #: Whether the machine is kept still for us; whether sizes of huge pages have been set.
        self._still, self._set = held is not None, False
        self._watched = bool(monitors())
        self._held = held or ExitStack()
        self._ksmd: Ksmd | None = None
        #: Whether ksmd has looked at tasks since it was last told to forget everything.
        self._merged = False
        self._groups: Groups | None = None
        self._tasks: list[ProcfsTask] = []
        self.monitor = Monitor()
        self.directory = Path(tempfile.mkdtemp(prefix="pmcore-", dir=directory))
        self._remove = weakref.finalize(self, shutil.rmtree, str(self.directory), ignore_errors=True)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        script = Path(__file__).with_name("_child.py")
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(script), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1"},
            )
        self._zygote = _Channel(ours, self._server.pid)

    @property
    def kernel(self) -> ProcfsKernel:
        """The kernel that the tasks run on."""
        return self._kernel

    @property
    def disk_kind(self) -> str:
        """What its own disk lies on; "" for files of the machine's own file systems."""
        return self.disk.kind if self.disk is not None else ""

    @property
    def watched(self) -> bool:
        """Whether a DAMON monitor ran when the workbench was opened."""
        return self._watched

    def spawn(self) -> ProcfsTask:
        """A fresh task."""
        return self.forked_from(self._zygote)

    def forked_from(self, parent: _Channel) -> ProcfsTask:
        """A task forked from the one behind `parent`."""
        with self.monitor.watching() as watch:
            answer, _, fds = parent.ask("fork", {}, watch=watch)
            if "errno" in answer:
                raise syscall_error(answer["errno"], "fork()")
            task = ProcfsTask(self, _Channel(socket.socket(fileno=fds[0]), answer["value"]))
            self._tasks.append(task)
            self.monitor.forked(parent.pid, task.pid)
            task._watched_by = self.monitor.hand_over(watch, self._give)
        return task

    def _give(self, pid: int, fd: int) -> int:
        return next(task for task in self._tasks if task.pid == pid).take(fd)

    def forget(self, task: ProcfsTask) -> None:
        """Take a task that has ended off the list."""
        self.monitor.ended(task.pid)
        if task in self._tasks:
            self._tasks.remove(task)
        if self._merged and self._ksmd is not None and not self._tasks:
            self._merged = False
            self._ksmd.reset()

    def tasks(self) -> Iterable[ProcfsTask]:
        """The tasks that are alive, oldest first."""
        return tuple(task for task in self._tasks if task.alive)

    def settle(self) -> None:
        """Have all processors drain their LRU batches, and the disk finish what it was asked for."""
        if self.disk is not None:
            self.disk.settle()
        drain_lru()

    # -- cgroups ---------------------------------------------------------------------------------------

    def make_group(self, path: str) -> None:
        """mkdir of a memory cgroup, in a directory of the workbench's own."""
        if self._groups is None:
            self._groups = Groups()
        self._groups.make(path)

    def remove_group(self, path: str) -> None:
        """rmdir of it; while tasks are alive it is waited for that kpagecgroup shows it no more."""
        if self._groups is None or path not in self._groups.there:
            raise syscall_error(errno.ENOENT, f"rmdir({path!r})")
        if not self._tasks:
            self._groups.remove(path)
            return
        # A page that is charged to the group, and nobody's but ours, shows when it is offline.
        canary = self.spawn()
        try:
            size = self.kernel.geometry.page_size
            with contextlib.suppress(
                SyscallError
            ):  # a group with others in it takes no task, and does not go
                self._groups.move(canary.pid, path)
            place = canary.mmap(size)
            canary.touch(place, size)
            self._groups.move(canary.pid, "")
            pfns = canary.process.pagemap(place, place + size).pfn
            words = self.kernel.frames_at
            self._groups.remove(path, lambda inode: int(words(FrameFile.KPAGECGROUP, pfns)[0]) != inode)
        finally:
            canary.exit()

    def move_task(self, task: Task, path: str) -> None:
        """Write the task's number to cgroup.procs."""
        if path and (self._groups is None or path not in self._groups.there):
            raise syscall_error(errno.ENOENT, f"move_task({task.pid}, {path!r})")
        if self._groups is not None:
            self._groups.move(task.pid, path)

    def limit_group(self, path: str, length: int | str | None) -> None:
        """Write to memory.limit_in_bytes, or memory.max."""
        self._group(path, "limit_group").limit(path, None if length is None else parse_size(length))

    def group_usage(self, path: str) -> int:
        """What memory.usage_in_bytes says, or memory.current."""
        return self._group(path, "group_usage").usage(path)

    def group_file(self, path: str, name: str, text: str | None = None) -> str:
        """The text of a file of a group's directory; `text` is written to it first. Raises SyscallError."""
        return self._group(path, f"open({name})").file(path, name, text)

    def _group(self, path: str, call: str) -> Groups:
        if self._groups is None or path not in self._groups.there:
            raise syscall_error(errno.ENOENT, f"{call}({path!r})")
        return self._groups

    def groups(self) -> Mapping[str, int]:
        """Those that it made, with their inode numbers."""
        return {} if self._groups is None else dict(self._groups.there)

    def may_poison(self, advice: int) -> None:
        """Raise BackendUnavailable for advice that takes memory from the machine, unless opened for that."""
        if advice not in (Madvise.HWPOISON, Madvise.SOFT_OFFLINE) or self._poison:
            return
        if self._kernel.profile.has("mm.memory_failure"):
            raise BackendUnavailable(
                "poisoned memory is lost until the machine boots again",
                remedy="open the workbench with poison=True where that may be",
            )

    def set_readahead(self, length: int) -> None:
        """Write to read_ahead_kb of the disk."""
        if self.disk is None:
            super().set_readahead(length)
        else:
            self.disk.set_readahead(length)

    def drop_caches(self) -> None:
        """Write 1 to /proc/sys/vm/drop_caches; only where the machine holds still."""
        if not self._still:
            raise BackendUnavailable(
                "the page cache of the whole machine goes", remedy="open the workbench with still=True"
            )
        Path("/proc/sys/vm/drop_caches").write_text("1")

    def compact(self) -> None:
        """Write 1 to /proc/sys/vm/compact_memory; only where the machine holds still."""
        if not self._still:
            raise BackendUnavailable(
                "the memory of the whole machine is compacted", remedy="open the workbench with still=True"
            )
        Path("/proc/sys/vm/compact_memory").write_text("1")

    def renew(self) -> None:
        """Pages of hugetlb pools are made anew, for flags that their last users left would show on them.

        Nothing is read ahead on the disk.
        """
        if self.disk is not None:
            self.disk.set_readahead(0)
        for path, count in self._pools.items():
            for number in ("0", count):
                Path(path).write_text(number)

    def set_thp(self, settings: Mapping[str, str]) -> None:
        """Sizes of huge pages of the whole machine, put back when the workbench closes; only where it holds still."""
        if not settings and not self._set:
            return
        if not self._still:
            raise BackendUnavailable(
                "huge pages are set for the whole machine", remedy="open the workbench with still=True"
            )
        self._set = True
        turn_thp(settings)

    def ksm_scan(
        self, full_scans: int = 1, *, use_zero_pages: bool = False, max_page_sharing: int = 256
    ) -> dict[str, int]:
        """Exactly so many full scans of ksmd. Raises BackendUnavailable where the machine is not held still.

        NotModelled is raised while processes that are not of this workbench ask for merging (a guest under QEMU, say):
        their pages would be merged with those of its tasks.
        """
        ksmd, self._merged = self._lead_ksmd(), True
        return ksmd.scan(
            full_scans,
            use_zero_pages=use_zero_pages,
            max_page_sharing=max_page_sharing,
            ours=self._pids(),
        )

    def ksm_unmerge(self) -> dict[str, int]:
        """Unmerge all pages of the machine."""
        return self._lead_ksmd().unmerge(self._pids())

    def _pids(self) -> list[int]:
        return [task.pid for task in self._tasks]

    def _lead_ksmd(self) -> Ksmd:
        if not self._still:
            raise BackendUnavailable("ksmd runs by itself", remedy="open the workbench with still=True")
        if self._ksmd is None:
            self._ksmd = Ksmd()
        return self._ksmd

    def close(self) -> None:
        """End all tasks and the server, remove the directory, and put back what was turned."""
        for task in list(self._tasks):
            task.exit()
        self._zygote.close()
        self._server.wait()
        self._remove()
        if self._ksmd is not None:
            self._ksmd.close()
        if self._groups is not None:
            self._groups.close()
        self._held.close()


_HUGEPAGES = "/sys/kernel/mm/hugepages/hugepages-{}kB/{}_hugepages"


def _pools(
    hugepages: Mapping[int | str, int | tuple[int, int]],
) -> tuple[dict[str, str], dict[str, str]]:
    """Knobs with what to write to them: pages set aside, and surplus ones allowed."""
    pools, allowed = {}, {}
    for size, count in hugepages.items():
        number, surplus = count if isinstance(count, tuple) else (count, 0)
        kilobytes = parse_size(size) >> 10
        pools[_HUGEPAGES.format(kilobytes, "nr")] = str(number)
        allowed[_HUGEPAGES.format(kilobytes, "nr_overcommit")] = str(surplus)
    return pools, allowed


def _number(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return None


def open_workbench(
    kernel: ProcfsKernel | None = None,
    *,
    directory: str | None = None,
    still: bool = False,
    swap: int | str = 0,
    knobs: Mapping[str, str] | None = None,
    hugepages: Mapping[int | str, int | tuple[int, int]] | None = None,
    disk: int | str = 0,
    disk_kind: str = "",
    poison: bool = False,
) -> ProcfsWorkbench:
    """A workbench of real processes; regular files lie in a new directory below `directory` (default: TMPDIR).

    `still` makes the machine hold still until the workbench is closed, see `steady`; `swap` ("64 MiB", bytes, or the
    path of a block device that holds a swap area) switches swap on, `knobs` are files of /proc and /sys with what to
    write to them meanwhile; both imply `still`.
    `hugepages` are hugetlb pages set aside meanwhile, by size: {"2 MiB": 20}, or with surplus pages allowed (20, 4).
    `disk` ("64 MiB", or bytes) is the size of a file system of its own that regular files lie on instead, see `Disk`;
    `disk_kind` is "compressed" (zram) or "disk" (a loop device), by default the first that there is.
    `poison`: tasks may poison memory of the machine, which is lost until it boots again.
    Raises BackendUnavailable off Linux, or where swap cannot be switched on, or huge pages cannot be had.
    """
    if not sys.platform.startswith("linux"):
        raise BackendUnavailable("real processes need Linux", remedy="use a simulated machine")
    held = ExitStack()
    pools, allowed = _pools(hugepages or {})
    place = Disk(parse_size(disk), disk_kind) if disk else None
    with held:
        if still or swap or knobs or pools or place:
            held.enter_context(
                steady(swap=_area(swap), knobs={**(knobs or {}), **allowed, **pools}, disk=place)
            )
        for path, count in pools.items():
            if _number(path) != count:
                raise BackendUnavailable(
                    f"not {count} huge pages by {path}", remedy="run as root, with more free memory"
                )
        still = still or bool(swap) or bool(knobs) or bool(pools) or place is not None
        return ProcfsWorkbench(
            kernel or open_kernel(),
            directory=str(place.directory) if place else directory,
            held=held.pop_all() if still else None,
            pools=pools,
            disk=place,
            poison=poison,
        )
    raise AssertionError("unreachable")


def _area(swap: int | str) -> int | str:
    """Bytes of a swap area to be made, or the device of one that is there."""
    return swap if isinstance(swap, str) and swap.startswith("/") else parse_size(swap)
