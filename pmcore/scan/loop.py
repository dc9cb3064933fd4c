"""The loop around PAGEMAP_SCAN that is easily written wrong: go on, do not report twice, join what was split."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import numpy as np

from pmcore.errors import ArgumentError
from pmcore.protocols import Process
from pmcore.scan.request import ScanRequest
from pmcore.scan.result import RegionArray, ScanResult, empty_regions
from pmcore.uapi import PageCategory

__all__ = ["DEFAULT_VEC_LEN", "join_regions", "scan_all", "scan_chunks"]

#: Regions asked for in one call: 192 KiB of buffer, a few milliseconds of kernel time when all are used.
DEFAULT_VEC_LEN = 8192


def scan_all(process: Process, request: ScanRequest) -> ScanResult:
    """Scan the whole range of `request`, in as many calls as it takes; all regions, equal neighbours joined.

    `vec_len` is the size of the buffer of one call (0: a good default); `max_pages` limits all calls together, and
    `walk_end` of the result is where the next page of interest may be. Raises what the kernel refuses; regions of
    calls before the refusal are lost, so use `scan_chunks` where write-protecting scans must not lose any.
    """
    results = list(_calls(process, request))
    unknown = PageCategory(0)
    for result in results:
        unknown |= result.unknown
    regions = join_regions(np.concatenate([result.regions for result in results]))
    return attrs.evolve(results[-1], regions=regions, unknown=unknown)


def scan_chunks(
    process: Process, request: ScanRequest, *, on_call: Callable[[ScanResult], object] | None = None
) -> Iterator[RegionArray]:
    """As `scan_all`, yielding arrays of joined regions as they come: memory stays bounded by `vec_len`.

    A region is held back until it is known where it ends, so no two neighbours of the stream could be joined.
    `on_call` is given the result of each call, for its `walk_end` and `unknown`.
    """
    held = empty_regions()
    for result in _calls(process, request):
        if on_call is not None:
            on_call(result)
        regions = join_regions(np.concatenate([held, result.regions]))
        held = regions[-1:]
        if len(regions) > 1:
            yield regions[:-1]
    if len(held):
        yield held


def join_regions(regions: RegionArray) -> RegionArray:
    """`regions` (ascending) with neighbours joined that touch and have the same categories."""
    if len(regions) < 2:
        return regions
    head = np.empty(len(regions), dtype=np.bool_)
    head[0] = True
    np.not_equal(regions["start"][1:], regions["end"][:-1], out=head[1:])
    head[1:] |= regions["categories"][1:] != regions["categories"][:-1]
    if head.all():
        return regions
    first = np.flatnonzero(head)
    joined = regions[first]
    joined["end"] = regions["end"][np.append(first[1:], len(regions)) - 1]
    return joined


def _calls(process: Process, request: ScanRequest) -> Iterator[ScanResult]:
    """The calls one after the other, until the range is covered or `max_pages` is reached.

    The `walk_end` of each result is where the next call goes on, stale ones corrected.
    """
    if not request.vec and request.vec_len:
        raise ArgumentError("a request that is to be resumed needs a buffer", remedy="leave out vec")
    geometry = process.kernel.profile.geometry
    room = request.vec_len or DEFAULT_VEC_LEN
    position, pages = request.start, 0
    while True:
        left = request.max_pages - pages if request.max_pages else 0
        call = attrs.evolve(request, start=position, vec_len=room, vec=True, max_pages=left)
        result = process.pagemap_scan(call)
        regions = result.regions
        pages += result.pages_bytes >> geometry.page_shift
        limited = bool(request.max_pages) and pages >= request.max_pages
        if len(regions) == room or limited:
            # walk_end can be stale, behind regions that the same call has reported: never go back there.
            position = max(result.walk_end, int(regions["end"][-1]))
        else:
            position = geometry.page_align(request.end)
        yield attrs.evolve(result, walk_end=position)
        if limited or position >= request.end:
            return
