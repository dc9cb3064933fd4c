"""The kernel's own tools, unchanged, on some random machines: tests/mounted/compare.py with small numbers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compared(*options: str) -> str:
    """The last line but one, with the sums; nothing differs."""
    command = [sys.executable, str(HERE / "compare.py"), "--seed", "10", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout.splitlines()[-2]


def test_page_types_on_random_machines(page_types):
    told = compared("--page-types", page_types, "--machines", "12")
    assert int(told.split()[3]) > 200
    for option in ("-r", "-l", "-L", "-N", "-a", "-b", "-M", "-c", "-p"):
        assert f"'{option}': " in told


def test_thpmaps_on_machines_with_huge_pages(thpmaps):
    told = compared("--thpmaps", thpmaps, "--machines", "3")
    assert int(told.split()[5]) > 20


def test_a_scanner_in_c_gets_what_the_api_gives(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    tool = tmp_path / "scanner"
    subprocess.run([compiler, "-o", str(tool), str(HERE / "scanner.c")], check=True)
    told = compared("--scanner", str(tool), "--machines", "12")
    assert int(told.split()[3]) > 80
    assert " 0 machines changed" not in told
