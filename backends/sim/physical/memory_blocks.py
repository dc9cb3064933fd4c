"""Memory blocks: what can be taken offline and online again as a whole, and the zones around what is offline.

A block that is offline belongs to no zone: like a hole it is a gap between two of them, so that nothing is taken from
it and nothing is merged across it. Its rows of the frame table, as far as they were ever touched, are all zeros.
"""

from __future__ import annotations

import attrs
import numpy as np

from pmcore.backends.sim.physical.buddy import MAX_ORDER, Zone
from pmcore.backends.sim.physical.frames import Frames
from pmcore.backends.sim.physical.memory import Memory
from pmcore.uapi import PageFlag

__all__ = ["MemoryBlock", "block_of", "blocks", "carve", "give_back", "zone_around"]

_BLOCK = 1 << MAX_ORDER


@attrs.frozen(kw_only=True)
class MemoryBlock:
    """A directory of /sys/devices/system/memory. `start` and `end` in bytes."""

    number: int
    start: int
    end: int
    #: "online" or "offline".
    state: str
    #: Of which zone and node its frames are, or were; "" and -1 for a block that is not of one zone alone.
    zone: str
    node: int


def zone_around(memory: Memory, first: int, end: int) -> Zone | None:
    """The zone that owns all frames from `first` to `end`; None where several do, or none owns some of them."""
    return next((zone for zone in memory.zones if zone.start <= first and end <= zone.end), None)


def block_of(memory: Memory, number: int, page_size: int) -> MemoryBlock | None:
    """The block of that number; None where no frame of it is memory."""
    pages = memory.block_pages
    first, end = number * pages, (number + 1) * pages
    if number < 0:
        return None
    shape = {"number": number, "start": first * page_size, "end": end * page_size}
    if number in memory.offline:
        name, node = memory.offline[number]
        return MemoryBlock(**shape, state="offline", zone=name, node=node)
    if not any(zone.start < end and first < zone.end for zone in memory.zones):
        return None
    zone = zone_around(memory, first, end)
    name, node = ("", -1) if zone is None else (zone.name, zone.node)
    return MemoryBlock(**shape, state="online", zone=name, node=node)


def blocks(memory: Memory, page_size: int) -> list[MemoryBlock]:
    """All blocks that hold memory, by number."""
    numbers = range(-(-memory.frames.count // memory.block_pages))
    found = (block_of(memory, number, page_size) for number in numbers)
    return [block for block in found if block is not None]


def carve(memory: Memory, number: int) -> None:
    """Take the block's free frames out of its zone, which becomes two; what is not free is the caller's to move."""
    first, end = number * memory.block_pages, (number + 1) * memory.block_pages
    zone = zone_around(memory, first, end)
    assert zone is not None
    frames = memory.frames
    touched = min(max(zone.frontier, first), end)
    part = slice(first, touched)
    free = (frames.flags[part] & np.uint64(PageFlag.BUDDY)) != 0
    frames.flags[part][free] = 0
    frames.free_order[part] = 0
    parts = [
        _piece(frames, zone, low, high) for low, high in ((zone.start, first), (end, zone.end)) if low < high
    ]
    place = memory.zones.index(zone)
    memory.zones[place : place + 1] = parts
    memory.offline[number] = zone.name, zone.node


def _piece(frames: Frames, zone: Zone, start: int, end: int) -> Zone:
    """A part of a zone, with what is free of it."""
    piece = Zone(frames, start, end, name=zone.name, node=zone.node)
    piece.frontier = min(max(zone.frontier, start), end)
    if piece.frontier > start:
        frames.reach_again(start, piece.frontier)
    return _counted(piece)


def _counted(zone: Zone) -> Zone:
    """Make the zone's lists of free blocks from the frame table."""
    zone.find_blocks()
    orders = zone.frames.free_order[zone.start : zone.frontier].astype(np.int64)
    zone.free_pages = zone.end - zone.frontier + int((np.int64(1) << orders[orders > 0] - 1).sum())
    return zone


def give_back(memory: Memory, number: int) -> None:
    """Put a block that is offline back: its frames are free, in one zone with its neighbours where they are alike."""
    first, end = number * memory.block_pages, (number + 1) * memory.block_pages
    name, node = memory.offline.pop(number)
    frames = memory.frames
    place = next((i for i, zone in enumerate(memory.zones) if _after(zone, name, node, first)), None)
    if place is None:
        place = len(memory.zones)
    memory.zones.insert(place, Zone(frames, first, end, name=name, node=node))
    for index in (place, place - 1):
        if 0 <= index < len(memory.zones) - 1:
            _join(memory, index)


def _after(zone: Zone, name: str, node: int, first: int) -> bool:
    """Whether a zone comes behind a block in the order in which zones are used."""
    return (zone.name == "DMA32", zone.node, zone.start) > (name == "DMA32", node, first)


def _join(memory: Memory, index: int) -> None:
    """Make one zone of two neighbours, if they are alike and meet."""
    left, right = memory.zones[index : index + 2]
    if (left.name, left.node, left.end) != (right.name, right.node, right.start):
        return
    whole = Zone(memory.frames, left.start, right.end, name=left.name, node=left.node)
    if right.frontier == right.start:
        whole.frontier = left.frontier
    elif left.frontier == left.end or left.end - left.frontier <= memory.block_pages:
        _touch(left)
        whole.frontier = right.frontier
    else:
        return  # what was never touched would have to be written down: they stay two
    memory.zones[index : index + 2] = [_counted(whole)]


def _touch(zone: Zone) -> None:
    """Write down as free blocks what was never touched of a zone."""
    frames, first = zone.frames, zone.frontier
    frames.reach(zone.start, zone.end)
    frames.flags[first : zone.end] = int(PageFlag.BUDDY)
    frames.free_order[first : zone.end : _BLOCK] = MAX_ORDER + 1
    zone.frontier = zone.end
