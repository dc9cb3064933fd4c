"""What all ioctls of a userfaultfd ask first: the descriptor, and the range."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmcore.backends.sim.calls.refuse import refuse
from pmcore.backends.sim.services.userfaultfd import Userfaultfd
from pmcore.uapi import Errno

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["context_of", "range_of"]


def context_of(mm: AddressSpace, fd: int, call: str) -> Userfaultfd:
    """The userfaultfd behind a descriptor: EBADF for none, ENOTTY for a descriptor of another sort."""
    context = mm.files.get(fd)
    if context is None:
        refuse(Errno.EBADF, call)
    if not isinstance(context, Userfaultfd):
        refuse(Errno.ENOTTY, call)
    return context


def range_of(core: Core, call: str, start: int, length: int, *, aligned: bool = True) -> None:
    """EINVAL for what is no range of whole pages of user space; not `aligned`: it may begin inside a page."""
    size, task_size = core.geometry.page_size, core.geometry.task_size
    if (aligned and start & size - 1) or length & size - 1 or not length:
        refuse(Errno.EINVAL, call)
    if (aligned and start < core.mmap_min) or start >= task_size or length > task_size - start:
        refuse(Errno.EINVAL, call)
