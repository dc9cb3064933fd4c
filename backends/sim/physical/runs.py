"""Frames that are neighbours, as slices: columns of the frame table are then read and written in place."""

from __future__ import annotations

import itertools
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["at", "runs"]

_T = TypeVar("_T", bound=np.generic)

#: Fewer frames than this, or shorter runs on average, are faster as an array.
_LONG = 64


def runs(pfns: NDArray[np.int64]) -> list[tuple[slice, slice | NDArray[np.int64]]]:
    """The frames, in their order, in pieces: which of them (a slice of the array), and the index that names these.

    An index is a slice where they are long runs of neighbours, ascending; otherwise there is one piece, the array.
    """
    count = len(pfns)
    if count >= _LONG:
        first = pfns.item(0)
        if pfns.item(count - 1) - first == count - 1 and bool((pfns[1:] > pfns[:-1]).all()):
            return [(slice(0, count), slice(first, first + count))]
        cuts = np.flatnonzero(pfns[1:] - pfns[:-1] != 1) + 1
        if len(cuts) * _LONG < count:
            found: list[tuple[slice, slice | NDArray[np.int64]]] = []
            for low, high in itertools.pairwise([0, *cuts.tolist(), count]):
                first = pfns.item(low)
                found.append((slice(low, high), slice(first, first + high - low)))
            return found
    return [(slice(0, count), pfns)]


def at(column: NDArray[_T], pfns: NDArray[np.int64]) -> NDArray[_T]:
    """What a column holds for the frames, to be read only: a view where they are neighbours."""
    count = len(pfns)
    if count >= _LONG:
        first = pfns.item(0)
        if pfns.item(count - 1) - first == count - 1 and bool((pfns[1:] > pfns[:-1]).all()):
            return column[first : first + count]
    return column[pfns]
