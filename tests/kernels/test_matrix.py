"""The parts of the kernel matrix that can be tried without booting anything."""

import base64
import io
import json
import shutil
import subprocess
import zlib

import numpy as np
import pytest

from pmcore.lockstep.answers import answers_from_json, answers_to_json, ask
from pmcore.lockstep.generator import Seeded, random_program
from pmcore.registry import open_workbench
from tests.kernels.archive import choices
from tests.kernels.asked import compared, machine_for
from tests.kernels.image import Cpio
from tests.kernels.table import summary, write_table


def test_the_matrix_names_its_kernels_once():
    names = [choice.name for choice in choices()]
    assert {"6.12", "6.1"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio here to read archives with")
def test_archives_are_read_by_cpio(tmp_path):
    out = io.BytesIO()
    cpio = Cpio(out)
    cpio.file("a/b/odd", b"12345", 0o755)
    cpio.file("a/b/odd", b"a second one is left out")
    cpio.link("a/link", "b/odd")
    cpio.close()
    assert len(out.getvalue()) % 512 == 0
    subprocess.run(["cpio", "-id", "--quiet"], input=out.getvalue(), cwd=tmp_path, check=True)
    assert (tmp_path / "a" / "link").read_bytes() == b"12345"
    assert (tmp_path / "a" / "b" / "odd").stat().st_mode & 0o777 == 0o755


def told(**random):
    lines = [
        {"kind": "kernel", "name": "6.12 (probed)", "release": "6.12", "capabilities": ["pagemap"]},
        {"kind": "kept", "program": "p", "steps": 3, "scans": 1, "masks": {"DV-018": 2}, "difference": None},
        {"kind": "kept", "program": "q", "not_modelled": "files"},
        {
            "kind": "random",
            "programs": 25,
            "steps": 100,
            "scans": 9,
            "masks": {},
            "not_modelled": {},
            "differences": 0,
            **random,
        },
        {"kind": "end", "complete": True},
    ]
    return {
        "lines": lines,
        "kernel": {"release": "6.12.1-x", "package": "1", "config": ["CONFIG_A=y"], "swap": "s"},
    }


def test_figures_of_a_kernel():
    found = summary(told(), seed=4)
    assert (found["kept"], found["programs"], found["steps"], found["differences"]) == (1, 25, 103, 0)
    assert (found["masks"], found["not_modelled"], found["complete"]) == ({"DV-018": 2}, 1, True)


def test_a_difference_is_counted_and_kept():
    found = summary(
        told(differences=1, found=[{"number": 7, "at": 3, "program": {}, "differences": []}]), seed=4
    )
    assert found["differences"] == 1
    assert found["found"][0]["at"] == 3


def test_the_table_shows_where_kernels_differ(tmp_path):
    for name, more in (("6.12", ["scan"]), ("6.1", [])):
        found = summary(told(), seed=4)
        found["capabilities"] = ["pagemap", *more]
        (tmp_path / f"{name}.json").write_text(json.dumps({"date": "2026-01-01", **found, "release": name}))
    write_table(tmp_path, tmp_path / "kernels.md")
    text = (tmp_path / "kernels.md").read_text()
    assert text.index("| 6.1 |") < text.index("| 6.12 |")
    assert "| `scan` |  | yes |" in text
    assert "`pagemap`" not in text


def test_answers_are_compared_where_nothing_is_booted():
    """A machine's own answers agree with it; with one bit changed they are told as a difference."""
    program = random_program(Seeded("3:1"), None, max_steps=12)
    with_machine = ask(program, open_workbench("sim", memory="64 MiB", swap="8 MiB", kernel="6.12"))
    answers = answers_from_json(answers_to_json(with_machine))
    assert machine_for(answers).kernel.profile == answers.profile

    def line():
        text = base64.b64encode(zlib.compress(answers_to_json(answers).encode())).decode()
        return {"kind": "answers", "program": "3:1", "text": text}

    last = {"kind": "end", "complete": True}
    same, end = compared([line(), last])
    assert (same["kind"], same["programs"], same["found"]) == ("random", 1, [])
    assert end == last
    answers.looks[-1].tasks["main"].words[-1] ^= np.uint64(1 << 57)
    (other,) = compared([line()])
    assert other["found"][0]["at"] == len(program.steps) - 1
    (cannot,) = compared([{"kind": "answers", "program": "k", "cannot": "no such size"}])
    assert cannot == {"kind": "kept", "program": "k", "not_modelled": "no such size"}
