"""The last line of a run of the tests: programs compared with kernels or their answers, steps, masks, skipped tests.

Functions that compare are wrapped before any test module imports them; workers hand their sums to whom they work for.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pmcore import lockstep as package
from pmcore.lockstep import Result, answers, run, session

#: Programs and steps by what they were compared with; "mask NAME" counts masks.
COUNTS: Counter[str] = Counter()
_KEY = "pmcore_compared"


def _counted(function: Callable[..., Result], what: Callable[..., str]) -> Callable[..., Result]:
    @functools.wraps(function)
    def counting(*arguments: Any, **named: Any) -> Result:
        result = function(*arguments, **named)
        kind = what(*arguments, **named)
        COUNTS[f"{kind} programs"] += 1
        COUNTS[f"{kind} steps"] += result.steps
        COUNTS.update({f"mask {name}": count for name, count in result.masked.items()})
        return result

    return counting


def _against(program: Any, left: Any, right: Any) -> str:
    return "live" if right.kernel.name == "procfs" else "simulated"


def _recorded(answered: Any, workbench: Any) -> str:
    return "recorded"


def pytest_configure(config: pytest.Config) -> None:
    """Count from here on."""
    counted = _counted(run.lockstep, _against)
    package.lockstep = run.lockstep = session.lockstep = counted  # type: ignore[attr-defined]
    answers.replay = _counted(answers.replay, _recorded)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker's sums."""
    COUNTS.update(getattr(node, "workeroutput", {}).get(_KEY, {}))


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """The line, behind everything else."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_KEY] = dict(COUNTS)
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(session.config, "workeroutput") and COUNTS:
        reporter.write_line(line(COUNTS, reporter.stats.get("skipped", ())))


def line(counts: Counter[str], skipped: Any) -> str:
    """Programs and steps by what they were compared with, masks, and skipped tests by their reason."""
    kinds = [kind for kind in ("live", "recorded", "simulated") if counts[f"{kind} programs"]]
    parts = [f"{counts[f'{k} programs']} programs {k} ({counts[f'{k} steps']} steps)" for k in kinds]
    masks = {name.removeprefix("mask "): n for name, n in sorted(counts.items()) if name.startswith("mask ")}
    parts.append("masks " + (", ".join(f"{name} {count}" for name, count in masks.items()) or "none"))
    reasons = Counter(_reason(report) for report in skipped)
    parts.append(f"{sum(reasons.values())} tests skipped")
    if reasons:
        parts[-1] += f" ({', '.join(f'{count}: {reason}' for reason, count in reasons.most_common())})"
    return "lockstep: " + "; ".join(parts)


def _reason(report: Any) -> str:
    told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return re.sub(r"^Skipped: ", "", told)
