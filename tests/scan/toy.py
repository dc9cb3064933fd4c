"""A toy address space that both scanners walk: one dictionary of pages, no kernel, no frames."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import attrs
import numpy as np

from pmcore.scan.tables import CodedLeaves, LeafBatch, LeafKind, ScanVma
from pmcore.spec.reference import scan as reference
from pmcore.uapi import PageCategory

PAGE = 4096
#: A small page table (8 entries) keeps examples short; the engine takes the size from the profile.
PMD_PAGES = 8
PMD = PMD_PAGES * PAGE
KINDS = {kind.name.lower(): kind for kind in LeafKind}


def _batch(rows: list[reference.Leaf]) -> LeafBatch:
    return LeafBatch(
        start=np.array([row.start for row in rows], dtype=np.uint64),
        end=np.array([row.end for row in rows], dtype=np.uint64),
        kind=np.array([KINDS[row.kind] for row in rows], dtype=np.uint8),
        categories=np.array([row.categories for row in rows], dtype=np.uint64),
    )


#: What a code says: an empty PTE below this one, from there on one of the categories that follow.
ROOM = 512
PALETTE = _batch(
    [
        *[reference.Leaf("empty", 0, 0)] * ROOM,
        *(reference.Leaf("pte", 0, 0, number) for number in range(ROOM)),
    ]
)


@attrs.define
class ToyTables:
    """`entries`: address -> (kind, categories) of PTEs, PMDs (at their first page) and hugetlb pages."""

    areas: list[ScanVma]
    entries: dict[int, tuple[str, int]]
    #: PMD-sized blocks (by number) that have a page table, so that what is not in `entries` is an empty PTE.
    populated: set[int]
    log: list[tuple[str, int, int]] = attrs.field(factory=list)
    batch: int = 5
    #: Bytes that a PMD maps.
    pmd: int = PMD
    #: Whether neighbouring PTEs are given by codes, and where in a word those stand.
    coded: int | None = None

    # -- what the reference asks -------------------------------------------------------------------------

    def vmas(self) -> list[reference.Vma]:
        return [reference.Vma(**attrs.asdict(area)) for area in self.areas]

    def leaf_at(self, vma: reference.Vma | ScanVma, address: int, end: int) -> reference.Leaf:
        if vma.hugetlb:
            base = address - address % vma.hugetlb
            stop = min(end, base + vma.hugetlb)
            if base in self.entries:
                return reference.Leaf("hugetlb", address, stop, self.entries[base][1])
            return reference.Leaf("hole", address, stop)
        block = address - address % self.pmd
        if self.entries.get(block, ("",))[0] == "pmd":
            return reference.Leaf("pmd", address, min(end, block + self.pmd), self.entries[block][1])
        if block // self.pmd not in self.populated:
            return reference.Leaf("hole", address, min(end, block + self.pmd))
        if address in self.entries:
            return reference.Leaf("pte", address, address + PAGE, self.entries[address][1])
        return reference.Leaf("empty", address, address + PAGE)

    def arm(self, vma: reference.Vma | ScanVma, leaf: reference.Leaf) -> None:
        self.log.append((leaf.kind, leaf.start, leaf.end))
        written = int(PageCategory.WRITTEN)
        if vma.hugetlb:
            base = leaf.start - leaf.start % vma.hugetlb
            kind, categories = self.entries.get(
                base, ("hugetlb", int(PageCategory.HUGE | PageCategory.SWAPPED))
            )
            self.entries[base] = (kind, categories & ~written)
        elif leaf.kind == "pmd":
            kind, categories = self.entries[leaf.start]
            self.entries[leaf.start] = (kind, categories & ~written)
        else:
            for address in range(leaf.start, leaf.end, PAGE):
                self.populated.add(address // self.pmd)
                _, categories = self.entries.get(address, ("pte", int(PageCategory.SWAPPED)))
                self.entries[address] = ("pte", categories & ~written)

    def split(self, vma: reference.Vma | ScanVma, address: int) -> None:
        block = address - address % self.pmd
        _, categories = self.entries.pop(block)
        self.log.append(("split", block, block + self.pmd))
        self.populated.add(block // self.pmd)
        if not categories & PageCategory.FILE:  # a file's huge page is unmapped instead
            for page in range(block, block + self.pmd, PAGE):
                self.entries[page] = ("pte", categories & ~int(PageCategory.HUGE))

    # -- what the engine asks ----------------------------------------------------------------------------

    def scan_vmas(self, start: int, end: int) -> list[ScanVma]:
        return [area for area in self.areas if area.start < end and area.end > start]

    def leaves(self, vma: ScanVma, start: int, end: int) -> Iterator[LeafBatch | CodedLeaves]:
        position = start
        while position < end:
            rows = []
            while position < end and len(rows) < self.batch:
                leaf = self.leaf_at(vma, position, end)
                rows.append(leaf)
                position = leaf.end
            for small, group in itertools.groupby(rows, lambda row: row.kind in ("pte", "empty")):
                part = list(group)
                yield self._coded(part) if small and self.coded is not None else _batch(part)

    def _coded(self, rows: list[reference.Leaf]) -> CodedLeaves:
        codes = [ROOM | row.categories if row.kind == "pte" else 0 for row in rows]
        noise = 0x5A5A5A5A5A5A5A5A & (1 << self.coded) - 1
        words = np.array([code << self.coded | noise for code in codes], dtype=np.uint64)
        return CodedLeaves(rows[0].start, PAGE, words, self.coded, PALETTE)

    def write_protect(self, vma: ScanVma, leaves: LeafBatch) -> None:
        names = {value: name for name, value in KINDS.items()}
        for start, end, kind, categories in zip(
            leaves.start.tolist(),
            leaves.end.tolist(),
            leaves.kind.tolist(),
            leaves.categories.tolist(),
            strict=True,
        ):
            self.arm(vma, reference.Leaf(names[kind], start, end, categories))

    def split_pmd(self, vma: ScanVma, start: int) -> None:
        self.split(vma, start)

    def state(self) -> tuple[dict[int, tuple[str, int]], set[int]]:
        return self.entries, self.populated
