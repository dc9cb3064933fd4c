"""/proc/kpageflags, kpagecount and kpagecgroup, derived from the frame table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import BoolArray, U64Array
from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE, SHOWN
from pmcore.backends.sim.services import memcg
from pmcore.protocols import FrameFile
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["fill"]

_MMAP = PageFlag.MMAP.bit_length() - 1
_ANON, _KSM = PageFlag.ANON.bit_length() - 1, PageFlag.KSM.bit_length() - 1
_TAIL = np.uint64(PageFlag.COMPOUND_TAIL)


def fill(core: Core, file: FrameFile, start: int, out: U64Array) -> int:
    """Fill `out` from frame `start` on; fewer only at the end of memory."""
    frames = core.memory.frames
    count = min(len(out), max(0, frames.count - start))
    out = out[:count]
    rows = max(0, min(count, frames.rows - start))
    touched, rest = out[:rows], out[rows:]
    span = slice(start, start + rows)
    if file is FrameFile.KPAGECOUNT:
        touched[:] = frames.mapcount[span]
        rest[:] = 0
    elif file is FrameFile.KPAGEFLAGS:
        flags = frames.flags[span]
        np.bitwise_and(flags, np.uint64(SHOWN & core.caps.shown_flags), out=touched)
        if core.caps.anon_exclusive:
            exclusive = flags & np.uint64(ANON_EXCLUSIVE)
            if core.memory.large or core.hugetlb.folios:
                tails = np.flatnonzero(touched & _TAIL)
                heads = tails + start - frames.behind[span][tails]
                if core.caps.folio_flags:
                    exclusive[tails] = frames.flags[heads] & np.uint64(ANON_EXCLUSIVE)
                else:  # of pages that a PMD maps, the first alone is marked
                    exclusive[tails[_mapped_by_pmd(core, heads)]] = 0
            exclusive >>= np.uint64(26)
            touched |= exclusive
        if core.caps.ksm_on_every_anon:
            anon = touched & np.uint64(PageFlag.ANON)
            touched |= anon << np.uint64(_KSM - _ANON)
        mapped = (frames.mapcount[span] > 0).view(np.uint8).astype(np.uint64)
        mapped <<= np.uint64(_MMAP)
        touched |= mapped
        if core.memory.large:
            _partly_mapped(core, touched, start)
        if not core.caps.folio_flags:
            tails = (touched & _TAIL) != 0
            touched[tails] &= np.uint64(core.caps.tail_flags)
        rest[:] = 0
        _untouched(core, start, out)
        if core.caps.buddy_first_only:
            _heads_only(core, start, out)
    else:
        out[:] = 0
        if core.memory.grouped:
            _groups(core, start, touched)
    return count


def _groups(core: Core, start: int, touched: U64Array) -> None:
    """The cgroup's inode of each frame that is charged (KG-001); without groups nobody keeps account."""
    end = start + len(touched)
    there = memcg.charged(core, start, end)
    if not core.caps.memcg_of_tails:
        there &= (core.memory.frames.flags[start:end] & _TAIL) == 0
    touched[there] = core.groups.inodes(core.memory.frames.group[start:end][there])


def _mapped_by_pmd(core: Core, heads: NDArray[np.int64]) -> BoolArray:
    """Of pages of large folios with these heads, those whose folio a PMD maps."""
    folios = core.memory.large
    entire = [h for h in np.unique(heads).tolist() if h in folios and folios[h].entire]
    return np.isin(heads, np.array(entire, dtype=np.int64))


def _untouched(core: Core, start: int, out: U64Array) -> None:
    """Memory that nobody has used yet is free; what belongs to no zone is a hole."""
    end = start + len(out)
    position = start
    for zone in sorted(core.memory.zones, key=lambda zone: zone.start):
        if zone.start > position:
            out[max(position, start) - start : max(min(zone.start, end) - start, 0)] = core.caps.hole_flags
        low, high = max(zone.frontier, start), min(zone.end, end)
        if low < high:
            out[low - start : high - start] = int(PageFlag.BUDDY)
        position = zone.end
    if position < end:
        out[max(position, start) - start :] = core.caps.hole_flags


def _partly_mapped(core: Core, touched: U64Array, start: int) -> None:
    """A page of a large folio shows MMAP if any page of the folio is mapped (KF-012)."""
    frames = core.memory.frames
    compound = np.uint64(PageFlag.COMPOUND_HEAD | PageFlag.COMPOUND_TAIL)
    loose = np.flatnonzero(((touched & compound) != 0) & ((touched & np.uint64(PageFlag.MMAP)) == 0))
    heads = loose + start - frames.behind[start : start + len(touched)][loose]
    for head in np.unique(heads).tolist():
        folio = core.memory.large.get(head)
        if folio is not None and folio.mapped and core.migration is None:
            touched[loose[heads == head]] |= np.uint64(PageFlag.MMAP)


def _heads_only(core: Core, start: int, out: U64Array) -> None:
    """Before 4.6 a free block showed BUDDY on its first page alone."""
    frames = core.memory.frames
    pfns = np.arange(start, start + len(out))
    head = np.zeros(len(out), dtype=np.bool_)
    inside = pfns < frames.rows
    head[inside] = frames.free_order[pfns[inside]] != 0
    for zone in core.memory.zones:
        head |= (pfns >= zone.frontier) & (pfns < zone.end) & (pfns % 1024 == 0)
    out[~head] &= np.uint64(~int(PageFlag.BUDDY) & (1 << 64) - 1)
