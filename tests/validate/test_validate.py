"""The validator itself: what tools may say, what is found, how it is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pmcore import spec
from pmcore.errors import ArgumentError, FormatError
from pmcore.protocols import FrameFile
from pmcore.validate import ADAPTERS, CommandTool, FunctionTool, Truth, cases, validate
from pmcore.validate.case import load_case
from pmcore.validate.says import read_says
from pmcore.validate.truth import NUMBERS, RULES

from .careful import careful

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = 4096
CASES = {case.name: case for case in cases()}


def truthful(scene, **changed):
    """Everything that is true of the scene, with `changed` put over it."""
    truth = Truth.of(scene.shown, scene.pid)
    pages = []
    for index, start in enumerate(truth.addresses.tolist()):
        page = {"start": start, "end": start + PAGE}
        for key in RULES:
            value = int(truth.values[key][index])
            if truth.known[key][index]:
                page[key] = value if key in NUMBERS else bool(value)
        pages.append(page | changed)
    return {"pages": pages}


def test_cases_are_sound():
    """Rules exist, programs name them, keys are known, and each kernel shows what the case asks for."""
    for case in CASES.values():
        assert case.mistake.endswith(".")
        assert case.wrong.endswith(".")
        assert case.right.endswith(".")
        assert set(case.program.rules) == set(case.rules) <= spec.rules().keys()
        assert set(case.rule_of) <= {*RULES, "thp", ""}
        for key in (key for asked in case.asks for key in asked.split("|")):
            assert key in RULES or key == "thp"
        assert len(case.program.steps) <= 12


def test_every_mistake_of_the_list_is_there():
    """Whoever reported one finds it."""
    seen = " ".join(case.seen for case in CASES.values())
    for report in (
        "wasmtime #14357",
        "CRIU #2334",
        "firecracker #8",
        "#5274",
        "#232",
        "pagemap #1",
        "pagemap #2",
    ):
        assert report in seen


def test_the_document_tells_all_cases():
    text = (DOCS / "mistakes.md").read_text(encoding="utf-8")
    for case in CASES.values():
        assert f"## {case.name}\n\n{case.mistake}" in text
        assert f"- Wrong: {case.wrong}\n- Right: {case.right}\n" in text
    table = (DOCS / "validate.md").read_text(encoding="utf-8")
    for key in RULES:
        assert f"`{key}`" in table
    for adapter in ADAPTERS:
        assert f"`{adapter}`" in table


@pytest.mark.parametrize("key", RULES)
def test_each_key_told_wrong_names_its_rule(key):
    """The truth with one key turned round: exactly that is found."""
    # Idle pages and cgroups have a machine of their own.
    case = {"idle": "idle-until-somebody-looks", "cgroup": "charged-to-who-touched-first"}
    scene = CASES[case.get(key, "not-empty-is-not-swapped")].scene("6.18")
    told, findings = FunctionTool(lambda pid: truthful(scene)).ask(scene)
    assert findings == ()
    assert key in told
    assert set(told) >= RULES.keys() - {"idle", "written"}

    def turned(pid):
        answer = truthful(scene)
        known = [page for page in answer["pages"] if page.get(key) is not None]
        page = next((page for page in known if page[key]), known[0])
        page[key] = not page[key] if isinstance(page[key], bool) else page[key] ^ 8
        return answer

    [finding] = FunctionTool(turned).ask(scene)[1]
    expected = {"flags": "KF-004", **scene.case.rule_of}.get(key, RULES[key])
    assert (finding.rule, finding.key, finding.count) == (expected, key, 1)


def test_what_cannot_be_known_is_not_to_be_said():
    case = CASES["hidden-frame-numbers"]
    scene = case.scene("6.12")
    start = scene.run.area("a")[0]
    for value, rules in ((None, []), (0, ["AC-003"]), (77, ["AC-003"])):
        page = {"start": start, "end": start + PAGE, "present": True, "pfn": value}
        found = FunctionTool(lambda pid, page=page: [page]).ask(scene)[1]
        assert [finding.rule for finding in found if finding.key == "pfn"] == rules


def test_what_lies_nowhere():
    scene = CASES["the-zero-page"].scene("6.12")
    found = FunctionTool(lambda pid: [{"start": 0x1000, "end": 0x3000, "present": True}]).ask(scene)[1]
    assert found[0].rule == "PM-014"


def test_flags_by_name_and_in_part():
    scene = CASES["unknown-flag-bits"].scene("6.12")
    start = scene.run.area("a")[0]
    names = ["uptodate", "lru", "mmap", "anon", "swapbacked", "dirty"]
    said = {"pages": [{"start": start, "end": start + PAGE, "flags": names}], "flag_bits": 0x1000 | 1 << 27}
    [finding] = FunctionTool(lambda pid: said).ask(scene)[1]
    assert finding.rule == "KF-046"
    assert FunctionTool(lambda pid: said | {"flag_bits": 0x1000}).ask(scene)[1] == ()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (3, "pages"),
        ({"pages": 3}, "pages"),
        ({"pages": [], "more": 1}, "unknown fields"),
        ({"pages": [{"start": 0}]}, "'end'"),
        ({"pages": [{"start": -1, "end": 1}]}, "unsigned"),
        ({"pages": [{"start": 0, "end": 1, "colour": True}]}, "number"),
        ({"pages": [{"start": 0, "end": 1, "colour": 1}]}, "unknown keys"),
        ({"pages": [{"start": 0, "end": 1, "present": 1}]}, "true, false or null"),
        ({"pages": [{"start": 0, "end": 1, "flags": ["no-such"]}]}, "no flag"),
        ({"pages": [{"start": "zero", "end": 1}]}, "no number"),
    ],
)
def test_what_is_not_the_protocol(said, words):
    with pytest.raises(FormatError, match=words):
        read_says(said)
    result = validate(FunctionTool(lambda pid: said), [CASES["the-zero-page"]], kernels=["6.12"]).results[0]
    assert result.verdict == "failed"
    assert result.broken == ()


def test_bad_cases():
    good = (Path(sys.modules["pmcore.validate"].__file__).parent / "cases" / "the-zero-page.json").read_text()
    for change in ({"pmcore_case": 2}, {"colour": 1}, {"program": {}}, {"rules": 3}, {"kernels": None}):
        with pytest.raises(FormatError):
            load_case(json.dumps(json.loads(good) | change))
    with pytest.raises(FormatError):
        load_case("{")
    with pytest.raises(ArgumentError, match="no case"):
        cases(["no-such"])


SCRIPT = """#!/usr/bin/env python3
import json, sys
sys.path.insert(0, {folder!r})
from careful import careful
print(json.dumps(careful(int(sys.argv[1]))))
"""


def test_a_script_in_this_process(tmp_path):
    """A Python script whose output is the protocol, without a mount."""
    script = tmp_path / "reader"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    chosen = [CASES["one-frame-many-pages"], CASES["protected-pages"]]
    argv = sys.argv
    report = validate(CommandTool([str(script), "{pid}"], runner="python"), chosen)
    assert sys.argv is argv
    assert {result.verdict for result in report.results} == {"right"}
    script.write_text("#!/usr/bin/python3\nimport sys\nsys.exit('no page tables for me')")
    [result, *_] = validate(CommandTool([str(script)], runner="python"), chosen).results
    assert (result.verdict, result.broken) == ("failed", ())
    script.write_text("#!/usr/bin/python3\nprint('{')")
    [result, *_] = validate(CommandTool([sys.executable, str(script)], runner="python"), chosen).results
    assert "not JSON" in result.note
    with pytest.raises(ArgumentError, match="no Python script"):
        validate(CommandTool(["/bin/true"], runner="python"), chosen)
    with pytest.raises(ArgumentError, match="no adapter"):
        CommandTool(["x"], adapter="no-such")


def test_a_script_by_any_path(tmp_path, monkeypatch):
    """As it is written in a shell: ./reader, after an interpreter's name or not, also with a name that comes twice."""
    monkeypatch.chdir(tmp_path)
    Path("reader.py").write_text("import json, sys\nprint(json.dumps({'pages': [], 'keys': sys.argv[1:]}))")
    for command in (["./reader.py", "present"], ["python3", "./reader.py", "present"], [".//reader.py"]):
        [result] = validate(
            CommandTool(command, adapter="json", runner="python"), [CASES["the-zero-page"]], kernels=["6.12"]
        ).results
        assert result.verdict in ("wrong", "silent"), result.note
        assert ("present" in result.told) == ("present" in command)


def test_page_types_lines():
    """A row of letters is read by place; flags that page-types moved are put back."""
    from pmcore.pagetypes import display_table

    scene = CASES["the-zero-page"].scene("6.12")
    truth = Truth.of(scene.shown, scene.pid)
    bits = sorted(display_table())
    lines = ["voffset\tmap-cnt\toffset\tflags"]
    for index, address in enumerate(truth.addresses.tolist()):
        if not truth.values["present"][index]:
            continue
        word = int(truth.values["flags"][index])
        for bit, key in ((40, "soft_dirty"), (61, "file"), (63, "exclusive")):
            word |= int(truth.values[key][index]) << bit
        letters = "".join("x" if word >> bit & 1 else "_" for bit in bits)
        figures = f"{int(truth.values['mapcount'][index])}\t{int(truth.values['pfn'][index]):x}"
        lines.append(f"{address // PAGE:x}\t{figures}\t{letters}")
    told, findings = ADAPTERS["page-types"].judge(scene, "\n".join(lines))
    assert "flags" in told
    assert findings == ()
    findings = ADAPTERS["page-types"].judge(scene, "\n".join(lines[:-1]))[1]
    assert {finding.key for finding in findings} == {"present"}
    with pytest.raises(FormatError):
        ADAPTERS["page-types"].judge(scene, "unknown flag bit 27")


def summary_of(scene):
    """What page-types -r says of a machine, as (word, frames) rows."""
    kernel = scene.shown
    out = np.zeros(kernel.frame_count(), dtype=np.uint64)
    kernel.read_frames(FrameFile.KPAGEFLAGS, 0, out)
    words, counts = np.unique(out, return_counts=True)
    return list(zip(words.tolist(), counts.tolist(), strict=True))


def summary_text(rows):
    lines = ["             flags\tpage-count       MB  symbolic-flags\t\t\tlong-symbolic-flags"]
    lines += [f"0x{word:016x}\t{count:10d} {count >> 8:8d}  ___\tnames" for word, count in rows]
    return "\n".join([*lines, f"             total\t{sum(n for _, n in rows):10d} {0:8d}", ""])


def test_the_summary_of_page_types():
    """Frames in all and by flag; what is counted wrong breaks the rule of its flag."""
    scene = CASES["one-frame-many-pages"].scene("6.12")
    judge, rows = ADAPTERS["page-types-summary"].judge, summary_of(scene)
    assert judge(scene, summary_text(rows)) == (("flags",), ())
    # page-types shows OWNER_2 of anonymous memory as a bit of its own.
    moved = [(w ^ (1 << 32 | 1 << 47) if w >> 32 & 1 and w >> 12 & 1 else w, n) for w, n in rows]
    assert judge(scene, summary_text(moved))[1] == ()
    word, count = next(row for row in rows if row[0] >> 12 & 1)
    other = [row for row in rows if row[0] != word]
    [finding] = judge(scene, summary_text([*other, (word & ~(1 << 5), count)]))[1]
    assert (finding.rule, finding.said.partition(" frames ")[2]) == ("KF-006", "with LRU")
    [finding] = judge(scene, summary_text([*other, (word | 1 << 60, count)]))[1]
    assert finding.rule == "KF-046"
    total, *_ = judge(scene, summary_text([*other, (word, count - 1)]))[1]
    assert (total.rule, total.said, total.true) == ("KF-046", "16383 frames", "16384")
    # The same sums by other words: LRU goes from one frame to one that has it not.
    free, frames = next(row for row in rows if row[0] == 1 << 10)
    rest = [row for row in other if row[0] != free]
    mixed = [(word, count - 1), (word ^ 1 << 5, 1), (free, frames - 1), (free | 1 << 5, 1)]
    [finding] = judge(scene, summary_text([*rest, *mixed]))[1]
    assert (finding.rule, finding.said) == ("KF-046", f"{frames - 1} frames with 0x400")
    for text in ("", "unknown flag bit 27", summary_text(rows).replace("total\t", "total\t9")):
        with pytest.raises(FormatError):
            judge(scene, text)


def run_cli(*arguments):
    command = [sys.executable, "-m", "pmcore.cli", "validate", "--no-progress", *arguments]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_command():
    shown = run_cli("--list")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in CASES)
    unknown = ("--case", "unknown-flag-bits", "--kernel", "6.12", "--format", "json")
    done = run_cli("--function", "json:dumps", *unknown)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["broken"] == {"KF-046": ["unknown-flag-bits"]}
    assert report["results"][0]["verdict"] == "failed"
    for wrong in (
        [],
        ["--function", "json:dumps", "--", "x"],
        ["--function", "no:such"],
        ["--case", "x", "--list"],
    ):
        assert run_cli(*wrong).returncode == 2


def test_text_names_the_rules():
    place = "tests.validate.misuses:told_by_default"
    done = run_cli("--function", place, "--case", "swap-field-is-no-frame", "--kernel", "6.12")
    assert "wrong   swap-field-is-no-frame on 6.12 PM-012" in done.stdout, done.stderr
    assert "PM-012 swapped: 100000000000-100000008000 says not swapped, is swapped and 7 more" in done.stdout
    assert "says nothing of pfn (PM-003)" in done.stdout
    assert "breaks PM-012 (Swapped means not empty): swap-field-is-no-frame" in done.stdout
    assert "does not tell pfn (PM-003 Swap type): swap-field-is-no-frame" in done.stdout
    assert done.returncode == 1


def test_the_careful_reader_on_a_fresh_process():
    """And on the machine as such: all that it says is so."""
    for case in (CASES["huge-pages-of-many-sizes"], CASES["dirty-and-swapped"]):
        assert validate(FunctionTool(careful), [case]).well


SELF = """
import json, sys
sys.path.insert(0, {folder!r})
from careful import careful
print(json.dumps(careful(sys.argv[1])))
"""


def test_a_command_inside_the_machine(tmp_path):
    """Any command, unchanged, in a mounted machine; /proc/self is the task there too."""
    chosen = [CASES["not-empty-is-not-swapped"], CASES["unknown-flag-bits"], CASES["hidden-frame-numbers"]]
    script = tmp_path / "tool"
    script.write_text(SELF.format(folder=str(Path(__file__).parent)))
    report = validate(
        CommandTool([sys.executable, str(script), "{pid}"], runner="mount"), chosen, kernels=["6.18"]
    )
    if report.results[0].verdict == "skipped":
        pytest.skip(report.results[0].note)
    assert [result.verdict for result in report.results] == ["right"] * 3, report
    [result] = validate(CommandTool(["false"]), chosen[:1]).results
    assert (result.verdict, result.note) == ("failed", "exit code 1: nothing on standard error")
    [result] = validate(CommandTool(["sleep", "9"], timeout=0.5), chosen[:1]).results
    assert (result.verdict, result.note) == ("failed", "not done after 0 s")


def test_the_kernels_page_types(page_types):
    """What it is known to get wrong is found, and no more."""
    names = ["unknown-flag-bits", "not-empty-is-not-swapped", "protected-pages", "huge-pages-of-many-sizes"]
    tool = CommandTool([page_types], adapter="page-types", runner="mount")
    report = validate(tool, [CASES[name] for name in names], kernels=["6.18"])
    if report.results[0].verdict == "skipped":
        pytest.skip(report.results[0].note)
    assert report.broken == {"KF-046": ("unknown-flag-bits",), "PM-024": ("not-empty-is-not-swapped",)}
    assert {("guard", "PM-009"), ("uffd_wp", "PM-008")} == set(report.untold)


def test_the_kernels_page_types_over_the_machine(page_types):
    """Its summary of all frames: only the flag that it does not know ends it."""
    tool = CommandTool([page_types], adapter="page-types-summary", runner="mount")
    names = ["unknown-flag-bits", "tails-and-their-folio", "hugetlb-pages", "merged-pages"]
    report = validate(tool, [CASES[name] for name in names], kernels=["6.1", "6.18"])
    if report.results[0].verdict == "skipped":
        pytest.skip(report.results[0].note)
    assert report.broken == {"KF-046": ("unknown-flag-bits",)}
    assert all("flags" in result.told for result in report.results if result.verdict != "failed")


def test_the_kernels_thpmaps(thpmaps):
    report = validate(
        CommandTool([thpmaps], adapter="thpmaps", runner="python"),
        [CASES["huge-pages-of-many-sizes"], CASES["protected-pages"]],
        kernels=["6.18"],
    )
    assert report.broken == {}
    assert report.results[0].verdict == "right"
