"""PAGEMAP_SCAN, one page-table entry at a time: slow, plain, and in the kernel's order of events (rules SC).

The vectorised engine is held equal to this. Nothing here is an array, and nothing is skipped. The tables are
anything with the methods of `Tables`; sizes are those of a machine with 4 KiB pages unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

WPALLOWED, WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO, HUGE, SOFT_DIRTY, GUARD = (1 << bit for bit in range(9))
WP_MATCHING, CHECK_WPASYNC = 1, 2
EPERM, EFAULT, EINVAL = 1, 14, 22
NO_LIMIT = (1 << 64) - 1


@dataclass(frozen=True)
class Vma:
    """What the scan asks of a VMA."""

    start: int
    end: int
    wp_async: bool = False
    uffd_wp: bool = False
    pfnmap: bool = False
    soft_dirty: bool = False
    hugetlb: int = 0


@dataclass(frozen=True)
class Leaf:
    """One entry of the walk: kind is "hole", "empty", "pte", "pmd" or "hugetlb"."""

    kind: str
    start: int
    end: int
    categories: int = 0


@dataclass(frozen=True)
class Request:
    """`struct pm_scan_arg`; `vec` is the address of the output buffer, 0 for none."""

    start: int
    end: int
    vec: int = 0
    vec_len: int = 0
    max_pages: int = 0
    flags: int = 0
    category_inverted: int = 0
    category_mask: int = 0
    category_anyof_mask: int = 0
    return_mask: int = 0
    size: int = 96


@dataclass
class Answer:
    """Return value or errno, regions as (start, end, categories), and walk_end (None: not written)."""

    errno: int = 0
    regions: list[tuple[int, int, int]] = field(default_factory=list)
    walk_end: int | None = None


class Tables(Protocol):
    """The address space."""

    def vmas(self) -> Iterable[Vma]:
        """All VMAs, ascending."""
        ...

    def leaf_at(self, vma: Vma, address: int, end: int) -> Leaf:
        """The entry that maps `address`, clipped to `address` and `end`."""
        ...

    def arm(self, vma: Vma, leaf: Leaf) -> None:
        """Write-protect one entry (a marker where it is empty)."""
        ...

    def split(self, vma: Vma, address: int) -> None:
        """Split the PMD that maps `address`."""
        ...


def check(request: Request, *, categories: int, task_size: int, page_size: int = 4096) -> int:
    """The errno that refuses the request, 0 if none: each check in the kernel's order (rules SC)."""
    asked = (
        request.category_inverted | request.category_mask | request.category_anyof_mask | request.return_mask
    )
    if request.size != 96:
        return EINVAL
    if request.flags & ~(WP_MATCHING | CHECK_WPASYNC):
        return EINVAL
    if asked & ~categories:
        return EINVAL
    if request.start % page_size:
        return EINVAL
    if request.start > request.end or request.end > task_size:
        return EFAULT
    if request.vec == 0 and request.vec_len > 0:
        return EINVAL
    if request.vec and request.vec + request.vec_len * 24 > task_size:
        return EFAULT
    return 0


class Stop(Exception):
    """The output is full, or max_pages is reached: the walk ends at `walk_end`, to be resumed or not."""


class Scan:
    """One call. `empty_written`: an empty PTE counts as written on every path (kernels from mid-2026 on)."""

    def __init__(
        self,
        request: Request,
        tables: Tables,
        *,
        categories: int,
        task_size: int,
        empty_written: bool,
        page_size: int = 4096,
        pmd_size: int = 1 << 21,
    ) -> None:
        self.request, self.tables = request, tables
        self.known, self.task_size, self.empty_written = categories, task_size, empty_written
        self.page_size, self.pmd_size = page_size, pmd_size
        self.end = -(-request.end // page_size) * page_size
        self.max_pages = request.max_pages or NO_LIMIT
        self.room = request.vec_len
        self.slots = min(pmd_size // page_size, request.vec_len)
        self.buffer: list[list[int]] = [[0, 0, 0]]
        self.found = 0
        self.walk_end = 0
        self.out: list[tuple[int, int, int]] = []

    def run(self) -> Answer:
        """Answer the request."""
        refused = check(
            self.request, categories=self.known, task_size=self.task_size, page_size=self.page_size
        )
        if refused:
            return Answer(errno=refused)
        failed, position = 0, self.request.start
        while position < self.end:
            stopped = False
            try:
                failed = self.walk(position)
            except Stop:
                stopped = True
            self.flush()
            if not stopped or self.room == 0 or self.found == self.max_pages:
                break
            position = self.walk_end
        return Answer(failed, self.out, self.walk_end or self.end)

    def flush(self) -> None:
        """Copy the filled slots out."""
        filled = [(a, b, c) for a, b, c in self.buffer if a != b]
        self.out += filled
        self.room -= len(filled)
        self.slots = min(self.slots, self.room)
        self.buffer = [[0, 0, 0]]

    def walk(self, position: int) -> int:
        """One walk from `position` to the end; an errno or 0."""
        flags, mask = self.request.flags, self.request.category_mask
        for vma in self.tables.vmas():
            if vma.end <= position or vma.start >= self.end:
                continue
            if not vma.wp_async and flags & CHECK_WPASYNC:
                return EPERM
            if not vma.wp_async and flags & WP_MATCHING:
                continue
            if vma.pfnmap:
                continue
            of_vma = WPALLOWED * vma.wp_async | SOFT_DIRTY * vma.soft_dirty
            if mask & WPALLOWED and not (of_vma ^ self.request.category_inverted) & WPALLOWED:
                continue
            address, end = max(vma.start, position), min(vma.end, self.end)
            while address < end:
                leaf = self.tables.leaf_at(vma, address, end)
                address = self.visit(vma, leaf, of_vma)
        return 0

    def visit(self, vma: Vma, leaf: Leaf, of_vma: int) -> int:
        """Look at one entry; the address at which the walk goes on."""
        request, start = self.request, leaf.start
        protect = bool(request.flags & WP_MATCHING)
        categories = leaf.categories | of_vma
        only_written = (
            request.category_mask == request.return_mask == WRITTEN
            and not request.category_anyof_mask
            and not request.category_inverted
        )
        if leaf.kind == "hole" and vma.uffd_wp and not vma.hugetlb:
            categories |= WRITTEN
        if leaf.kind == "empty" and (self.empty_written or only_written):
            categories |= WRITTEN
        if protect and request.vec_len == 0 and leaf.kind in ("pte", "empty"):
            if leaf.kind == "empty" or categories & WRITTEN:
                self.tables.arm(vma, leaf)
            return leaf.end
        if not self.interesting(categories):
            return leaf.end
        end, full = self.output(categories & request.return_mask, start, leaf.end)
        arms = protect and (leaf.kind == "hole" or bool(categories & WRITTEN)) and end > start
        whole = {"pmd": self.pmd_size, "hugetlb": vma.hugetlb}.get(leaf.kind, end - start)
        if arms and end - start != whole:
            self.back_out(start, end)
            if leaf.kind == "pmd":
                self.tables.split(vma, start)
                return start
            self.walk_end = start
            return leaf.end
        if arms:
            self.tables.arm(vma, Leaf(leaf.kind, start, end, leaf.categories))
        if full:
            raise Stop
        return leaf.end

    def interesting(self, categories: int) -> bool:
        """The selection formula."""
        request = self.request
        categories ^= request.category_inverted
        if categories & request.category_mask != request.category_mask:
            return False
        return not request.category_anyof_mask or bool(categories & request.category_anyof_mask)

    def output(self, categories: int, start: int, end: int) -> tuple[int, bool]:
        """Report the range; where the part that was taken ends, and whether the walk must stop."""
        if self.request.vec_len == 0:
            return end, False
        pages, full = (end - start) // self.page_size, False
        if self.found + pages > self.max_pages:
            pages = self.max_pages - self.found
            end, full = start + pages * self.page_size, True
        if not self.push(categories, start, end):
            end, pages, full = start, 0, True
        self.found += pages
        if full:
            self.walk_end = end
        return end, full

    def push(self, categories: int, start: int, end: int) -> bool:
        """Extend the current slot or open the next one; False where there is none left."""
        slot = self.buffer[-1]
        if slot[1] and start == slot[1] and categories == slot[2]:
            slot[1] = end
            return True
        if slot[1]:
            if len(self.buffer) >= self.slots:
                return False
            self.buffer.append(slot := [0, 0, 0])
        slot[:] = [start, end, categories]
        return True

    def back_out(self, start: int, end: int) -> None:
        """Undo the last output: a huge page that could not be protected whole."""
        if self.request.vec_len == 0:
            return
        slot = self.buffer[-1]
        if slot[0] != start:
            slot[1] = start
        else:
            slot[0] = slot[1] = 0
        self.found -= (end - start) // self.page_size
