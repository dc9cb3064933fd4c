"""What the commands print, over a machine that is laid out."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from pmcore import spec
from pmcore.cli.entry import COMMANDS
from pmcore.cli.output import human_size

LAB = ("--backend", "lab")


def rows(run, *arguments):
    result = run(*arguments, *LAB, "--format", "json")
    assert result.err == ""
    assert result.code == 0
    return json.loads(result.out)


# -- types -----------------------------------------------------------------------------------------------


def test_types_counts_frames(run):
    found = {row["flags"]: row["pages"] for row in rows(run, "types")}
    anon = 1 << 12 | 1 << 11 | 1 << 14 | 1 << 5
    assert found == {0: 4, anon: 2, anon | 1 << 60: 1, 1 << 5 | 1 << 11: 1, 1 << 10: 8}
    [odd] = rows(run, "types", "-b", "bit_60")
    assert "bit_60" in odd["names"]


def test_types_table_has_a_total(run):
    result = run("types", "-b", "buddy", *LAB)
    assert "buddy" in result.out
    assert "total 8 pages, 32.0 KiB, in 1 kinds" in result.out
    assert "\x1b" not in result.out


def test_types_lists_ranges_and_pages(run):
    found = rows(run, "types", "-l", "-M", "-C", "-b", "lru")
    assert [(r["offset"], r["pages"], r["mapcount"], r["cgroup"]) for r in found] == [
        (1, 1, 1, 77),
        (2, 1, 2, 77),
        (3, 1, 1, 77),
        (4, 1, 3, 77),
    ]
    assert len(rows(run, "types", "-L", "-a", "8+4")) == 4
    assert [r["pages"] for r in rows(run, "types", "-l", "-a", "8,")] == [8]
    table = run("types", "-l", "-b", "buddy", *LAB).out
    assert "total 8 pages" in table
    assert "total" not in run("types", "-l", "-N", "-b", "buddy", *LAB).out


def test_types_walks_a_process(run):
    found = rows(run, "types", "-p", "42", "-L", "-r")
    assert [(r["voffset"], r["offset"]) for r in found] == [(16, 1), (17, 2), (19, 5), (32, 4), (33, 3)]
    assert found[2]["names"] == "swap"


def test_types_by_cgroup(run, tmp_path):
    assert sum(row["pages"] for row in rows(run, "types", "-c", "@77")) == 16
    assert rows(run, "types", "-c", "@78") == []
    assert run("types", "-c", str(tmp_path / "none"), *LAB).code == 3
    (tmp_path / "file").touch()
    assert run("types", "-c", str(tmp_path / "file"), *LAB).code == 2
    assert rows(run, "types", "-c", str(tmp_path)) == []


def test_types_of_a_saved_file_needs_no_kernel(run, tmp_path):
    path = tmp_path / "words"
    np.array([0x400] * 3 + [0x80], dtype="<u8").tofile(path)
    result = run("types", "-F", str(path), "--format", "csv")
    table = list(csv.DictReader(io.StringIO(result.out)))
    assert [(row["flags"], row["pages"]) for row in table] == [("128", "1"), ("1024", "3")]
    path.write_bytes(b"123")
    assert run("types", "-F", str(path)).code == 5
    path.write_bytes(b"")
    assert run("types", "-F", str(path), "--format", "json").out == "[]\n"
    assert run("types", "-F", str(tmp_path / "none")).code == 3


def test_types_describes_flags(run):
    assert run("types", "-d", "anon,0x20").out.split("\t")[0] == "0x0000000000001020"


def test_types_acts_only_when_told_and_able(run):
    assert "add --yes" in run("types", "-X", "-b", "anon", *LAB).err
    refused = run("types", "-i", *LAB)
    assert refused.code == 2
    assert "cannot mark idle" in refused.err


def test_types_as_page_types_prints(run):
    text = run("types", "-b", "buddy", "-l", "--format", "page-types", *LAB).out
    lines = text.splitlines()
    assert lines[0] == "offset\tlen\tflags"
    assert lines[1].startswith("8\t8\t")
    assert lines[-1] == "             total\t         8        0"


# -- map, scan, thp, dirty, doctor ---------------------------------------------------------------------


def test_map_by_mapping(run):
    found = rows(run, "map", "42")
    assert [(r["mapping"], r["rss"], r["swap"]) for r in found] == [
        ("[heap]", 8192, 4096),
        ("/lib/a file", 8192, 0),
    ]
    assert "2 mappings" in run("map", "42", *LAB).out


def test_map_never_shows_a_hidden_figure_as_zero(run):
    hidden = run("map", "42", *LAB, "--backend-option", "hidden=yes", "--format", "json")
    assert {row["rss"] for row in json.loads(hidden.out)} == {None}
    table = run("map", "42", *LAB, "--backend-option", "hidden=yes")
    assert "frame numbers are hidden" in table.out
    pages = run("map", "42", "--pages", *LAB, "--backend-option", "hidden=yes", "--format", "json")
    first = json.loads(pages.out)[0]
    assert first["pfn"] is None
    assert "pfn-hidden" in first["flags"]


def test_map_by_page(run):
    found = rows(run, "map", "42", "--pages")
    assert [(r["start"], r["pages"], r["pfn"], r["swap_offset"]) for r in found] == [
        (0x10000, 1, 1, None),
        (0x11000, 1, 2, None),
        (0x13000, 1, None, 5),
        (0x20000, 1, 4, None),
        (0x21000, 1, 3, None),
    ]
    assert [r["start"] for r in rows(run, "map", "42", "--pages", "--addr", "20000-21000")] == [0x20000]
    assert run("map", "42", "--addr", "xyz", *LAB).code == 2


def test_map_explains_a_page(run):
    text = run("map", "42", "--explain", "0x10010", *LAB).out
    for said in ("[heap]", "exclusive", "PM-007", "ANON", "KF-013", "mapped 1 times"):
        assert said in text
    found = json.loads(run("map", "42", "--explain", "0x10010", *LAB, "--format", "json").out)
    assert found["address"] == 0x10000
    assert found["mapcount"] == 1


def test_scan(run):
    found = rows(run, "scan", "42", "--all-of", "present", "--report", "present,file")
    assert [(r["start"], r["end"], r["names"]) for r in found] == [
        (0x10000, 0x12000, "present"),
        (0x20000, 0x21000, "file,present"),
        (0x21000, 0x22000, "present"),
    ]
    limited = rows(
        run,
        "scan",
        "42",
        "--any-of",
        "PAGE_IS_PRESENT",
        "--report",
        "present",
        "--max-pages",
        "1",
        "--start",
        "0x11000",
    )
    assert [r["pages"] for r in limited] == [1]
    unsure = run("scan", "42", "--all-of", "wpallowed", *LAB)
    assert unsure.code == 1
    assert "wpallowed" in unsure.err
    assert run("scan", "42", "--all-of", "pink", *LAB).code == 2
    assert run("scan", "42", "--start", "0x10001", *LAB).code == 3
    assert run("scan", "42", "--write-protect", *LAB).code == 3


def test_thp(run):
    assert rows(run, "thp", "42") == []
    empty = rows(run, "thp", "42", "--rollup", "--inc-empty", "--cont", "64K")
    assert {"anon-thp-pte-partial", "file-cont-pte-aligned-64kB"} <= {row["statistic"] for row in empty}
    assert {row["bytes"] for row in empty} == {0}
    smaps = rows(run, "thp", "--pid", "42", "--inc-smaps")
    assert {row["statistic"] for row in smaps} == {"Rss"}
    assert run("thp", "42", "--cont", "3K", *LAB).code == 2
    assert run("thp", "42", "--cont", "x", *LAB).code == 5
    assert run("thp", "42", "--cgroup", "/x", *LAB).code == 2


def test_dirty(run):
    result = run("dirty", "42", *LAB, "--interval", "0")
    assert result.code == 3
    assert "EROFS" in result.err  # a snapshot does not change
    assert run("dirty", "42", "--method", "uffd-wp", *LAB).code == 2


def test_doctor(run):
    text = run("doctor", *LAB)
    assert text.code == 0
    assert "snapshot" in text.out
    assert run("doctor", *LAB, "--backend-option", "hidden=yes").code == 1


# -- decode, spec, completion --------------------------------------------------------------------------


def test_decode(run):
    assert "PM-009" in run("decode", "--kernel", "6.18", "0x440000000000009f").out
    found = json.loads(run("decode", "--as", "kpageflags", "4096", "0x1", "--format", "json").out)
    assert [[bit["name"] for bit in one["bits"]] for one in found] == [["ANON"], ["LOCKED"]]
    lines = run(
        "decode", "--as", "categories", "-", "--format", "ndjson", stdin="10\n\n0b1\n"
    ).out.splitlines()
    assert [json.loads(line)["value"] for line in lines] == [10, 1]
    assert run("decode", "zebra").code == 5
    assert run("decode", "0x1ffffffffffffffff").code == 5
    assert run("decode", "--kernel", "99.x", "1").code == 2
    assert "page-shift" in run("decode", "--kernel", "2.6.30", "0x8600000000000005").out


def test_spec(run):
    assert "Soft-dirty" in run("spec", "pm-006").out
    assert run("spec", "SC").out.count("verified") >= 42
    assert "reproduce" in run("spec", "DV-003").out
    assert "letter" in run("spec", "KPF_THP").out
    assert "6.16" in run("spec", "scan.guard").out
    assert "PAGE_IS" in run("spec", "WRITTEN").out or "value" in run("spec", "WRITTEN").out
    listed = run("spec").out.splitlines()
    assert len(listed) == len(spec.rules()) + len(spec.divergences())
    assert "SC-012" in run("spec", "--search", "stale").out
    assert run("spec", "--search", "xyzzy").code == 5
    missed = run("spec", "PM-06")
    assert missed.code == 5
    assert "PM-006" in missed.err
    assert json.loads(run("spec", "PM-001", "--format", "json").out)[0]["id"] == "PM-001"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run, shell):
    assert "_PMCORE_COMPLETE" in run("completion", shell).out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    result = run(command, "--help")
    assert result.code == 0
    assert result.out.startswith("Usage: pmcore")


def test_sizes_for_people():
    assert [human_size(n) for n in (0, 1023, 1024, 1536, 1 << 20, 5 << 40, -2048)] == [
        "0",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "5.0 TiB",
        "-2.0 KiB",
    ]
