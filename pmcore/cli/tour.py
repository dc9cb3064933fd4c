"""`pmcore tour`."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import attrs
import click
import numpy as np

from pmcore import registry, spec
from pmcore.cli.lockstep import step_words
from pmcore.cli.output import say
from pmcore.cli.tables import FrameNames, describe
from pmcore.cli.transcript import profile_of, transcript
from pmcore.errors import ArgumentError, PmcoreError
from pmcore.lockstep import Comparer, Look, take
from pmcore.pageflags import FrameFlags
from pmcore.pagemap import PagemapEntry
from pmcore.profile import KernelProfile
from pmcore.program import Outcome, Program, Run, load_program
from pmcore.program import steps as s
from pmcore.protocols import Workbench
from pmcore.uapi import PM_PFRAME_MASK, MapFlag

_HUGE = 2 << 20
_MFD_HUGETLB = 4
_SCAN = s.Scan(area="a", pages=8, category_mask=2, return_mask=0x1A, vec_len=16)
#: Each step with what to look for, and the rules that say why.
_STOPS: tuple[tuple[s.Step, str, tuple[str, ...]], ...] = (
    (
        s.Map(area="a", pages=8),
        "Nothing is there yet: a mapping is a promise, its entries are empty.",
        ("VM-001",),
    ),
    (
        s.Touch(area="a", pages=2, write=False),
        "Reading finds zeros: both pages map the one zero page.",
        ("VM-002",),
    ),
    (
        s.Write(area="a", text="first"),
        "Writing replaces the zero page by a frame of its own.",
        ("VM-004", "PM-007"),
    ),
    (s.Touch(area="a", page=2, pages=3), "Written pages that were empty get frames at once.", ("VM-003",)),
    (
        s.Fork(child="child"),
        "fork copies the tables, not the pages: each frame is mapped twice.",
        ("VM-005", "KC-001"),
    ),
    (
        s.Write(task="child", area="a", text="second"),
        "The child gets a copy; ours is ours again.",
        ("VM-006",),
    ),
    (s.Exit(task="child"), "The child's frames are free, and no longer shared with us.", ("VM-008",)),
    (
        s.Write(area="a", offset=2 * 4096, text="mine"),
        "Nobody else maps it now: no copy is made.",
        ("VM-022",),
    ),
    (
        s.Advise(area="a", pages=3, advice=21),
        "Paged out: entries name slots of a swap area.",
        ("VM-016",),
    ),
    (s.Read(area="a", length=5), "Read back in; it keeps its slot, and is in the swap cache.", ("VM-021",)),
    (s.UffdOpen(features=1 << 15), "A userfaultfd, with asynchronous write protection.", ("VM-020",)),
    (
        s.UffdRegister(area="a", pages=8),
        "The mapping is registered: nothing shows in the entries.",
        ("SC-014",),
    ),
    (
        s.Scan(area="a", pages=8, flags=1, category_mask=2, return_mask=0x1A, vec_len=16),
        "PAGEMAP_SCAN reports what was written, and protects it in the same step; empty entries get markers.",
        ("SC-032", "SC-034"),
    ),
    (
        s.Write(area="a", offset=3 * 4096, text="again"),
        "The first write takes the protection off.",
        ("VM-020",),
    ),
    (
        s.Scan(area="a", pages=8, category_mask=2, return_mask=0x1A, vec_len=16),
        "The scan finds what was written since.",
        ("SC-015",),
    ),
    (
        s.Advise(area="a", page=6, pages=2, advice=102),
        "Guard regions: markers that no access gets past.",
        ("VM-015",),
    ),
    (s.Touch(area="a", page=6, pages=1), "Touching one is SIGSEGV.", ("VM-015",)),
    (
        s.Map(area="h", pages=512, align=_HUGE),
        "Another mapping, of the size of a huge page.",
        ("VM-001",),
    ),
    (s.Touch(area="h", pages=3), "Small pages at first.", ("VM-003",)),
    (
        s.Advise(area="h", pages=512, advice=25),
        "Collapsed into one huge page, mapped by one PMD.",
        ("VM-027", "VM-012"),
    ),
    (
        s.Unmap(area="h", page=100, pages=2),
        "A hole: the PMD becomes PTEs, the folio stays whole.",
        ("VM-013",),
    ),
)


@click.command(name="tour")
@click.option(
    "--kernel", metavar="VERSION", help="The simulated kernel (default: the live one's, else the newest)."
)
@click.option("--program", type=click.Path(dir_okay=False), metavar="FILE", help="Run this program instead.")
@click.option(
    "--live/--no-live", default=None, help="Run it on the real kernel, too (default: where that works)."
)
@click.option("--pause", is_flag=True, help="Wait for the Enter key after each step.")
@click.option(
    "--transcript",
    "place",
    type=click.Path(dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write the tables of both sides after each step to FILE, as Markdown, instead.",
)
@click.option(
    "--like", type=click.Path(dir_okay=False), metavar="FILE", help="Simulate the kernel of this transcript."
)
def command(
    kernel: str | None,
    program: str | None,
    live: bool | None,
    pause: bool,
    place: str | None,
    like: str | None,
) -> int:
    """Run a page-table program step by step on a simulated machine, and see each entry change, and why.

    On Linux, as root, the same program runs on the real kernel beside it, and each step says whether the two agree.
    """
    stops = _STOPS if program is None else tuple((step, "", ()) for step in _load(program).steps)
    if kernel is not None and like is not None:
        raise ArgumentError("--kernel and --like both name a kernel", remedy="one of them")
    simulated: Any = kernel if like is None else profile_of(like)
    with contextlib.ExitStack() as held:
        pool, disk = _needs(stops)
        bench = (
            None
            if live is False or (live is None and simulated is not None)
            else _live(held, wanted=live, hugepages=pool, **disk)
        )
        profile = simulated or (bench.kernel.profile if bench is not None else "6.18")
        machine = held.enter_context(
            registry.open_workbench("sim", memory="64 MiB", swap="16 MiB", kernel=profile, hugepages=pool)
        )
        if place is None:
            return _walk(stops, machine, bench, pause=pause)
        text, agreed = transcript(stops, machine, bench, profile=machine.kernel.profile)
        with click.open_file(place, "w", encoding="utf-8") as file:
            file.write(text)
        return 0 if agreed else 1


def _load(path: str) -> Program:
    try:
        return load_program(path)
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}") from None


def _needs(stops: Any) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Hugetlb pages where a step maps such, and a disk where one opens a file on it."""
    steps = [step for step, _, _ in stops]
    huge = any(isinstance(step, s.Map) and step.flags & MapFlag.HUGETLB for step in steps)
    huge |= any(isinstance(step, s.MemfdCreate) and step.flags & _MFD_HUGETLB for step in steps)
    disk = any(isinstance(step, s.OpenFile) for step in steps)
    return ({"2 MiB": (8, 2)} if huge else {}), ({"disk": "64 MiB"} if disk else {})


def _live(held: contextlib.ExitStack, *, wanted: bool | None, **needs: Any) -> Workbench | None:
    try:
        bench = held.enter_context(registry.open_workbench("procfs", still=True, swap="64 MiB", **needs))
        if bench.kernel.pfn_visible:
            return bench
        reason = "frame numbers are hidden; run as root"
    except PmcoreError as error:
        reason = str(error)
    if wanted:
        raise ArgumentError(f"the live kernel cannot be used: {reason}")
    return None


def _walk(stops: Any, machine: Workbench, bench: Workbench | None, *, pause: bool) -> int:
    program = Program(name="tour", steps=tuple(step for step, _, _ in stops))
    runs = [Run(program, machine)] + ([Run(program, bench)] if bench is not None else [])
    profile = machine.kernel.profile
    beside = f", and on this machine's {bench.kernel.profile.name} beside it" if bench is not None else ""
    say(f"A simulated machine with Linux {profile.name}{beside}.")
    say('Frames are called F1, F2, ... as they are first seen; "x2" is a frame mapped twice.')
    comparer, names = Comparer(), FrameNames()
    before: Look | None = None
    agreed = True
    for number, (step, words, rules) in zip(itertools.count(1), stops, strict=False):
        say()
        say(f"{number}. {step_words(step)}")
        outcomes = [run.advance(step) for run in runs]
        looks = [take(run) for run in runs]
        if words:
            say(f"   {words}")
        _tell_outcome(outcomes[0])
        names.keep(looks[0])
        for line in describe(looks[0], profile, names):
            say(line)
        for line in _changes(before, looks[0], profile):
            say(line)
        for name in rules:
            rule = spec.rule(name)
            say(f"   [{rule.id}] {rule.text}")
        if len(runs) > 1:
            found = comparer.compare(looks[0], looks[1])
            same = outcomes[0] == outcomes[1] and not found
            agreed &= same
            say("   The live kernel shows the same." if same else "   The live kernel differs:")
            if outcomes[0] != outcomes[1]:
                say(f"     outcome {_outcome(outcomes[0])} | {_outcome(outcomes[1])}")
            for difference in found:
                say(f"     {difference}")
        before = looks[0]
        if pause:
            click.pause("   Enter for the next step ...")
    return 0 if agreed else 1


def _outcome(outcome: Outcome) -> str:
    return str(attrs.asdict(outcome, filter=lambda _field, value: bool(value))) or "ok"


def _tell_outcome(outcome: Outcome) -> None:
    if outcome.errno:
        say(f"   refused: errno {outcome.errno}")
    elif outcome.signal:
        say(f"   {outcome.signal} at {outcome.fault}")
    elif isinstance(outcome.value, bytes):
        say(f"   read: {outcome.value!r}")
    elif isinstance(outcome.value, dict) and "regions" in outcome.value:
        for first, last, categories in outcome.value["regions"]:
            say(f"   region: pages {first} to {last - 1}, categories {categories:#x}")
    elif isinstance(outcome.value, dict):
        say(f"   {', '.join(f'{key} {value}' for key, value in outcome.value.items())}")
    elif outcome.value is not None:
        say(f"   answer: {outcome.value}")


def _changes(before: Look | None, now: Look, profile: KernelProfile) -> list[str]:
    """Which bits of entries and frames came and went, each with its rule; pages that changed alike on one line."""
    if before is None:
        return []
    lines: dict[str, int] = {}
    for name, seen in now.tasks.items():
        old = before.tasks.get(name)
        if old is None:
            continue
        _, i, j = np.intersect1d(seen.addresses, old.addresses, assume_unique=True, return_indices=True)
        differ = np.flatnonzero((seen.words[i] ^ old.words[j]) & ~np.uint64(PM_PFRAME_MASK))
        for index in differ.tolist():
            words = [int(side) & ~PM_PFRAME_MASK for side in (old.words[j][index], seen.words[i][index])]
            _note(lines, "entry", *(PagemapEntry(word, profile=profile).explain().lines for word in words))
    _, i, j = np.intersect1d(now.pfns, before.pfns, assume_unique=True, return_indices=True)
    for index in np.flatnonzero(now.kpageflags[i] ^ before.kpageflags[j]).tolist():
        words = [int(before.kpageflags[j][index]), int(now.kpageflags[i][index])]
        _note(lines, "frame", *(FrameFlags(word, profile=profile).explain().lines for word in words))
    return [f"   {count} x {line}" if count > 1 else f"   {line}" for line, count in lines.items()]


def _note(lines: dict[str, int], what: str, old: Any, new: Any) -> None:
    was, has = {line.name: line for line in old}, {line.name: line for line in new}
    for sign, here, there in (("+", has, was), ("-", was, has)):
        for name, line in here.items():
            if name not in there and line.bits[0] == line.bits[1]:
                text = f"{what} {sign}{name}: {line.meaning} [{line.rule}]"
                lines[text] = lines.get(text, 0) + 1
