"""The engine predicts what the running kernel answers: regions, walk_end, errno, and the tables after protecting.

The state before a request is asked for page by page, with calls too simple to go wrong; the request itself is as
complicated as chance makes it. Verified on 6.18.44 (x86-64). `PMCORE_LIVE_SCANS` sets how many requests are compared.
"""

from __future__ import annotations

import collections
import itertools
import os
import random
from collections.abc import Iterator

import pytest

from pmcore.backends.procfs.workbench import steady
from pmcore.profile import preset
from pmcore.scan import ScanRequest, ScanVma, scan_tables
from pmcore.uapi import PageCategory

from . import live_areas
from .live_areas import ARENA, PAGE, PMD, LiveAreas
from .toy import ToyTables

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]
_REASON = live_areas.why_not()
REQUESTS = int(os.environ.get("PMCORE_LIVE_SCANS", "600"))
WRITTEN, HUGE = int(PageCategory.WRITTEN), int(PageCategory.HUGE)
FILLED = int(PageCategory.PRESENT | PageCategory.SWAPPED)


@pytest.fixture
def live() -> Iterator[LiveAreas]:
    if _REASON:
        pytest.skip(_REASON)
    areas = LiveAreas().open()
    try:
        with steady():  # khugepaged would collapse what a request has split
            yield areas
    finally:
        areas.close()


def tables_of(live: LiveAreas) -> ToyTables:
    """What the kernel shows page by page, as tables for the engine."""
    entries: dict[int, tuple[str, int]] = {}
    populated: set[int] = set()
    for area in live.areas:
        of_vma = int(PageCategory.WPALLOWED) if area.wp_async else 0
        step = area.hugetlb or PAGE
        for address, word in zip(
            range(area.start, area.end, PAGE), live.page_categories(area.start, area.end), strict=True
        ):
            categories = word & ~of_vma
            if address % step:
                continue
            if area.hugetlb:
                if categories & HUGE:
                    entries[address] = ("hugetlb", categories)
            elif categories & HUGE:
                if address % PMD == 0:
                    entries[address] = ("pmd", categories)
            elif categories & FILLED:
                entries[address] = ("pte", categories)
                populated.add(address // PMD)
            elif categories & WRITTEN and not area.uffd_wp:
                populated.add(address // PMD)
    return ToyTables(list(live.areas), entries, populated, batch=4096, pmd=PMD)


def request_for(areas: list[ScanVma], rng: random.Random) -> ScanRequest:
    low, high = areas[0].start, areas[-1].end
    edges = [edge for area in areas for edge in (area.start, area.end)]
    picks = [rng.choice(edges), rng.randrange(low, high, PAGE), rng.choice(edges) & -PMD]
    start, end = sorted((rng.choice([low, rng.choice(picks)]), rng.choice([high, rng.choice(picks)])))
    fast = rng.random() < 0.25
    return ScanRequest(
        start=start,
        end=end,
        vec_len=rng.choice([0, 1, 3, 511, 512, 513, 4096, rng.randint(1, 1200)]),
        max_pages=rng.choice([0, 0, 0, rng.randint(1, 3000)]),
        flags=rng.choice([0, 0, 0, 1, 1, 2, 3]),
        category_inverted=0 if fast or rng.random() < 0.6 else live_areas.categories_mask(rng),
        category_mask=WRITTEN if fast else live_areas.categories_mask(rng),
        category_anyof_mask=0 if fast or rng.random() < 0.6 else live_areas.categories_mask(rng),
        return_mask=WRITTEN if fast else rng.choice([255, 255, live_areas.categories_mask(rng)]),
    )


def furnished(live: LiveAreas, rng: random.Random, *, hugetlb: bool) -> None:
    # One touched page far off: with the level above the PMDs filled, a hugetlb entry is empty, never a hole.
    sentinel = live.map(ARENA + (1 << 29), PAGE, kind="anon", protect=False)
    live.touch(sentinel.start, write=True)
    live.areas.remove(sentinel)
    live.spare.append(sentinel)
    position = ARENA
    for _ in range(rng.randint(2, 4)):
        kind = rng.choice(["anon", "anon", "shmem", *(["hugetlb"] if hugetlb else [])])
        length = rng.choice([PMD, 2 * PMD, 3 * PAGE, 700 * PAGE])
        if kind == "hugetlb":
            position, length = -(-position // PMD) * PMD, PMD * rng.choice([1, 2])
        area = live.map(position, length, kind=kind, protect=rng.random() < 0.7)
        live_areas.furnish(live, area, rng, shmem=kind == "shmem")
        position = area.end + rng.choice([0, 0, 5 * PAGE, PMD])


def free_hugetlb_pages() -> int:
    with open("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") as file:  # noqa: PTH123
        return int(file.read())


@pytest.mark.rule(
    "SC-001", "SC-012", "SC-023", "SC-028", "SC-029", "SC-030", "SC-033", "SC-035", "SC-036", "SC-042"
)
def test_engine_predicts_the_kernel(live: LiveAreas) -> None:
    profile = preset(os.uname().release)
    hugetlb = free_hugetlb_pages() >= 8
    reached: collections.Counter[str] = collections.Counter()
    done = seed = 0
    while done < REQUESTS:
        rng = random.Random(seed)
        seed += 1
        try:
            furnished(live, rng, hugetlb=hugetlb)
            for _ in range(12):
                request = request_for(live.areas, rng)
                predicted_tables = tables_of(live)
                predicted = scan_tables(request, predicted_tables, profile)
                failed, regions, walk_end = live.scan(request)
                note = f"seed {seed - 1}, {request}"
                assert predicted.errno == failed, note
                if not failed:
                    assert [tuple(r) for r in predicted.regions.tolist()] == regions, note
                assert predicted.walk_end == walk_end, note
                after = tables_of(live)
                assert predicted_tables.entries == after.entries, note
                reached["protected"] += bool(predicted_tables.log)
                reached["split"] += any(kind == "split" for kind, _, _ in predicted_tables.log)
                reached["buffer filled"] += len(regions) > 512
                reached["stale walk_end"] += bool(regions) and walk_end < regions[-1][1]
                reached["touching and equal"] += any(
                    a[1] == b[0] and a[2] == b[2] for a, b in itertools.pairwise(regions)
                )
                done += 1
        finally:
            live.unmap_all()
    assert reached["protected"] > 0
    assert reached["split"] > 0
    assert reached["buffer filled"] > 0


@pytest.mark.rule("SC-020", "SC-026")
def test_hole_of_hugetlb_is_neither_huge_nor_written(live: LiveAreas) -> None:
    """With no page table at all under a hugetlb VMA the walk reports the VMA's categories alone."""
    if free_hugetlb_pages() < 1:
        pytest.skip("needs a free hugetlb page (/proc/sys/vm/nr_hugepages)")
    area = live.map(ARENA + (1 << 40), PMD, kind="hugetlb", protect=False)
    assert live.page_categories(area.start, area.start + PAGE) == [0]
    live.touch(area.start, write=True)
    assert live.page_categories(area.start, area.start + PAGE) == [WRITTEN | HUGE | int(PageCategory.PRESENT)]
