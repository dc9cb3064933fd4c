"""KSM's stable tree: merged pages, found by what they hold, and the entries (rmap items) that map each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import U64Array
from pmcore.errors import NotModelled
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["STABLE", "UNSTABLE", "Node", "Slot", "StableTree"]

_KSM, _HWPOISON = int(PageFlag.KSM), int(PageFlag.HWPOISON)
#: States of an item, beside 0: of no tree.
UNSTABLE, STABLE = 1, 2


@attrs.define(slots=True, eq=False)
class Slot:
    """An address space that asked for merging, and what ksmd knows of its pages (rmap items), by ascending address."""

    mm: AddressSpace
    addresses: NDArray[np.int64] = attrs.field(factory=lambda: np.zeros(0, dtype=np.int64))
    #: Hash of the contents when last looked at; 0: never.
    sums: U64Array = attrs.field(factory=lambda: np.zeros(0, dtype=np.uint64))
    #: 0, or in the unstable tree (1), or mapping a page of the stable one (2).
    states: NDArray[np.int8] = attrs.field(factory=lambda: np.zeros(0, dtype=np.int8))
    #: The stable node, where the state is 2.
    nodes: NDArray[np.int64] = attrs.field(factory=lambda: np.zeros(0, dtype=np.int64))

    COLUMNS = ("addresses", "sums", "states", "nodes")

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        """Drop all items but these."""
        for name in self.COLUMNS:
            setattr(self, name, getattr(self, name)[chosen])


@attrs.define(slots=True, eq=False)
class Node:
    """A page of the stable tree: its frame, how many items map it, and where it hangs (node of memory, hash)."""

    pfn: int
    items: int
    key: tuple[int, int]


class StableTree:
    """The pages that are merged, and what is known of the address spaces that may map them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._across = True
        self._sharing = 256
        self.slots: list[Slot] = []
        self.by_mm: dict[int, Slot] = {}
        self.nodes: dict[int, Node] = {}
        #: The node of a frame.
        self.by_pfn: dict[int, int] = {}
        #: Nodes by (node of memory, hash of contents): more than one where one alone has too many items.
        self.stable: dict[tuple[int, int], list[int]] = {}

    def _bytes(self, pfn: int) -> bytes:
        core = self._core
        return core.memory.contents.read(core.memory.frames.content_at[pfn], 0, core.geometry.page_size)

    def _live(self, number: int) -> bool:
        """Whether the node's frame is its page still."""
        pfn = self.nodes[number].pfn
        return bool(self._core.memory.frames.flags_at[pfn] & _KSM) and self.by_pfn.get(pfn) == number

    def _stable_search(self, key: tuple[int, int], content: bytes) -> int:
        """The node of an equal page that takes one item more; 0 if there is none."""
        for number in list(self.stable.get(key, ())):
            if not self._live(number):
                self._remove(number)
        best = 0
        chain = self.stable.get(key, [])
        for number in chain:
            node = self.nodes[number]
            room = 0 < node.items < self._sharing
            if room and self._core.memory.frames.flags_at[node.pfn] & _HWPOISON:
                raise NotModelled(
                    "merging with a poisoned page, as the kernel does until a scan has come past its old places"
                )
            if (
                room
                and self._bytes(node.pfn) == content
                and (not best or node.items > self.nodes[best].items)
            ):
                best = number
        if best and chain[0] != best and self.nodes[best].items + 1 < self._sharing:
            chain.remove(best)
            chain.insert(0, best)
        return best

    def _insert(self, key: tuple[int, int], pfn: int) -> int:
        """A node for a page that has just become one."""
        if pfn in self.by_pfn:
            self._remove(self.by_pfn[pfn])  # of the frame's life before
        number = self._core.number("ksm_node")
        self.nodes[number] = Node(pfn, 0, key)
        self.by_pfn[pfn] = number
        self.stable.setdefault(key, []).insert(0, number)
        return number

    def _append(self, slot: Slot, item: int, number: int) -> None:
        slot.states[item], slot.nodes[item] = STABLE, number
        self.nodes[number].items += 1

    def _out(self, slot: Slot, item: int) -> None:
        """Take an item out of the tree that it is in."""
        if slot.states[item] == STABLE:
            number = int(slot.nodes[item])
            if self._live(number):
                self.nodes[number].items -= 1
            else:
                self._remove(number)
        slot.states[item], slot.nodes[item] = 0, 0

    def _remove(self, number: int) -> None:
        """Forget a node; its items are of no tree then."""
        node = self.nodes.pop(number)
        if self.by_pfn.get(node.pfn) == number:
            del self.by_pfn[node.pfn]
        chain = self.stable[node.key]
        chain.remove(number)
        if not chain:
            del self.stable[node.key]
        for slot in self.slots:
            mine = (slot.states == STABLE) & (slot.nodes == number)
            slot.states[mine] = 0
            slot.nodes[mine] = 0

    def moved(self, place: Pfns) -> None:
        """Pages have got other frames: by PFN the new one, -1 where nothing was moved."""
        flags = self._core.memory.frames.flags_at
        for number, node in list(self.nodes.items()):
            target = int(place[node.pfn])
            if target < 0 or number not in self.nodes:
                continue
            if self.by_pfn.get(node.pfn) != number or not flags[target] & _KSM:
                self._remove(number)  # it was of the frame's life before
                continue
            if target in self.by_pfn:
                self._remove(self.by_pfn[target])
            del self.by_pfn[node.pfn]
            node.pfn = target
            self.by_pfn[target] = number
            if not self._across:
                self.stable[node.key].remove(number)
                if not self.stable[node.key]:
                    del self.stable[node.key]
                node.key = (self._core.memory.zone_of(target).node, node.key[1])
                self.stable.setdefault(node.key, []).append(number)

    def _drop_nodes(self) -> bool:
        """Forget all nodes whose page nobody maps; whether those were all."""
        frames = self._core.memory.frames
        for number, node in list(self.nodes.items()):
            if not self._live(number) or not frames.mapcount_at[node.pfn]:
                self._remove(number)  # in the swap cache it is still marked, and copied by whoever wants it
        return not self.nodes
