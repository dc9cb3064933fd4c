"""Idle page tracking: what reading and writing page_idle/bitmap does to frames and entries (rules ID-001 to ID-009).

Frames are marked by two flags: IDLE, which kpageflags shows, and MOVED_YOUNG, which keeps for reclaim what was known
of an access when its accessed bit was taken. Both are a folio's: all its pages have them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.physical.frames import MOVED_YOUNG
from pmcore.backends.sim.services import lru, migrating
from pmcore.backends.sim.virtual import rmap
from pmcore.backends.sim.virtual.pte import YOUNG
from pmcore.protocols import IDLE_BITMAP
from pmcore.uapi import Errno, PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray, U64Array
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns

__all__ = ["mark", "read", "used", "write"]

_ALL = (1 << 64) - 1
_IDLE, _LRU = int(PageFlag.IDLE), int(PageFlag.LRU)
_STATE = np.uint64(_LRU | int(PageFlag.COMPOUND_TAIL))
#: What one system call takes at the most.
_PAGE = 4096


def used(core: Core) -> bool:
    """Whether any frame was ever marked idle."""
    return "page_idle" in core.numbers


def read(core: Core, offset: int, length: int) -> bytes:
    """What read(2) gives: a bit a frame, brought up to date. Refused with EINVAL."""
    first, count = _span(core, "pread", offset, length)
    bits = np.zeros(count, dtype=np.bool_)
    frames = core.memory.frames
    flags = frames.flags[first : first + count]
    heads = np.flatnonzero((flags & (_STATE | np.uint64(_IDLE))) == np.uint64(_LRU | _IDLE)) + first
    if len(heads):
        _take_accesses(core, heads)
        bits[heads - first] = (frames.flags[heads] & np.uint64(_IDLE)) != 0
    # A last word that memory does not fill is not given.
    return np.packbits(bits[: count & -64], bitorder="little").tobytes()


def write(core: Core, offset: int, data: bytes) -> int:
    """What write(2) does: frames whose bit is set become idle; the bytes taken. Refused with EINVAL, ENXIO."""
    first, count = _span(core, "pwrite", offset, len(data))
    if data and first >= core.memory.frames.count:
        refuse(Errno.ENXIO, f"pwrite({IDLE_BITMAP}, {len(data)} bytes, {offset})")
    bits = np.unpackbits(np.frombuffer(data[:_PAGE], dtype=np.uint8), bitorder="little")[:count]
    mark(core, np.flatnonzero(bits) + first)
    return (count & -64) // 8


def mark(core: Core, pfns: Pfns) -> None:
    """Make frames idle: those on an LRU list, of compound pages the heads; for others nothing happens (ID-004)."""
    frames = core.memory.frames
    pfns = pfns[pfns < frames.rows]
    heads = pfns[(frames.flags[pfns] & _STATE) == np.uint64(_LRU)]
    if not len(heads):
        return
    _take_accesses(core, heads)
    core.numbers["page_idle"] = 1
    lru.set_flags(core, heads, add=_IDLE)


def _span(core: Core, call: str, offset: int, length: int) -> tuple[int, int]:
    """First frame and number of frames of a call; one takes a page of the bitmap at the most."""
    length = min(length, _PAGE)
    if length == 0:
        return 0, 0
    if offset % 8 or length % 8 or offset < 0 or length < 0:
        refuse(Errno.EINVAL, f"{call}({IDLE_BITMAP}, {length}, {offset})")
    first = offset * 8
    return first, max(0, min(length * 8, core.memory.frames.count - first))


def _take_accesses(core: Core, heads: Pfns) -> None:
    """Take the accessed bits off all entries that map these folios; those that had one are not idle, and kept young."""
    migrating.still(core, "idle page tracking")
    maps, folios, young = _accesses(core, heads)
    if not young.any():
        return
    core.pool.flat[maps.slots[young]] &= np.uint64(~YOUNG & _ALL)
    seen = np.zeros(len(heads), dtype=np.bool_)
    seen[folios[young]] = True
    lru.set_flags(core, heads[seen], add=MOVED_YOUNG, remove=_IDLE)


def _accesses(core: Core, heads: Pfns) -> tuple[rmap.Mappings, U64Array, BoolArray]:
    frames = core.memory.frames
    chosen = np.zeros(frames.rows, dtype=np.bool_)
    chosen[lru.pages_of(core, heads)] = True
    maps = rmap.find(core, core.spaces.values(), chosen)
    place = np.zeros(frames.rows, dtype=np.uint64)
    place[heads] = np.arange(len(heads), dtype=np.uint64)
    young: BoolArray = (core.pool.flat[maps.slots] & np.uint64(YOUNG)) != 0
    return maps, place[maps.pfns - frames.behind[maps.pfns]], young
