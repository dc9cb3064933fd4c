"""Lockstep: it agrees with itself, finds planted differences, and the live kernel and the model agree."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest

from pmcore.backends.sim.machine import SimMachine
from pmcore.errors import BackendUnavailable, NotModelled
from pmcore.lockstep import Comparer, lockstep, take
from pmcore.lockstep.session import session
from pmcore.profile import preset
from pmcore.program import Program, Run, load_program, program_to_json
from pmcore.program import steps as s
from pmcore.registry import open_workbench

PAGE = 4096
#: Huge pages on both sides, and surplus ones allowed.
POOL = {"2 MiB": (8, 2)}


def sim(**settings):
    return open_workbench("sim", **{"memory": "64 MiB", "swap": "16 MiB", "kernel": "6.18", **settings})


PROGRAM = Program(
    name="a bit of everything",
    steps=(
        s.Map(area="a", pages=1024, align=2 << 20),
        s.Advise(area="a", pages=512, advice=14),
        s.Touch(area="a", pages=3),
        s.Write(area="a", offset=600 * PAGE, text="hello"),
        s.Fork(child="c"),
        s.Write(task="c", area="a", offset=600 * PAGE, text="H"),
        s.Advise(area="a", page=600, pages=8, advice=21),
        s.Scan(area="a", pages=1024),
        s.Read(area="a", offset=600 * PAGE, length=5),
        s.Exit(task="c"),
        s.Unmap(area="a", page=4, pages=4),
    ),
)


def test_a_machine_agrees_with_another():
    result = lockstep(PROGRAM, sim(), sim(memory="128 MiB"))
    assert result.agrees
    assert (result.steps, result.scans) == (11, 1)
    assert result.reached["step fork"] == 1


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda look, task: task.words.__setitem__(0, task.words[0] ^ np.uint64(1 << 56)), "pagemap"),
        (lambda look, task: task.words.__setitem__(0, task.words[1]), "one frame, two over there"),
        (lambda look, task: look.kpagecount.__setitem__(0, 7), "kpagecount"),
        (lambda look, task: look.kpageflags.__setitem__(0, 0), "kpageflags"),
        (lambda look, task: task.in_core[0].__setitem__(0, False), "mincore"),
    ],
)
def test_planted_differences_are_found(change, kind):
    looks = []
    for _ in range(2):
        run = Run(PROGRAM, sim())
        run.advance(s.Map(area="a", pages=8))
        run.advance(s.Touch(area="a", pages=4))
        looks.append(take(run))
    assert Comparer().compare(*looks) == []
    change(looks[1], looks[1].tasks["main"])
    assert kind in {difference.kind for difference in Comparer().compare(*looks)}


def test_other_outcomes_maps_and_counters_are_found():
    old = sim(kernel=preset("6.12", config=["!CONFIG_MEM_SOFT_DIRTY"]))
    guard = Program(name="x", steps=(s.Map(area="a", pages=4), s.Advise(area="a", pages=1, advice=102)))
    result = lockstep(guard, old, sim(kernel=preset("6.18", config=["!CONFIG_MEM_SOFT_DIRTY"])))
    assert result.differs_at == 1
    assert {"outcome", "pagemap"} <= {difference.kind for difference in result.differences}
    assert "22" in str(result.differences[0])


def test_a_frame_given_out_again_is_not_the_same_frame():
    """Where a step maps anew, which free frame it gets is the allocator's business; elsewhere a frame stays."""
    looks = []
    for frames in (1, 2), (3, 4):
        run = Run(PROGRAM, sim())
        run.advance(s.Map(area="a", pages=1))
        run.advance(s.Touch(area="a", pages=1))
        looks.append([take(run), take(run)])
        start = run.areas["a"][0]
        if frames[0] == 1:
            task = looks[0][1].tasks["main"]
            task.words[:] ^= np.uint64(1)  # another frame, on the left alone
    found = []
    for renewed in (0, 0), (start, start + 4096):
        comparer = Comparer()
        comparer.compare(looks[0][0], looks[1][0])
        found.append({one.kind for one in comparer.compare(looks[0][1], looks[1][1], renewed)})
    assert "frame since the last step" in found[0]
    assert "frame since the last step" not in found[1]


def test_a_session_shrinks_what_differs():
    """Two kernels that differ in one thing: the smallest program shows just that."""
    one, other = sim().profile, sim().profile.changed(remove=["mm.guard_regions"])
    report = session(lambda: sim(kernel=one), lambda: sim(kernel=other), programs=400, seed=5)
    assert report.differences
    steps = report.differences[0].program.steps
    assert len(steps) <= 3
    assert isinstance(steps[-1], s.Advise)
    assert steps[-1].advice in (102, 103)
    assert json.dumps(report.as_dict())


def test_a_program_of_a_session_is_the_same_whatever_comes_before():
    """A session that is cut short goes on where it was; all that differ are told, up to the number asked for."""
    one, other = sim().profile, sim().profile.changed(remove=["mm.guard_regions"])
    sides = (lambda: sim(kernel=one), lambda: sim(kernel=other))
    whole = session(*sides, programs=60, seed=5, most=3)
    assert len(whole.numbers) == 3
    later = session(*sides, programs=60, seed=5, first=whole.numbers[1])
    assert later.numbers == whole.numbers[1:2]
    assert later.differences[0].program == whole.differences[1].program
    counted = session(sim, sim, programs=6, seed=9)
    halves = [session(sim, sim, programs=3, seed=9, first=first) for first in (0, 3)]
    assert counted.steps == sum(half.steps for half in halves)
    assert counted.reached == halves[0].reached + halves[1].reached


def test_a_session_counts():
    report = session(sim, sim, programs=12, steps=28, seed=1)
    assert not report.differences
    assert report.programs == 12
    assert report.steps > 60
    assert report.as_dict()["differences"] == 0


def test_what_sampling_accesses_changes_is_asked_again(monkeypatch):
    """A first run in which an access was not noted does not count; one that differs again does."""
    from pmcore.lockstep import session as module
    from pmcore.lockstep.compare import Difference

    calls = []

    def first_differs(program, left, right):
        calls.append(program)
        result = lockstep(program, left, right)
        if len(calls) % 2 == 0 and kind == "once":
            return result
        found = Difference("kpageflags", "main 0x0", f"REFERENCED|{page}", page)
        return attrs.evolve(result, differs_at=len(program.steps) - 1, differences=(found,))

    monkeypatch.setattr(module, "lockstep", first_differs)
    monkeypatch.setattr(SimMachine, "watched", True)
    kind, page = "once", "LRU|SWAPBACKED"
    report = session(sim, sim, programs=3, steps=5, seed=1)
    assert not report.differences
    assert report.masked["DV-020"] >= 3
    assert len(calls) == 2 * report.programs
    kind = "always"
    assert session(sim, sim, programs=3, steps=5, seed=1).differences
    kind, page = "once", "LRU|ANON|SWAPBACKED"  # whose accesses zapping does not note: no excuse
    calls.clear()
    assert session(sim, sim, programs=3, steps=5, seed=1).differences


def test_the_mask_of_sampled_accesses_is_a_files():
    """Beside IDLE, REFERENCED is compared on anonymous frames, and not on those of files."""
    for flags, masked in ((0x21, True), (0x22, False)):
        looks = []
        for _ in range(2):
            run = Run(PROGRAM, sim())
            run.advance(s.Map(area="a", pages=1, flags=flags))
            run.advance(s.Touch(area="a", pages=1))
            looks.append(take(run))
        looks[1].kpageflags[0] |= np.uint64(1 << 25 | 1 << 2)
        assert (Comparer(watched=True).compare(*looks) == []) == masked
        assert Comparer().compare(*looks)  # with no monitor there is no excuse


def test_what_a_side_does_not_model_is_counted_apart():
    with pytest.raises(NotModelled):
        lockstep(Program(name="x", steps=(s.MemfdCreate(fd="f"), s.Lseek(fd="f", whence=1))), sim(), sim())


def test_workbenches_have_names():
    with pytest.raises(BackendUnavailable, match="did you mean 'sim'"):
        open_workbench("simm")


# -- against the running kernel --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs a running Linux kernel")
    try:
        bench = open_workbench("procfs", still=True, swap="256 MiB", hugepages=POOL)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with bench:
        if not bench.kernel.pfn_visible:
            pytest.skip("needs CAP_SYS_ADMIN: frame numbers are hidden")
        yield bench


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.parametrize(("hugetlb", "programs"), [(None, 150), (True, 40)])
def test_the_model_agrees_with_the_running_kernel(live, hugetlb, programs):
    """Fixed seeds; PMCORE_LOCKSTEP names how many programs, PMCORE_LOCKSTEP_SEED where they begin."""
    if not live.kernel.profile.has("mm.mremap_many"):
        pytest.skip("the model is held against kernels of its own version: this one is older than 6.17")
    report = session(
        lambda: sim(memory="256 MiB", swap="256 MiB", kernel=live.kernel.profile, hugepages=POOL),
        lambda: live.renew() or live,
        programs=int(os.environ.get("PMCORE_LOCKSTEP", programs)),
        seed=int(os.environ.get("PMCORE_LOCKSTEP_SEED", "1")),
        hugetlb=hugetlb,
    )
    assert not report.differences, told(report)
    assert report.steps > 5 * programs
    assert report.masked.keys() <= ({"DV-018", "DV-019", "DV-020"} if live.watched else {"DV-019"})


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_the_model_agrees_with_sizes_of_huge_pages_at_random(live):
    """Other settings for each program; PMCORE_LOCKSTEP and PMCORE_LOCKSTEP_SEED as above."""
    if not live.kernel.profile.has("mm.mremap_many"):
        pytest.skip("the model is held against kernels of its own version: this one is older than 6.17")
    report = session(
        lambda: sim(memory="256 MiB", swap="256 MiB", kernel=live.kernel.profile, hugepages=POOL),
        lambda: live,
        programs=int(os.environ.get("PMCORE_LOCKSTEP", "60")),
        seed=int(os.environ.get("PMCORE_LOCKSTEP_SEED", "2")),
        random_thp=True,
        hugetlb=False,
    )
    assert not report.differences, told(report)
    assert report.masked.keys() <= ({"DV-018", "DV-019", "DV-020"} if live.watched else {"DV-019"})


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_a_program_written_by_hand_agrees(live):
    result = lockstep(
        PROGRAM, sim(memory="256 MiB", swap="256 MiB", kernel=live.kernel.profile, hugepages=POOL), live
    )
    assert result.agrees, result.differences


def told(report):
    return "\n".join(
        line
        for found in report.differences
        for line in (program_to_json(found.program), *map(str, found.differences))
    )


KSM = (
    *("KS-001", "KS-002", "KS-003", "KS-004", "KS-005", "KS-006", "KS-007"),
    *("KS-008", "KS-009", "KS-010", "KS-011", "KS-012", "KS-013", "KS-014"),
    "KS-015",
)
KEPT = sorted((Path(__file__).parent / "kept").glob("*.json"))


@pytest.mark.rule("VM-021", "VM-022", "VM-023", "VM-024", "VM-026", "VM-027", "VM-028", "VM-029", "VM-025")
@pytest.mark.rule("VM-030", "VM-031", "KX-013", "VM-032")
@pytest.mark.rule("HT-001", "HT-002", "HT-003", "HT-004", "HT-005", "HT-006")
@pytest.mark.rule("HT-007", "HT-008", "HT-009", "HT-010", "HT-011", "HT-012")
@pytest.mark.rule("HT-015", "HT-016", "HT-017")
@pytest.mark.rule("UF-001", "UF-002", "UF-003", "UF-004", "UF-005")
@pytest.mark.rule("UF-006", "UF-007", "UF-008", "UF-009", "UF-010", "UF-011", "UF-012")
@pytest.mark.rule("TH-001", "TH-002", "TH-003", "TH-004", "TH-006", "TH-007", "TH-008", "TH-009")
@pytest.mark.rule("HS-001", "HS-002", "HS-003", "HS-004", "HS-005", "HS-006", "HS-007", "HS-008", "HS-009")
@pytest.mark.rule("HS-010", "HS-011")
@pytest.mark.rule(*KSM)
@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_programs_agree(live, path):
    """Each was a difference once, or makes a rule visible."""
    program = load_program(path)
    live.renew()
    assert program.rules
    if not live.kernel.profile.has("mm.mremap_many"):
        pytest.skip("the model is held against kernels of its own version: this one is older than 6.17")
    machine = sim(memory="256 MiB", swap="256 MiB", kernel=live.kernel.profile, hugepages=POOL)
    try:
        result = lockstep(program, machine, live)
    except NotModelled as error:
        pytest.skip(str(error))  # other processes of the machine ask for merging
    assert result.agrees, "\n".join(map(str, result.differences))
