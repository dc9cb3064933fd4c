"""Shared memory: present, swapped out, or never allocated (the document's "Exceptions for Shared Memory").

The page table cannot tell: the entry of a shared page is cleared when the page is zapped or swapped out (SH-001). So
three witnesses are asked: pagemap whether the page is mapped here, mincore whether the file has it in memory, SEEK_DATA
whether the file has it at all.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import NDArray

from pmcore.protocols import Process
from pmcore.vma import Vma

__all__ = ["SharedState", "shared_states"]


class SharedState(enum.IntEnum):
    """Where a page of a shared mapping is."""

    #: Never allocated, or punched out: neither mincore nor SEEK_DATA know it.
    NONE = 0
    #: The file has it, but not in memory: swapped out (shmem), or on disk only (a regular file).
    STORED = 1
    #: In memory (page cache or swap cache), and not mapped by this process.
    CACHED = 2
    #: Present in this process's page table.
    PRESENT = 3


def shared_states(
    process: Process, vma: Vma, start: int | None = None, end: int | None = None
) -> NDArray[np.uint8]:
    """One SharedState a page of `vma` from `start` to `end` (default: all of it). Rules SH-001 to SH-008.

    Raises InvalidArgument for a mapping without a file, NotPermitted where the file cannot be reached.
    """
    low, high = vma.start if start is None else start, vma.end if end is None else end
    entries = process.pagemap(low, high)
    file = process.file_residency(vma, low, high)
    states = np.where(file.data, SharedState.STORED, SharedState.NONE).astype(np.uint8)
    states[file.in_core] = SharedState.CACHED
    states[entries.present] = SharedState.PRESENT
    return states
