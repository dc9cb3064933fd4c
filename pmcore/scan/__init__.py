"""PAGEMAP_SCAN: the request, the kernel's checks, the matching engine, and the loop around the call.

`scan_all` is what most users want: it goes on where the kernel stopped until the range is covered, joins what came back
split, and streams. `scan_tables` is the engine for a backend that can walk its own page tables; `scan_pagemap` runs
it over what `/proc/PID/pagemap` shows, for kernels that have no PAGEMAP_SCAN.
"""

from pmcore.scan.engine import scan_tables
from pmcore.scan.loop import join_regions, scan_all, scan_chunks
from pmcore.scan.over_pagemap import scan_pagemap
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import REGION_DTYPE, RegionArray, ScanResult, empty_regions
from pmcore.scan.tables import LeafBatch, LeafKind, ScanTables, ScanVma
from pmcore.scan.validate import known_categories, known_flags, refusal

__all__ = [
    "REGION_DTYPE",
    "LeafBatch",
    "LeafKind",
    "RegionArray",
    "ScanRequest",
    "ScanResult",
    "ScanTables",
    "ScanVma",
    "empty_regions",
    "join_regions",
    "known_categories",
    "known_flags",
    "refusal",
    "scan_all",
    "scan_chunks",
    "scan_pagemap",
    "scan_tables",
]
