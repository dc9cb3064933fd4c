"""The law holds together: tables, rules, coverage and tests refer to each other and to the code."""

from __future__ import annotations

import ast
import hashlib
import itertools
import os
import re
from pathlib import Path

import pytest

from pmcore import spec

from .sentences import pieces

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
#: Rules that no kernel at hand can show and no code of ours acts on; each says so in its `verified`.
UNTESTABLE: dict[str, str] = {}


def rules_named_in_tests(*, live: bool = False) -> set[str]:
    """Every rule number in a `pytest.mark.rule(...)`, also by way of a tuple of strings in the same module.

    `live`: only in modules whose tests look at a running kernel.
    """
    found: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        if live and "pytest.mark.live" not in text and path.parent.name != "live":
            continue
        tree = ast.parse(text)
        constants = {
            target.id: [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.rule":
                for argument in node.args:
                    if isinstance(argument, ast.Constant):
                        found.add(argument.value)
                    elif isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Name):
                        found.update(constants[argument.value.id])
    return found


def test_every_rule_has_a_test():
    assert sorted(spec.rules().keys() - rules_named_in_tests() - UNTESTABLE.keys()) == []


def test_what_is_said_to_be_shown_live_has_a_live_test():
    claimed = {
        rule.id for rule in spec.rules().values() if any(how.startswith("live") for how in rule.verified)
    }
    assert sorted(claimed - rules_named_in_tests(live=True)) == []


def test_tests_name_rules_that_exist():
    assert sorted(rules_named_in_tests() - spec.rules().keys()) == []


def test_rule_numbers_are_stable_and_without_gaps():
    families: dict[str, list[int]] = {}
    for number in spec.rules():
        family, _, digits = number.partition("-")
        assert re.fullmatch(r"[A-Z]{2}-\d{3}", number)
        assert family != "DV"
        families.setdefault(family, []).append(int(digits))
    for family, numbers in families.items():
        assert numbers == list(range(1, len(numbers) + 1)), family


def test_rules_say_where_they_come_from():
    for rule in spec.rules().values():
        assert rule.text.endswith("."), rule.id
        assert rule.source, rule.id
        assert rule.verified or rule.id == "AC-007", rule.id
        spec.parse_version(rule.since)
        if rule.capability is not None:
            assert rule.capability in spec.features(), rule.id


def test_tables_name_rules_that_exist():
    rows = [
        *spec.pagemap_bits(),
        *spec.kpageflags(),
        *spec.scan_categories(),
        *spec.scan_flags(),
        *spec.permissions(),
    ]
    named = {row.rule for row in rows} | {n for row in spec.features().values() for n in row.rules}
    named |= {n for row in spec.divergences().values() for n in row.rules}
    assert sorted(named - spec.rules().keys()) == []


def test_tables_name_capabilities_that_exist():
    rows = [*spec.pagemap_bits(), *spec.kpageflags(), *spec.scan_categories(), *spec.scan_flags()]
    assert {row.capability for row in rows if row.capability} <= spec.features().keys()


def test_code_asks_for_capabilities_that_exist():
    asked = set()
    for folder in ("pmcore", "backends"):
        if not (ROOT / folder).is_dir():
            pytest.skip("the source tree is not at hand")
        for path in (ROOT / folder).rglob("*.py"):
            asked |= set(
                re.findall(r"""\.has\(\s*["']([a-z_.]+)["']\s*\)""", path.read_text(encoding="utf-8"))
            )
    assert asked
    assert sorted(asked - spec.features().keys()) == []


def test_no_code_compares_versions():
    """Versions are compared in one place: where presets are made."""
    for folder in ("pmcore", "backends"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "profile.py":
                assert "version_in(" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("row", spec.divergences().values(), ids=lambda row: row.id)
def test_divergences_say_how_to_see_them(row):
    assert row.text.endswith(".")
    assert row.kernels
    assert row.reproduce.strip()
    named = re.search(r"pytest (\S+) -k (\w+)", row.reproduce)
    if named:
        assert re.search(rf"def test_\w*{named[2]}", (ROOT / named[1]).read_text(encoding="utf-8"))
    elif "import" in row.reproduce:
        ast.parse(row.reproduce.strip())


@pytest.mark.parametrize("document", spec.documents())
def test_every_sentence_has_a_rule(document):
    for sentence in spec.coverage(document):
        assert set(sentence.rules) <= spec.rules().keys(), sentence
        assert bool(sentence.rules) == (sentence.kind == "rule"), sentence
        assert sentence.kind in {"rule", "heading", "pointer"}


#: Lines of the documents that are blank beside another blank one.
TWICE_BLANK = {"pagemap": [], "soft-dirty": [20, 43], "idle_page_tracking": []}


@pytest.mark.parametrize("document", spec.documents())
def test_sentences_are_in_order_and_leave_no_line_out(document):
    previous = (0, 0)
    covered: set[int] = set()
    for sentence in spec.coverage(document):
        first, last = sentence.span
        assert (first, sentence.part) > previous
        previous = (first, sentence.part)
        covered |= set(range(first, last + 1))
    # What is in no sentence is blank (nearly all of those stand alone), or the ruler of a title.
    outside = sorted(set(range(1, spec.document_lines(document) + 1)) - covered)
    assert [a for a, b in itertools.pairwise(outside) if b - a == 1] == TWICE_BLANK[document]


@pytest.mark.parametrize("document", spec.documents())
def test_coverage_is_that_of_the_document(document):
    """With the documents at hand, side by side: the same sentences on the same lines, by their digests."""
    path = os.environ.get("PMCORE_PAGEMAP_RST")
    if not path:
        pytest.skip("set PMCORE_PAGEMAP_RST to Documentation/admin-guide/mm/pagemap.rst of Linux 6.12")
    text = Path(path).with_name(f"{document}.rst").read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode()).hexdigest() == spec.document_digest(document)
    expected = [(p.lines, p.part, p.digest) for p in pieces(text)]
    assert [(s.lines, s.part, s.digest) for s in spec.coverage(document)] == expected


def test_unknown_rule_suggests_close_ones():
    with pytest.raises(spec.UnknownRule, match="PM-006") as caught:
        spec.rule("PM-06")
    assert "PM-006" in caught.value.close
    assert isinstance(caught.value, KeyError)
    assert spec.rule("PM-006").title == "Soft-dirty"


def test_versions_compare_by_number():
    assert spec.version_in("6.10", "6.7", "6.12")
    assert not spec.version_in("6.12", "6.7", "6.12")
    assert not spec.version_in("6.9", "6.10", None)
    assert spec.version_in("2.6.25", "2.6.25", None)
