"""An address space: its VMAs, its page tables, and what is counted of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmcore.backends.sim.services import pagecache, thp
from pmcore.backends.sim.services.hugetlb import HugeFile
from pmcore.backends.sim.services.pagecache import OpenFile
from pmcore.backends.sim.virtual import hugetlb, zap
from pmcore.backends.sim.virtual.tables import PageTables
from pmcore.backends.sim.virtual.vma import AnonVma, VmaList, VmArea, VmFlag

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core

__all__ = ["AddressSpace"]


class AddressSpace:
    """What the kernel calls an mm."""

    def __init__(self, core: Core, number: int, *, root: int | None = None) -> None:
        self.core = core
        #: Its identity in the counts of large folios.
        self.number = number
        sticky = VmFlag.STICKY if core.caps.merge_keeps_soft_dirty else VmFlag.STICKY & ~VmFlag.SOFTDIRTY
        self.vmas = VmaList(
            core.geometry.page_shift, self._cut, sticky=sticky, joins_empty=core.caps.merge_with_empty
        )
        self.tables = PageTables(core.pool, core.geometry, root=root)
        #: Flags that every new mapping gets (mlockall).
        self.def_flags = 0
        self.brk_start = self.brk = 0
        #: Whether its faults are those of MAP_POPULATE and mlock, which begin anew when they have waited.
        self.populating = False
        #: Whether soft-dirty was ever cleared (before that old kernels show the page shift).
        self.soft_dirty_cleared = False
        #: False once its task has exited.
        self.alive = True
        #: Open descriptors.
        self.files: dict[int, object] = {}
        #: Number of the memory cgroup that its task is in.
        self.group = 0
        core.spaces[number] = self

    def has_key(self, vma: VmArea) -> bool:
        """Whether a protection key of its own forbids to read the mapping: it may only be executed (VM-035)."""
        return vma.flags & VmFlag.ACCESS == VmFlag.EXEC and self.core.caps.protection_keys

    def grow_stack(self, addr: int) -> VmArea | None:
        """The stack's VMA, grown down to the address; None where there is none to grow."""
        vma = self.vmas.first(addr)
        if vma is None or not vma.flags & VmFlag.GROWSDOWN:
            return None
        size = self.core.geometry.page_size
        start = addr & -size
        before = self.vmas.before(vma)
        gap = 256 * size if before is not None and before.flags & VmFlag.ACCESS else 0
        if before is not None and before.flags & VmFlag.GROWSDOWN:
            gap = 0
        if before is not None and before.end + gap > start:
            return None
        self.prepare_anon(vma)  # before anything is counted
        if vma.end - start > self.core.stack_limit:
            return None
        self.vmas.remove(vma)
        vma.pgoff -= vma.start - start >> self.core.geometry.page_shift
        vma.start = start
        self.vmas.add(vma)
        return vma

    def tear_down(self) -> None:
        """What exit does: nothing is mapped any more, descriptors are closed."""
        if self.core.ksm.by_mm:
            self.core.ksm.exited(self)
        vmas = list(self.vmas)
        inodes = {vma.file.number: vma.file for vma in vmas if vma.file is not None}
        inodes |= {f.inode.number: f.inode for f in self.files.values() if isinstance(f, OpenFile)}
        opened = [file for file in self.files.values() if isinstance(file, HugeFile)]
        huge = [vma for vma in vmas if vma.huge is not None]
        if huge:
            hugetlb.unmap(self.core, self, huge)
            vmas = list(self.vmas)
        for vma in vmas:
            zap.zap(self.core, self, vma, vma.start, vma.end, drop_markers=True)
            self.vmas.remove(vma)
        self.tables.destroy(vmas[0].start if vmas else 0, vmas[-1].end if vmas else 0)
        self.core.spaces.pop(self.number, None)
        self.alive = False
        self.files.clear()
        for inode in inodes.values():
            pagecache.put(self.core, inode)
        for file in dict.fromkeys(opened):
            self.core.hugetlb.put(file)

    def _cut(self, vma: VmArea, addr: int) -> None:
        if vma.flags & VmFlag.HUGETLB:
            hugetlb.cut(self, vma, addr)
            return
        thp.split_at(self.core, self, vma, addr)

    @classmethod
    def bare(cls, core: Core, number: int) -> AddressSpace:
        """One whose tables are to be named yet."""
        return cls(core, number, root=0)

    @classmethod
    def gone(cls, core: Core, number: int) -> AddressSpace:
        """One that has exited, for the userfaultfds that still name it."""
        space = cls.bare(core, number)
        space.alive = False
        core.spaces.pop(number, None)
        return space

    @property
    def locked(self) -> int:
        """Bytes that VM_LOCKED mappings cover."""
        return sum(vma.length for vma in self.vmas if vma.flags & VmFlag.LOCKED)

    def prepare_anon(self, vma: VmArea) -> None:
        """Have an anon_vma: a neighbour's that the VMA could merge with, or a new one."""
        if vma.anon_vma is not None:
            return
        before, after = self.vmas.before(vma), self.vmas.after(vma)
        for owner, left, right in ((after, vma, after), (before, before, vma)):
            if (
                owner is not None
                and left is not None
                and right is not None
                and owner.anon_vma is not None
                and owner.chain == 1
                and self._alike(left, right)
            ):
                vma.anon_vma, vma.chain = owner.anon_vma, 1
                return
        vma.anon_vma, vma.chain = AnonVma(self.core.number("anon_vma")), 1

    def _alike(self, left: VmArea, right: VmArea) -> bool:
        if left.file is not right.file:
            return False
        if left.end != right.start or (left.flags ^ right.flags) & ~(VmFlag.ACCESS | VmFlag.STICKY):
            return False
        return right.pgoff == left.pgoff + (left.length >> self.core.geometry.page_shift)

    def boundaries(self, first: VmArea, last: VmArea) -> tuple[int, int]:
        """How far page tables may be freed when VMAs go: up to the neighbours of the first and the last."""
        before, after = self.vmas.before(first), self.vmas.after(last)
        return before.end if before else 0, after.start if after else self.core.geometry.task_size
