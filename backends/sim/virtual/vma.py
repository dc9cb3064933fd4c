"""VMAs and the ordered list of them: finding, splitting, merging, and free places between them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from pmcore.backends.sim.services.hugetlb import HugeMap
    from pmcore.backends.sim.services.pagecache import Inode, OpenFile

__all__ = ["AnonVma", "VmArea", "VmFlag", "VmaList"]


class VmFlag:
    """``VM_*``: the kernel's flags of a VMA, as plain numbers."""

    READ, WRITE, EXEC, SHARED = 0x1, 0x2, 0x4, 0x8
    MAYREAD, MAYWRITE, MAYEXEC, MAYSHARE = 0x10, 0x20, 0x40, 0x80
    GROWSDOWN = 0x100
    UFFD_MISSING = 0x200
    PFNMAP = 0x400
    MAYBE_GUARD = 0x800
    UFFD_WP = 0x1000
    LOCKED = 0x2000
    IO = 0x4000
    SEQ_READ, RAND_READ = 0x8000, 0x10000
    DONTCOPY, DONTEXPAND = 0x20000, 0x40000
    LOCKONFAULT = 0x80000
    ACCOUNT, NORESERVE = 0x100000, 0x200000
    HUGETLB = 0x400000
    WIPEONFORK = 0x2000000
    DONTDUMP = 0x4000000
    SOFTDIRTY = 0x8000000
    HUGEPAGE, NOHUGEPAGE = 0x20000000, 0x40000000
    MERGEABLE = 0x80000000
    UFFD_MINOR = 1 << 41
    #: Ours: pages of this private hugetlb mapping were taken for its first owner; missing ones are SIGBUS.
    HUGE_TAKEN = 1 << 62

    ACCESS = READ | WRITE | EXEC
    UFFD = UFFD_MISSING | UFFD_WP | UFFD_MINOR
    #: VM_SPECIAL: never merged, never locked.
    UNUSUAL = IO | PFNMAP | DONTEXPAND
    LOCKS = LOCKED | LOCKONFAULT
    #: No hindrance to merging.
    STICKY = SOFTDIRTY | MAYBE_GUARD
    MAY_ALL = MAYREAD | MAYWRITE | MAYEXEC


#: The two letters of VmFlags in smaps, in the kernel's order.
VM_FLAG_CODES = (
    (VmFlag.READ, "rd"),
    (VmFlag.WRITE, "wr"),
    (VmFlag.EXEC, "ex"),
    (VmFlag.SHARED, "sh"),
    (VmFlag.MAYREAD, "mr"),
    (VmFlag.MAYWRITE, "mw"),
    (VmFlag.MAYEXEC, "me"),
    (VmFlag.MAYSHARE, "ms"),
    (VmFlag.GROWSDOWN, "gd"),
    (VmFlag.UFFD_MISSING, "um"),
    (VmFlag.PFNMAP, "pf"),
    (VmFlag.MAYBE_GUARD, "gu"),
    (VmFlag.UFFD_WP, "uw"),
    (VmFlag.LOCKED, "lo"),
    (VmFlag.IO, "io"),
    (VmFlag.SEQ_READ, "sr"),
    (VmFlag.RAND_READ, "rr"),
    (VmFlag.DONTCOPY, "dc"),
    (VmFlag.DONTEXPAND, "de"),
    (VmFlag.LOCKONFAULT, "lf"),
    (VmFlag.ACCOUNT, "ac"),
    (VmFlag.NORESERVE, "nr"),
    (VmFlag.HUGETLB, "ht"),
    (VmFlag.WIPEONFORK, "wf"),
    (VmFlag.DONTDUMP, "dd"),
    (VmFlag.SOFTDIRTY, "sd"),
    (VmFlag.HUGEPAGE, "hg"),
    (VmFlag.NOHUGEPAGE, "nh"),
    (VmFlag.MERGEABLE, "mg"),
    (VmFlag.UFFD_MINOR, "ui"),
)


@attrs.define(slots=True, eq=False)
class AnonVma:
    """What ties VMAs to the anonymous pages they may hold; asked are whether two VMAs share one, or its root."""

    number: int
    #: The number of the oldest one that it comes from, by forks; its own if it comes from none.
    root: int = attrs.field(default=attrs.Factory(lambda self: self.number, takes_self=True))


@attrs.define(slots=True, eq=False)
class VmArea:
    """One mapping of an address space."""

    start: int
    end: int
    flags: int
    #: Page offset: of the file, or the address at which an anonymous mapping began.
    pgoff: int
    anon_vma: AnonVma | None = None
    #: Number of anon_vmas in its chain: more than one after a fork, until the parent's are out of reach.
    chain: int = 0
    uffd: object | None = None
    name: str = ""
    #: The file that it maps, shared anonymous memory included; None for private anonymous memory.
    file: Inode | None = None
    #: Of a hugetlb mapping: its file, and what was promised to it.
    huge: HugeMap | None = None
    #: The open file by which a file on a disk was mapped.
    opened: OpenFile | None = None

    def copy(self, start: int, end: int, pgoff: int) -> VmArea:
        """The same mapping at another place, or of another part."""
        return VmArea(
            start,
            end,
            self.flags,
            pgoff,
            self.anon_vma,
            self.chain,
            self.uffd,
            self.name,
            self.file,
            self.huge,
            self.opened,
        )

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def shared(self) -> bool:
        """Whether what is written goes to the file (VM_MAYSHARE)."""
        return bool(self.flags & VmFlag.MAYSHARE)


class VmaList:
    """The VMAs of an address space, ascending, never overlapping."""

    def __init__(
        self,
        page_shift: int,
        before_split: Callable[[VmArea, int], object],
        *,
        sticky: int = VmFlag.STICKY,
        joins_empty: bool = True,
    ) -> None:
        self._page_shift = page_shift
        #: Flags that a merged VMA has if one of its parts had them.
        self._sticky = sticky
        #: Whether what holds pages is joined with a neighbour that never held one.
        self._joins_empty = joins_empty
        #: Told of a boundary that is about to be: a huge page that it cuts through has to be mapped by PTEs.
        self._before_split = before_split
        self._starts: list[int] = []
        self._vmas: list[VmArea] = []

    def __iter__(self) -> Iterator[VmArea]:
        return iter(self._vmas)

    def __len__(self) -> int:
        return len(self._vmas)

    # -- finding ---------------------------------------------------------------------------------------

    def at(self, addr: int) -> VmArea | None:
        """The VMA that covers the address."""
        index = bisect.bisect_right(self._starts, addr) - 1
        if index >= 0:
            vma = self._vmas[index]
            if addr < vma.end:
                return vma
        return None

    def _first(self, addr: int) -> int:
        """Index of the first VMA that ends behind the address."""
        index = bisect.bisect_right(self._starts, addr) - 1
        return index if index >= 0 and self._vmas[index].end > addr else index + 1

    def first(self, addr: int) -> VmArea | None:
        """The first VMA that ends behind the address (find_vma)."""
        index = self._first(addr)
        return self._vmas[index] if index < len(self._vmas) else None

    def before(self, vma: VmArea) -> VmArea | None:
        """The VMA below, neighbour or not."""
        index = bisect.bisect_left(self._starts, vma.start)
        return self._vmas[index - 1] if index else None

    def after(self, vma: VmArea) -> VmArea | None:
        """The VMA above, neighbour or not."""
        index = bisect.bisect_right(self._starts, vma.start)
        return self._vmas[index] if index < len(self._vmas) else None

    def within(self, start: int, end: int) -> list[VmArea]:
        """The VMAs that overlap the range."""
        low = self._first(start)
        high = bisect.bisect_left(self._starts, end)
        return self._vmas[low:high]

    def covers(self, start: int, end: int) -> bool:
        """Whether every address of the range is mapped."""
        for vma in self.within(start, end):
            if vma.start > start:
                return False
            start = vma.end
        return start >= end

    # -- changing --------------------------------------------------------------------------------------

    def add(self, vma: VmArea) -> None:
        """Put a VMA in its place; nothing may be there."""
        index = bisect.bisect_left(self._starts, vma.start)
        self._starts.insert(index, vma.start)
        self._vmas.insert(index, vma)

    def remove(self, vma: VmArea) -> None:
        """Take a VMA out."""
        index = bisect.bisect_left(self._starts, vma.start)
        del self._starts[index], self._vmas[index]

    def split(self, addr: int) -> None:
        """Have a boundary at the address, if a VMA covers it."""
        vma = self.at(addr)
        if vma is None or vma.start == addr:
            return
        self._before_split(vma, addr)
        upper = vma.copy(addr, vma.end, vma.pgoff + (addr - vma.start >> self._page_shift))
        vma.end = addr
        self.add(upper)

    def change(self, vma: VmArea, start: int, end: int, flags: int) -> VmArea:
        """Give a part of a VMA these flags; that part, split off where need be. Merging is the caller's."""
        self.split(start)
        self.split(end)
        part = self.at(start)
        assert part is not None
        part.flags = flags
        return part

    def _joins(self, left: VmArea, right: VmArea, neighbour: VmArea, part: AnonVma | None) -> bool:
        """Whether two can be one VMA: a `neighbour` of what was changed, and that, whose pages belong to `part`."""
        if left.end != right.start or (left.flags ^ right.flags) & ~VmFlag.STICKY:
            return False
        if left.uffd is not right.uffd or left.name != right.name or left.file is not right.file:
            return False
        if right.pgoff != left.pgoff + (left.length >> self._page_shift) or left.flags & VmFlag.UNUSUAL:
            return False
        if left.anon_vma is right.anon_vma:
            return True
        if left.anon_vma is not None and right.anon_vma is not None:
            return False
        if not self._joins_empty:
            return neighbour.anon_vma is part or neighbour.chain == 1
        return max(left.chain, right.chain) <= 1

    def merge(self, start: int, end: int, *, moved: bool = False) -> None:
        """Join neighbours at all boundaries from `start` to `end`, both included, from below.

        What lies in the range has just been changed; flags of it that are no hindrance become those of the merged VMA.
        Where it has `moved` there, they become those of its neighbour below, or else above.
        """
        part = self.at(start if end > start else start - 1)
        flags, anon = (part.flags, part.anon_vma) if part is not None else (0, None)
        index = max(self._first(start - 1) if start else 0, 0)
        while index + 1 < len(self._vmas) and self._vmas[index].end <= end:
            left, right = self._vmas[index], self._vmas[index + 1]
            neighbour = left if right.start == start < end else right
            if left.end >= start and self._joins(left, right, neighbour, anon):
                if moved and right.start == start:
                    flags = left.flags
                elif moved and left.start == start and right.start == end:
                    flags = right.flags
                left.end = right.end
                left.flags |= right.flags & VmFlag.STICKY
                left.flags &= ~VmFlag.STICKY | self._sticky | flags
                if left.anon_vma is None:
                    left.anon_vma, left.chain = right.anon_vma, right.chain
                del self._starts[index + 1], self._vmas[index + 1]
            else:
                index += 1

    # -- free places -----------------------------------------------------------------------------------

    def gap_below(self, length: int, low: int, high: int, *, align: int = 1) -> int:
        """The highest place of that length below `high`, not below `low`; -1 if there is none."""
        ceiling = high
        for vma in itertools.chain(reversed(self._vmas), (None,)):
            floor = low if vma is None else max(vma.end, low)
            if vma is not None and vma.start >= ceiling:
                ceiling = min(ceiling, vma.start)
                continue
            if ceiling - floor >= length:
                place = ceiling - length & -align
                if place >= floor:
                    return place
            if vma is not None:
                ceiling = min(ceiling, vma.start)
            if ceiling <= low:
                return -1
        return -1
