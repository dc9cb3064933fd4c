"""How much of a process is in memory, how much of it is shared, and with how many: per VMA, from its tables.

The figures are those of smaps (rules of the kernel's smaps_pte_entry: the zero page and special mappings do not count),
computed from pagemap, kpagecount and kpageflags. What needs frame numbers is None where they are hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore import uapi
from pmcore.errors import Missing, NotPermitted
from pmcore.pageflags import PageFlagsArray
from pmcore.pagemap import PagemapFields
from pmcore.protocols import FrameFile, Process
from pmcore.uapi import PageFlag
from pmcore.vma import Vma

__all__ = ["RESIDENCY_DTYPE", "Residency", "residency"]

#: Pages, but for `pss` (bytes, the kernel's fixed-point sum). One row a VMA.
RESIDENCY_DTYPE = np.dtype(
    [
        ("start", "<u8"),
        ("end", "<u8"),
        ("pages", "<i8"),
        ("present", "<i8"),
        ("rss", "<i8"),
        ("pss", "<i8"),
        ("uss", "<i8"),
        ("shared", "<i8"),
        ("exclusive", "<i8"),
        ("file", "<i8"),
        ("anon", "<i8"),
        ("swap", "<i8"),
        ("special", "<i8"),
        ("zero", "<i8"),
        ("huge", "<i8"),
        ("uffd_wp", "<i8"),
        ("soft_dirty", "<i8"),
        ("guard", "<i8"),
        ("hidden", "<i8"),
    ]
)
_PSS_SHIFT = 12
_BATCH = 1 << 17
#: Columns that cannot be known without frame numbers and swap entries.
_NEEDS_FRAMES = frozenset({"rss", "pss", "uss", "shared", "anon", "zero", "huge", "swap", "special"})


@attrs.frozen(kw_only=True, eq=False)
class Residency:
    """The VMAs, and one row of figures for each."""

    vmas: tuple[Vma, ...]
    rows: NDArray[np.void]
    #: Whether frame numbers were hidden: the columns in `unknown` then say nothing.
    frames_hidden: bool

    @property
    def unknown(self) -> frozenset[str]:
        """Columns that could not be computed."""
        return _NEEDS_FRAMES if self.frames_hidden else frozenset()

    def column(self, name: str) -> NDArray[np.int64] | None:
        """One figure for all VMAs, None where it could not be computed."""
        return None if name in self.unknown else self.rows[name]

    def total(self, name: str) -> int | None:
        """One figure summed over all VMAs, None where it could not be computed."""
        column = self.column(name)
        return None if column is None else int(column.sum())


def residency(
    process: Process,
    vmas: tuple[Vma, ...] | None = None,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Residency:
    """The residency of `vmas` (default: all that maps shows). Raises ProcessGone, NotPermitted.

    `progress(done, total)` is told the bytes looked at after each batch.
    """
    geometry = process.kernel.profile.geometry
    looked_at = tuple(
        vma for vma in (process.maps() if vmas is None else vmas) if vma.end <= geometry.task_size
    )
    rows = np.zeros(len(looked_at), dtype=RESIDENCY_DTYPE)
    hidden = False
    done, total = 0, sum(vma.length for vma in looked_at)
    for row, vma in zip(rows, looked_at, strict=True):
        row["start"], row["end"] = vma.start, vma.end
        pss = 0
        for start in range(vma.start, vma.end, _BATCH << geometry.page_shift):
            end = min(vma.end, start + (_BATCH << geometry.page_shift))
            entries = process.pagemap(start, end)
            row["pages"] += (end - start) >> geometry.page_shift
            fields = entries.decode()
            _by_entries(row, fields)
            if row["hidden"]:
                hidden = True
            elif fields.present.any():
                try:
                    pss += _by_frames(row, process, vma, fields, geometry.page_size)
                except (NotPermitted, Missing):
                    hidden = True
            done += end - start
            if progress is not None:
                progress(done, total)
        row["pss"] = pss >> _PSS_SHIFT
    return Residency(vmas=looked_at, rows=rows, frames_hidden=hidden)


def _by_entries(row: np.void, fields: PagemapFields) -> None:
    """Add up what the entries say by themselves."""
    present = fields.present
    swapped = fields.swapped & ~present
    hidden = swapped & (fields.swap_offset == 0) & (fields.swap_type == 0)
    area = swapped & ~hidden & (fields.swap_type < uapi.MAX_SWAPFILES)
    row["present"] += int(present.sum())
    row["exclusive"] += int((present & fields.exclusive).sum())
    row["file"] += int((present & fields.file).sum())
    row["swap"] += int(area.sum())
    row["special"] += int((swapped & ~area & ~hidden).sum())
    row["uffd_wp"] += int(fields.uffd_wp.sum())
    row["soft_dirty"] += int(fields.soft_dirty.sum())
    row["guard"] += int(fields.guard.sum())
    row["hidden"] += int((fields.pfn[present] == 0).sum() + hidden.sum())


def _by_frames(row: np.void, process: Process, vma: Vma, fields: PagemapFields, page_size: int) -> int:
    """Add up what the frames say; the proportional share in bytes, shifted by _PSS_SHIFT."""
    kernel = process.kernel
    pfns = fields.pfn[fields.present]
    flags = PageFlagsArray(kernel.frames_at(FrameFile.KPAGEFLAGS, pfns), profile=kernel.profile)
    counts = kernel.frames_at(FrameFile.KPAGECOUNT, pfns)
    zero = flags.has(PageFlag.ZERO_PAGE)
    # Memory mapped by its frame number alone (devices, the vvar pages) is no part of the RSS.
    special = flags.has(PageFlag.NOPAGE) | (pfns >= np.uint64(kernel.frame_count()))
    special |= vma.name.startswith("[vvar")
    counted = ~zero & ~special
    hugetlb = flags.has(PageFlag.HUGE)
    row["zero"] += int(zero.sum())
    row["huge"] += int(flags.any(PageFlag.THP | PageFlag.HUGE).sum())
    counted &= ~hugetlb
    row["rss"] += int(counted.sum())
    row["anon"] += int((flags.has(PageFlag.ANON) & counted).sum())
    shares = counts[counted]
    # A frame whose count has just dropped is as good as ours.
    row["uss"] += int((shares < 2).sum())
    row["shared"] += int((shares >= 2).sum())
    fixed = np.uint64(page_size << _PSS_SHIFT) // np.maximum(shares, np.uint64(1))
    return int(fixed.sum())
