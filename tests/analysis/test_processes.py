"""Residency, huge pages, dirty pages and shared memory, on laid-out machines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmcore.analysis.dirty import DirtyMethod, DirtyTracker, dirty_methods
from pmcore.analysis.huge import cont_order, huge_rollup, huge_stats
from pmcore.analysis.residency import residency
from pmcore.analysis.shared import SharedState, shared_states
from pmcore.errors import ArgumentError, HiddenPfn, InvalidArgument, NotSupported
from pmcore.geometry import Geometry
from pmcore.profile import preset
from pmcore.protocols import FileResidency
from pmcore.smaps import SmapsEntry
from pmcore.testing.snapshot import SnapshotKernel
from pmcore.uapi import PageFlag
from pmcore.vma import Vma

VMA = Vma(start=0x10000, end=0x18000)
P = 1 << 63


def machine(words, *, flags=(), counts=(), visible=True, version="6.18", vma=VMA, **process):
    frames = np.zeros(4096, dtype=np.uint64)
    for pfn, word in dict(flags).items():
        frames[pfn] = int(word)
    numbers = np.zeros(4096, dtype=np.uint64)
    for pfn, count in dict(counts).items():
        numbers[pfn] = count
    kernel = SnapshotKernel(
        kpageflags=frames, kpagecount=numbers, pfn_visible=visible, profile=preset(version)
    )
    return kernel.add_process(1, {vma: np.array(words, dtype=np.uint64)}, **process)


def test_residency_counts_as_smaps_does():
    words = [
        P | 1 << 56 | 1,
        P | 2,
        P | 3,
        P | 4,
        1 << 62 | 5 << 5,
        1 << 62 | 1 << 57 | 31 | 1 << 5,
        0,
        P | 1 << 61 | 6,
    ]
    flags = {1: PageFlag.ANON, 2: PageFlag.ANON, 3: PageFlag.ZERO_PAGE, 4: PageFlag.ANON | PageFlag.THP, 6: 0}
    found = residency(machine(words, flags=flags, counts={1: 1, 2: 3, 4: 2, 6: 1}))
    row = {name: int(found.rows[name][0]) for name in found.rows.dtype.names}
    assert row["pages"] == 8
    assert (row["present"], row["rss"], row["zero"]) == (5, 4, 1)
    assert (row["uss"], row["shared"], row["anon"], row["file"]) == (2, 2, 3, 1)
    assert (row["swap"], row["special"], row["uffd_wp"], row["huge"]) == (1, 1, 1, 1)
    assert row["pss"] == 4096 + 4096 // 3 + 4096 // 2 + 4096
    assert found.total("rss") == 4
    assert found.unknown == frozenset()


def test_residency_without_frame_numbers_says_what_it_does_not_know():
    found = residency(machine([P | 1 << 56 | 1, P | 2, 0, 0, 1 << 62 | 32, 0, 0, 0], visible=False))
    assert found.frames_hidden
    for name in ("rss", "pss", "uss", "anon", "huge", "swap", "special"):
        assert found.column(name) is None
        assert found.total(name) is None
    assert found.total("present") == 2
    assert found.total("exclusive") == 1
    assert found.total("hidden") == 3  # two frames and a swap entry


# -- huge pages ------------------------------------------------------------------------------------------


def by_hand(vpns, pfns, flags, kpageflags):
    """thpmaps' figures for PTE-mapped folios, a page at a time: (partial, aligned by order, unaligned by order)."""
    partial, aligned, unaligned = 0, {}, {}
    pages = [(v, p) for v, p in zip(vpns, pfns, strict=True) if flags[p] & PageFlag.THP]
    pieces, piece = [], []
    for v, p in pages:
        if piece and (v, p) == (piece[-1][0] + 1, piece[-1][1] + 1):
            piece.append((v, p))
        else:
            pieces.append(piece)
            piece = [(v, p)]
    pieces.append(piece)
    for piece in filter(None, pieces):
        folios: list[list[tuple[int, int]]] = []
        for page in piece:
            if flags[page[1]] & PageFlag.COMPOUND_HEAD or not folios:
                folios.append([])
            folios[-1].append(page)
        for number, folio in enumerate(folios):
            whole = bool(flags[folio[0][1]] & PageFlag.COMPOUND_HEAD)
            if number == len(folios) - 1 and kpageflags[folio[-1][1] + 1] & PageFlag.COMPOUND_TAIL:
                whole = False
            if not whole:
                partial += len(folio)
                continue
            order = len(folio).bit_length() - 1
            where = aligned if folio[0][0] % len(folio) == 0 else unaligned
            where[order] = where.get(order, 0) + len(folio)
    return partial, aligned, unaligned


@given(st.randoms(use_true_random=False))
def test_folios_are_counted_as_thpmaps_counts_them(rng):
    flags = np.zeros(4096, dtype=np.uint64)
    folios, pfn = [], 64
    for _ in range(rng.randint(1, 5)):
        order = rng.choice([2, 3, 4])
        pfn = -(-pfn // (1 << order)) * (1 << order)
        flags[pfn : pfn + (1 << order)] = int(PageFlag.THP | PageFlag.ANON | PageFlag.COMPOUND_TAIL)
        flags[pfn] = int(PageFlag.THP | PageFlag.ANON | PageFlag.COMPOUND_HEAD)
        folios.append((pfn, order))
        pfn += (1 << order) + rng.choice([0, 0, 1])
    words = np.zeros(128, dtype=np.uint64)
    at = rng.randint(0, 3)
    for first, order in folios:
        low = rng.choice([0, 0, 1])
        high = (1 << order) - rng.choice([0, 0, 2])
        for page in range(low, high):
            words[at] = P | (first + page)
            at += 1
        at += rng.choice([0, 1, 3])
    vma = Vma(start=0x200000, end=0x200000 + 128 * 4096)
    kernel = SnapshotKernel(kpageflags=flags)
    entry = SmapsEntry(vma=vma, counters={"Rss": 4096 * 128, "Anonymous": 4096 * 128})
    process = kernel.add_process(1, {vma: words}, smaps=[entry])
    [found] = huge_stats(process)
    index = np.flatnonzero(words)
    partial, aligned, unaligned = by_hand(
        (index + 0x200).tolist(), (words[index] & np.uint64(0xFFFF)).tolist(), flags.tolist(), flags.tolist()
    )
    assert found.values["anon-thp-pte-partial"] == partial * 4096
    for order in (2, 3, 4):
        label = f"{4 << order}kB"
        assert found.values[f"anon-thp-pte-aligned-{label}"] == aligned.get(order, 0) * 4096
        assert found.values[f"anon-thp-pte-unaligned-{label}"] == unaligned.get(order, 0) * 4096
    assert sum(v for k, v in found.values.items() if k.startswith("file")) == 0


def test_pmd_mapped_memory_and_blocks():
    vma = Vma(start=0x200000, end=0x400000)
    flags = np.zeros(2048, dtype=np.uint64)
    flags[512:1024] = int(PageFlag.THP | PageFlag.ANON | PageFlag.COMPOUND_TAIL)
    flags[512] = int(PageFlag.THP | PageFlag.ANON | PageFlag.COMPOUND_HEAD)
    words = np.arange(512, 1024, dtype=np.uint64) | np.uint64(P)
    kernel = SnapshotKernel(kpageflags=flags)
    counters = {"Rss": 2 << 20, "Anonymous": 2 << 20}
    for pmd_mapped in (2 << 20, 0):
        entry = SmapsEntry(vma=vma, counters={**counters, "AnonHugePages": pmd_mapped})
        process = kernel.add_process(1, {vma: words}, smaps=[entry])
        [found] = huge_stats(process, cont=[4])
        assert found.values["anon-thp-pmd-aligned-2048kB"] == pmd_mapped
        assert found.values["anon-thp-pte-aligned-2048kB"] == (2 << 20) - pmd_mapped
        assert found.values["anon-cont-pte-aligned-64kB"] == (2 << 20) - pmd_mapped
        assert found.share("anon-thp-pmd-aligned-2048kB") == pmd_mapped / (2 << 20)
        assert found.share("file-thp-pmd-aligned-2048kB") is None
    both = huge_rollup([found, found])
    assert both.values["anon-thp-pte-aligned-2048kB"] == 4 << 20
    assert both.anon == 4 << 20
    assert both.vma is None


def test_sizes_of_contiguous_blocks():
    assert cont_order(65536, Geometry()) == 4
    for size in (0, 4096, 12288, 65537, 4 << 20):
        with pytest.raises(ArgumentError):
            cont_order(size, Geometry())


def test_huge_pages_need_frame_numbers():
    entry = SmapsEntry(vma=VMA, counters={"Rss": 4096, "Anonymous": 0})
    with pytest.raises(HiddenPfn):
        list(huge_stats(machine([P | 1] * 8, visible=False, smaps=[entry])))


# -- dirty -----------------------------------------------------------------------------------------------


@pytest.mark.rule("PM-006", "AC-012")
def test_soft_dirty_where_there_is_no_scan():
    words = [P | 1 << 55 | 1, P | 2, 1 << 62 | 1 << 55 | 64, 1 << 55, 0, 0, 0, 0]
    process = machine(words, version="6.1", smaps=[SmapsEntry(vma=VMA, vm_flags=())])
    assert dirty_methods(process) == (DirtyMethod.SOFT_DIRTY,)
    tracker = DirtyTracker(process)
    found = [
        ((low - VMA.start) // 4096, (high - VMA.start) // 4096) for low, high, _ in tracker.dirty().tolist()
    ]
    assert found == [(0, 1), (2, 3)]
    assert tracker.pages() == 2
    with pytest.raises(ArgumentError, match="soft-dirty"):
        DirtyTracker(process, "uffd-wp")


def test_soft_dirty_with_the_call_but_not_the_category():
    words = [P | 1 << 55 | 1, P | 1 << 55 | 2, 1 << 62 | 1 << 55 | 64, 0, 0, 0, 0, 0]
    tracker = DirtyTracker(machine(words, version="6.7", smaps=[SmapsEntry(vma=VMA, vm_flags=())]))
    found = [
        ((low - VMA.start) // 4096, (high - VMA.start) // 4096) for low, high, _ in tracker.dirty().tolist()
    ]
    assert found == [(0, 2), (2, 3)]


def test_no_method_says_what_is_needed():
    profile = preset("6.18", config=["!CONFIG_MEM_SOFT_DIRTY"])
    kernel = SnapshotKernel(kpageflags=np.zeros(4, dtype=np.uint64), profile=profile)
    process = kernel.add_process(1, {VMA: np.zeros(8, dtype=np.uint64)})
    assert dirty_methods(process) == ()
    with pytest.raises(NotSupported, match="CONFIG_MEM_SOFT_DIRTY") as caught:
        DirtyTracker(process)
    assert "WP_ASYNC" in str(caught.value.remedy)


# -- shared ----------------------------------------------------------------------------------------------


@pytest.mark.rule("SH-001", "SH-005", "SH-006", "SH-008")
def test_states_of_shared_pages():
    data = np.array([1, 1, 1, 0, 0, 1, 0, 0], dtype=np.bool_)
    in_core = np.array([1, 1, 0, 0, 0, 0, 0, 0], dtype=np.bool_)
    process = machine(
        [P | 1 << 61 | 1, 0, 0, 0, 0, 0, 0, 0], files={VMA: FileResidency(data=data, in_core=in_core)}
    )
    present, cached, stored, none = (
        SharedState.PRESENT,
        SharedState.CACHED,
        SharedState.STORED,
        SharedState.NONE,
    )
    expected = [present, cached, stored, none, none, stored, none, none]
    assert shared_states(process, VMA).tolist() == expected
    assert shared_states(process, VMA, VMA.start + 4096, VMA.start + 3 * 4096).tolist() == [cached, stored]
    other = Vma(start=1 << 30, end=(1 << 30) + 4096)
    with pytest.raises(InvalidArgument):
        shared_states(process, other)
