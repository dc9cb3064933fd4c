"""Comparing two looks: everything equal, frames and swap slots up to a bijection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import BoolArray, U64Array
from pmcore.lockstep.look import Look, TaskLook
from pmcore.lockstep.masks import COUNTER_MASKS, FLAG_MASKS
from pmcore.pageflags import FrameFlags
from pmcore.pagemap import PagemapEntry
from pmcore.program.run import frames_of, named_frames
from pmcore.uapi import MAX_SWAPFILES, PM_PFRAME_MASK, PM_PRESENT, PM_SWAP, PM_SWAP_TYPE_MASK, PageFlag
from pmcore.vma import Vma, VmaKind

__all__ = ["Comparer", "Difference"]

_FIELD = np.uint64(PM_PFRAME_MASK)
_PRESENT, _SWAP = np.uint64(PM_PRESENT), np.uint64(PM_SWAP)
_COMPOUND = np.uint64(PageFlag.COMPOUND_HEAD | PageFlag.COMPOUND_TAIL)


@attrs.frozen
class Difference:
    """What differs, where, and both sides' words for it."""

    kind: str
    where: str
    left: str
    right: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.left} | {self.right}"


class Comparer:
    """Holds the looks of two sides against each other, step after step."""

    def __init__(self, *, limit: int = 12, watched: bool = False) -> None:
        self.limit = limit
        #: Whether somebody samples accesses on one of the machines: more masks apply then.
        self.watched = watched
        #: How often each mask hid a difference.
        self.masked: Counter[str] = Counter()
        self._before: tuple[Look, Look] | None = None
        #: Whether both sides began with the same hugetlb pools.
        self._pools = False

    def compare(self, left: Look, right: Look, renewed: tuple[int, int] = (0, 0)) -> list[Difference]:
        """The differences, the first `limit` of them.

        `renewed`: addresses from and up to which the step may have mapped anew: that an allocator gives a frame out
        again that was just freed does not make it the same.
        """
        found: list[Difference] = []
        for difference in self._all(left, right, renewed):
            found.append(difference)
            if len(found) >= self.limit:
                break
        self._before = (left, right)
        return found

    def _all(self, left: Look, right: Look, renewed: tuple[int, int]) -> Iterator[Difference]:
        if left.tasks.keys() != right.tasks.keys():
            yield Difference("tasks", "program", str(list(left.tasks)), str(list(right.tasks)))
            return
        for name, one in left.tasks.items():
            yield from self._task(name, one, right.tasks[name])
        if self._before is None:
            # A machine with other pools than the model's: what programs do with them shows in their outcomes.
            self._pools = bool(left.pool) and left.pool == right.pool
        if self._pools and left.pool != right.pool:
            yield Difference("hugetlb pool", "meminfo", ", ".join(left.pool), ", ".join(right.pool))
        yield from self._frames(left, right)
        yield from self._kept(left, right, renewed)

    # -- one task --------------------------------------------------------------------------------------

    def _task(self, name: str, left: TaskLook, right: TaskLook) -> Iterator[Difference]:
        if left.spans != right.spans:
            yield Difference("areas", name, str(left.spans), str(right.spans))
            return
        differ = ((left.words ^ right.words) & ~_FIELD) != 0
        # A marker's or special entry's field is compared as it is; frames and swap slots are only paired.
        special = _special(left.words) & ~named_frames(left.words)
        differ |= special & (left.words != right.words)
        differ |= named_frames(left.words) != named_frames(right.words)
        # A field that is empty on one side alone is hidden, or is not.
        differ |= ((left.words & _FIELD) == 0) != ((right.words & _FIELD) == 0)
        for index in np.flatnonzero(differ).tolist():
            where = f"{name} {int(left.addresses[index]):#x}"
            yield Difference("pagemap", where, _entry(left.words[index]), _entry(right.words[index]))
        for (start, end), a, b in zip(left.spans, left.in_core, right.in_core, strict=True):
            if (a is None) != (b is None) or (a is not None and b is not None and not np.array_equal(a, b)):
                yield Difference("mincore", f"{name} {start:#x}-{end:#x}", _bits(a), _bits(b))
        yield from self._vmas(name, left, right)

    def _vmas(self, name: str, left: TaskLook, right: TaskLook) -> Iterator[Difference]:
        lines = [[_line(e.vma) for e in side.vmas] for side in (left, right)]
        if lines[0] != lines[1]:
            for line in sorted(set(lines[0]) ^ set(lines[1])):
                there = "there" if line in lines[0] else "-"
                yield Difference("maps", f"{name} {line}", there, "-" if there == "there" else "there")
            return
        for a, b in zip(left.vmas, right.vmas, strict=True):
            where = f"{name} {a.vma}"
            if a.vm_flags != b.vm_flags:
                yield Difference("VmFlags", where, " ".join(a.vm_flags or ()), " ".join(b.vm_flags or ()))
            for mine, theirs in ((a.counters, b.counters), (a.plain, b.plain)):
                for key in {**mine, **theirs}:
                    if mine.get(key) == theirs.get(key):
                        continue
                    if self.watched and key in COUNTER_MASKS:
                        self.masked[COUNTER_MASKS[key]] += 1
                        continue
                    yield Difference(f"smaps {key}", where, str(mine.get(key)), str(theirs.get(key)))

    # -- frames ----------------------------------------------------------------------------------------

    def _frames(self, left: Look, right: Look) -> Iterator[Difference]:
        for what, chosen in (("frame", _frames), ("swap slot", _slots)):
            pairs, places = _pairs(left, right, chosen)
            for side, other in ((0, 1), (1, 0)):
                order = np.lexsort((pairs[other], pairs[side]))
                a, b = pairs[side][order], pairs[other][order]
                clash = np.flatnonzero((a[1:] == a[:-1]) & (b[1:] != b[:-1])) + 1
                for index in clash[:4].tolist():
                    values = [f"{int(a[index]):#x}", f"{int(b[index - 1]):#x} and {int(b[index]):#x}"]
                    words = values if side == 0 else values[::-1]
                    yield Difference(f"one {what}, two over there", places(int(order[index])), *words)
            if what == "frame" and len(pairs[0]):
                yield from self._flags(left, right, pairs, places)

    def _flags(
        self, left: Look, right: Look, pairs: tuple[U64Array, U64Array], places: _Places
    ) -> Iterator[Difference]:
        first = np.unique(pairs[0], return_index=True)[1]
        a, b = pairs[0][first], pairs[1][first]
        ia, ib = np.searchsorted(left.pfns, a), np.searchsorted(right.pfns, b)
        counts = left.kpagecount[ia], right.kpagecount[ib]
        for index in np.flatnonzero(counts[0] != counts[1]).tolist():
            yield Difference(
                "kpagecount", places(int(first[index])), str(counts[0][index]), str(counts[1][index])
            )
        if len(left.groups) and len(right.groups):
            owners = left.groups[ia], right.groups[ib]
            for index in np.flatnonzero(owners[0] != owners[1]).tolist():
                words = [_group(int(side[index])) for side in owners]
                yield Difference("kpagecgroup", places(int(first[index])), *words)
        flags = left.kpageflags[ia], right.kpageflags[ib]
        differ = flags[0] ^ flags[1]
        for mask in FLAG_MASKS:
            if mask.watched and not self.watched:
                continue
            hidden = (differ & np.uint64(mask.bits)) != 0
            if mask.where:
                shown = flags[0] | flags[1] if mask.either else flags[0] & flags[1]
                hidden &= (shown & np.uint64(mask.where)) != 0
            if mask.unless:
                hidden &= ((flags[0] | flags[1]) & np.uint64(mask.unless)) == 0
            if hidden.any():
                self.masked[mask.divergence] += int(hidden.sum())
                differ = np.where(hidden, differ & ~np.uint64(mask.bits), differ)
        for index in np.flatnonzero(differ).tolist():
            words = [str(FrameFlags(int(side[index]))) for side in flags]
            yield Difference("kpageflags", places(int(first[index])), *words)
        # Frames of one compound page lie in order and aligned: the offset between the sides is the same for all.
        compound = (flags[0] & _COMPOUND) != 0
        tail = np.flatnonzero((flags[0] & np.uint64(PageFlag.COMPOUND_TAIL)) != 0)
        follows = tail[(tail > 0) & compound[tail - 1] & (a[tail] == a[tail - 1] + np.uint64(1))]
        for index in follows[b[follows] != b[follows - 1] + np.uint64(1)].tolist():
            yield Difference(
                "frames of a compound page", places(int(first[index])), "in order", "not in order"
            )

    def _kept(self, left: Look, right: Look, renewed: tuple[int, int]) -> Iterator[Difference]:
        """A frame that stayed at its place on one side has to stay on the other."""
        if self._before is None:
            return
        for name in left.tasks:
            if any(name not in look.tasks for look in self._before):
                continue
            sides = []
            for now, before in ((left, self._before[0]), (right, self._before[1])):
                new, old = now.tasks[name], before.tasks[name]
                both, i, j = np.intersect1d(new.addresses, old.addresses, True, return_indices=True)
                here = _present(new.words[i]) & _present(old.words[j])
                moved = ((new.words[i] ^ old.words[j]) & _FIELD) != 0
                sides.append((both, here, moved))
            (both, here_a, moved_a), (others, here_b, moved_b) = sides
            if len(both) != len(others):
                continue
            same = (both >= np.uint64(renewed[0])) & (both < np.uint64(renewed[1]))
            for index in np.flatnonzero(here_a & here_b & (moved_a != moved_b) & ~same).tolist():
                words = ["another frame" if m[index] else "the same frame" for m in (moved_a, moved_b)]
                yield Difference("frame since the last step", f"{name} {int(both[index]):#x}", *words)


class _Places:
    """Where a pair of frames was seen, in words."""

    def __init__(self, names: list[str], lengths: list[int], addresses: U64Array) -> None:
        self._names = names
        self._ends = np.cumsum(lengths)
        self._addresses = addresses

    def __call__(self, index: int) -> str:
        name = self._names[int(np.searchsorted(self._ends, index, side="right"))]
        return f"{name} {int(self._addresses[index]):#x}"


def _pairs(
    left: Look, right: Look, chosen: Callable[[U64Array], BoolArray]
) -> tuple[tuple[U64Array, U64Array], _Places]:
    """The fields at the places where both sides have an entry of that sort."""
    empty = np.zeros(0, dtype=np.uint64)
    a, b, addresses, lengths = [empty], [empty], [empty], []
    names = [name for name in left.tasks if left.tasks[name].spans == right.tasks[name].spans]
    for name in names:
        one, other = left.tasks[name], right.tasks[name]
        both = chosen(one.words) & chosen(other.words)
        a.append(frames_of(one.words[both]))
        b.append(frames_of(other.words[both]))
        addresses.append(one.addresses[both])
        lengths.append(int(both.sum()))
    return (np.concatenate(a), np.concatenate(b)), _Places(names, lengths, np.concatenate(addresses))


def _line(vma: Vma) -> str:
    """A line of maps but for what differs from machine to machine: device, inode, and the file's directory."""
    name = vma.name.rsplit("/", 1)[-1] if vma.kind is VmaKind.FILE else vma.name
    where = f" at {vma.offset:#x}" if vma.offset else ""
    return f"{vma.start:x}-{vma.end:x} {vma.perms} {name}{where}".rstrip()


def _present(words: U64Array) -> BoolArray:
    found: BoolArray = (words & _PRESENT) != 0
    return found


def _swapped(words: U64Array) -> BoolArray:
    found: BoolArray = (words & (_PRESENT | _SWAP)) == _SWAP
    return found


def _slots(words: U64Array) -> BoolArray:
    return _swapped(words) & ~_special(words)


def _special(words: U64Array) -> BoolArray:
    return _swapped(words) & ((words & np.uint64(PM_SWAP_TYPE_MASK)) >= MAX_SWAPFILES)


def _frames(words: U64Array) -> BoolArray:
    return _present(words) | named_frames(words)


def _entry(word: np.uint64) -> str:
    entry = PagemapEntry(int(word))
    names = [
        n
        for n in ("present", "swapped", "file", "exclusive", "soft_dirty", "uffd_wp", "guard")
        if getattr(entry, n)
    ]
    return f"{int(word):#x} ({','.join(names)})"


def _group(number: int) -> str:
    return ("nobody", "another group")[number] if number < 2 else f"group {number - 1} of the program"


def _bits(array: NDArray[np.bool_] | None) -> str:
    if array is None:
        return "refused"
    return "".join("1" if bit else "0" for bit in array[:64].tolist()) + ("..." if len(array) > 64 else "")
