"""Texts of /proc and /sys about the machine: free blocks, swaps, version, huge pages. Only what is modelled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.physical.buddy import MAX_ORDER, Zone
from pmcore.backends.sim.policy import MIN_ORDER, SETTINGS
from pmcore.backends.sim.views import amounts
from pmcore.backends.sim.views import blocks as block_files

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

_SAME = "/sys/kernel/mm/ksm"
_KSM = ("pages_to_scan", "full_scans", "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
#: Files that came later.
_KSM_SINCE = {
    "merge_across_nodes": "ksm.merge_across_nodes",
    "use_zero_pages": "ksm.use_zero_pages",
    "max_page_sharing": "ksm.max_page_sharing",
    "ksm_zero_pages": "ksm.counts_more",
    "pages_scanned": "ksm.counts_more",
}

_POOL = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages", "nr_overcommit_hugepages")


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


def _pagetypeinfo(core: Core) -> str:
    """Block order and size; nothing by migrate type, of which the simulated machine has none (rule FS-016)."""
    order = min(core.geometry.pmd_order, MAX_ORDER)
    orders = "".join(f"{number:6d} " for number in range(MAX_ORDER + 1))
    head = f"Page block order: {order}\nPages per block:  {1 << order}\n\n"
    return f"{head}{'Free pages count per migrate type at order':<43} {orders}\n"


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


def _ksm(name: str, core: Core) -> str:
    return f"{int(getattr(core.ksm, name))}\n"


def _merging(core: Core) -> dict[str, Callable[[Core], str]]:
    """ksmd's knobs and counters; it does nothing by itself: run is 0 (rule FS-018)."""
    names = [*_KSM, *(name for name, capability in _KSM_SINCE.items() if core.profile.has(capability))]
    found: dict[str, Callable[[Core], str]] = {f"{_SAME}/{name}": partial(_ksm, name) for name in names}
    return found | {f"{_SAME}/run": lambda core: "0\n"}


def _texts(core: Core) -> dict[str, Callable[[Core], str]]:
    found: dict[str, Callable[[Core], str]] = {
        "meminfo": amounts.meminfo,
        "vmstat": amounts.vmstat,
        "buddyinfo": _buddyinfo,
        "pagetypeinfo": _pagetypeinfo,
        "swaps": _swaps,
        "version": _version,
    }
    if core.caps.thp:
        found |= _thp(core)
    if core.caps.hugetlb:
        found |= _pools(core)
    if core.profile.has("mm.ksm"):
        found |= _merging(core)
    return found


def names(core: Core) -> tuple[str, ...]:
    """Names of the texts that this machine's kernel has; those of sysfs by their whole paths."""
    return (*_texts(core), *block_files.names(core))


def text(core: Core, name: str) -> bytes | None:
    """The text of that name; None where there is none."""
    if name.startswith(block_files.DIRECTORY):
        shown = block_files.text(core, name)
        return None if shown is None else shown.encode()
    make = _texts(core).get(name)
    return None if make is None else make(core).encode()
