"""userfaultfd: registering ranges, protecting them from writing, and what a protected access means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from pmcore.errors import AddressSpaceFault
from pmcore.uapi import UffdFeature

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace
    from pmcore.backends.sim.virtual.vma import VmArea

__all__ = ["Poisoned", "Userfaultfd", "blocked", "poisoned_access", "resolves_itself"]

_WP_ASYNC, _SIGBUS = int(UffdFeature.WP_ASYNC), int(UffdFeature.SIGBUS)


@attrs.define(slots=True, eq=False)
class Userfaultfd:
    """One descriptor's context: what was agreed on by UFFDIO_API, and whose address space it watches."""

    mm: AddressSpace
    features: int


def resolves_itself(vma: VmArea) -> bool:
    """Whether write protection is taken off by the write itself (UFFD_FEATURE_WP_ASYNC)."""
    return isinstance(vma.uffd, Userfaultfd) and bool(vma.uffd.features & _WP_ASYNC)


def blocked(vma: VmArea, addr: int) -> AddressSpaceFault:
    """An access that would wait for whoever reads the userfaultfd: SIGBUS with UFFD_FEATURE_SIGBUS.

    A simulated task has nobody who could answer it: without that feature the fault says so.
    """
    if isinstance(vma.uffd, Userfaultfd) and vma.uffd.features & _SIGBUS:
        return AddressSpaceFault("SIGBUS", addr, "userfaultfd with UFFD_FEATURE_SIGBUS")
    return AddressSpaceFault("SIGSTOP", addr, "the task would wait for the reader of its userfaultfd")


class Poisoned(AddressSpaceFault):
    """SIGBUS at a marker of UFFDIO_POISON; EHWPOISON where it is met by who populates by madvise."""


def poisoned_access(core: Core, addr: int, shift: int) -> Poisoned:
    """An access to such a marker; where the kernel knows machine checks it looks like one of 2**`shift` bytes."""
    return Poisoned("SIGBUS", addr, "poisoned by UFFDIO_POISON", lsb=shift if core.caps.memory_failure else 0)
