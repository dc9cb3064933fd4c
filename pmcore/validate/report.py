"""What came of validating a tool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

__all__ = ["Finding", "Report", "Result"]


@attrs.frozen(kw_only=True)
class Finding:
    """The tool says one thing of a range, and another is true."""

    #: The rule of spec/ that is broken.
    rule: str
    #: What it is about: "present", "swapped", "flags", ...
    key: str
    #: Pages (or figures) of which that holds, and the first of them.
    count: int
    start: int
    end: int
    said: str
    true: str

    def __str__(self) -> str:
        where = f"{self.start:x}-{self.end:x} " if self.end else ""
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        return f"{self.rule} {self.key}: {where}says {self.said}, is {self.true}{more}"


@attrs.frozen(kw_only=True)
class Result:
    """One case on one kernel. `verdict`:

    "right"; "wrong" (see `findings`); "silent" (nothing said of what the case shows); "failed" (the tool ended with an
    error, or said what cannot be read, see `note`; where that is the mistake, a rule is broken); "refused" (it ended
    with an error where that is an answer; `note`); "skipped" (it could not be run here; `note`).
    """

    case: str
    kernel: str
    verdict: str
    #: The rules that the case shows; the one that ending with an error breaks, where that is the mistake.
    rules: tuple[str, ...]
    failing: str = ""
    #: What the tool told at all, and what of that which the case asks for it did not, with the rule of each.
    told: tuple[str, ...] = ()
    silent: tuple[tuple[str, str], ...] = ()
    findings: tuple[Finding, ...] = ()
    note: str = ""
    seconds: float = 0.0

    @property
    def broken(self) -> tuple[str, ...]:
        """The rules that the tool breaks here."""
        if self.verdict == "failed":
            return (self.failing,) if self.failing else ()
        return tuple(dict.fromkeys(finding.rule for finding in self.findings))


@attrs.frozen(kw_only=True)
class Report:
    """All cases."""

    tool: str
    results: Sequence[Result]

    @property
    def well(self) -> bool:
        """Whether nothing is wrong, and nothing failed: silence is not wrong."""
        return not any(result.verdict in ("wrong", "failed") for result in self.results)

    @property
    def broken(self) -> dict[str, tuple[str, ...]]:
        """Rule -> the cases in which the tool breaks it."""
        found: dict[str, dict[str, None]] = {}
        for result in self.results:
            for rule in result.broken:
                found.setdefault(rule, {})[result.case] = None
        return {rule: tuple(names) for rule, names in sorted(found.items())}

    @property
    def untold(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """What the tool says nothing of, with its rule -> the cases that ask for it."""
        found: dict[tuple[str, str], dict[str, None]] = {}
        for result in self.results:
            for what in result.silent:
                found.setdefault(what, {})[result.case] = None
        return {what: tuple(names) for what, names in sorted(found.items())}

    def as_data(self) -> dict[str, Any]:
        """For JSON: plain values."""
        return {
            "pmcore_validation": 1,
            "tool": self.tool,
            "well": self.well,
            "broken": {rule: list(names) for rule, names in self.broken.items()},
            "untold": [
                {"key": key, "rule": rule, "cases": list(names)} for (key, rule), names in self.untold.items()
            ],
            "results": [{**attrs.asdict(result), "broken": list(result.broken)} for result in self.results],
        }
