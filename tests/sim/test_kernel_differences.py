"""What the simulated machine does differently by kernel, as lockstep against 6.12 and 6.1 showed."""

import contextlib
import errno

import pytest

from pmcore.errors import AddressSpaceFault, SyscallError
from pmcore.registry import open_workbench
from pmcore.uapi import (
    PM_MMAP_EXCLUSIVE,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    Madvise,
    PageFlag,
    Prot,
    UffdFeature,
)

PAGE, HUGE = 4096, 2 << 20
BASE = 0x40000000


def task_on(held, kernel):
    task = held.enter_context(open_workbench("sim", kernel=kernel)).spawn()
    task.mmap(2 * HUGE, addr=BASE, flags=0x100032)
    return task


def present(task, page):
    return bool(int(task.process.pagemap(BASE, BASE + 3 * PAGE).values[page]) & PM_PRESENT)


def frame_flags(task, page=0):
    """kpageflags of the frame that the page maps."""
    word = int(task.process.pagemap(BASE + page * PAGE, BASE + (page + 1) * PAGE).values[0])
    return int(task.process.kernel.kpageflags(word & PM_PFRAME_MASK, 1).values[0])


@pytest.fixture
def held():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.rule("KX-004")
@pytest.mark.parametrize(("kernel", "parts"), [("6.12", 3), ("6.1", 3), ("6.18", 1)])
def test_dontunmap_of_a_locked_part(held, kernel, parts):
    """With the fixes of the stable kernels the rest stays locked; without them all of it is unlocked."""
    task = task_on(held, kernel)
    task.mlock(BASE, 9 * PAGE)
    task.munmap(BASE + 9 * PAGE, 2 * HUGE - 9 * PAGE)
    task.mremap(BASE + 3 * PAGE, 3 * PAGE, 3 * PAGE, flags=7, new_addr=BASE + HUGE)
    vmas = task.process.smaps(BASE, BASE + 9 * PAGE)
    assert [("lo" in vma.vm_flags) for vma in vmas] == ([True, False, True] if parts == 3 else [False])


@pytest.mark.rule("KX-004")
@pytest.mark.parametrize(("kernel", "merged"), [("6.12", True), ("6.18", False)])
def test_an_emptied_mapping_takes_its_address_for_its_offset(held, kernel, merged):
    """Then it can be merged with a new neighbour."""
    task = task_on(held, kernel)
    task.munmap(BASE, 2 * HUGE)
    task.mmap(4 * PAGE, addr=BASE + HUGE, flags=0x100032)
    task.write(BASE + HUGE, b"x")
    task.mremap(
        BASE + HUGE, 4 * PAGE, 4 * PAGE, flags=3, new_addr=BASE
    )  # its offset stays that of the old place
    task.mremap(BASE, 4 * PAGE, 4 * PAGE, flags=7, new_addr=BASE + HUGE)
    task.mmap(4 * PAGE, addr=BASE + 4 * PAGE, flags=0x100032)
    assert len(task.process.smaps(BASE, BASE + 8 * PAGE)) == (1 if merged else 2)


@pytest.mark.rule("KX-005")
def test_smaps_shows_what_the_kernel_knows(held):
    old, new = task_on(held, "6.1"), task_on(held, "6.12")
    for task in (old, new):
        task.mlock(BASE, PAGE, onfault=True)
    before, after = old.process.smaps(BASE, BASE + PAGE)[0], new.process.smaps(BASE, BASE + PAGE)[0]
    assert "KSM" not in before.counters
    assert "KSM" in after.counters
    assert "??" in before.vm_flags
    assert "lf" in after.vm_flags


@pytest.mark.rule("KX-006")
@pytest.mark.parametrize(("kernel", "there"), [("6.1", True), ("6.12", False)])
def test_populating_behind_a_hole(held, kernel, there):
    task = task_on(held, kernel)
    task.munmap(BASE + PAGE, PAGE)
    with pytest.raises(SyscallError, match="ENOMEM"):
        task.madvise(BASE, 3 * PAGE, Madvise.POPULATE_WRITE)
    assert [present(task, 0), present(task, 2)] == [True, there]


@pytest.mark.rule("KX-007", "KF-030")
def test_exclusive_tails_before_folio_flags(held):
    """The head alone while a PMD maps the page; each page for itself once PTEs do."""
    task = task_on(held, "6.1")
    task.madvise(BASE, HUGE, Madvise.HUGEPAGE)
    task.write(BASE, b"x")

    def exclusive():
        return [bool(frame_flags(task, page) & PageFlag.OWNER_2) for page in (0, 1, 511)]

    assert exclusive() == [True, False, False]
    task.mprotect(BASE + PAGE, PAGE, 1)
    assert exclusive() == [True, True, True]


@pytest.mark.rule("KX-007", "VM-023")
def test_tails_of_the_huge_zero_page(held):
    for kernel in ("6.1", "6.12"):
        task = task_on(held, kernel)
        task.madvise(BASE, HUGE, Madvise.HUGEPAGE)
        task.read(BASE, 1)
        assert frame_flags(task, 1) & PageFlag.ZERO_PAGE, kernel


@pytest.mark.rule("KF-022")
def test_every_anonymous_page_shows_ksm_on_some_kernels(held):
    for kernel, shown in (("6.1", False), ("6.12", True), ("6.18", False)):
        task = task_on(held, kernel)
        task.write(BASE, b"x")
        assert bool(frame_flags(task) & PageFlag.KSM) is shown, kernel


def huge_page(task):
    """A huge page, dirty, of a process that then clears soft-dirty."""
    task.madvise(BASE, HUGE, Madvise.HUGEPAGE)
    task.write(BASE, b"x")


def soft_dirty(task):
    words = task.process.pagemap(BASE, BASE + HUGE).values
    return {bool(int(word) & PM_SOFT_DIRTY) for word in words}


@pytest.mark.rule("KX-008")
@pytest.mark.parametrize(("kernel", "locked"), [("6.1", False), ("6.12", False), ("6.18", True)])
def test_a_split_of_a_locked_huge_page(held, kernel, locked):
    task = task_on(held, kernel)
    huge_page(task)
    task.mlock(BASE, HUGE)
    task.mprotect(BASE, PAGE, 1)
    assert bool(frame_flags(task, 3) & PageFlag.MLOCKED) is locked


@pytest.mark.rule("KX-009")
@pytest.mark.parametrize(("kernel", "dirty"), [("6.1", {False}), ("6.12", {True})])
def test_a_split_makes_soft_dirty(held, kernel, dirty):
    task = task_on(held, kernel)
    huge_page(task)
    task.process.clear_refs(4)
    task.mprotect(BASE, PAGE, 1)
    assert soft_dirty(task) == dirty


@pytest.mark.rule("KX-009")
@pytest.mark.parametrize(("kernel", "dirty"), [("6.1", {True}), ("6.12", {False})])
def test_taking_a_huge_page_apart(held, kernel, dirty):
    task = task_on(held, kernel)
    huge_page(task)
    task.process.clear_refs(4)
    task.madvise(BASE + PAGE, PAGE, Madvise.COLD)
    assert soft_dirty(task) == dirty


@pytest.mark.rule("KX-010", "PM-007")
@pytest.mark.parametrize(("kernel", "exclusive"), [("6.1", True), ("6.12", False), ("6.18", True)])
def test_exclusive_by_the_first_page(held, kernel, exclusive):
    """A child that copied the first page: the parent's PMD maps that alone, the others with the child."""
    task = task_on(held, kernel)
    huge_page(task)
    child = task.fork()
    child.write(BASE, b"y")
    word = int(task.process.pagemap(BASE + PAGE, BASE + 2 * PAGE).values[0])
    assert bool(word & PM_MMAP_EXCLUSIVE) is exclusive


@pytest.mark.rule("KX-011")
@pytest.mark.parametrize(("kernel", "parts"), [("6.1", 3), ("6.12", 3), ("6.18", 1)])
def test_a_changed_part_that_holds_pages_beside_empty_mappings(held, kernel, parts):
    task = task_on(held, kernel)
    task.mlock(BASE + 4 * PAGE, 2 * PAGE)
    task.munlock(BASE + 4 * PAGE, 2 * PAGE)
    assert len(task.process.smaps(BASE, BASE + 2 * HUGE)) == parts


@pytest.mark.rule("KX-011")
@pytest.mark.parametrize("kernel", ["6.1", "6.12", "6.18"])
def test_a_changed_empty_mapping_beside_one_that_holds_pages(held, kernel):
    task = task_on(held, kernel)
    task.madvise(BASE, PAGE, Madvise.DONTFORK)
    task.write(BASE + PAGE, b"x")
    task.madvise(BASE, PAGE, Madvise.DOFORK)
    assert len(task.process.smaps(BASE, BASE + 2 * HUGE)) == 1


@pytest.mark.rule("KX-012")
@pytest.mark.parametrize(("kernel", "refused"), [("6.1", True), ("6.12", False)])
def test_write_protection_of_two_mappings(held, kernel, refused):
    task = task_on(held, kernel)
    task.madvise(BASE, PAGE, Madvise.DONTFORK)
    fd = task.userfaultfd(0)
    task.uffd_register(fd, BASE, 2 * PAGE, 2)
    with pytest.raises(SyscallError, match="ENOENT") if refused else contextlib.nullcontext():
        task.uffd_writeprotect(fd, BASE, 2 * PAGE, protect=True)


@pytest.mark.rule("KX-003")
def test_a_marker_that_moves_out_of_its_registration_is_gone(held):
    """Soft-dirty does not hide it."""
    task = task_on(held, "6.12")
    fd = task.userfaultfd(0x2000)  # WP_UNPOPULATED
    task.uffd_register(fd, BASE, PAGE, 2)
    task.uffd_writeprotect(fd, BASE, PAGE, protect=True)
    task.mremap(BASE, PAGE, PAGE, flags=3, new_addr=BASE + 8 * HUGE)
    word = int(task.process.pagemap(BASE + 8 * HUGE, BASE + 8 * HUGE + PAGE).values[0])
    assert word & ~PM_SOFT_DIRTY == 0


@pytest.mark.rule("KX-013")
@pytest.mark.parametrize(("kernel", "huge"), [("6.1", False), ("6.12", False), ("6.18", True)])
def test_an_empty_page_table_after_dontneed(held, kernel, huge):
    task = task_on(held, kernel)
    task.write(BASE, b"x")
    task.madvise(BASE, HUGE, Madvise.HUGEPAGE)
    task.madvise(BASE, HUGE, Madvise.DONTNEED)
    task.write(BASE + 5 * PAGE, b"x")
    assert bool(frame_flags(task, 5) & PageFlag.THP) is huge
    task.process.kernel.check()


@pytest.mark.rule("KX-014")
def test_a_page_table_moved_whole_stays_clean(held):
    """Half of it moved one by one does not."""
    task = task_on(held, "6.12")
    task.touch(BASE, 2 * HUGE)
    task.process.clear_refs(4)
    task.mremap(BASE, HUGE, HUGE, flags=3, new_addr=BASE + 8 * HUGE)
    task.mremap(BASE + HUGE, HUGE // 2, HUGE // 2, flags=3, new_addr=BASE + 16 * HUGE)
    words = [
        {bool(int(word) & PM_SOFT_DIRTY) for word in task.process.pagemap(low, low + HUGE // 2).values}
        for low in (BASE + 8 * HUGE, BASE + 16 * HUGE)
    ]
    assert words == [{False}, {True}]
    task.process.kernel.check()


@pytest.mark.rule("PM-005")
def test_page_shift_before_4_2(held):
    """Bits 55 to 60 are 12, in empty entries and outside mappings too; clearing soft-dirty makes them flags."""
    for kernel, flags_later in (
        ("2.6.32", False),
        ("3.10", False),
        ("3.11", True),
        ("4.1", True),
        ("4.2", None),
    ):
        task = task_on(held, kernel)
        task.touch(BASE, PAGE)
        field = 0x3F << 55

        def fields(task=task, field=field):
            words = task.process.pagemap(BASE - PAGE, BASE + 2 * PAGE).values.tolist()
            assert task.process.pread("pagemap", (BASE // PAGE - 1) * 8, 8) == words[0].to_bytes(8, "little")
            return [(word & field) >> 55 for word in words]

        assert fields() == ([0, 3, 1] if flags_later is None else [12, 12, 12])
        with contextlib.suppress(SyscallError):
            task.process.clear_refs(4)
        task.touch(BASE, PAGE)
        assert fields() == {None: [0, 3, 0], True: [0, 1, 0], False: [12, 12, 12]}[flags_later]


@pytest.mark.rule("KX-015")
@pytest.mark.parametrize(("kernel", "rsvd"), [("6.1", 0), ("6.12", 0), ("6.18", (1 << 64) - 1)])
def test_a_hugetlb_page_given_up_while_a_child_has_it(held, kernel, rsvd):
    """On 6.18 the promise is used up again before the count was given it back."""
    bench = held.enter_context(open_workbench("sim", kernel=kernel, hugepages={"2 MiB": 2}))
    task = bench.spawn()
    start = task.mmap(HUGE, flags=0x40022)
    task.touch(start, 1)
    task.fork()
    task.madvise(start, HUGE, Madvise.DONTNEED)
    task.touch(start, 1)
    text = bench.kernel.pread("meminfo", 0, 1 << 16).decode()
    assert next(line.split() for line in text.splitlines() if "Rsvd" in line) == [
        "HugePages_Rsvd:",
        str(rsvd),
    ]
    bench.kernel.check()


@pytest.mark.rule("KX-004")
def test_an_emptied_shared_mapping_keeps_its_offset(held):
    """Its pages are found by it."""
    task = task_on(held, "6.12")
    start = task.mmap(4 * PAGE, flags=0x21)
    task.write(start, b"found")
    task.mremap(start, 4 * PAGE, 4 * PAGE, flags=7, new_addr=BASE + 8 * HUGE)
    assert task.read(start, 5) == b"found"


@pytest.mark.rule("HT-014")
@pytest.mark.parametrize(
    ("kernel", "seen"),
    [("6.12", [True] * 512 + [False] * 512), ("6.1", [True] + [False] * 1023)],
)
def test_mincore_of_hugetlb_without_tables(held, kernel, seen):
    """Of a page that only a child has faulted in; once a neighbour is faulted in there is a table."""
    task = held.enter_context(open_workbench("sim", kernel=kernel, hugepages={"2 MiB": 2})).spawn()
    start = task.mmap(2 * HUGE, flags=0x40021)
    task.fork().touch(start, 1)
    assert task.mincore(start, 2 * HUGE).tolist() == seen
    task.touch(start + HUGE, 1)
    assert task.mincore(start, 2 * HUGE).tolist() == [False] * 512 + [True] * 512


@pytest.mark.rule("HT-003")
@pytest.mark.parametrize(("kernel", "name"), [("6.1", "ENOMEM"), ("6.12", "EINVAL")])
def test_a_mapping_over_a_part_of_a_huge_page(held, kernel, name):
    task = held.enter_context(open_workbench("sim", kernel=kernel, hugepages={"2 MiB": 2})).spawn()
    start = task.mmap(HUGE, flags=0x40022)
    with pytest.raises(SyscallError, match=name):
        task.mmap(PAGE, addr=start + PAGE, flags=0x32)


@pytest.mark.rule("KX-016")
@pytest.mark.parametrize(("kernel", "dirty"), [("6.1", 3), ("6.12", 0)])
def test_unmerging_writes_on_old_kernels(held, kernel, dirty):
    machine = held.enter_context(open_workbench("sim", kernel=kernel))
    task = machine.spawn()
    start = task.mmap(3 * PAGE)
    task.madvise(start, 3 * PAGE, Madvise.MERGEABLE)
    for page in range(3):
        task.write(start + page * PAGE, b"same")
    machine.kernel.ksm.run(2)
    task.madvise(start, 3 * PAGE, Madvise.UNMERGEABLE)
    (entry,) = task.process.smaps(start, start + 3 * PAGE)
    assert entry.counters["Private_Dirty"] == dirty * PAGE
    machine.kernel.check()


@pytest.mark.rule("KX-016")
@pytest.mark.parametrize(("kernel", "joined"), [("6.1", 2), ("6.12", 1)])
def test_a_page_like_a_merged_one_joins_at_the_first_look(held, kernel, joined):
    machine = held.enter_context(open_workbench("sim", kernel=kernel))
    task = machine.spawn()
    start = task.mmap(3 * PAGE)
    task.madvise(start, 3 * PAGE, Madvise.MERGEABLE)
    for page in range(2):
        task.write(start + page * PAGE, b"same")
    machine.kernel.ksm.run(2)
    task.write(start + 2 * PAGE, b"same")
    assert machine.kernel.ksm.run(1)["pages_sharing"] == joined
    machine.kernel.check()


@pytest.mark.rule("KX-017")
@pytest.mark.parametrize(("kernel", "kind"), [("6.1", 30), ("6.12", 31)])
def test_the_type_of_markers(held, kernel, kind):
    task = task_on(held, kernel)
    start = task.mmap(2 * PAGE, flags=0x21)
    fd = task.userfaultfd(1 << 12)
    task.uffd_register(fd, start, 2 * PAGE, 2)
    task.uffd_writeprotect(fd, start, 2 * PAGE, protect=True)
    words = task.process.pagemap(start, start + 2 * PAGE).values
    assert {int(word) & 0x1F for word in words} == {kind}


@pytest.mark.rule("KX-018")
@pytest.mark.parametrize(("kernel", "dirty"), [("6.1", False), ("6.12", True)])
def test_a_lock_after_a_page_was_read_back(held, kernel, dirty):
    """As the kept program clean-page-writable-again shows."""
    bench = held.enter_context(open_workbench("sim", kernel=kernel, swap="8 MiB", swap_kind="device"))
    task = bench.spawn()
    start = task.mmap(PAGE)
    task.touch(start, PAGE)
    task.madvise(start, PAGE, Madvise.PAGEOUT)
    task.read(start, 1)
    task.mlock(start, PAGE)
    word = int(task.process.pagemap(start, start + PAGE).values[0])
    flags = int(task.process.kernel.kpageflags(word & PM_PFRAME_MASK, 1).values[0])
    assert bool(flags & PageFlag.DIRTY) is dirty
    bench.kernel.check()


@pytest.mark.rule("FM-010")
@pytest.mark.parametrize(("kernel", "noted"), [("6.1", True), ("6.12", False)])
def test_accesses_of_random_mappings(held, kernel, noted):
    task = task_on(held, kernel)
    start = task.mmap(PAGE, flags=0x21)
    task.madvise(start, PAGE, Madvise.RANDOM)
    task.touch(start, PAGE)
    task.madvise(start, PAGE, Madvise.DONTNEED)
    task.touch(start, PAGE, write=False)
    word = int(task.process.pagemap(start, start + PAGE).values[0])
    flags = int(task.process.kernel.kpageflags(word & PM_PFRAME_MASK, 1).values[0])
    assert bool(flags & PageFlag.REFERENCED) is noted


@pytest.mark.rule("KX-019")
@pytest.mark.parametrize(("kernel", "kept"), [("6.1", False), ("6.12", True), ("6.18", True)])
@pytest.mark.parametrize("pages", [1, 40])
def test_paging_out_takes_accessed_bits(kernel, kept, pages):
    """Pages written again after MADV_FREE stay where they are."""
    task = open_workbench("sim", memory="64 MiB", swap="16 MiB", kernel=kernel).spawn()
    start = task.mmap(pages * PAGE)
    task.touch(start, pages * PAGE)
    task.madvise(start, pages * PAGE, Madvise.FREE)
    task.touch(start, pages * PAGE)
    task.madvise(start, pages * PAGE, Madvise.PAGEOUT)
    assert task.process.pagemap(start, start + pages * PAGE).present.all()
    assert task.process.smaps()[0].counters["Referenced"] == (pages * PAGE if kept else 0)


@pytest.mark.rule("VM-027")
@pytest.mark.parametrize(
    ("kernel", "number"), [("6.1", errno.EINVAL), ("6.12", errno.EBUSY), ("6.18", errno.EBUSY)]
)
def test_collapsing_over_empty_entries_that_are_watched(held, kernel, number):
    task = open_workbench("sim", memory="64 MiB", kernel=kernel).spawn()
    start = task.mmap(2 << 20, addr=1 << 40, flags=0x32)
    task.touch(start, PAGE)
    fd = task.userfaultfd(int(UffdFeature.PAGEFAULT_FLAG_WP))
    task.uffd_register(fd, start, 2 << 20, 2)
    with pytest.raises(SyscallError) as caught:
        task.madvise(start, 2 << 20, Madvise.COLLAPSE)
    assert caught.value.errno == number


@pytest.mark.rule("HT-003")
@pytest.mark.parametrize(("kernel", "up"), [("6.12", False), ("6.18", True)])
def test_places_proposed_for_hugetlb(kernel, up):
    task = open_workbench("sim", memory="64 MiB", kernel=kernel, hugepages={"2 MiB": 4}).spawn()
    assert task.mmap(2 << 20, addr=(1 << 40) + PAGE, flags=0x40022) == (1 << 40) + (up << 21)


@pytest.mark.rule("HT-010")
@pytest.mark.parametrize(("kernel", "kept"), [("6.1", True), ("6.12", False)])
def test_protected_hugetlb_pages_of_a_child(kernel, kept):
    task = open_workbench("sim", memory="64 MiB", kernel=kernel, hugepages={"2 MiB": 4}).spawn()
    start = task.mmap(2 << 20, flags=0x40022)
    task.touch(start, PAGE)
    fd = task.userfaultfd(int(UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_HUGETLBFS_SHMEM))
    task.uffd_register(fd, start, 2 << 20, 2)
    task.uffd_writeprotect(fd, start, 2 << 20, protect=True)
    child = task.fork()
    assert child.process.pagemap(start, start + PAGE).uffd_wp.tolist() == [kept]
    assert task.process.pagemap(start, start + PAGE).uffd_wp.tolist() == [True]


@pytest.mark.rule("VM-035")
def test_a_processor_with_protection_keys():
    keys = ("CONFIG_X86_INTEL_MEMORY_PROTECTION_KEYS",)
    with contextlib.ExitStack() as held:
        machine = held.enter_context(open_workbench("sim", kernel="6.12", config=keys))
        task = machine.spawn()
        start = task.mmap(2 * PAGE, prot=Prot.EXEC)
        other = task.mmap(PAGE)
        for call in (task.read, task.mlock):
            with pytest.raises((AddressSpaceFault, SyscallError)):
                call(start, 2 * PAGE)
        assert not int(task.process.pagemap(start, start + PAGE).values[0]) & PM_PRESENT
        keys_shown = {entry.vma.start: entry.plain["ProtectionKey"] for entry in task.process.smaps()}
        assert keys_shown == {start: 1, other: 0}
