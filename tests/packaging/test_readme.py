"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.live
@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run_and_print_what_they_say(code):
    if "procfs" in code and not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for promised in re.findall(r"print\(.*\)\s+# (\[.*?\])", code):
        assert promised in done.stdout
    assert not done.stdout.startswith("0 regions")


def test_examples_of_documents_run(tmp_path):
    """docs/*.md: what is written in Python runs, and prints what it says."""
    ran = 0
    for document in sorted((README.parent / "docs").glob("*.md")):
        for code in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            command = [sys.executable, "-P", "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            for promised in re.findall(r"print\(.*\)\s+# (\d+)$", code, re.MULTILINE):
                assert promised in done.stdout.split()
                ran += 1
    assert ran


def test_there_is_an_example_for_each_kind_of_user():
    assert len(EXAMPLES) >= 5


def test_commands_are_those_of_the_tool():
    from pmcore.cli.entry import COMMANDS

    text = README.read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"pmcore {command}" in text or command == "completion"


def test_counterparts_name_options_that_there_are():
    """docs/page-types.md: every option of the two columns of ours exists, and none of page-types' is left out."""
    from pmcore.cli.thp import command as thp
    from pmcore.cli.types_ import command as types

    table = (README.parent / "docs" / "page-types.md").read_text(encoding="utf-8")
    first, second = table.split("## thpmaps")
    for text, command in ((first, types), (second, thp)):
        offered = {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}
        for row in re.findall(r"^\| `[^|]*` \| ([^|]*) \|", text, re.MULTILINE):
            assert set(re.findall(r"--?[a-zA-Z][-a-z]*", row)) <= offered, row
    named = set(re.findall(r"^\| `(-\w)", first, re.MULTILINE))
    assert named == {f"-{letter}" for letter in "rdabcpfilLCMNXxFh"}
