"""System calls on descriptors of hugetlb files (memfd_create with MFD_HUGETLB), with the kernel's checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmcore.backends.sim.calls import hugetlb as hugetlb_call
from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.physical.frames import RAW_HWPOISON
from pmcore.backends.sim.services.hugetlb import HugeFile
from pmcore.backends.sim.virtual import hugetlb
from pmcore.errors import NotModelled
from pmcore.geometry import align_up
from pmcore.uapi import Errno, MapFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["close", "create", "fallocate", "lseek", "mmap", "pread", "truncate"]

_SHARED, _PRIVATE, _VALIDATE = int(MapFlag.SHARED), int(MapFlag.PRIVATE), int(MapFlag.SHARED_VALIDATE)
#: Flags that MAP_SHARED_VALIDATE knows beside those of the enumeration: DENYWRITE, EXECUTABLE, NONBLOCK.
_KNOWN = 0x0800 | 0x1000 | 0x10000
for _flag in MapFlag:
    _KNOWN |= int(_flag)
_KNOWN |= 0x3F << 26


def create(core: Core, call: str, name: str, flags: int) -> HugeFile:
    """A file without pages, of the size of huge pages that the flags name; what its pool has is promised to nobody."""
    if not core.caps.memfd_hugetlb:
        refuse(Errno.EINVAL, call, "this kernel has no memfds of huge pages")
    pool = hugetlb_call.pool_of(core, flags)
    if pool is None:
        refuse(Errno.ENODEV, call, "no huge pages of that size")
    return HugeFile(pool, 0, f"/memfd:{name} (deleted)", inode=core.number("huge_file"))


def mmap(
    core: Core, mm: AddressSpace, file: HugeFile, addr: int, length: int, prot: int, flags: int, offset: int
) -> int:
    """mmap(2) of a hugetlb file: whole huge pages of it; the address."""
    call = f"mmap({addr:#x}, {length:#x}, {prot:#x}, {flags:#x}, huge file, {offset:#x})"
    length = align_up(length, file.pool.size)
    if not length:
        refuse(Errno.EINVAL, call, "no length")
    if flags & 0x0F == _VALIDATE and flags & ~(_KNOWN | 0x0F):
        refuse(Errno.EOPNOTSUPP, call)
    with core.hugetlb.files_go_later():
        return hugetlb_call.map_file(core, mm, call, file, addr, length, prot, flags, offset)


def truncate(core: Core, file: HugeFile, call: str, length: int) -> None:
    """ftruncate(2): pages behind the new end are gone, and so are promises, wherever they are mapped."""
    if length & file.pool.size - 1:
        refuse(Errno.EINVAL, call, "a hugetlb file ends with a whole page")
    file.length = length
    first = length // file.pool.size
    hugetlb.unmap_file(core, file, first, 1 << 62, drop_markers=True)
    freed = core.hugetlb.forget_pages(file, first, 1 << 62)
    promised = {index for index in file.reserved if index >= first}
    file.reserved -= promised
    core.hugetlb.unreserve(file.pool, len(promised) - freed)


def fallocate(
    core: Core, file: HugeFile, call: str, offset: int, length: int, *, punch: bool, keep_size: bool
) -> None:
    """fallocate(2): pages of zeros for the range, as far as the pool has them; or a hole."""
    if punch:
        hugetlb_call.punch(core, file, offset, offset + length)
        return
    size = file.pool.size
    for index in range(offset // size, -(-(offset + length) // size)):
        if index in file.pages:
            continue
        head = core.hugetlb.take_for_file(file, index)
        if head < 0:
            refuse(Errno.ENOSPC, call, "the pool of huge pages is exhausted")
        core.hugetlb.add_to_file(file, index, head)
    if not keep_size:
        file.length = max(file.length, offset + length)


def pread(core: Core, file: HugeFile, length: int, offset: int) -> bytes:
    """pread(2): bytes of the file up to a poisoned small page; holes read as zeros, and stay holes."""
    small, size, frames = core.geometry.page_size, file.pool.size, core.memory.frames
    end, pieces, position = min(offset + length, file.length), [], offset
    while position < end:
        stop = min(end, (position & -small) + small)
        head = file.pages.get(position // size)
        if head is None:
            pieces.append(bytes(stop - position))
        elif frames.flags_at[head + position % size // small] & RAW_HWPOISON:
            if not pieces:
                refuse(Errno.EIO, f"pread({length}, {offset})", "the page is poisoned")
            break
        else:
            row = frames.content_at[head + position % size // small]
            pieces.append(core.memory.contents.read(row, position & small - 1, stop - position))
        position = stop
    return b"".join(pieces)


def lseek(file: HugeFile, call: str, offset: int, whence: int) -> int:
    """lseek(2): SEEK_DATA takes all of the file for data (default_llseek)."""
    set_, current, end, data, hole = range(5)
    if whence == current:
        raise NotModelled("the position of a descriptor", remedy="name places by SEEK_SET")
    if whence in (data, hole):
        if not 0 <= offset < file.length:
            refuse(Errno.ENXIO, call, "behind the end of the file")
        return offset if whence == data else file.length
    if whence not in (set_, end):
        refuse(Errno.EINVAL, call)
    place = offset + (file.length if whence == end else 0)
    if not 0 <= place < 1 << 63:
        refuse(Errno.EINVAL, call)
    return place


def close(core: Core, mm: AddressSpace, fd: int) -> None:
    """close(2): without mapping or descriptor left the file is gone, with its pages."""
    file = mm.files.pop(fd)
    assert isinstance(file, HugeFile)
    core.hugetlb.put(file)
