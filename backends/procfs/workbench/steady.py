"""Making a live kernel hold still: what runs by itself is stopped, what lies in per-CPU batches is drained.

Knobs, swap areas and files are put back by a process of their own (`_guardian.py`), so that they are whatever ends us.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pmcore.backends.procfs.workbench import ksm
from pmcore.backends.procfs.workbench.disk import Disk
from pmcore.errors import BackendUnavailable, syscall_error

__all__ = ["drain_lru", "guard", "monitors", "steady", "turn_thp"]

_SYS_MOVE_PAGES = {"x86_64": 279, "aarch64": 239, "riscv64": 239, "ppc64le": 301, "s390x": 310}
_MADV_HUGEPAGE = 14
#: Seconds to wait for another process that keeps the machine still.
_PATIENCE = 300
#: What samples accesses to all memory: accessed bits move from entries to frames, and frames become IDLE.
_MONITORS = Path("/sys/kernel/mm/damon/admin/kdamonds")
_THP = "/sys/kernel/mm/transparent_hugepage"
_KNOBS = {
    "/proc/sys/vm/page-cluster": "0",
    f"{_THP}/khugepaged/scan_sleep_millisecs": "3600000",
    f"{_THP}/khugepaged/alloc_sleep_millisecs": "3600000",
    **ksm.KNOBS,
}
#: With a disk: nothing is written back because time has passed.
_DISK_KNOBS = {"/proc/sys/vm/dirty_writeback_centisecs": "0"}
#: With a swap area: compressed in memory, so that a page that is paged out is gone at once.
_SWAP_KNOBS = {"/sys/module/zswap/parameters/enabled": "Y"}


def monitors() -> list[str]:
    """The DAMON monitors that run, each by the file that switches it off."""
    return [str(path) for path in sorted(_MONITORS.glob("*/state")) if _read(str(path)) == "on"]


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
def steady(
    cpu: int | None = None,
    *,
    swap: int | str = 0,
    knobs: Mapping[str, str] | None = None,
    disk: Disk | None = None,
) -> Iterator[None]:
    """Pin this process to one processor, quieten khugepaged, ksmd, DAMON and swap readahead; put back on leaving.

    `swap` bytes of compressed swap, or the swap area on the block device of that path, are switched on
    (BackendUnavailable where that cannot be), `knobs` are further files of /proc and /sys with what to write. Knobs
    that cannot be turned (no root, not there) are left alone. `disk` is mounted meanwhile, and written to only by
    whoever asks.
    """
    lock = _lock()
    watched = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    allowed = os.sched_getaffinity(0)
    compressed = swap if isinstance(swap, int) else 0
    wanted = {
        **_KNOBS,
        **dict.fromkeys(monitors(), "off"),
        **(_SWAP_KNOBS if compressed else {}),
        **(_DISK_KNOBS if disk else {}),
        **(knobs or {}),
    }
    before = [
        (path, value)
        for path in dict.fromkeys((*wanted, *ksm.TURNED))
        if (value := _read(path)) is not None and (path in ksm.TURNED or value != wanted[path])
    ]
    sizes = [(path, value) for path in _thp_knobs().values() if (value := _read(path)) and path not in wanted]
    try:
        area = swap if isinstance(swap, str) else _swap_file(swap) if swap else None
        areas = [area] if area else []
        if disk:
            disk.prepare()
        guardian = guard(
            {
                "swapoff": areas,
                "umount": [str(disk.directory)] if disk else [],
                "knobs": [*before, *sizes],
                "remove": [
                    *(areas if compressed else []),
                    *([str(disk.image)] if disk and disk.zram is None else []),
                ],
                "zram": [disk.zram] if disk and disk.zram is not None else [],
            },
            lock,
        )
        _opened_thp.update(sizes)
    finally:
        os.close(lock)  # the guardian's copy holds it from here on
    try:
        os.sched_setaffinity(0, {min(allowed) if cpu is None else cpu})
        for path, value in before:
            if wanted.get(path, value) != value:
                with suppress(OSError):
                    Path(path).write_text(wanted[path])
        if area:
            _swapon(area)
        if disk:
            disk.mount()
        # khugepaged sleeps without end while it has nothing to look at, and begins at once with the first mapping that
        # asks for huge pages. Ours comes first; then it sleeps for the hour that the knob says.
        watched[0] = 1  # a mapping that never held a page is not looked at
        scans = _read(f"{_THP}/khugepaged/full_scans")
        with suppress(OSError):  # a kernel without huge pages has no khugepaged either
            watched.madvise(_MADV_HUGEPAGE)
        for _ in range(60):  # the least important thread of the machine: it may take a while to get a turn
            if scans is None or _read(f"{_THP}/khugepaged/full_scans") != scans:
                break
            time.sleep(0.05)
        yield
    finally:
        watched.close()
        os.sched_setaffinity(0, allowed)
        assert guardian.stdin is not None
        guardian.stdin.close()
        guardian.wait()
        assert guardian.stdout is not None
        guardian.stdout.close()


#: What the knobs of huge pages said when the machine was last made to hold still.
_opened_thp: dict[str, str] = {}


def _thp_knobs() -> dict[str, str]:
    """The knobs of huge pages by what they set: "enabled", or a size such as "64kB"."""
    knobs = {
        path.parent.name.removeprefix("hugepages-"): str(path)
        for path in Path(_THP).glob("hugepages-*/enabled")
    }
    return {"enabled": f"{_THP}/enabled", **knobs}


def turn_thp(settings: Mapping[str, str]) -> None:
    """Set sizes of huge pages; those that are not named are as `steady` found them, which puts all back on leaving.

    Raises BackendUnavailable for what this kernel does not have, with everything as it was found.
    """
    knobs = _thp_knobs()
    if unknown := settings.keys() - knobs.keys():
        raise BackendUnavailable(
            f"huge pages: this kernel has no {', '.join(sorted(unknown))}",
            remedy=f"one of {', '.join(knobs)}",
        )
    wanted = {**_opened_thp, **{knobs[what]: how for what, how in settings.items()}}
    for path, how in wanted.items():
        if _read(path) == how:
            continue
        try:
            Path(path).write_text(how)
        except OSError:
            for other, value in _opened_thp.items():
                if _read(other) != value:
                    Path(other).write_text(value)
            raise BackendUnavailable(
                f"huge pages: {path} cannot be set to {how!r}",
                remedy=f"as root, and one of {', '.join(knobs)}",
            ) from None


def _read(path: str) -> str | None:
    """A knob's value; of a choice ("always [madvise] never") the one that is made."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else text


def _lock() -> int:
    """One at a time: who came second would take what the first has turned for what the machine had."""
    fd = os.open(
        Path(tempfile.gettempdir()) / "pmcore-steady.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666
    )
    for _ in range(_PATIENCE * 10):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return fd
    os.close(fd)
    raise BackendUnavailable(
        "another workbench keeps the machine still",
        remedy=f"waited {_PATIENCE} s; try again when it has ended",
    )


def guard(todo: dict[str, object], lock: int | None = None) -> subprocess.Popen[bytes]:
    """A process that does what `todo` says (see `_guardian.py`) once its standard input ends, which it does with us."""
    script = Path(__file__).with_name("_guardian.py")
    guardian = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(script), json.dumps(todo)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        pass_fds=[] if lock is None else [lock],  # held until all is put back, also if we are dead by then
    )
    assert guardian.stdout is not None
    guardian.stdout.readline()  # from here on it ignores signals: nothing may be turned before
    return guardian


def _swap_file(length: int) -> str:
    """A new file with the signature of a swap area."""
    size = mmap.PAGESIZE
    pages = length // size
    fd, path = tempfile.mkstemp(prefix="pmcore-swap-")
    try:
        os.posix_fallocate(fd, 0, pages * size)
        head = struct.pack("=3I", 1, pages - 1, 0).ljust(size - 1024 - 10, b"\0") + b"SWAPSPACE2"
        os.pwrite(fd, b"\0" * 1024 + head, 0)
        os.fsync(fd)
    except BaseException:
        os.unlink(path)  # noqa: PTH108
        raise
    finally:
        os.close(fd)
    return path


def _swapon(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.swapon(path.encode(), 0):
        number = ctypes.get_errno()
        if number in (errno.EPERM, errno.ENOSYS):
            raise BackendUnavailable("swap cannot be switched on", remedy="run as root, or without swap")
        raise syscall_error(number, f"swapon({path})", remedy="a directory on a disk for TMPDIR may help")
