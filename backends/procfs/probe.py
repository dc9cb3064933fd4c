"""Finding out by trying what this kernel can do and what this user may see. Nothing is changed by it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import numpy as np

from pmcore import spec
from pmcore.backends.procfs.files import WordFile
from pmcore.backends.procfs.ioctl import pagemap_scan, procmap_query
from pmcore.backends.procfs.userfaultfd import offered_features
from pmcore.errors import PmcoreError, SyscallError, UnknownCapability
from pmcore.geometry import Geometry
from pmcore.pagemap import PagemapEntry
from pmcore.procmap import MapQuery
from pmcore.profile import KernelProfile, preset
from pmcore.scan.request import ScanRequest
from pmcore.uapi import Madvise, PageCategory, ProcmapFlag, UffdFeature

__all__ = ["Probe", "pfn_is_visible", "probe_all", "running_profile"]

_MADV_GUARD_INSTALL = 102


@attrs.frozen(kw_only=True)
class Probe:
    """One question and its answer. `capability` is the profile's name for it, None where there is none."""

    name: str
    ok: bool
    seen: str
    remedy: str = ""
    capability: str | None = None


@contextmanager
def _own_page() -> Iterator[tuple[int, mmap.mmap]]:
    """A freshly touched private anonymous page of this process: its address."""
    area = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[0] = 1
    cell = ctypes.c_char.from_buffer(area)
    try:
        yield ctypes.addressof(cell), area
    finally:
        del cell
        area.close()


def _own_entry(root: str) -> int:
    """The pagemap word of a page of our own. Raises SyscallError."""
    with _own_page() as (address, _):
        words = WordFile(f"{root}/self/pagemap", "pagemap")
        try:
            out = np.zeros(1, dtype=np.uint64)
            words.read_words(address // mmap.PAGESIZE, out)
            return int(out[0])
        finally:
            words.close()


def pfn_is_visible(root: str) -> bool:
    """Whether pagemap shows us frame numbers."""
    try:
        return not PagemapEntry(_own_entry(root)).hidden
    except SyscallError:
        return False


def probe_all(root: str) -> tuple[Probe, ...]:
    """Ask everything, in the order in which a report shows it."""
    found = [*_pagemap(root), *_frame_files(root), *_scan(root), *_userfaultfd()]
    found += [_procmap_query(root), _clear_refs(root), _guard(), _idle()]
    found += [_protection_keys(root)]
    found += [_directory("mm.thp", "transparent huge pages", "/sys/kernel/mm/transparent_hugepage")]
    found += [_directory("mm.ksm", "same-page merging", "/sys/kernel/mm/ksm")]
    found += [_hugetlb(), _memory_failure(), _swap(root), _groups(root)]
    return tuple(found)


#: What is found missing, and the option of the kernel's configuration that it stands for.
_OPTIONS = {
    "mm.thp": "CONFIG_TRANSPARENT_HUGEPAGE",
    "mm.ksm": "CONFIG_KSM",
    "mm.hugetlb": "CONFIG_HUGETLB_PAGE",
}


def running_profile(probes: tuple[Probe, ...], geometry: Geometry) -> KernelProfile:
    """The preset of the running version, with what was tried put in place of what was assumed."""
    release, machine = os.uname().release, os.uname().machine
    decided = {probe.capability: probe.ok for probe in probes if probe.capability is not None}
    # What is not there takes along all else that needs the same option.
    config = [f"!{option}" for name, option in _OPTIONS.items() if not decided.get(name, True)]
    try:
        start = preset(release, arch=machine, config=config)
    except UnknownCapability:
        start = preset(spec.kernels()[-1].version, arch=machine, config=config)  # newer than the tables
    profile = start.changed(
        name=f"{release} (probed)",
        add=[name for name, ok in decided.items() if ok],
        remove=[name for name, ok in decided.items() if not ok],
    )
    return attrs.evolve(profile, geometry=geometry)


# -- the questions ---------------------------------------------------------------------------------------


def _pagemap(root: str) -> Iterator[Probe]:
    try:
        word = _own_entry(root)
    except SyscallError as error:
        # Forbidden is not absent: the kernel has it, this user has not.
        missing = error.errno == errno.ENOENT
        seen, _, remedy = str(error).partition("; ")
        yield Probe(
            name="pagemap", ok=False, seen=seen, remedy=remedy, capability="pagemap" if missing else None
        )
        return
    yield Probe(name="pagemap", ok=True, seen=f"own page reads {word:#018x}", capability="pagemap")
    visible = not PagemapEntry(word).hidden
    yield Probe(
        name="frame numbers",
        ok=visible,
        seen="shown" if visible else "hidden: the field reads zero",
        remedy="" if visible else "run with CAP_SYS_ADMIN (as root)",
    )
    soft_dirty = bool(word >> 55 & 1)
    yield Probe(
        name="soft-dirty",
        ok=soft_dirty,
        seen="a fresh page has bit 55" if soft_dirty else "a freshly written page has no bit 55",
        remedy=""
        if soft_dirty
        else "needs a kernel with CONFIG_MEM_SOFT_DIRTY; uffd write-protect does without",
        capability="pagemap.soft_dirty",
    )
    yield Probe(
        name="clearing soft-dirty",
        ok=soft_dirty,
        seen="there are bits to clear" if soft_dirty else "there are no bits to clear",
        remedy="" if soft_dirty else "as for soft-dirty",
        capability="clear_refs.soft_dirty",
    )


def _frame_files(root: str) -> Iterator[Probe]:
    for name in ("kpageflags", "kpagecount", "kpagecgroup"):
        try:
            file = WordFile(f"{root}/{name}", name)
        except SyscallError as error:
            missing = error.errno == errno.ENOENT
            yield Probe(
                name=name,
                ok=False,
                seen=str(error).partition(";")[0],
                remedy=error.remedy or "",
                # Forbidden is not absent: the kernel has it, this user has not.
                capability=name if missing else None,
            )
            continue
        file.close()
        yield Probe(name=name, ok=True, seen="readable", capability=name)


def _scan(root: str) -> Iterator[Probe]:
    try:
        words = WordFile(f"{root}/self/pagemap", "pagemap")
    except SyscallError:
        return
    try:
        for name, mask, capability in (
            ("PAGEMAP_SCAN", 0, "scan"),
            ("PAGE_IS_SOFT_DIRTY", PageCategory.SOFT_DIRTY, "scan.soft_dirty"),
            ("PAGE_IS_GUARD", PageCategory.GUARD, "scan.guard"),
        ):
            # A scan of no pages is refused where the call or the category is unknown, and does nothing else.
            request = ScanRequest(start=0, end=0, return_mask=int(mask))
            failed = pagemap_scan(words.fd, request, page_size=mmap.PAGESIZE).errno
            yield Probe(
                name=name,
                ok=not failed,
                seen=errno.errorcode[failed] if failed else "accepted",
                remedy="" if not failed else "needs a newer kernel; scans go through the engine over pagemap",
                capability=capability,
            )
        yield from _empty_pte(words)
        yield from _scan_of_ended(root)
    finally:
        words.close()


def _empty_pte(words: WordFile) -> Iterator[Probe]:
    """Whether the generic path counts an empty PTE as written: the neighbour of a touched page is one."""
    size = mmap.PAGESIZE
    table = size * size // 8  # bytes that one page table maps
    area = mmap.mmap(-1, 3 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        area.madvise(mmap.MADV_NOHUGEPAGE)
    cell = ctypes.c_char.from_buffer(area)
    address = ctypes.addressof(cell)
    # Of three pages two neighbours lie in one page table.
    first = 0 if address // table == (address + size) // table else size
    area[first] = 1
    address += first
    try:
        request = ScanRequest(
            start=address + size,
            end=address + 2 * size,
            vec_len=1,
            return_mask=int(PageCategory.WRITTEN | PageCategory.PRESENT),
        )
        result = pagemap_scan(words.fd, request, page_size=size)
        if result.errno:
            return  # no such call: nothing learned
        written = len(result.regions) == 1 and int(result.regions["categories"][0]) == PageCategory.WRITTEN
        yield Probe(
            name="empty PTE counts as written",
            ok=written,
            seen="in every scan" if written else "only in scans for written pages alone",
            capability="scan.empty_pte_written",
        )
    finally:
        del cell
        area.close()


def _scan_of_ended(root: str) -> Iterator[Probe]:
    """What a scan says once the process is gone: a child of ours, which waits for its input to end."""
    reading, writing = os.pipe()
    try:
        child = os.posix_spawnp("cat", ["cat"], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0)])
    except OSError:
        os.close(writing)
        return
    finally:
        os.close(reading)
    try:
        words = WordFile(f"{root}/{child}/pagemap", "pagemap")
    except SyscallError:
        return
    finally:
        os.close(writing)
        os.waitpid(child, 0)
    try:
        result = pagemap_scan(
            words.fd, ScanRequest(start=0, end=mmap.PAGESIZE, vec_len=1), page_size=mmap.PAGESIZE
        )
    finally:
        words.close()
    if result.errno in (0, errno.ESRCH):
        yield Probe(
            name="scan of an ended process",
            ok=not result.errno,
            seen="finds nothing" if not result.errno else "ESRCH",
            capability="quirk.scan_of_ended",
        )


def _userfaultfd() -> Iterator[Probe]:
    try:
        features = offered_features()
    except SyscallError as error:
        seen, _, remedy = str(error).partition("; ")
        yield Probe(name="userfaultfd", ok=False, seen=seen, remedy=remedy)
        if error.errno != errno.ENOSYS:
            return  # forbidden, not absent
        features = UffdFeature(0)
    for name, bit, capability in (
        ("userfaultfd write-protect", UffdFeature.PAGEFAULT_FLAG_WP, "uffd.wp"),
        ("  on shmem and hugetlb", UffdFeature.WP_HUGETLBFS_SHMEM, "uffd.wp_hugetlbfs_shmem"),
        ("  of empty pages", UffdFeature.WP_UNPOPULATED, "uffd.wp_unpopulated"),
        ("  asynchronous", UffdFeature.WP_ASYNC, "uffd.wp_async"),
        ("userfaultfd minor faults", UffdFeature.MINOR_SHMEM, "uffd.minor"),
        ("userfaultfd poisons", UffdFeature.POISON, "uffd.poison"),
        ("userfaultfd moves", UffdFeature.MOVE, "uffd.move"),
    ):
        ok = bool(features & bit)
        yield Probe(
            name=name,
            ok=ok,
            seen="offered" if ok else "not offered",
            remedy="" if ok else "needs a newer kernel (6.8 has all) with CONFIG_PTE_MARKER_UFFD_WP",
            capability=capability,
        )


def _procmap_query(root: str) -> Probe:
    seen = "accepted"
    ok = True
    try:
        fd = os.open(f"{root}/self/maps", os.O_RDONLY | os.O_CLOEXEC)
        try:
            procmap_query(fd, MapQuery(address=0, flags=ProcmapFlag.COVERING_OR_NEXT_VMA))
        finally:
            os.close(fd)
    except (OSError, PmcoreError) as error:
        ok, seen = False, str(error).partition(";")[0]
    remedy = "" if ok else "came with 6.11; maps is read as text"
    return Probe(name="PROCMAP_QUERY", ok=ok, seen=seen, remedy=remedy, capability="maps.procmap_query")


def _clear_refs(root: str) -> Probe:
    there = os.path.exists(f"{root}/self/clear_refs")  # noqa: PTH110
    return Probe(
        name="clear_refs",
        ok=there,
        seen="there" if there else "not there",
        remedy="" if there else "needs CONFIG_PROC_PAGE_MONITOR",
        capability="clear_refs",
    )


def _protection_keys(root: str) -> Probe:
    ok = False
    with suppress(OSError):
        ok = b"\nProtectionKey:" in Path(f"{root}/self/smaps").read_bytes()
    return Probe(
        name="protection keys",
        ok=ok,
        seen="smaps shows them" if ok else "smaps shows none",
        remedy="" if ok else "needs a processor that has them (pku)",
        capability="smaps.protection_key",
    )


def _guard() -> Probe:
    with _own_page() as (address, _):
        libc = ctypes.CDLL(None, use_errno=True)
        ok = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), _MADV_GUARD_INSTALL) == 0
        failed = 0 if ok else ctypes.get_errno()
    return Probe(
        name="guard regions",
        ok=ok,
        seen="MADV_GUARD_INSTALL accepted" if ok else errno.errorcode.get(failed, str(failed)),
        remedy="" if ok else "came with 6.13",
        capability="mm.guard_regions",
    )


def _idle() -> Probe:
    path = Path("/sys/kernel/mm/page_idle/bitmap")
    ok = path.exists()
    return Probe(
        name="idle page tracking",
        ok=ok,
        seen=str(path) if ok else "no page_idle/bitmap",
        remedy="" if ok else "needs a kernel with CONFIG_IDLE_PAGE_TRACKING",
        capability="page_idle",
    )


def _directory(capability: str, name: str, path: str) -> Probe:
    ok = Path(path).is_dir()
    seen = path if ok else "not configured"
    with suppress(OSError):
        policy = re.search(r"\[(\w+)\]", (Path(path) / "enabled").read_text())
        seen = f"enabled={policy[1]}" if policy else seen
    return Probe(name=name, ok=ok, seen=seen, remedy="", capability=capability)


def _hugetlb() -> Probe:
    sizes = sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB"))
    pools = []
    for pool in sizes:
        with suppress(OSError):
            pools.append(
                f"{pool.name.removeprefix('hugepages-')}: {(pool / 'nr_hugepages').read_text().strip()}"
            )
    return Probe(
        name="hugetlb pools",
        ok=bool(sizes),
        seen=", ".join(pools) or "not configured",
        remedy="" if sizes else "needs CONFIG_HUGETLBFS",
        capability="mm.hugetlb",
    )


def _memory_failure() -> Probe:
    """Whether the kernel knows MADV_HWPOISON: advice about no memory at all is refused if it does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    ok = libc.madvise(ctypes.c_void_p(0), ctypes.c_size_t(0), int(Madvise.HWPOISON)) == 0
    return Probe(
        name="memory failure",
        ok=ok,
        seen="MADV_HWPOISON is known" if ok else "MADV_HWPOISON is not known",
        remedy="" if ok else "needs CONFIG_MEMORY_FAILURE",
        capability="mm.memory_failure",
    )


def _groups(root: str) -> Probe:
    """Whether the memory controller has a hierarchy of version 1: it is then one of those with a number."""
    version, seen = 0, "not configured"
    with suppress(OSError):
        for line in Path(root, "cgroups").read_text().splitlines():
            name, number, _, enabled = line.split()[:4]
            if name == "memory" and enabled == "1":
                version = 2 if number == "0" else 1
                seen = f"version {version}"
    return Probe(
        name="memory cgroups of version 1",
        ok=version == 1,
        seen=seen,
        remedy="" if version else "needs CONFIG_MEMCG, and no cgroup_disable=memory",
        capability="memcg.v1",
    )


def _swap(root: str) -> Probe:
    try:
        areas = len(Path(root, "swaps").read_text().splitlines()) - 1
    except OSError:
        return Probe(
            name="swap", ok=False, seen="no /proc/swaps", remedy="needs CONFIG_SWAP", capability="mm.swap"
        )
    return Probe(name="swap", ok=True, seen=f"{areas} areas in use", capability="mm.swap")
