"""A task on the running kernel for each test; skipped where there is no Linux, or frame numbers are hidden."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pmcore.errors import NotModelled
from pmcore.registry import open_workbench

PAGE = 4096
PMD = 1 << 21
_places = itertools.count(0x1000_0000_0000, 1 << 30)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/live" in item.path.as_posix():
            item.add_marker(pytest.mark.live)
            item.add_marker(pytest.mark.xdist_group("live"))  # they turn the machine's knobs: one at a time


@pytest.fixture(scope="session", params=["procfs", "sim"])
def bench(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each rule is tried on the running kernel and on the simulated machine."""
    if request.param == "sim":
        with open_workbench(
            "sim",
            memory="256 MiB",
            swap="64 MiB",
            kernel="6.18",
            config=["!CONFIG_MEM_SOFT_DIRTY"],
            hugepages={"2 MiB": 24},
        ) as machine:
            yield machine
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    with open_workbench("procfs") as workbench:
        if not workbench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        if workbench.kernel.profile.geometry.page_size != PAGE:
            pytest.skip("written for pages of 4 KiB")
        yield workbench


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except NotModelled as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _where_it_makes_sense(request: pytest.FixtureRequest) -> None:
    """`procfs_only` tests look at what only a running kernel has."""
    about = request.node.get_closest_marker("procfs_only") and "bench" in request.fixturenames
    if about and request.getfixturevalue("bench").kernel.name != "procfs":
        pytest.skip("about a running kernel")


@pytest.fixture(scope="session")
def kernel(bench: Any) -> Any:
    return bench.kernel


@pytest.fixture
def task(bench: Any) -> Iterator[Any]:
    one = bench.spawn()
    yield one
    one.exit()


@pytest.fixture
def area(task: Any) -> Callable[..., int]:
    """Map an area of `pages` at an address aligned to 1 GiB, without huge pages unless asked for."""

    def make(pages: int, *, huge: bool = False, flags: int = 0x22, fd: int = -1, prot: int = 3) -> int:
        start = next(_places)
        made = task.mmap(pages * PAGE, addr=start, prot=prot, flags=flags | 0x100000, fd=fd)
        if flags & 0x20 and not flags & 0x40000:
            task.madvise(made, pages * PAGE, 14 if huge else 15)
        return int(made)

    return make


@pytest.fixture
def needs(kernel: Any) -> Callable[..., None]:
    """Skip unless the running kernel has these capabilities."""

    def check(*capabilities: str) -> None:
        missing = [name for name in capabilities if not kernel.profile.has(name)]
        if missing:
            pytest.skip(f"the running kernel has no {', '.join(missing)}")

    return check


@pytest.fixture
def look(bench: Any, kernel: Any) -> Callable[..., tuple[Any, Any, np.ndarray]]:
    """(entries, flags, counts) of pages of a task; batches of pages on their way to the LRU lists are drained first."""
    from pmcore.pageflags import PageFlagsArray
    from pmcore.protocols import FrameFile

    def see(task: Any, start: int, pages: int) -> tuple[Any, Any, np.ndarray]:
        bench.settle()
        entries = task.process.pagemap(start, start + pages * PAGE)
        flags = kernel.frames_at(FrameFile.KPAGEFLAGS, entries.pfn)
        counts = kernel.frames_at(FrameFile.KPAGECOUNT, entries.pfn)
        return entries, PageFlagsArray(flags, profile=kernel.profile), counts

    return see
