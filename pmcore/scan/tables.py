"""What the matching engine asks of whoever owns the page tables: VMAs, leaves in order, and the write protection.

A *leaf* is what the kernel's walk stops at: a hole (no page table below), one PTE, one PMD that maps a huge page, one
hugetlb entry. Leaves come in ascending order, clipped to the range that was asked for, as batches of columns.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

__all__ = ["CodedLeaves", "LeafBatch", "LeafKind", "ScanTables", "ScanVma"]


class LeafKind(enum.IntEnum):
    """What sort of entry a leaf is."""

    #: No page table here (any level of the walk above the PTEs).
    HOLE = 0
    #: An empty PTE: a page table is here, its entry is none.
    EMPTY = 1
    #: A PTE that is not none: present, swap, marker.
    PTE = 2
    #: A PMD that maps a huge page (or a PMD migration entry).
    PMD = 3
    #: An entry of a hugetlb VMA, empty or not.
    HUGETLB = 4


@attrs.frozen(kw_only=True)
class ScanVma:
    """A VMA as far as the scan looks at it. Addresses in bytes, not clipped."""

    start: int
    end: int
    #: Registered for asynchronous write protection, with markers: what PAGE_IS_WPALLOWED says.
    wp_async: bool = False
    #: Registered for write protection in any mode (VM_UFFD_WP): holes in it count as written.
    uffd_wp: bool = False
    #: VM_PFNMAP: never walked.
    pfnmap: bool = False
    #: VM_SOFTDIRTY.
    soft_dirty: bool = False
    #: Size of its pages where it is a hugetlb VMA, else 0.
    hugetlb: int = 0


@attrs.frozen(kw_only=True, eq=False)
class LeafBatch:
    """Consecutive leaves of one VMA as columns of equal length, ascending, not overlapping.

    `categories` are the PAGE_IS_* bits that the entry itself gives, the VMA's left out; those of HOLE and EMPTY are 0
    (what an empty entry counts as is a matter of the kernel, and the engine's).
    """

    start: NDArray[np.uint64]
    end: NDArray[np.uint64]
    kind: NDArray[np.uint8]
    categories: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.start)

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_] | slice) -> LeafBatch:
        """The leaves at `index`."""
        return LeafBatch(
            start=self.start[index],
            end=self.end[index],
            kind=self.kind[index],
            categories=self.categories[index],
        )


class CodedLeaves(NamedTuple):
    """Neighbouring leaves of one size, each a word that tells its code: for tables whose entries come in few sorts.

    What a leaf with the code `word >> shift` is stands in that row of `palette` (its addresses are not looked at), so
    that selection is decided once a code instead of once a leaf. The palette has a row for each code that there could
    be, and as many as a power of two.
    """

    #: Address of the first leaf, and bytes that each covers (a power of two).
    base: int
    size: int
    words: NDArray[np.uint64]
    shift: int
    palette: LeafBatch

    @property
    def codes(self) -> NDArray[np.int64]:
        """The code of each leaf."""
        return (self.words >> np.uint64(self.shift)).view(np.int64)

    def take(self, index: NDArray[np.intp], codes: NDArray[np.int64]) -> LeafBatch:
        """The leaves at `index`, which have these codes, in full."""
        start = index.astype(np.uint64) * np.uint64(self.size) + np.uint64(self.base)
        return LeafBatch(
            start=start,
            end=start + np.uint64(self.size),
            kind=self.palette.kind[codes],
            categories=self.palette.categories[codes],
        )


class ScanTables(Protocol):
    """The address space that is scanned."""

    def scan_vmas(self, start: int, end: int) -> Iterable[ScanVma]:
        """The VMAs that overlap `start` to `end`, ascending."""
        ...

    def leaves(self, vma: ScanVma, start: int, end: int) -> Iterator[LeafBatch | CodedLeaves]:
        """The leaves of `vma` from `start` to `end`, both inside it. Batches of any length, none empty.

        A batch describes the tables as they are when it is asked for.
        """
        ...

    def write_protect(self, vma: ScanVma, leaves: LeafBatch) -> None:
        """Arm the leaves: uffd-wp on present and swap entries, a marker on empty ones and on every page of a hole."""
        ...

    def split_pmd(self, vma: ScanVma, start: int) -> None:
        """Split the huge page whose PMD maps `start` into PTEs (or unmap it where the kernel does)."""
        ...
