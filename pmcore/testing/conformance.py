"""Checks that any backend must pass, as classes whose methods are tests.

A backend's own test suite subclasses them and says how its kernel is made:

    from pmcore.testing.conformance import KernelConformance, WorkbenchConformance

    class TestMine(KernelConformance):
        def make_kernel(self):
            return pmcore.open("mine")

        def some_pid(self, kernel):
            return kernel.pids()[0]

    class TestMyTasks(WorkbenchConformance):
        def make_workbench(self):
            return my_workbench()

Needs pytest. A check that a kernel cannot pass for lack of a capability is skipped, and says which.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from pmcore.errors import AddressSpaceFault, InvalidArgument, ProcessGone, SyscallError
from pmcore.protocols import FrameFile, Kernel, Task, Workbench
from pmcore.scan import ScanRequest
from pmcore.uapi import Madvise, MapFlag, PageCategory, PageFlag, Prot, UffdFeature

__all__ = ["KernelConformance", "WorkbenchConformance"]

_ARENA = 0x2000_0000_0000


class KernelConformance:
    """What looking at a kernel must mean. Provide `make_kernel` and `some_pid`."""

    def make_kernel(self) -> Kernel:
        """A kernel, freshly opened."""
        raise NotImplementedError

    def some_pid(self, kernel: Kernel) -> int:
        """A process that may be looked at and has memory."""
        raise NotImplementedError

    @pytest.fixture
    def kernel(self) -> Iterator[Kernel]:
        """The kernel under test."""
        with self.make_kernel() as kernel:
            yield kernel

    def test_is_a_kernel(self, kernel: Kernel) -> None:
        """It has every member of the protocol."""
        assert isinstance(kernel, Kernel)
        assert kernel.name
        assert kernel.concurrency >= 1

    def test_words_of_frames_are_whole(self, kernel: Kernel) -> None:
        """Frame files: EINVAL for what is no multiple of 8, nothing behind the end."""
        count = kernel.frame_count()
        for name in ("kpageflags", "kpagecount"):
            for offset, length in ((1, 8), (8, 7), (4, 12)):
                with pytest.raises(InvalidArgument) as caught:
                    kernel.pread(name, offset, length)
                assert caught.value.errno == errno.EINVAL
            assert kernel.pread(name, 0, 0) == b""
            assert kernel.pread(name, count * 8, 8) == b""
            assert len(kernel.pread(name, max(count - 1, 0) * 8, 16)) == 8 * min(count, 1)

    def test_bytes_and_words_agree(self, kernel: Kernel) -> None:
        """read_frames and pread show the same frames (where nothing changes in between)."""
        count = min(kernel.frame_count(), 64)
        out = np.zeros(count, dtype=np.uint64)
        assert kernel.read_frames(FrameFile.KPAGECOUNT, 0, out) == count
        assert kernel.pread("kpagecount", 0, count * 8) == out.tobytes()

    def test_unknown_process(self, kernel: Kernel) -> None:
        """There is no process -1, 0 or 2^40."""
        for pid in (-1, 0, 1 << 40):
            with pytest.raises(ProcessGone) as caught:
                kernel.process(pid)
            assert caught.value.errno == errno.ESRCH

    def test_processes_are_listed(self, kernel: Kernel) -> None:
        """pids ascends, and holds the one that is to be looked at."""
        pids = list(kernel.pids())
        assert pids == sorted(pids)
        assert self.some_pid(kernel) in pids

    def test_maps_ascends(self, kernel: Kernel) -> None:
        """VMAs do not overlap, and smaps shows the same ones."""
        process = kernel.process(self.some_pid(kernel))
        vmas = process.maps()
        assert vmas
        for one, two in itertools.pairwise(vmas):
            assert one.end <= two.start
        assert len(process.smaps()) > 0

    def test_pagemap_by_bytes_and_by_words(self, kernel: Kernel) -> None:
        """pread, read_pagemap and pagemap agree on a mapping's pages."""
        process = kernel.process(self.some_pid(kernel))
        size = kernel.profile.geometry.page_size
        vma = process.maps()[0]
        end = min(vma.end, vma.start + 16 * size)
        data = process.pread("pagemap", vma.start // size * 8, (end - vma.start) // size * 8)
        assert data == process.pagemap(vma.start, end).values.tobytes()
        for offset, length in ((1, 8), (8, 9)):
            with pytest.raises(InvalidArgument):
                process.pread("pagemap", offset, length)

    def test_pagemap_ends_with_the_address_space(self, kernel: Kernel) -> None:
        """Behind the last user address there are no entries."""
        process = kernel.process(self.some_pid(kernel))
        last = kernel.profile.geometry.task_size // kernel.profile.geometry.page_size
        assert process.pread("pagemap", last * 8, 8) == b""
        assert process.read_pagemap(last - 1, np.zeros(4, dtype=np.uint64)) == 1

    def test_scan_refuses_as_the_kernel(self, kernel: Kernel) -> None:
        """Each check of PAGEMAP_SCAN's argument, with its errno."""
        process = kernel.process(self.some_pid(kernel))
        size, limit = kernel.profile.geometry.page_size, kernel.profile.geometry.task_size
        for request, expected in (
            (ScanRequest(start=0, end=0), 0),
            (ScanRequest(start=0, end=0, size=88), errno.EINVAL),
            (ScanRequest(start=0, end=0, flags=64), errno.EINVAL),
            (ScanRequest(start=0, end=0, return_mask=1 << 50), errno.EINVAL),
            (ScanRequest(start=1, end=size), errno.EINVAL),
            (ScanRequest(start=size, end=0), errno.EFAULT),
            (ScanRequest(start=0, end=limit + size), errno.EFAULT),
            (ScanRequest(start=0, end=0, vec=False, vec_len=4), errno.EINVAL),
        ):
            assert process.pagemap_scan_raw(request).errno == expected, request


class WorkbenchConformance:
    """What running steps must mean. Provide `make_workbench`."""

    def make_workbench(self) -> Workbench:
        """A workbench, freshly made."""
        raise NotImplementedError

    @pytest.fixture
    def bench(self) -> Iterator[Workbench]:
        """The workbench under test."""
        with self.make_workbench() as bench:
            yield bench

    @pytest.fixture
    def task(self, bench: Workbench) -> Task:
        """A fresh task."""
        return bench.spawn()

    @pytest.fixture
    def size(self, bench: Workbench) -> int:
        """The page size."""
        return bench.kernel.profile.geometry.page_size

    @pytest.fixture
    def area(self, task: Task, size: int) -> int:
        """Eight pages of private anonymous memory, without huge pages."""
        start = task.mmap(8 * size, addr=_ARENA, flags=_ANONYMOUS | MapFlag.FIXED_NOREPLACE)
        task.madvise(start, 8 * size, Madvise.NOHUGEPAGE)
        return start

    def test_first_touch(self, task: Task, area: int, size: int) -> None:
        """A write gives a frame, a read the zero page, nothing else is touched (VM-001 to VM-003)."""
        task.write(area, b"a")
        task.touch(area + size, size, write=False)
        entries = task.process.pagemap(area, area + 8 * size)
        assert entries.present.tolist() == [True, True] + [False] * 6
        assert entries.exclusive.tolist() == [True] + [False] * 7
        assert not entries.file.any()

    def test_contents(self, task: Task, area: int, size: int) -> None:
        """What is written is read, across pages; what was not written is zero."""
        task.write(area + size - 3, b"across")
        assert task.read(area + size - 4, 8) == b"\0across\0"

    def test_fork_shares_and_copies(self, task: Task, area: int, size: int) -> None:
        """fork shares frames, a write parts them (VM-005, VM-006)."""
        task.write(area, b"both")
        child = task.fork()
        ours, theirs = (one.process.pagemap(area, area + size) for one in (task, child))
        assert ours.values.tolist() == theirs.values.tolist()
        assert not ours.exclusive[0]
        child.write(area, b"mine")
        assert task.read(area, 4) == b"both"
        assert child.read(area, 4) == b"mine"
        assert child.process.pagemap(area, area + size).exclusive[0]
        child.exit()
        with pytest.raises(ProcessGone):
            child.read(area, 1)

    def test_zap_and_unmap(self, task: Task, area: int, size: int) -> None:
        """DONTNEED empties, munmap takes away, and touching what is gone is a fault (VM-007, VM-008)."""
        task.touch(area, 8 * size)
        task.madvise(area, size, Madvise.DONTNEED)
        task.munmap(area + size, size)
        present = task.process.pagemap(area, area + 8 * size).present
        assert present.tolist() == [False, False] + [True] * 6
        with pytest.raises(AddressSpaceFault) as caught:
            task.read(area + size, 1)
        assert (caught.value.signal, caught.value.address) == ("SIGSEGV", area + size)
        assert task.read(area, 1) == b"\0"

    def test_move(self, task: Task, area: int, size: int) -> None:
        """mremap moves entries and contents (VM-009)."""
        task.write(area, b"moved")
        before = task.process.pagemap(area, area + size).values.tolist()
        target = task.mremap(area, 8 * size, 8 * size, flags=3, new_addr=area + (1 << 30))
        assert target == area + (1 << 30)
        assert task.process.pagemap(target, target + size).values.tolist() == before
        assert task.read(target, 5) == b"moved"

    def test_protection(self, task: Task, area: int, size: int) -> None:
        """A write to read-only memory is a fault and changes nothing (VM-014)."""
        task.write(area, b"keep")
        task.mprotect(area, size, Prot.READ)
        with pytest.raises(AddressSpaceFault):
            task.write(area, b"lost")
        assert task.read(area, 4) == b"keep"

    def test_refused_calls_change_nothing(self, task: Task, area: int, size: int) -> None:
        """Bad arguments: the kernel's errno, and the same maps and tables as before."""
        task.touch(area, 4 * size)

        def state() -> tuple[object, ...]:
            vmas = [v for v in task.process.maps() if area <= v.start < area + (1 << 31)]
            return vmas, task.process.pagemap(area, area + 8 * size).values.tolist()

        before = state()
        for refused, expected in (
            (lambda: task.munmap(area + 1, size), errno.EINVAL),
            (lambda: task.munmap(area, 0), errno.EINVAL),
            (lambda: task.mprotect(area + 1, size, Prot.READ), errno.EINVAL),
            (lambda: task.madvise(area, size, 9999), errno.EINVAL),
            (lambda: task.mmap(0), errno.EINVAL),
            (lambda: task.mmap(size, flags=_ANONYMOUS | MapFlag.FIXED_NOREPLACE, addr=area), errno.EEXIST),
            (lambda: task.mremap(area, size, 0), errno.EINVAL),
            (lambda: task.close(999), errno.EBADF),
        ):
            with pytest.raises(SyscallError) as caught:
                refused()
            assert caught.value.errno == expected
        assert state() == before

    def test_shared_file(self, task: Task, size: int) -> None:
        """Two mappings of a memfd share its frames, and its contents (VM-017)."""
        fd = task.memfd_create("shared")
        task.ftruncate(fd, size)
        one, two = (task.mmap(size, flags=MapFlag.SHARED, fd=fd) for _ in range(2))
        task.write(one, b"seen")
        assert task.read(two, 4) == b"seen"
        assert task.pread(fd, 4, 0) == b"seen"
        entries = [task.process.pagemap(start, start + size) for start in (one, two)]
        assert entries[0].values.tolist() == entries[1].values.tolist()
        assert entries[0].file[0]
        task.ftruncate(fd, 0)
        with pytest.raises(AddressSpaceFault) as caught:
            task.read(one, 1)
        assert caught.value.signal == "SIGBUS"

    def test_write_tracking(self, task: Task, area: int, size: int, bench: Workbench) -> None:
        """Asynchronous write protection: armed, written, reported and armed again (SC-032, SC-034)."""
        for capability in ("scan", "uffd.wp_async", "uffd.wp_unpopulated"):
            if not bench.kernel.profile.has(capability):
                pytest.skip(f"this kernel has no {capability}")
        fd = task.userfaultfd(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED)
        task.uffd_register(fd, area, 8 * size, 2)
        task.uffd_writeprotect(fd, area, 8 * size, protect=True)
        task.write(area + 2 * size, b"x")
        written = int(PageCategory.WRITTEN)
        request = ScanRequest(
            start=area,
            end=area + 8 * size,
            vec_len=8,
            flags=1,
            category_mask=written,
            return_mask=written,
        )
        found = task.process.pagemap_scan(request).regions.tolist()
        assert found == [(area + 2 * size, area + 3 * size, written)]
        assert task.process.pagemap_scan(request).regions.tolist() == []

    def test_frames_of_a_task(self, task: Task, area: int, size: int, bench: Workbench) -> None:
        """A touched page's frame is anonymous, mapped once, and counted so (KC-001, KF-013)."""
        if not bench.kernel.pfn_visible:
            pytest.skip("frame numbers are hidden")
        task.write(area, b"x")
        pfns = task.process.pagemap(area, area + size).pfn
        flags = int(bench.kernel.frames_at(FrameFile.KPAGEFLAGS, pfns)[0])
        assert flags & (PageFlag.ANON | PageFlag.MMAP) == PageFlag.ANON | PageFlag.MMAP
        assert int(bench.kernel.frames_at(FrameFile.KPAGECOUNT, pfns)[0]) == 1


_ANONYMOUS = MapFlag.PRIVATE | MapFlag.ANONYMOUS
