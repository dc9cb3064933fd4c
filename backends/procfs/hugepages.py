"""Which sizes of huge pages the running kernel has, and by which policy it uses them."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import attrs

from pmcore.errors import Missing, syscall_error

__all__ = ["HugetlbPool", "ThpPolicy", "hugetlb_pools", "thp_pmd_size", "thp_policies"]

_THP = Path("/sys/kernel/mm/transparent_hugepage")
_POOLS = Path("/sys/kernel/mm/hugepages")


@attrs.frozen(kw_only=True)
class HugetlbPool:
    """A pool of hugetlb pages. Counts in pages of `size` bytes."""

    size: int
    total: int
    free: int
    reserved: int
    surplus: int


@attrs.frozen(kw_only=True)
class ThpPolicy:
    """When folios of `size` bytes are used for anonymous memory: always, inherit, madvise, never."""

    size: int
    enabled: str


def hugetlb_pools(root: Path = _POOLS) -> tuple[HugetlbPool, ...]:
    """The pools, by size; none where hugetlb is not configured."""
    found = []
    for directory in root.glob("hugepages-*kB"):
        size = int(directory.name.removeprefix("hugepages-").removesuffix("kB")) << 10
        numbers = {
            key: int((directory / f"{name}_hugepages").read_text())
            for key, name in (("total", "nr"), ("free", "free"), ("reserved", "resv"), ("surplus", "surplus"))
        }
        found.append(HugetlbPool(size=size, **numbers))
    return tuple(sorted(found, key=lambda pool: pool.size))


def thp_policies(root: Path = _THP) -> tuple[ThpPolicy, ...]:
    """Policies by size: the PMD size by the old switch where the kernel has no per-size ones (before 6.8)."""
    found = []
    for directory in root.glob("hugepages-*kB"):
        with suppress(OSError):
            policy = _chosen((directory / "enabled").read_text())
            size = int(directory.name.removeprefix("hugepages-").removesuffix("kB")) << 10
            found.append(ThpPolicy(size=size, enabled=policy))
    if not found:
        with suppress(OSError, Missing):
            found.append(ThpPolicy(size=thp_pmd_size(root), enabled=_chosen((root / "enabled").read_text())))
    return tuple(sorted(found, key=lambda policy: policy.size))


def thp_pmd_size(root: Path = _THP) -> int:
    """Bytes that a PMD maps. Raises Missing where transparent huge pages are not configured."""
    try:
        return int((root / "hpage_pmd_size").read_text())
    except OSError as error:
        raise syscall_error(error.errno or 2, f"open({root}/hpage_pmd_size)") from None


def _chosen(text: str) -> str:
    match = re.search(r"\[([\w+]+)\]", text)
    return match[1] if match else text.strip()
