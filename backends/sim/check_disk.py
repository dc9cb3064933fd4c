"""The invariants of files on a disk, and what an invariant that does not hold looks like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.services import blocks
from pmcore.backends.sim.virtual.pte import DIRTY, FIELD, PRESENT, WRITE
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.services.pagecache import Inode
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["Finding", "disk_findings", "some"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)


@attrs.frozen
class Finding:
    """An invariant that does not hold: its name, and where."""

    invariant: str
    where: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.where}"


def some(index: NDArray[Any]) -> str:
    """The first few of some numbers."""
    shown = ", ".join(f"{value:#x}" for value in index[:4].tolist())
    return f"{shown}{'...' if len(index) > 4 else ''}"


def disk_findings(core: Core, spaces: list[AddressSpace]) -> Iterator[Finding]:
    """Files on a disk: blocks, what of them is cached, and entries that may be written."""
    files = [inode for inode in core.inodes.values() if inode.on_disk]
    if not files:
        return
    for inode in files:
        yield from _blocks(core, inode)
    frames = core.memory.frames
    for mm in spaces:
        for vma in mm.vmas:
            if (vma.opened is None) != (vma.file is None or not vma.file.on_disk):
                yield Finding(
                    "what maps a file on a disk, and nothing else, has an open file", f"{vma.start:#x}"
                )
            if vma.opened is None or vma.file is None:
                continue
            start, size, ahead = vma.opened.window
            if vma.opened.inode is not vma.file or not (0 <= ahead <= size and start >= 0):
                yield Finding(
                    "an open file is its mapping's, and what it read ahead a window", f"{vma.start:#x}"
                )
            for extent in mm.tables.extents(vma.start, vma.end):
                present = (extent.entries & _PRESENT) != 0
                pfns = (extent.entries[present] & _FIELD).astype(np.int64)
                cached = (frames.flags[pfns] & np.uint64(CACHED)) != 0
                bits = DIRTY | WRITE if vma.flags & VmFlag.SHARED else WRITE
                touched = cached & ((extent.entries[present] & np.uint64(bits)) != 0)
                wrong = touched & ((frames.flags[pfns] & np.uint64(PageFlag.DIRTY)) == 0)
                if wrong.any():
                    yield Finding("what may be written of a file on a disk is dirty", some(pfns[wrong]))


def _blocks(core: Core, inode: Inode) -> Iterator[Finding]:
    frames, where = core.memory.frames, f"inode {inode.number}"
    pages, words = inode.blocks.used()
    kinds, rows = words & np.uint64(blocks.KIND), blocks.rows(words)
    if (kinds == 0).any() or (rows[kinds != np.uint64(blocks.WRITTEN)] != 0).any():
        yield Finding("a block is a hole, set aside, delayed, or written and has contents", where)
    cached, held = inode.index.used()
    pfns = (held & _FIELD).astype(np.int64)
    flags = frames.flags[pfns]
    dirty = cached[(flags & np.uint64(PageFlag.DIRTY)) != 0]
    if not np.isin(pages[kinds == np.uint64(blocks.DELAYED)], dirty).all():
        yield Finding("the page of a delayed block is dirty", where)
    if not np.isin(dirty, pages).all():
        yield Finding("a dirty page has room on the disk", where)
    need = np.uint64(PageFlag.DIRTY | PageFlag.PRIVATE)
    if ((flags & need) == np.uint64(PageFlag.DIRTY)).any():
        yield Finding("a dirty page of a file on a disk has buffers", where)
    if len(cached) and int(cached[-1]) >= -(-inode.size // core.geometry.page_size):
        yield Finding("nothing behind the end of a file on a disk is cached", where)
    remembered = inode.shadows.used()[0]
    if np.isin(remembered, cached).any():
        yield Finding("what is cached is not remembered as reclaimed", where)
