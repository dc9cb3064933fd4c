"""The kernel's user-visible constants, under the kernel's names.

The numbers are ABI and never change; which kernel knows which of them is said by `spec/tables/` and asked
through `pmcore.profile`. `tests/core/test_uapi.py` holds every number here equal to those tables.
"""

from __future__ import annotations

import enum

# -- /proc/PID/pagemap ---------------------------------------------------------------------------------

PM_ENTRY_BYTES = 8
PM_PFRAME_BITS = 55
PM_PFRAME_MASK = (1 << PM_PFRAME_BITS) - 1
MAX_SWAPFILES_SHIFT = 5
PM_SWAP_TYPE_MASK = (1 << MAX_SWAPFILES_SHIFT) - 1
#: Swap types from here on are no swap areas but special entries (device, migration, hwpoison, marker). How many of
#: the 32 are taken depends on the configuration; with all of them in use 23 are left for areas.
MAX_SWAPFILES = 23
#: The type of PTE markers (since 5.19), and the values that their offsets hold.
SWP_PTE_MARKER = 31
PTE_MARKER_UFFD_WP = 1 << 0
PTE_MARKER_POISONED = 1 << 1
PTE_MARKER_GUARD = 1 << 2

PM_SOFT_DIRTY = 1 << 55
PM_MMAP_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_GUARD_REGION = 1 << 58
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63

#: Bits 55 to 60 as the "page-shift" of kernels before 4.2.
PM_PSHIFT_OFFSET = 55
PM_PSHIFT_BITS = 6
PM_PSHIFT_MASK = ((1 << PM_PSHIFT_BITS) - 1) << PM_PSHIFT_OFFSET


class PagemapFlag(enum.IntFlag, boundary=enum.KEEP):
    """The flag bits of one pagemap entry (64-bit)."""

    SOFT_DIRTY = PM_SOFT_DIRTY
    MMAP_EXCLUSIVE = PM_MMAP_EXCLUSIVE
    UFFD_WP = PM_UFFD_WP
    GUARD_REGION = PM_GUARD_REGION
    FILE = PM_FILE
    SWAP = PM_SWAP
    PRESENT = PM_PRESENT


# -- /proc/kpageflags ----------------------------------------------------------------------------------

KPF_ENTRY_BYTES = 8


class PageFlag(enum.IntFlag, boundary=enum.KEEP):
    """The bits of one kpageflags word. 0 to 26 are ABI; 32 and above are shown for kernel developers."""

    LOCKED = 1 << 0
    ERROR = 1 << 1
    REFERENCED = 1 << 2
    UPTODATE = 1 << 3
    DIRTY = 1 << 4
    LRU = 1 << 5
    ACTIVE = 1 << 6
    SLAB = 1 << 7
    WRITEBACK = 1 << 8
    RECLAIM = 1 << 9
    BUDDY = 1 << 10
    MMAP = 1 << 11
    ANON = 1 << 12
    SWAPCACHE = 1 << 13
    SWAPBACKED = 1 << 14
    COMPOUND_HEAD = 1 << 15
    COMPOUND_TAIL = 1 << 16
    HUGE = 1 << 17
    UNEVICTABLE = 1 << 18
    HWPOISON = 1 << 19
    NOPAGE = 1 << 20
    KSM = 1 << 21
    THP = 1 << 22
    OFFLINE = 1 << 23
    ZERO_PAGE = 1 << 24
    IDLE = 1 << 25
    PGTABLE = 1 << 26
    RESERVED = 1 << 32
    MLOCKED = 1 << 33
    OWNER_2 = 1 << 34
    PRIVATE = 1 << 35
    PRIVATE_2 = 1 << 36
    OWNER_PRIVATE = 1 << 37
    ARCH = 1 << 38
    UNCACHED = 1 << 39
    SOFTDIRTY = 1 << 40
    ARCH_2 = 1 << 41
    ARCH_3 = 1 << 42


# -- PAGEMAP_SCAN --------------------------------------------------------------------------------------

PAGEMAP_SCAN = 0xC0606610
PROCMAP_QUERY = 0xC0686611
PM_SCAN_ARG_BYTES = 96
PAGE_REGION_BYTES = 24
#: Regions that the kernel collects before it copies them out and starts the walk again (x86-64, 4 KiB).
PM_SCAN_BOUNCE_REGIONS = 512


class PageCategory(enum.IntFlag, boundary=enum.KEEP):
    """``PAGE_IS_*``: what PAGEMAP_SCAN says of a page."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8


class ScanFlag(enum.IntFlag, boundary=enum.KEEP):
    """``PM_SCAN_*``: the flags of a PAGEMAP_SCAN request."""

    WP_MATCHING = 1 << 0
    CHECK_WPASYNC = 1 << 1


# -- /proc/PID/clear_refs ------------------------------------------------------------------------------


class ClearRefs(enum.IntEnum):
    """What a number written to ``clear_refs`` clears."""

    ALL = 1
    ANON = 2
    MAPPED = 3
    SOFT_DIRTY = 4
    MM_HIWATER_RSS = 5


# -- userfaultfd ---------------------------------------------------------------------------------------


class UffdFeature(enum.IntFlag, boundary=enum.KEEP):
    """``UFFD_FEATURE_*``."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


# -- errors ----------------------------------------------------------------------------------------------


class Errno(enum.IntEnum):
    """Linux's numbers of the errors that these interfaces give, the same on every operating system that we run on."""

    EPERM = 1
    ENOENT = 2
    ESRCH = 3
    EINTR = 4
    EIO = 5
    ENXIO = 6
    EBADF = 9
    EAGAIN = 11
    ENOMEM = 12
    EACCES = 13
    EFAULT = 14
    EBUSY = 16
    EEXIST = 17
    ENODEV = 19
    EINVAL = 22
    ENOTTY = 25
    EFBIG = 27
    ENOSPC = 28
    ESPIPE = 29
    ENOSYS = 38
    EOPNOTSUPP = 95
    EHWPOISON = 133


# -- memory system calls -------------------------------------------------------------------------------


class Prot(enum.IntFlag, boundary=enum.KEEP):
    """``PROT_*``."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4


class MapFlag(enum.IntFlag, boundary=enum.KEEP):
    """``MAP_*`` (the generic numbers: x86-64, arm64, riscv64)."""

    SHARED = 0x01
    PRIVATE = 0x02
    SHARED_VALIDATE = 0x03
    FIXED = 0x10
    ANONYMOUS = 0x20
    GROWSDOWN = 0x0100
    LOCKED = 0x2000
    NORESERVE = 0x4000
    POPULATE = 0x8000
    STACK = 0x20000
    HUGETLB = 0x40000
    FIXED_NOREPLACE = 0x100000
    HUGE_2MB = 21 << 26
    HUGE_1GB = 30 << 26


class ProcmapFlag(enum.IntFlag, boundary=enum.KEEP):
    """``PROCMAP_QUERY_*``: what a VMA must be, and whether the next one will do. The first four also answer."""

    VMA_READABLE = 1
    VMA_WRITABLE = 2
    VMA_EXECUTABLE = 4
    VMA_SHARED = 8
    COVERING_OR_NEXT_VMA = 16
    FILE_BACKED_VMA = 32


class MremapFlag(enum.IntFlag, boundary=enum.KEEP):
    """``MREMAP_*``."""

    MAYMOVE = 1
    FIXED = 2
    DONTUNMAP = 4


class Madvise(enum.IntEnum):
    """``MADV_*`` (the generic numbers)."""

    NORMAL = 0
    RANDOM = 1
    SEQUENTIAL = 2
    WILLNEED = 3
    DONTNEED = 4
    FREE = 8
    REMOVE = 9
    DONTFORK = 10
    DOFORK = 11
    MERGEABLE = 12
    UNMERGEABLE = 13
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    DONTDUMP = 16
    DODUMP = 17
    WIPEONFORK = 18
    KEEPONFORK = 19
    COLD = 20
    PAGEOUT = 21
    POPULATE_READ = 22
    POPULATE_WRITE = 23
    DONTNEED_LOCKED = 24
    COLLAPSE = 25
    HWPOISON = 100
    SOFT_OFFLINE = 101
    GUARD_INSTALL = 102
    GUARD_REMOVE = 103
