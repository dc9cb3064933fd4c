"""What a file's blocks on the disk hold: nothing (a hole), data, or room that was set aside.

One word a page in the inode's index `blocks`: 0 for a hole; else what the block is, in the bits from KIND on, and the
row of its contents below. A block is as large as a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pmcore.arrays import U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.physical.contents import Rows
    from pmcore.backends.sim.services.pagecache import Inode

__all__ = ["DELAYED", "KIND", "ROW", "UNWRITTEN", "WRITTEN", "clear", "rows", "store", "store_one"]

#: Written; set aside and not written (reads as zeros); not there yet, for its page is to be written first.
WRITTEN, UNWRITTEN, DELAYED = 1 << 32, 2 << 32, 3 << 32
KIND, ROW = 3 << 32, (1 << 32) - 1


def rows(words: U64Array) -> Rows:
    """Rows of contents that the words name, 0 for zeros."""
    return (words & np.uint64(ROW)).astype(np.int32)


def clear(core: Core, inode: Inode, first: int, end: int) -> None:
    """Make holes of the blocks from `first` to `end`."""
    words = inode.blocks.cut(first, end)
    inode.shadows.clear(first, end)
    if len(words):
        core.memory.contents.give_back(rows(words))


def store_one(core: Core, inode: Inode, page: int, pfn: int) -> None:
    """`store` for one page."""
    contents, row = core.memory.contents, inode.blocks.get(page) & ROW
    if row:
        contents.free_rows.append(row)
    copy = contents.copy_one(core.memory.frames.content_at[pfn])
    inode.blocks.set(page, copy | WRITTEN)


def store(core: Core, inode: Inode, pages: Pfns, pfns: Pfns) -> None:
    """Write pages of the cache (ascending) to their blocks."""
    contents = core.memory.contents
    contents.give_back(rows(inode.blocks.at(pages)))
    copies = contents.copies(core.memory.frames.content[pfns])
    inode.blocks.put(pages, copies.astype(np.uint64) | np.uint64(WRITTEN))
