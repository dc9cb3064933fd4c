"""What a machine's kernel can do, asked once of its profile."""

from __future__ import annotations

import attrs

from pmcore.pageflags import flag_rows
from pmcore.profile import KernelProfile
from pmcore.uapi import SWP_PTE_MARKER, Madvise, PageFlag, UffdFeature

__all__ = ["Capabilities", "capabilities"]

_TAIL_FLAGS = (
    PageFlag.COMPOUND_TAIL
    | PageFlag.THP
    | PageFlag.HUGE
    | PageFlag.ANON
    | PageFlag.MMAP
    | PageFlag.KSM
    | PageFlag.ZERO_PAGE
    | PageFlag.OWNER_2
)
_SEQ_READ, _RAND_READ = 0x8000, 0x10000
#: Below the three types of migration entries and the one of markers; with CONFIG_DEVICE_PRIVATE there would be more.
_HWPOISON_TYPE = 27
_ADVICE = {
    Madvise.FREE: "madv.free",
    Madvise.HWPOISON: "mm.memory_failure",
    Madvise.SOFT_OFFLINE: "mm.memory_failure",
    Madvise.HUGEPAGE: "madv.hugepage",
    Madvise.NOHUGEPAGE: "madv.hugepage",
    Madvise.DONTDUMP: "madv.dontdump",
    Madvise.DODUMP: "madv.dontdump",
    Madvise.WIPEONFORK: "madv.wipeonfork",
    Madvise.KEEPONFORK: "madv.wipeonfork",
    Madvise.COLD: "madv.cold",
    Madvise.PAGEOUT: "madv.cold",
    Madvise.POPULATE_READ: "madv.populate",
    Madvise.POPULATE_WRITE: "madv.populate",
    Madvise.DONTNEED_LOCKED: "madv.dontneed_locked",
    Madvise.COLLAPSE: "madv.collapse",
    Madvise.GUARD_INSTALL: "mm.guard_regions",
    Madvise.GUARD_REMOVE: "mm.guard_regions",
    Madvise.MERGEABLE: "mm.ksm",
    Madvise.UNMERGEABLE: "mm.ksm",
}


@attrs.frozen(slots=True, kw_only=True)
class Capabilities:
    """The capabilities that the rooms of the simulator ask for."""

    soft_dirty: bool
    mmap_exclusive: bool
    pagemap_uffd_wp: bool
    pagemap_file: bool
    #: Bits 55 to 60 of pagemap are the page shift, up to the first clearing of soft-dirty bits if there is one.
    page_shift: bool
    thp: bool
    mthp: bool
    folio_mm_ids: bool
    #: Whether a fault maps all of a file's large folio by PTEs, whether fault-around does, and whether zapping a run of
    #: it notes one access.
    fault_maps_folio: bool
    around_maps_folio: bool
    zap_batch: bool
    #: Whether a large folio that is cut into is halved until the edge is one of its parts.
    folio_split: bool
    #: Whether read(2) of shared memory notes one access to a large folio, if it begins with it, not one to each page.
    shmem_reads_folios: bool
    #: Whether collapsing shared memory frees the page tables of all who map it, not of who asked alone.
    collapse_retracts_all: bool
    #: Whether holes that a userfaultfd is told of refuse to be collapsed.
    collapse_asks_userfaultfd: bool
    #: Whether a page of shared memory that is read back from swap for it can be collapsed at once.
    collapse_takes_swapped: bool
    #: Whether MADV_NOHUGEPAGE keeps a PMD from mapping a file's huge page.
    pmd_asks_advice: bool
    #: Whether mapping a file's huge page by a PMD in a locked mapping locks it.
    mlock_by_pmd: bool
    #: Whether a large folio of shared memory is swapped out whole where the area has room for that.
    shmem_swaps_folios: bool
    #: Whether mapping all of a file's large folio in a locked mapping locks it.
    mlock_whole_folios: bool
    #: Whether zapping a PMD that maps a file's page notes that it was accessed.
    zap_pmd_notes_access: bool
    lazyfree_batch: bool
    thp_aligned_mmap: bool
    large_folio_reuse: bool
    huge_zero_write_gives_huge: bool
    mprotect_makes_writable: bool
    mprotect_makes_clean_writable: bool
    mprotect_batch: bool
    pageout_keeps_young: bool
    split_wrprotects: bool
    uffd_hugetlb_exhausted_exists: bool
    hugetlb_hint_rounds_up: bool
    hugetlb_fork_keeps_wp: bool
    collapse_empty_busy: bool
    lazyfree_discards_pmd: bool
    collapse_needs_writable: bool
    mprotect_unaccounts: bool
    maybe_guard: bool
    protection_keys: bool
    #: MADV_DONTNEED frees tables of PTEs that it empties.
    pt_reclaim: bool
    mremap_many: bool
    split_maps_zero: bool
    swapin_not_mlocked: bool
    swap_zeromap: bool
    #: Whether unmerging gives pages for zero pages that ksmd has placed.
    ksm_unmerges_zero: bool
    khugepaged_swap: bool
    khugepaged_shared: bool
    thp_exclusive_of_head: bool
    mremap_dontunmap: bool
    ksm_on_every_anon: bool
    merge_keeps_soft_dirty: bool
    dontunmap_splits_locked: bool
    dontunmap_resets_offset: bool
    smaps_ksm: bool
    populate_stops_at_hole: bool
    pmd_split_munlocks: bool
    mremap_realigns: bool
    uffd_wp_many: bool
    merge_with_empty: bool
    pmd_split_keeps_dirty: bool
    migration_makes_soft_dirty: bool
    mremap_checks_early: bool
    scan: bool
    scan_guard: bool
    #: Whether MADV_REMOVE asks if the mapping might be made writable, instead of whether it is.
    remove_needs_maywrite: bool
    #: Whether mappings of files may have guard regions, and whether those leave a shared mapping without an anon_vma.
    guard_files: bool
    guard_files_keep_sharing: bool
    uffd_wp: bool
    hugetlb: bool
    hugetlb_dontneed: bool
    #: Whether there are memory cgroups, whether in a hierarchy of version 1, and whether tails show their folio's.
    memcg: bool
    memcg_v1: bool
    memcg_of_tails: bool
    memfd_hugetlb: bool
    hugetlb_small_indices: bool
    #: The swap type that markers show.
    marker_type: int
    #: The swap type of entries of poisoned pages, and the first of the two or three of migration entries.
    hwpoison_type: int
    migration_type: int
    mmap_says_why: bool
    swapin_writable: bool
    ksm_unshares: bool
    ksm_checks_change_first: bool
    #: Flags of mappings whose accesses leave no trace on the pages of files (VmFlag).
    no_recency: int
    hugetlb_promises_again: bool
    hugetlb_promises_while_shared: bool
    uffd_unregister_own: bool
    #: Whether machine checks are told of as such (BUS_MCEERR_AR).
    memory_failure: bool
    memory_failure_of_merged: bool
    memory_failure_keeps_shmem: bool
    memory_failure_keeps_hugetlb: bool
    poisoned_blocks_stay_offline: bool
    uffd_minor: bool
    uffd_continue_wp: bool
    uffd_poison: bool
    uffd_move: bool
    #: Whether a page with buffers of which a part is cut off shows OWNER_2 (mapped to disk) no more.
    partial_invalidate_unmaps: bool
    #: Whether a file that grows has the rest of its last block zeroed; whether a hole cuts the pages at its ends.
    extending_zeroes: bool
    punch_cuts_pages: bool
    #: Whether fault-around makes no page table for the last page of a file on a disk.
    around_last_page_no_table: bool
    #: Whether a window that is read ahead ends at a multiple of four pages.
    readahead_ends_aligned: bool
    uffd_features: int
    folio_flags: bool
    buddy_first_only: bool
    advice: frozenset[int]
    #: kpageflags bits that this kernel knows, and of those the ones that a tail page shows.
    shown_flags: int
    #: Whether OWNER_2 says that an anonymous page is exclusive.
    anon_exclusive: bool
    tail_flags: int
    #: What the zero page, the huge zero page and a hole in memory show.
    zero_flags: int
    huge_zero_flags: int
    hole_flags: int
    #: Whether memory that is offline reads like a hole.
    offline_reads_as_hole: bool
    #: Whether migration takes a large folio apart of which nobody maps some pages.
    migrate_splits_partly_mapped: bool
    #: Whether move_pages asks folios, not pages, if several map them, and takes holes for absent pages.
    move_pages_walks_folios: bool
    unknown_vm_flags: frozenset[str]


def capabilities(profile: KernelProfile) -> Capabilities:
    """Those of the profile."""
    has = profile.has
    shown = sum(1 << bit for bit in flag_rows(profile))
    features = UffdFeature(0)
    if has("uffd.wp"):
        features |= UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.SIGBUS | UffdFeature.EVENT_FORK
        features |= UffdFeature.EVENT_REMAP | UffdFeature.EVENT_REMOVE | UffdFeature.EVENT_UNMAP
        features |= UffdFeature.THREAD_ID | UffdFeature.EXACT_ADDRESS | UffdFeature.MISSING_SHMEM
        features |= UffdFeature.MISSING_HUGETLBFS
    for name, bits in (
        ("uffd.wp_hugetlbfs_shmem", UffdFeature.WP_HUGETLBFS_SHMEM),
        ("uffd.wp_unpopulated", UffdFeature.WP_UNPOPULATED),
        ("uffd.minor", UffdFeature.MINOR_SHMEM | UffdFeature.MINOR_HUGETLBFS),
        ("uffd.poison", UffdFeature.POISON),
        ("uffd.wp_async", UffdFeature.WP_ASYNC),
        ("uffd.move", UffdFeature.MOVE),
    ):
        if has(name):
            features |= bits
    zero = PageFlag.ZERO_PAGE | PageFlag.RESERVED
    return Capabilities(
        soft_dirty=has("pagemap.soft_dirty"),
        mmap_exclusive=has("pagemap.mmap_exclusive"),
        pagemap_uffd_wp=has("pagemap.uffd_wp"),
        pagemap_file=has("pagemap.file"),
        page_shift=has("pagemap.page_shift"),
        thp=has("mm.thp"),
        mthp=has("mm.mthp"),
        folio_mm_ids=has("mm.folio_mm_ids"),
        fault_maps_folio=has("mm.fault_maps_folio"),
        around_maps_folio=has("mm.around_maps_folio"),
        zap_batch=has("mm.zap_batch"),
        folio_split=has("mm.folio_split"),
        shmem_reads_folios=has("mm.shmem_reads_folios"),
        collapse_retracts_all=has("mm.collapse_retracts_all"),
        collapse_asks_userfaultfd=has("mm.collapse_asks_userfaultfd"),
        collapse_takes_swapped=has("mm.collapse_takes_swapped"),
        pmd_asks_advice=has("mm.pmd_asks_advice"),
        mlock_by_pmd=has("mm.mlock_whole_folios") or has("mm.mlock_by_pmd"),
        shmem_swaps_folios=has("mm.shmem_swaps_folios"),
        mlock_whole_folios=has("mm.mlock_whole_folios"),
        zap_pmd_notes_access=has("mm.zap_pmd_notes_access"),
        lazyfree_batch=has("mm.lazyfree_batch"),
        thp_aligned_mmap=has("mm.thp_aligned_mmap"),
        large_folio_reuse=has("mm.large_folio_reuse"),
        huge_zero_write_gives_huge=has("mm.huge_zero_write_gives_huge"),
        mprotect_makes_writable=has("mm.mprotect_makes_writable"),
        mprotect_makes_clean_writable=has("mm.mprotect_makes_clean_writable"),
        mprotect_batch=has("mm.mprotect_batch"),
        pageout_keeps_young=has("mm.pageout_keeps_young"),
        split_wrprotects=has("mm.split_wrprotects"),
        uffd_hugetlb_exhausted_exists=has("quirk.uffd_hugetlb_exhausted_exists"),
        hugetlb_hint_rounds_up=has("mm.hugetlb_hint_rounds_up"),
        hugetlb_fork_keeps_wp=has("quirk.hugetlb_fork_keeps_wp"),
        collapse_empty_busy=has("mm.collapse_empty_busy"),
        lazyfree_discards_pmd=has("mm.lazyfree_discards_pmd"),
        collapse_needs_writable=has("mm.collapse_needs_writable"),
        mprotect_unaccounts=has("mm.mprotect_unaccounts"),
        maybe_guard=has("mm.maybe_guard"),
        protection_keys=has("smaps.protection_key"),
        pt_reclaim=has("mm.pt_reclaim"),
        mremap_many=has("mm.mremap_many"),
        split_maps_zero=has("mm.split_maps_zero"),
        swapin_not_mlocked=has("quirk.swapin_not_mlocked"),
        thp_exclusive_of_head=has("quirk.thp_exclusive_of_head") or has("quirk.thp_exclusive_of_first"),
        swap_zeromap=has("mm.swap_zeromap"),
        ksm_unmerges_zero=has("mm.ksm_unmerges_zero"),
        khugepaged_swap=has("mm.khugepaged_swap"),
        khugepaged_shared=has("mm.khugepaged_shared"),
        mremap_dontunmap=has("mm.mremap_dontunmap"),
        ksm_on_every_anon=has("quirk.ksm_on_every_anon"),
        merge_keeps_soft_dirty=has("mm.merge_keeps_soft_dirty"),
        dontunmap_splits_locked=has("mm.dontunmap_splits_locked"),
        dontunmap_resets_offset=has("mm.dontunmap_resets_offset"),
        smaps_ksm=has("smaps.ksm"),
        pmd_split_munlocks=has("quirk.pmd_split_munlocks"),
        mremap_realigns=has("mm.mremap_realigns"),
        uffd_wp_many=has("uffd.wp_many_mappings"),
        merge_with_empty=has("mm.merge_with_empty"),
        pmd_split_keeps_dirty=has("mm.pmd_split_keeps_dirty"),
        migration_makes_soft_dirty=has("quirk.migration_makes_soft_dirty"),
        populate_stops_at_hole=has("madv.populate_stops_at_hole"),
        mremap_checks_early=has("mm.mremap_checks_early"),
        scan=has("scan"),
        scan_guard=has("scan.guard"),
        remove_needs_maywrite=has("mm.remove_needs_maywrite"),
        guard_files=has("mm.guard_files"),
        guard_files_keep_sharing=has("mm.maybe_guard"),
        uffd_wp=has("uffd.wp"),
        hugetlb=has("mm.hugetlb"),
        hugetlb_dontneed=has("mm.hugetlb_dontneed"),
        memcg=has("kpagecgroup"),
        memcg_v1=has("memcg.v1"),
        memcg_of_tails=has("kpagecgroup.tails"),
        memfd_hugetlb=has("mm.hugetlb_memfd"),
        marker_type=SWP_PTE_MARKER - has("quirk.swapin_error_type"),
        hwpoison_type=_HWPOISON_TYPE - has("quirk.swapin_error_type"),
        migration_type=_HWPOISON_TYPE + 1 - has("quirk.swapin_error_type"),
        mmap_says_why=has("mm.mmap_says_why"),
        swapin_writable=has("mm.swapin_writable"),
        ksm_unshares=has("mm.ksm_unshares"),
        ksm_checks_change_first=has("mm.ksm_checks_change_first"),
        no_recency=_SEQ_READ | (_RAND_READ if has("mm.random_leaves_no_trace") else 0),
        hugetlb_small_indices=has("mm.hugetlb_small_indices"),
        hugetlb_promises_again=has("mm.hugetlb_promises_again"),
        hugetlb_promises_while_shared=has("quirk.hugetlb_promises_while_shared"),
        uffd_unregister_own=has("mm.mremap_checks_early"),
        memory_failure=has("mm.memory_failure"),
        memory_failure_of_merged=has("mm.memory_failure_of_merged"),
        memory_failure_keeps_shmem=has("mm.memory_failure_keeps_shmem"),
        memory_failure_keeps_hugetlb=has("mm.memory_failure_keeps_hugetlb"),
        poisoned_blocks_stay_offline=has("mm.poisoned_blocks_stay_offline"),
        uffd_minor=has("uffd.minor"),
        uffd_continue_wp=has("uffd.wp_unpopulated"),
        uffd_poison=has("uffd.poison"),
        uffd_move=has("uffd.move"),
        uffd_features=int(features),
        partial_invalidate_unmaps=has("disk.partial_invalidate_unmaps"),
        extending_zeroes=has("disk.extending_zeroes"),
        punch_cuts_pages=has("disk.punch_cuts_pages"),
        readahead_ends_aligned=has("disk.readahead_ends_aligned"),
        around_last_page_no_table=has("disk.around_last_page_no_table"),
        folio_flags=has("kpageflags.folio_flags"),
        buddy_first_only=not has("kpageflags.buddy_all_pages"),
        advice=frozenset(int(a) for a in Madvise if a not in _ADVICE or has(_ADVICE[a])),
        anon_exclusive=has("kpageflags.anon_exclusive"),
        shown_flags=shown,
        tail_flags=int(_TAIL_FLAGS | (PageFlag.IDLE if has("kpageflags.idle_of_folio") else 0)),
        zero_flags=int(zero),
        huge_zero_flags=int(PageFlag.ZERO_PAGE | PageFlag.THP),
        hole_flags=int(PageFlag.NOPAGE) if has("kpageflags.holes_show_nopage") else 0,
        offline_reads_as_hole=has("kpageflags.offline_reads_as_hole"),
        migrate_splits_partly_mapped=has("mm.migrate_splits_partly_mapped"),
        move_pages_walks_folios=has("mm.move_pages_walks_folios"),
        unknown_vm_flags=frozenset(() if has("smaps.lockonfault") else ("lf",)),
    )
