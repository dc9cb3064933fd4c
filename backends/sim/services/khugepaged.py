"""khugepaged: looking for blocks of small pages that huge pages could replace, a number of pages at a time.

It goes through the address spaces in the order in which they came to be, through each by address, and goes on next time
where it stopped. What it takes to collapse a block is said in `collapse.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from pmcore.backends.sim.services import collapse, migrating, thp
from pmcore.errors import ArgumentError

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["Block", "Khugepaged", "Step"]


@attrs.frozen(kw_only=True)
class Block:
    """A block that was looked at, and what came of it: "collapsed", or why not, as the kernel calls it."""

    #: Number of the address space.
    space: int
    address: int
    result: str


@attrs.frozen(kw_only=True)
class Step:
    """What a step came to."""

    blocks: tuple[Block, ...]
    #: Whether the last address space was gone through to its end.
    full_scan: bool

    @property
    def collapsed(self) -> int:
        """Blocks that are huge pages now."""
        return sum(block.result == "collapsed" for block in self.blocks)


class Khugepaged:
    """Its settings, called as the files in /sys/kernel/mm/transparent_hugepage/khugepaged, and its place."""

    #: What a checkpoint holds.
    STATE = (
        "pages_to_scan",
        "max_ptes_none",
        "max_ptes_swap",
        "max_ptes_shared",
        "full_scans",
        "pages_collapsed",
        "space",
        "address",
    )

    def __init__(self, core: Core) -> None:
        self._core = core
        pages = core.geometry.pmd_pages
        self.pages_to_scan = 8 * pages
        self.max_ptes_none = pages - 1
        self.max_ptes_swap = pages // 8
        self.max_ptes_shared = pages // 2
        #: Counted as the kernel does.
        self.full_scans = 0
        self.pages_collapsed = 0
        #: Where it goes on: in that address space or the next one, at that address.
        self.space = 0
        self.address = 0

    @property
    def limits(self) -> collapse.Limits:
        """The limits in force; a kernel that does not know one allows no such page."""
        core, pages = self._core, self._core.geometry.pmd_pages
        for name in ("max_ptes_none", "max_ptes_swap", "max_ptes_shared"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < pages:
                raise ArgumentError(f"{name}={value!r}", remedy=f"0 to {pages - 1}")
        return collapse.Limits(
            none=self.max_ptes_none,
            swap=self.max_ptes_swap if core.caps.khugepaged_swap else 0,
            shared=self.max_ptes_shared if core.caps.khugepaged_shared else 0,
        )

    def step(self, pages: int | None = None) -> Step:
        """Look at `pages` pages (default: `pages_to_scan`), whole blocks, up to the end of the last address space.

        Nothing is looked at while huge pages are switched off. Raises ArgumentError.
        """
        migrating.still(self._core, "a step of khugepaged")
        left = self.pages_to_scan if pages is None else pages
        if isinstance(left, bool) or not isinstance(left, int) or left < 1:
            raise ArgumentError(f"step({pages!r})", remedy="one page or more")
        core, limits = self._core, self.limits
        blocks: list[Block] = []
        waiting: list[int] = []
        if not core.caps.thp or core.policy.pmd == "never":
            return Step(blocks=(), full_scan=False)
        for mm in [mm for number, mm in sorted(core.spaces.items()) if number >= self.space]:
            if mm.number != self.space:
                self.space, self.address = mm.number, 0
            core.memory.charging = mm.group
            left = self._space(mm, left, limits, blocks, waiting)
            if left <= 0:
                return Step(blocks=tuple(blocks), full_scan=False)
        self.space = self.address = 0
        self.full_scans += 1
        return Step(blocks=tuple(blocks), full_scan=True)

    def _space(
        self,
        mm: AddressSpace,
        left: int,
        limits: collapse.Limits,
        blocks: list[Block],
        waiting: list[int],
    ) -> int:
        """Go on in one address space; how many pages are left to look at."""
        core, size = self._core, self._core.geometry.pmd_size
        for vma in list(mm.vmas):
            low, high = -(-vma.start // size) * size, vma.end // size * size
            if low >= high or not thp.order_allowed(core, vma, low):
                continue
            self.address = max(self.address, low)
            while self.address < high:
                if left <= 0:
                    return 0
                result = collapse.scan_block(core, mm, vma, self.address, limits, waiting)
                blocks.append(Block(space=mm.number, address=self.address, result=result))
                self.pages_collapsed += result == "collapsed"
                self.address += size
                left -= core.geometry.pmd_pages
        self.space, self.address = mm.number + 1, 0
        return left
