"""Programs are values: saved, read and refused as text; run on real tasks."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmcore.errors import ArgumentError, FormatError
from pmcore.program import STEPS, Program, load_program, program_from_json, program_to_json, run, save_program
from pmcore.program import steps as s

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
FIELDS = {"str": NAMES, "int": st.integers(0, (1 << 64) - 1), "bool": st.booleans()}
FIELDS["vec"] = st.sampled_from(["", "null", "there"])
FIELDS["answer"] = st.sampled_from(s.ANSWERS)


def step_of(kind):
    import attrs

    return st.builds(
        kind,
        **{
            field.name: FIELDS[field.name if field.name in FIELDS else str(field.type)]
            for field in attrs.fields(kind)
        },
    )


ANY_STEP = st.sampled_from(sorted(STEPS)).flatmap(lambda name: step_of(STEPS[name]))


@given(st.lists(ANY_STEP, max_size=8), st.text(max_size=10), st.text(max_size=10))
def test_what_is_saved_is_read(steps, name, note):
    program = Program(name=name, note=note, steps=tuple(steps), rules=("VM-001",))
    assert program_from_json(program_to_json(program)) == program


def test_files(tmp_path):
    program = Program(name="p", steps=(s.Map(area="a", pages=2), s.Touch(area="a", pages=2)))
    save_program(program, tmp_path / "p.json")
    assert load_program(tmp_path / "p.json") == program
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="UTF-8"):
        load_program(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pmcore_program": 2}, "version"),
        ({"extra": 1}, "unknown fields"),
        ({"steps": {}}, "lists"),
        ({"name": 3}, "text"),
        ({"steps": [1]}, "object"),
        ({"steps": [{"step": "explode"}]}, "unknown step"),
        ({"steps": [{"step": "map"}]}, "area"),
        ({"steps": [{"step": "map", "area": "a", "pages": "2"}]}, "not int"),
        ({"steps": [{"step": "map", "area": "a", "pages": True}]}, "not int"),
        ({"steps": [{"step": "map", "area": "a", "pages": -1}]}, "unsigned"),
        ({"steps": [{"step": "map", "area": "", "pages": 1}]}, "no name"),
        (
            {"steps": [{"step": "touchanswered", "area": "a", "pages": 1, "answer": "perhaps"}]},
            "one of zeropage",
        ),
        ({"steps": [{"step": "map", "area": "a", "pages": 1, "colour": "red"}]}, "no field"),
    ],
)
def test_bad_programs_are_refused_with_their_place(change, said):
    data = json.loads(program_to_json(Program(name="p", steps=())))
    with pytest.raises(FormatError, match=said):
        program_from_json(json.dumps({**data, **change}))


@given(st.text(max_size=60))
def test_any_text_is_refused(text):
    with pytest.raises(FormatError):
        program_from_json(text)


@pytest.fixture
def bench():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    from pmcore.backends.procfs.workbench import open_workbench

    with open_workbench() as bench:
        yield bench


@pytest.mark.live
@pytest.mark.rule("VM-005", "VM-006")
def test_a_program_runs_on_real_memory(bench):
    program = Program(
        name="copy on write",
        steps=(
            s.Map(area="a", pages=4),
            s.Write(area="a", text="parent"),
            s.Fork(child="kid"),
            s.Write(task="kid", area="a", text="child!"),
            s.Read(area="a", length=6),
            s.Read(task="kid", area="a", length=6),
            s.Read(area="a", offset=4 * 4096),
            s.Unmap(area="a", pages=0),
            s.Exit(task="kid"),
        ),
    )
    seen = []
    state = run(program, bench, observer=lambda run, step, outcome: seen.append((type(step), outcome)))
    assert [outcome for _, outcome in seen] == state.outcomes
    values = state.outcomes
    assert values[4].value == b"parent"
    assert values[5].value == b"child!"
    assert values[6].signal == "SIGSEGV"
    assert values[7].errno == 22
    assert list(state.tasks) == ["main"]


@pytest.mark.live
def test_every_kind_of_step_runs(bench):
    """Each step class reaches its system call: what comes of it is a value or the kernel's refusal."""
    steps = (
        s.Map(area="a", pages=8),
        s.Touch(area="a", pages=8),
        s.Protect(area="a", pages=1, prot=1),
        s.Advise(area="a", page=1, pages=1),
        s.Lock(area="a", page=2, pages=1),
        s.Lock(area="a", page=2, pages=1, onfault=True),
        s.Unlock(area="a", page=2, pages=1),
        s.Mincore(area="a", pages=8),
        s.MovePages(area="a", pages=8),
        s.Msync(area="a", pages=8),
        s.LockAll(flags=2),
        s.UnlockAll(),
        s.Brk(length=5000),
        s.PagemapRead(area="a", length=64),
        s.QueryMaps(area="a", name_room=4096),
        s.MovePages(area="a", pages=2),
        s.Move(area="a", page=6, pages=2, new_pages=6, to="b"),
        s.MemfdCreate(fd="m", pages=2),
        s.Map(area="f", pages=2, fd="m", flags=1),
        s.Pwrite(fd="m", text="hello"),
        s.Pread(fd="m", length=5),
        s.Lseek(fd="m", whence=3),
        s.Fsync(fd="m"),
        s.Read(area="f", length=5),
        s.Ftruncate(fd="m", length=4096),
        s.Fallocate(fd="m", length=4096),
        s.OpenFile(fd="d", file="data"),
        s.Fadvise(fd="d"),
        s.Sync(),
        s.CloseFd(fd="d"),
        s.UffdOpen(),
        s.UffdRegister(area="b", pages=2),
        s.UffdProtect(area="b", pages=2),
        s.UffdUnregister(area="b", pages=2),
        s.UffdRegister(area="b", page=2, pages=4, mode=1),
        s.Map(area="g", pages=1, fd="m", flags=1),
        s.Pwrite(fd="m", text="hello"),
        s.UffdRegister(area="g", pages=1, mode=4),
        s.UffdCopy(area="b", page=2, pages=1, source="a"),
        s.UffdZeropage(area="b", page=3, pages=1),
        s.UffdMove(area="b", page=4, pages=1, source="a", source_page=3),
        s.UffdPoison(area="b", page=5, pages=1),
        s.UffdContinue(area="g", pages=1),
        s.TouchAnswered(area="a", page=1, pages=1),
        s.UffdWake(area="b", pages=2),
        s.ClearRefs(what=1),
        s.Scan(area="a", pages=4),
        s.Unmap(area="b", pages=4),
        s.Fork(child="c"),
        s.Exit(task="c"),
        s.Write(area="a", offset=3 * 4096, text="end"),
    )
    # They need a still machine: lockstep's kept programs.
    administrator = {
        s.Compact,
        s.KsmScan,
        s.KsmUnmerge,
        s.DropCaches,
        s.ReadAhead,
        s.LimitGroup,
        s.MakeGroup,
        s.RemoveGroup,
        s.MoveTask,
        s.MarkIdle,
        s.ReadIdle,
    }
    assert {type(step) for step in steps} == set(STEPS.values()) - administrator
    state = run(Program(name="all", steps=steps), bench)
    failed = {
        type(step).__name__: o for step, o in zip(steps, state.outcomes, strict=True) if o.errno or o.signal
    }
    if not bench.kernel.profile.has("scan"):
        failed.pop("Scan", None)
    assert failed == {}


def test_programs_name_what_they_made():
    class Empty:
        kernel = None

    for step in (s.Touch(area="a", pages=1), s.Exit(task="nobody")):
        with pytest.raises((ArgumentError, AttributeError)):
            run(Program(name="p", steps=(step,)), Empty())
