"""What is written in pages: rows of one pool. Row 0 is a page of zeros, which costs nothing and is never written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Contents"]

Rows = NDArray[np.int32]
#: Rows hashed, or copied, at a time: as many as stay in a processor's cache.
_PIECE = 256


class Contents:
    """Page contents by row number. Who holds a row's number owns it."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._pool = np.zeros((16, page_size), dtype=np.uint8)
        self._used = 1
        self._free: list[int] = []
        self._zeros = bytes(page_size)

    @property
    def in_use(self) -> int:
        """Rows that somebody owns."""
        return self._used - 1 - len(self._free)

    @property
    def free_rows(self) -> list[int]:
        """Rows to be used again, the last first."""
        return self._free

    def capture(self) -> NDArray[np.uint8]:
        """All rows ever used."""
        return self._pool[: self._used].copy()

    def restore(self, rows: NDArray[np.uint8], free: list[int]) -> None:
        """What `capture` and `free_rows` gave."""
        self._pool, self._used, self._free = rows.copy(), len(rows), list(free)

    def take(self, count: int) -> Rows:
        """`count` rows of zeros."""
        recycled = [self._free.pop() for _ in range(min(count, len(self._free)))]
        self._pool[recycled] = 0
        fresh = count - len(recycled)
        need = self._used + fresh
        if need > len(self._pool):
            grown = np.zeros((max(need, 2 * len(self._pool)), self.page_size), dtype=np.uint8)
            grown[: self._used] = self._pool[: self._used]
            self._pool = grown
        rows = np.concatenate(
            (np.array(recycled, dtype=np.int32), np.arange(self._used, need, dtype=np.int32))
        )
        self._used = need
        return rows

    def take_one(self) -> int:
        """`take` of a single row."""
        if self._free:
            row = self._free.pop()
            self._pool[row] = 0
            return row
        return int(self.take(1)[0])

    def give_back(self, rows: Rows) -> None:
        """Rows that nobody needs any more; zeros among them are left alone."""
        self._free += rows[rows != 0].tolist()

    def copies(self, rows: Rows) -> Rows:
        """Rows of their own with the same contents."""
        result = np.zeros_like(rows)
        index = np.flatnonzero(rows)
        if len(index):
            result[index] = self.take(len(index))
            for first in range(0, len(index), _PIECE):
                part = index[first : first + _PIECE]
                self._pool[result[part]] = self._pool[rows[part]]
        return result

    def copy_one(self, row: int) -> int:
        """`copies` of a single row."""
        if not row:
            return 0
        copy = self.take_one()
        self._pool[copy] = self._pool[row]
        return copy

    def write_pages(self, rows: Rows, data: memoryview) -> Rows:
        """`write` for whole pages, one after the other in the data; the rows that then hold them."""
        if not len(rows):
            return rows
        pages = np.frombuffer(data, dtype=np.uint64).reshape(len(rows), -1)
        bare = np.flatnonzero(rows == 0)
        if len(bare):
            bare = bare[pages[bare].any(axis=1)] if len(bare) < len(rows) else bare[pages.any(axis=1)]
            rows = rows.copy()
            rows[bare] = self.take(len(bare))
        pool = self._pool.view(np.uint64)
        if len(bare) == len(rows) or rows.all():
            pool[rows] = pages
        else:
            held = rows != 0
            pool[rows[held]] = pages[held]
        return rows

    def read_pages(self, rows: Rows, out: NDArray[np.uint8]) -> None:
        """What many pages hold, one after the other, put into `out`."""
        np.take(self._pool, rows, axis=0, out=out.reshape(-1, self.page_size), mode="clip")

    def read(self, row: int, offset: int, length: int) -> bytes:
        """Bytes of one page."""
        return self._pool[row, offset : offset + length].tobytes() if row else bytes(length)

    def write(self, row: int, offset: int, data: bytes) -> int:
        """Write into one page; the row that then holds it."""
        if not row:
            if data == self._zeros[: len(data)]:
                return 0
            row = self.take_one()
        self._pool[row, offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
        return row

    def hashes(self, rows: Rows) -> NDArray[np.uint64]:
        """A number for each page's contents: equal for equal contents, hardly ever for others, never 0."""
        words = self.page_size // 8
        weights = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
        result = np.full(len(rows), 0x5851F42D4C957F2D, dtype=np.uint64)
        index = np.flatnonzero(rows)
        for first in range(0, len(index), _PIECE):
            part = index[first : first + _PIECE]
            result[part] += (self._pool[rows[part]].view("<u8") * weights).sum(axis=1, dtype=np.uint64)
        result[result == 0] = 1
        return result

    def is_zero(self, row: int) -> bool:
        """Whether one page holds nothing but zeros."""
        return not row or self._pool[row].tobytes() == self._zeros

    def zero(self, rows: Rows) -> NDArray[np.bool_]:
        """Which pages hold nothing but zeros."""
        result: NDArray[np.bool_] = rows == 0
        index = np.flatnonzero(~result)
        result[index] = ~self._pool[rows[index]].any(axis=1)
        return result
