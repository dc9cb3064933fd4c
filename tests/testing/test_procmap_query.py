"""PROCMAP_QUERY in a patched process: random questions are answered as the API answers them."""

from __future__ import annotations

import pytest

from pmcore.testing import fake_proc
from tests.mounted.machines import random_machine
from tests.mounted.questions import by_the_api, questions, read

asking = pytest.importorskip("tests.mounted.asking")


@pytest.mark.rule("AC-014", "AC-015", "AC-016", "FS-009")
@pytest.mark.parametrize("seed", range(30))
def test_questions_of_a_patched_process(seed):
    """300 questions to each of 30 random machines; before 6.11 all are ENOTTY."""
    machine, _ = random_machine(f"maps:{seed}", kernels=("6.12", "6.18", "6.11", "6.1"))
    asked = questions(machine, str(seed), 300)
    with fake_proc(machine):
        told = read(asking.ask(asked))
    for question, one, other in zip(asked, told, by_the_api(machine, asked), strict=True):
        assert one == other, question
