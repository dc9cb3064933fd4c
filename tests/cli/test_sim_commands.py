"""pmcore tour and pmcore lockstep, on simulated machines alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pmcore.program import Program, save_program
from pmcore.program import steps as s


def pmcore(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pmcore.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("kernel", ["6.18", "6.12", "6.1", "4.19"])
def test_the_tour_runs_anywhere(kernel):
    done = pmcore("tour", "--no-live", "--kernel", kernel)
    assert done.returncode == 0, done.stderr
    assert f"Linux {kernel}" in done.stdout
    for words in ("1. map", "[VM-001]", "+exclusive", "21. unmap"):
        assert words in done.stdout


def test_the_tour_of_a_program_of_ones_own(tmp_path):
    save_program(
        Program(name="mine", steps=(s.Map(area="a", pages=1), s.Touch(area="a", pages=2))), tmp_path / "p"
    )
    done = pmcore("tour", "--no-live", "--program", str(tmp_path / "p"))
    assert done.returncode == 0, done.stderr
    assert "SIGSEGV" in done.stdout
    assert pmcore("tour", "--no-live", "--program", str(tmp_path / "missing")).returncode == 2


def test_lockstep_of_two_models():
    done = pmcore(
        "lockstep",
        "--right",
        "sim",
        "--kernel",
        "6.12",
        "--programs",
        "8",
        "--format",
        "json",
        "--no-progress",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["programs"], report["differences"]) == (8, 0)


def test_a_replay(tmp_path):
    save_program(
        Program(name="p", steps=(s.Map(area="a", pages=1), s.Touch(area="a", pages=1))), tmp_path / "p"
    )
    done = pmcore("lockstep", "--right", "sim", "--replay", str(tmp_path / "p"))
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "2 steps, 0 scans")
    (tmp_path / "broken").write_text("{}")
    assert pmcore("lockstep", "--right", "sim", "--replay", str(tmp_path / "broken")).returncode == 5


def test_where_it_cannot_run():
    done = pmcore("lockstep", "--right", "nothing", "--programs", "1")
    assert done.returncode == 2
    assert "no backend 'nothing'" in done.stderr


def test_dump_and_proc_root(tmp_path):
    """A machine as files, and the commands that look at it there; contradictions are told."""
    program = tmp_path / "p.json"
    save_program(Program(name="p", steps=(s.Map(area="a", pages=4), s.Touch(area="a", pages=3))), program)
    place = str(tmp_path / "dump")
    done = pmcore("dump", place, "--machine", str(program), "--format", "json")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)
    assert (row["path"], row["refused"]) == (place, 0)
    mapped = json.loads(pmcore("map", "1", "--proc-root", place, "--format", "json").stdout)
    assert mapped[0]["rss"] == 3 * 4096
    again = pmcore("types", "--backend", f"recording:{place}", "--format", "json")
    assert again.stdout == pmcore("types", "--proc-root", place, "--format", "json").stdout
    for arguments, code in (
        (("dump", place), 2),
        (("dump", f"{place}2", "--machine", str(program), "--backend", "procfs"), 2),
        (("types", "--proc-root", place, "--backend", "recording:x"), 2),
        (("types", "--proc-root", str(tmp_path / "none")), 3),
    ):
        assert pmcore(*arguments).returncode == code, arguments
