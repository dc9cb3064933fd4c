"""Leading the running kernel's ksmd: exact numbers of scans, and everything put back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pmcore import PageFlag
from pmcore.errors import BackendUnavailable, NotModelled
from pmcore.registry import open_workbench
from pmcore.uapi import Madvise

PAGE = 4096
DIRECTORY = Path("/sys/kernel/mm/ksm")
KNOBS = ("run", "use_zero_pages", "max_page_sharing", "sleep_millisecs", "smart_scan", "pages_to_scan")


def knobs():
    return {name: (DIRECTORY / name).read_text() for name in KNOBS if (DIRECTORY / name).exists()}


@pytest.fixture
def still():
    if not sys.platform.startswith("linux") or not DIRECTORY.exists():
        pytest.skip("needs a running Linux kernel with KSM")
    before = knobs()
    try:
        bench = open_workbench("procfs", still=True)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        if not bench.kernel.pfn_visible:
            pytest.skip("needs root")
        yield bench
    assert knobs() == before


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_ksmd_is_led_for_an_exact_number_of_scans(still):
    task = still.spawn()
    start = task.mmap(4 * PAGE)
    task.madvise(start, 4 * PAGE, Madvise.MERGEABLE)
    for page in range(4):
        task.write(start + page * PAGE, b"the same in all of them")
    try:
        still.ksm_scan(0)
        for scans in (1, 3, 2):
            before = int((DIRECTORY / "full_scans").read_text())
            still.ksm_scan(scans, use_zero_pages=True)
            assert int((DIRECTORY / "full_scans").read_text()) == before + scans
    except NotModelled as error:
        pytest.skip(str(error))
    assert (DIRECTORY / "run").read_text() == "0\n"
    assert (DIRECTORY / "use_zero_pages").read_text() == "0\n"
    pfns = task.process.pagemap(start, start + 4 * PAGE).pfn
    assert len(set(pfns.tolist())) == 1
    assert still.kernel.kpageflags(int(pfns[0]), 1).has(PageFlag.KSM).all()
    assert still.ksm_unmerge()["pages_shared"] == 0


@pytest.mark.live
def test_ksmd_is_led_on_a_still_machine_only():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    with open_workbench("procfs") as bench, pytest.raises(BackendUnavailable, match="still=True"):
        bench.ksm_scan()
