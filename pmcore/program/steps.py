"""The steps of a page-table program, one class an operation, as frozen values.

`task`, `area` and `fd` are names that the program gives; `page` and `pages` count in pages from the area's start,
`offset` and `length` in bytes. A step says what is asked for, also what the kernel will refuse.
"""

from __future__ import annotations

from typing import Any

import attrs

from pmcore.errors import ArgumentError
from pmcore.uapi import Madvise, MapFlag, Prot

__all__ = [
    "ANSWERS",
    "STEPS",
    "Advise",
    "Brk",
    "ClearRefs",
    "CloseFd",
    "Compact",
    "DropCaches",
    "Exit",
    "Fadvise",
    "Fallocate",
    "Fork",
    "Fsync",
    "Ftruncate",
    "KsmScan",
    "KsmUnmerge",
    "LimitGroup",
    "Lock",
    "LockAll",
    "Lseek",
    "MakeGroup",
    "Map",
    "MarkIdle",
    "MemfdCreate",
    "Mincore",
    "Move",
    "MovePages",
    "MoveTask",
    "Msync",
    "OpenFile",
    "PagemapRead",
    "Pread",
    "Protect",
    "Pwrite",
    "QueryMaps",
    "Read",
    "ReadAhead",
    "ReadIdle",
    "RemoveGroup",
    "Scan",
    "Step",
    "Sync",
    "Touch",
    "TouchAnswered",
    "UffdContinue",
    "UffdCopy",
    "UffdMove",
    "UffdOpen",
    "UffdPoison",
    "UffdProtect",
    "UffdRegister",
    "UffdUnregister",
    "UffdWake",
    "UffdZeropage",
    "Unlock",
    "UnlockAll",
    "Unmap",
    "Write",
]


#: What a userfaultfd can be told to do about a page that nobody may access.
ANSWERS = ("zeropage", "copy", "continue", "poison", "move", "unprotect")


def _name(_instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if not isinstance(value, str) or not value or not value.replace("_", "").isalnum():
        raise ArgumentError(f"{attribute.name}={value!r} is no name", remedy="letters, digits and _")


def _count(_instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ArgumentError(f"{attribute.name}={value!r} is no unsigned 64-bit number")


def _vec(_instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if value not in ("", "null", "there"):
        raise ArgumentError(
            f"{attribute.name}={value!r}", remedy='"null", "there", or "" for what vec_len says'
        )


def _group(_instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    """The path of a cgroup: names with a slash between."""
    for part in value.split("/") if isinstance(value, str) else [""]:
        _name(_instance, attribute, part)


def _answer(_instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if value not in ANSWERS:
        raise ArgumentError(f"{attribute.name}={value!r}", remedy=f"one of {', '.join(ANSWERS)}")


def name(default: Any = attrs.NOTHING) -> Any:
    """A field that names something."""
    return attrs.field(default=default, validator=_name)


def number(default: Any = attrs.NOTHING) -> Any:
    """A field that counts something."""
    return attrs.field(default=default, validator=_count)


@attrs.frozen(kw_only=True)
class Step:
    """Base of all steps. `task` does it."""

    task: str = name("main")


@attrs.frozen(kw_only=True)
class Map(Step):
    """mmap: a new area. `fd` "" maps anonymous memory. `align` in bytes; the runner chooses the address."""

    area: str = name()
    pages: int = number()
    prot: int = number(int(Prot.READ | Prot.WRITE))
    flags: int = number(int(MapFlag.PRIVATE | MapFlag.ANONYMOUS))
    fd: str = ""
    page_offset: int = number(0)
    align: int = number(4096)
    #: Leave the place to the kernel, with page `page` of the area `within` for a hint if that is given. What comes of
    #: it is a value; a mapping that is not at the hint is then made anew at a place of the runner's, equal everywhere.
    anywhere: bool = False
    #: Map at page `page` of this area instead (`flags` say whether over what is there).
    within: str = ""
    page: int = number(0)


@attrs.frozen(kw_only=True)
class _Range(Step):
    area: str = name()
    page: int = number(0)
    pages: int = number()


@attrs.frozen(kw_only=True)
class Unmap(_Range):
    """munmap."""


@attrs.frozen(kw_only=True)
class Protect(_Range):
    """mprotect."""

    prot: int = number()


@attrs.frozen(kw_only=True)
class Advise(_Range):
    """madvise."""

    advice: int = number(int(Madvise.DONTNEED))


@attrs.frozen(kw_only=True)
class Lock(_Range):
    """mlock, or mlock2 with MLOCK_ONFAULT."""

    onfault: bool = False


@attrs.frozen(kw_only=True)
class Unlock(_Range):
    """munlock."""


@attrs.frozen(kw_only=True)
class LockAll(Step):
    """mlockall: 1 what is mapped, 2 what will be, 4 on fault."""

    flags: int = number(1)


@attrs.frozen(kw_only=True)
class UnlockAll(Step):
    """munlockall."""


@attrs.frozen(kw_only=True)
class Brk(Step):
    """brk to `length` bytes above the start of the heap, which is the area `area` from then on."""

    area: str = name("heap")
    length: int = number()


@attrs.frozen(kw_only=True)
class Msync(_Range):
    """msync; flags 1 asynchronous, 2 invalidate, 4 synchronous."""

    flags: int = number(4)


@attrs.frozen(kw_only=True)
class Mincore(_Range):
    """mincore."""


@attrs.frozen(kw_only=True)
class Move(_Range):
    """mremap to `new_pages`; with `to` the pages become the area of that name at an address of the runner's."""

    new_pages: int = number()
    flags: int = number(1)
    to: str = ""
    #: Alignment in bytes of the place that the runner chooses.
    align: int = number(4096)


@attrs.frozen(kw_only=True)
class MovePages(_Range):
    """move_pages of every `stride`-th page to a node; the value has each page's status, a node or an errno below 0."""

    #: An int of the kernel's: what is above 2**31 stands for negative numbers.
    node: int = number(0)
    #: Ask where the pages are, and move nothing.
    query: bool = False
    #: MPOL_MF_MOVE 2, MPOL_MF_MOVE_ALL 4.
    flags: int = number(2)
    stride: int = number(1)
    #: The task whose pages they are; "" for the task's own.
    of: str = ""


@attrs.frozen(kw_only=True)
class Touch(_Range):
    """One access a page (every `stride` pages): a write keeps what is there."""

    write: bool = True
    stride: int = number(1)


@attrs.frozen(kw_only=True)
class Read(Step):
    """Read bytes."""

    area: str = name()
    offset: int = number(0)
    length: int = number(1)


@attrs.frozen(kw_only=True)
class Write(Step):
    """Write bytes: `text`, as UTF-8, at the same place of each of `pages` pages."""

    area: str = name()
    offset: int = number(0)
    text: str = "x"
    #: The same text so many times, a page apart: equal pages.
    pages: int = number(1)


@attrs.frozen(kw_only=True)
class MemfdCreate(Step):
    """memfd_create; `flags` 4 is MFD_HUGETLB."""

    fd: str = name()
    flags: int = number(0)
    pages: int = number(0)


@attrs.frozen(kw_only=True)
class OpenFile(Step):
    """A regular file of the workbench's; `new`: made anew, with `pages` of contents, none of them cached."""

    fd: str = name()
    file: str = name()
    pages: int = number(0)
    new: bool = False


@attrs.frozen(kw_only=True)
class Ftruncate(Step):
    """ftruncate."""

    fd: str = name()
    length: int = number()


@attrs.frozen(kw_only=True)
class Fallocate(Step):
    """fallocate; mode 3 punches a hole."""

    fd: str = name()
    mode: int = number(3)
    offset: int = number(0)
    length: int = number()


@attrs.frozen(kw_only=True)
class Pwrite(Step):
    """pwrite of `text`."""

    fd: str = name()
    offset: int = number(0)
    text: str = "x"


@attrs.frozen(kw_only=True)
class Pread(Step):
    """pread."""

    fd: str = name()
    offset: int = number(0)
    length: int = number(1)


@attrs.frozen(kw_only=True)
class Lseek(Step):
    """lseek; `whence` 3 is SEEK_DATA, 4 SEEK_HOLE."""

    fd: str = name()
    offset: int = number(0)
    whence: int = number(3)


@attrs.frozen(kw_only=True)
class Fsync(Step):
    """fsync."""

    fd: str = name()


@attrs.frozen(kw_only=True)
class Sync(Step):
    """sync of the file system that regular files lie on."""


@attrs.frozen(kw_only=True)
class Fadvise(Step):
    """posix_fadvise; advice 3 reads ahead, 4 drops what is clean and unmapped."""

    fd: str = name()
    offset: int = number(0)
    length: int = number(0)
    advice: int = number(4)


@attrs.frozen(kw_only=True)
class ReadAhead(Step):
    """How many bytes files that are opened from then on read ahead, at most (read_ahead_kb of their disk)."""

    length: int = number()


@attrs.frozen(kw_only=True)
class DropCaches(Step):
    """A write of 1 to drop_caches: the page cache, of the whole machine."""


@attrs.frozen(kw_only=True)
class Compact(Step):
    """The administrator has memory compacted: all pages of the machine may get other frames. `task` does nothing."""


@attrs.frozen(kw_only=True)
class CloseFd(Step):
    """close."""

    fd: str = name()


@attrs.frozen(kw_only=True)
class UffdOpen(Step):
    """userfaultfd with UFFDIO_API."""

    fd: str = name("uffd")
    features: int = number(0)


@attrs.frozen(kw_only=True)
class UffdRegister(_Range):
    """UFFDIO_REGISTER; mode 1 missing pages, 2 write protection, 4 minor faults."""

    fd: str = name("uffd")
    mode: int = number(2)
    #: Whether the value is the bits of the ioctls that then work on the range.
    ioctls: bool = False


@attrs.frozen(kw_only=True)
class UffdUnregister(_Range):
    """UFFDIO_UNREGISTER."""

    fd: str = name("uffd")


@attrs.frozen(kw_only=True)
class UffdProtect(_Range):
    """UFFDIO_WRITEPROTECT."""

    fd: str = name("uffd")
    protect: bool = True


@attrs.frozen(kw_only=True)
class _Fill(_Range):
    fd: str = name("uffd")
    mode: int = number(0)


@attrs.frozen(kw_only=True)
class UffdCopy(_Fill):
    """UFFDIO_COPY from page `source_page` of the area `source`; the value is the pages filled. Mode 2 protects them."""

    source: str = name()
    source_page: int = number(0)
    #: Bytes behind that page's start.
    shift: int = number(0)


@attrs.frozen(kw_only=True)
class UffdZeropage(_Fill):
    """UFFDIO_ZEROPAGE; the value is the pages filled."""


@attrs.frozen(kw_only=True)
class UffdContinue(_Fill):
    """UFFDIO_CONTINUE; the value is the pages mapped. Mode 2 protects them."""


@attrs.frozen(kw_only=True)
class UffdPoison(_Fill):
    """UFFDIO_POISON; the value is the pages poisoned."""


@attrs.frozen(kw_only=True)
class UffdMove(_Fill):
    """UFFDIO_MOVE from page `source_page` of the area `source`; the value is the pages moved. Mode 2 allows holes."""

    source: str = name()
    source_page: int = number(0)


@attrs.frozen(kw_only=True)
class TouchAnswered(_Range):
    """One access a page; to each that is SIGBUS an answer, before it is tried once more. The value: how many answers.

    `answer` is one of ANSWERS: an ioctl of the userfaultfd `fd` for that page alone. What an answer refuses, and an
    access that it was no answer to, ends the step.
    """

    fd: str = name("uffd")
    answer: str = attrs.field(default="zeropage", validator=_answer)
    write: bool = True
    #: Page of `source` that "copy" and "move" take for the first page of the range.
    source: str = ""
    source_page: int = number(0)


@attrs.frozen(kw_only=True)
class UffdWake(_Range):
    """UFFDIO_WAKE."""

    fd: str = name("uffd")


@attrs.frozen(kw_only=True)
class Fork(Step):
    """fork: the child is the task `child`.

    Where a userfaultfd `fd` tells of forks (UFFD_FEATURE_EVENT_FORK), the one that watches the child is called
    `fd_child` from then on, and the task that opened `fd` holds it.
    """

    child: str = name()


@attrs.frozen(kw_only=True)
class Exit(Step):
    """exit."""


@attrs.frozen(kw_only=True)
class ClearRefs(Step):
    """Write to the task's clear_refs."""

    what: int = number(4)


@attrs.frozen(kw_only=True)
class MarkIdle(_Range):
    """The administrator marks the frames behind the pages that are present idle, by writing page_idle/bitmap."""


@attrs.frozen(kw_only=True)
class ReadIdle(_Range):
    """The administrator reads page_idle/bitmap for the pages: 1 idle, 0 not, -1 for what is not present."""


@attrs.frozen(kw_only=True)
class Scan(_Range):
    """PAGEMAP_SCAN of pages of an area, from `shift` bytes behind the first on."""

    shift: int = number(0)
    vec_len: int = number(512)
    #: "null": no place for regions, whatever `vec_len` says; "there": one, also for none; "": one if there are any.
    vec: str = attrs.field(default="", validator=_vec)
    max_pages: int = number(0)
    flags: int = number(0)
    category_inverted: int = number(0)
    category_mask: int = number(0)
    category_anyof_mask: int = number(0)
    return_mask: int = number(0x7F)


@attrs.frozen(kw_only=True)
class PagemapRead(Step):
    """A read of the pagemap file: `length` bytes at `offset` bytes behind the area's first word, aligned or not.

    With `from_end` the offset counts from the end of the file. What is compared are the words without frames and slots.
    """

    area: str = name()
    offset: int = number(0)
    length: int = number(8)
    from_end: bool = False


@attrs.frozen(kw_only=True)
class QueryMaps(Step):
    """PROCMAP_QUERY for the address `offset` bytes behind the start of an area.

    The value tells of the VMA where it lies; of one that is not the program's that it is elsewhere, as of none.
    """

    area: str = name()
    offset: int = number(0)
    flags: int = number(0)
    size: int = number(104)
    name_room: int = number(0)
    build_id_room: int = number(0)


@attrs.frozen(kw_only=True)
class KsmScan(Step):
    """The administrator lets ksmd make `scans` full scans; the value is its counters. `task` does nothing."""

    scans: int = number(1)
    zero_pages: bool = False
    #: max_page_sharing; it stays until a step says another.
    sharing: int = number(256)


@attrs.frozen(kw_only=True)
class KsmUnmerge(Step):
    """The administrator unmerges all pages; the value is ksmd's counters. `task` does nothing."""


@attrs.frozen(kw_only=True)
class MakeGroup(Step):
    """The administrator makes a memory cgroup: `group` is its path ("a/b" lies in "a"). `task` does nothing."""

    group: str = attrs.field(validator=_group)


@attrs.frozen(kw_only=True)
class RemoveGroup(Step):
    """The administrator removes a memory cgroup. `task` does nothing."""

    group: str = attrs.field(validator=_group)


@attrs.frozen(kw_only=True)
class MoveTask(Step):
    """The administrator puts `task` into a memory cgroup, or back where it came from (""); its charges stay."""

    group: str = attrs.field(default="", validator=attrs.validators.or_(attrs.validators.in_(("",)), _group))


@attrs.frozen(kw_only=True)
class LimitGroup(Step):
    """The administrator lets a memory cgroup have `pages` pages; 0 for no limit. `task` does nothing.

    A kernel counts slabs, stacks, and what processors have put by: how much goes is another number on each machine.
    """

    group: str = attrs.field(validator=_group)
    pages: int = number(0)


#: Steps by the name that they have in JSON.
STEPS: dict[str, type[Step]] = {
    kind.__name__.lower(): kind
    for kind in (
        Map,
        Unmap,
        Protect,
        Advise,
        Lock,
        Unlock,
        LockAll,
        UnlockAll,
        Brk,
        Msync,
        Mincore,
        Move,
        MovePages,
        Touch,
        Read,
        Write,
        MemfdCreate,
        OpenFile,
        Ftruncate,
        Fallocate,
        Pwrite,
        Pread,
        Lseek,
        Fsync,
        Sync,
        Fadvise,
        ReadAhead,
        DropCaches,
        CloseFd,
        Compact,
        UffdOpen,
        UffdRegister,
        UffdUnregister,
        UffdProtect,
        UffdCopy,
        UffdZeropage,
        UffdContinue,
        UffdPoison,
        UffdMove,
        TouchAnswered,
        UffdWake,
        Fork,
        Exit,
        ClearRefs,
        MarkIdle,
        ReadIdle,
        Scan,
        PagemapRead,
        QueryMaps,
        KsmScan,
        KsmUnmerge,
        MakeGroup,
        RemoveGroup,
        MoveTask,
        LimitGroup,
    )
}
