"""Finding backends: by name, through the entry-point group `pmcore.backends`, imported only when opened."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pmcore.errors import BackendUnavailable

if TYPE_CHECKING:
    from pmcore.protocols import Kernel, Workbench

__all__ = ["ENTRY_POINT_GROUP", "WORKBENCH_GROUP", "backends", "open", "open_workbench", "workbenches"]

ENTRY_POINT_GROUP = "pmcore.backends"
WORKBENCH_GROUP = "pmcore.workbenches"
#: The backends of this distribution, as its entry points declare them (a test holds the two equal).
_OWN = {
    ENTRY_POINT_GROUP: {
        "procfs": "pmcore.backends.procfs:open_kernel",
        "recording": "pmcore.backends.recording:open_recording",
        "sim": "pmcore.backends.sim:open_machine",
    },
    WORKBENCH_GROUP: {
        "procfs": "pmcore.backends.procfs.workbench:open_workbench",
        "sim": "pmcore.backends.sim:open_machine",
    },
}
#: Set to any non-empty value to ignore the backends of other distributions than pmcore.
KILL_SWITCH = "PMCORE_NO_PLUGINS"


def backends() -> tuple[str, ...]:
    """The names that `open` takes, sorted. Nothing is imported to answer."""
    return tuple(sorted(_found(ENTRY_POINT_GROUP)))


def workbenches() -> tuple[str, ...]:
    """The names that `open_workbench` takes, sorted. Nothing is imported to answer."""
    return tuple(sorted(_found(WORKBENCH_GROUP)))


def open(name: str, /, *what: Any, **options: Any) -> Kernel:
    """The kernel behind the backend `name`; `what` (a recording's path) and `options` are the backend's own.

    Raises BackendUnavailable where there is none of that name, it cannot be imported, or it cannot work here.
    """
    kernel: Kernel = _factory(ENTRY_POINT_GROUP, name)(*what, **options)
    return kernel


def open_workbench(name: str, /, **options: Any) -> Workbench:
    """The workbench of the backend `name`, where programs run; `options` are the backend's own. Raises as `open`."""
    workbench: Workbench = _factory(WORKBENCH_GROUP, name)(**options)
    return workbench


def _factory(group: str, name: str) -> Any:
    place = _OWN[group].get(name) or _found(group).get(name)
    if place is None:
        import difflib

        known = sorted(_found(group))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        raise BackendUnavailable(f"no backend {name!r}", remedy=hint)
    module, _, attribute = place.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"backend {name!r} ({place}) cannot be imported: {error}",
            remedy="reinstall the distribution that provides it",
        ) from error


def _found(group: str) -> dict[str, str]:
    """Every backend's place, "module:attribute"; nobody shadows one of ours."""
    places = dict(_OWN[group])
    if not os.environ.get(KILL_SWITCH):
        # Asking all installed distributions costs more than counting a machine's frames: only who needs it pays.
        from importlib.metadata import entry_points

        for point in entry_points(group=group):
            places.setdefault(point.name, point.value)
    return places
