"""page-types' small languages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmcore.analysis.bits import BitFilter, parse_addr, parse_bits, parse_flags
from pmcore.errors import FormatError
from pmcore.pagetypes import display_table

ANON, LRU, HEAD, TAIL = 1 << 12, 1 << 5, 1 << 15, 1 << 16
NAMES = sorted(row.page_types for row in display_table().values())


@pytest.mark.parametrize(
    ("text", "mask", "bits"),
    [
        ("anon", ANON, None),
        ("anon,lru", ANON | LRU, None),
        ("anon,lru=anon", ANON | LRU, ANON),
        ("anon,~lru", ANON | LRU, ANON),
        ("~lru", LRU, 0),
        ("=anon,lru", (1 << 64) - 1, ANON | LRU),
        ("=", (1 << 64) - 1, 0),
        ("compound", HEAD | TAIL, None),
        ("comp", HEAD | TAIL, None),
        ("compound_head", HEAD, None),
        ("0x10,anon", 0x10 | ANON, None),
        ("ANON", ANON, None),
        ("bit_60", 1 << 60, None),
        ("re", 1 << 2, None),
        (" anon , lru ", ANON | LRU, None),
    ],
)
def test_grammar(text, mask, bits):
    assert parse_bits(text) == BitFilter(mask=mask, bits=bits)


@pytest.mark.parametrize(
    "text", ["ananas", "anon,", "anon,,lru", "a=b=c", "~anon=lru", "-1", "0x1ffffffffffffffff", "bit_64"]
)
def test_nonsense_is_refused_with_its_place(text):
    with pytest.raises(FormatError) as caught:
        parse_bits(text)
    assert "character" in str(caught.value.source)


def test_close_names_are_suggested():
    with pytest.raises(FormatError, match="did you mean anonymous"):
        parse_bits("anonimous")


@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(NAMES), max_size=3, unique=True),
    st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20),
)
def test_meaning_of_the_four_forms(wanted, others, words):
    yes, no = parse_flags(",".join(wanted)), parse_flags(",".join(others)) if others else 0
    array = np.array([*words, yes, yes | no, 0], dtype=np.uint64)
    plain = parse_bits(",".join(wanted)).matches(array)
    assert plain.tolist() == [int(w) & yes != 0 for w in array]
    exact = parse_bits("=" + ",".join(wanted)).matches(array)
    assert exact.tolist() == [int(w) == yes for w in array]
    some = parse_bits(",".join([*wanted, *others]) + "=" + ",".join(wanted)).matches(array)
    assert some.tolist() == [int(w) & (yes | no) == yes for w in array]
    if others:
        without = parse_bits(",".join([*wanted, *("~" + name for name in others)])).matches(array)
        assert without.tolist() == [int(w) & (yes | no) == yes for w in array]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", (5, 6)),
        ("5+3", (5, 8)),
        ("5,8", (5, 8)),
        ("5,", (5, None)),
        (",8", (0, 8)),
        ("0x10+0x10", (16, 32)),
        ("+8", (0, 8)),
    ],
)
def test_page_ranges(text, expected):
    assert parse_addr(text) == expected


@pytest.mark.parametrize("text", ["", "x", "5,3", "-1", "1+y", "99999999999999999999999"])
def test_bad_page_ranges(text):
    with pytest.raises(FormatError):
        parse_addr(text)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_bits, parse_addr, parse_flags):
        try:
            parse(text)
        except FormatError:
            continue
