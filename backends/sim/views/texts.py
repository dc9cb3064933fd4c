"""Texts of /proc and /sys about the machine: meminfo, buddyinfo, swaps, version, huge pages. Only what is modelled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.buddy import MAX_ORDER, Zone
from pmcore.backends.sim.physical.frames import CACHED
from pmcore.backends.sim.policy import MIN_ORDER, SETTINGS
from pmcore.backends.sim.views import hugetlb as huge_view
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["names", "text"]

_THP = "/sys/kernel/mm/transparent_hugepage"
_HUGETLB = "/sys/kernel/mm/hugepages"
_PMD_SETTINGS = ("always", "madvise", "never")
_KHUGEPAGED = [
    "pages_to_scan",
    "max_ptes_none",
    "max_ptes_swap",
    "max_ptes_shared",
    "full_scans",
    "pages_collapsed",
]

_POOL = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages", "nr_overcommit_hugepages")


def _meminfo(core: Core) -> str:
    """Pages by what their frames say. Lines that would count what is not modelled are left out (rule FS-008)."""
    kilobytes, frames = core.geometry.page_size >> 10, core.memory.frames
    used = np.flatnonzero((frames.flags != 0) & (frames.flags != np.uint64(PageFlag.BUDDY)))
    flags, mapped = frames.flags[used], frames.mapcount[used] > 0

    def count(having: int, lacking: int = 0, also: object = True) -> int:
        found = (flags & np.uint64(having | lacking)) == np.uint64(having)
        return int((found & also).sum())

    lru, active, backed = PageFlag.LRU, PageFlag.ACTIVE, PageFlag.SWAPBACKED
    stuck, anon = PageFlag.UNEVICTABLE, PageFlag.ANON
    lists = {
        (name, kind): count(lru | yes | way, stuck | no | other)
        for name, yes, no in (("Active", active, 0), ("Inactive", 0, active))
        for kind, way, other in (("anon", backed, 0), ("file", 0, backed))
    }
    shmem = count(CACHED)
    areas = core.swap.there
    rows = {
        "MemTotal": core.memory.managed - count(PageFlag.RESERVED),
        "MemFree": core.memory.free_total,
        "Cached": shmem,
        "SwapCached": count(PageFlag.SWAPCACHE),
        "Active": lists["Active", "anon"] + lists["Active", "file"],
        "Inactive": lists["Inactive", "anon"] + lists["Inactive", "file"],
        **{f"{name}({kind})": pages for kind in ("anon", "file") for name, pages in _of(lists, kind)},
        "Unevictable": count(lru | stuck),
        "Mlocked": count(PageFlag.MLOCKED),
        "SwapTotal": sum(area.slots - 1 for area in areas),
        "SwapFree": sum(area.slots - 1 - area.used for area in areas),
        "AnonPages": count(anon, PageFlag.HUGE, mapped),
        "Mapped": count(0, anon | PageFlag.HUGE | PageFlag.RESERVED | PageFlag.ZERO_PAGE, mapped),
        "Shmem": shmem,
        "Slab": count(PageFlag.SLAB),
        "PageTables": core.pool.in_use,
    }
    if core.caps.thp:
        rows["AnonHugePages"] = core.memory.large.mapped_by_pmd
    lines = [f"{name + ':':<16}{pages * kilobytes:8d} kB\n" for name, pages in rows.items()]
    return "".join(lines) + (huge_view.meminfo(core) if core.caps.hugetlb else "")


def _of(lists: dict[tuple[str, str], int], kind: str) -> list[tuple[str, int]]:
    return [(name, lists[name, kind]) for name in ("Active", "Inactive")]


def _buddyinfo(core: Core) -> str:
    """Free blocks of each order, a line a zone; zones that a hole divides are one."""
    counts: dict[tuple[int, bool, str], list[int]] = {}
    for zone in core.memory.zones:
        # As the kernel orders them: by node, DMA32 before Normal.
        row = counts.setdefault((zone.node, zone.name == "Normal", zone.name), [0] * (MAX_ORDER + 1))
        for order, blocks in enumerate(_blocks(core, zone)):
            row[order] += blocks
    return "".join(
        f"Node {node}, zone {name:>8} {''.join(f'{blocks:6d} ' for blocks in row)}\n"
        for (node, _, name), row in sorted(counts.items())
    )


def _blocks(core: Core, zone: Zone) -> list[int]:
    orders = core.memory.frames.free_order[zone.start : zone.frontier]
    blocks = np.bincount(orders[orders > 0] - 1, minlength=MAX_ORDER + 1).tolist()
    blocks[MAX_ORDER] += zone.end - zone.frontier >> MAX_ORDER
    return [int(number) for number in blocks]


def _swaps(core: Core) -> str:
    kilobytes = core.geometry.page_size >> 10
    lines = ["Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"]
    for area in core.swap.there:
        size, used = (area.slots - 1) * kilobytes, area.used * kilobytes
        name, kind = (
            (f"/swap{area.number}", "file\t") if area.compressed else (f"/dev/swap{area.number}", "partition")
        )
        tabs = ["\t" if value < 10_000_000 else "" for value in (size, used)]
        lines.append(f"{name:<40}{kind}\t{size}\t{tabs[0]}{used}\t{tabs[1]}{area.priority}\n")
    return "".join(lines)


def _version(core: Core) -> str:
    return f"Linux version {core.profile.name} (pmcore@simulated) #1 SMP\n"


def _choice(options: tuple[str, ...], chosen: str) -> str:
    return " ".join(f"[{option}]" if option == chosen else option for option in options) + "\n"


def _size_setting(core: Core, order: int) -> str:
    size = (core.geometry.page_size << order) >> 10
    default = "inherit" if order == core.geometry.pmd_order else "never"
    by_name = dict(core.policy.thp_sizes)
    return by_name.get(f"{size}kB", by_name.get(str(order), default))


def _size_enabled(order: int, core: Core) -> str:
    return _choice(SETTINGS, _size_setting(core, order))


def _khugepaged(name: str, core: Core) -> str:
    return f"{getattr(core.khugepaged, name)}\n"


def _thp(core: Core) -> dict[str, Callable[[Core], str]]:
    geometry = core.geometry
    found: dict[str, Callable[[Core], str]] = {
        f"{_THP}/enabled": lambda core: _choice(_PMD_SETTINGS, core.policy.pmd),
        f"{_THP}/use_zero_page": lambda core: f"{int(core.policy.use_zero_page)}\n",
        f"{_THP}/hpage_pmd_size": lambda core: f"{core.geometry.pmd_size}\n",
    }
    for name in _KHUGEPAGED:
        found[f"{_THP}/khugepaged/{name}"] = partial(_khugepaged, name)
    if core.caps.mthp:
        for order in range(MIN_ORDER, geometry.pmd_order + 1):
            size = (geometry.page_size << order) >> 10
            found[f"{_THP}/hugepages-{size}kB/enabled"] = partial(_size_enabled, order)
    return found


def _pool(size: int, name: str, core: Core) -> str:
    pool = core.hugetlb.pools[size]
    value = {
        "nr_hugepages": pool.total,
        "free_hugepages": len(pool.free),
        "resv_hugepages": pool.reserved,
        "surplus_hugepages": pool.surplus,
        "nr_overcommit_hugepages": pool.overcommit,
    }[name]
    return f"{value}\n"


def _pools(core: Core) -> dict[str, Callable[[Core], str]]:
    return {
        f"{_HUGETLB}/hugepages-{size >> 10}kB/{name}": partial(_pool, size, name)
        for size in core.hugetlb.pools
        for name in _POOL
    }


def _texts(core: Core) -> dict[str, Callable[[Core], str]]:
    found: dict[str, Callable[[Core], str]] = {
        "meminfo": _meminfo,
        "buddyinfo": _buddyinfo,
        "swaps": _swaps,
        "version": _version,
    }
    if core.caps.thp:
        found |= _thp(core)
    if core.caps.hugetlb:
        found |= _pools(core)
    return found


def names(core: Core) -> tuple[str, ...]:
    """Names of the texts that this machine's kernel has; those of sysfs by their whole paths."""
    return tuple(_texts(core))


def text(core: Core, name: str) -> bytes | None:
    """The text of that name; None where there is none."""
    make = _texts(core).get(name)
    return None if make is None else make(core).encode()
