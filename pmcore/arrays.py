"""Names for the array types that all rooms share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["BoolArray", "U64Array"]

#: 64-bit words, one a page or frame, in native byte order.
U64Array: TypeAlias = NDArray[np.uint64]
#: One truth value a page or frame.
BoolArray: TypeAlias = NDArray[np.bool_]
