"""What the words of /proc/PID/pagemap mean: as arrays for many pages, as a scalar that explains itself for one.

The layout depends on the kernel (`spec/tables/pagemap_bits.toml`); a bit that the profile's kernel does not define
reads as False and shows up in `unknown_bits`. A frame number that the kernel hides is never reported as frame 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore import uapi
from pmcore.arrays import BoolArray, U64Array, as_words
from pmcore.errors import ArgumentError
from pmcore.profile import KernelProfile, preset

if TYPE_CHECKING:
    from pmcore.explain import Explanation

__all__ = ["PagemapEntries", "PagemapEntry", "PagemapFields", "encode_entries", "encode_pagemap"]

#: Entries decoded at a time by `decode`: the temporaries of one chunk stay in the processor's cache.
_CHUNK = 1 << 15
_FLAGS = (
    ("soft_dirty", uapi.PM_SOFT_DIRTY, "pagemap.soft_dirty"),
    ("exclusive", uapi.PM_MMAP_EXCLUSIVE, "pagemap.mmap_exclusive"),
    ("uffd_wp", uapi.PM_UFFD_WP, "pagemap.uffd_wp"),
    ("guard", uapi.PM_GUARD_REGION, "pagemap.guard"),
    ("file", uapi.PM_FILE, "pagemap.file"),
    ("swapped", uapi.PM_SWAP, "pagemap"),
    ("present", uapi.PM_PRESENT, "pagemap"),
)


def _spread(flag: BoolArray, scratch: NDArray[np.uint8], out: U64Array) -> U64Array:
    """A word of ones where `flag`, of zeros elsewhere: a mask without a branch."""
    np.negative(flag.view(np.int8), out=scratch.view(np.int8))
    np.copyto(out.view(np.int64), scratch.view(np.int8))
    return out


def _defined_flags(profile: KernelProfile, *, soft_dirty_cleared: bool) -> dict[str, int]:
    """The flag bits that the profile's kernel sets, by name."""
    shifted = _shift_layout(profile, soft_dirty_cleared=soft_dirty_cleared)
    return {
        name: bit
        for name, bit, capability in _FLAGS
        if profile.has(capability) and not (shifted and bit & uapi.PM_PSHIFT_MASK)
    }


def _shift_layout(profile: KernelProfile, *, soft_dirty_cleared: bool) -> bool:
    """Whether bits 55 to 60 hold the page shift (rule PM-005)."""
    if not profile.has("pagemap.page_shift"):
        return False
    return not (soft_dirty_cleared and profile.has("pagemap.page_shift_until_clear"))


@attrs.frozen(eq=False)
class PagemapFields:
    """Every field of many entries, decoded. All arrays have one element a page."""

    present: BoolArray
    swapped: BoolArray
    file: BoolArray
    guard: BoolArray
    uffd_wp: BoolArray
    exclusive: BoolArray
    soft_dirty: BoolArray
    #: Frame number; 0 where not present or hidden.
    pfn: U64Array
    #: Swap area or kind of special entry; 0 where not swapped.
    swap_type: NDArray[np.uint8]
    #: Offset in the area; 0 where not swapped.
    swap_offset: U64Array


@attrs.frozen(eq=False)
class PagemapEntries:
    """Entries of consecutive pages. `values` has one 64-bit word a page, `start` is the first page's address.

    Properties are arrays with one element a page, computed when asked for; `decode` computes all of them at once.
    """

    values: U64Array = attrs.field(converter=as_words)
    start: int = 0
    profile: KernelProfile = attrs.field(factory=preset)
    #: For kernels 3.11 to 4.1: whether soft-dirty was cleared since boot, which changes bits 55 to 60.
    soft_dirty_cleared: bool = False

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> PagemapEntry: ...

    @overload
    def __getitem__(self, index: slice) -> PagemapEntries: ...

    def __getitem__(self, index: int | slice) -> PagemapEntry | PagemapEntries:
        size = self.profile.geometry.page_size
        if isinstance(index, slice):
            first, _, step = index.indices(len(self.values))
            if step != 1:
                raise ArgumentError(f"entries are consecutive pages; a step of {step} is not")
            return attrs.evolve(self, values=self.values[index], start=self.start + first * size)
        position = range(len(self.values))[index]
        return PagemapEntry(
            int(self.values[position]),
            profile=self.profile,
            address=self.start + position * size,
            soft_dirty_cleared=self.soft_dirty_cleared,
        )

    # -- where ---------------------------------------------------------------------------------------

    @property
    def addresses(self) -> U64Array:
        """Address of each page, in bytes."""
        steps = np.arange(len(self.values), dtype=np.uint64)
        return np.uint64(self.start) + (steps << np.uint64(self.profile.geometry.page_shift))

    @property
    def vpn(self) -> U64Array:
        """Virtual page number of each page."""
        return self.addresses >> np.uint64(self.profile.geometry.page_shift)

    # -- flags ---------------------------------------------------------------------------------------

    def _flag(self, name: str) -> BoolArray:
        bit = _defined_flags(self.profile, soft_dirty_cleared=self.soft_dirty_cleared).get(name, 0)
        if not bit:
            return np.zeros(len(self.values), dtype=np.bool_)
        found: BoolArray = (self.values & np.uint64(bit)) != 0
        return found

    @property
    def present(self) -> BoolArray:
        """Present in memory (PM-013)."""
        return self._flag("present")

    @property
    def swapped(self) -> BoolArray:
        """Not present and not empty: swap, migration, marker, hwpoison (PM-012)."""
        return self._flag("swapped")

    @property
    def file(self) -> BoolArray:
        """File page or shared anonymous (PM-011)."""
        return self._flag("file")

    @property
    def guard(self) -> BoolArray:
        """Part of a guard region (PM-009)."""
        return self._flag("guard")

    @property
    def uffd_wp(self) -> BoolArray:
        """Write-protected through userfaultfd (PM-008)."""
        return self._flag("uffd_wp")

    @property
    def exclusive(self) -> BoolArray:
        """Frame mapped exactly once (PM-007)."""
        return self._flag("exclusive")

    @property
    def soft_dirty(self) -> BoolArray:
        """Soft-dirty, by the page or by its VMA (PM-006)."""
        return self._flag("soft_dirty")

    @property
    def page_shift(self) -> NDArray[np.uint8] | None:
        """Page shift of each page on kernels before 4.2, else None (PM-005)."""
        if not _shift_layout(self.profile, soft_dirty_cleared=self.soft_dirty_cleared):
            return None
        field = (self.values & np.uint64(uapi.PM_PSHIFT_MASK)) >> np.uint64(uapi.PM_PSHIFT_OFFSET)
        return field.astype(np.uint8)

    # -- fields --------------------------------------------------------------------------------------

    @property
    def pfn(self) -> U64Array:
        """Frame number where present and visible, 0 elsewhere: ask `has_pfn` which (PM-002)."""
        return self._field_where(uapi.PM_PRESENT)

    @property
    def has_pfn(self) -> BoolArray:
        """Present, with a frame number that is shown."""
        found: BoolArray = self.pfn != 0
        return found

    @property
    def hidden(self) -> BoolArray:
        """Present or swapped, but the field reads zero: the opener may not see it (AC-003).

        No process maps frame 0, and no swap area gives out its first page, which is its header.
        """
        found: BoolArray = (self.values & np.uint64(uapi.PM_PRESENT | uapi.PM_SWAP)) != 0
        found &= (self.values & np.uint64(uapi.PM_PFRAME_MASK)) == 0
        return found

    @property
    def swap_type(self) -> NDArray[np.uint8]:
        """Swap area or kind of special entry where swapped, 0 elsewhere (PM-003)."""
        return (self._swap_field() & np.uint64(uapi.PM_SWAP_TYPE_MASK)).astype(np.uint8)

    @property
    def swap_offset(self) -> U64Array:
        """Offset in the swap area where swapped, 0 elsewhere (PM-004)."""
        return self._swap_field() >> np.uint64(uapi.MAX_SWAPFILES_SHIFT)

    @property
    def unknown_bits(self) -> U64Array:
        """Bits that are set and that the profile's kernel does not define."""
        defined = sum(_defined_flags(self.profile, soft_dirty_cleared=self.soft_dirty_cleared).values())
        if _shift_layout(self.profile, soft_dirty_cleared=self.soft_dirty_cleared):
            defined |= uapi.PM_PSHIFT_MASK
        rest = self.values & np.uint64(~(defined | uapi.PM_PFRAME_MASK) & (1 << 64) - 1)
        empty = (self.values & np.uint64(uapi.PM_PRESENT | uapi.PM_SWAP)) == 0
        stray: U64Array = np.where(empty, self.values & np.uint64(uapi.PM_PFRAME_MASK), np.uint64(0))
        return rest | stray

    def decode(self) -> PagemapFields:
        """All fields at once, chunk by chunk: the way for millions of pages."""
        count = len(self.values)
        flags = {name: np.zeros(count, dtype=np.bool_) for name, _, _ in _FLAGS}
        pfn, offset = np.empty(count, dtype=np.uint64), np.zeros(count, dtype=np.uint64)
        kind = np.zeros(count, dtype=np.uint8)
        defined = _defined_flags(self.profile, soft_dirty_cleared=self.soft_dirty_cleared)
        low_flags = {name: np.uint8(bit >> 55) for name, bit in defined.items() if bit < uapi.PM_PRESENT}
        words64, bytes8 = np.empty((2, _CHUNK), dtype=np.uint64), np.empty((2, _CHUNK), dtype=np.uint8)
        for first in range(0, count, _CHUNK):
            part = slice(first, min(first + _CHUNK, count))
            words = self.values[part]
            field, mask = words64[:, : len(words)]
            octet, scratch = bytes8[:, : len(words)]
            present, swapped = flags["present"][part], flags["swapped"][part]
            # Bits 55 to 62 in one byte: flags are then tested sixteen and more at a time.
            np.right_shift(words, np.uint64(55), out=field)
            np.copyto(octet, field, casting="unsafe")
            for name, bit in low_flags.items():
                np.not_equal(np.bitwise_and(octet, bit, out=scratch), 0, out=flags[name][part])
            np.less(words.view(np.int64), 0, out=present)
            np.bitwise_and(words, np.uint64(uapi.PM_PFRAME_MASK), out=field)
            np.bitwise_and(field, _spread(present, scratch, mask), out=pfn[part])
            np.greater(swapped, present, out=scratch.view(np.bool_))
            if scratch.any():
                np.bitwise_and(field, _spread(scratch.view(np.bool_), scratch, mask), out=field)
                np.copyto(kind[part], field, casting="unsafe")
                np.bitwise_and(kind[part], np.uint8(uapi.PM_SWAP_TYPE_MASK), out=kind[part])
                np.right_shift(field, np.uint64(uapi.MAX_SWAPFILES_SHIFT), out=offset[part])
        return PagemapFields(pfn=pfn, swap_type=kind, swap_offset=offset, **flags)

    # -- inside --------------------------------------------------------------------------------------

    def _field_where(self, bit: int) -> U64Array:
        field = self.values & np.uint64(uapi.PM_PFRAME_MASK)
        field[(self.values & np.uint64(bit)) == 0] = 0
        return field

    def _swap_field(self) -> U64Array:
        field = self._field_where(uapi.PM_SWAP)
        field[self.present] = 0
        return field


@attrs.frozen
class PagemapEntry:
    """One entry. `pfn` is None where the page is not present or its frame is hidden."""

    value: int = attrs.field()
    profile: KernelProfile = attrs.field(factory=preset, kw_only=True, repr=lambda p: p.name)
    address: int | None = attrs.field(default=None, kw_only=True)
    soft_dirty_cleared: bool = attrs.field(default=False, kw_only=True)

    @value.validator
    def _check_value(self, _attribute: object, value: int) -> None:
        if not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise ArgumentError(f"{value!r} is not a 64-bit word")

    def _flag(self, name: str) -> bool:
        defined = _defined_flags(self.profile, soft_dirty_cleared=self.soft_dirty_cleared)
        return bool(self.value & defined.get(name, 0))

    @property
    def present(self) -> bool:
        """Present in memory (PM-013)."""
        return self._flag("present")

    @property
    def swapped(self) -> bool:
        """Not present and not empty (PM-012)."""
        return self._flag("swapped")

    @property
    def file(self) -> bool:
        """File page or shared anonymous (PM-011)."""
        return self._flag("file")

    @property
    def guard(self) -> bool:
        """Part of a guard region (PM-009)."""
        return self._flag("guard")

    @property
    def uffd_wp(self) -> bool:
        """Write-protected through userfaultfd (PM-008)."""
        return self._flag("uffd_wp")

    @property
    def exclusive(self) -> bool:
        """Frame mapped exactly once (PM-007)."""
        return self._flag("exclusive")

    @property
    def soft_dirty(self) -> bool:
        """Soft-dirty (PM-006)."""
        return self._flag("soft_dirty")

    @property
    def page_shift(self) -> int | None:
        """Page shift on kernels before 4.2, else None (PM-005)."""
        if not _shift_layout(self.profile, soft_dirty_cleared=self.soft_dirty_cleared):
            return None
        return (self.value & uapi.PM_PSHIFT_MASK) >> uapi.PM_PSHIFT_OFFSET

    @property
    def pfn(self) -> int | None:
        """Frame number, None where there is none to see (PM-002)."""
        return (self.value & uapi.PM_PFRAME_MASK) or None if self.present else None

    @property
    def hidden(self) -> bool:
        """Present or swapped, with the frame number or swap entry kept from the opener (AC-003)."""
        return (self.present or self.swapped) and not self.value & uapi.PM_PFRAME_MASK

    @property
    def swap_entry(self) -> tuple[int, int] | None:
        """(type, offset) where swapped and shown, else None (PM-003, PM-004, AC-003)."""
        field = self.value & uapi.PM_PFRAME_MASK
        if not self.swapped or self.present or not field:
            return None
        return field & uapi.PM_SWAP_TYPE_MASK, field >> uapi.MAX_SWAPFILES_SHIFT

    @property
    def unknown_bits(self) -> int:
        """Bits that are set and that the profile's kernel does not define."""
        entries = PagemapEntries(
            np.array([self.value], dtype=np.uint64),
            profile=self.profile,
            soft_dirty_cleared=self.soft_dirty_cleared,
        )
        return int(entries.unknown_bits[0])

    def explain(self) -> Explanation:
        """Each bit and field in words, with its rule."""
        from pmcore.explain import explain_pagemap

        return explain_pagemap(self)


def encode_pagemap(
    *,
    present: bool = False,
    swapped: bool = False,
    file: bool = False,
    guard: bool = False,
    uffd_wp: bool = False,
    exclusive: bool = False,
    soft_dirty: bool = False,
    pfn: int | None = None,
    swap_type: int = 0,
    swap_offset: int = 0,
    page_shift: int | None = None,
    profile: KernelProfile | None = None,
    soft_dirty_cleared: bool = False,
) -> int:
    """The 64-bit word of these fields. Raises ArgumentError for a field that the profile's kernel has not."""
    profile = profile or preset()
    given = {
        "present": present,
        "swapped": swapped,
        "file": file,
        "guard": guard,
        "uffd_wp": uffd_wp,
        "exclusive": exclusive,
        "soft_dirty": soft_dirty,
    }
    defined = _defined_flags(profile, soft_dirty_cleared=soft_dirty_cleared)
    value = 0
    for name, on in given.items():
        if on and name not in defined:
            raise ArgumentError(f"a pagemap entry of {profile.name} has no {name} bit")
        value |= defined[name] if on else 0
    if pfn is not None and not present:
        raise ArgumentError("only a present page has a frame number")
    if (swap_type or swap_offset) and (present or not swapped):
        raise ArgumentError("only an entry that is swapped, and not present, has a swap type and offset")
    for what, number, bits in (
        ("pfn", pfn or 0, 55),
        ("swap_type", swap_type, 5),
        ("swap_offset", swap_offset, 50),
    ):
        if not 0 <= number < 1 << bits:
            raise ArgumentError(f"{what} {number} does not fit {bits} bits")
    if page_shift is not None:
        if not _shift_layout(profile, soft_dirty_cleared=soft_dirty_cleared) or not 0 <= page_shift < 64:
            raise ArgumentError(f"a pagemap entry of {profile.name} cannot say page_shift {page_shift}")
        value |= page_shift << uapi.PM_PSHIFT_OFFSET
    return value | (pfn or 0) | swap_type | swap_offset << uapi.MAX_SWAPFILES_SHIFT


def encode_entries(fields: PagemapFields, *, profile: KernelProfile | None = None) -> U64Array:
    """The words of `fields`, one a page. Raises ArgumentError for a flag that the profile's kernel has not."""
    profile = profile or preset()
    defined = _defined_flags(profile, soft_dirty_cleared=True)
    values = np.where(fields.present, fields.pfn, np.uint64(0)).astype(np.uint64)
    swap = fields.swap_type.astype(np.uint64) | fields.swap_offset << np.uint64(uapi.MAX_SWAPFILES_SHIFT)
    values |= np.where(fields.swapped & ~fields.present, swap, np.uint64(0))
    for name, _, _ in _FLAGS:
        on: BoolArray = getattr(fields, name)
        if name not in defined:
            if on.any():
                raise ArgumentError(f"a pagemap entry of {profile.name} has no {name} bit")
            continue
        values |= on.astype(np.uint64) * np.uint64(defined[name])
    return values
