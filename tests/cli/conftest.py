"""The command line over a laid-out machine, in this process and in one of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest

from pmcore import registry
from pmcore.cli import entry
from pmcore.smaps import SmapsEntry
from pmcore.testing.snapshot import SnapshotKernel
from pmcore.uapi import PageFlag
from pmcore.vma import Vma

PRESENT = 1 << 63


def laid_out(**options: Any) -> SnapshotKernel:
    """Sixteen frames, and process 42 with an anonymous and a file mapping."""
    flags = np.zeros(16, dtype=np.uint64)
    anon = int(PageFlag.ANON | PageFlag.MMAP | PageFlag.SWAPBACKED | PageFlag.LRU)
    flags[1:5] = [anon, anon, anon | 1 << 60, int(PageFlag.LRU | PageFlag.MMAP)]
    flags[8:16] = int(PageFlag.BUDDY)
    counts = np.zeros(16, dtype=np.uint64)
    counts[1:5] = [1, 2, 1, 3]
    kernel = SnapshotKernel(
        kpageflags=flags,
        kpagecount=counts,
        kpagecgroup=np.full(16, 77, dtype=np.uint64),
        pfn_visible=options.get("hidden") != "yes",
    )
    heap = Vma(start=0x10000, end=0x14000, name="[heap]")
    file = Vma(start=0x20000, end=0x22000, writable=False, inode=9, name="/lib/a file")
    memory = {
        heap: np.array([PRESENT | 1 << 56 | 1, PRESENT | 2, 0, 1 << 62 | 5 << 5], dtype=np.uint64),
        file: np.array([PRESENT | 1 << 61 | 4, PRESENT | 1 << 56 | 3], dtype=np.uint64),
    }
    smaps = [SmapsEntry(vma=vma, counters={"Rss": 8192}, vm_flags=("rd",)) for vma in memory]
    kernel.add_process(42, memory, smaps=smaps)
    return kernel


@attrs.frozen
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command line here; `--backend lab` is the laid-out machine."""
    opened = registry.open
    monkeypatch.setattr(
        registry,
        "open",
        lambda name, **options: laid_out(**options) if name == "lab" else opened(name, **options),
    )

    def go(*arguments: str, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = entry._run(list(arguments))
        text = capsys.readouterr()
        return Result(code, text.out, text.err)

    return go


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run a command line in a process of its own."""

    def go(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "pmcore.cli", *arguments]
        return subprocess.run(command, capture_output=True, check=False, **options)

    return go
