"""A deterministic simulated machine: the same interfaces as a running kernel's, on any operating system.

`open_machine` is what `pmcore.open("sim")` and `pmcore.registry.open_workbench("sim")` call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pmcore.backends.sim.policy import Policy
from pmcore.profile import REFERENCE_VERSION

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import SimMachine, SwapSettings
    from pmcore.geometry import Geometry
    from pmcore.profile import KernelProfile

__all__ = ["Policy", "open_machine"]


def open_machine(
    *,
    memory: int | str = "64 MiB",
    swap: int | str | Sequence[SwapSettings] = 0,
    swap_kind: str = "compressed",
    disk_kind: str = "compressed",
    kernel: str | KernelProfile = REFERENCE_VERSION,
    config: Iterable[str] = (),
    policy: Policy | Mapping[str, Any] | None = None,
    nodes: int = 1,
    holes: Sequence[tuple[int | str, int | str]] = (),
    privileged: bool = True,
    geometry: Geometry | None = None,
    hugepages: Mapping[int | str, int | tuple[int, int]] | None = None,
    block_size: int | str = "128 MiB",
) -> SimMachine:
    """A machine that has just booted.

    `memory` and `swap` are sizes ("64 MiB", bytes); several swap areas are given as `SwapSettings`. `swap_kind` says
    what an area given by its size is: "compressed" (memory), "device" (writes complete at once), "disk". `disk_kind`
    says what regular files lie on: "compressed" (memory: what is read ahead is there at once), "disk" (it comes later).
    `kernel` is a version or a profile, `config` changes its configuration. `holes` are ranges of physical addresses
    with no memory.
    `hugepages` are hugetlb pages set aside, by size: {"2 MiB": 20}, or with surplus pages allowed (20, 4).
    `block_size` is that of what can be taken offline at a time: 128 MiB on x86-64, less for a machine that is smaller.
    `policy` is what its administrator has set, as a `Policy` or by the names of its fields: which sizes of huge pages
    anonymous memory gets, for example `policy={"pmd": "madvise", "thp_sizes": {"64kB": "always", "16kB": "madvise"}}`
    (the kernel's .../transparent_hugepage/enabled and .../hugepages-64kB/enabled, .../hugepages-16kB/enabled).
    Without `privileged` frame numbers are hidden, and the kpage* files cannot be opened.
    Raises ArgumentError for settings that no machine has, UnknownCapability for a kernel that is not in spec/.
    """
    from pmcore.backends.sim.machine import make_machine

    return make_machine(
        memory=memory,
        swap=swap,
        swap_kind=swap_kind,
        disk_kind=disk_kind,
        kernel=kernel,
        config=config,
        policy=policy,
        nodes=nodes,
        holes=holes,
        privileged=privileged,
        geometry=geometry,
        hugepages=hugepages,
        block_size=block_size,
    )
