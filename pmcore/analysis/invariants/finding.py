"""What a check found."""

from __future__ import annotations

import attrs

__all__ = ["SHOWN", "Finding", "Health"]

#: Places that a finding names at the most.
SHOWN = 8


@attrs.frozen(kw_only=True)
class Finding:
    """A rule that does not hold."""

    rule: str
    #: How many places break it, and of what sort they are: "frames", "entries", "VMAs".
    count: int
    what: str
    #: Some of the places, in words.
    places: tuple[str, ...]
    #: Numbers of the divergences that name the rule.
    known: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Health:
    """The findings, by rule, and how far the check could see."""

    findings: tuple[Finding, ...]
    #: Rules that were checked.
    rules: tuple[str, ...]
    frames: int
    processes: int
    entries: int
    #: Processes that may not be looked at: frames may be mapped by them, unseen.
    unreadable: tuple[int, ...]
    #: Frames with a higher count than entries seen, where `unreadable` processes may hold the rest.
    unexplained: int
    #: Places that disagreed, and went on changing as often as they were looked at again.
    unsettled: int
    seconds: float

    @property
    def well(self) -> bool:
        """Whether every rule holds."""
        return not self.findings
