"""hugetlb: pools of huge pages set aside, what of them is promised to mappings, and the files that own shared ones.

A page of a pool is free, the page of a file, or anonymous. A mapping without MAP_NORESERVE is promised its pages when
it is made: `Pool.reserved` counts promises that no fault has called in yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import numpy as np

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import HEAD, TAIL, NoMemory
from pmcore.backends.sim.services import migrating
from pmcore.errors import ArgumentError
from pmcore.geometry import parse_size
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["HugeFile", "HugeMap", "Hugetlb", "Pool", "Promise"]

_ALL = (1 << 64) - 1
#: What stays on a page of a pool, whoever had it.
_KEPT = int(PageFlag.HUGE | PageFlag.UPTODATE | PageFlag.DIRTY | PageFlag.REFERENCED) | HEAD | TAIL
_HWPOISON = int(PageFlag.HWPOISON)


@attrs.define(slots=True)
class Pool:
    """All huge pages of one size (the kernel's hstate)."""

    size: int
    order: int
    #: Level of the page table whose entries map such a page: 1 for PMDs, 2 for PUDs.
    level: int
    #: Heads of free pages; the last is taken next.
    free: list[int] = attrs.field(factory=list)
    total: int = 0
    reserved: int = 0
    #: Of `total`, what goes back to the buddy allocator as soon as nobody has it.
    surplus: int = 0
    #: Surplus pages allowed (nr_overcommit_hugepages).
    overcommit: int = 0

    @property
    def pages(self) -> int:
        """Small pages in a huge one."""
        return 1 << self.order


@attrs.define(slots=True, eq=False)
class Promise:
    """What was promised to the private mapping of one address space: indices in its file that were called in."""

    consumed: set[int] = attrs.field(factory=set)


@attrs.define(slots=True, eq=False)
class HugeFile:
    """An inode of hugetlbfs: every mapping has one, also an anonymous one."""

    pool: Pool
    #: Bytes (i_size).
    length: int
    name: str
    #: Heads of its pages by index.
    pages: dict[int, int] = attrs.field(factory=dict)
    #: Indices whose page is promised, or there.
    reserved: set[int] = attrs.field(factory=set)
    #: VMAs that map it, counted by address space.
    users: dict[AddressSpace, int] = attrs.field(factory=dict)
    inode: int = 0

    def add_user(self, mm: AddressSpace, count: int) -> None:
        """So many VMAs more, or less."""
        self.users[mm] = self.users.get(mm, 0) + count
        if not self.users[mm]:
            del self.users[mm]


@attrs.frozen(eq=False)
class HugeMap:
    """What a hugetlb VMA has beside its flags: its file, and for the private mapping's first owner the promise."""

    file: HugeFile
    promise: Promise | None = None


class Hugetlb:
    """The pools of a machine."""

    def __init__(self, core: Core) -> None:
        self._core = core
        geometry = core.geometry
        orders = [geometry.pmd_order]
        if geometry.levels > 2:
            orders.append(2 * geometry.pmd_order)
        self.pools = {
            geometry.page_size << order: Pool(geometry.page_size << order, order, level)
            for level, order in enumerate(orders, start=1)
        }
        self._later: list[HugeFile] | None = None
        #: Pool by the head of every huge page that there is.
        self.folios: dict[int, Pool] = {}
        #: Heads whose promise holds again, but counts only once they are free (hugetlb_restore_reserve).
        self.restored: set[int] = set()

    @property
    def default(self) -> Pool:
        """The pool of MAP_HUGETLB without a size."""
        return next(iter(self.pools.values()))

    @property
    def used(self) -> bool:
        """Whether anything of hugetlb was ever mapped: what looks at all VMAs of a range asks this first."""
        return "huge_file" in self._core.numbers

    def pool(self, size: int | str) -> Pool:
        """The pool of that page size. Raises ArgumentError."""
        found = self.pools.get(parse_size(size))
        if found is None:
            raise ArgumentError(f"huge pages of {size!r}", remedy=f"sizes in bytes: {list(self.pools)}")
        return found

    # -- what the administrator does -------------------------------------------------------------------

    def resize(self, size: int | str, count: int) -> int:
        """Write nr_hugepages: the pool grows as far as memory allows, and shrinks as pages become free; its size."""
        migrating.still(self._core, "resizing a pool")
        pool = self.pool(size)
        if not isinstance(count, int) or count < 0:
            raise ArgumentError(f"{count!r} huge pages")
        while pool.surplus and count > pool.total - pool.surplus:
            pool.surplus -= 1
        while count > pool.total - pool.surplus:
            head = self._allocate(pool)
            if head < 0:
                return pool.total
            pool.free.append(head)
        least = max(count, pool.reserved + pool.total - len(pool.free))
        while least < pool.total - pool.surplus and pool.free:
            self._dissolve(pool, pool.free.pop())
        pool.surplus += max(0, pool.total - pool.surplus - count)
        return pool.total

    def overcommit(self, size: int | str, count: int) -> None:
        """Write nr_overcommit_hugepages."""
        pool = self.pool(size)
        if not isinstance(count, int) or count < 0:
            raise ArgumentError(f"{count!r} huge pages")
        if pool.level > 1:
            raise ArgumentError("gigantic pages are no surplus", remedy="set their number aside at boot")
        pool.overcommit = count

    def _allocate(self, pool: Pool) -> int:
        """A page from the buddy allocator; -1 where there is none."""
        memory = self._core.memory
        try:
            head = memory.bare_compound(pool.order, int(PageFlag.HUGE))
        except NoMemory:
            return -1
        self.folios[head] = pool
        pool.total += 1
        return head

    def dissolve(self, head: int) -> None:
        """Give a page that is on no list of free ones any more back to the buddy allocator."""
        self._dissolve(self.folios[head], head)

    def _files(self) -> Iterator[HugeFile]:
        """All files, some of them more than once."""
        for mm in self._core.spaces.values():
            yield from (vma.huge.file for vma in mm.vmas if vma.huge is not None)
            yield from (file for file in mm.files.values() if isinstance(file, HugeFile))

    def of_a_file(self, pfn: int) -> bool:
        """Whether a file has the huge page of which this is a small one."""
        head = self._core.memory.frames.head(pfn)
        return any(head in file.pages.values() for file in self._files())

    def moved(self, head: int, target: int) -> None:
        """A page in use has another frame: it is the pool's, and the file's, by that."""
        self.folios[target] = self.folios.pop(head)
        for file in self._files():
            file.pages.update({index: target for index, page in file.pages.items() if page == head})

    def _dissolve(self, pool: Pool, head: int) -> None:
        """Give a page that nobody has back to the buddy allocator."""
        del self.folios[head]
        pool.total -= 1
        self._core.memory.free_compound(head, pool.order)

    # -- promises --------------------------------------------------------------------------------------

    def reserve(self, pool: Pool, count: int) -> bool:
        """Promise pages; False where neither free nor surplus ones suffice (hugetlb_acct_memory)."""
        needed = pool.reserved + count - len(pool.free)
        fresh: list[int] = []
        while len(fresh) < needed:
            head = self._surplus(pool)
            if head < 0:
                for page in fresh:
                    pool.surplus -= 1
                    self._dissolve(pool, page)
                return False
            fresh.append(head)
        pool.free += fresh
        pool.reserved += count
        return True

    def unreserve(self, pool: Pool, count: int) -> None:
        """Take promises back; surplus pages that were kept for them go."""
        pool.reserved -= count
        for _ in range(min(count, pool.surplus)):
            if not pool.free:
                return
            pool.surplus -= 1
            self._dissolve(pool, pool.free.pop())

    def _surplus(self, pool: Pool) -> int:
        if pool.surplus >= pool.overcommit:
            return -1
        head = self._allocate(pool)
        if head >= 0:
            pool.surplus += 1
        return head

    def needs_page(self, vma: VmArea, index: int) -> bool:
        """Whether a fault there has to do without a promise (vma_needs_reservation)."""
        assert vma.huge is not None
        if vma.shared:
            return index not in vma.huge.file.reserved
        return vma.huge.promise is None or index in vma.huge.promise.consumed

    # -- pages -----------------------------------------------------------------------------------------

    def take(self, vma: VmArea, index: int, *, promised: bool = True) -> int:
        """A page for a fault, of zeros; -1 if the pool is exhausted. Without `promised` promises are left alone."""
        assert vma.huge is not None
        pool = vma.huge.file.pool
        head = self._take(pool, promised=promised and not self.needs_page(vma, index))
        if head < 0:
            return -1
        if vma.shared:
            vma.huge.file.reserved.add(index)
        elif vma.huge.promise is not None:
            vma.huge.promise.consumed.add(index)
        return head

    def untake(self, vma: VmArea, index: int, head: int, *, promised: bool) -> None:
        """A page that `take` gave is not needed after all: it and its promise go back (restore_reserve_on_error)."""
        assert vma.huge is not None
        file, promise = vma.huge.file, vma.huge.promise
        if vma.shared:
            if not promised:
                file.reserved.discard(index)
        elif promise is not None and promised:
            promise.consumed.discard(index)
        if promised:
            self.restored.add(head)
        self.give(head)

    def borrow(self, pool: Pool) -> int:
        """A page for a moment, of those that nobody has a promise of; -1 where memory of the buddy allocator does."""
        return self._take(pool, promised=False) if len(pool.free) > pool.reserved else -1

    def take_for_file(self, file: HugeFile, index: int) -> int:
        """A page for the file itself (fallocate), of zeros; -1 if the pool is exhausted."""
        head = self._take(file.pool, promised=index in file.reserved)
        if head >= 0:
            file.reserved.add(index)
        return head

    def _take(self, pool: Pool, *, promised: bool) -> int:
        if pool.free and (promised or len(pool.free) > pool.reserved):
            head = pool.free.pop()
        else:
            head = self._surplus(pool)
            if head < 0:
                return -1
        if promised:
            pool.reserved -= 1
        self._core.memory.frames.set_bits(head, pool.pages, int(PageFlag.UPTODATE))
        return head

    def give(self, head: int) -> None:
        """A page that nobody has any more (free_huge_folio)."""
        pool, frames = self.folios[head], self._core.memory.frames
        part = slice(head, head + pool.pages)
        rows = frames.content[part]
        if rows.any():
            self._core.memory.contents.give_back(rows)
            frames.content[part] = 0
        frames.flags[part] &= np.uint64(_KEPT)
        if head in self.restored:
            self.restored.discard(head)
            pool.reserved += 1
        if pool.surplus:
            pool.surplus -= 1
            self._dissolve(pool, head)
        else:
            pool.free.append(head)

    def copy(self, head: int, source: int) -> None:
        """Contents of one huge page to another."""
        frames, pages = self._core.memory.frames, self.folios[head].pages
        rows = frames.content[source : source + pages]
        if rows.any():
            frames.content[head : head + pages] = self._core.memory.contents.copies(rows)

    def map(self, head: int, change: int = 1) -> int:
        """Count a mapping more, or less; how many there are."""
        frames = self._core.memory.frames
        frames.mapcount[head : head + self.folios[head].pages] += change
        return frames.mapcount_at[head]

    def anonymous(self, head: int) -> None:
        """The page is anonymous from here on, and exclusive: what its first page says of all."""
        frames = self._core.memory.frames
        frames.set_bits(head, self.folios[head].pages, int(PageFlag.ANON))
        frames.flags_at[head] |= ANON_EXCLUSIVE

    def add_to_file(self, file: HugeFile, index: int, head: int) -> None:
        """The page is the file's from here on, and dirty, so that nobody drops it (hugetlb_add_to_page_cache)."""
        file.pages[index] = head
        self._core.memory.frames.set_bits(head, file.pool.pages, int(PageFlag.DIRTY))

    # -- files -----------------------------------------------------------------------------------------

    def forget_pages(self, file: HugeFile, first: int, last: int) -> int:
        """Take the file's pages from index `first` up to `last` out of it; how many there were."""
        gone = sorted(index for index in file.pages if first <= index < last)
        for index in gone:
            head = file.pages.pop(index)
            self._core.memory.frames.clear_bits(
                head, file.pool.pages, int(PageFlag.DIRTY | PageFlag.UPTODATE)
            )
            if not self._core.memory.frames.flags_at[head] & _HWPOISON:
                self.give(head)
                continue
            part = slice(head, head + file.pool.pages)  # nobody's, for good
            self._core.memory.contents.give_back(self._core.memory.frames.content[part])
            self._core.memory.frames.content[part] = 0
        return len(gone)

    def put(self, file: HugeFile) -> None:
        """Somebody refers to the file no more: without any mapping or descriptor left it is gone."""
        if file.users or any(
            descriptor is file for mm in self._core.spaces.values() for descriptor in mm.files.values()
        ):
            return
        if self._later is None:
            self.evict(file)
        else:
            self._later.append(file)

    def evict(self, file: HugeFile) -> None:
        """Nobody maps the file or has it open: its pages and promises are given back."""
        freed = self.forget_pages(file, 0, 1 << 64)
        self.unreserve(file.pool, len(file.reserved) - freed)
        file.reserved.clear()

    def close(self, mm: AddressSpace, vma: VmArea) -> None:
        """A VMA is gone, its entries are empty (hugetlb_vm_op_close)."""
        assert vma.huge is not None
        file, promise = vma.huge.file, vma.huge.promise
        if promise is not None:
            first, last = file_range(vma)
            consumed = sum(1 for index in promise.consumed if first <= index < last)
            self.unreserve(file.pool, last - first - consumed)
        file.add_user(mm, -1)
        self.put(file)

    @contextmanager
    def files_go_later(self) -> Iterator[None]:
        """Files that lose their last mapping meanwhile go at the end: the kernel lets go of them after the call."""
        self._later = []
        try:
            yield
        finally:
            gone, self._later = self._later, None
            for file in gone:
                if not file.users:  # it may have been mapped anew
                    self.evict(file)

    def in_use(self) -> Iterator[int]:
        """Heads of the pages that are not free."""
        free = {head for pool in self.pools.values() for head in pool.free}
        return (head for head in self.folios if head not in free)


def file_range(vma: VmArea) -> tuple[int, int]:
    """Indices in its file that a hugetlb VMA covers."""
    assert vma.huge is not None
    pool = vma.huge.file.pool
    first = vma.pgoff >> pool.order
    return first, first + vma.length // pool.size
