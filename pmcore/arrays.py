"""Names for the array types that all rooms share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["BoolArray", "U64Array", "as_words"]

#: 64-bit words, one a page or frame, in native byte order.
U64Array: TypeAlias = NDArray[np.uint64]
#: One truth value a page or frame.
BoolArray: TypeAlias = NDArray[np.bool_]


def as_words(values: ArrayLike) -> U64Array:
    """`values` as 64-bit words; no copy where they are that already."""
    return np.asarray(values, dtype=np.uint64)
