"""Booting a guest under software emulation, and listening to what it tells."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs

from tests.kernels.archive import KernelTree, MatrixError, emulator
from tests.kernels.image import base, overlay

#: As on the machines that the simulated one is a model of: no multi-generational LRU, huge pages where asked for.
_KNOBS = {
    "/sys/kernel/mm/lru_gen/enabled": "0",
    "/sys/kernel/mm/transparent_hugepage/enabled": "madvise",
    "/proc/sys/kernel/numa_balancing": "0",
}


@attrs.define(kw_only=True)
class Told:
    """What a guest told: its own words about itself, and each command's lines and exit code."""

    ready: dict[str, Any] = attrs.field(factory=dict)
    lines: dict[int, list[str]] = attrs.field(factory=dict)
    codes: dict[int, int] = attrs.field(factory=dict)
    seconds: dict[int, float] = attrs.field(factory=dict)
    #: Whether the guest came to its end.
    done: bool = False
    #: The end of its console, where it did not.
    console: str = ""


def boot(
    tree: KernelTree,
    commands: list[list[str]],
    *,
    cache: Path,
    package: Path,
    limit: float = 3600,
    memory_mib: int = 1536,
    nodes: int = 1,
    levels: int = 4,
    swap: str = "dm",
    swap_bytes: int = 256 << 20,
    rotational: bool = True,
    knobs: dict[str, str] | None = None,
    env: dict[str, str] | None = None,
    files: Iterable[Path] = (),
    listen: Callable[[dict[str, Any]], object] | None = None,
) -> Told:
    """Boot the kernel, have it run the commands, one after the other, and end. `limit` in seconds, for all together.

    Memory is that of `nodes` NUMA nodes, in equal parts; page tables have `levels` levels, 4 or 5.
    `package` is the directory of the installed project; `listen` is given each event as it comes. Raises MatrixError.
    """
    job = {
        "commands": commands,
        "limit": limit,
        "swap": swap,
        "swap_bytes": swap_bytes,
        "rotational": rotational,
        "knobs": {**_KNOBS, **(knobs or {})},
        "env": env or {},
    }
    first = base(cache)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        place = Path(work)
        overlay(tree, job, place / "overlay.cpio", package=package, extra=files)
        with (place / "initrd").open("wb") as out:
            for part in (first, place / "overlay.cpio"):
                out.write(part.read_bytes())
        (place / "overlay.cpio").unlink()
        (place / "told").touch()
        # Memory is not offered to the KSM of the machine, which may be what is tested there.
        # Without AVX2: as QEMU 7.2 emulates it, numpy's argsort of ten words is wrong.
        # A second processor that never comes makes the emulation of locked instructions a single access.
        command = [
            emulator(), "-machine", "pc,mem-merge=off", "-accel", "tcg,thread=multi",
            "-cpu", f"max,pku=off,la57={'on' if levels == 5 else 'off'},avx2=off", "-smp", "1,maxcpus=2",
            "-m", str(memory_mib), *_numa(nodes, memory_mib),
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{place / 'console'}", "-serial", f"file:{place / 'told'}",
            "-kernel", str(tree.image), "-initrd", str(place / "initrd"),
            "-append", f"console=ttyS0 quiet panic=-1 mitigations=off {tree.choice.append}",
        ]  # fmt: skip
        return _listen(command, place, limit, listen)


def _numa(nodes: int, memory_mib: int) -> list[str]:
    """What gives a guest several nodes; all processors belong to the first."""
    words: list[str] = []
    for number in range(nodes if nodes > 1 else 0):
        cpus = ",cpus=0-1" if not number else ""
        words += ["-object", f"memory-backend-ram,id=m{number},size={memory_mib // nodes}M"]
        words += ["-numa", f"node,nodeid={number},memdev=m{number}{cpus}"]
    return words


def _listen(
    command: list[str], place: Path, limit: float, listen: Callable[[dict[str, Any]], object] | None
) -> Told:
    told = Told()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + limit + 60
    rest = b""
    try:
        with (place / "told").open("rb") as source:
            while True:
                ended = process.poll() is not None
                data = rest + source.read()
                *whole, rest = data.split(b"\n")
                for raw in whole:
                    _note(told, raw, listen)
                if ended:
                    break
                if time.monotonic() > deadline:
                    raise MatrixError(f"no end after {limit + 60:.0f} s; the console: {_end(place)}")
                time.sleep(0.1)
    finally:
        process.kill()
        _, said = process.communicate()
    if not told.done:
        told.console = _end(place) + said
    return told


def _note(told: Told, raw: bytes, listen: Callable[[dict[str, Any]], object] | None) -> None:
    event = json.loads(raw)
    number = event.get("command", 0)
    if event["event"] == "ready":
        told.ready = event
    elif event["event"] == "line":
        told.lines.setdefault(number, []).append(event["text"])
    elif event["event"] == "end":
        told.codes[number], told.seconds[number] = event["code"], event["seconds"]
    elif event["event"] == "broken":
        raise MatrixError(f"the guest's first process failed: {event['text']}")
    else:
        told.done = True
    if listen is not None:
        listen(event)


def _end(place: Path) -> str:
    return (place / "console").read_text(errors="replace")[-4000:] if (place / "console").exists() else ""
