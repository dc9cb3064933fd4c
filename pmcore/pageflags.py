"""What the words of /proc/kpageflags mean, as arrays and as a scalar; unknown bits are kept and shown as bit_N."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, overload

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore import spec
from pmcore.arrays import BoolArray, U64Array, as_words
from pmcore.errors import ArgumentError
from pmcore.profile import KernelProfile, preset
from pmcore.uapi import PageFlag

if TYPE_CHECKING:
    from pmcore.explain import Explanation

__all__ = ["FrameFlags", "PageFlagsArray", "count_words", "flag_rows", "merge_counts"]


@functools.lru_cache(maxsize=64)
def flag_rows(profile: KernelProfile) -> Mapping[int, spec.FlagRow]:
    """The rows of spec/tables/kpageflags.toml that hold on the profile's kernel, by bit."""
    return {
        row.bit: row
        for row in spec.kpageflags()
        if row.capability is not None and profile.has(row.capability)
    }


def count_words(words: U64Array) -> tuple[U64Array, NDArray[np.int64]]:
    """The distinct words, ascending, and how often each occurs.

    Frames beside each other mostly have equal words, so runs are counted first and only their values sorted.
    """
    if len(words) == 0:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    heads = np.flatnonzero(words[1:] != words[:-1])
    heads += 1
    lengths = np.diff(heads, prepend=0, append=len(words))
    return merge_counts([(words[np.append(0, heads)], lengths.astype(np.int64))])


def merge_counts(
    parts: Iterable[tuple[U64Array, NDArray[np.int64]]],
) -> tuple[U64Array, NDArray[np.int64]]:
    """One count out of several: distinct words, ascending, with their numbers added up."""
    pieces = list(parts)
    if not pieces:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    words = np.concatenate([words for words, _ in pieces])
    counts = np.concatenate([counts for _, counts in pieces])
    distinct, inverse = np.unique(words, return_inverse=True)
    total = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(total, inverse, counts)
    return distinct, total


@attrs.frozen(eq=False)
class PageFlagsArray:
    """Flag words, one a frame."""

    values: U64Array = attrs.field(converter=as_words)
    profile: KernelProfile = attrs.field(factory=preset, kw_only=True)

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> FrameFlags: ...

    @overload
    def __getitem__(self, index: slice) -> PageFlagsArray: ...

    def __getitem__(self, index: int | slice) -> FrameFlags | PageFlagsArray:
        if isinstance(index, slice):
            return attrs.evolve(self, values=self.values[index])
        return FrameFlags(int(self.values[range(len(self.values))[index]]), profile=self.profile)

    def has(self, flags: PageFlag | int) -> BoolArray:
        """Where all of `flags` are set."""
        wanted = np.uint64(flags)
        found: BoolArray = (self.values & wanted) == wanted
        return found

    def any(self, flags: PageFlag | int) -> BoolArray:
        """Where at least one of `flags` is set."""
        found: BoolArray = (self.values & np.uint64(flags)) != 0
        return found

    @property
    def unknown_bits(self) -> U64Array:
        """Bits that are set and that the profile's kernel does not define."""
        known = sum(1 << bit for bit in flag_rows(self.profile))
        return self.values & np.uint64(~known & (1 << 64) - 1)

    def combinations(self) -> tuple[U64Array, NDArray[np.int64]]:
        """The distinct words, ascending, and the number of frames of each."""
        return count_words(self.values)


@attrs.frozen
class FrameFlags:
    """One frame's flag word."""

    value: int = attrs.field()
    profile: KernelProfile = attrs.field(factory=preset, kw_only=True, repr=lambda p: p.name)

    @value.validator
    def _check_value(self, _attribute: object, value: int) -> None:
        if not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise ArgumentError(f"{value!r} is not a 64-bit word")

    @property
    def flags(self) -> PageFlag:
        """The word as PageFlag; unknown bits are kept."""
        return PageFlag(self.value)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the bits that are set, ascending; one that the kernel does not define is bit_N."""
        rows = flag_rows(self.profile)
        return tuple(
            rows[bit].name if bit in rows else f"bit_{bit}" for bit in range(64) if self.value >> bit & 1
        )

    def explain(self) -> Explanation:
        """Each bit in words, with its rule."""
        from pmcore.explain import explain_flags

        return explain_flags(self)

    def __str__(self) -> str:
        return "|".join(self.names) or "0"
