"""Making a live kernel hold still: what runs by itself is stopped, what lies in per-CPU batches is drained."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

__all__ = ["drain_lru", "steady"]

_SYS_MOVE_PAGES = {"x86_64": 279, "aarch64": 239, "riscv64": 239, "ppc64le": 301, "s390x": 310}
_KNOBS = {
    "/proc/sys/vm/page-cluster": "0",
    "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs": "3600000",
    "/sys/kernel/mm/transparent_hugepage/khugepaged/alloc_sleep_millisecs": "3600000",
    "/sys/kernel/mm/ksm/run": "0",
}


def drain_lru() -> bool:
    """Have all processors put the pages in their batches onto the LRU lists; whether that could be done.

    move_pages(2) of a page of our own to the node where it is drains them all and does nothing else.
    """
    number = _SYS_MOVE_PAGES.get(platform.machine())
    if number is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    area = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[0] = 1
    cell = ctypes.c_char.from_buffer(area)
    pages, nodes, status = (
        (ctypes.c_void_p * 1)(ctypes.addressof(cell)),
        (ctypes.c_int * 1)(0),
        (ctypes.c_int * 1)(),
    )
    try:
        return int(libc.syscall(number, 0, ctypes.c_ulong(1), pages, nodes, status, 2)) == 0
    finally:
        del cell
        area.close()


@contextmanager
def steady(cpu: int | None = None) -> Iterator[None]:
    """Pin this process to one processor, quieten khugepaged, ksmd and swap readahead; all is put back on leaving.

    Knobs that cannot be turned (no root, not there) are left alone. SIGTERM puts them back too.
    """
    with ExitStack() as undo:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed) if cpu is None else cpu})
        undo.callback(os.sched_setaffinity, 0, allowed)
        for path, value in _KNOBS.items():
            knob = Path(path)
            with suppress(OSError):
                before = knob.read_text().strip()
                if before != value:
                    knob.write_text(value)
                    undo.callback(knob.write_text, before)
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGTERM)

            def terminated(_number: int, _frame: FrameType | None) -> None:
                raise SystemExit(128 + signal.SIGTERM)

            signal.signal(signal.SIGTERM, terminated)
            undo.callback(signal.signal, signal.SIGTERM, previous)
        yield
