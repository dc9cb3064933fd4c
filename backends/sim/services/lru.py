"""The LRU lists of anonymous memory and of files on a disk: derived from the frame table when needed.

They age as the classic LRU does.

A folio is on a list by its flags (LRU, ACTIVE, not UNEVICTABLE), at the place that its column `lru` says: smaller is
nearer to the tail. Folios are named by their first frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.frames import CACHED, MOVED_YOUNG
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.virtual import rmap
from pmcore.backends.sim.virtual.pte import YOUNG
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.arrays import BoolArray
    from pmcore.backends.sim.machine import Core

__all__ = [
    "Look",
    "active",
    "deactivate",
    "forget",
    "inactive",
    "look",
    "pages_of",
    "set_flags",
    "sizes",
    "to_head",
    "to_tail",
]

_ALL = (1 << 64) - 1
_ACTIVE, _REFERENCED = int(PageFlag.ACTIVE), int(PageFlag.REFERENCED)
_SWAPBACKED, _LRU, _IDLE = int(PageFlag.SWAPBACKED), int(PageFlag.LRU), int(PageFlag.IDLE)
#: Of anonymous memory (in the swap cache also what nobody has mapped yet), and able to go; of files, those on a disk.
_KIND = int(PageFlag.ANON | PageFlag.SWAPCACHE)
_FILE = _KIND | CACHED
_STATE = _LRU | int(PageFlag.UNEVICTABLE | PageFlag.COMPOUND_TAIL | PageFlag.HUGE)

#: Pages that move over at a time, at least (SWAP_CLUSTER_MAX).
_BATCH = 32


def _list(core: Core, *, active: bool, swapbacked: bool) -> Pfns:
    frames = core.memory.frames
    flags = frames.flags
    wanted = _LRU | (_ACTIVE if active else 0) | (_SWAPBACKED if swapbacked else 0)
    there = (flags & np.uint64(_STATE | _ACTIVE | _SWAPBACKED)) == np.uint64(wanted)
    there &= (flags & np.uint64(_KIND if swapbacked else _FILE)) != 0
    if core.groups.reclaimed is not None:
        there &= np.isin(frames.group, core.groups.reclaimed)
    heads = np.flatnonzero(there)
    return heads[np.argsort(frames.lru[heads], kind="stable")]


def inactive(core: Core, *, swapbacked: bool) -> Pfns:
    """The inactive list, its tail first: of anonymous memory, or of files and the lazily freed."""
    return _list(core, active=False, swapbacked=swapbacked)


def active(core: Core, *, swapbacked: bool = True) -> Pfns:
    """The active list of anonymous memory, or of files, its tail first."""
    return _list(core, active=True, swapbacked=swapbacked)


def sizes(core: Core, heads: Pfns) -> NDArray[np.int64]:
    """Pages of each folio."""
    pages = np.ones(len(heads), dtype=np.int64)
    if not core.memory.large:
        return pages
    compound = (core.memory.frames.flags[heads] & np.uint64(COMPOUND)) != 0
    pages[compound] = np.int64(1) << core.memory.large.orders(heads[compound])
    return pages


def pages_of(core: Core, heads: Pfns) -> Pfns:
    """All frames of the folios, in order."""
    if not core.memory.large:
        return heads
    pages = sizes(core, heads)
    if len(heads) == int(pages.sum()):
        return heads
    return np.concatenate([np.arange(h, h + n) for h, n in zip(heads.tolist(), pages.tolist(), strict=True)])


def to_head(core: Core, heads: Pfns) -> None:
    """Put folios at the head of their list, one after the other."""
    _stamp(core, heads, core.memory.lru_clock)
    core.memory.lru_clock += len(heads)


def to_tail(core: Core, heads: Pfns) -> None:
    """Put folios at the tail of their list: the last of them is the next to go, as the kernel rotates them."""
    core.memory.lru_tail -= len(heads)
    _stamp(core, heads[::-1], core.memory.lru_tail)


def _stamp(core: Core, heads: Pfns, first: int) -> None:
    stamps = np.arange(first, first + len(heads), dtype=np.int64)
    frames = core.memory.frames
    frames.lru[heads] = stamps
    if not core.memory.large:
        return
    for index in np.flatnonzero((frames.flags[heads] & np.uint64(COMPOUND)) != 0).tolist():
        head = int(heads[index])
        frames.lru[head : head + core.memory.large[head].pages] = stamps[index]


class Look(NamedTuple):
    """What the entries that map some folios say: the entries, and by folio what was found."""

    maps: rmap.Mappings
    #: For each mapping the folio, as an index into those that were asked about.
    folios: NDArray[np.int64]
    young: BoolArray
    #: By folio: entries that were accessed since the last look; whether a locked VMA maps it.
    references: NDArray[np.int64]
    locked: BoolArray
    #: Whether a VMA that may execute it accessed it.
    executed: BoolArray


def look(core: Core, heads: Pfns) -> Look:
    """Who maps these folios, and was it accessed (folio_referenced). Changes nothing yet: see `forget`.

    An access whose bit idle page tracking has taken counts for the first mapping (rule ID-007).
    """
    frames = core.memory.frames
    chosen = np.zeros(frames.rows, dtype=np.bool_)
    chosen[pages_of(core, heads)] = True
    maps = rmap.find(core, core.spaces.values(), chosen)
    place = np.zeros(frames.rows, dtype=np.int64)
    place[heads] = np.arange(len(heads))
    folios = place[maps.pfns - frames.behind[maps.pfns]]
    young = (core.pool.flat[maps.slots] & np.uint64(YOUNG)) != 0
    told = young
    if "page_idle" in core.numbers:
        first = np.zeros(len(maps.slots), dtype=np.bool_)
        first[np.unique(folios, return_index=True)[1]] = True
        told = young | (first & ((frames.flags[maps.pfns] & np.uint64(MOVED_YOUNG)) != 0))
    references = np.bincount(folios[told], minlength=len(heads))
    locked, executed = np.zeros(len(heads), dtype=np.bool_), np.zeros(len(heads), dtype=np.bool_)
    for owner, mm in enumerate(maps.mms):
        for vma in mm.vmas:
            if vma.flags & (VmFlag.LOCKED | VmFlag.EXEC):
                inside = (maps.owners == owner) & (maps.addresses >= vma.start) & (maps.addresses < vma.end)
                if vma.flags & VmFlag.LOCKED:
                    locked[folios[inside]] = True
                if vma.flags & VmFlag.EXEC:
                    executed[folios[inside & told]] = True
    return Look(maps, folios, young, references, locked, executed)


def forget(core: Core, seen: Look, folios: BoolArray) -> None:
    """Take the accessed bits off the entries that map the folios for which `folios` is true."""
    mine = folios[seen.folios]
    slots = seen.maps.slots[seen.young & mine]
    core.pool.flat[slots] &= np.uint64(~YOUNG & _ALL)
    if "page_idle" in core.numbers:
        flags = core.memory.frames.flags
        for found, bits in ((seen.young & mine, _IDLE), (mine, MOVED_YOUNG)):
            flags[core.memory.whole_folios(np.unique(seen.maps.pfns[found]))] &= np.uint64(~bits & _ALL)


def set_flags(core: Core, heads: Pfns, *, add: int = 0, remove: int = 0) -> None:
    """Change flags of whole folios."""
    pages = pages_of(core, heads)
    frames = core.memory.frames
    frames.flags[pages] = frames.flags[pages] & np.uint64(~remove & _ALL) | np.uint64(add)


def deactivate(core: Core, at_most: int, *, swapbacked: bool = True) -> int:
    """Refill the inactive list from the tail of the active one, if it is low; pages moved.

    As many as make the inactive list as long as the active one (for a GiB and more of both: the square root of ten
    times their GiB shorter), a batch of 32 at least, `at_most` so many. That they were accessed does not keep them,
    unless they are a file's and a VMA that may execute them did it.
    """
    heads = active(core, swapbacked=swapbacked)
    if not len(heads):
        return 0
    pages = sizes(core, heads)
    there = int(sizes(core, inactive(core, swapbacked=swapbacked)).sum())
    total = int(pages.sum())
    gib = (there + total) * core.geometry.page_size >> 30
    ratio = int((10 * gib) ** 0.5) if gib else 1
    if there * ratio >= total:
        return 0
    wanted = min(at_most, max(_BATCH, -(-(total - there * ratio) // (1 + ratio))))
    count = int(np.searchsorted(np.cumsum(pages), wanted)) + 1
    heads = heads[:count]
    seen = look(core, heads)
    forget(core, seen, np.ones(len(heads), dtype=np.bool_))
    if not swapbacked and seen.executed.any():
        to_head(core, heads[seen.executed])
        heads, pages = heads[~seen.executed], pages[:count][~seen.executed]
    set_flags(core, heads, remove=_ACTIVE)
    to_head(core, heads)
    core.count("deactivate", int(pages[:count].sum()))
    return int(pages[:count].sum())
