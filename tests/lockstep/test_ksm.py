"""Merged pages under memory pressure, on the model and on the running kernel; a memory cgroup has to let them go."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from pmcore.errors import BackendUnavailable, NotModelled
from pmcore.program import steps as s
from pmcore.registry import open_workbench
from pmcore.uapi import ClearRefs, Madvise
from tests.lockstep.test_reclaim import GROUPS, PAGE, Sides


@pytest.fixture(scope="module")
def live():
    try:
        bench = open_workbench("procfs", swap="256 MiB")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        if not bench.kernel.pfn_visible or not bench.kernel.profile.has("mm.mremap_many"):
            pytest.skip("needs frame numbers, and a kernel of the model's own version")
        yield bench


class Refaulting(Sides):
    """A cgroup measures refaults with its own few pages, the model with all of memory: ACTIVE is not compared."""

    def differences(self):
        return [found for found in super().differences() if not self._active_alone(found)]

    @staticmethod
    def _active_alone(found):
        words = [set(side.split("|")) for side in (found.left, found.right)]
        return found.kind == "kpageflags" and words[0] ^ words[1] == {"ACTIVE"}


@pytest.fixture
def sides(live):
    if not (GROUPS / "memory.force_empty").exists() and not (GROUPS / "cgroup.procs").exists():
        pytest.skip("needs memory cgroups of version 1")
    group = GROUPS / f"pmcore-test-ksm-{os.getpid()}"
    group.mkdir()
    both = None
    try:
        both = Refaulting(live, group)
        yield both
    except NotModelled as error:
        pytest.skip(str(error))  # other processes of the machine ask for merging
    finally:
        if both is not None:
            both.close()
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.02)


#: Who samples accessed bits by physical address (DV-020) changes what the kernel takes for used: it is asked again.
pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live"), pytest.mark.flaky(reruns=5)]
MERGED = (
    s.Map(area="a", pages=16, align=2 << 20),
    s.Advise(area="a", pages=16, advice=int(Madvise.MERGEABLE)),
    s.Write(area="a", text="same", pages=4),
    s.Write(area="a", offset=8 * PAGE, text="else"),
    s.Write(area="a", offset=12 * PAGE, text="zero", pages=2),
)


@pytest.mark.rule("KS-013", "KS-016")
def test_a_merged_page_goes_from_all_who_map_it_and_comes_back_as_several(sides):
    """Whoever reads it first has the page of the swap cache, a child at the same place too; other places get copies."""
    sides.do(
        *MERGED,
        s.KsmScan(scans=2),
        s.Fork(child="c"),
        s.ClearRefs(what=int(ClearRefs.ALL)),
        s.ClearRefs(task="c", what=int(ClearRefs.ALL)),
    )
    sides.empty()
    assert sides.swapped() == sides.swapped("c") == 7
    sides.do(s.Read(area="a", offset=2 * PAGE, length=4))
    sides.do(s.Touch(area="a", page=1, pages=1))
    sides.do(s.Read(task="c", area="a", offset=2 * PAGE, length=4))
    sides.do(s.Touch(task="c", area="a", page=3, pages=1, write=False))
    sides.do(s.Touch(task="c", area="a", page=2, pages=1))
    sides.do(s.Touch(area="a", pages=16, write=False), s.Touch(task="c", area="a", pages=16))
    sides.do(s.KsmScan(scans=2))


@pytest.mark.rule("KS-004")
def test_an_access_through_one_of_its_entries_spares_a_merged_page(sides):
    sides.do(
        *MERGED,
        s.KsmScan(scans=2),
        s.ClearRefs(what=int(ClearRefs.ALL)),
        s.Touch(area="a", page=3, pages=1, write=False),
    )
    sides.empty()


@pytest.mark.rule("KS-017")
def test_a_page_that_a_batch_holds_stays_for_a_scan(sides):
    """Asked again where another process has filled the batch of that processor meanwhile (DV-027)."""
    sides.do(
        s.Map(area="a", pages=4),
        s.Advise(area="a", pages=4, advice=int(Madvise.MERGEABLE)),
        s.Lock(area="a", page=1, pages=1),
        s.Fork(child="c"),
        s.KsmScan(scans=2, zero_pages=True),
        s.KsmScan(zero_pages=True),
    )


@pytest.mark.rule("KS-019")
def test_what_is_merged_into_a_lazily_freed_page_is_lost(sides):
    """Area "c" is never under MADV_FREE (DV-030)."""
    one_page = [
        (
            s.Map(area=area, pages=1),
            s.Advise(area=area, pages=1, advice=int(Madvise.MERGEABLE)),
            s.Write(area=area, text="precious"),
        )
        for area in ("a", "b", "c")
    ]
    sides.do(*one_page[0], *one_page[1], s.KsmScan(scans=2), s.Unmap(area="b", pages=1))
    sides.do(s.Advise(area="a", pages=1, advice=int(Madvise.FREE)))
    sides.do(*one_page[2], s.KsmScan(scans=2), s.ClearRefs(what=int(ClearRefs.ALL)))
    sides.empty()
    assert [run.task("main").read(run.area("c")[0], 8) for run in sides.runs] == [bytes(8)] * 2
