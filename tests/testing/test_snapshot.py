"""The snapshot backend: a machine of arrays, with the kernel's errors."""

from __future__ import annotations

import numpy as np
import pytest

from pmcore.errors import InvalidArgument, Missing, NotPermitted, ProcessGone, SyscallError
from pmcore.protocols import FrameFile, Kernel, Process
from pmcore.scan import ScanRequest, scan_all
from pmcore.testing.snapshot import SnapshotKernel
from pmcore.uapi import PageCategory
from pmcore.vma import Vma, format_maps

LOW, HIGH = Vma(start=0x10000, end=0x12000), Vma(start=0x20000, end=0x21000, name="/x", inode=3)
WORDS = {HIGH: np.array([1 << 63 | 9], dtype=np.uint64), LOW: np.array([1 << 63 | 5, 0], dtype=np.uint64)}


@pytest.fixture
def kernel():
    kernel = SnapshotKernel(kpageflags=np.arange(16, dtype=np.uint64))
    kernel.add_process(3, WORDS)
    return kernel


def test_it_is_a_kernel_with_processes(kernel):
    assert isinstance(kernel, Kernel)
    assert isinstance(kernel.process(3), Process)
    assert kernel.pids() == [3]
    with pytest.raises(ProcessGone):
        kernel.process(4)


def test_pagemap_is_what_was_laid_out(kernel):
    process = kernel.process(3)
    assert process.maps() == (LOW, HIGH)
    assert process.pread("maps", 0, 4096) == format_maps([LOW, HIGH])
    assert process.pagemap(0xF000, 0x22000).pfn.nonzero()[0].tolist() == [1, 17]
    assert process.pread("pagemap", 0x10 * 8, 16) == WORDS[LOW].tobytes()
    with pytest.raises(InvalidArgument):
        process.pread("pagemap", 3, 8)
    with pytest.raises(Missing):
        process.pread("environ", 0, 1)


def test_scanning_goes_through_the_engine(kernel):
    present = int(PageCategory.PRESENT)
    request = ScanRequest(start=0, end=1 << 30, category_mask=present, return_mask=present)
    found = scan_all(kernel.process(3), request).regions.tolist()
    assert found == [(0x10000, 0x11000, present), (0x20000, 0x21000, present)]


def test_what_was_not_given_is_missing_and_what_stands_still_stays(kernel):
    with pytest.raises(Missing):
        kernel.kpagecgroup()
    with pytest.raises(SyscallError, match="EROFS"):
        kernel.process(3).clear_refs(4)
    with pytest.raises(InvalidArgument):
        kernel.process(3).file_residency(HIGH, HIGH.start, HIGH.end)


def test_a_machine_that_hides_its_frames():
    kernel = SnapshotKernel(kpageflags=np.zeros(16, dtype=np.uint64), pfn_visible=False)
    process = kernel.add_process(3, WORDS)
    assert process.pagemap(LOW.start, LOW.end).hidden.tolist() == [True, False]
    with pytest.raises(NotPermitted) as caught:
        kernel.read_frames(FrameFile.KPAGEFLAGS, 0, np.zeros(1, dtype=np.uint64))
    assert caught.value.remedy
