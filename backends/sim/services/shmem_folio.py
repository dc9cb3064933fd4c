"""Large folios in the cache of shared memory, taken apart: by a hole or a new end that lies inside one, or on request.

Who takes one apart unmaps it everywhere first, and faults map again what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmcore.backends.sim.services import pagecache
from pmcore.backends.sim.virtual import filepmd
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.folios import LargeFolio
    from pmcore.backends.sim.services.pagecache import Inode

__all__ = ["cut", "split"]

#: Parts of a folio: first page and order of each.
_Parts = list[tuple[int, int]]


def _holder(core: Core, inode: Inode, page: int) -> LargeFolio | None:
    """The large folio that holds a page of the file, if one does."""
    word, frames = inode.index.get(page), core.memory.frames
    head = (word & FIELD) - frames.behind_at[word & FIELD] if word & PRESENT else -1
    return core.memory.large.get(head) if head >= 0 and core.memory.large else None


def cut(core: Core, inode: Inode, start: int, end: int) -> None:
    """Before bytes from `start` to `end` of the file go: take apart the folios that they are only a part of.

    Kernels differ in what that gives: single pages, or the largest parts that leave the edges of the range alone.
    """
    if not core.memory.large:
        return
    size = core.geometry.page_size
    folio, same = _holder(core, inode, start // size), start // size == (end - 1) // size
    if folio is not None:
        first = int(core.memory.frames.index[folio.head])
        same = end <= (first + folio.pages) * size
        _cut_one(core, inode, folio, start, end)
    if not same:
        folio = _holder(core, inode, (end - 1) // size)
        if folio is not None:
            _cut_one(core, inode, folio, start, end)


def _cut_one(core: Core, inode: Inode, folio: LargeFolio, start: int, end: int) -> None:
    """Take apart the folio unless all of it lies in the range."""
    size, frames = core.geometry.page_size, core.memory.frames
    first = int(frames.index[folio.head])
    low, high = max(start, first * size), min(end, (first + folio.pages) * size)
    frames.set_bits(folio.head, folio.pages, int(PageFlag.DIRTY))
    if high - low == folio.pages * size:
        return
    if not core.caps.folio_split:
        split(core, inode, folio)
        return
    whole = high == (first + folio.pages) * size
    split(core, inode, folio, at=low // size)
    other = None if whole else _holder(core, inode, high // size)
    if other is not None:
        split(core, inode, other, at=high // size)


def split(core: Core, inode: Inode, folio: LargeFolio, *, at: int = -1) -> None:
    """Unmap a folio and make parts of it: single pages, or halves and halves of halves around page `at` of the file.

    Parts that begin behind the end of the file are gone, unless fallocate has set them aside.
    """
    frames, head, pages = core.memory.frames, folio.head, folio.pages
    first, order = int(frames.index[head]), folio.order
    filepmd.unmap(core, inode, first, first + pages)
    core.mlocks.pop(head, None)
    parts = [(n, 0) for n in range(pages)] if at < 0 else _halves(order, at - first)
    if order == core.geometry.pmd_order:
        core.count("thp_split_page")
    core.count("split_folio")
    core.memory.divide(core.memory.large[head], parts)
    size = core.geometry.page_size
    end = max(-(-inode.size // size), inode.fallocend)
    gone = [first + n for n, _ in parts if first + n >= end]
    if gone:
        pagecache.remove(core, inode, gone[0], first + pages)


def _halves(order: int, at: int) -> _Parts:
    """A folio of that order halved again and again, down to the single page `at`."""
    parts, begin = [(at, 0)], 0
    for half in range(order - 1, -1, -1):
        middle = begin + (1 << half)
        parts.append((begin if at >= middle else middle, half))
        begin = middle if at >= middle else begin
    return sorted(parts)
