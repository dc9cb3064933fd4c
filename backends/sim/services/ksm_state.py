"""ksmd's state: captured, put back, and whether it is well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmcore.backends.sim.physical.frames import ANON_EXCLUSIVE
from pmcore.backends.sim.physical.memory import COMPOUND
from pmcore.backends.sim.services.ksm import Ksm
from pmcore.backends.sim.services.ksm_stable import Node, Slot
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT, WRITE
from pmcore.backends.sim.virtual.space import AddressSpace
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["capture", "findings", "rebuild"]

_KNOBS = ("pages_to_scan", "use_zero_pages", "full_scans", "pages_scanned", "address", "passed")
_KSM = np.uint64(PageFlag.KSM)


def capture(core: Core) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Words and arrays; none where nobody has used KSM."""
    ksm, fresh = core.ksm, Ksm(core)
    words: dict[str, Any] = {name: getattr(ksm, name) for name in _KNOBS}
    words |= {"across": ksm.merge_across_nodes, "sharing": ksm.max_page_sharing}
    unused = {name: getattr(fresh, name) for name in _KNOBS}
    unused |= {"across": fresh.merge_across_nodes, "sharing": fresh.max_page_sharing}
    if words == unused and not ksm.slots and not ksm.nodes:
        return {}, {}
    words["slots"] = [slot.mm.number for slot in ksm.slots]
    words["cursor"] = None if ksm.cursor is None else ksm.slots.index(ksm.cursor)
    words["nodes"] = [[n, node.pfn, node.items, *node.key] for n, node in sorted(ksm.nodes.items())]
    words["stable"] = [[*key, list(chain)] for key, chain in sorted(ksm.stable.items())]
    words["log"] = [[what, mm, len(addresses)] for what, mm, addresses in ksm.tree.log]
    arrays: dict[str, NDArray[Any]] = {
        f"ksm.{index}.{name}": getattr(slot, name).copy()
        for index, slot in enumerate(ksm.slots)
        for name in Slot.COLUMNS
    }
    arrays["ksm.log"] = np.concatenate([np.zeros(0, np.int64), *(entry[2] for entry in ksm.tree.log)])
    return {"ksm": words}, arrays


def rebuild(
    core: Core, state: dict[str, Any], arrays: dict[str, NDArray[Any]], spaces: dict[int, AddressSpace]
) -> None:
    """What `capture` gave; `spaces` by number."""
    ksm, words = Ksm(core), state.get("ksm")
    core.ksm = ksm
    if words is None:
        return
    ksm.max_page_sharing, ksm.merge_across_nodes = words["sharing"], words["across"]
    for name in _KNOBS:
        setattr(ksm, name, words[name])
    for index, number in enumerate(words["slots"]):
        mm = spaces.get(number) or AddressSpace.gone(core, number)
        slot = Slot(mm, *(arrays[f"ksm.{index}.{name}"].copy() for name in Slot.COLUMNS))
        ksm.slots.append(slot)
        ksm.by_mm[number] = slot
    ksm.cursor = None if words["cursor"] is None else ksm.slots[words["cursor"]]
    for number, pfn, items, memory, value in words["nodes"]:
        ksm.nodes[number] = Node(pfn, items, (memory, value))
        ksm.by_pfn[pfn] = number
    ksm.stable = {(memory, value): list(chain) for memory, value, chain in words["stable"]}
    position = 0
    for what, mm_number, length in words["log"]:
        ksm.tree.log.append((what, mm_number, arrays["ksm.log"][position : position + length].copy()))
        position += length


def findings(core: Core, spaces: list[AddressSpace]) -> Iterator[tuple[str, str]]:
    """Every invariant that does not hold: (its name, where)."""
    ksm, frames = core.ksm, core.memory.frames
    merged = (frames.flags & _KSM) != 0
    for pfn in np.flatnonzero(merged & (frames.mapcount > 0)).tolist():
        if pfn not in ksm.by_pfn:
            yield "a merged page has a node in the stable tree", f"{pfn:#x}"
    wrong = np.flatnonzero(merged & ((frames.flags & np.uint64(ANON_EXCLUSIVE | COMPOUND)) != 0))
    if len(wrong):
        yield "a merged page is single and nobody's own", f"{int(wrong[0]):#x}"
    yield from _entries(core, spaces, merged)
    items: dict[int, int] = {}
    for slot in ksm.slots:
        if len(slot.addresses) and (np.diff(slot.addresses) <= 0).any():
            yield "items ascend", f"address space {slot.mm.number}"
        owners, counts = np.unique(slot.nodes[slot.states == 2], return_counts=True)
        for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
            items[owner] = items.get(owner, 0) + count
    if items != {number: node.items for number, node in ksm.nodes.items() if node.items}:
        yield "a node counts its items", f"{items}"
    listed = sorted((number, key) for key, chain in ksm.stable.items() for number in chain)
    if listed != sorted((number, node.key) for number, node in ksm.nodes.items()):
        yield "each node hangs in the stable tree once", f"{listed}"
    if ksm.by_pfn != {node.pfn: number for number, node in ksm.nodes.items()}:
        yield "a frame has one node", f"{ksm.by_pfn}"
    for number, node in ksm.nodes.items():
        lost = frames.flags_at[node.pfn] & int(PageFlag.HWPOISON)
        if (
            merged[node.pfn]
            and not lost
            and core.memory.contents.hashes(frames.content[[node.pfn]])[0] != node.key[1]
        ):
            yield "a merged page holds what it held when it was merged", f"node {number}"
    for area in core.swap.there:
        unused = [n for n in area.merged if not area.counts[n] and not area.cached[n]]
        if unused:
            yield "slots of merged pages are in use", f"area {area.number}: {unused[:4]}"
    if ksm.by_mm != {slot.mm.number: slot for slot in ksm.slots}:
        yield "an address space has one slot", f"{sorted(ksm.by_mm)}"


def _entries(core: Core, spaces: list[AddressSpace], merged: NDArray[np.bool_]) -> Iterator[tuple[str, str]]:
    for mm in spaces:
        for vma in mm.vmas:
            if vma.flags & VmFlag.MERGEABLE and mm.number not in core.ksm.by_mm:
                yield "who asks for merging is on the list", f"{vma.start:#x}"
            for extent in mm.tables.extents(vma.start, vma.end) if merged.any() else ():
                present = extent.entries[(extent.entries & np.uint64(PRESENT)) != 0]
                pfns = (present & np.uint64(FIELD)).view(np.int64)
                if (merged[pfns] & ((present & np.uint64(WRITE)) != 0)).any():
                    yield "a merged page is never writable", f"{extent.start:#x}"
