"""The rules that concern smaps: its counters beside what the tables and the frames say."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.analysis.residency import residency
from pmcore.arrays import U64Array
from pmcore.errors import ProcessGone, SyscallError
from pmcore.protocols import Process
from pmcore.smaps import SmapsEntry, parse_smaps
from pmcore.uapi import MAX_SWAPFILES, PM_PRESENT, PM_SWAP, PM_SWAP_TYPE_MASK, PageFlag
from pmcore.vma import Vma, VmaKind

__all__ = ["Sums", "VmaSpot", "counter_rules", "differing", "disordered", "rollup_fits", "uneven"]

#: What Pss of a whole process may be off while other processes come and go: a part of it, and some bytes.
_PSS_PART, _PSS_BYTES = 50, 256 << 10
_ASIDE = np.uint64(PageFlag.ZERO_PAGE | PageFlag.HUGE)


@attrs.define
class Sums:
    """What the entries of one process add up to, in pages; `shares` in pages, too."""

    rss: int = 0
    shares: float = 0.0
    swap: int = 0

    def add(self, words: U64Array, flags: U64Array, counts: NDArray[np.uint32]) -> None:
        """Add a piece of entries, and what the frames of the present ones show."""
        counted = (flags & _ASIDE) == 0
        self.rss += int(counted.sum())
        self.shares += float((1.0 / np.maximum(counts[counted], 1)).sum())
        swapped = words[(words & np.uint64(PM_PRESENT | PM_SWAP)) == np.uint64(PM_SWAP)]
        self.swap += int(((swapped & np.uint64(PM_SWAP_TYPE_MASK)) < np.uint64(MAX_SWAPFILES)).sum())


@attrs.frozen
class VmaSpot:
    """A VMA whose counter differs from what the tables say; both in bytes."""

    pid: int
    start: int
    end: int
    name: str
    smaps: int
    tables: int


def counter_rules() -> tuple[str, ...]:
    """The rules about smaps and maps."""
    return ("IN-017", "IN-018", "IN-019", "IN-020")


def disordered(vmas: Sequence[Vma], page_size: int) -> tuple[Vma, ...]:
    """VMAs that break IN-020."""
    position, found = 0, []
    for vma in vmas:
        if vma.start < position or (vma.start | vma.end) & (page_size - 1):
            found.append(vma)
        position = vma.end
    return tuple(found)


def rollup_fits(process: Process, sums: Sums, page_size: int) -> bool | None:
    """Whether smaps_rollup fits `sums`, Pss about; None where the kernel has none, and each VMA must be looked at."""
    try:
        entries = parse_smaps(process.pread("smaps_rollup", 0, 1 << 16), source="smaps_rollup")
    except ProcessGone:
        return True
    except SyscallError:
        return None
    if not entries:
        return sums.rss == 0
    counters = entries[0].counters
    off = abs(counters.get("Pss", 0) - sums.shares * page_size)
    return (
        counters.get("Rss") == sums.rss * page_size
        and counters.get("Swap", 0) == sums.swap * page_size
        and off <= counters.get("Pss", 0) / _PSS_PART + _PSS_BYTES
    )


def uneven(process: Process) -> tuple[Vma, ...]:
    """The VMAs whose counters are not what tables and frames say, at one look. Raises ProcessGone, NotPermitted."""
    entries = _by_start(process.smaps())
    vmas = tuple(e.vma for e in entries.values() if _plain(e, process.kernel.geometry.task_size))
    found = residency(process, vmas)
    return tuple(
        vma
        for row, vma in zip(found.rows, found.vmas, strict=True)
        if _wrong(process, entries[vma.start], row)
    )


def differing(
    process: Process, vmas: tuple[Vma, ...], changed: U64Array
) -> tuple[dict[str, list[VmaSpot]], bool]:
    """By rule, those of `vmas` whose counters are not what tables and frames say; whether all kept still meanwhile.

    A VMA that changed while it was looked at is left out, and one that maps a frame of `changed`.
    Raises ProcessGone, NotPermitted.
    """
    low, high = vmas[0].start, vmas[-1].end
    before = _by_start(process.smaps(low, high))
    figures = residency(process, vmas)
    wrong = [
        (row, vma)
        for row, vma in zip(figures.rows, figures.vmas, strict=True)
        if vma.start in before and before[vma.start].vma == vma and _wrong(process, before[vma.start], row)
    ]
    if not wrong:
        return {}, True
    again = residency(process, tuple(vma for _, vma in wrong))
    after = _by_start(process.smaps(low, high))
    found: dict[str, list[VmaSpot]] = {}
    still = True
    for (row, vma), other in zip(wrong, again.rows, strict=True):
        one, two = before[vma.start], after.get(vma.start)
        moved = (
            two is None or two.vma != vma or _shown(one) != _shown(two) or row.tobytes() != other.tobytes()
        )
        if moved or (len(changed) and np.isin(process.pagemap(vma.start, vma.end).pfn, changed).any()):
            still = False
            continue
        for rule, spot in _wrong(process, one, row).items():
            found.setdefault(rule, []).append(spot)
    return found, still


def _wrong(process: Process, entry: SmapsEntry, row: np.void) -> dict[str, VmaSpot]:
    """By rule, what smaps counts of a VMA against what the tables say."""
    vma, size = entry.vma, process.kernel.geometry.page_size
    shared = vma.kind in (VmaKind.SHMEM, VmaKind.FILE) or vma.shared
    found = {}
    for rule, name, value in (
        ("IN-017", "Rss", int(row["rss"]) * size),
        ("IN-018", "Pss", int(row["pss"]) >> 10 << 10),
        ("IN-019", "Swap", int(row["swap"]) * size),
    ):
        smaps = entry.counters.get(name)
        if smaps is None or smaps == value or (rule == "IN-019" and shared and smaps > value):
            continue
        found[rule] = VmaSpot(process.pid, vma.start, vma.end, vma.name, smaps, value)
    return found


def _by_start(entries: Sequence[SmapsEntry]) -> dict[int, SmapsEntry]:
    return {entry.vma.start: entry for entry in entries}


def _plain(entry: SmapsEntry, task_size: int) -> bool:
    """Whether its entries are ordinary: not mapped by number alone, not hugetlb."""
    special = any(entry.has_flag(code) for code in ("pf", "mm", "io", "ht"))
    return not special and entry.vma.end <= task_size


def _shown(entry: SmapsEntry) -> dict[str, int]:
    return {name: value for name, value in entry.counters.items() if name != "Referenced"}
