"""The code's constants are the tables' constants."""

from __future__ import annotations

import struct

import pytest

from pmcore import spec, uapi
from pmcore.uapi import PageCategory, PageFlag, PagemapFlag, ScanFlag


def test_page_flags_are_those_of_the_table():
    table = {
        row.name: 1 << row.bit for row in spec.kpageflags() if row.kind != "display" and row.name != "BALLOON"
    }
    table["SOFTDIRTY"] = 1 << 40
    assert {flag.name: int(flag) for flag in PageFlag} == table


def test_pagemap_flags_are_those_of_the_table():
    table = {row.kernel_name: 1 << row.first for row in spec.pagemap_bits() if row.first == row.last}
    assert {f"PM_{flag.name}": int(flag) for flag in PagemapFlag} == table
    for name, value in table.items():
        assert getattr(uapi, name) == value


def test_fields_of_the_entry():
    rows = {row.name: row for row in spec.pagemap_bits()}
    assert (1 << rows["pfn"].last + 1) - 1 == uapi.PM_PFRAME_MASK
    assert rows["swap-offset"].first == uapi.MAX_SWAPFILES_SHIFT
    assert rows["page-shift"].first == uapi.PM_PSHIFT_OFFSET
    assert rows["page-shift"].last - rows["page-shift"].first + 1 == uapi.PM_PSHIFT_BITS


@pytest.mark.rule("SC-014", "SC-015", "SC-016", "SC-017", "SC-018", "SC-019", "SC-020", "SC-021", "SC-022")
def test_categories_and_scan_flags_are_those_of_the_table():
    assert {row.name: row.value for row in spec.scan_categories()} == {c.name: int(c) for c in PageCategory}
    assert {row.name: row.value for row in spec.scan_flags()} == {f.name: int(f) for f in ScanFlag}


def test_structures_have_no_holes():
    for name, size in (("pm_scan_arg", uapi.PM_SCAN_ARG_BYTES), ("page_region", uapi.PAGE_REGION_BYTES)):
        fields = [field for field in spec.scan_fields() if field.struct == name]
        assert [field.offset for field in fields] == list(range(0, size, 8))
        assert sum(field.size for field in fields) == size


def test_ioctl_numbers():
    """_IOWR('f', number, size) of the generic encoding."""

    def iowr(number: int, size: int) -> int:
        return 3 << 30 | size << 16 | ord("f") << 8 | number

    assert iowr(16, 96) == uapi.PAGEMAP_SCAN
    assert iowr(17, struct.calcsize("=9Q4L2Q")) == uapi.PROCMAP_QUERY
