"""What a backend is: a kernel that can be looked at, its processes, and a workbench that runs programs.

These are `typing.Protocol` classes with the conveniences filled in: a backend subclasses them, provides the members
marked "to provide", and inherits the rest. `pmcore.testing.conformance` checks that what it provides means the same as
everywhere else.
"""

from __future__ import annotations

import enum
import errno
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import attrs
import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import ArgumentError, BackendUnavailable, Missing, NotModelled, syscall_error
from pmcore.pageflags import PageFlagsArray
from pmcore.pagemap import PagemapEntries

if TYPE_CHECKING:
    from pmcore.geometry import Geometry
    from pmcore.procmap import MapAnswer, MapQuery
    from pmcore.profile import KernelProfile
    from pmcore.scan.request import ScanRequest
    from pmcore.scan.result import ScanResult
    from pmcore.smaps import SmapsEntry
    from pmcore.uapi import ClearRefs, Madvise, MapFlag, MremapFlag, Prot, UffdFeature
    from pmcore.vma import Vma

__all__ = [
    "HEAP",
    "IDLE_BITMAP",
    "MADE_PAGES",
    "BoolArray",
    "FileResidency",
    "FrameFile",
    "Kernel",
    "Process",
    "Task",
    "U64Array",
    "Workbench",
]

#: Where the heap of a task begins (`Task.brk`): free in any process, and the same on every workbench.
HEAP = 0x0F00_0000_0000
#: Pages of contents that a new file is made with, at most (`Task.open_file`); ftruncate makes it larger.
MADE_PAGES = 1 << 16
#: Idle page tracking: a bit a frame, in words of 64 bits (rule ID-001).
IDLE_BITMAP = "/sys/kernel/mm/page_idle/bitmap"


class FrameFile(enum.StrEnum):
    """The files indexed by PFN, one 64-bit word a frame."""

    KPAGECOUNT = "kpagecount"
    KPAGEFLAGS = "kpageflags"
    KPAGECGROUP = "kpagecgroup"


@attrs.frozen(kw_only=True, eq=False)
class FileResidency:
    """What the file behind a mapping says of a range, one element a page (document: Exceptions for Shared Memory)."""

    #: lseek(SEEK_DATA): the file has the page, in memory or swapped out.
    data: BoolArray
    #: mincore(): the page is in memory (page cache, swap cache included).
    in_core: BoolArray


@runtime_checkable
class Process(Protocol):
    """One process's page tables, looked at from outside."""

    #: To provide: the process's number.
    pid: int

    @property
    def kernel(self) -> Kernel:
        """To provide: the kernel that the process runs on."""
        ...

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """To provide: `length` bytes of /proc/PID/`name` from `offset`; fewer only at the end.

        Raises what the kernel does: InvalidArgument for a pagemap offset or length that is no multiple of 8,
        NotPermitted, ProcessGone, Missing for a file that this kernel has not.
        """
        ...

    def read_pagemap(self, start_vpn: int, out: U64Array) -> int:
        """To provide: fill `out` with the raw entries from page `start_vpn` on; the number filled.

        Fewer than `len(out)` only at the end of the address space; 0 if the process is gone.
        """
        ...

    def maps(self) -> tuple[Vma, ...]:
        """To provide: the VMAs in ascending order. Raises ProcessGone, NotPermitted."""
        ...

    def smaps(self, start: int = 0, end: int | None = None) -> tuple[SmapsEntry, ...]:
        """To provide: the VMAs that overlap `start` to `end` (default: all), with their counters, in ascending order.

        Raises as `maps`.
        """
        ...

    def pagemap_scan_raw(self, request: ScanRequest) -> ScanResult:
        """To provide: PAGEMAP_SCAN; a refusal is a result whose `errno` is set (what was written stays in it)."""
        ...

    def clear_refs(self, what: ClearRefs | int) -> None:
        """To provide: write `what` to clear_refs. Raises NotSupported where the kernel knows no such number."""
        ...

    def file_residency(self, vma: Vma, start: int, end: int) -> FileResidency:
        """To provide: SEEK_DATA and mincore of the file behind `vma` for the pages `start` to `end`.

        Raises InvalidArgument for a mapping with no file, NotPermitted where the file cannot be reached.
        """
        ...

    # -- conveniences ----------------------------------------------------------------------------------

    def files(self) -> Sequence[str]:
        """Names in /proc/PID that can be read with `pread` (clear_refs: written). A backend with more says so."""
        return ("pagemap", "maps", "smaps", "clear_refs")

    def pagemap(self, start: int, end: int) -> PagemapEntries:
        """Entries of the pages from `start` to `end` (bytes, page-aligned), one a page.

        Raises ArgumentError for an unaligned range, ProcessGone where the process has died.
        """
        geometry = self.kernel.profile.geometry
        out = np.zeros(geometry.pages(start, end), dtype=np.uint64)
        filled = self.read_pagemap(start >> geometry.page_shift, out)
        if filled == 0 and len(out) and start < geometry.task_size:
            raise syscall_error(errno.ESRCH, f"read(pagemap of {self.pid})", remedy="the process is gone")
        return PagemapEntries(out[:filled], start=start, profile=self.kernel.profile)

    def query_maps(self, query: MapQuery) -> MapAnswer:
        """PROCMAP_QUERY: one VMA. Here answered from `maps` and `smaps`, as the kernel would.

        Raises NotSupported (ENOTTY) where the kernel has no such call, Missing (ENOENT) where no VMA fits,
        InvalidArgument (EINVAL, E2BIG, ENAMETOOLONG).
        """
        from pmcore.procmap import MapAnswer, answer

        if not self.kernel.profile.has("maps.procmap_query"):
            raise syscall_error(
                errno.ENOTTY, f"ioctl(maps of {self.pid}, PROCMAP_QUERY)", remedy="read maps as text"
            )
        geometry, room = self.kernel.geometry, bytearray()

        def page_size(vma: Vma) -> int:
            [entry] = self.smaps(vma.start, vma.end)
            return entry.counters.get("KernelPageSize", geometry.page_size)

        at = {"name_at": bool(query.name_room), "build_id_at": bool(query.build_id_room)}
        argument = bytearray(query.packed(**at)) + bytes(max(0, min(query.size, 4096) - 104))
        vmas = [vma for vma in self.maps() if vma.start < geometry.task_size]
        answer(argument, vmas, page_size, lambda _address, data: room.extend(data))
        answered = MapAnswer.unpacked(argument, bytes(room))
        if query.build_id_room and query.size >= len(query.packed()):
            self.read_header(answered.start)
        return answered

    def read_header(self, start: int) -> None:
        """What PROCMAP_QUERY for a build id does beside answering: the file behind the VMA at `start` is read (AC-017).

        A backend whose machine shows that does it; here nothing is done.
        """
        return

    def maps_by_query(self) -> tuple[Vma, ...]:
        """The VMAs of user addresses, one PROCMAP_QUERY after the other. Raises as `query_maps`, but for ENOENT."""
        from pmcore.procmap import MapQuery
        from pmcore.uapi import ProcmapFlag

        found: list[Vma] = []
        following = ProcmapFlag.COVERING_OR_NEXT_VMA
        while True:
            address = found[-1].end if found else 0
            try:
                answered = self.query_maps(MapQuery(address=address, flags=following, name_room=4096))
            except Missing:
                return tuple(found)
            found.append(answered.vma())

    def pagemap_scan(self, request: ScanRequest) -> ScanResult:
        """PAGEMAP_SCAN, once. Raises the kernel's refusal as a SyscallError. See `pmcore.scan.scan_all`."""
        return self.pagemap_scan_raw(request).check()


@runtime_checkable
class Kernel(Protocol):
    """A machine's page frames and processes."""

    #: To provide: the backend's name ("procfs", "sim", ...).
    name: str
    #: To provide: what this kernel can do.
    profile: KernelProfile
    #: To provide: whether this opener sees frame numbers and swap entries.
    pfn_visible: bool
    #: To provide: how many threads reading frames at once make it faster (1: no gain).
    concurrency: int

    @property
    def geometry(self) -> Geometry:
        """Page size and shape of the page tables. A backend whose profile costs time to find may know it sooner."""
        return self.profile.geometry

    def frame_count(self) -> int:
        """To provide: number of frames that the kpage* files cover (their size in words)."""
        ...

    def pread(self, name: str, offset: int, length: int) -> bytes:
        """To provide: bytes of /proc/`name` (kpagecount, kpageflags, kpagecgroup, meminfo, ...) from `offset`.

        A name that begins with /sys/ is a file of sysfs by its whole path, where the backend has such files.
        Raises InvalidArgument, NotPermitted, Missing as the kernel does.
        """
        ...

    def read_frames(self, file: FrameFile, start_pfn: int, out: U64Array) -> int:
        """To provide: fill `out` with the raw words of `file` from `start_pfn` on; the number filled.

        Fewer than `len(out)` only at the end of the file. Safe to call from several threads at once.
        """
        ...

    def pids(self) -> Sequence[int]:
        """To provide: the numbers of the processes there are, ascending."""
        ...

    def process(self, pid: int) -> Process:
        """To provide: the process `pid`. Raises ProcessGone if there is none."""
        ...

    def close(self) -> None:
        """To provide: let go of what is held. Closing twice is allowed."""
        ...

    # -- conveniences ----------------------------------------------------------------------------------

    def files(self) -> Sequence[str]:
        """Names that `pread` knows: those of /proc, and paths that begin with /sys/. A backend with more says so."""
        return tuple(file for file in FrameFile if self.profile.has(file))

    def kpageflags(self, start_pfn: int = 0, count: int | None = None) -> PageFlagsArray:
        """Flags of `count` frames (None: all that follow), one word a frame."""
        return PageFlagsArray(self._frames(FrameFile.KPAGEFLAGS, start_pfn, count), profile=self.profile)

    def kpagecount(self, start_pfn: int = 0, count: int | None = None) -> U64Array:
        """Map counts of `count` frames (None: all that follow)."""
        return self._frames(FrameFile.KPAGECOUNT, start_pfn, count)

    def kpagecgroup(self, start_pfn: int = 0, count: int | None = None) -> U64Array:
        """Memory-cgroup inode numbers of `count` frames (None: all that follow), 0 for none."""
        return self._frames(FrameFile.KPAGECGROUP, start_pfn, count)

    def pwrite(self, name: str, offset: int, data: bytes) -> int:
        """May be provided: write to a file of `pread`'s names that takes something (`IDLE_BITMAP`); the bytes taken.

        Raises what the kernel does. Here: Missing, as where there is no such file.
        """
        raise syscall_error(errno.ENOENT, f"open({name})", remedy=f"the backend {self.name!r} has none")

    def inode(self, path: str) -> int:
        """May be provided: the inode number of a path of sysfs that has one of its own (a cgroup's); else 0."""
        return 0

    def changed_meanwhile(self) -> U64Array:
        """Frames that changed while a recording was made, ascending. A backend that can be looked at again has none."""
        return np.zeros(0, dtype=np.uint64)

    def frames_at(self, file: FrameFile, pfns: U64Array) -> U64Array:
        """The words of `file` for the frames `pfns` (any order, repeats allowed); 0 past the end of the file.

        Reads runs of neighbouring frames together, so a process's frames cost few reads.
        """
        unique, inverse = np.unique(np.asarray(pfns, dtype=np.uint64), return_inverse=True)
        words = np.zeros(len(unique), dtype=np.uint64)
        for first, last in _gapped_runs(unique):
            low = int(unique[first])
            span = np.zeros(int(unique[last - 1]) - low + 1, dtype=np.uint64)
            self.read_frames(file, low, span)
            words[first:last] = span[(unique[first:last] - np.uint64(low)).astype(np.intp)]
        return words[inverse]

    def _frames(self, file: FrameFile, start_pfn: int, count: int | None) -> U64Array:
        if start_pfn < 0 or (count is not None and count < 0):
            raise ArgumentError(f"start_pfn {start_pfn} and count {count} must not be negative")
        available = max(0, self.frame_count() - start_pfn)
        out = np.zeros(available if count is None else min(count, available), dtype=np.uint64)
        return out[: self.read_frames(file, start_pfn, out)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


#: Frames apart at which one longer read is cheaper than two (a system call is worth some dozens of frames).
_READ_THROUGH = np.uint64(64)


def _gapped_runs(sorted_pfns: U64Array) -> Iterator[tuple[int, int]]:
    """Index ranges of `sorted_pfns` (ascending, unique) whose frames lie near enough to be read together."""
    if len(sorted_pfns) == 0:
        return
    cuts = np.flatnonzero(np.diff(sorted_pfns) > _READ_THROUGH) + 1
    bounds = [0, *cuts.tolist(), len(sorted_pfns)]
    yield from itertools.pairwise(bounds)


@runtime_checkable
class Task(Protocol):
    """A process that runs a page-table program's steps. Calls are the kernel's, errors are SyscallError.

    Addresses and lengths are bytes. A refused call raises and changes nothing.
    """

    #: To provide: its number.
    pid: int

    @property
    def process(self) -> Process:
        """To provide: the same process, looked at from outside."""
        ...

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
        """mmap(2); the address. Default: private anonymous, readable and writable."""
        ...

    def munmap(self, start: int, length: int) -> None:
        """munmap(2)."""
        ...

    def mprotect(self, start: int, length: int, prot: Prot | int) -> None:
        """mprotect(2)."""
        ...

    def mremap(
        self, start: int, old_length: int, new_length: int, *, flags: MremapFlag | int = 0, new_addr: int = 0
    ) -> int:
        """mremap(2); the new address."""
        ...

    def madvise(self, start: int, length: int, advice: Madvise | int) -> None:
        """madvise(2)."""
        ...

    def mlock(self, start: int, length: int, *, onfault: bool = False) -> None:
        """mlock(2), or mlock2(2) with MLOCK_ONFAULT."""
        ...

    def munlock(self, start: int, length: int) -> None:
        """munlock(2)."""
        ...

    def mlockall(self, flags: int) -> None:
        """mlockall(2): 1 what is mapped now, 2 what will be, 4 pages as they are faulted in."""
        ...

    def munlockall(self) -> None:
        """munlockall(2)."""
        ...

    def brk(self, addr: int) -> int:
        """The system call brk(2): the break after it, moved to `addr` or not. The heap begins at `HEAP`."""
        ...

    def mincore(self, start: int, length: int) -> BoolArray:
        """mincore(2): one element a page, whether it is in memory."""
        ...

    def msync(self, start: int, length: int, flags: int) -> None:
        """msync(2)."""
        ...

    def move_pages(
        self, pages: Sequence[int], nodes: Sequence[int] | None, *, flags: int = 2, pid: int = 0
    ) -> tuple[int, list[int | None]]:
        """move_pages(2) of pages of the task `pid` (0: its own); `nodes` None asks where they are.

        The call's value, and the status of each page: its node, -errno, or None where the kernel wrote nothing.
        A refusal at one node of several leaves what was moved before where it went.
        """
        ...

    def read(self, start: int, length: int) -> bytes:
        """The bytes at `start`, read by the task itself. Raises AddressSpaceFault where it would be killed."""
        ...

    def write(self, start: int, data: bytes) -> None:
        """Write `data` at `start`, by the task itself. Raises AddressSpaceFault where it would be killed."""
        ...

    def touch(self, start: int, length: int, *, write: bool = True, step: int | None = None) -> None:
        """One access of one byte every `step` bytes (default: a page); a write keeps the byte's value.

        Raises AddressSpaceFault at the first address that cannot be accessed.
        """
        ...

    def memfd_create(self, name: str, *, flags: int = 0) -> int:
        """memfd_create(2); the descriptor."""
        ...

    def open_file(self, name: str, *, pages: int | None = None) -> int:
        """Open (create) the regular file `name` in the workbench's own directory, readable and writable.

        With `pages` it is made anew, so many pages long and not cached: each begins with "NAME:NUMBER" and a newline,
        the rest of it are zeros. Raises ArgumentError for another name, or for more than `MADE_PAGES`.
        """
        ...

    def ftruncate(self, fd: int, length: int) -> None:
        """ftruncate(2)."""
        ...

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        ...

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """pread(2)."""
        ...

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """pwrite(2)."""
        ...

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        """lseek(2), with SEEK_DATA (3) and SEEK_HOLE (4)."""
        ...

    def fsync(self, fd: int) -> None:
        """fsync(2)."""
        ...

    def sync(self) -> None:
        """syncfs(2) of the file system that the workbench's directory lies on."""
        ...

    def fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        """posix_fadvise(2): 3 POSIX_FADV_WILLNEED, 4 POSIX_FADV_DONTNEED."""
        ...

    def close(self, fd: int) -> None:
        """close(2)."""
        ...

    def userfaultfd(self, features: UffdFeature | int = 0) -> int:
        """userfaultfd(2) and UFFDIO_API with `features`; the descriptor."""
        ...

    def uffd_register(self, fd: int, start: int, length: int, mode: int) -> int:
        """UFFDIO_REGISTER (mode 1 missing, 2 write-protect, 4 minor); the bit set of ioctls allowed."""
        ...

    def uffd_unregister(self, fd: int, start: int, length: int) -> None:
        """UFFDIO_UNREGISTER."""
        ...

    def uffd_writeprotect(self, fd: int, start: int, length: int, *, protect: bool) -> None:
        """UFFDIO_WRITEPROTECT."""
        ...

    def uffd_copy(self, fd: int, start: int, source: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_COPY (mode 1 wakes nobody, 2 write-protects); how many bytes were filled.

        Fewer than asked for are EAGAIN, for this one and those below.
        """
        ...

    def uffd_zeropage(self, fd: int, start: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_ZEROPAGE; how many bytes were filled."""
        ...

    def uffd_continue(self, fd: int, start: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_CONTINUE (mode 2 write-protects); how many bytes were mapped."""
        ...

    def uffd_poison(self, fd: int, start: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_POISON; how many bytes were poisoned."""
        ...

    def uffd_move(self, fd: int, start: int, source: int, length: int, *, mode: int = 0) -> int:
        """UFFDIO_MOVE (mode 2 allows holes in the source); how many bytes were moved."""
        ...

    def uffd_wake(self, fd: int, start: int, length: int) -> None:
        """UFFDIO_WAKE."""
        ...

    def fork(self) -> Task:
        """fork(2); the child, waiting for steps."""
        ...

    @property
    def watched_by(self) -> Mapping[tuple[int, int], int]:
        """Userfaultfds that came to be when the task was forked, because its parent's tell of forks.

        By task and descriptor of each that watches the parent: the descriptor, in the same task, of the new one. That
        task is the oldest that holds the one; a workbench reads its events for it.
        """
        return {}

    def exit(self) -> None:
        """Let the task exit and be reaped. Exiting twice is allowed."""
        ...


@runtime_checkable
class Workbench(Protocol):
    """Where page-table programs run: it spawns tasks on a kernel."""

    @property
    def kernel(self) -> Kernel:
        """To provide: the kernel that its tasks run on, for looking."""
        ...

    @property
    def watched(self) -> bool:
        """Whether others sample accesses meanwhile (a DAMON monitor), which moves accessed bits about and sets IDLE."""
        return False

    @property
    def disk_kind(self) -> str:
        """What regular files lie on: "compressed" memory, which reads at once, a "disk"; "" where nobody can tell."""
        return ""

    def spawn(self) -> Task:
        """To provide: a fresh task with nothing of the program mapped."""
        ...

    def tasks(self) -> Iterable[Task]:
        """To provide: the tasks that are alive, in the order they came to be."""
        ...

    def settle(self) -> None:
        """To provide: have the kernel do what it puts off, so that a look shows what the last step did.

        Where nothing is put off there is nothing to do.
        """
        ...

    def set_thp(self, settings: Mapping[str, str]) -> None:
        """To provide where that can be set: which sizes of huge pages anonymous memory gets from here on.

        By size ("64kB": "always", "inherit", "madvise", "never") and, for those that inherit, "enabled" ("always",
        "madvise", "never"); what is not named is as the workbench was opened. Raises BackendUnavailable where that
        cannot be set.
        """
        if settings:
            raise BackendUnavailable(
                "this workbench sets no sizes of huge pages", remedy="leave them out of the program"
            )

    def ksm_scan(
        self, full_scans: int = 1, *, use_zero_pages: bool = False, max_page_sharing: int = 256
    ) -> dict[str, int]:
        """May be provided: let ksmd make exactly `full_scans` full scans, as the machine's administrator would.

        The counters of /sys/kernel/mm/ksm afterwards, by name. `use_zero_pages` is on for this call alone;
        `max_page_sharing` stays. Raises Busy where it cannot be changed any more, NotModelled where there is no ksmd.
        """
        raise NotModelled("ksmd on this workbench")

    def ksm_unmerge(self) -> dict[str, int]:
        """May be provided: unmerge all pages of the machine (2 to /sys/kernel/mm/ksm/run); the counters afterwards.

        Raises NotModelled where there is no ksmd.
        """
        raise NotModelled("ksmd on this workbench")

    def make_group(self, path: str) -> None:
        """To provide where there are memory cgroups: make one. `path` ("a", "a/b") is below the group of the workbench.

        Raises ArgumentError for what is no path, SyscallError as mkdir(2) does, BackendUnavailable where there are
        none.
        """
        raise BackendUnavailable("this workbench makes no cgroups", remedy="leave them out of the program")

    def remove_group(self, path: str) -> None:
        """To provide with them: remove one, as rmdir(2) does; what is charged to it stays charged."""
        raise BackendUnavailable("this workbench makes no cgroups", remedy="leave them out of the program")

    def move_task(self, task: Task, path: str) -> None:
        """To provide with them: put `task` into one (cgroup.procs), or into the group of the workbench ("")."""
        raise BackendUnavailable("this workbench makes no cgroups", remedy="leave them out of the program")

    def limit_group(self, path: str, length: int | str | None) -> None:
        """To provide with them: the most that one may have, in bytes (memory.limit_in_bytes, memory.max); None: all.

        Raises SyscallError as a write to that file does.
        """
        raise BackendUnavailable("this workbench makes no cgroups", remedy="leave them out of the program")

    def group_usage(self, path: str) -> int:
        """To provide with them: the bytes that are charged to it (memory.usage_in_bytes, memory.current)."""
        raise BackendUnavailable("this workbench makes no cgroups", remedy="leave them out of the program")

    def groups(self) -> Mapping[str, int]:
        """To provide with them: those that are there by path, with what kpagecgroup shows for them."""
        return {}

    def set_readahead(self, length: int) -> None:
        """To provide where that can be set: how many bytes files that are opened from now on read ahead; at first none.

        Raises BackendUnavailable elsewhere.
        """
        raise BackendUnavailable("this workbench has no disk of its own", remedy="open it with disk=...")

    def compact(self) -> object:
        """To provide where that can be done: write 1 to compact_memory. Raises BackendUnavailable elsewhere."""
        raise BackendUnavailable("this workbench compacts no memory", remedy="leave that out of the program")

    def drop_caches(self) -> object:
        """To provide where that can be done: write 1 to drop_caches. Raises BackendUnavailable elsewhere."""
        raise BackendUnavailable("this workbench drops no caches", remedy="leave that out of the program")

    def close(self) -> None:
        """To provide: end all tasks and remove what they left. Closing twice is allowed."""
        ...

    def renew(self) -> None:
        """Between two programs, no task being alive: see that the next finds nothing that the last one left.

        Where nothing is left there is nothing to do.
        """
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
