"""PROCMAP_QUERY: the structure that asks maps for one VMA, and the answer that a kernel gives from its VMAs."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence

import attrs

from pmcore.errors import syscall_error
from pmcore.uapi import ProcmapFlag
from pmcore.vma import Vma

__all__ = ["QUERY", "QUERY_BYTES", "MapAnswer", "MapQuery", "answer"]

#: struct procmap_query: size, flags, address; start, end, flags, page size, offset, inode; major, minor, room for the
#: name and for the build id; where those two go.
QUERY = struct.Struct("=9Q4L2Q")
QUERY_BYTES = QUERY.size
#: Through query_addr: what a structure must have at the least. The most that it may have, and the longest name.
_LEAST, _MOST, _PATH_MAX = 24, 4096, 4096
_KNOWN = 0x3F
_CALL = "ioctl(PROCMAP_QUERY)"


@attrs.frozen(kw_only=True)
class MapQuery:
    """What is asked: the VMA that covers `address`, or as `flags` say. `name_room` and `build_id_room` in bytes."""

    address: int
    flags: ProcmapFlag | int = 0
    name_room: int = 0
    build_id_room: int = 0
    #: Bytes of the structure that the caller says it knows.
    size: int = QUERY_BYTES

    def packed(self, *, name_at: int = 0, build_id_at: int = 0) -> bytes:
        """The structure, with the places where name and build id are to go."""
        rooms = (self.name_room, self.build_id_room)
        head = (self.size, int(self.flags), self.address)
        return QUERY.pack(*head, *(0,) * 6, 0, 0, *rooms, name_at, build_id_at)


@attrs.frozen(kw_only=True)
class MapAnswer:
    """What the kernel filled in; `name_size` counts the NUL, and is 0 where there is no name, or none was wanted."""

    start: int
    end: int
    permissions: int
    page_size: int
    offset: int
    inode: int
    dev_major: int
    dev_minor: int
    name_size: int
    build_id_size: int
    #: The name as the kernel wrote it, without its NUL.
    name: bytes = b""

    @classmethod
    def unpacked(cls, argument: bytes | bytearray, name: bytes = b"") -> MapAnswer:
        """From the structure after the call, and what was written where the name goes.

        What lies behind the size that the structure says is the caller's, not answered: 0 here.
        """
        argument = bytes(argument[: int.from_bytes(argument[:8], "little")]).ljust(QUERY_BYTES, b"\0")
        _, _, _, start, end, flags, page, offset, inode, major, minor, length, build_id, _, _ = QUERY.unpack(
            argument[:QUERY_BYTES]
        )
        return cls(
            start=start,
            end=end,
            permissions=flags,
            page_size=page,
            offset=offset,
            inode=inode,
            dev_major=major,
            dev_minor=minor,
            name_size=length,
            build_id_size=build_id,
            name=name[: max(length - 1, 0)],
        )

    def vma(self) -> Vma:
        """The same as a line of maps would give it."""
        return Vma(
            start=self.start,
            end=self.end,
            readable=bool(self.permissions & ProcmapFlag.VMA_READABLE),
            writable=bool(self.permissions & ProcmapFlag.VMA_WRITABLE),
            executable=bool(self.permissions & ProcmapFlag.VMA_EXECUTABLE),
            shared=bool(self.permissions & ProcmapFlag.VMA_SHARED),
            offset=self.offset,
            dev_major=self.dev_major,
            dev_minor=self.dev_minor,
            inode=self.inode,
            name=self.name.replace(b"\n", b"\\012").decode("utf-8", "surrogateescape"),
        )


def answer(
    argument: bytearray,
    vmas: Sequence[Vma],
    page_size: Callable[[Vma], int],
    write: Callable[[int, bytes], None],
) -> None:
    """Fill in the structure in `argument` from the VMAs of user addresses, as the kernel does (rules AC-013 to AC-016).

    `page_size` tells a VMA's, `write` puts the name where the caller has room for it. Raises the kernel's refusal;
    `argument` is as it was then. Build ids are told as not there: no machine behind this has the files.
    """
    if len(argument) < 8:
        raise syscall_error(errno.EFAULT, _CALL)
    size = int.from_bytes(argument[:8], "little")
    if size > _MOST:
        raise syscall_error(errno.E2BIG, _CALL)
    if size < _LEAST:
        raise syscall_error(errno.EINVAL, _CALL)
    if len(argument) < min(size, QUERY_BYTES):
        raise syscall_error(errno.EFAULT, _CALL)
    # A caller of an older header gives less, the rest counts as zero; one of a newer header must give zeros behind.
    if any(argument[QUERY_BYTES:size]):
        raise syscall_error(errno.E2BIG, _CALL)
    whole = bytes(argument[: min(size, QUERY_BYTES)]).ljust(QUERY_BYTES, b"\0")
    _, flags, address, *_, room, build_id, name_at, build_id_at = QUERY.unpack(whole)
    if flags & ~_KNOWN or bool(room) != bool(name_at) or bool(build_id) != bool(build_id_at):
        raise syscall_error(errno.EINVAL, _CALL)
    vma = _matching(vmas, address, flags)
    if vma is None:
        raise syscall_error(errno.ENOENT, _CALL)
    name = vma.name_bytes.replace(b"\\012", b"\n") + b"\0" if vma.name else b""
    if room and len(name) > min(room, _PATH_MAX):
        raise syscall_error(errno.ENAMETOOLONG, _CALL)
    page = page_size(vma)
    if room and name:
        write(name_at, name)
    # Without a file there is no offset, whatever maps says of it.
    where = (vma.offset, vma.inode, vma.dev_major, vma.dev_minor) if vma.inode else (0, 0, 0, 0)
    filled = QUERY.pack(
        *(size, flags, address, vma.start, vma.end, _permissions(vma), page, *where),
        *(len(name) if room else 0, 0, name_at, build_id_at),
    )
    argument[: min(size, QUERY_BYTES)] = filled[:size]


def _permissions(vma: Vma) -> int:
    found = ProcmapFlag(0)
    for bit, there in (
        (ProcmapFlag.VMA_READABLE, vma.readable),
        (ProcmapFlag.VMA_WRITABLE, vma.writable),
        (ProcmapFlag.VMA_EXECUTABLE, vma.executable),
        (ProcmapFlag.VMA_SHARED, vma.shared),
    ):
        found |= bit if there else 0
    return int(found)


def _matching(vmas: Sequence[Vma], address: int, flags: int) -> Vma | None:
    further = flags & ProcmapFlag.COVERING_OR_NEXT_VMA
    wanted = flags & ~(ProcmapFlag.COVERING_OR_NEXT_VMA | ProcmapFlag.FILE_BACKED_VMA)
    for vma in vmas:
        if vma.end <= address:
            continue
        if vma.start > address and not further:
            return None
        on_file = bool(vma.inode) or not flags & ProcmapFlag.FILE_BACKED_VMA
        if on_file and _permissions(vma) & wanted == wanted:
            return vma
        if not further:
            return None
    return None
