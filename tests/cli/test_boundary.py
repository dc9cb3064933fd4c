"""The command line as a program: formats for machines, errors in one line, pipes, start-up."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import pytest

from pmcore import errors
from pmcore.cli import entry

LAB = ("--backend", "lab")


def test_all_formats_say_the_same(run):
    as_json = json.loads(run("types", *LAB, "--format", "json").out)
    as_lines = [json.loads(line) for line in run("types", *LAB, "--format", "ndjson").out.splitlines()]
    as_csv = list(csv.DictReader(io.StringIO(run("types", *LAB, "--format", "csv").out)))
    assert as_json == as_lines
    assert [{key: str(value) for key, value in row.items()} for row in as_json] == as_csv


def test_arrow(process, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the extra arrow is not installed")
    words = tmp_path / "words"
    words.write_bytes((0x400).to_bytes(8, "little") * 3 + ((1 << 63) | 1).to_bytes(8, "little"))
    done = process("types", "-r", "-F", str(words), "--format", "arrow")
    assert done.returncode == 0, done.stderr
    table = pa.ipc.open_stream(done.stdout).read_all()
    assert table.column_names == ["flags", "pages", "bytes", "symbolic", "names"]
    assert table["flags"].to_pylist() == [0x400, 1 << 63 | 1]
    assert table["bytes"].to_pylist() == [3 * 4096, 4096]


def test_errors_are_one_line_and_a_remedy(run):
    for arguments, code in (
        (("types", "--backend", "nobody"), 4),
        (("map", "43", *LAB), 3),
        (("map", "x", *LAB), 2),
        (("types", "-b", "ananas", *LAB), 5),
        (("types", "--backend", "procfs", "--backend-option", "colour=red"), 2),
        (("types", *LAB, "--backend-option", "novalue"), 2),
        (("decode", "1", "--kernel", "1.0"), 2),
        (("types", "-p", "1", "-f", "x", *LAB), 2),
    ):
        result = run(*arguments)
        assert result.code == code, arguments
        assert result.out == ""
        assert result.err.startswith("pmcore: ")
        assert len(result.err.splitlines()) <= 2
        assert "Traceback" not in result.err


def test_wrong_usage_is_2(run):
    for arguments in (("nothing",), ("types", "--colour"), ("types", "--format", "yaml"), ("map",)):
        assert run(*arguments).code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.HiddenPfn("this"), 3),
        (errors.NotModelled("that"), 3),
        (errors.syscall_error(1, "open(x)", remedy="be root"), 3),
        (errors.BackendUnavailable("none", remedy="install one"), 4),
        (errors.FormatError("bad", source="f:1"), 5),
        (errors.UnknownCapability("what"), 2),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 0),
        (ZeroDivisionError("bug"), 1),
    ],
)
def test_every_error_has_its_code(run, monkeypatch, error, code):
    from pmcore.cli import doctor

    def fail(*_args):
        raise error

    monkeypatch.setattr(doctor, "open_backend", fail)
    monkeypatch.setattr(entry.os, "dup2", lambda *_args: None)
    result = run("doctor")
    assert result.code == code
    assert "Traceback" not in result.err


def test_a_bug_of_ours_can_be_traced(run, monkeypatch):
    from pmcore.cli import doctor

    def fail(*_args):
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "open_backend", fail)
    assert "PMCORE_TRACEBACK" in run("doctor").err
    monkeypatch.setenv("PMCORE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run("doctor")


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    words = tmp_path / "words"
    words.write_bytes(b"".join((i % 7).to_bytes(8, "little") for i in range(100_000)))
    command = [sys.executable, "-m", "pmcore.cli", "types", "-F", str(words), "-L"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 0


def test_piped_output_is_plain_and_whole(process, tmp_path):
    words = tmp_path / "words"
    words.write_bytes(((1 << 27) - 1).to_bytes(8, "little"))
    done = process("types", "-F", str(words), env={**os.environ, "COLUMNS": "40"})
    assert b"\x1b" not in done.stdout
    assert b"pgtable" in done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom pmcore.cli import entry\nentry._run(['--help'])\n"
        "heavy = {'numpy', 'rich', 'attrs', 'pmcore.spec', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


def test_the_missing_extra_is_named():
    code = "import sys\nsys.modules['click'] = None\nfrom pmcore.cli.entry import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "pmcore: the command line needs click and rich; pip install 'pmcore[cli]'\n"


def test_version(process):
    import pmcore

    assert pmcore.__version__ in process("--version").stdout.decode()
