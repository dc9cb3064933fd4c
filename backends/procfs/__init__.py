"""A running Linux kernel, looked at through /proc.

`open_kernel` is what `pmcore.open("procfs")` calls. Importing this package works on any operating system; opening it
says what is missing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pmcore.backends.procfs.read_ahead import ReadAhead
from pmcore.errors import ArgumentError, BackendUnavailable

if TYPE_CHECKING:
    from pmcore.backends.procfs.kernel import ProcfsKernel

__all__ = ["open_kernel"]


def open_kernel(
    *, root: str = "/proc", scan: str = "auto", maps: str = "auto", read_ahead: bool = False
) -> ProcfsKernel:
    """The kernel behind `root`.

    `scan`: "ioctl" for PAGEMAP_SCAN itself, "engine" for the core's engine over pagemap and smaps, "auto" for the
    first where the kernel has it. `maps`: "text", "query" (PROCMAP_QUERY), "auto" for what is faster.
    `read_ahead`: begin to read kpageflags now, for a caller who is about to read all of it.
    Raises BackendUnavailable where there is no Linux /proc, ArgumentError for another value.
    """
    for what, value, allowed in (
        ("scan", scan, ("auto", "ioctl", "engine")),
        ("maps", maps, ("auto", "text", "query")),
    ):
        if value not in allowed:
            raise ArgumentError(f"{what}={value!r}", remedy=f"one of {', '.join(allowed)}")
    if root == "/proc" and not sys.platform.startswith("linux"):
        raise BackendUnavailable(
            f"backend 'procfs' looks at a running Linux kernel, and this is {sys.platform}",
            remedy="decoding, specification and analyses of recorded data work here; live data need Linux",
        )
    ahead = ReadAhead(f"{root}/kpageflags") if read_ahead else None
    from pmcore.backends.procfs.kernel import ProcfsKernel

    return ProcfsKernel(root=root, scan=scan, maps=maps, ahead=ahead)
