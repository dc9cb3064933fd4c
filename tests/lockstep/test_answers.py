"""Recorded answers of a real kernel, replayed against the simulator: no kernel needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmcore.errors import FormatError
from pmcore.lockstep.answers import (
    _array,
    _runs,
    answers_from_json,
    answers_to_json,
    ask,
    changes,
    replay,
)
from pmcore.lockstep.programs import programs
from pmcore.program import load_program
from pmcore.registry import open_workbench

HERE = Path(__file__).parent
KEPT = sorted((HERE / "kept").glob("*.json"))
ANSWERS = sorted((HERE / "answers").glob("*/*.json"))
WORDS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 9, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1))
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def sim(**options):
    common = {"memory": "256 MiB", "swap": "256 MiB", "hugepages": {"2 MiB": (8, 2)}, "kernel": "6.18"}
    return open_workbench("sim", **{**common, **options})


def read(path):
    return answers_from_json(path.read_text(encoding="utf-8"), source=str(path))


@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_simulator_answers_as_the_kernel_did(path):
    answers = read(path)
    kept = HERE / "kept" / path.name
    assert answers.program == load_program(kept), "record the answers again: the program has changed"
    assert answers.pfn_visible
    assert answers.version.startswith("Linux version ")
    result = replay(answers, sim(kernel=answers.profile, swap_kind=answers.swap_kind))
    assert result.agrees, "\n".join(map(str, result.differences))
    assert result.steps == len(answers.program.steps)


def test_there_are_answers():
    """Of each kernel, to most of the programs that it can run: those added since are asked at the next chance."""
    for release, least in (("6.18", 220), ("6.12", 220), ("6.1", 200)):
        there = {path.stem for path in ANSWERS if path.parent.name == release}
        assert len(there) >= least


@settings(deadline=None)
@given(WORDS)
def test_words_as_text(words):
    assert _array(_runs(np.array(words, dtype=np.uint64))).tolist() == words


def test_words_that_repeat_or_ascend_are_short():
    assert _runs(np.array([0, 0, 0, 7, 8, 9, 9, 9, 3], dtype=np.uint64)) == "0*3 7+3 9*2 3"


@SLOW
@given(programs(max_steps=15))
def test_answers_survive_their_text(program):
    """Written and read they are what they were, and a machine of other size answers the same."""
    answers = ask(program, sim())
    again = answers_from_json(answers_to_json(answers))
    assert again.program == program
    assert again.profile == answers.profile
    assert changes(answers, again).agrees
    assert answers_to_json(again) == answers_to_json(answers)
    assert replay(again, sim(memory="512 MiB")).agrees


@pytest.mark.parametrize("name", ["collapse", "guard-regions", "swap-cache", "reuse-after-exit"])
def test_other_answers_are_found(name):
    """A count, a flag, a word changed by hand after the last step."""
    program = load_program(HERE / "kept" / f"{name}.json")
    answers = answers_from_json(answers_to_json(ask(program, sim())))
    last = len(program.steps) - 1
    look = answers.looks[last]
    for column, bit in ((look.kpagecount, 3), (look.kpageflags, 3), (look.tasks["main"].words, 56)):
        column[-1] ^= np.uint64(1 << bit)
        assert replay(answers, sim()).differs_at == last
        column[-1] ^= np.uint64(1 << bit)
    assert replay(answers, sim()).agrees


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pmcore_answers": 2}', '{"pmcore_answers": 3}'])
def test_what_is_no_answers(text):
    with pytest.raises(FormatError):
        answers_from_json(text)


def test_missing_parts():
    good = json.loads(answers_to_json(ask(load_program(KEPT[0]), sim())))
    for change in (
        {"steps": []},
        {"vmas": []},
        {"program": {}},
        {"profile": {}},
        {"steps": [{"outcome": {}, "pfns": "0*99999999999"}] * len(good["steps"])},
    ):
        with pytest.raises(FormatError):
            answers_from_json(json.dumps({**good, **change}))
