"""folio_mark_accessed: what an access that the kernel itself notes does to a page's place on the LRU lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.physical.runs import runs
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["mark", "mark_one"]

_ALL = (1 << 64) - 1
_REFERENCED, _ACTIVE, _IDLE = int(PageFlag.REFERENCED), int(PageFlag.ACTIVE), int(PageFlag.IDLE)
_UNEVICTABLE, _KSM = int(PageFlag.UNEVICTABLE), int(PageFlag.KSM)
#: Pages with none of these become referenced, and that is all.
_NOT_PLAIN = _REFERENCED | _KSM | COMPOUND


def mark(core: Core, pfns: Pfns) -> None:
    """folio_mark_accessed for each page: referenced at first, active the second time, and not idle."""
    frames = core.memory.frames
    if "page_idle" in core.numbers:
        frames.flags[core.memory.whole_folios(pfns)] &= np.uint64(~_IDLE & _ALL)
    rest = []
    for part, where in runs(pfns):
        flags = frames.flags[where]
        if isinstance(where, slice) and not int(np.bitwise_or.reduce(flags)) & _NOT_PLAIN:
            flags |= np.uint64(_REFERENCED)  # a view
        else:
            rest.append(pfns[part])
    if not rest:
        return
    pfns = rest[0] if len(rest) == 1 else np.concatenate(rest)
    flags = frames.flags[pfns]
    compound = (flags & np.uint64(COMPOUND)) != 0
    if compound.any():
        heads, counts = np.unique(pfns[compound] - frames.behind[pfns[compound]], return_counts=True)
        for head, count in zip(heads.tolist(), counts.tolist(), strict=True):
            _folio(core, head, count)
        pfns, flags = pfns[~compound], flags[~compound]
    merged = (flags & np.uint64(_KSM)) != 0
    if merged.any():  # the same page, as often as it is mapped
        again, times = np.unique(pfns[merged], return_counts=True)
        for pfn, count in zip(again.tolist(), times.tolist(), strict=True):
            _merged(core, pfn, count)
        pfns, flags = pfns[~merged], flags[~merged]
    referenced = (flags & np.uint64(_REFERENCED)) != 0
    frames.flags[pfns[~referenced]] |= np.uint64(_REFERENCED)
    again = pfns[referenced & ((flags & np.uint64(_UNEVICTABLE | _ACTIVE)) == 0)]
    frames.flags[again] = frames.flags[again] & np.uint64(~_REFERENCED & _ALL) | np.uint64(_ACTIVE)
    core.memory.on_lru_pages(again)


def mark_one(core: Core, pfn: int) -> None:
    """`mark` for one page."""
    frames = core.memory.frames
    flags = frames.flags_at[pfn]
    if flags & _IDLE:
        head = pfn - frames.behind_at[pfn]
        frames.clear_bits(head, core.memory.large[head].pages if flags & COMPOUND else 1, _IDLE)
        flags &= ~_IDLE
    if flags & COMPOUND:
        _folio(core, pfn - frames.behind_at[pfn], 1)
    elif not flags & _REFERENCED:
        frames.flags_at[pfn] = flags | _REFERENCED
    elif not flags & (_UNEVICTABLE | _ACTIVE):
        frames.flags_at[pfn] = flags & ~_REFERENCED | _ACTIVE
        core.memory.on_lru(pfn)


def _merged(core: Core, pfn: int, times: int) -> None:
    """`mark` for a merged page: a batch makes it active, after it has been marked as often as it is mapped (KS-004)."""
    flags, activated = core.memory.frames.flags_at[pfn], False
    for _ in range(times):
        if not flags & _REFERENCED:
            flags |= _REFERENCED
        elif not flags & (_UNEVICTABLE | _ACTIVE):
            flags, activated = flags & ~_REFERENCED, True
    core.memory.frames.flags_at[pfn] = flags | (_ACTIVE if activated else 0)
    if activated:
        core.memory.on_lru(pfn)


def _folio(core: Core, head: int, times: int) -> None:
    frames = core.memory.frames
    pages = core.memory.large[head].pages if frames.flags_at[head] & COMPOUND else 1
    for _ in range(min(times, 3)):
        flags = frames.flags_at[head]
        if not flags & _REFERENCED:
            frames.set_bits(head, pages, _REFERENCED)
        elif not flags & (_UNEVICTABLE | _ACTIVE):
            frames.clear_bits(head, pages, _REFERENCED)
            frames.set_bits(head, pages, _ACTIVE)
            core.memory.on_lru(head, pages)
