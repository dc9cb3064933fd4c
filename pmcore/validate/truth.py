"""What is true of each page of a process, and which rule says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from pmcore import spec
from pmcore.arrays import BoolArray, U64Array
from pmcore.pagemap import PagemapEntries
from pmcore.protocols import IDLE_BITMAP, FrameFile, Kernel, Process
from pmcore.scan import ScanRequest, scan_all
from pmcore.uapi import MAX_SWAPFILES, PageCategory, PageFlag
from pmcore.vma import Vma, VmaKind

__all__ = ["BOOLEANS", "KEYS", "NUMBERS", "RULES", "Truth", "rule_of_flags"]

#: What a tool can tell of a page, with the rule that is broken by telling it wrong.
RULES: Mapping[str, str] = {
    "present": "PM-013",
    "swapped": "PM-012",
    "file": "PM-011",
    "exclusive": "PM-007",
    "soft_dirty": "PM-006",
    "uffd_wp": "PM-008",
    "guard": "PM-009",
    "written": "SC-015",
    "allocated": "SH-005",
    "in_core": "SH-008",
    "idle": "ID-008",
    "pfn": "PM-002",
    "flags": "KF-046",
    "mapcount": "KC-001",
    "cgroup": "KG-001",
}
NUMBERS = ("pfn", "flags", "mapcount", "cgroup")
BOOLEANS = tuple(key for key in RULES if key not in NUMBERS)
KEYS = tuple(RULES)
#: What is asked of frames, and where.
_FRAME_KEYS = (
    ("flags", FrameFile.KPAGEFLAGS),
    ("mapcount", FrameFile.KPAGECOUNT),
    ("cgroup", FrameFile.KPAGECGROUP),
)
#: A page outside all VMAs.
NO_VMA = "PM-014"


@attrs.frozen(kw_only=True, eq=False)
class Truth:
    """A process's pages, one element a page of all its VMAs: by key what is true, and whether it can be known.

    What cannot be known: a bit that this kernel does not have, frame numbers that are hidden, whether a page was
    written where nothing tracks that, what a file has where it cannot be asked.
    """

    addresses: U64Array
    page_size: int
    vmas: tuple[Vma, ...]
    values: Mapping[str, U64Array]
    known: Mapping[str, BoolArray]

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        pid: int,
        *,
        hidden: bool = False,
        within: Sequence[tuple[int, int]] | None = None,
    ) -> Truth:
        """The truth as `kernel` has it; `hidden`: for somebody who may not see frame numbers; `within`: of these
        ranges alone."""
        process, geometry = kernel.process(pid), kernel.geometry
        ranges = [(0, geometry.task_size)] if within is None else within
        parts = [
            (vma, max(vma.start, start), min(vma.end, end))
            for vma in process.maps()
            for start, end in ranges
            if vma.start < min(end, geometry.task_size) and start < vma.end
        ]
        vmas = tuple(attrs.evolve(vma, start=start, end=end) for vma, start, end in parts)
        pieces = [process.pagemap(vma.start, vma.end) for vma in vmas]
        empty = np.zeros(0, dtype=np.uint64)
        words = np.concatenate([empty, *(piece.values for piece in pieces)])
        addresses = np.concatenate([empty, *(piece.addresses for piece in pieces)])
        entries = PagemapEntries(words, profile=kernel.profile)
        values: dict[str, U64Array] = {}
        known: dict[str, BoolArray] = {}

        def tell(key: str, value: np.ndarray, sure: BoolArray | bool) -> None:
            values[key] = value.astype(np.uint64)
            known[key] = np.broadcast_to(np.asarray(sure, dtype=np.bool_), len(words)).copy()

        has = kernel.profile.has
        present = entries.present
        real_swap = entries.swapped & (entries.swap_type < np.uint64(MAX_SWAPFILES))
        tell("present", present, True)
        tell("swapped", real_swap, not hidden)
        tell("file", entries.file, has("pagemap.file"))
        tell("exclusive", entries.exclusive, has("pagemap.mmap_exclusive"))
        # Where the page shift stands in the same bits, whether they are flags depends on what happened since boot.
        tell("soft_dirty", entries.soft_dirty, has("pagemap.soft_dirty") and not has("pagemap.page_shift"))
        tell("uffd_wp", entries.uffd_wp, has("pagemap.uffd_wp"))
        tell("guard", entries.guard, has("pagemap.guard"))
        tell("written", *_written(process, vmas, addresses, geometry.page_size))
        known_of_file, data, in_core = _of_files(process, parts, geometry.page_size)
        empty_page = ~present & ~entries.swapped
        # A page in a swap area can be in the swap cache, too: nobody is told.
        tell("allocated", present | real_swap | (empty_page & data), ~empty_page | known_of_file)
        tell("in_core", present | (empty_page & in_core), present | (empty_page & known_of_file))
        frames = entries.has_pfn
        pfns = entries.pfn
        tell("pfn", np.where(frames, pfns, 0), frames & (not hidden))
        seen = frames & (not hidden)
        for key, file in _FRAME_KEYS:
            found = np.zeros(len(words), dtype=np.uint64)
            there = frames.any() and has(str(file))
            if there:
                found[frames] = kernel.frames_at(file, pfns[frames])
            tell(key, found, seen & there)
        idle, told = _idle(kernel, pfns, seen, values["flags"])
        tell("idle", idle, told)
        if told.any():
            # What kpageflags shows of a page that was marked, and accessed since, changes as soon as anybody looks.
            again = np.zeros(len(words), dtype=np.uint64)
            again[frames] = kernel.frames_at(FrameFile.KPAGEFLAGS, pfns[frames])
            known["flags"] &= again == values["flags"]
        return cls(addresses=addresses, page_size=geometry.page_size, vmas=vmas, values=values, known=known)


def _written(
    process: Process, vmas: tuple[Vma, ...], addresses: U64Array, page_size: int
) -> tuple[BoolArray, BoolArray]:
    """What PAGEMAP_SCAN calls written, where a userfaultfd tracks that; nothing is known elsewhere."""
    tracked, written = (np.zeros(len(addresses), dtype=np.bool_) for _ in range(2))
    if not process.kernel.profile.has("scan"):
        return written, tracked
    allowed, changed = int(PageCategory.WPALLOWED), int(PageCategory.WRITTEN)
    for vma in vmas:
        request = ScanRequest(
            start=vma.start,
            end=vma.end,
            category_mask=allowed,
            return_mask=allowed | changed,
            vec_len=1 << 20,
        )
        for start, end, categories in scan_all(process, request).regions.tolist():
            first, last = np.searchsorted(addresses, np.array([start, end], dtype=np.uint64))
            tracked[first:last] = True
            written[first:last] = bool(categories & changed)
    return written, tracked


def _of_files(
    process: Process, parts: Sequence[tuple[Vma, int, int]], page_size: int
) -> tuple[BoolArray, BoolArray, BoolArray]:
    """A page each: whether what there is behind its mapping is known, whether that has the page, and has it in memory.

    Anonymous memory has nothing behind it.
    """
    found: list[tuple[BoolArray, BoolArray, BoolArray]] = []
    for vma, start, end in parts:
        nothing = np.zeros(-(-(end - start) // page_size), dtype=np.bool_)
        known, data, in_core = ~nothing, nothing, nothing
        if vma.kind is VmaKind.HUGETLB:
            known = nothing
        elif vma.inode or vma.name.startswith("/"):
            try:
                told = process.file_residency(vma, start, end)
            except OSError:
                known = nothing
            else:
                data, in_core = told.data, told.in_core
        found.append((known, data, in_core))
    none = np.zeros(0, dtype=np.bool_)
    known, data, in_core = (np.concatenate([none, *(row[i] for row in found)]) for i in range(3))
    return known, data, in_core


def _idle(kernel: Kernel, pfns: U64Array, seen: BoolArray, flags: U64Array) -> tuple[BoolArray, BoolArray]:
    """What the idle bitmap says of frames, where any is marked at all: asking takes accessed bits (rule ID-006)."""
    idle, told = (np.zeros(len(pfns), dtype=np.bool_) for _ in range(2))
    if not kernel.profile.has("page_idle") or not (flags & np.uint64(PageFlag.IDLE)).any():
        return idle, told
    bits = np.unpackbits(
        np.frombuffer(_bitmap(kernel), dtype=np.uint8), bitorder="little", count=kernel.frame_count()
    )
    idle[seen] = bits[pfns[seen].astype(np.int64)] != 0
    return idle, seen.copy()


def _bitmap(kernel: Kernel) -> bytes:
    """The whole idle bitmap; bits behind its last whole word are 0."""
    found = b""
    while piece := kernel.pread(IDLE_BITMAP, len(found), 4096):
        found += piece
    return found.ljust(-(-kernel.frame_count() // 8), b"\0")


def rule_of_flags(differing: int) -> str:
    """The rule of the lowest flag bit that differs; that of the whole word for a bit that nobody knows."""
    bit = (differing & -differing).bit_length() - 1
    return {row.bit: row.rule for row in spec.kpageflags()}.get(bit, RULES["flags"])
