"""What a real kernel does not do deterministically: the masks, each a numbered entry of spec/divergences.toml.

A mask is no wider than its reason, and is counted each time it hides a difference.
"""

from __future__ import annotations

import attrs

from pmcore.uapi import PageFlag

__all__ = ["COUNTER_MASKS", "FLAG_MASKS", "FlagMask"]


@attrs.frozen
class FlagMask:
    """These bits of kpageflags are not compared, on frames that show one of the bits `where` (0: on all).

    `either`: it is enough that one side shows it.
    """

    divergence: str
    bits: int
    where: int = 0
    either: bool = False
    #: Frames that show one of these bits are compared all the same.
    unless: int = 0
    #: Only where somebody samples accesses meanwhile (`Workbench.watched`).
    watched: bool = False


FLAG_MASKS = (
    # Who watches idle pages takes the accessed bit from entries: what noting the access would have set is missing.
    FlagMask(
        "DV-020",
        int(PageFlag.REFERENCED | PageFlag.ACTIVE),
        int(PageFlag.IDLE),
        either=True,
        unless=int(PageFlag.ANON),
        watched=True,
    ),
    # Set and taken by whoever watches idle pages.
    FlagMask("DV-018", int(PageFlag.IDLE), watched=True),
    # The zero page is everybody's.
    FlagMask("DV-019", int(PageFlag.REFERENCED | PageFlag.DIRTY | PageFlag.ACTIVE), int(PageFlag.ZERO_PAGE)),
)
#: Counters of smaps that are not compared where somebody samples accesses meanwhile: name to divergence.
COUNTER_MASKS: dict[str, str] = {
    # Who watches accesses through physical memory turns accessed bits of entries into one of the page.
    "Referenced": "DV-020",
}
