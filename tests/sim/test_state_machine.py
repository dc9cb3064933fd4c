"""A Hypothesis state machine over all operations of tasks, processes and the machine: every invariant after every step.

What an interface shows is held against the executable reference on the states reached.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pmcore
from pmcore import ScanRequest
from pmcore.errors import AddressSpaceFault, NotModelled, SyscallError
from pmcore.protocols import HEAP, IDLE_BITMAP
from pmcore.spec.reference.entry import decode
from pmcore.uapi import Madvise, PageFlag, UffdFeature

PAGE, BLOCK = 4096, 512
START, AREA = 1 << 40, 1 << 32
#: Everything that lies in these areas is the machine's; pages of each.
AREAS = 4
PAGES = 2 * BLOCK + 8

areas = st.integers(0, AREAS - 1)
pages = st.one_of(st.sampled_from((0, 1, BLOCK - 1, BLOCK, BLOCK + 1, PAGES - 1)), st.integers(0, PAGES - 1))
lengths = st.one_of(st.sampled_from((1, 2, 8, BLOCK, 2 * BLOCK)), st.integers(1, PAGES))
which = st.integers(0, 5)


def refusable(function):
    """Do it: what the kernel refuses, what would kill, and what is not modelled are all answers."""
    try:
        return function()
    except (SyscallError, AddressSpaceFault, NotModelled):
        return None


class Memory(RuleBasedStateMachine):
    """One machine, up to four tasks."""

    @initialize(memory=st.sampled_from(("8 MiB", "32 MiB")), kernel=st.sampled_from(("6.18", "6.12", "5.10")))
    def boot(self, memory, kernel):
        self.machine = pmcore.open("sim", memory=memory, swap="2 MiB", kernel=kernel)
        self.tasks = [self.machine.spawn()]
        self.states = []
        self.tasks[0].mmap(PAGES * PAGE, addr=START, flags=0x32)
        refusable(lambda: self.tasks[0].madvise(START, PAGES * PAGE, Madvise.HUGEPAGE))

    def task(self, index):
        return self.tasks[index % len(self.tasks)]

    @rule(
        who=which,
        area=areas,
        page=pages,
        count=lengths,
        prot=st.integers(0, 7),
        more=st.sampled_from((0, 0x100, 0x2000, 0x8000)),
    )
    def mmap(self, who, area, page, count, prot, more):
        addr = START + area * AREA + page * PAGE
        refusable(lambda: self.task(who).mmap(count * PAGE, addr=addr, prot=prot, flags=0x32 | more))

    @rule(who=which, count=lengths, hint=st.sampled_from((0, START, START + AREA // 2)))
    def mmap_anywhere(self, who, count, hint):
        task = self.task(who)
        start = refusable(lambda: task.mmap(count * PAGE, addr=hint))
        if start is not None:
            task.munmap(start, count * PAGE)

    @rule(
        who=which,
        area=areas,
        page=pages,
        count=lengths,
        write=st.booleans(),
        stride=st.sampled_from((1, 1, 3)),
    )
    def touch(self, who, area, page, count, write, stride):
        start = START + area * AREA + page * PAGE
        refusable(lambda: self.task(who).touch(start, count * PAGE, write=write, step=stride * PAGE))

    @rule(who=which, area=areas, page=pages, data=st.binary(min_size=1, max_size=5000))
    def write(self, who, area, page, data):
        start = START + area * AREA + page * PAGE + 100
        task = self.task(who)

        def there_and_back():
            task.write(start, data)
            assert task.read(start, len(data)) == data

        refusable(there_and_back)

    @rule(who=which, area=areas, page=pages, count=lengths, advice=st.sampled_from(sorted(Madvise)))
    def madvise(self, who, area, page, count, advice):
        refusable(lambda: self.task(who).madvise(START + area * AREA + page * PAGE, count * PAGE, advice))

    @rule(who=which, area=areas, page=pages, count=lengths)
    def swap_and_back(self, who, area, page, count):
        start, task = START + area * AREA + page * PAGE, self.task(who)
        refusable(lambda: task.touch(start, count * PAGE))
        refusable(lambda: task.madvise(start, count * PAGE, Madvise.PAGEOUT))
        refusable(lambda: task.touch(start, count * PAGE // 2, write=False))

    @rule(who=which, area=areas, page=pages, count=lengths, prot=st.sampled_from((0, 1, 3, 7, 0x01000001)))
    def mprotect(self, who, area, page, count, prot):
        refusable(lambda: self.task(who).mprotect(START + area * AREA + page * PAGE, count * PAGE, prot))

    @rule(who=which, area=areas, page=pages, count=lengths)
    def munmap(self, who, area, page, count):
        refusable(lambda: self.task(who).munmap(START + area * AREA + page * PAGE, count * PAGE))

    @rule(
        who=which,
        area=areas,
        page=pages,
        count=lengths,
        new=lengths,
        to=areas,
        place=pages,
        flags=st.sampled_from((0, 1, 3, 3, 5, 7)),
    )
    def mremap(self, who, area, page, count, new, to, place, flags):
        start, target = START + area * AREA + page * PAGE, START + to * AREA + place * PAGE
        new = count if flags & 4 else new
        task = self.task(who)
        moved = refusable(lambda: task.mremap(start, count * PAGE, new * PAGE, flags=flags, new_addr=target))
        if moved is not None and not START <= moved < START + AREAS * AREA:
            task.munmap(moved, new * PAGE)

    @rule(
        who=which, area=areas, page=pages, count=lengths, how=st.sampled_from(("mlock", "onfault", "munlock"))
    )
    def lock(self, who, area, page, count, how):
        start, task = START + area * AREA + page * PAGE, self.task(who)
        if how == "munlock":
            refusable(lambda: task.munlock(start, count * PAGE))
        else:
            refusable(lambda: task.mlock(start, count * PAGE, onfault=how == "onfault"))

    @rule(who=which, flags=st.integers(0, 8))
    def lock_all(self, who, flags):
        task = self.task(who)
        refusable(lambda: task.mlockall(flags) if flags else task.munlockall())

    @rule(who=which, length=st.integers(0, 40 * PAGE))
    def brk(self, who, length):
        refusable(lambda: self.task(who).brk(HEAP + length))

    @rule(
        who=which,
        area=areas,
        page=pages,
        count=lengths,
        features=st.sampled_from((UffdFeature.WP_ASYNC, UffdFeature.SIGBUS, UffdFeature.WP_UNPOPULATED)),
        mode=st.sampled_from((1, 2, 2, 2)),
    )
    def register(self, who, area, page, count, features, mode):
        task, start = self.task(who), START + area * AREA + page * PAGE
        fds = list(task.mm.files)
        fd = fds[0] if fds else refusable(lambda: task.userfaultfd(features))
        if fd is not None:
            refusable(lambda: task.uffd_register(fd, start, count * PAGE, mode))

    @precondition(lambda self: any(task.mm.files for task in self.tasks))
    @rule(
        area=areas,
        page=pages,
        count=lengths,
        what=st.sampled_from(("protect", "protect", "resolve", "unregister", "close")),
    )
    def userfaultfd(self, area, page, count, what):
        task = next(task for task in self.tasks if task.mm.files)
        fd, start, length = next(iter(task.mm.files)), START + area * AREA + page * PAGE, count * PAGE
        if what == "close":
            task.close(fd)
        elif what == "unregister":
            refusable(lambda: task.uffd_unregister(fd, start, length))
        else:
            refusable(lambda: task.uffd_writeprotect(fd, start, length, protect=what == "protect"))

    @rule(
        who=which,
        area=areas,
        page=pages,
        count=lengths,
        flags=st.integers(0, 3),
        vec=st.sampled_from((0, 1, 512)),
        limit=st.sampled_from((0, 1, 512)),
        mask=st.sampled_from((0, 2, 8)),
    )
    def scan(self, who, area, page, count, flags, vec, limit, mask):
        start = START + area * AREA + page * PAGE
        request = ScanRequest(
            start=start,
            end=start + count * PAGE,
            vec_len=vec,
            max_pages=limit,
            flags=flags,
            category_mask=mask,
            return_mask=0x7F,
        )
        refusable(lambda: self.task(who).process.pagemap_scan(request))

    @rule(who=which, what=st.integers(1, 5))
    def clear_refs(self, who, what):
        refusable(lambda: self.task(who).process.clear_refs(what))

    @rule(who=which, area=areas, page=pages, count=lengths)
    def mark_idle(self, who, area, page, count):
        start = START + area * AREA + page * PAGE
        entries = self.task(who).process.pagemap(start, start + count * PAGE)
        self.machine.mark_idle(entries.pfn[entries.present])

    @rule()
    def read_idle(self):
        bits = np.frombuffer(self.machine.pread(IDLE_BITMAP, 0, PAGE), dtype=np.uint8)
        marked = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        shown = self.machine.kpageflags()
        heads = shown.has(PageFlag.IDLE) & ~shown.has(PageFlag.COMPOUND_TAIL)
        assert marked.tolist() == np.flatnonzero(heads).tolist()

    @precondition(lambda self: len(self.tasks) < 4)
    @rule(who=which)
    def fork(self, who):
        child = refusable(lambda: self.task(who).fork())
        if child is not None:
            self.tasks.append(child)

    @precondition(lambda self: len(self.tasks) > 1)
    @rule(who=which)
    def exit(self, who):
        task = self.task(who)
        task.exit()
        self.tasks.remove(task)

    @precondition(lambda self: not self.states)
    @rule()
    def checkpoint(self):
        self.states.append((self.machine.checkpoint(), list(self.tasks), self.machine.digest()))

    @precondition(lambda self: self.states)
    @rule()
    def restore(self):
        state, self.tasks, digest = self.states.pop()
        self.machine.restore(state)
        assert self.machine.digest() == digest

    @rule(who=which, area=areas)
    def observe(self, who, area):
        """An observer comes and goes."""
        digest = self.machine.digest()
        with self.machine.observe() as events:
            self.task(who).process.smaps()
        assert events == []
        assert self.machine.digest() == digest

    @rule(who=which, area=areas, page=pages)
    def shown_as_the_reference_says(self, who, area, page):
        start = START + area * AREA + page * PAGE
        entries = self.task(who).process.pagemap(start, start + 4 * PAGE)
        for index, word in enumerate(entries.values.tolist()):
            said = decode(word, self.machine.profile.capabilities)
            assert said.present == bool(entries.present[index])
            assert said.swapped == bool(entries.swapped[index])

    @invariant()
    def is_well(self):
        if hasattr(self, "machine"):
            self.machine.check()

    def teardown(self):
        """In the end everything is free."""
        if hasattr(self, "machine"):
            for task in list(self.machine.tasks()):
                task.exit()
            self.machine.check()
            flags = self.machine.core.memory.frames.flags
            assert not (flags & np.uint64(1 << 12)).any()  # no anonymous page is left
            assert all(area.used == 0 for area in self.machine.swap_areas())


Memory.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMemory = pytest.mark.rule("EV-005", "EV-006")(Memory.TestCase)
