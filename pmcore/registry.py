"""Finding backends: by name, through the entry-point group `pmcore.backends`, imported only when opened."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pmcore.errors import BackendUnavailable

if TYPE_CHECKING:
    from pmcore.protocols import Kernel

__all__ = ["ENTRY_POINT_GROUP", "backends", "open"]

ENTRY_POINT_GROUP = "pmcore.backends"
#: The backends of this distribution, as its entry points declare them (a test holds the two equal).
_OWN = {"procfs": "pmcore.backends.procfs:open_kernel"}
#: Set to any non-empty value to ignore the backends of other distributions than pmcore.
KILL_SWITCH = "PMCORE_NO_PLUGINS"


def backends() -> tuple[str, ...]:
    """The names that `open` takes, sorted. Nothing is imported to answer."""
    return tuple(sorted(_found()))


def open(name: str, /, **options: Any) -> Kernel:
    """The kernel behind the backend `name`; `options` are the backend's own.

    Raises BackendUnavailable where there is none of that name, it cannot be imported, or it cannot work here.
    """
    place = _OWN.get(name) or _found().get(name)
    if place is None:
        import difflib

        close = difflib.get_close_matches(name, backends(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(backends())}"
        raise BackendUnavailable(f"no backend {name!r}", remedy=hint)
    module, _, attribute = place.partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"backend {name!r} ({place}) cannot be imported: {error}",
            remedy="reinstall the distribution that provides it",
        ) from error
    kernel: Kernel = factory(**options)
    return kernel


def _found() -> dict[str, str]:
    """Every backend's place, "module:attribute"; nobody shadows one of ours."""
    places = dict(_OWN)
    if not os.environ.get(KILL_SWITCH):
        # Asking all installed distributions costs more than counting a machine's frames: only who needs it pays.
        from importlib.metadata import entry_points

        for point in entry_points(group=ENTRY_POINT_GROUP):
            places.setdefault(point.name, point.value)
    return places
