"""The conformance kit, on every backend at hand; and on a broken one, which it must catch."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

import pmcore
from pmcore.protocols import FrameFile
from pmcore.testing.conformance import KernelConformance, WorkbenchConformance
from pmcore.testing.snapshot import SnapshotKernel
from pmcore.vma import Vma


def needs_live() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    with pmcore.open("procfs") as kernel:
        if not kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")


class TestSnapshot(KernelConformance):
    def make_kernel(self):
        frames = np.arange(100, dtype=np.uint64)
        kernel = SnapshotKernel(kpageflags=frames, kpagecount=frames, kpagecgroup=frames)
        words = np.arange(16, dtype=np.uint64) | np.uint64(1 << 63)
        kernel.add_process(42, {Vma(start=1 << 20, end=(1 << 20) + 65536): words})
        return kernel

    def some_pid(self, kernel):
        return 42


@pytest.mark.live
@pytest.mark.rule("PM-001", "PM-015", "PM-017", "SC-003")
class TestProcfs(KernelConformance):
    def make_kernel(self):
        needs_live()
        return pmcore.open("procfs")

    def some_pid(self, kernel):
        return os.getpid()


@pytest.mark.live
class TestProcfsTasks(WorkbenchConformance):
    def make_workbench(self):
        needs_live()
        from pmcore.backends.procfs.workbench import open_workbench

        return open_workbench()


class Careless(SnapshotKernel):
    """Takes any offset."""

    def pread(self, name, offset, length):
        return self._arrays[FrameFile(name)].tobytes()[offset : offset + length]


def test_the_kit_catches_a_careless_backend():
    frames = np.zeros(4, dtype=np.uint64)
    kernel = Careless(kpageflags=frames, kpagecount=frames)
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        KernelConformance().test_words_of_frames_are_whole(kernel)
