"""How transparent huge pages are mapped: the statistics of the kernel's thpmaps tool, for folios of every order.

A folio that a process maps whole, in one piece, counts by its size, aligned or not to it in the address space; a folio
mapped in part counts as partial. `cont` sizes count aligned blocks that lie within one folio. PMD-mapped memory comes
from smaps and is taken out of the PTE figures, as thpmaps does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import ArgumentError, HiddenPfn
from pmcore.geometry import Geometry
from pmcore.protocols import FrameFile, Process
from pmcore.smaps import SmapsEntry
from pmcore.uapi import PageFlag
from pmcore.vma import Vma

__all__ = ["HugeStats", "cont_order", "huge_rollup", "huge_stats"]

_SMALLEST_ORDER = 2


@attrs.frozen(kw_only=True)
class HugeStats:
    """Statistics of one VMA (None: of several together). Values in bytes, in thpmaps' order of labels."""

    vma: Vma | None
    #: thpmaps' labels ("anon-thp-pte-aligned-64kB", ...).
    values: dict[str, int]
    #: Bytes of anonymous and of other memory in the resident set: what percentages are of.
    anon: int
    file: int

    def share(self, label: str) -> float | None:
        """The part of all anonymous or file memory that `label` is; None where there is none of it."""
        whole = self.anon if label.startswith("anon") else self.file
        return self.values[label] / whole if whole else None


def cont_order(size: int, geometry: Geometry) -> int:
    """The order of a `cont` block of `size` bytes. Raises ArgumentError for one that thpmaps refuses."""
    pages = size >> geometry.page_shift
    if pages < 2 or size & (size - 1) or pages > geometry.pmd_pages:
        raise ArgumentError(
            f"{size} bytes is no size for contiguous blocks",
            remedy=f"a power of two from {2 * geometry.page_size} to {geometry.pmd_size} bytes",
        )
    return pages.bit_length() - 1


def huge_stats(process: Process, *, cont: Sequence[int] = ()) -> Iterator[HugeStats]:
    """Statistics of each VMA of `process`, with blocks of the orders `cont`. Raises HiddenPfn, ProcessGone."""
    geometry = process.kernel.profile.geometry
    for entry in process.smaps():
        vma = entry.vma
        rss, anon = entry.bytes_of("Rss"), entry.bytes_of("Anonymous")
        if rss == 0 or not (vma.readable or vma.writable or vma.executable) or vma.end > geometry.task_size:
            yield HugeStats(vma=vma, values={}, anon=0, file=0)
            continue
        folios = _Mapped.of(process, vma)
        values = _folio_values(folios, entry, geometry)
        for order in cont:
            values |= _block_values(folios, entry, geometry, order)
        yield HugeStats(vma=vma, values=values, anon=anon, file=rss - anon)


def huge_rollup(stats: Iterable[HugeStats]) -> HugeStats:
    """All of `stats` added up."""
    values: dict[str, int] = {}
    anon = file = 0
    for one in stats:
        for label, value in one.values.items():
            values[label] = values.get(label, 0) + value
        anon, file = anon + one.anon, file + one.file
    return HugeStats(vma=None, values=values, anon=anon, file=file)


@attrs.frozen(kw_only=True, eq=False)
class _Mapped:
    """The pages of a VMA that belong to large folios, ascending by address."""

    vpn: U64Array
    pfn: U64Array
    anon: BoolArray
    head: BoolArray
    #: First index of each piece in which pages and frames go on together, and the index after its last.
    first: NDArray[np.intp]
    last: NDArray[np.intp]
    #: Per piece, whether the frame behind it is a tail: the piece's last folio goes on, unmapped here.
    cut: BoolArray

    @classmethod
    def of(cls, process: Process, vma: Vma) -> _Mapped:
        entries = process.pagemap(vma.start, vma.end)
        if entries.hidden.any():
            raise HiddenPfn("looking at huge pages")
        present = entries.has_pfn
        pfn, vpn = entries.pfn[present], entries.vpn[present]
        flags = process.kernel.frames_at(FrameFile.KPAGEFLAGS, pfn)
        large = (flags & np.uint64(PageFlag.THP)) != 0
        pfn, vpn, flags = pfn[large], vpn[large], flags[large]
        breaks = np.flatnonzero((np.diff(vpn) != 1) | (np.diff(pfn) != 1)) + 1
        first = np.append(0, breaks)[: len(pfn)].astype(np.intp)
        last = np.append(first[1:], len(pfn))[: len(first)].astype(np.intp)
        behind = process.kernel.frames_at(FrameFile.KPAGEFLAGS, pfn[last - 1] + np.uint64(1))
        return cls(
            vpn=vpn,
            pfn=pfn,
            anon=(flags & np.uint64(PageFlag.ANON)) != 0,
            head=(flags & np.uint64(PageFlag.COMPOUND_HEAD)) != 0,
            first=first,
            last=last,
            cut=(behind & np.uint64(PageFlag.COMPOUND_TAIL)) != 0,
        )


def _folio_values(folios: _Mapped, entry: SmapsEntry, geometry: Geometry) -> dict[str, int]:
    orders = geometry.pmd_order + 1
    # Pages by [anon?, aligned?, order], and pages of folios mapped in part by [anon?].
    whole, partial = np.zeros((2, 2, orders), dtype=np.int64), np.zeros(2, dtype=np.int64)
    if len(folios.vpn):
        edge = folios.head.copy()
        edge[folios.first] = True
        start = np.flatnonzero(edge)
        pages = np.diff(start, append=len(folios.vpn))
        ends_piece = np.isin(start + pages, folios.last)
        piece = np.searchsorted(folios.last, start, side="right")
        incomplete = ~folios.head[start] | (ends_piece & folios.cut[piece])
        anon = folios.anon[start].astype(np.intp)
        np.add.at(partial, anon[incomplete], pages[incomplete])
        order = np.minimum(np.frexp(pages.astype(np.float64))[1] - 1, orders - 1)
        block = np.left_shift(1, order)
        aligned = (folios.vpn[start] % block.astype(np.uint64) == 0).astype(np.intp)
        full = ~incomplete
        np.add.at(whole, (anon[full], aligned[full], order[full]), block[full])
    mapped = {
        "anon": entry.bytes_of("AnonHugePages"),
        "file": entry.bytes_of("ShmemPmdMapped", "FilePmdMapped"),
    }
    size = geometry.page_size
    for kind, is_anon in (("anon", 1), ("file", 0)):
        rest = int(whole[is_anon, 1, -1]) - mapped[kind] // size
        whole[is_anon, 1, -1] = max(0, rest)
    values = {
        f"{kind}-thp-pmd-aligned-{geometry.pmd_size >> 10}kB": mapped[kind] for kind in ("anon", "file")
    }
    for kind, is_anon in (("anon", 1), ("file", 0)):
        for name, is_aligned in (("aligned", 1), ("unaligned", 0)):
            for order_ in range(_SMALLEST_ORDER, orders):
                label = f"{kind}-thp-pte-{name}-{(size << order_) >> 10}kB"
                values[label] = int(whole[is_anon, is_aligned, order_]) * size
        values[f"{kind}-thp-pte-partial"] = int(partial[is_anon]) * size
    return values


def _block_values(folios: _Mapped, entry: SmapsEntry, geometry: Geometry, order: int) -> dict[str, int]:
    pages = 1 << order
    counts = {"anon": 0, "file": 0}
    if len(folios.vpn):
        heads = np.append(0, np.cumsum(folios.head))
        start = np.flatnonzero(folios.vpn % np.uint64(pages) == 0)
        start = start[folios.pfn[start] % np.uint64(pages) == 0]
        piece = np.searchsorted(folios.last, start, side="right")
        start = start[start + pages <= folios.last[piece]]
        start = start[heads[start + pages] - heads[start + 1] == 0]
        anon = int(folios.anon[start].sum())
        counts = {"anon": anon * pages, "file": (len(start) - anon) * pages}
    size, label = geometry.page_size, f"{(geometry.page_size << order) >> 10}kB"
    mapped = {
        "anon": entry.bytes_of("AnonHugePages"),
        "file": entry.bytes_of("ShmemPmdMapped", "FilePmdMapped"),
    }
    values = {f"{kind}-cont-pmd-aligned-{label}": mapped[kind] for kind in ("anon", "file")}
    for kind in ("anon", "file"):
        values[f"{kind}-cont-pte-aligned-{label}"] = max(0, counts[kind] * size - mapped[kind])
    return values
