"""spec/operations.md is what the steps, the kept programs and the answers say."""

from __future__ import annotations

from tests.lockstep import operations

#: Kinds of steps that no kept program has, and why.
WITHOUT = {"limitgroup": "what a group uses differs from kernel to kernel: test_cgroups.py, test_findings.py"}


def test_the_table_is_as_the_command_writes_it():
    text = operations.TABLE.read_text(encoding="utf-8")
    assert text == operations.table(), "python tests/lockstep/operations.py"


def test_every_operation_has_a_kept_program():
    """One for each kind of step, and for each advice that the simulated machine knows."""
    having = {
        name: {operations.operation(step) for step in p.steps} for name, p in operations.programs().items()
    }
    every = set().union(*having.values())
    missing = {what for what, _ in operations.operations(having)} - every
    assert missing == WITHOUT.keys()


def test_what_is_not_modelled_is_found_in_the_source():
    words = [said for _, said, _ in operations.refused()]
    assert "swapping out a large folio of shared memory whole" in words
    assert all(words)
