"""meminfo and vmstat: pages by what their frames say, and what has happened, counted. Only what is modelled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.frames import CACHED, RAW_HWPOISON
from pmcore.backends.sim.views import hugetlb as huge_view
from pmcore.uapi import Madvise, PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["meminfo", "vmstat"]

_LISTS = ("inactive_anon", "active_anon", "inactive_file", "active_file")
#: Lines of vmstat that count events, by what the machine counts them as.
_EVENTS = {"pswpin": "pswpin", "pswpout": "pswpout", "pglazyfreed": "lazyfree_discard"}
_THP_EVENTS = {
    **{name: name for name in ("thp_fault_alloc", "thp_collapse_alloc", "thp_split_page")},
    "thp_split_pmd": "split_pmd",
    "thp_zero_page_alloc": "thp_zero_page_alloc",
}


def _pages(core: Core) -> dict[str, int]:
    """Pages, by the names of vmstat."""
    frames = core.memory.frames
    used = np.flatnonzero((frames.flags != 0) & (frames.flags != np.uint64(PageFlag.BUDDY)))
    flags, mapped = frames.flags[used], frames.mapcount[used] > 0

    def count(having: int, lacking: int = 0, also: object = True) -> int:
        found = (flags & np.uint64(having | lacking)) == np.uint64(having)
        return int((found & also).sum())

    lru, active, backed = PageFlag.LRU, PageFlag.ACTIVE, PageFlag.SWAPBACKED
    stuck, anon = PageFlag.UNEVICTABLE, PageFlag.ANON
    ways = ((0, active, backed, 0), (active, 0, backed, 0), (0, active, 0, backed), (active, 0, 0, backed))
    lists = [count(lru | yes | way, stuck | no | other) for yes, no, way, other in ways]
    found = {
        "nr_free_pages": core.memory.free_total,
        **{f"nr_{name}": pages for name, pages in zip(_LISTS, lists, strict=True)},
        "nr_unevictable": count(lru | stuck),
        "nr_mlock": count(PageFlag.MLOCKED),
        "nr_anon_pages": count(anon, PageFlag.HUGE, mapped),
        "nr_mapped": count(0, anon | PageFlag.HUGE | PageFlag.RESERVED | PageFlag.ZERO_PAGE, mapped),
        "nr_file_pages": count(CACHED) + count(PageFlag.SWAPCACHE, CACHED),
        "nr_dirty": count(CACHED | PageFlag.DIRTY, backed),
        "nr_writeback": count(PageFlag.WRITEBACK),
        "nr_shmem": count(CACHED | backed),
        "nr_page_table_pages": core.pool.in_use,
        "nr_swapcached": count(PageFlag.SWAPCACHE),
    }
    # Kept for lines of meminfo that vmstat has not.
    found["reserved"], found["slab"] = count(PageFlag.RESERVED), count(PageFlag.SLAB)
    return found


def _huge(core: Core) -> tuple[int, int, int]:
    """Pages of huge pages of shared memory, of those that a PMD maps, and of anonymous ones that a PMD maps."""
    large, frames = core.memory.large, core.memory.frames
    if not large:
        return 0, 0, 0
    wanted = np.uint64(CACHED | PageFlag.COMPOUND_HEAD)
    heads = np.flatnonzero((frames.flags & wanted) == wanted)
    cached = int((large.orders(heads) == core.geometry.pmd_order).sum()) << core.geometry.pmd_order
    entire = large.heads_by_pmd
    mapped = int(((frames.flags[entire] & np.uint64(CACHED)) != 0).sum()) << core.geometry.pmd_order
    return cached, mapped, (len(entire) << core.geometry.pmd_order) - mapped


def vmstat(core: Core) -> str:
    """Lines that would count what is not modelled are left out (rule FS-015)."""
    rows = {name: pages for name, pages in _pages(core).items() if name.startswith("nr_")}
    if core.caps.thp:
        pmd_pages = core.geometry.pmd_pages
        shmem, mapped, anon = _huge(core)
        rows["nr_shmem_hugepages"] = shmem // pmd_pages
        rows["nr_shmem_pmdmapped"] = mapped // pmd_pages
        rows["nr_file_hugepages"] = rows["nr_file_pmdmapped"] = 0
        rows["nr_anon_transparent_hugepages"] = anon // pmd_pages
    events = {**_EVENTS, **(_THP_EVENTS if core.caps.thp else {})}
    rows |= {name: core.counters[event] for name, event in events.items()}
    return "".join(f"{name} {value}\n" for name, value in rows.items())


def meminfo(core: Core) -> str:
    """The same in kilobytes. Lines that would count what is not modelled are left out (rule FS-008)."""
    kilobytes, areas = core.geometry.page_size >> 10, core.swap.there
    pages = _pages(core)
    inactive, active, inactive_file, active_file = (pages[f"nr_{name}"] for name in _LISTS)
    rows = {
        "MemTotal": core.memory.managed - pages["reserved"],
        "MemFree": pages["nr_free_pages"],
        "Cached": pages["nr_file_pages"] - pages["nr_swapcached"],
        "SwapCached": pages["nr_swapcached"],
        "Active": active + active_file,
        "Inactive": inactive + inactive_file,
        "Active(anon)": active,
        "Inactive(anon)": inactive,
        "Active(file)": active_file,
        "Inactive(file)": inactive_file,
        "Unevictable": pages["nr_unevictable"],
        "Mlocked": pages["nr_mlock"],
        "SwapTotal": sum(area.slots - 1 for area in areas),
        "SwapFree": sum(area.slots - 1 - area.used for area in areas),
        "Dirty": pages["nr_dirty"],
        "Writeback": pages["nr_writeback"],
        "AnonPages": pages["nr_anon_pages"],
        "Mapped": pages["nr_mapped"],
        "Shmem": pages["nr_shmem"],
        "Slab": pages["slab"],
        "PageTables": pages["nr_page_table_pages"],
    }
    if core.knows_advice(int(Madvise.HWPOISON)):
        flags = core.memory.frames.flags  # of a huge page of a pool all pages show it
        mask = np.uint64(PageFlag.HWPOISON | PageFlag.HUGE)
        poisoned = ((flags & mask) == np.uint64(PageFlag.HWPOISON)) | ((flags & np.uint64(RAW_HWPOISON)) != 0)
        rows["HardwareCorrupted"] = int(np.count_nonzero(poisoned))
    if core.caps.thp:
        shmem, mapped, anon = _huge(core)
        rows |= {"AnonHugePages": anon, "ShmemHugePages": shmem, "ShmemPmdMapped": mapped}
        rows |= {"FileHugePages": 0, "FilePmdMapped": 0}
    lines = [f"{name + ':':<16}{pages * kilobytes:8d} kB\n" for name, pages in rows.items()]
    return "".join(lines) + (huge_view.meminfo(core) if core.caps.hugetlb else "")
