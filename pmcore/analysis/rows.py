"""Frames one after the other, as page-types walks them: of the machine, of a process, of a file.

A *row* is a frame (or a swapped page) with its flags as shown, and where wanted its memory cgroup and map count. Rows
come in batches of arrays; filters have been applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import attrs
import numpy as np

from pmcore.analysis.bits import BitFilter
from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import ArgumentError, HiddenPfn
from pmcore.pagemap import PagemapEntries
from pmcore.pagetypes import expand_overloaded, well_known
from pmcore.protocols import FrameFile, Kernel, Process
from pmcore.uapi import PagemapFlag

__all__ = ["FrameRows", "RowOptions", "file_rows", "frame_rows", "process_rows", "rows_from_words"]

#: Frames read at a time.
BATCH = 1 << 17


@attrs.frozen(kw_only=True, eq=False)
class FrameRows:
    """A batch. Arrays of equal length; `offset` is the frame number, or the swap offset of a swapped page."""

    #: Page number in the address space or file; for the machine's frames the frame number itself.
    voffset: U64Array
    offset: U64Array
    #: As shown: page-types' default or raw view.
    flags: U64Array
    #: Inode numbers of memory cgroups, all 0 where not asked for.
    cgroup: U64Array
    #: Map counts, all 0 where not asked for.
    mapcount: U64Array

    def __len__(self) -> int:
        return len(self.offset)

    def take(self, where: BoolArray | slice) -> FrameRows:
        """The rows at `where`."""
        return FrameRows(
            voffset=self.voffset[where],
            offset=self.offset[where],
            flags=self.flags[where],
            cgroup=self.cgroup[where],
            mapcount=self.mapcount[where],
        )


@attrs.frozen(kw_only=True)
class RowOptions:
    """What rows show and which are left out."""

    #: page-types' raw view: overloaded bits told apart, pagemap's flags added.
    raw: bool = False
    #: All of them must pass.
    filters: Sequence[BitFilter] = ()
    #: Only frames charged to the memory cgroup of this inode number.
    cgroup: int | None = None
    show_cgroup: bool = False
    show_mapcount: bool = False

    def shown(self, words: U64Array, pagemap: U64Array | None = None) -> U64Array:
        """The view of raw kpageflags words."""
        return expand_overloaded(words, pagemap) if self.raw else well_known(words)

    def passes(self, shown: U64Array) -> BoolArray:
        """Per word, whether it passes all filters."""
        passed: BoolArray = np.ones(len(shown), dtype=np.bool_)
        for one in self.filters:
            passed &= one.matches(shown)
        return passed


def frame_rows(
    kernel: Kernel, options: RowOptions, *, ranges: Iterable[tuple[int, int | None]] = ((0, None),)
) -> Iterator[FrameRows]:
    """The machine's frames in the `ranges` of frame numbers (end exclusive, None: the last)."""
    count = kernel.frame_count()
    for start, end in ranges:
        stop = count if end is None else min(end, count)
        for first in range(start, stop, BATCH):
            pfns = np.arange(first, min(first + BATCH, stop), dtype=np.uint64)
            words = np.zeros(len(pfns), dtype=np.uint64)
            kernel.read_frames(FrameFile.KPAGEFLAGS, first, words)
            yield _rows(kernel, options, pfns, pfns, options.shown(words), contiguous=True)


def process_rows(
    process: Process, options: RowOptions, *, ranges: Iterable[tuple[int, int | None]] = ((0, None),)
) -> Iterator[FrameRows]:
    """The pages of a process in the `ranges` of page numbers: each present one by its frame, then swapped ones.

    Raises HiddenPfn where frame numbers are not shown.
    """
    geometry = process.kernel.profile.geometry
    # vsyscall lies above what pagemap covers.
    vmas = [vma for vma in process.maps() if vma.start < geometry.task_size]
    for start, end in ranges:
        for vma in vmas:
            low = max(vma.start >> geometry.page_shift, start)
            high = vma.end >> geometry.page_shift
            high = high if end is None else min(high, end)
            for first in range(low, high, BATCH):
                last = min(first + BATCH, high)
                entries = process.pagemap(first << geometry.page_shift, last << geometry.page_shift)
                yield _entry_rows(process.kernel, options, entries, entries.vpn)


def file_rows(
    kernel: Kernel, path: str, options: RowOptions, *, ranges: Iterable[tuple[int, int | None]] = ((0, None),)
) -> Iterator[FrameRows]:
    """The pages of the file `path` that are in memory. Needs a backend that can map files (`file_pagemap`)."""
    walk = getattr(kernel, "file_pagemap", None)
    if walk is None:
        raise ArgumentError(f"backend {kernel.name!r} cannot show the pages of a file")
    shift = kernel.profile.geometry.page_shift
    for start, end in ranges:
        for offset, words in walk(path, start << shift, None if end is None else end << shift):
            entries = PagemapEntries(words, profile=kernel.profile)
            pages = np.uint64(offset >> shift) + np.arange(len(words), dtype=np.uint64)
            yield _entry_rows(kernel, options, entries, pages)


def rows_from_words(words: U64Array, options: RowOptions, *, first: int = 0) -> FrameRows:
    """Rows of kpageflags words that come from elsewhere (a saved file)."""
    pfns = np.uint64(first) + np.arange(len(words), dtype=np.uint64)
    nothing = np.zeros(len(words), dtype=np.uint64)
    rows = FrameRows(voffset=pfns, offset=pfns, flags=options.shown(words), cgroup=nothing, mapcount=nothing)
    return rows.take(options.passes(rows.flags))


def _entry_rows(kernel: Kernel, options: RowOptions, entries: PagemapEntries, pages: U64Array) -> FrameRows:
    """Rows of pagemap entries: page-types looks up each present frame, and shows swapped pages by their offset."""
    if entries.hidden.any():
        raise HiddenPfn("looking up page flags")
    present = entries.has_pfn
    swapped = (entries.values & np.uint64(PagemapFlag.SWAP)) != 0
    keep = present | swapped
    entries = PagemapEntries(entries.values[keep], profile=entries.profile)
    present, pages = present[keep], pages[keep]
    words = np.zeros(len(entries), dtype=np.uint64)
    words[present] = kernel.frames_at(FrameFile.KPAGEFLAGS, entries.pfn[present])
    offset = np.where(present, entries.pfn, entries.swap_offset)
    return _rows(
        kernel, options, pages, offset, options.shown(words, entries.values), contiguous=False, frames=present
    )


def _rows(
    kernel: Kernel,
    options: RowOptions,
    voffset: U64Array,
    offset: U64Array,
    flags: U64Array,
    *,
    contiguous: bool,
    frames: BoolArray | None = None,
) -> FrameRows:
    """Filter, and look up cgroups and counts of what is left. `frames`: which rows are frames, not swap offsets."""
    passed = options.passes(flags)
    nothing = np.zeros(len(offset), dtype=np.uint64)

    def looked_up(file: FrameFile) -> U64Array:
        found = nothing.copy()
        where = passed if frames is None else passed & frames
        if contiguous and len(offset) and where.any():
            kernel.read_frames(file, int(offset[0]), found)
        elif where.any():
            found[where] = kernel.frames_at(file, offset[where])
        return found

    cgroup = (
        looked_up(FrameFile.KPAGECGROUP) if options.show_cgroup or options.cgroup is not None else nothing
    )
    if options.cgroup is not None:
        passed &= cgroup == np.uint64(options.cgroup)
        if frames is not None:
            passed &= frames
    mapcount = looked_up(FrameFile.KPAGECOUNT) if options.show_mapcount else nothing
    rows = FrameRows(
        voffset=voffset,
        offset=offset,
        flags=flags,
        cgroup=cgroup if options.show_cgroup else nothing,
        mapcount=mapcount,
    )
    return rows if passed.all() else rows.take(passed)
