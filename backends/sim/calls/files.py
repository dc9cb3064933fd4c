"""System calls on descriptors of files: open, ftruncate, fallocate, pread, pwrite, lseek, fsync, close, ...."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls import hugefiles, uffd
from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.services import diskfile, filesystem, pagecache, readahead, writeback
from pmcore.backends.sim.services.hugetlb import HugeFile
from pmcore.backends.sim.services.pagecache import FileSystem, Inode, OpenFile
from pmcore.errors import NotModelled
from pmcore.uapi import Errno

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.task import SimTask
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = [
    "close",
    "fadvise",
    "fallocate",
    "fsync",
    "ftruncate",
    "install",
    "lseek",
    "memfd_create",
    "open_file",
    "opened",
    "pread",
    "pwrite",
    "sync",
]

_MFD_CLOEXEC, _MFD_SEALING, _MFD_HUGETLB, _MFD_NOEXEC, _MFD_EXEC = 1, 2, 4, 8, 16
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
#: posix_fadvise's advice.
_RANDOM, _SEQUENTIAL, _WILLNEED, _DONTNEED, _NOREUSE = 1, 2, 3, 4, 5
_SEEK_SET, _SEEK_CUR, _SEEK_END, _SEEK_DATA, _SEEK_HOLE = range(5)
#: The greatest size of a file.
_MAX = (1 << 63) - 1


def install(mm: AddressSpace, file: object) -> int:
    """The lowest free descriptor, which stands for the file from here on."""
    fd = next(number for number in range(3, 1 << 20) if number not in mm.files)
    mm.files[fd] = file
    return fd


def memfd_create(core: Core, mm: AddressSpace, name: str, flags: int) -> int:
    """memfd_create(2); the descriptor."""
    flags &= (1 << 32) - 1  # an unsigned int
    call = f"memfd_create({name!r}, {flags:#x})"
    known = _MFD_CLOEXEC | _MFD_SEALING | _MFD_HUGETLB | _MFD_NOEXEC | _MFD_EXEC
    if flags & _MFD_HUGETLB:
        known |= 0x3F << 26
    if flags & ~known or flags & (_MFD_NOEXEC | _MFD_EXEC) == _MFD_NOEXEC | _MFD_EXEC:
        refuse(Errno.EINVAL, call)
    if len(name.encode()) > 249:
        refuse(Errno.EINVAL, call, "names have up to 249 bytes")
    if flags & _MFD_HUGETLB:
        return install(mm, hugefiles.create(core, call, name, flags))
    return install(mm, OpenFile(pagecache.make(core, FileSystem.SHMEM, f"/memfd:{name} (deleted)", 0)))


def opened(mm: AddressSpace, fd: int, call: str, otherwise: Errno) -> OpenFile:
    """The open file behind a descriptor: EBADF for none, `otherwise` for a descriptor of another sort."""
    file = mm.files.get(fd)
    if file is None:
        refuse(Errno.EBADF, call)
    if not isinstance(file, OpenFile):
        refuse(otherwise, call, "that descriptor is no file's")
    return file


def ftruncate(core: Core, mm: AddressSpace, fd: int, length: int) -> None:
    """ftruncate(2)."""
    call = f"ftruncate({fd}, {length})"
    if length < 0 or length > _MAX:
        refuse(Errno.EINVAL, call)
    huge = mm.files.get(fd)
    if isinstance(huge, HugeFile):
        hugefiles.truncate(core, huge, call, length)
        return
    inode = opened(mm, fd, call, Errno.EINVAL).inode
    if inode.on_disk and length > diskfile.MAX_SIZE:
        refuse(Errno.EFBIG, call)
    filesystem.truncate(core, inode, length)


def fallocate(core: Core, mm: AddressSpace, fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): set pages aside, or punch a hole (mode 3)."""
    call = f"fallocate({fd}, {mode:#x}, {offset}, {length})"
    if fd not in mm.files:
        refuse(Errno.EBADF, call)
    if offset < 0 or length <= 0 or offset > _MAX or length > _MAX:
        refuse(Errno.EINVAL, call)
    if mode & ~0x7F or (mode & _PUNCH_HOLE and not mode & _KEEP_SIZE):
        refuse(Errno.EOPNOTSUPP, call)
    if mode & _PUNCH_HOLE and mode & ~(_PUNCH_HOLE | _KEEP_SIZE):
        refuse(Errno.EOPNOTSUPP, call)
    huge = mm.files.get(fd)
    if isinstance(huge, HugeFile):
        if offset + length > _MAX:
            refuse(Errno.EFBIG, call)
        if mode & ~(_PUNCH_HOLE | _KEEP_SIZE):
            refuse(Errno.EOPNOTSUPP, call)
        punch, keep_size = bool(mode & _PUNCH_HOLE), bool(mode & _KEEP_SIZE)
        hugefiles.fallocate(core, huge, call, offset, length, punch=punch, keep_size=keep_size)
        return
    inode = opened(mm, fd, call, Errno.ENODEV).inode
    if offset + length > (diskfile.MAX_SIZE if inode.on_disk else _MAX):
        refuse(Errno.EFBIG, call)
    if inode.on_disk and mode & ~(_PUNCH_HOLE | _KEEP_SIZE) in (8, 16, 32):
        raise NotModelled("fallocate that moves or zeroes blocks", remedy="punch a hole instead")
    if mode & ~(_PUNCH_HOLE | _KEEP_SIZE):
        refuse(Errno.EOPNOTSUPP, call)
    if mode & _PUNCH_HOLE:
        filesystem.punch_hole(core, inode, offset, length)
        return
    if not inode.on_disk and core.memory.managed < -(-length // core.geometry.page_size):
        refuse(Errno.ENOSPC, call, "more than all of memory")
    filesystem.fallocate(core, inode, offset, length, keep_size=bool(mode & _KEEP_SIZE))


def pread(core: Core, mm: AddressSpace, fd: int, length: int, offset: int) -> bytes:
    """pread(2)."""
    call = f"pread({fd}, {length}, {offset})"
    if offset < 0 or length < 0 or offset > _MAX:
        refuse(Errno.EINVAL, call)
    file = mm.files.get(fd)
    if isinstance(file, HugeFile):
        return hugefiles.pread(core, file, length, offset)
    if file is not None and not isinstance(file, OpenFile):
        raise NotModelled("reading a userfaultfd")
    found = filesystem.pread(core, opened(mm, fd, call, Errno.EINVAL), length, offset)
    if found is None:
        refuse(Errno.EIO, call, "the page is poisoned")
    return found


def pwrite(core: Core, mm: AddressSpace, fd: int, data: bytes, offset: int) -> int:
    """pwrite(2); the number of bytes written."""
    call = f"pwrite({fd}, {len(data)} bytes, {offset})"
    if offset < 0 or offset > _MAX:
        refuse(Errno.EINVAL, call)
    inode = opened(mm, fd, call, Errno.EINVAL).inode
    if data and offset + len(data) > _MAX:
        refuse(Errno.EFBIG, call)
    if inode.on_disk and data and offset + len(data) > diskfile.MAX_SIZE:
        if offset >= diskfile.MAX_SIZE:
            refuse(Errno.EFBIG, call)
        data = data[: diskfile.MAX_SIZE - offset]
    done = filesystem.pwrite(core, inode, data, offset)
    if data and not done:
        refuse(Errno.EIO, call, "the page is poisoned")
    return done


def lseek(core: Core, mm: AddressSpace, fd: int, offset: int, whence: int) -> int:
    """lseek(2) to data or a hole; the place it finds."""
    call = f"lseek({fd}, {offset}, {whence})"
    file = mm.files.get(fd)
    if file is None:
        refuse(Errno.EBADF, call)
    if isinstance(file, HugeFile):
        return hugefiles.lseek(file, call, offset, whence)
    if not isinstance(file, OpenFile):
        refuse(Errno.ESPIPE, call)
    inode = file.inode
    if whence in (_SEEK_SET, _SEEK_END):
        place = offset + (inode.size if whence == _SEEK_END else 0)
        if not 0 <= place <= _MAX:
            refuse(Errno.EINVAL, call)
        return place
    if whence == _SEEK_CUR:
        raise NotModelled("the position of a descriptor", remedy="name places by SEEK_SET")
    if whence not in (_SEEK_DATA, _SEEK_HOLE):
        refuse(Errno.EINVAL, call)
    if offset < 0 or offset >= inode.size:
        refuse(Errno.EINVAL if offset < 0 else Errno.ENXIO, call, "behind the end of the file")
    size = core.geometry.page_size
    first, end = offset // size, -(-inode.size // size)
    pages = (inode.blocks if inode.on_disk else inode.index).used(first, end)[0]
    pages = pages[filesystem.data_pages(core, inode, pages)]
    if whence == _SEEK_DATA:
        if not len(pages):
            refuse(Errno.ENXIO, call, "no data from there on")
        return max(offset, int(pages[0]) * size)
    expected = np.arange(first, first + len(pages))
    gaps = np.flatnonzero(pages != expected)
    hole = first + (int(gaps[0]) if len(gaps) else len(pages))
    return min(max(offset, hole * size), inode.size)


def fsync(core: Core, mm: AddressSpace, fd: int) -> None:
    """fsync(2): write out what is dirty; shmem has nowhere to write to."""
    if isinstance(mm.files.get(fd), HugeFile):
        return
    writeback.write_out(core, opened(mm, fd, f"fsync({fd})", Errno.EINVAL).inode)


def sync(core: Core, mm: AddressSpace) -> None:
    """sync(2)."""
    writeback.sync(core)


def fadvise(core: Core, mm: AddressSpace, fd: int, offset: int, length: int, advice: int) -> None:
    """posix_fadvise(2): 3 reads a range ahead, 4 drops what of it is clean and unmapped."""
    call, size = f"posix_fadvise({fd}, {offset}, {length}, {advice})", core.geometry.page_size
    if isinstance(mm.files.get(fd), HugeFile):
        if length < 0 or not 0 <= advice <= 5:
            refuse(Errno.EINVAL, call)
        return
    if fd in mm.files and not isinstance(mm.files[fd], OpenFile):
        raise NotModelled("posix_fadvise of a userfaultfd")
    file = opened(mm, fd, call, Errno.EINVAL)
    inode = file.inode
    if length < 0 or not 0 <= advice <= 5:
        refuse(Errno.EINVAL, call)
    if not inode.on_disk:
        return
    if offset < 0:
        raise NotModelled("posix_fadvise before the start of a file")
    last = offset + length - 1 if length else _MAX
    if advice == _WILLNEED:
        end = min(last, inode.size) // size + 1
        readahead.force(core, inode, offset // size, end, pages_ahead=file.pages_ahead)
    elif advice == _DONTNEED:
        _dontneed(core, inode, offset, last)
    elif advice == _NOREUSE:
        raise NotModelled("POSIX_FADV_NOREUSE")
    elif advice == _RANDOM:
        file.random = True
    else:
        file.pages_ahead = core.pages_ahead << (advice == _SEQUENTIAL)
        file.random = file.random and advice == _SEQUENTIAL


def _dontneed(core: Core, inode: Inode, offset: int, last: int) -> None:
    """What is dirty is written, and stays; the rest goes, the last page only if the range or the file ends with it.

    Files in memory are left as they are.
    """
    if not inode.on_disk:
        return
    size = core.geometry.page_size
    first, end = -(-offset // size), last // size
    written = writeback.dirty_pages(core, inode, offset // size, end + 1)
    writeback.write_out(core, inode, offset // size, end + 1)
    if (last + 1) % size and last not in (inode.size - 1, _MAX):
        end -= 1
    if first <= end:
        writeback.invalidate(core, inode, first, end + 1, keep=written)


def open_file(core: Core, mm: AddressSpace, name: str, pages: int | None) -> int:
    """open(2) of a file of the disk, which is made if it is not there; with `pages` made anew, so many pages long.

    Page i of a new file begins with "NAME:i" and a newline, the rest are zeros; nothing of it is cached.
    """
    size = core.geometry.page_size
    inode = core.inodes[core.names[name]] if name in core.names and pages is None else None
    if inode is None:
        old = core.inodes.get(core.names.pop(name, 0))
        if old is not None:
            pagecache.put(core, old)
        inode = pagecache.make(core, FileSystem.EXT4, f"/disk/{name}", (pages or 0) * size)
        core.names[name] = inode.number
        contents = core.memory.contents
        rows = contents.take(pages or 0)
        for page, row in enumerate(rows.tolist()):
            contents.write(row, 0, f"{name}:{page}\n".encode()[:size])
        diskfile.fill(core, inode, 0, rows)
    return install(mm, OpenFile(inode, pages_ahead=core.pages_ahead))


def close(core: Core, mm: AddressSpace, fd: int, tasks: Iterable[SimTask]) -> None:
    """close(2)."""
    file = mm.files.get(fd)
    if file is None:
        refuse(Errno.EBADF, f"close({fd})")
    if isinstance(file, HugeFile):
        hugefiles.close(core, mm, fd)
        return
    if isinstance(file, OpenFile):
        del mm.files[fd]
        pagecache.put(core, file.inode)
        return
    uffd.close(core, mm, fd, tasks)
