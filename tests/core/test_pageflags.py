"""Page flags: arrays, scalars, the reference, and page-types' ways of showing them."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmcore import pagetypes, spec
from pmcore.errors import ArgumentError
from pmcore.pageflags import FrameFlags, PageFlagsArray, count_words, flag_rows, merge_counts
from pmcore.profile import preset
from pmcore.spec.reference import flags as reference
from pmcore.uapi import PageFlag

WORDS = st.one_of(
    st.integers(0, (1 << 64) - 1), st.sets(st.integers(0, 63)).map(lambda bits: sum(1 << bit for bit in bits))
)
DISPLAY = (
    "KF-036",
    "KF-039",
    "KF-040",
    "KF-041",
    "KF-042",
    "KF-043",
    "KF-044",
    "KF-045",
)
ALL_BITS = (
    "KF-001",
    "KF-002",
    "KF-003",
    "KF-004",
    "KF-005",
    "KF-006",
    "KF-007",
    "KF-008",
    "KF-009",
    "KF-010",
    "KF-011",
    "KF-012",
    "KF-013",
    "KF-014",
    "KF-015",
    "KF-016",
    "KF-017",
    "KF-018",
    "KF-019",
    "KF-020",
    "KF-021",
    "KF-022",
    "KF-023",
    "KF-024",
    "KF-025",
    "KF-026",
    "KF-027",
    "KF-028",
    "KF-029",
    "KF-030",
    "KF-031",
    "KF-032",
    "KF-033",
    "KF-034",
    "KF-035",
    "KF-036",
    "KF-037",
    "KF-038",
    "KF-039",
    "KF-040",
    "KF-041",
    "KF-042",
    "KF-043",
    "KF-044",
    "KF-045",
)


@given(WORDS, st.sampled_from(["2.6.25", "3.4", "4.3", "6.12", "6.18"]))
def test_names_are_those_of_the_reference(value, version):
    profile = preset(version)
    table = {bit: row.name for bit, row in flag_rows(profile).items()}
    assert FrameFlags(value, profile=profile).names == tuple(reference.names(value, table))


@given(WORDS)
def test_no_bit_is_lost(value):
    word = FrameFlags(value)
    assert len(word.names) == value.bit_count()
    assert int(word.flags) == value


@given(st.lists(WORDS, max_size=50), st.sampled_from(list(PageFlag)), st.sampled_from(list(PageFlag)))
def test_questions_to_arrays(values, one, other):
    flags = PageFlagsArray(np.array(values, dtype=np.uint64))
    both = one | other
    assert flags.has(both).tolist() == [value & both == both for value in values]
    assert flags.any(both).tolist() == [value & both != 0 for value in values]
    unknown = [value & ~sum(1 << bit for bit in flag_rows(flags.profile)) for value in values]
    assert flags.unknown_bits.tolist() == unknown


@given(st.lists(st.tuples(st.sampled_from([0, 1, 5, 1 << 63]), st.integers(1, 9)), max_size=30))
def test_counting_words(runs):
    values = [word for word, length in runs for _ in range(length)]
    words, counts = count_words(np.array(values, dtype=np.uint64))
    assert dict(zip(words.tolist(), counts.tolist(), strict=True)) == {v: values.count(v) for v in values}
    assert words.tolist() == sorted(set(values))


def test_merging_no_counts():
    words, counts = merge_counts([])
    assert len(words) == len(counts) == 0


def test_a_bit_means_what_the_kernel_means_by_it():
    assert FrameFlags(1 << 23, profile=preset("4.9")).names == ("BALLOON",)
    assert FrameFlags(1 << 23, profile=preset("5.1")).names == ("OFFLINE",)
    assert FrameFlags(1 << 22, profile=preset("2.6.32")).names == ("bit_22",)
    assert FrameFlags(1 << 22, profile=preset("6.12")).names == ("THP",)
    assert FrameFlags(1 << 41, profile=preset("6.12", arch="aarch64")).names == ("ARCH_2",)
    assert FrameFlags(1 << 41, profile=preset("6.12")).names == ("bit_41",)


@pytest.mark.rule("KF-050")
@given(WORDS)
def test_default_view_is_that_of_the_reference(value):
    assert int(pagetypes.well_known(np.array([value], dtype=np.uint64))[0]) == reference.well_known(value)


@pytest.mark.rule(*DISPLAY)
@given(WORDS, WORDS)
def test_raw_view_is_that_of_the_reference(value, word):
    shown = pagetypes.expand_overloaded(np.array([value], dtype=np.uint64), np.array([word], dtype=np.uint64))
    assert int(shown[0]) == reference.expand_overloaded(value, word)
    alone = pagetypes.expand_overloaded(np.array([value], dtype=np.uint64))
    assert int(alone[0]) == reference.expand_overloaded(value)


@pytest.mark.rule(*ALL_BITS)
def test_every_bit_of_the_table_explains_itself():
    """Each bit of every version has a name, a meaning and a rule, and says so."""
    for row in spec.kpageflags():
        if row.capability is None:
            continue
        arch = {"ARCH_2": "aarch64", "ARCH_3": "aarch64", "UNCACHED": "ia64"}.get(row.name, "x86_64")
        profile = preset(row.since, arch=arch)
        [line] = FrameFlags(1 << row.bit, profile=profile).explain().lines
        assert (line.name, line.rule, line.meaning) == (row.name, row.rule, row.meaning)
        assert spec.rule(row.rule)


@pytest.mark.rule("KF-050")
@given(WORDS)
def test_symbols_have_one_letter_a_bit(value):
    letters = pagetypes.symbolic(value)
    table = pagetypes.display_table()
    assert len(letters) == len(table)
    assert sum(letter != "_" for letter in letters) == sum(value >> bit & 1 for bit in table)
    assert len(pagetypes.display_names(value)) == value.bit_count()


def test_symbols_are_those_of_page_types(page_types):
    """With the tool at hand: it describes each of its bits as we do."""
    for word in (
        0,
        0x586C,
        *(1 << bit for bit in pagetypes.display_table() if bit < 63),
    ):  # it reads signed numbers
        done = subprocess.run([page_types, "-d", hex(word)], capture_output=True, text=True, check=True)
        assert done.stdout == f"{word:#018x}\t{pagetypes.symbolic(word)}\t{pagetypes.long_names(word)}\n"


def test_slices_and_scalars():
    flags = PageFlagsArray(np.array([1, 2, 4], dtype=np.uint64))
    assert flags[1].names == ("ERROR",)
    assert flags[1:].values.tolist() == [2, 4]
    assert str(flags[2]) == "REFERENCED"
    assert str(FrameFlags(0)) == "0"
    assert len(flags) == 3
    words, counts = flags.combinations()
    assert (words.tolist(), counts.tolist()) == ([1, 2, 4], [1, 1, 1])


@pytest.mark.parametrize("value", [-1, 1 << 64, None])
def test_a_word_has_64_bits(value):
    with pytest.raises(ArgumentError):
        FrameFlags(value)
