"""The check of a whole machine: one look at everything, then looks at what disagreed, until it agrees or stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from pmcore import spec
from pmcore.analysis.invariants.counters import (
    Sums,
    VmaSpot,
    counter_rules,
    differing,
    disordered,
    rollup_fits,
    uneven,
)
from pmcore.analysis.invariants.finding import SHOWN, Finding, Health
from pmcore.analysis.invariants.frames import Frames, frame_rules, read_frames, recheck_frames, suspects
from pmcore.analysis.invariants.tables import (
    Recount,
    Spot,
    Tables,
    Walk,
    mapped_by_number,
    recheck_spots,
    recount,
    table_rules,
)
from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import ArgumentError, HiddenPfn, NotPermitted, ProcessGone
from pmcore.pageflags import FrameFlags
from pmcore.protocols import Kernel

__all__ = ["check"]

#: Looks at what disagreed, at the most.
_LOOKS = 4
_MANY = 1000
_Index = NDArray[np.int64]


def check(
    kernel: Kernel,
    *,
    only: Collection[str] = (),
    ignore: Collection[str] = (),
    progress: Callable[[int, int], object] | None = None,
) -> Health:
    """Whether the machine's frames, page tables and counters agree with each other, by the rules IN-001 to IN-020.

    `only` and `ignore` name rules. What disagrees at the first look is reported if it disagrees in the same way at two
    more. Takes 16 bytes a frame. Raises HiddenPfn where frame numbers are hidden, ArgumentError for another name.
    """
    return _Check(kernel, only, ignore).run(progress)


class _Check:
    def __init__(self, kernel: Kernel, only: Collection[str], ignore: Collection[str]) -> None:
        if not kernel.pfn_visible:
            raise HiddenPfn("checking a machine")
        self.kernel, self.profile = kernel, kernel.profile
        every = {*frame_rules(self.profile), *table_rules(self.profile), *counter_rules()}
        for rule in (*only, *ignore):
            if rule not in every:
                raise ArgumentError(
                    f"{rule} is no rule of the check on this kernel",
                    remedy=f"there are {', '.join(sorted(every))}",
                )
        there = {rule for rule in every if self._holds(rule)}
        self.rules = tuple(sorted(there & set(only or there) - set(ignore)))
        self.findings: list[Finding] = []
        self.unsettled = self.unexplained = 0
        self.changed = kernel.changed_meanwhile()
        self.walk = Walk(kernel)
        self._shift = kernel.geometry.page_shift

    def _holds(self, rule: str) -> bool:
        capability = spec.rule(rule).capability
        return capability is None or self.profile.has(capability)

    def run(self, progress: Callable[[int, int], object] | None) -> Health:
        began = time.monotonic()
        count = self.kernel.frame_count()
        frames = read_frames(self.kernel, 0, count, progress=progress)
        tables = Tables(frames, self.profile)
        unfit: list[int] = []
        torn: list[int] = []
        counting = any(rule in self.rules for rule in ("IN-017", "IN-018", "IN-019"))
        for process, vmas in self.walk.processes():
            sums = Sums()
            for vpn, words in self.walk.words(process, vmas):
                sums.add(words, *tables.add(process.pid, vpn, words))
            if disordered(vmas, self.kernel.geometry.page_size):
                torn.append(process.pid)
            if counting and rollup_fits(process, sums, self.kernel.geometry.page_size) is not True:
                unfit.append(process.pid)
        read, entries = len(self.walk.read), self.walk.entries
        for rule, pfns in suspects(frames, self.profile).items():
            if rule in self.rules:
                self._frames(rule, *self._frames_again(frames, rule, pfns))
        self._entries(tables)
        if "IN-011" in self.rules:
            self._counts(tables.miscounted(), count)
        self._counters(unfit)
        self._order(torn)
        return Health(
            findings=tuple(sorted(self.findings, key=lambda finding: finding.rule)),
            rules=self.rules,
            frames=count,
            processes=read,
            entries=entries,
            unreadable=tuple(sorted(self.walk.unreadable)),
            unexplained=self.unexplained,
            unsettled=self.unsettled,
            seconds=time.monotonic() - began,
        )

    def _found(self, rule: str, count: int, what: str, places: Iterable[str]) -> None:
        known = tuple(d.id for d in spec.divergences().values() if rule in d.rules)
        shown = tuple(place for place, _ in zip(places, range(SHOWN), strict=False))
        self.findings.append(Finding(rule=rule, count=count, what=what, places=shown, known=known))

    def _steady(self, pfns: NDArray[np.int64] | U64Array) -> BoolArray:
        """Which frames did not change while they were recorded."""
        steady: BoolArray = ~np.isin(pfns.astype(np.uint64), self.changed)
        self.unsettled += int((~steady).sum())
        return steady

    # -- frames ----------------------------------------------------------------------------------------

    def _frames_again(self, frames: Frames, rule: str, pfns: _Index) -> tuple[_Index, U64Array]:
        words = np.zeros(0, dtype=np.uint64)
        if len(self.changed):
            pfns = pfns[self._steady(pfns)]
        # One more look is enough where many disagree: they do not all change at the same moment.
        for _ in range(2 if len(pfns) < _MANY else 1):
            if len(pfns):
                pfns, words = recheck_frames(self.kernel, frames, rule, pfns, self.profile)
        return pfns, words

    def _frames(self, rule: str, pfns: _Index, words: U64Array) -> None:
        if len(pfns):
            places = (
                f"frame {pfn:#x} ({FrameFlags(word, profile=self.profile)})"
                for pfn, word in zip(pfns.tolist(), words.tolist(), strict=True)
            )
            self._found(rule, len(pfns), "frames", places)

    # -- entries ---------------------------------------------------------------------------------------

    def _entries(self, tables: Tables) -> None:
        for rule, by_pid in tables.spots.items():
            if rule not in self.rules:
                continue
            broken: list[Spot] = []
            for pid, pieces in by_pid.items():
                pages = np.concatenate(pieces)
                for look in range(_LOOKS):
                    spots, moving = recheck_spots(self.kernel, pid, rule, pages, self.profile)
                    pages = np.sort(np.append(np.array([s.vpn for s in spots], dtype=np.uint64), moving))
                    if not len(pages) or (look and not len(moving)):
                        break
                self.unsettled += len(moving)
                if spots:
                    fields = np.array([spot.entry & (1 << 55) - 1 for spot in spots], dtype=np.uint64)
                    steady = (
                        self._steady(fields) if len(self.changed) else np.ones(len(spots), dtype=np.bool_)
                    )
                    broken += [spot for spot, good in zip(spots, steady.tolist(), strict=True) if good]
            if broken:
                self._found(rule, len(broken), "entries", map(self._spot, broken))

    def _spot(self, spot: Spot) -> str:
        return (
            f"process {spot.pid} at {spot.vpn << self._shift:#x}: {spot.entry:#x}, its frame's count {spot.count} "
            f"({FrameFlags(spot.flags, profile=self.profile)})"
        )

    # -- counts ----------------------------------------------------------------------------------------

    def _counts(self, pfns: U64Array, count: int) -> None:
        """IN-011, for the frames whose count was not that of the entries."""
        last: Recount | None = None
        if len(self.changed) and len(pfns):
            pfns = pfns[self._steady(pfns)]
        for look in range(_LOOKS):
            if not len(pfns):
                return
            now = recount(self.walk, pfns, count)
            over, under = now.over(self.profile) & now.still, now.under(self.profile) & now.still
            wrong = over | under
            same = wrong & _as_before(now, last)
            moving = ~now.still | (wrong & ~same)
            if look and (not moving.any() or look == _LOOKS - 1):
                break
            pfns, last = pfns[wrong | moving], now
        self.unsettled += int(moving.sum())
        over, under = over & same, under & same
        if self.walk.unreadable:
            self.unexplained += int(under.sum())
            under[:] = False
        if over.any():
            by_number = mapped_by_number(self.walk, now.pfns, now.mappers)
            over &= now.least - np.minimum(by_number, now.least) > now.counts
        wrong = over | under
        if wrong.any():
            columns = (now.pfns, now.counts, now.seen, now.flags)
            rows = zip(*(column[wrong].tolist() for column in columns), strict=True)
            places = (
                f"frame {pfn:#x}: count {said}, {entries} entries ({FrameFlags(word, profile=self.profile)})"
                for pfn, said, entries, word in rows
            )
            self._found("IN-011", int(wrong.sum()), "frames", places)

    # -- counters --------------------------------------------------------------------------------------

    def _counters(self, pids: list[int]) -> None:
        found: dict[str, list[VmaSpot]] = {}
        for pid in pids:
            before: dict[str, list[VmaSpot]] = {}
            try:
                process = self.kernel.process(pid)
                vmas = uneven(process)
                for look in range(2):
                    if not vmas:
                        break
                    spots, still = differing(process, vmas, self.changed)
                    self.unsettled += not still
                    if look:
                        spots = {
                            rule: [s for s in rows if s in before.get(rule, ())]
                            for rule, rows in spots.items()
                        }
                    before = spots
                    starts = {spot.start for rows in spots.values() for spot in rows}
                    vmas = tuple(vma for vma in vmas if vma.start in starts)
            except (ProcessGone, NotPermitted):
                continue
            for rule, rows in before.items():
                found.setdefault(rule, []).extend(rows)
        for rule, rows in found.items():
            if rule in self.rules and rows:
                self._found(rule, len(rows), "VMAs", map(_vma_spot, rows))

    def _order(self, pids: list[int]) -> None:
        """IN-020, for processes whose VMAs were out of order."""
        places = []
        for pid in pids:
            seen: list[tuple[object, ...]] = []
            for process, vmas in (one for _ in range(2) for one in self.walk.processes([pid])):
                seen.append(disordered(vmas, self.kernel.geometry.page_size))
                last = process.pid
            if len(seen) == 2 and seen[0] == seen[1]:
                places += [f"process {last}: {vma}" for vma in seen[1]]
        if places and "IN-020" in self.rules:
            self._found("IN-020", len(places), "VMAs", places)


def _as_before(now: Recount, last: Recount | None) -> BoolArray:
    """Which frames have the same entries and the same count as at the last look."""
    if last is None:
        return np.zeros(len(now.pfns), dtype=np.bool_)
    place = np.searchsorted(last.pfns, now.pfns)
    same: BoolArray = (
        (last.seen[place] == now.seen) & (last.least[place] == now.least) & (last.counts[place] == now.counts)
    )
    return same


def _vma_spot(spot: VmaSpot) -> str:
    name = f" {spot.name}" if spot.name else ""
    return f"process {spot.pid} {spot.start:x}-{spot.end:x}{name}: smaps {spot.smaps}, tables {spot.tables}"
