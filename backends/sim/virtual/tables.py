"""Page tables: all tables of a machine are rows of one pool, 512 entries each; an address space is a tree of them.

Neighbouring tables made together are neighbouring rows, so a range of pages is, as a rule, one slice of the pool: an
*extent*, a view that bulk operations read and write in place. The pool moves when it grows: views are taken after all
tables that an operation needs are there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import U64Array
from pmcore.backends.sim.physical.memory import Memory
from pmcore.backends.sim.virtual.pte import FIELD, LEAF, TABLE
from pmcore.geometry import Geometry

__all__ = ["FEW", "Extent", "PageTables", "TablePool"]

#: Up to so many PTEs one after the other is faster than arrays.
FEW = 4
_NO_PLACES = range(0)

_LEAF, _TABLE, _FIELD = np.uint64(LEAF), np.uint64(TABLE), np.uint64(FIELD)


class TablePool:
    """Rows for page tables, each on a frame of its own."""

    def __init__(self, memory: Memory, geometry: Geometry) -> None:
        self.memory = memory
        self.entries = 1 << geometry.pmd_order
        self.order = geometry.pmd_order
        self._used = 1  # row 0 stands for "no table"
        self._free: list[int] = []
        self._set_pfns(np.zeros(64, dtype=np.int64))
        self._set(np.zeros((64, self.entries), dtype=np.uint64))

    def _set(self, rows: U64Array) -> None:
        self.rows = rows
        self.flat = rows.reshape(-1)
        self.at: memoryview[int] = self.flat.data

    def _set_pfns(self, pfns: NDArray[np.int64]) -> None:
        self.pfns = pfns
        self._pfn_at: memoryview[int] = pfns.data

    @property
    def in_use(self) -> int:
        """Tables that there are."""
        return self._used - 1 - len(self._free)

    @property
    def free_rows(self) -> list[int]:
        """Rows to be used again, the last first."""
        return self._free

    def capture(self) -> tuple[U64Array, NDArray[np.int64]]:
        """All rows ever used, and the frames that they lie on."""
        return self.rows[: self._used].copy(), self.pfns[: self._used].copy()

    def restore(self, rows: U64Array, pfns: NDArray[np.int64], free: list[int]) -> None:
        """What `capture` and `free_rows` gave."""
        self._set(rows.copy())
        self._set_pfns(pfns.copy())
        self._used, self._free = len(rows), list(free)

    def take(self, count: int) -> list[int]:
        """`count` empty tables; neighbouring rows where there are no freed ones to use again. Raises NoMemory."""
        pfns = self.memory.table_pages(count)
        rows = [self._free.pop() for _ in range(min(count, len(self._free)))]
        rows += self._fresh(count - len(rows))
        self.pfns[rows] = pfns
        return rows

    def take_one(self) -> int:
        """An empty table. Raises NoMemory."""
        pfn = self.memory.table_page()
        row = self._free.pop() if self._free else self._fresh(1)[0]
        self._pfn_at[row] = pfn
        return row

    def _fresh(self, count: int) -> range:
        """Rows that were never used."""
        need = self._used + count
        if need > len(self.rows):
            grown = np.zeros((max(need, 2 * len(self.rows)), self.entries), dtype=np.uint64)
            grown[: self._used] = self.rows[: self._used]
            self._set_pfns(np.resize(self.pfns, len(grown)))
            self._set(grown)
        rows = range(self._used, need)
        self._used = need
        return rows

    def give_back(self, rows: list[int]) -> None:
        """Free tables, to be used again from the last on; what they held is forgotten."""
        if len(rows) > FEW:
            self.rows[rows] = 0
            self.memory.free_tables(self.pfns[rows].tolist())
            self.pfns[rows] = 0
        else:
            for row in rows:
                self.rows[row] = 0
            self.give_back_empty(rows)
            return
        self._free += rows

    def give_back_empty(self, rows: list[int]) -> None:
        """The same for few tables that hold nothing."""
        pfn_at, memory = self._pfn_at, self.memory
        give = memory.free_table if memory.grouped or len(memory.zones) > 1 else memory.zones[0].give_one
        for row in rows:
            give(pfn_at[row])
            pfn_at[row] = 0
        self._free += rows


class Extent(NamedTuple):
    """Neighbouring entries as a view: PTEs, or (`huge`) PMDs that map huge pages."""

    start: int
    entries: U64Array
    huge: bool
    #: Bytes that an entry maps.
    size: int

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.start + len(self.entries) * self.size


class PageTables:
    """One address space's tree. Levels count from the PTEs: level 0 tables hold PTEs, level 1 tables PMDs."""

    def __init__(self, pool: TablePool, geometry: Geometry, *, root: int | None = None) -> None:
        self.pool = pool
        self.geometry = geometry
        self.page_shift = geometry.page_shift
        self.pmd_shift = geometry.page_shift + geometry.pmd_order
        self.pmd_size = geometry.pmd_size
        self._mask = pool.entries - 1
        self._order = pool.order
        self._top = geometry.levels - 1
        self.root = pool.take_one() if root is None else root
        #: Tables by level, for /proc/PID/status (VmPTE) and check().
        self.tables = [0] * geometry.levels
        self.tables[self._top] = 1

    # -- one entry -------------------------------------------------------------------------------------

    def pmd_slot(self, addr: int) -> int:
        """Place in `pool.at` of the PMD for `addr`; -1 where no table holds it."""
        at, order, mask = self.pool.at, self._order, self._mask
        row, shift = self.root, self.pmd_shift + self._order * (self._top - 1)
        while shift > self.pmd_shift:
            entry = at[(row << order) + (addr >> shift & mask)]
            if not entry & TABLE:
                return -1
            row = entry & FIELD
            shift -= order
        return (row << order) + (addr >> shift & mask)

    def pte_slot(self, addr: int) -> int:
        """Place in `pool.at` of the PTE for `addr`; -1 where there is none (no table, or a huge page)."""
        slot = self.pmd_slot(addr)
        entry = self.pool.at[slot] if slot >= 0 else 0
        return self.slot_in(entry, addr) if entry & TABLE else -1

    def slot_in(self, pmd: int, addr: int) -> int:
        """Place in `pool.at` of the PTE for `addr` in the table that a PMD names."""
        return ((pmd & FIELD) << self._order) + (addr >> self.page_shift & self._mask)

    def make_pmd_slot(self, addr: int) -> int:
        """The same as `pmd_slot`; tables are made where they are missing. Raises NoMemory."""
        order, mask = self._order, self._mask
        row, level = self.root, self._top
        while level > 1:
            slot = (row << order) + (addr >> self.page_shift + order * level & mask)
            entry = self.pool.at[slot]
            level -= 1
            if not entry:
                row = self.pool.take_one()
                self.tables[level] += 1
                self.pool.at[slot] = TABLE | row
            else:
                row = entry & FIELD
        return (row << order) + (addr >> self.pmd_shift & mask)

    def leaf_slot(self, addr: int, level: int, *, make: bool = False) -> int:
        """Place in `pool.at` of the entry for `addr` in a table of that level; -1 where there is no such table.

        With `make` the tables above are made where they are missing. Raises NoMemory.
        """
        order, mask = self._order, self._mask
        row, above = self.root, self._top
        while above > level:
            slot = (row << order) + (addr >> self.page_shift + order * above & mask)
            entry = self.pool.at[slot]
            above -= 1
            if entry & TABLE:
                row = entry & FIELD
            elif make and not entry:
                row = self.pool.take_one()
                self.tables[above] += 1
                self.pool.at[slot] = TABLE | row
            else:
                return -1
        return (row << order) + (addr >> self.page_shift + order * level & mask)

    def make_pte_slot(self, addr: int) -> int:
        """The same as `pte_slot`; tables are made where they are missing; -1 where a huge page is mapped."""
        pool, order, mask = self.pool, self._order, self._mask
        row, level, shift = self.root, self._top, self.page_shift + order * self._top
        while level:
            slot = (row << order) + (addr >> shift & mask)
            entry = pool.at[slot]
            level -= 1
            shift -= order
            if entry & TABLE:
                row = entry & FIELD
            elif entry:
                return -1
            else:
                row = pool.take_one()
                self.tables[level] += 1
                pool.at[slot] = TABLE | row
        return (row << order) + (addr >> shift & mask)

    # -- ranges ----------------------------------------------------------------------------------------

    def pmd_tables(self, start: int, end: int, *, make: bool = False) -> Iterator[tuple[int, int, int, int]]:
        """Tables of PMDs in the range: (first address, row, first index, end index). With `make` they are made."""
        yield from self._tables(self.root, self._top, 0, start, end, make)

    def _tables(
        self, row: int, level: int, base: int, start: int, end: int, make: bool
    ) -> Iterator[tuple[int, int, int, int]]:
        shift = self.page_shift + self._order * level
        first = start - base >> shift
        last = (end - 1 - base >> shift) + 1
        if level == 1:
            yield base + (first << shift), row, first, last
            return
        if make:
            indexes = list(range(first, last))
        else:
            indexes = (np.flatnonzero(self.pool.rows[row, first:last]) + first).tolist()
        for index in indexes:
            entry = self.pool.at[(row << self._order) + index]
            if not entry:
                below = self.pool.take_one()
                self.tables[level - 1] += 1
                self.pool.at[(row << self._order) + index] = TABLE | below
            elif entry & TABLE:
                below = entry & FIELD
            else:
                continue  # a gigantic page: only hugetlb's own rooms look at those
            low = base + (index << shift)
            yield from self._tables(
                below, level - 1, low, max(start, low), min(end, low + (1 << shift)), make
            )

    def few(self, start: int, end: int) -> range | None:
        """Places in `pool.at` of the PTEs of a range of few pages in one table, none where there is no table.

        None for any other range: for those arrays are faster, and huge pages are another matter.
        """
        if end - start > FEW << self.page_shift or start >> self.pmd_shift != end - 1 >> self.pmd_shift:
            return None
        slot = self.pmd_slot(start)
        entry = self.pool.at[slot] if slot >= 0 else 0
        if entry & TABLE:
            first = self.slot_in(entry, start)
            return range(first, first + (end - start >> self.page_shift))
        return None if entry else _NO_PLACES

    def extents(self, start: int, end: int) -> Iterable[Extent]:
        """All tables' entries in the range, ascending: views that may be written to. Holes are left out."""
        if start >> self.pmd_shift == end - 1 >> self.pmd_shift:
            return self._within_one(start, end)
        return self._extents(start, end)

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        for base, row, first, last in self.pmd_tables(start, end):
            pmds = self.pool.rows[row, first:last]
            there = np.flatnonzero(pmds)
            if len(there) == 0:
                continue
            found = pmds[there]
            if len(there) == 1:
                cuts = [0, 1]
            else:
                # A run: neighbours in address; tables in neighbouring rows, or huge pages beside each other.
                leaf = (found & _LEAF) != 0
                rows = (found & _FIELD).view(np.int64)
                breaks = (np.diff(there) != 1) | (leaf[1:] != leaf[:-1]) | (~leaf[1:] & (np.diff(rows) != 1))
                cuts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(there)]
            for low, high in itertools.pairwise(cuts):
                index, count = int(there[low]), high - low
                addr = base + (index << self.pmd_shift)
                entry = int(found[low])
                if entry & LEAF:
                    view = self.pool.rows[row, first + index : first + index + count]
                    yield Extent(addr, view, True, self.pmd_size)
                    continue
                offset = (entry & FIELD) << self._order
                place, stop = max(addr, start), min(addr + (count << self.pmd_shift), end)
                begin = offset + (place - addr >> self.page_shift)
                yield Extent(
                    place,
                    self.pool.flat[begin : begin + (stop - place >> self.page_shift)],
                    False,
                    1 << self.page_shift,
                )

    def _within_one(self, start: int, end: int) -> tuple[Extent, ...]:
        """The extent of a range below one PMD."""
        slot = self.pmd_slot(start)
        entry = self.pool.at[slot] if slot >= 0 else 0
        if not entry:
            return ()
        if entry & LEAF:
            return (Extent(start & -self.pmd_size, self.pool.flat[slot : slot + 1], True, self.pmd_size),)
        first = self.slot_in(entry, start)
        pages = end - start >> self.page_shift
        return (Extent(start, self.pool.flat[first : first + pages], False, 1 << self.page_shift),)

    def make(self, start: int, end: int) -> None:
        """Have tables of PTEs for the whole range, huge pages excepted. Raises NoMemory (what was made stays)."""
        if start >> self.pmd_shift == end - 1 >> self.pmd_shift:
            self.make_pte_slot(start)
            return
        for _, row, first, last in self.pmd_tables(start, end, make=True):
            missing = np.flatnonzero(self.pool.rows[row, first:last] == 0) + first
            if len(missing):
                below = self.pool.take(len(missing))
                self.tables[0] += len(missing)
                self.pool.rows[row, missing] = np.array(below, dtype=np.uint64) | _TABLE

    def free_range(self, start: int, end: int, floor: int, ceiling: int) -> None:
        """Free the tables of a range that has been unmapped (their entries have been emptied).

        `floor` and `ceiling`: how far nothing else is mapped; tables that reach beyond stay.
        """
        block = start >> self.pmd_shift
        if max(-(-floor >> self.pmd_shift), block) < ceiling >> self.pmd_shift:
            if end - 1 >> self.pmd_shift == block:
                self._free_path(start, floor, ceiling)
                return
            gone: list[int] = []
            self._free_below(self.root, self._top, 0, start, end, floor, ceiling, gone)
            if gone:
                self.pool.give_back(gone)

    def _free_path(self, addr: int, floor: int, ceiling: int) -> None:
        """The same for a range below one PMD: one table of each level at most."""
        at, order, mask, pool = self.pool.at, self._order, self._mask, self.pool
        row, shift, level = self.root, self.pmd_shift + self._order * (self._top - 1), self._top
        path: list[int] = []
        while level:
            slot = (row << order) + (addr >> shift & mask)
            entry = at[slot]
            if not entry & TABLE:
                break
            row = entry & FIELD
            path.append(slot)
            shift -= order
            level -= 1
        gone: list[int] = []
        while path:
            shift += order
            low = addr >> shift << shift
            if low < floor or low + (1 << shift) > ceiling:
                break
            slot = path.pop()
            gone.append(at[slot] & FIELD)
            at[slot] = 0
            self.tables[level] -= 1
            level += 1
        if gone:
            pool.give_back_empty(gone)

    def free_empty(self, start: int, end: int) -> None:
        """Free the tables of PTEs that lie wholly in the range and hold nothing."""
        low, high = -(-start >> self.pmd_shift) << self.pmd_shift, end >> self.pmd_shift << self.pmd_shift
        if low >= high:
            return
        for _, row, first, last in list(self.pmd_tables(low, high)):
            pmds = self.pool.rows[row, first:last]
            index = np.flatnonzero((pmds & _TABLE) != 0)
            below = (pmds[index] & _FIELD).astype(np.int64)
            empty = ~self.pool.rows[below].any(axis=1)
            pmds[index[empty]] = 0
            gone = below[empty].tolist()
            if gone:
                self.tables[0] -= len(gone)
                self.pool.give_back(gone[::-1])

    def _free_below(
        self,
        row: int,
        level: int,
        base: int,
        start: int,
        end: int,
        floor: int,
        ceiling: int,
        gone: list[int],
    ) -> None:
        """Take the tables below one out of the tree: the lowest first, those of one table from the last on."""
        shift = self.page_shift + self._order * level
        first = start - base >> shift if start > base else 0
        last = (end - 1 - base >> shift) + 1
        if last > self.pool.entries:
            last = self.pool.entries
        at, offset, mine = self.pool.at, row << self._order, []
        there: Iterable[int] = range(first, last)
        if last - first > FEW:
            there = self.pool.rows[row, first:last].nonzero()[0].tolist()
            offset, base = offset + first, base + (first << shift)
        for index in there:
            entry = at[offset + index]
            if not entry & TABLE:
                continue
            low = base + (index << shift)
            if level > 1:
                self._free_below(entry & FIELD, level - 1, low, start, end, floor, ceiling, gone)
            if floor <= low and low + (1 << shift) <= ceiling:
                at[offset + index] = 0
                mine.append(entry & FIELD)
        if mine:
            self.tables[level - 1] -= len(mine)
            gone += reversed(mine)

    def destroy(self, start: int, end: int) -> None:
        """Free the root as well, when nothing is mapped any more; from `start` to `end` something was."""
        every = 1 << self.page_shift + self._order * (self._top + 1)
        if start < end:
            self.free_range(start, end, 0, every)
        if any(self.tables[: self._top]):
            self.free_range(0, every, 0, every)
        self.pool.give_back([self.root])
        self.tables = [0] * len(self.tables)
