"""What a run reached, counted: steps, refusals, sorts of pages, and the rare things that happened between two looks.

All of it is taken from what the interfaces show, so it means the same on every backend. A count of pages is a count of
entries of one task; "huge page ..." counts huge pages.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.lockstep.look import Look, TaskLook
from pmcore.program import Outcome
from pmcore.program.steps import PagemapRead, Scan, Step, Touch, Write
from pmcore.uapi import (
    MAX_SWAPFILES,
    PM_GUARD_REGION,
    PM_MMAP_EXCLUSIVE,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    PM_SWAP_TYPE_MASK,
    PM_UFFD_WP,
    PageFlag,
    PagemapFlag,
    ScanFlag,
)

__all__ = ["RARE", "Reached"]

_FIELD, _PRESENT, _SWAP = np.uint64(PM_PFRAME_MASK), np.uint64(PM_PRESENT), np.uint64(PM_SWAP)
_HEAD = int(PageFlag.COMPOUND_HEAD)
_PAGES = (PagemapFlag.SWAP, PagemapFlag.UFFD_WP, PagemapFlag.GUARD_REGION, PagemapFlag.SOFT_DIRTY)
_FRAMES = (
    PageFlag.THP,
    PageFlag.SWAPCACHE,
    PageFlag.UNEVICTABLE,
    PageFlag.ZERO_PAGE,
    PageFlag.KSM,
    PageFlag.HUGE,
)

#: What is counted beyond steps, errnos and sorts of pages. A session on simulated machines alone reaches each of them.
RARE = (
    "huge page mapped",
    "huge page mapped by PTEs",
    "huge page split",
    "huge page collapsed",
    "page swapped out",
    "page swapped in",
    "page in the swap cache",
    "page copied on write",
    "zero page replaced by a frame",
    "frame replaced by the zero page",
    "page no longer exclusive",
    "page exclusive again",
    "page armed",
    "page written while armed",
    "page re-armed",
    "marker on an empty entry",
    "swapped page armed",
    "guard installed",
    "guard removed",
    "page may be discarded",
    "page locked",
    "page unlocked",
    "mapping grown downwards",
    "scan with vec exactly full",
    "scan with max_pages exactly reached",
    "scan with a stale walk_end",
    "scan refused",
    "scan that protects",
    "pagemap read misaligned",
    "pagemap read past the end",
    "pagemap read of nothing",
)


class Reached:
    """The counts of one run."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._before: Look | None = None
        self._step: Step | None = None
        #: By task: addresses whose write protection a write has taken off.
        self._written: dict[str, U64Array] = {}

    def step(self, step: Step, outcome: Outcome) -> None:
        """Count a step and what came of it."""
        counts, self._step = self.counts, step
        counts[f"step {type(step).__name__.lower()}"] += 1
        if outcome.errno:
            counts[f"errno {outcome.errno}"] += 1
        if outcome.signal:
            counts[f"signal {outcome.signal}"] += 1
        if isinstance(step, Scan):
            self._scan(step, outcome)
        if isinstance(step, PagemapRead):
            self.counts["pagemap read misaligned"] += bool((step.offset | step.length) % 8)
            past_end = step.from_end and step.length > 0 and not outcome.errno
            self.counts["pagemap read past the end"] += past_end
            self.counts["pagemap read of nothing"] += not step.length and not outcome.errno

    def _scan(self, step: Scan, outcome: Outcome) -> None:
        if outcome.errno:
            self.counts["scan refused"] += 1
            return
        regions, walk_end = outcome.value["regions"], outcome.value["walk_end"]
        pages = sum(end - start for start, end, _ in regions)
        full = bool(regions) and len(regions) == step.vec_len
        limited = bool(step.max_pages) and pages == step.max_pages
        stale = not full and not limited and walk_end < step.page + step.pages
        stale |= bool(regions) and walk_end < regions[-1][1]
        self.counts["scan with vec exactly full"] += full
        self.counts["scan with max_pages exactly reached"] += limited
        self.counts["scan with a stale walk_end"] += stale
        self.counts["scan that protects"] += bool(step.flags & ScanFlag.WP_MATCHING)

    def look(self, look: Look) -> None:
        """Count the sorts of pages seen, and what has become of those of the look before."""
        for task in look.tasks.values():
            for flag in _PAGES:
                self.counts[f"pages {flag.name}"] += int(((task.words & int(flag)) != 0).sum())
        for kind in _FRAMES:
            self.counts[f"frames {kind.name}"] += int(((look.kpageflags & int(kind)) != 0).sum())
        before, self._before = self._before, look
        if before is None:
            return
        for name, new in look.tasks.items():
            if name in before.tasks:
                self._task(name, before.tasks[name], new, before, look)

    def _task(self, name: str, old: TaskLook, new: TaskLook, before: Look, after: Look) -> None:
        addresses, i, j = np.intersect1d(old.addresses, new.addresses, True, return_indices=True)
        was, now = old.words[i], new.words[j]
        counts = self.counts

        def count(what: str, chosen: BoolArray) -> None:
            counts[what] += int(chosen.sum())

        old_flags, new_flags = before.flags_of(was), after.flags_of(now)
        was_present, now_present = _has(was, PM_PRESENT), _has(now, PM_PRESENT)
        both = was_present & now_present
        same = both & (((was ^ now) & _FIELD) == 0)
        moved = both & ~same
        was_zero, now_zero = _has(old_flags, PageFlag.ZERO_PAGE), _has(new_flags, PageFlag.ZERO_PAGE)
        was_large = _has(old_flags, PageFlag.COMPOUND_HEAD | PageFlag.COMPOUND_TAIL)
        now_large = _has(new_flags, PageFlag.COMPOUND_HEAD | PageFlag.COMPOUND_TAIL)
        was_slot, now_slot = _slots(was), _slots(now)
        count("page swapped out", was_present & now_slot)
        count("page swapped in", was_slot & now_present)
        count(
            "page in the swap cache",
            now_present & ~_has(old_flags, PageFlag.SWAPCACHE) & _has(new_flags, PageFlag.SWAPCACHE),
        )
        count("zero page replaced by a frame", both & was_zero & ~now_zero)
        count("frame replaced by the zero page", both & ~was_zero & now_zero)
        count("page copied on write", moved & ~was_zero & ~now_zero & ~now_large)
        count("page no longer exclusive", same & _has(was, PM_MMAP_EXCLUSIVE) & ~_has(now, PM_MMAP_EXCLUSIVE))
        count("page exclusive again", same & ~_has(was, PM_MMAP_EXCLUSIVE) & _has(now, PM_MMAP_EXCLUSIVE))
        count("guard installed", ~_has(was, PM_GUARD_REGION) & _has(now, PM_GUARD_REGION))
        count("guard removed", _has(was, PM_GUARD_REGION) & ~_has(now, PM_GUARD_REGION))
        backed = _has(old_flags, PageFlag.SWAPBACKED), _has(new_flags, PageFlag.SWAPBACKED)
        count("page may be discarded", same & backed[0] & ~backed[1])
        locked = _has(old_flags, PageFlag.UNEVICTABLE), _has(new_flags, PageFlag.UNEVICTABLE)
        count("page locked", same & ~locked[0] & locked[1])
        count("page unlocked", same & locked[0] & ~locked[1])
        # Huge pages, counted by their head.
        head = _has(old_flags, _HEAD), _has(new_flags, _HEAD)
        count("huge page split", same & head[0] & ~now_large)
        count("huge page collapsed", was_present & head[1] & ~was_large)
        count("huge page mapped", ~was_present & head[1])
        kept = int((same & head[0] & head[1] & ~was_zero).sum())
        counts["huge page mapped by PTEs"] += max(0, min(_huge(old), kept) - _huge(new))
        self._armed(name, addresses, was, now)
        starts = {entry.vma.end: entry.vma.start for entry in old.vmas}
        counts["mapping grown downwards"] += sum(
            "gd" in (e.vm_flags or ()) and e.vma.start < starts.get(e.vma.end, 0) for e in new.vmas
        )

    def _armed(self, name: str, addresses: U64Array, was: U64Array, now: U64Array) -> None:
        """Userfaultfd's write protection: put on, taken off by a write, put on again."""
        armed = _has(was, PM_UFFD_WP), _has(now, PM_UFFD_WP)
        gained = armed[1] & ~armed[0]
        present, empty = _has(now, PM_PRESENT), was & ~np.uint64(PM_SOFT_DIRTY)
        self.counts["page armed"] += int((gained & present).sum())
        self.counts["swapped page armed"] += int((gained & _slots(now)).sum())
        self.counts["marker on an empty entry"] += int(
            (gained & ~present & ~_slots(now) & (empty == 0)).sum()
        )
        written = self._written.get(name, np.zeros(0, dtype=np.uint64))
        self.counts["page re-armed"] += len(np.intersect1d(addresses[gained & present], written))
        off = armed[0] & ~armed[1] & present & isinstance(self._step, Touch | Write)
        self.counts["page written while armed"] += int(off.sum())
        self._written[name] = np.union1d(np.setdiff1d(written, addresses[armed[1]]), addresses[off])


def _has(words: U64Array, bits: int) -> BoolArray:
    found: BoolArray = (words & np.uint64(bits)) != 0
    return found


def _slots(words: U64Array) -> BoolArray:
    swapped = (words & (_PRESENT | _SWAP)) == _SWAP
    found: BoolArray = swapped & ((words & np.uint64(PM_SWAP_TYPE_MASK)) < MAX_SWAPFILES)
    return found


def _huge(look: TaskLook) -> int:
    """Huge pages that PMDs map, as smaps has them."""
    pages = [(e.counters.get("AnonHugePages", 0), e.counters.get("KernelPageSize", 4096)) for e in look.vmas]
    return sum(length // (page * page // 8) for length, page in pages)
