"""ksmd's unstable tree: pages that may be merged, found by what they hold.

It is unstable because nothing keeps its pages from changing: a search that comes across a page that is gone gives up.
Which searches those are depends on the shape of the tree, so there is a red-black tree like the kernel's. As long as no
page is gone the shape says nothing, and the tree is but a list of what was put in and taken out.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import numpy as np
from numpy.typing import NDArray

__all__ = ["Place", "UnstableTree"]

#: Where a page is: number of its address space, address.
Place = tuple[int, int]
_INSERT, _ERASE = 1, 0


@attrs.define(slots=True, eq=False)
class _Node:
    place: Place
    content: bytes
    parent: _Node | None = None
    left: _Node | None = None
    right: _Node | None = None
    red: bool = True


class UnstableTree:
    """The unstable tree of one scan."""

    def __init__(self) -> None:
        #: (what was done, address space, addresses), in order: one page or many.
        self.log: list[tuple[int, int, NDArray[np.int64]]] = []
        self._root: _Node | None = None
        self._nodes: dict[Place, _Node] = {}
        #: Whether the tree has its shape: from the first page that is gone on.
        self.shaped = False

    def clear(self) -> None:
        """Begin a scan."""
        self.log.clear()
        self._nodes.clear()
        self._root, self.shaped = None, False

    def put(self, mm: int, addresses: NDArray[np.int64]) -> None:
        """Note pages that are like no other of the tree."""
        self.log.append((_INSERT, mm, addresses))

    def take(self, place: Place) -> None:
        """Take a page out."""
        self.log.append((_ERASE, place[0], np.array([place[1]], dtype=np.int64)))
        if self.shaped:
            self._erase(self._nodes.pop(place))

    def shape(self, content: Callable[[Place], bytes], *, again: bool = False) -> None:
        """Give the tree its shape (`again`: anew); `content` says what the page at a place holds, or held."""
        if self.shaped and not again:
            return
        self._nodes.clear()
        self._root, self.shaped = None, True
        for what, mm, addresses in self.log:
            for address in addresses.tolist():
                place = (mm, address)
                if what == _ERASE:
                    self._erase(self._nodes.pop(place))
                else:
                    self._insert(place, content(place), lambda _place: True)

    def search(self, place: Place, content: bytes, alive: Callable[[Place], bool]) -> Place | bool | None:
        """The place of an equal page; None where `place` was put in instead; False where the search gave up."""
        found = self._insert(place, content, alive)
        if found is None:
            self.put(place[0], np.array([place[1]], dtype=np.int64))
        return found

    # -- the red-black tree ----------------------------------------------------------------------------

    def _insert(self, place: Place, content: bytes, alive: Callable[[Place], bool]) -> Place | bool | None:
        parent, at = None, self._root
        while at is not None:
            if not alive(at.place):
                return False
            if content == at.content:
                return at.place
            parent, at = at, at.left if content < at.content else at.right
        node = _Node(place, content, parent)
        self._nodes[place] = node
        if parent is None:
            self._root = node
        elif content < parent.content:
            parent.left = node
        else:
            parent.right = node
        self._balance(node)
        return None

    def _rotate(self, node: _Node, *, left: bool) -> None:
        """Put the child of the one side in the place of `node`, which becomes its child of the other."""
        child = node.right if left else node.left
        assert child is not None
        moved = child.left if left else child.right
        if left:
            node.right, child.left = moved, node
        else:
            node.left, child.right = moved, node
        if moved is not None:
            moved.parent = node
        self._replace(node, child)
        node.parent = child

    def _replace(self, node: _Node, other: _Node | None) -> None:
        parent = node.parent
        if other is not None:
            other.parent = parent
        if parent is None:
            self._root = other
        elif parent.left is node:
            parent.left = other
        else:
            parent.right = other

    def _balance(self, node: _Node) -> None:
        while node.parent is not None and node.parent.red:
            parent = node.parent
            grand = parent.parent
            assert grand is not None
            left = parent is grand.left
            uncle = grand.right if left else grand.left
            if uncle is not None and uncle.red:
                parent.red = uncle.red = False
                grand.red = True
                node = grand
                continue
            if node is (parent.right if left else parent.left):
                self._rotate(parent, left=left)
                parent = node
            parent.red, grand.red = False, True
            self._rotate(grand, left=not left)
            break
        assert self._root is not None
        self._root.red = False

    def _erase(self, node: _Node) -> None:
        if node.left is not None and node.right is not None:
            successor = node.right
            while successor.left is not None:
                successor = successor.left
            # The successor leaves its own place and takes this one.
            child, parent, red = successor.right, successor.parent, successor.red
            self._replace(successor, child)
            if parent is node:
                parent = successor
            successor.left, successor.right, successor.red = node.left, node.right, node.red
            for side in (successor.left, successor.right):
                if side is not None:
                    side.parent = successor
            self._replace(node, successor)
        else:
            child, parent, red = node.left or node.right, node.parent, node.red
            self._replace(node, child)
        if not red:
            self._balance_without(child, parent)

    def _balance_without(self, node: _Node | None, parent: _Node | None) -> None:
        """One black node is missing on the way to `node`, a child of `parent`."""
        while parent is not None and (node is None or not node.red):
            left = node is parent.left
            sibling = parent.right if left else parent.left
            assert sibling is not None
            if sibling.red:
                sibling.red, parent.red = False, True
                self._rotate(parent, left=left)
                continue
            near, far = (sibling.left, sibling.right) if left else (sibling.right, sibling.left)
            if far is None or not far.red:
                if near is None or not near.red:
                    sibling.red = True
                    node, parent = parent, parent.parent
                    continue
                near.red, sibling.red = False, True
                self._rotate(sibling, left=not left)
                sibling, far = near, sibling
            sibling.red, parent.red, far.red = parent.red, False, False
            self._rotate(parent, left=left)
            return
        if node is not None:
            node.red = False
