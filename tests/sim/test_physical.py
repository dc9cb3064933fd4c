"""Memory: frames, free blocks, contents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pmcore
from pmcore import PageFlag
from pmcore.backends.sim.physical.buddy import Zone
from pmcore.backends.sim.physical.contents import Contents
from pmcore.backends.sim.physical.frames import Frames
from pmcore.errors import ArgumentError
from pmcore.profile import preset

PAGE = 4096


def _zone(blocks: int = 4) -> Zone:
    return Zone(Frames(blocks * 1024), 0, blocks * 1024)


def _is_whole(zone: Zone) -> bool:
    """Whether free memory is counted right, shows BUDDY, and no two free buddies are apart."""
    frames = zone.frames
    free = np.zeros(zone.end, dtype=bool)
    free[zone.frontier :] = True
    for head in np.flatnonzero(frames.free_order[: zone.frontier]).tolist():
        order = int(frames.free_order[head]) - 1
        assert head % (1 << order) == 0
        assert not free[head : head + (1 << order)].any()
        free[head : head + (1 << order)] = True
        assert order == 10 or frames.free_order[head ^ 1 << order] != order + 1
    shown = (frames.flags[: zone.frontier] & np.uint64(PageFlag.BUDDY)) != 0
    assert np.array_equal(shown, free[: zone.frontier])
    return int(free.sum()) == zone.free_pages


def test_the_frame_table_copies_what_was_used_when_it_grows():
    """A zone that begins high costs what is used of it; what was there stays there."""
    frames, high = Frames(1 << 24), 1 << 20
    low, normal = Zone(frames, 0, high), Zone(frames, high, 1 << 24)
    kept = [low.take(3), normal.take(5)]
    for pfn in kept:
        frames.flags[pfn] = frames.lru[pfn] = pfn + 7
    rooms = set()
    while normal.frontier < 1 << 23:
        normal.take_pages(1 << 20)
        rooms.add(id(frames.flags.base))
        assert all(frames.flags_at[pfn] == frames.lru_at[pfn] == pfn + 7 for pfn in kept)
    assert frames.touched == {0: 1 << 12, high: normal.frontier}
    assert len(rooms) <= 4
    assert not frames.flags[1 << 12 : high].any()


@given(st.lists(st.one_of(st.integers(0, 10), st.integers(-50, -1)), max_size=60))
def test_blocks_are_split_and_merged(requests):
    """Taking and giving back in any order: never the same memory twice, and all of it one piece in the end."""
    zone, held = _zone(), []
    for request in requests:
        if request >= 0:
            pfn = zone.take(request)
            if pfn < 0:
                continue
            assert pfn % (1 << request) == 0
            assert all(pfn + (1 << request) <= p or p + (1 << o) <= pfn for p, o in held)
            zone.frames.flags[pfn : pfn + (1 << request)] = 0
            held.append((pfn, request))
        elif held:
            zone.give(*held.pop(request % len(held)))
        assert _is_whole(zone)
    for block in held:
        zone.give(*block)
    assert _is_whole(zone)
    assert zone.free_counts() == [0] * 10 + [4]


@settings(deadline=None)
@given(st.integers(1, 3000), st.randoms(use_true_random=False), st.integers(1, 40))
def test_many_pages_at_once(count, random, pieces):
    """Pages given back in any pieces merge as they would one by one."""
    zone = _zone()
    pfns = zone.take_pages(count)
    assert len(set(pfns.tolist())) == count
    zone.frames.flags[pfns] = 0
    order = pfns.tolist()
    random.shuffle(order)
    for piece in np.array_split(np.array(order, dtype=np.int64), pieces):
        zone.give_pages(piece)
        assert _is_whole(zone)
    assert zone.free_counts() == [0] * 10 + [4]


def test_many_pages_are_those_that_single_requests_get():
    one, many = _zone(), _zone()
    for zone in (one, many):
        zone.give(zone.take(3), 3)
        zone.take(2)
    singles = [one.take(0) for _ in range(1500)]
    assert sorted(many.take_pages(1500).tolist()) == sorted(singles)
    assert one.free_counts() == many.free_counts()


def test_a_zone_runs_out():
    zone = _zone(1)
    assert len(zone.take_pages(2000)) == 1024
    assert zone.take(0) == -1
    assert len(zone.take_pages(1)) == 0


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, PAGE - 20), st.binary(max_size=20)), max_size=40))
def test_contents_are_bytes(writes):
    contents, rows, shadow = Contents(PAGE), [0] * 8, [bytearray(PAGE) for _ in range(8)]
    for page, offset, data in writes:
        rows[page] = contents.write(rows[page], offset, data)
        shadow[page][offset : offset + len(data)] = data
    for row, expected in zip(rows, shadow, strict=True):
        assert contents.read(row, 0, PAGE) == expected
    column = np.array(rows, dtype=np.int32)
    assert contents.zero(column).tolist() == [not any(page) for page in shadow]
    copies = contents.copies(column)
    assert [contents.read(int(row), 0, PAGE) for row in copies] == [bytes(page) for page in shadow]
    contents.give_back(column)
    contents.give_back(copies)
    assert contents.in_use == 0
    assert not any(contents.read(int(row), 0, PAGE).strip(b"\0") for row in contents.take(20))


def test_a_large_machine_costs_what_is_touched():
    machine = pmcore.open("sim", memory="1 TiB", kernel="6.12")
    assert machine.frame_count() == 1 << 28
    task = machine.spawn()
    task.touch(task.mmap(1 << 20), 1 << 20)
    columns = machine.core.memory.frames
    held = sum(getattr(columns, name).nbytes for name, _ in columns.COLUMNS)
    assert held < 100 << 20
    assert machine.kpageflags((1 << 28) - 4, 4).values.tolist() == [int(PageFlag.BUDDY)] * 4


def test_zones_nodes_and_holes():
    machine = pmcore.open("sim", memory="8 GiB", nodes=2, holes=[("1 GiB", "2 GiB")], kernel=preset("6.12"))
    zones = {(zone.name, zone.node, zone.start * PAGE, zone.end * PAGE) for zone in machine.core.memory.zones}
    gib = 1 << 30
    assert zones == {("DMA32", 0, 0, gib), ("DMA32", 0, 2 * gib, 4 * gib), ("Normal", 1, 4 * gib, 8 * gib)}
    hole = machine.kpageflags((1 << 30) // PAGE, 2).values.tolist()
    assert hole == [int(PageFlag.NOPAGE)] * 2
    machine.check()


def test_holes_show_nothing_where_nopage_is_gone():
    machine = pmcore.open("sim", memory="64 MiB", holes=[("32 MiB", "36 MiB")], kernel="6.18")
    assert machine.kpageflags((32 << 20) // PAGE, 1).values.tolist() == [0]


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "1 MiB"},
        {"memory": "x"},
        {"memory": "64 MiB", "holes": [(0, 4096)]},
        {"memory": "64 MiB", "holes": [(0, "64 MiB")]},
        {"memory": "64 MiB", "nodes": 0},
        {"swap": "-1"},
    ],
)
def test_machines_that_cannot_be(settings):
    with pytest.raises(ArgumentError):
        pmcore.open("sim", **settings)
