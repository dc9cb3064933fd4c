"""Text of /proc as read(2) gives it: whole records at a time, as many as fit in the kernel's buffer (rule FS-004)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

__all__ = ["SequenceReader"]


class SequenceReader:
    """One open text. `show` makes it, as a list of records; it is made anew where reading does not go on (FS-005)."""

    def __init__(self, show: Callable[[], Sequence[bytes]], *, buffer: int) -> None:
        self._show = show
        self._buffer = buffer
        self._text = b""
        #: Where each record ends.
        self._ends: list[int] = []
        self._position = -1

    def read(self, offset: int, size: int) -> bytes:
        """What one read(2) of `size` bytes at `offset` gives: often less than there is. Empty only at the end."""
        if offset == 0 or offset != self._position:
            self._make()
        found = self._next(offset, size)
        self._position = offset + len(found)
        return found

    def _make(self) -> None:
        records = self._show()
        self._text = b"".join(records)
        self._ends, end = [], 0
        for record in records:
            if record:
                end += len(record)
                self._ends.append(end)

    def _next(self, offset: int, size: int) -> bytes:
        index = bisect_right(self._ends, offset)
        if index == len(self._ends) or size <= 0:
            return b""
        start, end = self._ends[index - 1] if index else 0, offset
        if offset > start:
            # The rest of a record that an earlier read cut stays in the buffer, and comes first.
            end = self._ends[index]
            if end - offset >= size:
                return self._text[offset : offset + size]
            index += 1
        full = end
        while index < len(self._ends):
            length = self._ends[index] - full
            if full == end:
                while length >= self._buffer:
                    self._buffer *= 2
            elif full - offset >= size or self._ends[index] - end >= self._buffer:
                break
            full = self._ends[index]
            index += 1
        return self._text[offset : min(full, offset + size)]
