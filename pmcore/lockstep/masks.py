"""What a real kernel does not do deterministically: the masks, each a numbered entry of spec/divergences.toml.

A mask is no wider than its reason, and is counted each time it hides a difference.
"""

from __future__ import annotations

import attrs

from pmcore.uapi import PageFlag

__all__ = ["COUNTER_MASKS", "FLAG_MASKS", "FlagMask"]


@attrs.frozen
class FlagMask:
    """These bits of kpageflags are not compared."""

    divergence: str
    bits: int


FLAG_MASKS = (FlagMask("DV-018", int(PageFlag.IDLE)),)
#: Counters of smaps that are not compared: name to divergence.
COUNTER_MASKS: dict[str, str] = {}
