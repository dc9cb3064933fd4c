"""Each flag is reached by a kept program, or it is said why not; the table says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pmcore import spec
from pmcore.errors import PmcoreError
from pmcore.program import load_program

from . import flags

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted({row.program for row in spec.flag_programs() if row.program})


def test_every_flag_has_a_program_a_test_or_a_reason():
    """Exactly one of them, for each flag of each version and no other."""
    rows = spec.flag_programs()
    assert [(row.name, row.bit) for row in rows] == [(flag.name, flag.bit) for flag in spec.kpageflags()]
    for row in rows:
        assert sum(map(bool, (row.program, row.test, row.reason))) == 1, row.name
        assert not row.reason or row.reason.endswith("."), row.name


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_reaches_its_flags(name):
    shown, _ = flags.reached(load_program(flags.KEPT / f"{name}.json"))
    for row in spec.flag_programs():
        if row.program == name:
            assert any(bits >> row.bit & 1 for bits in shown), row.name


def test_the_tests_named_are_there():
    for row in spec.flag_programs():
        if row.test:
            path, _, name = row.test.partition("::")
            assert re.search(rf"def {name}\b", (ROOT / path).read_text(encoding="utf-8")), row.name


def test_what_is_said_to_be_unreachable_no_kept_program_reaches():
    bits = 0
    for path in sorted(flags.KEPT.rglob("*.json")):
        try:
            shown, _ = flags.reached(load_program(path))
        except PmcoreError:
            continue  # for another machine: with nodes, ...
        for one in shown:
            bits |= one
    wrong = [row.name for row in spec.flag_programs() if row.reason and bits >> row.bit & 1]
    assert wrong == []


def test_the_table_is_made_from_these():
    assert flags.TABLE.read_text(encoding="utf-8") == flags.table()
