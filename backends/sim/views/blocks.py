"""/sys/devices/system/memory: the size of a memory block, and which blocks are online (rule FS-017)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pmcore.backends.sim.physical import memory_blocks

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["DIRECTORY", "names", "state_of", "text"]

DIRECTORY = "/sys/devices/system/memory"
_FILE = re.compile(rf"{DIRECTORY}/memory(0|[1-9]\d{{0,9}})/(state|phys_index)")


def names(core: Core) -> tuple[str, ...]:
    """Paths of its files."""
    there = memory_blocks.blocks(core.memory, core.geometry.page_size)
    files = (
        f"{DIRECTORY}/memory{block.number}/{name}" for block in there for name in ("state", "phys_index")
    )
    return (f"{DIRECTORY}/block_size_bytes", *files)


def text(core: Core, path: str) -> str | None:
    """The text of a file; None where there is none."""
    if path == f"{DIRECTORY}/block_size_bytes":
        return f"{core.memory.block_pages * core.geometry.page_size:x}\n"
    match = _FILE.fullmatch(path)
    block = memory_blocks.block_of(core.memory, int(match[1]), core.geometry.page_size) if match else None
    if match is None or block is None:
        return None
    return f"{block.state}\n" if match[2] == "state" else f"{block.number:08x}\n"


def state_of(path: str) -> int | None:
    """The number of the block whose state the path is; None for another file."""
    match = _FILE.fullmatch(path)
    return int(match[1]) if match and match[2] == "state" else None
