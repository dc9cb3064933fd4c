"""PROCMAP_QUERY through a mounted machine: random questions are answered as the API answers them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import asking
from .machines import random_machine
from .questions import by_the_api, questions, read

EXECUTE = """
import sys
sys.path.append({root!r})
from pmcore.mounted import Tree, execute
from pmcore.procview import ProcView
from tests.mounted.machines import random_machine
machine, _ = random_machine({seed!r}, kernels=("6.12", "6.18", "6.11"))
sys.exit(execute(Tree(ProcView(machine)), sys.argv[1:]))
"""


@pytest.mark.rule("AC-014", "AC-015", "AC-016", "FS-009")
@pytest.mark.parametrize("seed", range(4))
def test_questions_through_the_mount(tmp_path, seed):
    """400 questions to a random machine: answers, names and refusals."""
    machine, _ = random_machine(f"maps:{seed}", kernels=("6.12", "6.18", "6.11"))
    asked = questions(machine, str(seed), 400)
    (tmp_path / "asked").write_text(json.dumps(asked))
    script = EXECUTE.format(root=str(Path(__file__).parents[2]), seed=f"maps:{seed}")
    command = [sys.executable, "-c", script, sys.executable, asking.__file__, str(tmp_path / "asked")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    told, expected = read(json.loads(done.stdout)), by_the_api(machine, asked)
    for question, one, other in zip(asked, told, expected, strict=True):
        assert one == other, question
    assert {22, 2, 7} <= {answer for answer in expected if isinstance(answer, int)}
    assert sum(not isinstance(answer, int) for answer in expected) > 60
