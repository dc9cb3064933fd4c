"""Finding backends: by name, through the entry-point group `pmcore.backends`, imported only when opened."""

from __future__ import annotations

import difflib
import os
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pmcore.errors import BackendUnavailable
from pmcore.protocols import Kernel

__all__ = ["ENTRY_POINT_GROUP", "backends", "open"]

ENTRY_POINT_GROUP = "pmcore.backends"
#: Set to any non-empty value to ignore the backends of other distributions than pmcore.
KILL_SWITCH = "PMCORE_NO_PLUGINS"


def backends() -> tuple[str, ...]:
    """The names that `open` takes, sorted. Nothing is imported to answer."""
    return tuple(sorted(_found()))


def open(name: str, /, **options: Any) -> Kernel:
    """The kernel behind the backend `name`; `options` are the backend's own.

    Raises BackendUnavailable where there is none of that name, it cannot be imported, or it cannot work here.
    """
    found = _found()
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(found)) or 'none'}"
        raise BackendUnavailable(f"no backend {name!r}", remedy=hint)
    try:
        factory = found[name].load()
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"backend {name!r} ({found[name].value}) cannot be imported: {error}",
            remedy="reinstall the distribution that provides it",
        ) from error
    kernel: Kernel = factory(**options)
    return kernel


def _found() -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        ours = point.dist is not None and point.dist.name == "pmcore"
        if os.environ.get(KILL_SWITCH) and not ours:
            continue
        if ours or point.name not in points:  # nobody shadows one of ours by accident
            points[point.name] = point
    return points
