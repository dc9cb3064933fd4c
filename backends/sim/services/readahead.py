"""Reading pages of a file before anybody asked for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.services import diskfile
from pmcore.backends.sim.services.pagecache import Inode

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["force"]


def force(core: Core, inode: Inode, first: int, end: int) -> None:
    """Read what is not in the cache of a range, as far as the file and memory reach (MADV_WILLNEED)."""
    size = core.geometry.page_size
    end = min(end, -(-inode.size // size))
    if first >= end:
        return
    missing = np.flatnonzero(inode.index.load(first, end - first) == 0) + first
    diskfile.read_in(core, inode, missing)
