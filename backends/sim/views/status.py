"""Texts of /proc/PID beside maps and smaps: status, statm, smaps_rollup, comm, cmdline, cgroup; what is modelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from pmcore.backends.sim.services import migrating
from pmcore.backends.sim.views import hugetlb as huge_view
from pmcore.backends.sim.views import maps as maps_view
from pmcore.backends.sim.virtual.pte import FIELD, PRESENT
from pmcore.backends.sim.virtual.vma import VmFlag
from pmcore.backends.sim.virtual.zap import swap_entries
from pmcore.smaps import format_smaps
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["TEXTS", "text"]

_FIELD, _PRESENT = np.uint64(FIELD), np.uint64(PRESENT)


def _resident(core: Core, mm: AddressSpace) -> tuple[int, int, int]:
    """See `_counted`: what is on its way counts where it was."""
    with migrating.as_before(core):
        return _counted(core, mm)


def _counted(core: Core, mm: AddressSpace) -> tuple[int, int, int]:
    """Pages of anonymous memory, pages of shmem, and swap entries that the page tables hold; hugetlb is not counted."""
    anon = shmem = swapped = 0
    zeros = np.array([core.zero_pfn, core.huge_zero_pfn], dtype=np.uint64)
    for vma in mm.vmas:
        if vma.flags & VmFlag.HUGETLB:
            continue
        for extent in mm.tables.extents(vma.start, vma.end):
            entries = extent.entries
            there = entries[((entries & _PRESENT) != 0) & ~np.isin(entries & _FIELD, zeros)]
            pages = extent.size >> core.geometry.page_shift
            flags = core.memory.frames.flags[(there & _FIELD).view(np.int64)]
            private = int(((flags & np.uint64(PageFlag.ANON)) != 0).sum())
            anon += private * pages
            shmem += (len(there) - private) * pages
            if not extent.huge:
                swapped += int(swap_entries(entries).sum())
    return anon, shmem, swapped


def _status(core: Core, mm: AddressSpace, pid: int) -> str:
    size = core.geometry.page_size
    anon, shmem, swapped = (pages * size for pages in _resident(core, mm))
    data = stack = huge = total = 0
    for vma in mm.vmas:
        total += vma.length
        if vma.flags & VmFlag.GROWSDOWN:
            stack += vma.length
        elif vma.flags & VmFlag.WRITE and not vma.flags & VmFlag.SHARED:
            data += vma.length
        if vma.flags & VmFlag.HUGETLB:
            found = huge_view.counters(core, mm, vma)
            huge += found["Shared_Hugetlb"] + found["Private_Hugetlb"]
    lines = [f"Name:\t{_name(pid)}", f"Tgid:\t{pid}", f"Pid:\t{pid}"]
    for label, value in (
        ("VmSize", total),
        ("VmLck", mm.locked),
        ("VmRSS", anon + shmem),
        ("RssAnon", anon),
        ("RssFile", 0),
        ("RssShmem", shmem),
        ("VmData", data),
        ("VmStk", stack),
        ("VmPTE", sum(mm.tables.tables[:-1]) * size),
        ("VmSwap", swapped),
        ("HugetlbPages", huge),
    ):
        lines.append(f"{label}:\t{value >> 10:8d} kB")
    return "\n".join(lines) + "\n"


def _statm(core: Core, mm: AddressSpace, _pid: int) -> str:
    """Pages: all that is mapped, resident, of files; text, library, data and stack, dirty."""
    shift = core.geometry.page_shift
    anon, shmem, _ = _resident(core, mm)
    total = sum(vma.length for vma in mm.vmas) >> shift
    data = sum(
        vma.length
        for vma in mm.vmas
        if vma.flags & VmFlag.GROWSDOWN or (vma.flags & VmFlag.WRITE and not vma.flags & VmFlag.SHARED)
    )
    return f"{total} {anon + shmem} {shmem} 0 0 {data >> shift} 0\n"


def _rollup(core: Core, mm: AddressSpace, _pid: int) -> str:
    text = format_smaps([maps_view.rollup(core, mm)]).decode()
    return text if mm.vmas.first(0) is not None else text.replace("00000000-00000001", "00000000-00000000", 1)


def _cgroup(core: Core, mm: AddressSpace, _pid: int) -> str:
    """The group of each hierarchy: version 1 has one of its own for memory (rule CG-010)."""
    path = f"/{core.groups.there[mm.group].path}"
    return f"1:memory:{path}\n0::/\n" if core.caps.memcg_v1 else f"0::{path}\n"


def _name(pid: int) -> str:
    return f"task-{pid}"


#: What there is of each process, by name.
TEXTS: dict[str, Callable[[Core, AddressSpace, int], str]] = {
    "smaps_rollup": _rollup,
    "status": _status,
    "statm": _statm,
    "comm": lambda _core, _mm, pid: f"{_name(pid)}\n",
    "cmdline": lambda _core, _mm, pid: f"{_name(pid)}\0",
    "cgroup": _cgroup,
}


def text(core: Core, mm: AddressSpace, pid: int, name: str) -> bytes:
    """The text of that name."""
    return TEXTS[name](core, mm, pid).encode()
