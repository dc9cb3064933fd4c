"""The userfaultfd ioctls that fill holes: UFFDIO_COPY, ZEROPAGE, CONTINUE, POISON; and UFFDIO_WAKE.

Each goes on page by page until one cannot be filled: what is done by then stays, and the call says EAGAIN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.calls.uffd_common import context_of, range_of
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import NoMemory
from pmcore.backends.sim.services import pagecache, shmem
from pmcore.backends.sim.services.userfaultfd import Userfaultfd
from pmcore.backends.sim.virtual import fault, hugetlb, mapping
from pmcore.backends.sim.virtual.pte import (
    DIRTY,
    FIELD,
    LEAF,
    POISON_MARKER,
    PRESENT,
    SPECIAL,
    UFFD_WP,
    WRITE,
    YOUNG,
    is_marker,
)
from pmcore.backends.sim.virtual.vma import VmArea, VmFlag
from pmcore.errors import AddressSpaceFault
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.contents import Rows
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["continue_", "copy", "poison", "wake", "zeropage"]

_DONTWAKE, _WP = 1, 2
#: Up to so many pages one by one.
_FEW = 6
#: Pages done from an address on (of those up to another), and what stopped it.
_Filled = tuple[int, Errno | None]
_Fill = Callable[["Core", "AddressSpace", VmArea, int, int], _Filled]


def wake(core: Core, mm: AddressSpace, fd: int, start: int, length: int) -> None:
    """UFFDIO_WAKE: nobody waits on a simulated machine."""
    call = f"UFFDIO_WAKE({start:#x}, {length:#x})"
    context_of(mm, fd, call)
    range_of(core, call, start, length)


def copy(core: Core, mm: AddressSpace, fd: int, start: int, source: int, length: int, mode: int) -> int:
    """UFFDIO_COPY: pages with what `source` of the calling task holds; the bytes that were filled."""
    call = f"UFFDIO_COPY({start:#x}, {source:#x}, {length:#x}, mode {mode:#x})"
    context = context_of(mm, fd, call)
    range_of(core, call, source, length, aligned=False)
    range_of(core, call, start, length)
    if mode & ~(_DONTWAKE | _WP) or (mode & _WP and not core.caps.uffd_wp):
        refuse(Errno.EINVAL, call)

    def fill(core: Core, watched: AddressSpace, vma: VmArea, addr: int, stop: int) -> _Filled:
        many = _copy_many(core, watched, vma, addr, stop, mm, source + addr - start, mode)
        if many:
            return many, None
        return _copy_one(core, watched, vma, addr, mm, source + addr - start, mode)

    def fill_huge(core: Core, watched: AddressSpace, vma: VmArea, addr: int) -> Errno | None:
        return _copy_huge(core, watched, vma, addr, mm, source + addr - start, mode)

    return _fill(core, context, call, start, length, mode, fill, fill_huge)


def zeropage(core: Core, mm: AddressSpace, fd: int, start: int, length: int, mode: int) -> int:
    """UFFDIO_ZEROPAGE: the zero page, in shared memory pages of zeros; the bytes that were filled."""
    call = f"UFFDIO_ZEROPAGE({start:#x}, {length:#x}, mode {mode:#x})"
    context = context_of(mm, fd, call)
    range_of(core, call, start, length)
    if mode & ~_DONTWAKE:
        refuse(Errno.EINVAL, call)
    return _fill(core, context, call, start, length, 0, _zero, None)


def continue_(core: Core, mm: AddressSpace, fd: int, start: int, length: int, mode: int) -> int:
    """UFFDIO_CONTINUE: the pages that the file has already; the bytes that were filled."""
    call = f"UFFDIO_CONTINUE({start:#x}, {length:#x}, mode {mode:#x})"
    if not core.caps.uffd_minor:
        refuse(Errno.EINVAL, call, "this kernel does not know it")
    context = context_of(mm, fd, call)
    range_of(core, call, start, length)
    if mode & ~(_DONTWAKE | (_WP if core.caps.uffd_continue_wp else 0)):
        refuse(Errno.EINVAL, call)

    def fill(core: Core, watched: AddressSpace, vma: VmArea, addr: int, stop: int) -> _Filled:
        many = _continue_many(core, watched, vma, addr, stop, mode)
        if many:
            return many, None
        return _continue_one(core, watched, vma, addr, mode)

    def fill_huge(core: Core, watched: AddressSpace, vma: VmArea, addr: int) -> Errno | None:
        return _continue_huge(core, watched, vma, addr, mode)

    return _fill(core, context, call, start, length, mode, fill, fill_huge)


def poison(core: Core, mm: AddressSpace, fd: int, start: int, length: int, mode: int) -> int:
    """UFFDIO_POISON: markers on which each access is SIGBUS; the bytes that were filled."""
    call = f"UFFDIO_POISON({start:#x}, {length:#x}, mode {mode:#x})"
    context = context_of(mm, fd, call)
    if not core.caps.uffd_poison:
        refuse(Errno.EINVAL, call, "this kernel does not know it")
    range_of(core, call, start, length)
    if mode & ~_DONTWAKE:
        refuse(Errno.EINVAL, call)
    return _fill(core, context, call, start, length, 0, _poison, _poison_huge)


# -- the walk --------------------------------------------------------------------------------------------


def _fill(
    core: Core,
    context: Userfaultfd,
    call: str,
    start: int,
    length: int,
    mode: int,
    fill: _Fill,
    fill_huge: Callable[[Core, AddressSpace, VmArea, int], Errno | None] | None,
) -> int:
    mm, end = context.mm, start + length
    if not mm.alive:
        refuse(Errno.ESRCH, call, "the process that it watched is gone")
    vma = mm.vmas.at(start)
    if vma is None:
        refuse(Errno.ENOENT, call, "nothing is mapped there")
    if not vma.flags & VmFlag.SHARED:
        _prepare(core, mm, vma)
    if end > vma.end or vma.uffd is None:
        refuse(Errno.ENOENT, call, "not inside one mapping that is registered")
    if mode & _WP and not vma.flags & VmFlag.UFFD_WP:
        refuse(Errno.EINVAL, call, "not registered for write protection")
    if vma.huge is not None:
        size = hugetlb.page_size(vma)
        if fill_huge is None or (start | length) & size - 1:
            refuse(Errno.EINVAL, call, "the zero page, or a part of a hugetlb page")
        position, errno = _each_huge(core, mm, vma, start, end, fill_huge)
    else:
        if vma.file is not None and vma.file.on_disk:
            refuse(Errno.EINVAL, call, "a file on a disk")
        if fill_huge is not None and vma.file is None and call.startswith("UFFDIO_CONTINUE"):
            refuse(Errno.EINVAL, call, "anonymous memory has no file that would have a page")
        position, errno = _each(core, mm, vma, start, end, fill)
    return outcome(call, position - start, length, errno)


def outcome(call: str, done: int, length: int, errno: Errno | None) -> int:
    """What the call says when so many bytes of `length` are done."""
    if not done:
        assert errno is not None
        refuse(errno, call)
    if done < length:
        refuse(Errno.EAGAIN, call, f"{done:#x} bytes are done")
    return done


def _prepare(core: Core, mm: AddressSpace, vma: VmArea) -> None:
    if vma.huge is not None:
        hugetlb.prepare(core, vma)
    else:
        mm.prepare_anon(vma)


def _each(
    core: Core, mm: AddressSpace, vma: VmArea, start: int, end: int, fill: _Fill
) -> tuple[int, Errno | None]:
    """Fill page after page, table by table; where it stopped, and why."""
    size, position = core.geometry.pmd_size, start
    while position < end:
        try:
            slot = mm.tables.pmd_slot(position)
            if slot >= 0 and core.pool.at[slot] & LEAF:
                return position, Errno.EEXIST
            mm.tables.make_pte_slot(position)
            done, errno = fill(core, mm, vma, position, min(end, (position & -size) + size))
        except NoMemory:
            if not core.relieve(1):
                return position, Errno.ENOMEM
            continue
        position += done << core.geometry.page_shift
        if errno is not None:
            return position, errno
    return position, None


def _each_huge(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    start: int,
    end: int,
    fill: Callable[[Core, AddressSpace, VmArea, int], Errno | None],
) -> tuple[int, Errno | None]:
    for addr in range(start, end, hugetlb.page_size(vma)):
        errno = fill(core, mm, vma, addr)
        if errno is not None:
            return addr, errno
    return end, None


def _entry(core: Core, pfn: int, mode: int, *, writable: bool) -> int:
    """The entry of a page that was filled in: it counts as written."""
    entry = pfn | PRESENT | YOUNG | DIRTY | core.soft_dirty
    if mode & _WP:
        return entry | UFFD_WP
    return entry | WRITE if writable else entry


def _over_size(core: Core, vma: VmArea, addr: int) -> bool:
    """Whether the address lies behind the end of the file."""
    size = core.geometry.page_size
    return vma.file is not None and _page(core, vma, addr) * size >= vma.file.size


def _page(core: Core, vma: VmArea, addr: int) -> int:
    return vma.pgoff + (addr - vma.start >> core.geometry.page_shift)


# -- one page, or one table's ----------------------------------------------------------------------------


def _source(core: Core, caller: AddressSpace, source: int) -> int:
    """Contents of a page like what the calling task has at `source`. Raises AddressSpaceFault."""
    size, contents, frames = core.geometry.page_size, core.memory.contents, core.memory.frames
    lead = source & size - 1
    row = frames.content_at[fault.access(core, caller, source, write=False)]
    if not lead:
        return contents.copy_one(row)
    data = contents.read(row, lead, size - lead)
    row = frames.content_at[fault.access(core, caller, source + size - lead, write=False)]
    return int(contents.write(0, 0, data + contents.read(row, 0, lead)))


def _give_back(core: Core, row: int) -> None:
    if row:
        core.memory.contents.give_back(np.array([row]))


def _faulted(failed: AddressSpaceFault) -> Errno:
    if failed.signal == "SIGSTOP":  # the caller itself would wait for somebody
        raise failed
    return Errno.EFAULT


def _copy_one(
    core: Core, mm: AddressSpace, vma: VmArea, addr: int, caller: AddressSpace, source: int, mode: int
) -> _Filled:
    try:
        row = _source(core, caller, source)
    except AddressSpaceFault as failed:
        return 0, _faulted(failed)
    mine = core.memory.charging
    core.memory.charging = mm.group if core.memory.grouped else mine  # to who gets the page
    try:
        errno = _place(core, mm, vma, addr, row, mode)
    except NoMemory:
        _give_back(core, row)
        raise
    finally:
        core.memory.charging = mine
    if errno is not None:
        _give_back(core, row)
        return 0, errno
    return 1, None


def _place(core: Core, mm: AddressSpace, vma: VmArea, addr: int, row: int, mode: int) -> Errno | None:
    """A new page that holds `row`, anonymous in private mappings, else the file's."""
    shared, page = bool(vma.flags & VmFlag.SHARED), _page(core, vma, addr)
    if _over_size(core, vma, addr):
        return Errno.EFAULT
    if shared and vma.file is not None and vma.file.index.get(page):
        return Errno.EEXIST
    slot = mm.tables.pte_slot(addr)
    entry = core.pool.at[slot]
    if entry and not is_marker(entry):
        return Errno.EEXIST
    if shared:
        assert vma.file is not None
        pfn = core.memory.page(pagecache.NEW_SHMEM)
        core.memory.on_lru(pfn)
        shmem.insert(core, vma.file, page, pfn)
    else:
        pfn = mapping.take_page(core, vma)
    core.memory.frames.content_at[pfn] = row
    core.memory.frames.mapcount_at[pfn] = 1
    core.pool.at[slot] = _entry(core, pfn, mode, writable=bool(vma.flags & VmFlag.WRITE))
    return None


# -- many pages of one table -------------------------------------------------------------------------------


def _free(core: Core, mm: AddressSpace, vma: VmArea, addr: int, stop: int) -> int:
    """How many pages from `addr` on nothing is mapped at and, in a shared mapping, the file has not."""
    _, count, _ = _empty(core, mm, vma, addr, stop)
    if count and vma.flags & VmFlag.SHARED and vma.file is not None:
        used = vma.file.index.load(_page(core, vma, addr), count) != 0
        count = int(np.argmax(used)) if used.any() else count
    return count


def _place_many(core: Core, mm: AddressSpace, vma: VmArea, addr: int, rows: Rows, mode: int) -> int:
    """`_place` for pages that are `_free`; how many got a frame, the rows of all others are given back."""
    memory, slot = core.memory, mm.tables.pte_slot(addr)
    mine = memory.charging
    memory.charging = mm.group if memory.grouped else mine  # to who gets the page
    try:
        if vma.flags & VmFlag.SHARED:
            pfns = memory.pages(len(rows), pagecache.NEW_SHMEM)
        else:
            locked = mapping.MLOCKED if vma.flags & VmFlag.LOCKED else 0
            pfns = memory.pages(len(rows), mapping.NEW_ANON | ANON_EXCLUSIVE | locked)
    finally:
        memory.charging = mine
    memory.on_lru_pages(pfns)
    if vma.flags & VmFlag.SHARED:
        assert vma.file is not None
        page = _page(core, vma, addr)
        pagecache.add_at(core, vma.file, np.arange(page, page + len(pfns), dtype=np.int64), pfns)
    memory.frames.content[pfns] = rows[: len(pfns)]
    memory.frames.mapcount[pfns] = 1
    memory.contents.give_back(rows[len(pfns) :])
    bits = _entry(core, 0, mode, writable=bool(vma.flags & VmFlag.WRITE))
    core.pool.flat[slot : slot + len(pfns)] = pfns.view(np.uint64) | np.uint64(bits)
    return len(pfns)


def _copy_many(
    core: Core,
    mm: AddressSpace,
    vma: VmArea,
    addr: int,
    stop: int,
    caller: AddressSpace,
    source: int,
    mode: int,
) -> int:
    """`_copy_one` for the pages from `addr` on whose sources are whole pages, and there; 0 if those are few."""
    size = core.geometry.page_size
    if stop - addr <= _FEW * size or source & size - 1:
        return 0
    count = _free(core, mm, vma, addr, stop)
    origin = caller.vmas.at(source)
    if count <= _FEW or origin is None or not origin.flags & VmFlag.ACCESS or origin.flags & VmFlag.HUGETLB:
        return 0
    end = min(origin.end, source + count * size)
    extent = next(iter(caller.tables.extents(source, end)), None)
    if extent is None or extent.huge or extent.start != source:
        return 0
    present = (extent.entries & np.uint64(PRESENT)) != 0
    count = len(present) if present.all() else int(np.argmin(present))
    if count <= _FEW or caller.has_key(origin) or (caller is mm and abs(source - addr) < count * size):
        return 0
    entries = extent.entries[:count]
    entries |= np.uint64(YOUNG)
    rows = core.memory.frames.content[(entries & np.uint64(FIELD)).view(np.int64)]
    return _place_many(core, mm, vma, addr, core.memory.contents.copies(rows), mode)


def _continue_many(core: Core, mm: AddressSpace, vma: VmArea, addr: int, stop: int, mode: int) -> int:
    """`_continue_one` for the pages from `addr` on that the file has in memory; 0 if those are few."""
    slot, count, _ = _empty(core, mm, vma, addr, stop)
    if count <= _FEW or vma.file is None:
        return 0
    words = vma.file.index.load(_page(core, vma, addr), count)
    present = (words & np.uint64(PRESENT)) != 0
    count = count if present.all() else int(np.argmin(present))
    if count <= _FEW:
        return 0
    pfns, frames = (words[:count] & np.uint64(FIELD)).view(np.int64), core.memory.frames
    frames.flags[core.memory.whole_folios(pfns)] |= np.uint64(PageFlag.UPTODATE)
    mapping.add_pages(core, mm, pfns)
    wanted = VmFlag.SHARED | VmFlag.WRITE
    bits = _entry(core, 0, mode, writable=vma.flags & wanted == wanted)
    core.pool.flat[slot : slot + count] = pfns.view(np.uint64) | np.uint64(bits)
    return count


def _empty(core: Core, mm: AddressSpace, vma: VmArea, addr: int, stop: int) -> tuple[int, int, Errno | None]:
    """Where the entries from `addr` on are, how many are empty and inside the file, and what stops them."""
    slot, shift = mm.tables.pte_slot(addr), core.geometry.page_shift
    count, errno = stop - addr >> shift, None
    if vma.file is not None:
        size = core.geometry.page_size
        left = (vma.file.size + size - 1 >> shift) - _page(core, vma, addr)
        if left < count:
            count, errno = max(left, 0), Errno.EFAULT
    used = np.flatnonzero(core.pool.flat[slot : slot + count])
    if len(used):
        count, errno = int(used[0]), Errno.EEXIST
    return slot, count, errno


def _zero(core: Core, mm: AddressSpace, vma: VmArea, addr: int, stop: int) -> _Filled:
    if vma.flags & VmFlag.SHARED:
        many = _free(core, mm, vma, addr, stop)
        many = _place_many(core, mm, vma, addr, np.zeros(many, dtype=np.int32), 0) if many > _FEW else 0
        if many:
            return many, None
        errno = _place(core, mm, vma, addr, 0, 0)
        return (0, errno) if errno is not None else (1, None)
    slot, count, errno = _empty(core, mm, vma, addr, stop)
    core.pool.flat[slot : slot + count] = core.zero_pfn | PRESENT | SPECIAL | YOUNG
    return count, errno


def _poison(core: Core, mm: AddressSpace, vma: VmArea, addr: int, stop: int) -> _Filled:
    slot, count, errno = _empty(core, mm, vma, addr, stop)
    core.pool.flat[slot : slot + count] = POISON_MARKER
    return count, errno


def _continue_one(core: Core, mm: AddressSpace, vma: VmArea, addr: int, mode: int) -> _Filled:
    assert vma.file is not None
    page = _page(core, vma, addr)
    if _over_size(core, vma, addr):
        return 0, Errno.EINVAL
    if not vma.file.index.get(page):
        return 0, Errno.EFAULT
    pfn = shmem.get_page(core, vma.file, page)
    if core.memory.frames.flags_at[pfn] & int(PageFlag.HWPOISON):
        return 0, Errno.EIO
    slot = mm.tables.pte_slot(addr)
    entry = core.pool.at[slot]
    if entry and not is_marker(entry):
        return 0, Errno.EEXIST
    mapping.add_page(core, mm, pfn)
    wanted = VmFlag.SHARED | VmFlag.WRITE
    core.pool.at[slot] = _entry(core, pfn, mode, writable=vma.flags & wanted == wanted)
    return 1, None


# -- hugetlb ---------------------------------------------------------------------------------------------


def _huge_slot(core: Core, mm: AddressSpace, vma: VmArea, addr: int) -> tuple[int, bool]:
    """Where the entry of a huge page is, and whether there is none, or a marker."""
    assert vma.huge is not None
    slot = mm.tables.leaf_slot(addr, vma.huge.file.pool.level, make=True)
    return slot, not core.pool.at[slot] & PRESENT


def _there(mm: AddressSpace, start: int, end: int) -> bool:
    """Whether all of the range can be read without a fault."""
    position = start
    for extent in mm.tables.extents(start, end):
        if extent.start > position or not (extent.entries & np.uint64(PRESENT)).all():
            return False
        position = extent.end
    return position >= end


def _copy_huge(
    core: Core, mm: AddressSpace, vma: VmArea, addr: int, caller: AddressSpace, source: int, mode: int
) -> Errno | None:
    assert vma.huge is not None
    file, index, small = vma.huge.file, hugetlb.index_of(vma, addr), core.geometry.page_size
    slot, free = _huge_slot(core, mm, vma, addr)
    if not free or (vma.shared and index in file.pages):
        return Errno.EEXIST
    promised = not core.hugetlb.needs_page(vma, index)
    head = core.hugetlb.take(vma, index)
    if head < 0:
        # The newer kernel takes the entry, empty as it is, for one that came meanwhile.
        return Errno.EEXIST if core.caps.uffd_hugetlb_exhausted_exists else Errno.ENOMEM
    errno, borrowed = None, -1
    rows: list[int] = []
    if not _there(caller, source, source + file.pool.size):
        # What has to be faulted in is copied into another page, while the first is given back.
        core.hugetlb.untake(vma, index, head, promised=promised)
        head, borrowed = -1, core.hugetlb.borrow(file.pool)
    try:
        rows += (_source(core, caller, source + number * small) for number in range(file.pool.pages))
    except AddressSpaceFault as failed:
        errno = _faulted(failed)
    slot, free = _huge_slot(core, mm, vma, addr)
    if errno is None and (not free or (vma.shared and index in file.pages)):
        errno = Errno.EEXIST  # reading the source has filled it
    if errno is None and head < 0:
        head = core.hugetlb.take(vma, index)
        errno = Errno.ENOMEM if head < 0 else None
    if errno is None and vma.shared and index >= file.length // file.pool.size:
        errno = Errno.EFAULT
    if borrowed >= 0:
        core.hugetlb.give(borrowed)
    if errno is not None:
        core.memory.contents.give_back(np.array(rows, dtype=np.int32))
        if head >= 0:
            core.hugetlb.untake(vma, index, head, promised=promised)
        return errno
    core.memory.frames.content[head : head + file.pool.pages] = rows
    if vma.shared:
        core.hugetlb.add_to_file(file, index, head)
    else:
        core.hugetlb.anonymous(head)
    core.hugetlb.map(head)
    core.pool.at[slot] = LEAF | _entry(core, head, mode, writable=bool(vma.flags & VmFlag.WRITE))
    return None


def _continue_huge(core: Core, mm: AddressSpace, vma: VmArea, addr: int, mode: int) -> Errno | None:
    assert vma.huge is not None
    head = vma.huge.file.pages.get(hugetlb.index_of(vma, addr))
    slot, free = _huge_slot(core, mm, vma, addr)
    if head is None:
        return Errno.EFAULT
    if not free:
        return Errno.EEXIST
    core.hugetlb.map(head)
    writable = vma.shared and bool(vma.flags & VmFlag.WRITE)
    core.pool.at[slot] = LEAF | _entry(core, head, mode, writable=writable)
    return None


def _poison_huge(core: Core, mm: AddressSpace, vma: VmArea, addr: int) -> Errno | None:
    slot, _ = _huge_slot(core, mm, vma, addr)
    if core.pool.at[slot]:
        return Errno.EEXIST
    core.pool.at[slot] = hugetlb.HUGE_POISON
    return None
