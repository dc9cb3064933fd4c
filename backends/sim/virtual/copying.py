"""Reading and writing the bytes of a task's memory: an access to each page, then what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.virtual import touch
from pmcore.backends.sim.virtual.pte import FIELD
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.errors import AddressSpaceFault

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["read", "write"]

#: Fewer pages than this one by one; and as many as this at once, with so much memory left that none is reclaimed.
_MANY, _PIECE = 8, 1 << 13
_SPARE = 1 << 10
_Access = Callable[[int, bool], int]


def read(core: Core, mm: AddressSpace, start: int, length: int, access: _Access) -> bytes:
    """The bytes; `access` is for one page. Raises AddressSpaceFault at the first page that cannot be accessed."""
    size, contents, frames = core.geometry.page_size, core.memory.contents, core.memory.frames
    pieces = []
    for place, stop in _pieces(core, mm, start, start + length, write=False):
        if stop - place > size:
            pfns, failed = _many(core, mm, place, stop, write=False)
            if failed is not None:
                raise failed
            out = np.empty(stop - place, dtype=np.uint8)
            contents.read_pages(core.memory.frames.content[pfns], out)
            pieces.append(out.tobytes())
            continue
        pfn = access(place, False)
        pieces.append(contents.read(frames.content_at[pfn], place & size - 1, stop - place))
    return b"".join(pieces)


def write(core: Core, mm: AddressSpace, start: int, data: bytes, access: _Access) -> None:
    """Write the bytes; up to the first page that cannot be accessed, which raises AddressSpaceFault."""
    size, contents = core.geometry.page_size, core.memory.contents
    view = memoryview(data)
    for place, stop in _pieces(core, mm, start, start + len(data), write=True):
        part = view[place - start : stop - start]
        if stop - place > size:
            pfns, failed = _many(core, mm, place, stop, write=True)
            frames = core.memory.frames
            frames.content[pfns] = contents.write_pages(frames.content[pfns], part[: len(pfns) * size])
            if failed is not None:
                raise failed
            continue
        pfn = access(place, True)
        frames = core.memory.frames
        frames.content_at[pfn] = contents.write(frames.content_at[pfn], place & size - 1, bytes(part))


def _pieces(core: Core, mm: AddressSpace, start: int, end: int, *, write: bool) -> Iterator[tuple[int, int]]:
    """The range in pieces: parts of one page, or many whole pages of one VMA that may be accessed at once."""
    size, forbidden = core.geometry.page_size, VmFlag.HUGETLB | VmFlag.UFFD
    while start < end:
        stop = min(end, (start & -size) + size)
        if end - start >= _MANY * size and not start & size - 1 and core.on_fault is None:
            vma = mm.vmas.at(start)
            many = min(end & -size, vma.end, start + _PIECE * size) if vma is not None else 0
            pages = many - start >> core.geometry.page_shift
            enough = core.memory.spare > 2 * pages + _SPARE and not core.memory.charging
            if pages >= _MANY and enough and vma is not None and not vma.flags & forbidden:
                stop = many
        yield start, stop
        start = stop


def _many(
    core: Core, mm: AddressSpace, start: int, end: int, *, write: bool
) -> tuple[Pfns, AddressSpaceFault | None]:
    """Access whole pages: the frames of those that could be, and what stopped at the next."""
    failed = None
    try:
        touch.touch(core, mm, start, end, write=write)
    except AddressSpaceFault as fault_:
        failed, end = fault_, fault_.address & -core.geometry.page_size
    shift, found = core.geometry.page_shift, [np.zeros(0, dtype=np.int64)]
    for extent in mm.tables.extents(start, end) if start < end else ():
        pfns = (extent.entries & np.uint64(FIELD)).view(np.int64)
        if extent.huge:
            pfns = (pfns[:, None] + np.arange(core.geometry.pmd_pages, dtype=np.int64)).reshape(-1)
            low = max(start - extent.start, 0) >> shift
            pfns = pfns[low : low + (min(end, extent.end) - max(start, extent.start) >> shift)]
        found.append(pfns)
    return np.concatenate(found), failed
