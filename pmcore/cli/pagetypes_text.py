"""Output laid out as the kernel's page-types lays it out, for scripts that read it and for comparison."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pmcore.analysis.listing import page_ranges
from pmcore.analysis.rows import FrameRows
from pmcore.pagetypes import long_names, symbolic

__all__ = ["write"]

#: page-types counts in a hash table of that many slots and prints it slot by slot.
_SLOTS = 1 << 13


def write(rows: Iterable[FrameRows], options: dict[str, Any], page_size: int) -> None:
    """Write list and summary to standard output."""
    out, listing = sys.stdout, options["listing"]
    counts: dict[int, int] = {}

    def counted() -> Iterator[FrameRows]:
        for batch in rows:
            words, first, number = np.unique(batch.flags, return_index=True, return_counts=True)
            for index in np.argsort(first).tolist():  # in the order in which page-types meets them
                word = int(words[index])
                counts[word] = counts.get(word, 0) + int(number[index])
            yield batch

    before: list[str] = []
    if options["pid"] is not None:
        before.append("voffset")
    if options["path"] is not None:
        before.append("foffset")
    shown = [*before]
    if options["list_cgroup"]:
        shown.append("cgroup")
    if options["list_mapcnt"]:
        shown.append("map-cnt")
    letters: dict[int, str] = {}

    def lettered(word: int) -> str:
        if word not in letters:
            letters[word] = symbolic(word)
        return letters[word]

    def prefix(voffset: int, cgroup: int, mapcount: int) -> str:
        cells = [f"{voffset:x}" for _ in before]
        if options["list_cgroup"]:
            cells.append(f"@{cgroup}")
        if options["list_mapcnt"]:
            cells.append(str(mapcount))
        return "".join(f"{cell}\t" for cell in cells)

    if listing == "ranges":
        out.write("".join(f"{name}\t" for name in shown) + "offset\tlen\tflags\n")
        for ranges in page_ranges(counted()):
            for v, offset, pages, flags, cgroup, mapcount in ranges.tolist():
                out.write(f"{prefix(v, cgroup, mapcount)}{offset:x}\t{pages:x}\t{lettered(flags)}\n")
    elif listing == "each":
        out.write("".join(f"{name}\t" for name in shown) + "offset\tflags\n")
        for batch in counted():
            columns = (batch.voffset, batch.offset, batch.flags, batch.cgroup, batch.mapcount)
            for v, offset, flags, cgroup, mapcount in zip(*(c.tolist() for c in columns), strict=True):
                out.write(f"{prefix(v, cgroup, mapcount)}{offset:x}\t{lettered(flags)}\n")
    else:
        for _ in counted():
            pass
    if options["no_summary"]:
        return
    if listing is not None:
        out.write("\n\n")
    if options["path"] is not None:
        _file_header(options["path"], page_size)
    out.write("             flags\tpage-count       MB  symbolic-flags\t\t\tlong-symbolic-flags\n")
    for word in _slot_order(counts):
        megabytes = counts[word] * page_size >> 20
        out.write(f"{word:#018x}\t{counts[word]:10} {megabytes:8}  {lettered(word)}\t{long_names(word)}\n")
    total = sum(counts.values())
    out.write(f"             total\t{total:10} {total * page_size >> 20:8}\n")


def _slot_order(counts: dict[int, int]) -> list[int]:
    """The words in the order of page-types' hash table; `counts` is in the order in which they were met."""
    table: dict[int, int] = {}
    for word in counts:
        slot = word % _SLOTS
        if word:
            slot = slot or 1
            while slot in table:
                slot = slot % (_SLOTS - 1) + 1
        table[slot] = word
    return [table[slot] for slot in sorted(table)]


def _file_header(path: str, page_size: int) -> None:
    status, now = Path(path).stat(), int(time.time())
    pages = -(-status.st_size // page_size)
    modified, accessed = (
        f"{time.ctime(stamp)} ({now - int(stamp)} seconds ago)"
        for stamp in (status.st_mtime, status.st_atime)
    )
    sys.stdout.write(
        f"{path}\tInode: {status.st_ino}\tSize: {status.st_size} ({pages} pages)\n"
        f"Modify: {modified}\nAccess: {accessed}\n\n"
    )
