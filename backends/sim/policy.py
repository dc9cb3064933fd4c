"""What a machine's administrator sets; above all which sizes of huge pages a mapping may get."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import attrs

from pmcore.errors import ArgumentError
from pmcore.geometry import Geometry, parse_size

__all__ = ["Policy", "as_policy", "check_sizes", "thp_orders"]

#: What hugepages-*kB/enabled may say.
SETTINGS = ("always", "inherit", "madvise", "never")
#: The smallest huge page of anonymous memory is of four pages (order 1 has no room for what a large folio notes).
MIN_ORDER = 2

Sizes = tuple[tuple[str, str], ...]


def _sizes(value: Mapping[str | int, str] | Iterable[tuple[str | int, str]]) -> Sizes:
    """Pairs of size ("64kB") or order ("4") and setting, sorted: a value that can be compared and saved."""
    pairs = value.items() if isinstance(value, Mapping) else value
    found: dict[str, str] = {}
    for size, setting in pairs:
        if setting not in SETTINGS:
            raise ArgumentError(f"thp_sizes: {size}={setting!r}", remedy=f"one of {', '.join(SETTINGS)}")
        if isinstance(size, int) or re.fullmatch(r"\d+", size):
            name = str(int(size))
        else:
            length = parse_size(size)
            if length % 1024:
                raise ArgumentError(f"thp_sizes: {size!r} is no size of huge pages", remedy="such as '64kB'")
            name = f"{length // 1024}kB"
        found[name] = setting
    return tuple(sorted(found.items()))


@attrs.define(slots=True, kw_only=True)
class Policy:
    """What a machine's administrator sets."""

    #: /sys/kernel/mm/transparent_hugepage/enabled: "always", "madvise", "never". What "inherit" refers to.
    pmd: str = attrs.field(default="madvise", validator=attrs.validators.in_(("always", "madvise", "never")))
    #: .../hugepages-SIZEkB/enabled by size ("64kB") or by order (4): "always", "inherit", "madvise", "never". Sizes
    #: that are not named have the kernel's defaults: "inherit" for the size that a PMD maps, "never" for all others.
    thp_sizes: Sizes = attrs.field(default=(), converter=_sizes)
    #: .../use_zero_page
    use_zero_page: bool = True
    #: /proc/sys/vm/overcommit_memory, as far as it matters: "never" makes MAP_NORESERVE void.
    overcommit: str = attrs.field(
        default="guess", validator=attrs.validators.in_(("guess", "always", "never"))
    )
    #: RLIMIT_MEMLOCK in bytes; None for a process with CAP_IPC_LOCK.
    memlock: int | None = None


def as_policy(value: Policy | Mapping[str, Any] | None) -> Policy:
    """A policy from its fields by name, or the kernel's defaults. Raises ArgumentError for what is none."""
    if value is None or isinstance(value, Policy):
        return value or Policy()
    known = [field.name for field in attrs.fields(Policy)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ArgumentError(f"policy has no {', '.join(unknown)}", remedy=f"it has {', '.join(known)}")
    try:
        return Policy(**value)
    except (ValueError, TypeError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"policy: {error}") from None


def check_sizes(policy: Policy, geometry: Geometry, *, mthp: bool) -> None:
    """Raise ArgumentError for sizes that a machine of that geometry, or its kernel, does not have."""
    orders = [_order(name, geometry.page_shift) for name, _ in policy.thp_sizes]
    for order, (name, _) in zip(orders, policy.thp_sizes, strict=True):
        if not MIN_ORDER <= order <= geometry.pmd_order:
            sizes = [1 << n + geometry.page_shift - 10 for n in range(MIN_ORDER, geometry.pmd_order + 1)]
            raise ArgumentError(
                f"thp_sizes: no huge pages of {name}",
                remedy=f"there are: {', '.join(f'{size}kB' for size in sizes)}",
            )
    if orders and not mthp:
        raise ArgumentError(
            "thp_sizes: this kernel has one size of huge pages", remedy="mm.mthp came with Linux 6.8"
        )


def _order(name: str, page_shift: int) -> int:
    """The order of a size, -1 for one that is no power of two pages."""
    if not name.endswith("kB"):
        return int(name)
    size = int(name[:-2]) << 10
    return size.bit_length() - 1 - page_shift if size and not size & size - 1 else -1


@lru_cache(maxsize=256)
def thp_orders(pmd: str, sizes: Sizes, page_shift: int, pmd_order: int) -> tuple[int, int]:
    """Bits of the orders that any mapping may get, and of those that one under MADV_HUGEPAGE may."""
    settings = {pmd_order: "inherit"}
    settings |= {_order(name, page_shift): setting for name, setting in sizes}
    always = advised = 0
    for order, setting in settings.items():
        what = pmd if setting == "inherit" else setting
        if what == "always":
            always |= 1 << order
        if what != "never":
            advised |= 1 << order
    return always, advised
