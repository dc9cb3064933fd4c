"""Errors, geometry, profiles, the registry, explanations, and the conveniences of the protocols."""

from __future__ import annotations

import errno
import importlib.metadata
import pickle
import subprocess
import sys
from importlib.metadata import EntryPoint

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pmcore
from pmcore import errors, registry, spec
from pmcore.explain import explain_categories
from pmcore.geometry import Geometry, align_down, align_up, parse_size
from pmcore.pagemap import PagemapEntry
from pmcore.profile import preset
from pmcore.protocols import FrameFile
from pmcore.testing.snapshot import SnapshotKernel

# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "ours", "builtin"),
    [
        (errno.EPERM, errors.NotPermitted, PermissionError),
        (errno.EACCES, errors.NotPermitted, PermissionError),
        (errno.ESRCH, errors.ProcessGone, ProcessLookupError),
        (errno.ENOENT, errors.Missing, FileNotFoundError),
        (errno.EINVAL, errors.InvalidArgument, ValueError),
        (errno.ENOMEM, errors.OutOfMemory, MemoryError),
        (errno.EEXIST, errors.Exists, FileExistsError),
        (errno.ENOTTY, errors.NotSupported, OSError),
        (errno.EXDEV, errors.SyscallError, OSError),
    ],
)
def test_errors_are_the_nearest_builtin_too(number, ours, builtin):
    error = errors.syscall_error(number, "open(x)", remedy="do this")
    assert type(error) is ours
    assert isinstance(error, builtin)
    assert isinstance(error, errors.PmcoreError)
    assert error.errno == number
    assert error.call == "open(x)"
    assert str(error).startswith("open(x): E")
    assert str(error).endswith("; do this")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.errno, str(again)) == (ours, number, str(error))


def test_hidden_frames_are_a_permission_matter():
    error = errors.HiddenPfn("a survey")
    assert isinstance(error, PermissionError)
    assert error.errno == errno.EPERM
    assert "CAP_SYS_ADMIN" in str(error)


# -- geometry --------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 60), st.sampled_from([1 << n for n in range(31)]))
def test_alignment(value, alignment):
    low, high = align_down(value, alignment), align_up(value, alignment)
    assert low <= value <= high
    assert low % alignment == high % alignment == 0
    assert high - low in (0, alignment)


@pytest.mark.parametrize(
    ("shift", "order", "pmd"), [(12, 9, 2 << 20), (14, 11, 32 << 20), (16, 13, 512 << 20)]
)
def test_shape_follows_the_page_size(shift, order, pmd):
    geometry = Geometry(page_shift=shift, task_size=1 << 47)
    assert (geometry.pmd_order, geometry.pmd_size, geometry.pmd_pages) == (order, pmd, 1 << order)
    assert geometry.pud_size == pmd << order


def test_ranges_are_whole_pages():
    assert Geometry().pages(4096, 12288) == 2
    for start, end in ((1, 4096), (0, 4097), (8192, 4096)):
        with pytest.raises(errors.ArgumentError):
            Geometry().pages(start, end)
    with pytest.raises(errors.ArgumentError):
        Geometry(task_size=4097)


# -- profiles --------------------------------------------------------------------------------------------


@pytest.mark.rule("AC-002", "KC-006")
def test_presets_follow_the_tables():
    assert preset("4.0").has("pagemap.open_needs_admin")
    assert not preset("4.2").has("pagemap.open_needs_admin")
    assert not preset("6.6").has("scan")
    assert preset("6.7").has("scan")
    assert not preset("6.7").has("scan.soft_dirty")
    assert preset("6.8").has("scan.soft_dirty")
    assert not preset("6.18").has("kpagecount.average")
    assert preset("6.18", config=["CONFIG_NO_PAGE_MAPCOUNT"]).has("kpagecount.average")
    assert not preset("6.12", config=["!CONFIG_MEM_SOFT_DIRTY"]).has("pagemap.soft_dirty")
    assert preset("6.12.117-1-cloud-amd64").name == "6.12"


@pytest.mark.parametrize("row", spec.kernels(), ids=lambda row: row.version)
def test_every_release_is_a_preset(row):
    profile = preset(row.version)
    assert profile.name == row.version
    assert profile.has("pagemap")


@pytest.mark.parametrize(
    "version",
    [
        "",
        "x",
        "2.4.1",
        "2.6.40",
        "3.99",
        "42.1",
        "2.6.24",
        "1.0",
        "6",
        "6.x",
        "-6.1",
        "6.12\0",
        "9" * 400,
        "٦.١",
    ],
)
def test_absurd_versions_are_refused(version):
    with pytest.raises(errors.UnknownCapability):
        preset(version)


def test_unknown_names_are_refused():
    with pytest.raises(errors.UnknownCapability, match="sofd_dirty"):
        preset().has("pagemap.sofd_dirty")
    with pytest.raises(errors.UnknownCapability):
        preset().changed(add=["x"])
    with pytest.raises(errors.UnknownCapability, match="CONFIG_NONE"):
        preset(config=["CONFIG_NONE"])
    changed = preset().changed(name="mine", remove=["scan"])
    assert not changed.has("scan")
    assert changed.name == "mine"


# -- registry --------------------------------------------------------------------------------------------


def test_backends_are_found_without_being_imported():
    code = (
        "import sys, pmcore\nassert 'procfs' in pmcore.available_backends()\n"
        "assert not any(m.startswith('pmcore.backends.') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_backend_names_those_there_are():
    with pytest.raises(errors.BackendUnavailable, match="procfs") as caught:
        pmcore.open("procf")
    assert caught.value.remedy == "did you mean 'procfs'?"


@pytest.fixture
def strangers(monkeypatch):
    """Backends of other distributions."""

    def add(**places):
        points = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in places.items()]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)

    return add


def test_a_backend_that_cannot_be_imported(strangers):
    strangers(broken="no_such_module_at_all:f", empty="pmcore.errors:no_such_name")
    for name in ("broken", "empty"):
        with pytest.raises(errors.BackendUnavailable, match="cannot be imported"):
            pmcore.open(name)


def test_a_backend_of_somebody_else(strangers):
    strangers(theirs="pmcore.testing.snapshot:SnapshotKernel")
    assert pmcore.open("theirs", pfn_visible=False).pfn_visible is False


def test_nobody_shadows_ours_and_the_kill_switch_leaves_them(strangers, monkeypatch):
    strangers(procfs="m:f", stranger="m:f")
    group = registry.ENTRY_POINT_GROUP
    assert registry.backends() == ("procfs", "recording", "sim", "stranger")
    assert registry._found(group)["procfs"] == registry._OWN[group]["procfs"]
    monkeypatch.setenv(registry.KILL_SWITCH, "1")
    assert registry.backends() == ("procfs", "recording", "sim")


@pytest.mark.parametrize("group", [registry.ENTRY_POINT_GROUP, registry.WORKBENCH_GROUP])
def test_our_backends_are_those_that_we_declare(group):
    points = importlib.metadata.distribution("pmcore").entry_points.select(group=group)
    assert {p.name: p.value for p in points} == registry._OWN[group]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("64 MiB", 64 << 20),
        ("1g", 1 << 30),
        ("12KB", 12 << 10),
        ("7", 7),
        ("1 TiB", 1 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5G", "1 EiB", -1, True, None, "9" * 30, "1 G x"])
def test_what_is_no_size(text):
    with pytest.raises(errors.ArgumentError):
        parse_size(text)


def test_procfs_says_that_it_needs_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(errors.BackendUnavailable, match="Linux"):
        pmcore.open("procfs")


# -- the top level ---------------------------------------------------------------------------------------


def test_every_public_name_is_there():
    for name in pmcore.__all__:
        assert getattr(pmcore, name) is not None
    assert set(pmcore.__all__) <= set(dir(pmcore))
    with pytest.raises(AttributeError):
        _ = pmcore.nothing_of_that_name


def test_importing_costs_nothing_until_used():
    code = "import sys, pmcore\nassert 'numpy' not in sys.modules and 'attrs' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- explanations ----------------------------------------------------------------------------------------


@given(st.integers(0, (1 << 64) - 1), st.sampled_from(["2.6.25", "3.11", "4.0", "6.12", "6.18"]))
def test_explanations_name_every_bit_that_is_set(value, version):
    explanation = PagemapEntry(value, profile=preset(version)).explain()
    covered = 0
    for line in explanation.lines:
        first, last = line.bits
        covered |= (1 << last + 1) - (1 << first)
        assert line.rule is None or spec.rule(line.rule)
    assert value & ~covered == 0
    assert explanation.as_dict()["value"] == value
    assert str(explanation).startswith("pagemap entry 0x")


@pytest.mark.rule("AC-003")
def test_a_hidden_frame_is_said_to_be_hidden():
    text = str(PagemapEntry(1 << 63).explain())
    assert "hidden" in text
    assert "AC-003" in text


def test_categories_explain_themselves():
    lines = explain_categories(0b1010 | 1 << 8 | 1 << 40, profile=preset("6.18")).lines
    assert [line.name for line in lines] == ["WRITTEN", "PRESENT", "GUARD", "bit_40"]
    older = explain_categories(1 << 8, profile=preset("6.12")).lines
    assert [line.name for line in older] == ["bit_8"]


# -- protocols -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 999), max_size=60))
def test_frames_at_any_places(pfns):
    words = np.arange(1000, dtype=np.uint64) * np.uint64(7)
    kernel = SnapshotKernel(kpageflags=words)
    found = kernel.frames_at(FrameFile.KPAGEFLAGS, np.array(pfns, dtype=np.uint64))
    assert found.tolist() == [pfn * 7 for pfn in pfns]


def test_frames_past_the_end_read_zero():
    kernel = SnapshotKernel(kpageflags=np.ones(4, dtype=np.uint64))
    found = kernel.frames_at(FrameFile.KPAGEFLAGS, np.array([3, 4, 1 << 40], dtype=np.uint64))
    assert found.tolist() == [1, 0, 0]
    assert len(kernel.kpageflags(2)) == 2
    assert len(kernel.kpageflags(9)) == 0
    with pytest.raises(errors.ArgumentError):
        kernel.kpageflags(-1)


@pytest.mark.parametrize("version", ["6.18", "6.12", "6.1", "4.1", "2.6.25"])
def test_profiles_as_rows(version):
    """Kept by their difference from the preset: what is written down later holds for them, too."""
    import json

    from pmcore.profile import profile_from_row, profile_row

    plain = preset(version, config=["!CONFIG_MEM_SOFT_DIRTY"])
    changed = plain.changed(name=f"{version}.99-x (probed)", add=["scan"], remove=["kpagecount"])
    for profile in (plain, changed, attrs.evolve(plain, name="mine")):
        row = json.loads(json.dumps(profile_row(profile)))
        assert profile_from_row(row) == profile
        assert profile_from_row({**row, "add": [*row["add"], "from.tomorrow"]}) == profile
    row = profile_row(changed)
    assert row["preset"] == version
    assert len(row["add"]) <= 1
    assert row["remove"] == ["kpagecount"]
