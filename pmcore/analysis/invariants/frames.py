"""The rules that concern frames alone: flags and counts of all of them, as arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import BoolArray, U64Array
from pmcore.pageflags import count_words, flag_rows
from pmcore.profile import KernelProfile
from pmcore.protocols import FrameFile, Kernel
from pmcore.uapi import PageFlag as F

__all__ = ["Frames", "frame_rules", "read_frames", "recheck_frames", "suspects"]

_CHUNK = 1 << 17
_HEAD, _TAIL, _MMAP = np.uint64(F.COMPOUND_HEAD), np.uint64(F.COMPOUND_TAIL), np.uint64(F.MMAP)
_COMPOUND = _HEAD | _TAIL
_IN_USE = int(
    F.MMAP | F.ANON | F.KSM | F.SWAPCACHE | F.WRITEBACK | F.UNEVICTABLE | F.MLOCKED
    | F.COMPOUND_HEAD | F.COMPOUND_TAIL | F.THP
)  # fmt: skip
_OWNERS = tuple(map(int, (F.LRU, F.SLAB, F.BUDDY, F.HUGE, F.ZERO_PAGE, F.PGTABLE, F.OFFLINE, F.NOPAGE)))
#: What each page of a compound page shows for itself.
_OWN = np.uint64(
    ~int(F.COMPOUND_HEAD | F.COMPOUND_TAIL | F.BUDDY | F.PGTABLE | F.OFFLINE | F.HWPOISON) & (1 << 64) - 1
)
_Index = NDArray[np.int64]


@attrs.frozen(eq=False)
class Frames:
    """Flags and counts of the frames from `first` on."""

    flags: U64Array
    counts: NDArray[np.uint32]
    first: int = 0

    def __len__(self) -> int:
        return len(self.flags)


def read_frames(
    kernel: Kernel, first: int, end: int, *, progress: Callable[[int, int], object] | None = None
) -> Frames:
    """Read both files from `first` to `end`, with as many threads as the backend says are useful."""
    flags = np.zeros(end - first, dtype=np.uint64)
    counts = np.zeros(end - first, dtype=np.uint32)
    jobs = [(file, low) for low in range(0, end - first, _CHUNK) for file in (True, False)]
    lock, queue, failures = threading.Lock(), iter(jobs), []
    done = 0

    def work() -> None:
        nonlocal done
        try:
            while True:
                with lock:
                    job = next(queue, None)
                    if job is None:
                        return
                    done += 1
                    if progress is not None:
                        progress(done, len(jobs))
                of_flags, low = job
                part = slice(low, min(low + _CHUNK, end - first))
                if of_flags:
                    kernel.read_frames(FrameFile.KPAGEFLAGS, first + low, flags[part])
                else:
                    words = np.zeros(part.stop - low, dtype=np.uint64)
                    kernel.read_frames(FrameFile.KPAGECOUNT, first + low, words)
                    np.minimum(words, np.uint64(0xFFFF_FFFF), out=words)
                    counts[part] = words
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(min(kernel.concurrency, len(jobs)) - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Frames(flags, counts, first)


def _word_rules(profile: KernelProfile) -> dict[str, Callable[[U64Array], BoolArray]]:
    """Rules about a flag word by itself: which of these words break it."""
    known = np.uint64(sum(1 << bit for bit in flag_rows(profile)))

    def owners(words: U64Array) -> BoolArray:
        count = np.zeros(len(words), dtype=np.int8)
        for owner in _OWNERS:
            count += (words & np.uint64(owner)) != 0
        found: BoolArray = count > 1
        return found

    return {
        "IN-002": lambda w: _has(w, F.BUDDY) & ((w & np.uint64(_IN_USE)) != 0),
        "IN-007": lambda w: _has(w, F.SLAB) & ((w & np.uint64(F.ANON | F.KSM)) != 0),
        "IN-008": owners,
        "IN-009": lambda w: _has(w, F.KSM) & ~_has(w, F.ANON),
        "IN-010": lambda w: (w & ~known) != 0,
    }


def _has(words: U64Array, flag: F) -> BoolArray:
    found: BoolArray = (words & np.uint64(flag)) != 0
    return found


def _count_rules(frames: Frames) -> dict[str, _Index]:
    """Rules about a frame's flags and its count: the frames that break them."""
    used = np.flatnonzero(frames.counts)
    flags = frames.flags[used]
    return {
        "IN-001": used[_has(flags, F.BUDDY)],
        "IN-016": used[_has(flags, F.ZERO_PAGE)],
        "IN-006": used[(flags & _MMAP) == 0],
    }


def _compound_rules(frames: Frames, profile: KernelProfile) -> dict[str, _Index]:
    """Rules about compound pages: the frames that break them."""
    flags = frames.flags
    part = np.flatnonzero((flags & (_COMPOUND | _MMAP)) != 0)
    words = flags[part]
    tail, head = (words & _TAIL) != 0, (words & _HEAD) != 0
    behind = np.append(False, np.diff(part) == 1)
    follows = behind & np.append(False, ((words & _COMPOUND) != 0)[:-1])
    last = np.append(~(tail[1:] & behind[1:]), True)[: len(part)]
    loose = (tail & ~follows) | (tail & head) | (head & ~tail & last)
    if len(part) and part[-1] == len(flags) - 1 and not tail[-1]:
        loose[-1] = False  # what comes behind the last frame is not known
    same = np.zeros(len(part), dtype=np.bool_)
    if profile.has("kpageflags.folio_flags"):
        same[1:] = tail[1:] & follows[1:] & (((words[1:] ^ words[:-1]) & _OWN) != 0)
    # Compound pages as runs: a head and the tails behind it.
    starts = np.flatnonzero(~(tail & follows))
    sizes = np.diff(starts, append=len(part))
    heads = head[starts]
    wrong = heads & (
        ((sizes & (sizes - 1)) != 0) | ((part[starts] + frames.first) % np.maximum(sizes, 1) != 0)
    )
    # MMAP with no count anywhere in the run.
    empty = np.zeros(0, dtype=np.int64)
    unmapped = empty
    if len(starts):
        counted = np.maximum.reduceat(frames.counts[part], starts) > 0
        unmapped = starts[((words[starts] & _MMAP) != 0) & ~counted]
    return {
        "IN-003": part[loose],
        "IN-004": part[starts[wrong]] if len(starts) else empty,
        "IN-005": part[same],
        "IN-006": part[unmapped],
    }


def frame_rules(profile: KernelProfile) -> tuple[str, ...]:
    """The rules that `suspects` checks on that kernel."""
    rules = {"IN-001", "IN-003", "IN-004", "IN-006", "IN-016", *_word_rules(profile)}
    if profile.has("kpageflags.folio_flags"):
        rules.add("IN-005")
    return tuple(sorted(rules))


def suspects(frames: Frames, profile: KernelProfile) -> dict[str, _Index]:
    """By rule, the numbers of the frames that break it at this look; rules that hold are left out."""
    found: dict[str, _Index] = {}
    distinct, _ = count_words(frames.flags)
    for rule, breaks in _word_rules(profile).items():
        for word in distinct[breaks(distinct)].tolist():
            pfns = np.flatnonzero(frames.flags == np.uint64(word))
            found[rule] = np.append(found.get(rule, np.zeros(0, dtype=np.int64)), pfns)
    for rules in (_count_rules(frames), _compound_rules(frames, profile)):
        for rule, pfns in rules.items():
            if len(pfns):
                found[rule] = np.append(found.get(rule, np.zeros(0, dtype=np.int64)), pfns)
    return {rule: np.unique(pfns) + frames.first for rule, pfns in found.items()}


def recheck_frames(
    kernel: Kernel, frames: Frames, rule: str, pfns: _Index, profile: KernelProfile
) -> tuple[_Index, U64Array]:
    """Those of `pfns` that break `rule` at a fresh look, and the flag words that they show now.

    What needs its neighbours is looked at with its whole compound page, as far as that went at the first look.
    """
    word_rule = _word_rules(profile).get(rule)
    numbers = pfns.astype(np.uint64)
    if word_rule is not None:
        words = kernel.frames_at(FrameFile.KPAGEFLAGS, numbers)
        still = word_rule(words)
        return pfns[still], words[still]
    alone = (frames.flags[pfns - frames.first] & _COMPOUND) == 0
    if rule in ("IN-001", "IN-016") or alone.all():
        words = kernel.frames_at(FrameFile.KPAGEFLAGS, numbers)
        counts = kernel.frames_at(FrameFile.KPAGECOUNT, numbers)
        mapped = counts != 0
        still = {
            "IN-001": mapped & _has(words, F.BUDDY),
            "IN-016": mapped & _has(words, F.ZERO_PAGE),
            "IN-006": mapped != _has(words, F.MMAP),
        }.get(rule, (words & _COMPOUND) != 0)
        if rule != "IN-006" or alone.all():
            return pfns[still], words[still]
    kept: list[int] = []
    shown: list[int] = []
    for pfn in pfns.tolist():
        again = _around(kernel, len(frames), pfn)
        if pfn in suspects(again, profile).get(rule, ()):
            kept.append(pfn)
            shown.append(int(again.flags[pfn - again.first]))
    return np.array(kept, dtype=np.int64), np.array(shown, dtype=np.uint64)


def _around(kernel: Kernel, count: int, pfn: int) -> Frames:
    """A fresh look at the whole compound page that holds `pfn`, with what lies beside it."""
    for margin in (16, 1 << 9, 1 << 14, 1 << 18):
        low, high = max(pfn - margin, 0), min(pfn + margin, count)
        found = read_frames(kernel, low, high)
        single = (found.flags & _TAIL) == 0
        begins = low == 0 or single[1 : pfn - low + 1].any()
        if begins and (high == count or single[pfn - low + 1 :].any()):
            break
    return found
