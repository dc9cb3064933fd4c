"""What a PAGEMAP_SCAN call gives back: regions as one structured array, and where the walk ended."""

from __future__ import annotations

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.errors import syscall_error
from pmcore.uapi import PageCategory

__all__ = ["REGION_DTYPE", "RegionArray", "ScanResult", "empty_regions"]

#: `struct page_region`, 24 bytes: start, end (bytes, exclusive), categories (PAGE_IS_* bits).
REGION_DTYPE = np.dtype([("start", "<u8"), ("end", "<u8"), ("categories", "<u8")])

RegionArray = NDArray[np.void]


def empty_regions(count: int = 0) -> RegionArray:
    """`count` zeroed regions."""
    return np.zeros(count, dtype=REGION_DTYPE)


@attrs.frozen(kw_only=True, eq=False)
class ScanResult:
    """The answer of one call. `len(regions)` is the system call's return value where `errno` is 0."""

    #: REGION_DTYPE, ascending, at most `vec_len` of them.
    regions: RegionArray = attrs.field(factory=empty_regions)
    #: First address that the walk did not cover, as the kernel wrote it (it can be stale: DV entries).
    walk_end: int = 0
    #: 0, or the errno of the refusal; regions and walk_end then hold what had been written before.
    errno: int = 0
    #: Categories that the answering side cannot know (the engine over an older kernel's pagemap); 0 elsewhere.
    unknown: PageCategory = attrs.field(default=PageCategory(0))

    @property
    def pages_bytes(self) -> int:
        """Bytes in all regions together."""
        return int((self.regions["end"] - self.regions["start"]).sum())

    def check(self) -> ScanResult:
        """This result if the call succeeded; raises its errno as a SyscallError otherwise."""
        if self.errno:
            raise syscall_error(self.errno, "ioctl(PAGEMAP_SCAN)", remedy=_REMEDY.get(self.errno))
        return self


_REMEDY = {
    1: "PM_SCAN_CHECK_WPASYNC needs every VMA of the range registered with userfaultfd WP_ASYNC",
    3: "the process is gone",
    14: "start, end and vec must be user addresses",
    22: "check size, flags, categories (this kernel may not know one), alignment of start, and vec with vec_len",
    25: "this kernel has no PAGEMAP_SCAN (it came with 6.7)",
}
