"""The wheel holds everything, and what is imported is the wheel."""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import entry_points, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

import pytest

import pmcore
from pmcore._version import __version__

ROOT = Path(__file__).resolve().parents[2]
HOMES = {"pmcore": "pmcore", "backends": "pmcore/backends", "spec": "pmcore/spec"}


def test_version_has_one_source():
    assert version("pmcore") == __version__ == pmcore.__version__


def test_core_needs_attrs_and_numpy_alone():
    needed = [line for line in requires("pmcore") or [] if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in needed) == ["attrs", "numpy"]


def test_backends_and_command_are_declared():
    [procfs] = entry_points(group="pmcore.backends", name="procfs")
    assert callable(procfs.load())
    assert [e.value for e in entry_points(group="console_scripts", name="pmcore")] == [
        "pmcore.cli.entry:main"
    ]
    assert metadata("pmcore")["License-Expression"] == "MIT"


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    there = set()
    for folder, package in HOMES.items():
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.toml")]:
            inside = path.parent.relative_to(ROOT / folder).parts
            there.add(".".join((package.replace("/", "."), *inside)))
    assert sorted(there) == sorted(listed)


def test_every_file_is_installed():
    installed = Path(pmcore.__file__).parent
    missing = []
    for folder, package in HOMES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in {".py", ".toml", ".typed", ".json"}:
                continue
            inside = path.relative_to(ROOT / folder)
            target = installed.parent / package / inside
            if not os.environ.get("PMCORE_TEST_WHEEL"):
                module = ".".join((package.replace("/", "."), *inside.with_suffix("").parts))
                if path.suffix == ".py" and find_spec(module.removesuffix(".__init__")) is None:
                    missing.append(str(path))
            elif not target.is_file():
                missing.append(str(target))
    assert missing == []


def test_the_wheel_is_what_is_tested():
    if not os.environ.get("PMCORE_TEST_WHEEL"):
        pytest.skip("tox tests the wheel; this run does not")
    assert ROOT not in Path(pmcore.__file__).resolve().parents or ".tox" in Path(pmcore.__file__).parts
    assert "site-packages" in Path(pmcore.__file__).parts
