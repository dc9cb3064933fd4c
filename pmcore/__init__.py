"""Linux's page-table interfaces with one written meaning, and backends that answer them.

    import pmcore

    with pmcore.open("procfs") as kernel:
        process = kernel.process(1234)
        for vma in process.maps():
            entries = process.pagemap(vma.start, vma.end)
            print(vma, entries.present.sum())

Names are imported when they are first used, so that `import pmcore` costs next to nothing.
"""

from __future__ import annotations

import os.path
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pmcore._version import __version__

if not os.path.isdir(os.path.join(__path__[0], "spec")):  # noqa: PTH112, PTH118
    # Python was started inside a checkout and found it before the installed package: spec and backends lie beside us.
    __path__.append(os.path.dirname(__path__[0]))  # noqa: PTH120

if TYPE_CHECKING:
    from pmcore.errors import PmcoreError, SyscallError
    from pmcore.explain import Explanation
    from pmcore.geometry import Geometry
    from pmcore.pageflags import FrameFlags, PageFlagsArray
    from pmcore.pagemap import PagemapEntries, PagemapEntry, encode_pagemap
    from pmcore.profile import KernelProfile, preset
    from pmcore.protocols import FrameFile, Kernel, Process, Task, Workbench
    from pmcore.registry import backends as available_backends
    from pmcore.registry import open
    from pmcore.scan import ScanRequest, ScanResult, scan_all, scan_chunks
    from pmcore.smaps import SmapsEntry, parse_smaps
    from pmcore.uapi import ClearRefs, PageCategory, PageFlag, PagemapFlag, ScanFlag
    from pmcore.vma import Vma, parse_maps

__all__ = [
    "ClearRefs",
    "Explanation",
    "FrameFile",
    "FrameFlags",
    "Geometry",
    "Kernel",
    "KernelProfile",
    "PageCategory",
    "PageFlag",
    "PageFlagsArray",
    "PagemapEntries",
    "PagemapEntry",
    "PagemapFlag",
    "PmcoreError",
    "Process",
    "ScanFlag",
    "ScanRequest",
    "ScanResult",
    "SmapsEntry",
    "SyscallError",
    "Task",
    "Vma",
    "Workbench",
    "__version__",
    "available_backends",
    "encode_pagemap",
    "open",
    "parse_maps",
    "parse_smaps",
    "preset",
    "scan_all",
    "scan_chunks",
]

_HOMES = {
    "errors": ("PmcoreError", "SyscallError"),
    "explain": ("Explanation",),
    "geometry": ("Geometry",),
    "pageflags": ("FrameFlags", "PageFlagsArray"),
    "pagemap": ("PagemapEntries", "PagemapEntry", "encode_pagemap"),
    "profile": ("KernelProfile", "preset"),
    "protocols": ("FrameFile", "Kernel", "Process", "Task", "Workbench"),
    "registry": ("open",),
    "scan": ("ScanRequest", "ScanResult", "scan_all", "scan_chunks"),
    "smaps": ("SmapsEntry", "parse_smaps"),
    "uapi": ("ClearRefs", "PageCategory", "PageFlag", "PagemapFlag", "ScanFlag"),
    "vma": ("Vma", "parse_maps"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "available_backends":
        value = import_module("pmcore.registry").backends
    elif name in _HOME_OF:
        value = getattr(import_module(f"pmcore.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'pmcore' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
