"""maps and smaps: read and written byte for byte, whatever a path holds; garbage is refused with its place."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmcore.errors import ArgumentError, FormatError
from pmcore.smaps import SmapsEntry, format_smaps, parse_smaps
from pmcore.vma import Vma, VmaKind, format_maps, format_maps_line, parse_maps, parse_maps_line

NAMES = (
    st.binary(max_size=80)
    .filter(lambda b: b"\n" not in b)
    .map(lambda b: b.decode("utf-8", "surrogateescape"))
)
VMAS = st.builds(
    lambda start, pages, name, offset, **rest: Vma(
        start=start << 12, end=(start + pages) << 12, name=name, offset=offset << 12, **rest
    ),
    start=st.integers(0, (1 << 51) - 1),
    pages=st.integers(1, 1 << 20),
    name=NAMES,
    offset=st.integers(0, 1 << 30),
    readable=st.booleans(),
    writable=st.booleans(),
    executable=st.booleans(),
    shared=st.booleans(),
    dev_major=st.integers(0, 4095),
    dev_minor=st.integers(0, 1 << 20),
    inode=st.integers(0, 1 << 60),
)
SAMPLE = b"".join(
    line + b"\n"
    for line in (
        b"00400000-0040b000 r-xp 00000000 fe:00 1234                               /bin/with space (deleted)",
        b"7ffc1000-7ffc3000 rw-p 00000000 00:00 0 ",
        b"7f0000000000-7f0000001000 rw-s 00001000 00:01 77                         /dev/zero (deleted)",
        b"7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0                          [stack]",
        b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]",
    )
)


@given(st.lists(VMAS, max_size=5))
def test_what_is_written_is_read(vmas):
    assert parse_maps(format_maps(vmas)) == tuple(vmas)


def test_kernel_text_is_written_again_byte_for_byte():
    assert format_maps(parse_maps(SAMPLE)) == SAMPLE


@pytest.mark.live
def test_live_maps_and_smaps_are_written_again_byte_for_byte():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    maps = Path("/proc/self/maps").read_bytes()
    assert format_maps(parse_maps(maps)) == maps
    for name in ("smaps", "smaps_rollup"):
        text = Path("/proc/self", name).read_bytes()
        assert format_smaps(parse_smaps(text)) == text


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    sources: list[str | None] = []
    for parse in (parse_maps, parse_smaps):
        try:
            parse(data)
        except FormatError as error:
            sources.append(error.source)
    assert None not in sources


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"nonsense", "not a line of maps"),
        (b"2000-1000 r--p 00000000 00:00 0 ", "not a range"),
        (b"1000-1000 r--p 00000000 00:00 0 ", "not a range"),
        (b"1000-2000 r--x 00000000 00:00 0 ", "not a line"),
        (b"1000-2000 r--p 0 00:00", "not a line"),
        (b"11111111111111111-2 r--p 0 00:00 0 ", "not a line"),
    ],
)
def test_garbage_is_refused_with_its_line(line, said):
    with pytest.raises(FormatError, match=said) as caught:
        parse_maps(SAMPLE + line)
    assert caught.value.source == "maps:6"
    assert isinstance(caught.value, ValueError)


def test_many_vmas_are_read_quickly():
    text = format_maps(
        Vma(start=i << 13, end=(i << 13) + 4096, name="/a b" * (i % 2)) for i in range(1, 65536)
    )
    began = time.process_time()
    assert len(parse_maps(text)) == 65535
    assert time.process_time() - began < 2.5  # about 0.3 s; the bar leaves room for slow machines


def test_kinds_and_paths():
    program, anon, shmem, stack, vsyscall = parse_maps(SAMPLE)
    assert [v.kind for v in (program, anon, shmem, stack, vsyscall)] == [
        VmaKind.FILE,
        VmaKind.ANON,
        VmaKind.SHMEM,
        VmaKind.STACK,
        VmaKind.SPECIAL,
    ]
    assert program.path == "/bin/with space"
    assert program.deleted
    assert program.perms == "r-xp"
    assert anon.path is None
    assert shmem.shared
    assert vsyscall.end == 0xFFFFFFFFFF601000
    assert parse_maps_line(b"1000-2000 rw-p 0 00:00 0 [heap]").kind is VmaKind.HEAP
    assert parse_maps_line(b"1000-2000 rw-p 0 00:0f 9 /anon_hugepage (deleted)").kind is VmaKind.HUGETLB
    newline = parse_maps_line(b"1000-2000 rw-p 0 00:0f 9                      /a\\012b")
    assert newline.path == "/a\nb"
    assert str(anon) == "7ffc1000-7ffc3000 rw-p"


def test_a_name_may_begin_with_blanks():
    vma = Vma(start=4096, end=8192, name="  two blanks")
    assert parse_maps_line(format_maps_line(vma)) == vma


def test_undecodable_names_are_kept():
    vma = parse_maps_line(b"1000-2000 r--p 0 00:00 3                          /\xff\xfe")
    assert vma.name_bytes == b"/\xff\xfe"


@pytest.mark.parametrize(("start", "end"), [(0, 0), (8192, 4096), (-4096, 4096), (0, (1 << 64) + 1)])
def test_a_vma_is_a_range(start, end):
    with pytest.raises(ArgumentError):
        Vma(start=start, end=end)


SMAPS = b"".join(
    line + b"\n"
    for line in (
        b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ",
        b"Size:                  4 kB",
        b"Rss:                   4 kB",
        b"THPeligible:           0",
        b"Odd line of a kernel to come",
        b"VmFlags: rd wr mr uw ",
    )
)


def test_smaps_fields():
    [entry] = parse_smaps(SMAPS)
    assert dict(entry.counters) == {"Size": 4096, "Rss": 4096}
    assert dict(entry.plain) == {"THPeligible": 0}
    assert entry.vm_flags == ("rd", "wr", "mr", "uw")
    assert entry.other == (b"Odd line of a kernel to come",)
    assert entry.has_flag("uw")
    assert not entry.has_flag("sd")
    assert entry.bytes_of("Rss", "Swap") == 4096
    assert format_smaps([entry]) == SMAPS


def test_smaps_without_a_mapping_is_refused():
    with pytest.raises(FormatError, match="before the first mapping") as caught:
        parse_smaps(b"Size: 4 kB\n")
    assert caught.value.source == "smaps:1"


def test_smaps_values_do_not_change():
    entry = SmapsEntry(vma=Vma(start=0, end=4096), counters={"Rss": 1})
    with pytest.raises(TypeError):
        entry.counters["Rss"] = 2
    assert not entry.has_flag("sd")
