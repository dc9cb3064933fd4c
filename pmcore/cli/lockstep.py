"""`pmcore lockstep`."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import click

from pmcore import registry, spec
from pmcore.cli.output import progress_bar, say
from pmcore.cli.tables import FrameNames, describe
from pmcore.errors import ArgumentError, BackendUnavailable
from pmcore.lockstep import Result, lockstep
from pmcore.lockstep.generator import FOCUSES
from pmcore.lockstep.session import session
from pmcore.program import Program, load_program, save_program
from pmcore.program.steps import Advise, OpenFile, Step
from pmcore.protocols import Workbench
from pmcore.uapi import Madvise

#: The rules that a step is about, for whoever has to find out which side is wrong.
_RULES = {
    "map": ("VM-001", "VM-025"),
    "unmap": ("VM-008",),
    "protect": ("VM-014", "VM-024", "VM-031"),
    "lock": ("VM-010",),
    "unlock": ("VM-010",),
    "move": ("VM-009", "VM-026"),
    "touch": ("VM-002", "VM-003", "VM-006", "VM-012", "VM-021", "VM-022"),
    "read": ("VM-002", "VM-021"),
    "write": ("VM-003", "VM-004", "VM-006", "VM-020", "VM-022"),
    "lockall": ("VM-032",),
    "unlockall": ("VM-032",),
    "msync": ("VM-032",),
    "brk": ("VM-030",),
    "pagemapread": ("PM-015", "PM-016"),
    "fork": ("VM-005",),
    "uffdprotect": ("VM-019", "VM-020"),
    "uffdregister": ("UF-001", "UF-010"),
    "uffdcopy": ("UF-004", "UF-010"),
    "uffdzeropage": ("UF-005", "UF-010"),
    "uffdcontinue": ("UF-006", "UF-010"),
    "uffdpoison": ("UF-007", "UF-010"),
    "uffdmove": ("UF-008", "UF-009"),
    "touchanswered": ("UF-001", "UF-012"),
    "memfdcreate": ("FM-001", "HT-015"),
    "scan": ("SC-001",),
    "openfile": ("DF-001",),
    "pread": ("FM-013", "DF-006"),
    "pwrite": ("FM-013", "DF-005"),
    "fsync": ("DF-004",),
    "sync": ("DF-004",),
    "fadvise": ("DF-009",),
    "dropcaches": ("DF-009",),
    "ftruncate": ("FM-007", "DF-008"),
    "fallocate": ("FM-006", "DF-007", "DF-008"),
    "lseek": ("FM-012", "DF-007"),
}
_ADVICE_RULES = {
    Madvise.DONTNEED: ("VM-007", "VM-013", "KX-013"),
    Madvise.FREE: ("VM-011", "VM-029"),
    Madvise.COLD: ("VM-029",),
    Madvise.PAGEOUT: ("VM-016", "VM-021", "VM-029"),
    Madvise.COLLAPSE: ("VM-027",),
    Madvise.GUARD_INSTALL: ("VM-015",),
    Madvise.GUARD_REMOVE: ("VM-015",),
}
#: Lines of a side's tables that a report shows.
_TABLE_LINES = 60
#: Size of the disk that files of random programs lie on.
_DISK = "256 MiB"
#: `--focus any`: half of the programs are biased to nothing, the others to what every machine has.
_ANY = ("", "", "", "cgroups", "disk", "ksm")
EXIT_DIFFERS, EXIT_CANNOT = 1, 2


@click.command(name="lockstep")
@click.option("--programs", type=click.IntRange(1), default=100, show_default=True, help="How many programs.")
@click.option(
    "--steps", type=click.IntRange(1), default=40, show_default=True, help="Steps of a program, at most."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same programs."
)
@click.option(
    "--first",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of the first program: a session that was cut short goes on.",
)
@click.option(
    "--differences",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="End after so many programs that differ.",
)
@click.option(
    "--focus",
    type=click.Choice((*FOCUSES, "any")),
    metavar="SUBJECT",
    help="What programs are biased to: cgroups, disk, ksm, or any: some of them to each, half of them to none.",
)
@click.option(
    "--replay", type=click.Path(dir_okay=False), metavar="FILE", help="Run this one program instead."
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Keep the program that differs, the next in FILE.2.",
)
@click.option("--left", default="sim", show_default=True, metavar="WORKBENCH", help="The model.")
@click.option(
    "--right", default="procfs", show_default=True, metavar="WORKBENCH", help="What it is held against."
)
@click.option(
    "--thp",
    multiple=True,
    metavar="SIZE=SETTING|random|mixed",
    help="Huge pages of that size on both sides (64kB=always, enabled=madvise), or others for each program, "
    "or for every second one.",
)
@click.option("--memory", default="256 MiB", show_default=True, help="Memory of a simulated machine.")
@click.option("--swap", default="256 MiB", show_default=True, help="Swap on both sides; 0 for none.")
@click.option(
    "--swap-device",
    metavar="PATH",
    default="",
    help="A block device that holds a swap area, for the side that is no model, instead of compressed memory.",
)
@click.option(
    "--hugepages",
    default="8+2",
    show_default=True,
    metavar="N[+M]",
    help="Huge pages (hugetlb) set aside on both sides, and surplus ones allowed; 0 for none.",
)
@click.option(
    "--hugetlb/--no-hugetlb",
    default=None,
    help="Random programs with hugetlb alone, or without (default: both).",
)
@click.option(
    "--kernel", metavar="VERSION", help="Kernel of the simulated machines (default: that of the other side)."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of the report.",
)
@click.option("--no-progress", is_flag=True, help="No bar, however long it takes.")
def command(**options: Any) -> int:
    """Run page-table programs on two workbenches at once, and compare everything visible after each step.

    Without --replay the programs are random. Exits with 0 if all agree, with 1 at a difference, having printed the
    smallest program that shows it, with 2 where it could not run.
    """
    try:
        with contextlib.ExitStack() as held:
            settings, words = _thp(options["thp"])
            left, right = _sides(options, held)
            if options["replay"]:
                return _replay(options, left, right, settings)
            return _session(options, left, right, settings, words)
    except BackendUnavailable as error:
        click.echo(f"pmcore: {error}", err=True)
        return EXIT_CANNOT


def _sides(options: dict[str, Any], held: contextlib.ExitStack) -> tuple[Callable[[], Workbench], ...]:
    """For each side what gives a workbench: a simulated machine is new for each program, another stays."""
    profile: Any = options["kernel"]
    disk_kind = ""
    hugepages = _hugepages(options["hugepages"])
    sides: dict[str, Callable[[], Workbench]] = {}
    for side in ("right", "left"):  # the model follows what it is held against
        name = options[side]
        if name == "sim":
            settings = {"memory": options["memory"], "swap": options["swap"], "hugepages": hugepages}
            if disk_kind:
                settings["disk_kind"] = disk_kind
            if options["swap_device"]:
                settings["swap_kind"] = "device"
            if profile is not None:
                settings["kernel"] = profile

            def fresh(settings: dict[str, Any] = settings) -> Workbench:
                return registry.open_workbench("sim", **settings)

            sides[side] = fresh
        else:
            bench = held.enter_context(
                _open(
                    name,
                    swap=options["swap_device"] or options["swap"],
                    hugepages=hugepages,
                    **({"disk": _DISK} if _needs_disk(options) else {}),
                )
            )
            if not bench.kernel.pfn_visible:
                raise BackendUnavailable("frame numbers are hidden", remedy="run as root")
            profile = profile or bench.kernel.profile
            disk_kind = bench.disk_kind or disk_kind
            sides[side] = functools.partial(_renewed, bench)
    return sides["left"], sides["right"]


def _hugepages(text: str) -> dict[int | str, tuple[int, int]]:
    """ "8+2": so many set aside, so many surplus ones allowed, of 2 MiB each."""
    number, _, surplus = text.partition("+")
    if not number.isdecimal() or not (surplus or "0").isdecimal():
        raise ArgumentError(f"--hugepages {text!r}", remedy="a number, or two as in 8+2")
    return {"2 MiB": (int(number), int(surplus or 0))} if int(number) or int(surplus or 0) else {}


def _needs_disk(options: dict[str, Any]) -> bool:
    """Whether programs use files on a disk: a workbench of real processes then makes one."""
    if options["replay"]:
        return any(isinstance(step, OpenFile) for step in _program(options["replay"]).steps)
    return options["focus"] in ("disk", "any")


def _renewed(bench: Workbench) -> Workbench:
    bench.renew()
    return bench


@contextlib.contextmanager
def _open(name: str, **settings: Any) -> Iterator[Workbench]:
    try:
        bench = registry.open_workbench(name, still=True, **settings)
    except TypeError as error:
        raise ArgumentError(f"workbench {name!r} refuses its options: {error}") from None
    with bench:
        yield bench


def _thp(words: tuple[str, ...]) -> tuple[dict[str, str], set[str]]:
    """What is set of huge pages, and what is said of the rest: random, mixed. Raises ArgumentError."""
    settings: dict[str, str] = {}
    for word in words:
        size, given, how = word.partition("=")
        if given:
            settings[size] = how
        elif word not in ("random", "mixed"):
            raise ArgumentError(f"--thp {word}", remedy="such as 64kB=always, or random, or mixed")
    Program(name="", steps=(), thp=settings)  # refuses what is no setting
    return settings, {word for word in words if "=" not in word}


def _session(
    options: dict[str, Any],
    left: Callable[[], Workbench],
    right: Callable[[], Workbench],
    thp: dict[str, str],
    drawn: set[str],
) -> int:
    saved: list[Result] = []

    def save(difference: Result) -> None:
        saved.append(difference)
        if options["save"]:
            note = "; ".join(map(str, difference.differences[:4]))
            place = options["save"] + (f".{len(saved)}" if len(saved) > 1 else "")
            save_program(attrs.evolve(difference.program, note=note), place)

    with progress_bar("lockstep", wanted=not options["no_progress"]) as progress:
        report = session(
            left,
            right,
            programs=options["programs"],
            steps=options["steps"],
            seed=options["seed"],
            first=options["first"],
            most=options["differences"],
            profile=right().kernel.profile,
            hugetlb=options["hugetlb"],
            thp=thp,
            random_thp="random" in drawn,
            mixed_thp="mixed" in drawn,
            focus=_ANY if options["focus"] == "any" else options["focus"] or "",
            progress=lambda report: progress(report.programs, options["programs"]),
            found=save,
        )
    found = report.differences
    if options["form"] == "json":
        words = report.as_dict()
        words["found"] = [
            {"number": number, **_as_dict(difference)}
            for number, difference in zip(report.numbers, found, strict=True)
        ]
        say(json.dumps(words, indent=1))
        return EXIT_DIFFERS if found else 0
    outcome = ("no difference", "a difference")[len(found)] if len(found) < 2 else f"{len(found)} differences"
    say(
        f"{report.programs} programs, {report.steps} steps, {report.scans} scans in {report.seconds:.0f} s: {outcome}"
    )
    for what, counts in (("masks used", report.masked), ("not modelled", report.not_modelled)):
        say(f"{what}: {', '.join(f'{key} {count}' for key, count in sorted(counts.items())) or 'none'}")
    say("reached: " + ", ".join(f"{key} {count}" for key, count in sorted(report.reached.items()) if count))
    for number, difference in zip(report.numbers, found, strict=True):
        say()
        say(f"Of program {number} of this seed:")
        _show(difference, left())
    return EXIT_DIFFERS if found else 0


def _replay(
    options: dict[str, Any],
    left: Callable[[], Workbench],
    right: Callable[[], Workbench],
    thp: dict[str, str],
) -> int:
    program = _program(options["replay"])
    program = attrs.evolve(program, thp={**dict(program.thp), **thp})
    result = lockstep(program, left(), right())
    if options["form"] == "json":
        say(json.dumps({"steps": result.steps, "scans": result.scans, **_as_dict(result)}, indent=1))
    elif result.agrees:
        masked = ", ".join(f"{key} {count}" for key, count in sorted(result.masked.items())) or "none"
        say(f"{result.steps} steps, {result.scans} scans: no difference; masks used: {masked}")
    else:
        _show(result, left())
    return 0 if result.agrees else EXIT_DIFFERS


def _program(path: str) -> Program:
    try:
        return load_program(Path(path))
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}") from None


def _as_dict(result: Result) -> dict[str, Any]:
    return {
        "differs_at": result.differs_at,
        "program": json.loads(_json(result.program)),
        "differences": [attrs.asdict(difference) for difference in result.differences],
        "rules": list(_rules(result)),
    }


def _json(program: Program) -> str:
    from pmcore.program import program_to_json

    return program_to_json(program)


def _rules(result: Result) -> tuple[str, ...]:
    if result.differs_at is None:
        return ()
    step = result.program.steps[result.differs_at]
    if isinstance(step, Advise):
        return _ADVICE_RULES.get(step.advice, ("VM-028",))  # type: ignore[call-overload, no-any-return]
    return _RULES.get(type(step).__name__.lower(), ())


def _show(result: Result, model: Workbench) -> None:
    say("The smallest program that differs:")
    if result.program.thp:
        say(f"      huge pages: {' '.join(f'{size}={how}' for size, how in result.program.thp)}")
    assert result.differs_at is not None
    for number, step in enumerate(result.program.steps[: result.differs_at + 1]):
        say(f"  {number:3d} {step_words(step)}")
    say()
    say(f"After step {result.differs_at}, left | right:")
    for difference in result.differences:
        say(f"  {difference}")
    if result.looks is not None:
        profile = model.kernel.profile
        for side, look in zip(("left", "right"), result.looks, strict=True):
            say()
            say(f"Tables, {side}:")
            lines = list(describe(look, profile, FrameNames()))
            for line in lines[:_TABLE_LINES]:
                say(line)
            if len(lines) > _TABLE_LINES:
                say(f"    and {len(lines) - _TABLE_LINES} lines more")
    rules = _rules(result)
    if rules:
        say()
        say("Rules in question:")
        for name in rules:
            rule = spec.rule(name)
            say(f"  {rule.id} {rule.title}: {rule.text}")


def step_words(step: Step) -> str:
    """A step as one line: its name and what is not the default."""
    parts = []
    for field in attrs.fields(type(step)):
        value = getattr(step, field.name)
        if value != field.default:
            shown = Madvise(value).name if field.name == "advice" and value in tuple(Madvise) else value
            parts.append(
                f"{field.name}={shown:#x}" if field.name in {"flags", "features"} else f"{field.name}={shown}"
            )
    return f"{type(step).__name__.lower()} {' '.join(parts)}".rstrip()
