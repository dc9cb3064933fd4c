"""The frame table: one column a property, one row a frame, grown as far as frames are touched.

`flags` holds KPF_* bits where kpageflags has them, the same word for every page of a compound page (head and tail
excepted), so that the view is a copy. A few more bits, above those that any kernel shows, are ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import U64Array

__all__ = ["ANON_EXCLUSIVE", "CACHED", "MOVED_YOUNG", "RAW_HWPOISON", "SHOWN", "Frames"]

#: Of a poisoned page of hugetlb, all of which show HWPOISON: the small page that was poisoned.
RAW_HWPOISON = 1 << 59
#: The page belongs to one process alone, and may be written without copying (PG_anon_exclusive). Per page; shown where
#: OWNER_2 is, by kernels whose tail pages report their folio's flags for the head alone.
ANON_EXCLUSIVE = 1 << 60
#: The page is in the page cache of the inode that `owner` names, as its page `index`.
CACHED = 1 << 61
#: An entry that maps the folio had an accessed bit, which idle page tracking took (PG_young).
MOVED_YOUNG = 1 << 62
#: The bits that kpageflags may show.
SHOWN = (1 << 48) - 1
_FIRST = 1 << 12
#: Columns begin at whole cache lines.
_LINE = 64
#: Rows of a block that no allocator has lying about, so that it is fresh (128 MiB).
_FRESH = 1 << 21


class Frames:
    """Columns by PFN. `*_at` are memory views of them: the fast way to one element."""

    #: Column names and types; all start as zero.
    COLUMNS = (
        ("flags", np.uint64),
        # PTEs that map the page, plus PMDs that map its folio.
        ("mapcount", np.int32),
        # How many pages before this one the head of its compound page lies.
        ("behind", np.int32),
        # Row of its contents; 0 is all zeros.
        ("content", np.int32),
        # Swap entry of a page in the swap cache, in the form of a PTE's field, plus 1; 0: none.
        ("swap", np.int64),
        # When it went on its LRU list: smaller is nearer to the tail.
        ("lru", np.int64),
        # Of the head of a large folio that one process maps whole: that, see folios.py; else 0.
        ("whole", np.int64),
        # Number of the inode whose page it is, and which page.
        ("owner", np.int32),
        ("index", np.int64),
        # Number of the memory cgroup that it is charged to, 0 for the root's and for what is charged to nobody.
        ("group", np.int32),
        # 1 + order for the first page of a free block, else 0.
        ("free_order", np.uint8),
    )

    flags: U64Array
    mapcount: NDArray[np.int32]
    behind: NDArray[np.int32]
    content: NDArray[np.int32]
    swap: NDArray[np.int64]
    lru: NDArray[np.int64]
    whole: NDArray[np.int64]
    owner: NDArray[np.int32]
    index: NDArray[np.int64]
    group: NDArray[np.int32]
    free_order: NDArray[np.uint8]
    flags_at: memoryview[int]
    mapcount_at: memoryview[int]
    behind_at: memoryview[int]
    content_at: memoryview[int]
    swap_at: memoryview[int]
    lru_at: memoryview[int]
    whole_at: memoryview[int]
    owner_at: memoryview[int]
    index_at: memoryview[int]
    group_at: memoryview[int]
    free_order_at: memoryview[int]

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows = 0
        #: The rows that may hold anything, as first: end; all others are zero.
        self.touched: dict[int, int] = {}
        #: The columns with the rows to come, and how many they have.
        self._columns: dict[str, NDArray[Any]] = {}
        self._room = 0
        self.reach(0, min(count, _FIRST))

    def _set(self, name: str, column: NDArray[Any]) -> None:
        setattr(self, name, column)
        setattr(self, f"{name}_at", column.data)

    def reach(self, first: int, end: int) -> None:
        """Have rows for all frames below `end`, of which those from `first` on are about to be used."""
        if end > self.rows:
            rows = min(self.count, max(end, self.rows * 2))
            if rows > self._room:
                self._allocate(rows)
            for name, column in self._columns.items():
                self._set(name, column[:rows])
            self.rows = rows
        if first not in self.touched:
            # The host gives large pages at the first write to a column: paid here, not by whoever touches one page.
            for column in self._columns.values():
                column[first:end] = 0
        self.touched[first] = max(end, self.touched.get(first, 0))

    def reach_again(self, first: int, end: int) -> None:
        """Rows that are in use already are those of a zone that begins at `first` from here on."""
        self.touched[first] = max(end, self.touched.get(first, 0))

    def _allocate(self, rows: int) -> None:
        """Have room for so many rows: one block, of which more than asked for costs addresses alone.

        A block that is large comes from the operating system, whose zeros cost nothing until they are touched.
        """
        room = rows if rows < _FRESH >> 4 else min(self.count, max(2 * rows, _FRESH))
        sizes = [-(-room * np.dtype(kind).itemsize // _LINE) * _LINE for _, kind in self.COLUMNS]
        block, place = np.zeros(sum(sizes), dtype=np.uint8), 0
        for (name, kind), size in zip(self.COLUMNS, sizes, strict=True):
            column = block[place : place + size].view(kind)[:room]
            # Only what was used is copied: below a zone that lies high there may be much that never was.
            for low, high in self.touched.items():
                column[low:high] = self._columns[name][low:high]
            self._columns[name] = column
            place += size
        self._room = room

    def replace(self, columns: dict[str, NDArray[Any]], rows: int, touched: dict[int, int]) -> None:
        """Put other columns in the place of all; `touched` as in the attribute."""
        self._columns, self._room = columns, rows
        for name, column in columns.items():
            self._set(name, column)
        self.rows, self.touched = rows, touched

    def head(self, pfn: int) -> int:
        """The head of the compound page of `pfn`, or `pfn` itself."""
        return pfn - self.behind_at[pfn]

    def set_bits(self, first: int, pages: int, bits: int) -> None:
        """Set flag bits on `pages` frames."""
        if pages == 1:
            self.flags_at[first] |= bits
        else:
            self.flags[first : first + pages] |= np.uint64(bits)

    def clear_bits(self, first: int, pages: int, bits: int) -> None:
        """Clear flag bits on `pages` frames."""
        if pages == 1:
            self.flags_at[first] &= ~bits
        else:
            self.flags[first : first + pages] &= np.uint64(~bits & (1 << 64) - 1)
