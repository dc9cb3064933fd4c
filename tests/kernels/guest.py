"""The first process of a guest: makes it ready, does the job, tells on the second serial line, powers off.

What it tells is one JSON text a line. It has the standard library alone until the job's commands run.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

_MOUNTS = (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"))
_GROUPS = "/sys/fs/cgroup"
_SYS_INIT_MODULE = 175
_POWER_OFF = 0x4321FEDC
#: struct dm_ioctl, and the numbers of device-mapper's calls.
_DM_HEAD = struct.Struct("=3I2IIi3IQ128s129s7x")
_DM_CREATE, _DM_SUSPEND, _DM_LOAD = 0xC138FD03, 0xC138FD06, 0xC138FD09

libc = ctypes.CDLL(None, use_errno=True)


class Line:
    """The second serial line."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/ttyS1", os.O_WRONLY)
        import termios
        import tty

        tty.setraw(self._fd, termios.TCSANOW)
        self._lock = threading.Lock()

    def tell(self, event: str, **values: object) -> None:
        """One event."""
        data = json.dumps({"event": event, "at": round(time.monotonic(), 2), **values}).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]


def mount(kind: str, place: str) -> None:
    """mount(2) of a file system of the kernel's own."""
    Path(place).mkdir(parents=True, exist_ok=True)
    if libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None) and ctypes.get_errno() != 16:
        raise OSError(ctypes.get_errno(), f"mount {place}")


def load(name: str, options: str) -> None:
    """Load a module."""
    data = Path(f"/modules/{name}.ko").read_bytes()
    if libc.syscall(_SYS_INIT_MODULE, data, ctypes.c_ulong(len(data)), options.encode()):
        raise OSError(ctypes.get_errno(), f"module {name}: {os.strerror(ctypes.get_errno())}")


def put(path: str, value: str) -> bool:
    """Write a knob; whether it is there."""
    try:
        Path(path).write_text(value)
    except OSError:
        return False
    return True


def mapper(name: str, target: str) -> str:
    """A device of device-mapper over all of `target`: the path of its node."""
    sectors = int(Path(f"/sys/class/block/{Path(target).name}/size").read_text())
    control = os.open("/dev/mapper/control", os.O_RDWR)
    parameters = f"{target} 0".encode().ljust(64, b"\0")
    table = struct.pack("=QQiI16s", 0, sectors, 0, 0, b"linear") + parameters
    for call, data, count in ((_DM_CREATE, b"", 0), (_DM_LOAD, table, 1), (_DM_SUSPEND, b"", 0)):
        size = _DM_HEAD.size + max(len(data), 64)
        head = _DM_HEAD.pack(4, 0, 0, size, _DM_HEAD.size, count, 0, 0, 0, 0, 0, name.encode(), b"")
        fcntl.ioctl(control, call, bytearray((head + data).ljust(size, b"\0")))
    os.close(control)
    return "/dev/dm-0"


def swap_device(kind: str, size: int) -> str:
    """A block device for swap: a disk of memory under device-mapper, whose writes complete at once."""
    if kind != "dm":
        raise ValueError(f"no swap device of kind {kind}")
    path = mapper("swap", "/dev/ram0")
    for _ in range(50):
        if Path(path).exists():
            break
        time.sleep(0.1)
    return path


def ready(job: dict) -> dict:
    """Mount, load, turn; what the kernel says of itself."""
    for name in job["modules"]:
        options = f"rd_nr=1 rd_size={job['swap_bytes'] >> 10}" if name == "brd" else ""
        load(name, options)
    mount("cgroup2", _GROUPS)
    put(f"{_GROUPS}/cgroup.subtree_control", "+memory")
    turned = {path: put(path, value) for path, value in job["knobs"].items()}
    if job["swap"]:
        device = swap_device(job["swap"], job["swap_bytes"])
        put("/sys/class/block/dm-0/queue/rotational", "1" if job["rotational"] else "0")
        size = 4096
        head = (
            struct.pack("=3I", 1, job["swap_bytes"] // size - 1, 0).ljust(size - 1024 - 10, b"\0")
            + b"SWAPSPACE2"
        )
        with Path(device).open("r+b", buffering=0) as disk:
            disk.write(b"\0" * 1024 + head)
            os.fsync(disk.fileno())
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "release": platform.release(),
        "version": platform.version(),
        "memory_kib": int(memory),
        "turned": turned,
    }


def run(line: Line, number: int, command: list[str], job: dict, limit: float) -> None:
    """A command; each line that it writes is told at once."""
    env = {
        "PYTHONPATH": job["site"],
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": "/bin",
        "HOME": "/tmp",
        "OPENBLAS_NUM_THREADS": "1",
        "COLUMNS": "200",
        **job["env"],
    }
    words = [sys.executable, *command[1:]] if command[0] == "python" else command
    began = time.monotonic()
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        cwd="/files",
    )

    def stop() -> None:
        process.kill()

    timer = threading.Timer(limit, stop)
    timer.start()
    assert process.stdout is not None
    for raw in process.stdout:
        line.tell("line", command=number, text=raw.decode(errors="replace").rstrip("\n"))
    code = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    line.tell("end", command=number, code=code, late=late, seconds=round(time.monotonic() - began, 2))


def main() -> None:
    """The whole of it."""
    for kind, place in _MOUNTS:
        mount(kind, place)
    line = Line()
    try:
        job = json.loads(Path("/job.json").read_text())
        Path("/files").mkdir(exist_ok=True)
        line.tell("ready", **ready(job))
        for number, command in enumerate(job["commands"]):
            run(line, number, command, job, job["limit"])
        line.tell("done")
    except BaseException:
        line.tell("broken", text=traceback.format_exc())
    os.sync()
    libc.reboot(_POWER_OFF)


if __name__ == "__main__":
    main()
