"""Selection: which leaves a request is interested in (rules SC)."""

from __future__ import annotations

import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.profile import KernelProfile
from pmcore.scan.request import ScanRequest
from pmcore.scan.tables import LeafBatch, LeafKind, ScanVma
from pmcore.uapi import PageCategory, ScanFlag

__all__ = ["leaf_categories", "matches", "vma_categories", "vma_interesting", "written_fast_path"]

_WRITTEN = int(PageCategory.WRITTEN)
_WPALLOWED, _SOFT_DIRTY = int(PageCategory.WPALLOWED), int(PageCategory.SOFT_DIRTY)
_WP_MATCHING = int(ScanFlag.WP_MATCHING)


def matches(categories: U64Array, request: ScanRequest) -> BoolArray:
    """Per element, whether the categories satisfy the request's masks.

    `c ^= inverted`, then all of `mask` and, where `anyof` is not empty, at least one of it.
    """
    flipped = categories ^ np.uint64(request.category_inverted) if request.category_inverted else categories
    mask = np.uint64(request.category_mask)
    selected: BoolArray = (flipped & mask) == mask
    if request.category_anyof_mask:
        selected &= (flipped & np.uint64(request.category_anyof_mask)) != 0
    return selected


def written_fast_path(request: ScanRequest) -> bool:
    """Whether the kernel takes its short cut for "written pages only" over the PTEs."""
    return (
        request.category_mask == _WRITTEN
        and request.return_mask == _WRITTEN
        and not request.category_anyof_mask
        and not request.category_inverted
    )


def vma_categories(vma: ScanVma) -> int:
    """The categories that a VMA gives to each of its pages."""
    return (_WPALLOWED if vma.wp_async else 0) | (_SOFT_DIRTY if vma.soft_dirty else 0)


def vma_interesting(vma: ScanVma, request: ScanRequest) -> bool:
    """The filter before the walk: it looks at WPALLOWED alone."""
    required = request.category_mask & _WPALLOWED
    return (vma_categories(vma) ^ request.category_inverted) & required == required


def leaf_categories(batch: LeafBatch, vma: ScanVma, request: ScanRequest, profile: KernelProfile) -> U64Array:
    """The full categories of each leaf: the entry's, the VMA's, and what empty ones count as."""
    categories = batch.categories | np.uint64(vma_categories(vma))
    if vma.uffd_wp and not vma.hugetlb:
        categories[batch.kind == LeafKind.HOLE] |= np.uint64(_WRITTEN)
    empty_written = (
        profile.has("scan.empty_pte_written") or written_fast_path(request) or _exclusive_fast_path(request)
    )
    if empty_written:
        categories[batch.kind == LeafKind.EMPTY] |= np.uint64(_WRITTEN)
    return categories


def _exclusive_fast_path(request: ScanRequest) -> bool:
    """Write protection with no output at all: every PTE is armed, whatever the masks say."""
    return bool(request.flags & _WP_MATCHING) and not request.vec_len
