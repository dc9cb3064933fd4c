"""Pagemap entries: arrays, scalars and the page-at-a-time reference say the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmcore.errors import ArgumentError
from pmcore.pagemap import PagemapEntries, PagemapEntry, PagemapFields, encode_entries, encode_pagemap
from pmcore.profile import preset
from pmcore.spec.reference import entry as reference

PROFILES = [preset(v) for v in ("2.6.25", "3.5", "3.11", "4.0", "4.2", "5.13", "6.12", "6.15", "6.18")]
WORDS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sets(st.integers(0, 63)).map(lambda bits: sum(1 << bit for bit in bits)),
    st.builds(lambda high, low: high << 55 | low, st.integers(0, 511), st.integers(0, (1 << 55) - 1)),
)
FLAGS = ("present", "swapped", "file", "guard", "uffd_wp", "exclusive", "soft_dirty")


@pytest.mark.rule("PM-002", "PM-003", "PM-004", "PM-005", "PM-006", "PM-007", "PM-008", "PM-009", "PM-010")
@given(WORDS, st.sampled_from(PROFILES), st.booleans())
def test_scalar_says_what_the_reference_says(value, profile, cleared):
    expected = reference.decode(value, profile.capabilities, soft_dirty_cleared=cleared)
    actual = PagemapEntry(value, profile=profile, soft_dirty_cleared=cleared)
    for name in (*FLAGS, "pfn", "page_shift", "unknown_bits"):
        assert getattr(expected, name) == getattr(actual, name), name
    swap = None if expected.swap_type is None else (expected.swap_type, expected.swap_offset)
    assert swap == actual.swap_entry


@pytest.mark.rule("PM-011", "PM-012", "PM-013", "AC-003")
@given(st.lists(WORDS, max_size=40), st.sampled_from(PROFILES), st.booleans())
def test_arrays_say_what_scalars_say(values, profile, cleared):
    entries = PagemapEntries(np.array(values, dtype=np.uint64), 1 << 20, profile, cleared)
    scalars = [PagemapEntry(value, profile=profile, soft_dirty_cleared=cleared) for value in values]
    for name in (*FLAGS, "hidden"):
        assert getattr(entries, name).tolist() == [getattr(one, name) for one in scalars], name
    assert entries.pfn.tolist() == [one.pfn or 0 for one in scalars]
    assert entries.has_pfn.tolist() == [one.pfn is not None for one in scalars]
    swap = [one.swap_entry or (0, 0) for one in scalars]
    assert entries.swap_type.tolist() == [kind for kind, _ in swap]
    assert entries.swap_offset.tolist() == [offset for _, offset in swap]
    assert entries.unknown_bits.tolist() == [one.unknown_bits for one in scalars]
    shifts = [one.page_shift for one in scalars]
    assert (entries.page_shift is None) == (None in shifts or (not shifts and entries.page_shift is None))
    if entries.page_shift is not None:
        assert entries.page_shift.tolist() == shifts
    fields = entries.decode()
    for name in (*FLAGS, "pfn", "swap_type", "swap_offset"):
        assert getattr(fields, name).tolist() == getattr(entries, name).tolist(), name


@settings(deadline=None)
@given(st.integers(1, 3), st.sampled_from([-1, 0, 1]), st.integers(0, (1 << 64) - 1))
def test_decode_is_right_at_the_edges_of_its_chunks(chunks, more, seed):
    count = chunks * (1 << 15) + more
    values = np.random.default_rng(seed).integers(0, 1 << 64, count, dtype=np.uint64)
    entries = PagemapEntries(values)
    fields = entries.decode()
    for name in (*FLAGS, "pfn", "swap_type", "swap_offset"):
        assert np.array_equal(getattr(fields, name), getattr(entries, name)), name


@given(WORDS, st.sampled_from(PROFILES), st.booleans())
def test_reference_encodes_what_it_decoded(value, profile, cleared):
    decoded = reference.decode(value, profile.capabilities, soft_dirty_cleared=cleared)
    assert reference.encode(decoded) == value


@given(
    st.fixed_dictionaries({name: st.booleans() for name in FLAGS}),
    st.integers(1, (1 << 55) - 1),
    st.integers(0, 31),
    st.integers(0, (1 << 50) - 1),
    st.sampled_from(PROFILES),
)
def test_what_is_encoded_is_decoded(flags, pfn, kind, offset, profile):
    fields = dict(flags)
    fields["swapped"] = fields["swapped"] and not fields["present"]
    number = {"pfn": pfn} if fields["present"] else {}
    if fields["swapped"]:
        number = {"swap_type": kind, "swap_offset": offset}
    try:
        value = encode_pagemap(**fields, **number, profile=profile, soft_dirty_cleared=True)
    except ArgumentError:
        assert not all(
            profile.has(f"pagemap.{c}") for c in ("soft_dirty", "mmap_exclusive", "uffd_wp", "guard", "file")
        )
        return
    entry = PagemapEntry(value, profile=profile, soft_dirty_cleared=True)
    assert {name: getattr(entry, name) for name in FLAGS} == fields
    assert entry.pfn == number.get("pfn")
    assert entry.swap_entry == ((kind, offset) if fields["swapped"] and (kind or offset) else None)
    assert entry.unknown_bits == 0


@given(st.lists(WORDS, max_size=30))
def test_arrays_of_fields_are_encoded_as_they_were_decoded(values):
    profile = preset("6.18")
    entries = PagemapEntries(np.array(values, dtype=np.uint64), profile=profile)
    known = entries.values & ~entries.unknown_bits
    again = encode_entries(PagemapEntries(known, profile=profile).decode(), profile=profile)
    assert again.tolist() == known.tolist()


def test_encoding_refuses_what_the_kernel_cannot_say():
    for fields in (
        {"guard": True},
        {"pfn": 1},
        {"present": True, "pfn": 1 << 55},
        {"swap_type": 1},
        {"swapped": True, "swap_type": 32},
        {"page_shift": 12},
    ):
        with pytest.raises(ArgumentError):
            encode_pagemap(**fields, profile=preset("6.12"))
    guard = PagemapFields(
        *(
            np.ones(1, dtype=np.bool_) if name == "guard" else np.zeros(1, dtype=np.bool_)
            for name in ("present", "swapped", "file", "guard", "uffd_wp", "exclusive", "soft_dirty")
        ),
        pfn=np.zeros(1, dtype=np.uint64),
        swap_type=np.zeros(1, dtype=np.uint8),
        swap_offset=np.zeros(1, dtype=np.uint64),
    )
    with pytest.raises(ArgumentError, match="guard"):
        encode_entries(guard, profile=preset("6.12"))


@pytest.mark.rule("PM-005")
def test_page_shift_of_old_kernels():
    word = encode_pagemap(present=True, pfn=5, page_shift=12, profile=preset("2.6.32"))
    assert word == 0x8600000000000005
    old, middle, new = (PagemapEntry(word, profile=preset(v)) for v in ("2.6.32", "3.11", "4.2"))
    assert old.page_shift == middle.page_shift == 12
    assert new.page_shift is None
    cleared = PagemapEntry(word | 1 << 55, profile=preset("3.11"), soft_dirty_cleared=True)
    assert cleared.page_shift is None
    assert cleared.soft_dirty


def test_slices_know_where_they_are():
    entries = PagemapEntries(np.arange(10, dtype=np.uint64), 0x1000)
    part = entries[3:7]
    assert part.start == 0x4000
    assert part.values.tolist() == [3, 4, 5, 6]
    assert part[1].address == 0x5000
    assert part[-1].address == 0x7000
    assert part.addresses.tolist() == [0x4000, 0x5000, 0x6000, 0x7000]
    assert part.vpn.tolist() == [4, 5, 6, 7]
    with pytest.raises(IndexError):
        entries[10]
    with pytest.raises(ArgumentError):
        entries[::2]


@pytest.mark.parametrize("value", [-1, 1 << 64, 1.5, "1"])
def test_a_word_has_64_bits(value):
    with pytest.raises(ArgumentError):
        PagemapEntry(value)


@pytest.mark.rule("PM-009", "PM-024")
def test_golden_words():
    """Seen on 6.18.44."""
    new = preset("6.18")
    guard = PagemapEntry(0x440000000000009F, profile=new)
    assert guard.guard
    assert guard.swap_entry == (31, 4)
    marker = PagemapEntry(0x420000000000003F, profile=new)
    assert marker.uffd_wp
    assert marker.swap_entry == (31, 1)
    hidden = PagemapEntry(0x8100000000000000, profile=new)
    assert hidden.hidden
    assert hidden.pfn is None
    swapped = PagemapEntry(0x4000000000000000, profile=new)
    assert swapped.hidden
    assert swapped.swap_entry is None
    assert "swap entry" in str(swapped.explain())
