"""Lists of pages in ranges, joined as page-types --list joins them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pmcore.analysis.rows import FrameRows

__all__ = ["RANGE_DTYPE", "page_ranges"]

#: One range: where it begins (page in address space or file, frame or swap offset), pages, and what they share.
RANGE_DTYPE = np.dtype(
    [
        ("voffset", "<u8"),
        ("offset", "<u8"),
        ("pages", "<u8"),
        ("flags", "<u8"),
        ("cgroup", "<u8"),
        ("mapcount", "<u8"),
    ]
)


def page_ranges(rows: Iterable[FrameRows]) -> Iterator[NDArray[np.void]]:
    """RANGE_DTYPE arrays: rows joined where both offsets go on and flags, cgroup and map count are equal.

    The last range of a batch is held back until it is known where it ends, so ranges do not depend on batches.
    """
    held = np.zeros(0, dtype=RANGE_DTYPE)
    for batch in rows:
        if len(batch) == 0:
            continue
        ranges = _join(held, _runs(batch))
        held = ranges[-1:]
        if len(ranges) > 1:
            yield ranges[:-1]
    if len(held):
        yield held


def _runs(rows: FrameRows) -> NDArray[np.void]:
    """The ranges of one batch."""
    step = (np.diff(rows.voffset) != 1) | (np.diff(rows.offset) != 1)
    for column in (rows.flags, rows.cgroup, rows.mapcount):
        step |= column[1:] != column[:-1]
    first = np.append(0, np.flatnonzero(step) + 1)
    ranges = np.zeros(len(first), dtype=RANGE_DTYPE)
    for name in ("voffset", "offset", "flags", "cgroup", "mapcount"):
        ranges[name] = getattr(rows, name)[first]
    ranges["pages"] = np.diff(first, append=len(rows))
    return ranges


def _join(held: NDArray[np.void], ranges: NDArray[np.void]) -> NDArray[np.void]:
    """`held` (none or one range) before `ranges`, joined to the first of them where it goes on."""
    if len(held) == 0:
        return ranges
    a, b = held[0], ranges[0]
    goes_on = a["voffset"] + a["pages"] == b["voffset"] and a["offset"] + a["pages"] == b["offset"]
    if goes_on and all(a[name] == b[name] for name in ("flags", "cgroup", "mapcount")):
        joined = ranges.copy()
        joined["voffset"][0], joined["offset"][0] = a["voffset"], a["offset"]
        joined["pages"][0] += a["pages"]
        return joined
    return np.concatenate([held, ranges])
