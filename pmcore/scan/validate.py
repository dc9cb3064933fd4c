"""The checks of PAGEMAP_SCAN's argument, in the kernel's order, with the kernel's errno (rules SC)."""

from __future__ import annotations

import errno

import attrs

from pmcore.geometry import align_up
from pmcore.profile import KernelProfile
from pmcore.scan.request import ScanRequest
from pmcore.uapi import PAGE_REGION_BYTES, PM_SCAN_ARG_BYTES, PageCategory, ScanFlag

__all__ = ["known_categories", "known_flags", "normalise", "refusal"]

_BASE_CATEGORIES = (
    PageCategory.WPALLOWED
    | PageCategory.WRITTEN
    | PageCategory.FILE
    | PageCategory.PRESENT
    | PageCategory.SWAPPED
    | PageCategory.PFNZERO
    | PageCategory.HUGE
)
#: The same as plain numbers, for the check of each call.
_BASE, _SOFT_DIRTY = int(_BASE_CATEGORIES), int(PageCategory.SOFT_DIRTY)
_KNOWN_FLAGS = int(ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC)


def known_categories(profile: KernelProfile) -> PageCategory:
    """The categories that the profile's kernel accepts in any mask."""
    known = _BASE_CATEGORIES
    if profile.has("scan.soft_dirty"):
        known |= PageCategory.SOFT_DIRTY
    if profile.has("scan.guard"):
        known |= PageCategory.GUARD
    return known


def known_flags(_profile: KernelProfile) -> ScanFlag:
    """The request flags that the profile's kernel accepts."""
    return ScanFlag(_KNOWN_FLAGS)


def refusal(request: ScanRequest, profile: KernelProfile, *, vec_address: int = 1 << 16) -> int:
    """The errno with which the kernel refuses `request`, or 0.

    `vec_address` is where the caller's buffer lies (only its distance from the end of the user addresses matters).
    """
    limit = profile.geometry.task_size
    masks = (
        request.category_inverted | request.category_mask | request.category_anyof_mask | request.return_mask
    )
    vec = vec_address if request.vec else 0
    if request.size != PM_SCAN_ARG_BYTES:
        return errno.EINVAL
    if request.flags & ~_KNOWN_FLAGS:
        return errno.EINVAL
    known = _BASE | (_SOFT_DIRTY if profile.has("scan.soft_dirty") else 0)
    if masks & ~known and masks & ~int(known_categories(profile)):
        return errno.EINVAL
    if request.start & (profile.geometry.page_size - 1):
        return errno.EINVAL
    # access_ok(start, end - start): an end below start wraps and fails, an end equal to the limit passes.
    if not request.start <= request.end <= limit:
        return errno.EFAULT
    if not vec and request.vec_len:
        return errno.EINVAL
    if vec and vec + request.vec_len * PAGE_REGION_BYTES > limit:
        return errno.EFAULT
    return 0


def normalise(request: ScanRequest, profile: KernelProfile) -> ScanRequest:
    """An accepted request with its end in whole pages."""
    end = align_up(request.end, profile.geometry.page_size)
    return request if end == request.end else attrs.evolve(request, end=end)
