"""Rules of hugetlb on the running kernel that need a pool of their own (the others: tests/lockstep/kept)."""

from __future__ import annotations

import sys

import pytest

from pmcore import ScanRequest
from pmcore.errors import BackendUnavailable
from pmcore.registry import open_workbench
from pmcore.uapi import MapFlag, PageCategory

PAGE = 4096
PRIVATE = int(MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.HUGETLB)


@pytest.mark.rule("HT-013")
@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_a_gigantic_page_of_the_running_kernel():
    """One entry above the PMDs, aligned neighbouring frames, one leaf of a scan."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    size = 1 << 30
    try:
        bench = open_workbench("procfs", hugepages={"1 GiB": 1})
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        if not bench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        task = bench.spawn()
        task.touch(task.mmap(PAGE, addr=1 << 40, flags=0x100022), PAGE)
        start = task.mmap(size, addr=(1 << 40) + size, flags=PRIVATE | MapFlag.HUGE_1GB | 0x100000)
        task.write(start + 5000, b"x")
        entries = task.process.pagemap(start, start + 4 * PAGE)
        head = int(entries[0].pfn)
        assert head % (1 << 18) == 0
        assert [int(pfn) for pfn in entries.pfn] == [head, head + 1, head + 2, head + 3]
        assert (bench.kernel.kpagecount(head, 1 << 18) == 1).all()
        scan = ScanRequest(start=start - PAGE, end=start + size, vec_len=8, category_mask=8, return_mask=0x7F)
        [region] = task.process.pagemap_scan(scan).regions.tolist()
        assert region == (
            start,
            start + size,
            int(PageCategory.HUGE | PageCategory.PRESENT | PageCategory.WRITTEN),
        )
