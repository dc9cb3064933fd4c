"""Large folios that processes map: who maps how much of each.

Most are mapped whole by one process, or after a fork by two, a PTE a page: of those the frame table holds one word,
`Frames.whole`, so that a GiB of them costs no objects. Who asks for one gets a `LargeFolio`, that counts from then on.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import BoolArray
from pmcore.backends.sim.physical.buddy import Pfns
from pmcore.backends.sim.physical.frames import Frames

__all__ = ["LargeFolio", "LargeFolios", "whole_word"]

#: Bits of a word: the order, above it the address space, above that the second one, or 0. The lower number is first.
_ORDER_BITS, _MM_BITS = 6, 28
_ORDER, _MM = (1 << _ORDER_BITS) - 1, (1 << _MM_BITS) - 1
_SECOND = _ORDER_BITS + _MM_BITS


@attrs.define(slots=True)
class LargeFolio:
    """A compound page that processes map: who maps how much of it."""

    head: int
    order: int
    #: PMDs that map all of it.
    entire: int = 0
    #: PTEs and PMDs that map any of it.
    mapped: int = 0
    #: The same by address space.
    by_mm: dict[int, int] = attrs.field(factory=dict)
    #: The kernel has room for two address spaces in a folio: what it counts of them, and whether it takes the folio to
    #: be shared. Others map it uncounted, and so it may go on being "shared" with one of them alone (rule TH-008).
    known: dict[int, int] = attrs.field(factory=dict)
    shared: bool = False

    @property
    def pages(self) -> int:
        """Number of its pages."""
        return 1 << self.order

    def add(self, mm: int, count: int) -> None:
        """Count `count` mappings more (or less) by the address space `mm`."""
        self.mapped += count
        left = self.by_mm.get(mm, 0) + count
        if left:
            self.by_mm[mm] = left
        else:
            self.by_mm.pop(mm, None)
        if count > 0:
            if mm in self.known:
                self.known[mm] += count
            elif len(self.known) < 2:
                self.known[mm] = count
                self.shared |= self.mapped != count
            return
        if mm in self.known:
            self.known[mm] += count
            if self.known[mm] > 0:
                return
            del self.known[mm]
        if not self.mapped or self.mapped in self.known.values():
            self.shared = False


def _whole(head: int, word: int) -> LargeFolio:
    """The folio that a word stands for."""
    order = word & _ORDER
    counts = {mm: 1 << order for mm in (word >> _ORDER_BITS & _MM, word >> _SECOND) if mm}
    shared = len(counts) > 1
    return LargeFolio(head, order, 0, len(counts) << order, counts, dict(counts), shared)


def whole_word(mm: int, order: int, other: int = 0) -> int:
    """The word of a folio of that order whose pages `mm` maps by one PTE each, and nobody else but `other` does."""
    first, second = (mm, other) if not other or mm < other else (other, mm)
    return second << _SECOND | first << _ORDER_BITS | order


class LargeFolios:
    """All of them, by head: a mapping of heads to `LargeFolio`."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._counted: dict[int, LargeFolio] = {}
        #: Folios that are a word in the frame table.
        self.words = 0

    def __len__(self) -> int:
        return self.words + len(self._counted)

    def __bool__(self) -> bool:
        return bool(self._counted) or self.words > 0

    def __contains__(self, head: int) -> bool:
        return head in self._counted or self._frames.whole_at[head] != 0

    def __getitem__(self, head: int) -> LargeFolio:
        folio = self._counted.get(head)
        return self._count(head) if folio is None else folio

    def get(self, head: int) -> LargeFolio | None:
        """The folio of that head, or None."""
        try:
            return self[head]
        except KeyError:
            return None

    def __setitem__(self, head: int, folio: LargeFolio) -> None:
        self._counted[head] = folio

    def __delitem__(self, head: int) -> None:
        if self._counted.pop(head, None) is None:
            self._forget(head)

    def _forget(self, head: int) -> int:
        word = self._frames.whole_at[head]
        if not word:
            raise KeyError(head)
        self._frames.whole_at[head] = 0
        self.words -= 1
        return word

    def _count(self, head: int) -> LargeFolio:
        folio = self._counted[head] = _whole(head, self._forget(head))
        return folio

    def values(self) -> Iterator[LargeFolio]:
        """Each folio, those that are words as values of the moment."""
        yield from self._counted.values()
        heads = np.flatnonzero(self._frames.whole)
        for head, word in zip(heads.tolist(), self._frames.whole[heads].tolist(), strict=True):
            yield _whole(head, word)

    def items(self) -> Iterator[tuple[int, LargeFolio]]:
        """Heads and folios, as `values`."""
        return ((folio.head, folio) for folio in self.values())

    @property
    def heads_by_pmd(self) -> Pfns:
        """Heads of the folios that a PMD maps."""
        return np.array([f.head for f in self._counted.values() if f.entire], dtype=np.int64)

    # -- many at once ----------------------------------------------------------------------------------

    def add_whole(self, heads: Pfns, mm: int, order: int) -> None:
        """New ones that `mm` maps whole."""
        self._frames.whole[heads] = whole_word(mm, order)
        self.words += len(heads)

    def whole_of(self, heads: Pfns, mm: int) -> Pfns:
        """The orders of those of these heads that `mm` alone maps, whole; 0 for the others."""
        self.settle(heads)
        words = self._frames.whole[heads]
        return np.where(words >> _ORDER_BITS == mm, words & _ORDER, 0)

    def add_many(self, heads: Pfns, counts: NDArray[np.int64], mm: int) -> BoolArray:
        """Count `counts` mappings more of each by `mm`, where that only makes another word; which these were."""
        words = self._frames.whole[heads]
        first = words >> _ORDER_BITS
        done: BoolArray = (words != 0) & (first <= _MM) & (first != mm) & (counts == 1 << (words & _ORDER))
        if mm > _MM:
            done[:] = False
        chosen, order = first[done], words[done] & _ORDER
        low, high = np.minimum(chosen, mm), np.maximum(chosen, mm)
        self._frames.whole[heads[done]] = high << _SECOND | low << _ORDER_BITS | order
        return done

    def remove_many(self, heads: Pfns, counts: NDArray[np.int64], mm: int) -> BoolArray:
        """Count so many mappings less, where that only makes another word; which these were."""
        self.settle(heads)
        words = self._frames.whole[heads]
        first, second = words >> _ORDER_BITS & _MM, words >> _SECOND
        done: BoolArray = (second != 0) & ((first == mm) | (second == mm)) & (counts == 1 << (words & _ORDER))
        left = np.where(first == mm, second, first)[done]
        self._frames.whole[heads[done]] = left << _ORDER_BITS | words[done] & _ORDER
        return done

    def alone(self, heads: Pfns) -> BoolArray:
        """Which of them one process maps whole, as a word says; of the others it is not known."""
        words = self._frames.whole[heads]
        alone: BoolArray = (words != 0) & (words >> _SECOND == 0)
        return alone

    def orders(self, heads: Pfns) -> NDArray[np.int64]:
        """The orders of folios."""
        orders: NDArray[np.int64] = self._frames.whole[heads] & _ORDER
        for index in np.flatnonzero(orders == 0).tolist():
            orders[index] = self._counted[int(heads[index])].order
        return orders

    def drop(self, heads: Pfns) -> None:
        """Forget some that are words."""
        self._frames.whole[heads] = 0
        self.words -= len(heads)

    def settle(self, heads: Pfns | None = None) -> None:
        """Turn into words what can be one: the state does not depend on who was looked at."""
        chosen = list(self._counted) if heads is None else heads.tolist() if self._counted else []
        for head in chosen:
            folio = self._counted.get(head)
            if folio is None or folio.entire or folio.known != folio.by_mm:
                continue
            mms = sorted(folio.by_mm)
            if (
                folio.shared == (len(mms) == 2)
                and 1 <= len(mms) <= 2
                and mms[-1] <= _MM
                and all(count == folio.pages for count in folio.by_mm.values())
            ):
                del self._counted[head]
                self._frames.whole_at[head] = whole_word(mms[0], folio.order, *mms[1:])
                self.words += 1

    def move(self, head: int, target: int) -> None:
        """The folio of `head`, if there is one, has moved to `target`, and its row of the frame table with it."""
        folio = self._counted.pop(head, None)
        if folio is not None:
            folio.head = target
            self._counted[target] = folio

    def capture(self) -> list[LargeFolio]:
        """Those that are no words, by head."""
        self.settle()
        return [folio for _, folio in sorted(self._counted.items())]

    def restore(self, folios: list[LargeFolio]) -> None:
        """What `capture` gave; the frame table has been restored."""
        self._counted = {folio.head: folio for folio in folios}
        self.words = int(np.count_nonzero(self._frames.whole))
