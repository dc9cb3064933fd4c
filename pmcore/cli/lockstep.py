"""`pmcore lockstep`."""

from __future__ import annotations

import contextlib
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
from pmcore.program import Program, load_program, save_program
from pmcore.program.steps import Advise, Step
from pmcore.protocols import Workbench
from pmcore.uapi import Madvise

#: The rules that a step is about, for whoever has to find out which side is wrong.
_RULES = {
    "map": ("VM-001", "VM-025"),
    "unmap": ("VM-008",),
    "protect": ("VM-014", "VM-024"),
    "lock": ("VM-010",),
    "unlock": ("VM-010",),
    "move": ("VM-009", "VM-026"),
    "touch": ("VM-002", "VM-003", "VM-006", "VM-012", "VM-021", "VM-022"),
    "read": ("VM-002", "VM-021"),
    "write": ("VM-003", "VM-004", "VM-006", "VM-020", "VM-022"),
    "fork": ("VM-005",),
    "uffdprotect": ("VM-019", "VM-020"),
    "scan": ("SC-001",),
}
_ADVICE_RULES = {
    Madvise.DONTNEED: ("VM-007", "VM-013"),
    Madvise.FREE: ("VM-011", "VM-029"),
    Madvise.COLD: ("VM-029",),
    Madvise.PAGEOUT: ("VM-016", "VM-021", "VM-029"),
    Madvise.COLLAPSE: ("VM-027",),
    Madvise.GUARD_INSTALL: ("VM-015",),
    Madvise.GUARD_REMOVE: ("VM-015",),
}
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
    "--focus", type=click.Choice(["ksm"]), metavar="SUBJECT", help="What programs are biased to: ksm."
)
@click.option(
    "--replay", type=click.Path(dir_okay=False), metavar="FILE", help="Run this one program instead."
)
@click.option(
    "--save", type=click.Path(dir_okay=False), metavar="FILE", help="Keep the program that differs."
)
@click.option("--left", default="sim", show_default=True, metavar="WORKBENCH", help="The model.")
@click.option(
    "--right", default="procfs", show_default=True, metavar="WORKBENCH", help="What it is held against."
)
@click.option("--memory", default="256 MiB", show_default=True, help="Memory of a simulated machine.")
@click.option("--swap", default="256 MiB", show_default=True, help="Swap on both sides; 0 for none.")
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
            left, right = _sides(options, held)
            if options["replay"]:
                return _replay(options, left, right)
            return _session(options, left, right)
    except BackendUnavailable as error:
        click.echo(f"pmcore: {error}", err=True)
        return EXIT_CANNOT


def _sides(options: dict[str, Any], held: contextlib.ExitStack) -> tuple[Callable[[], Workbench], ...]:
    """For each side what gives a workbench: a simulated machine is new for each program, another stays."""
    profile: Any = options["kernel"]
    sides: dict[str, Callable[[], Workbench]] = {}
    for side in ("right", "left"):  # the model follows what it is held against
        name = options[side]
        if name == "sim":
            settings = {"memory": options["memory"], "swap": options["swap"]}
            if profile is not None:
                settings["kernel"] = profile

            def fresh(settings: dict[str, Any] = settings) -> Workbench:
                return registry.open_workbench("sim", **settings)

            sides[side] = fresh
        else:
            bench = held.enter_context(_open(name, options["swap"]))
            if not bench.kernel.pfn_visible:
                raise BackendUnavailable("frame numbers are hidden", remedy="run as root")
            profile = profile or bench.kernel.profile
            sides[side] = lambda bench=bench: bench  # type: ignore[misc]
    return sides["left"], sides["right"]


@contextlib.contextmanager
def _open(name: str, swap: str) -> Iterator[Workbench]:
    try:
        bench = registry.open_workbench(name, still=True, swap=swap)
    except TypeError as error:
        raise ArgumentError(f"workbench {name!r} refuses its options: {error}") from None
    with bench:
        yield bench


def _session(options: dict[str, Any], left: Callable[[], Workbench], right: Callable[[], Workbench]) -> int:
    try:
        from pmcore.lockstep.session import session
    except ImportError:
        raise BackendUnavailable(
            "random programs need Hypothesis", remedy="pip install 'pmcore[lockstep]'"
        ) from None
    with progress_bar("lockstep", wanted=not options["no_progress"]) as progress:
        report = session(
            left,
            right,
            programs=options["programs"],
            steps=options["steps"],
            seed=options["seed"],
            focus=options["focus"] or "",
            progress=lambda report: progress(report.programs, options["programs"]),
        )
    found = report.difference
    if found is not None and options["save"]:
        save_program(found.program, options["save"])
    if options["form"] == "json":
        words = report.as_dict()
        if found is not None:
            words["difference"] = _as_dict(found)
        say(json.dumps(words, indent=1))
        return EXIT_DIFFERS if found is not None else 0
    outcome = "no difference" if found is None else "a difference"
    say(
        f"{report.programs} programs, {report.steps} steps, {report.scans} scans in {report.seconds:.0f} s: {outcome}"
    )
    for what, counts in (("masks used", report.masked), ("not modelled", report.not_modelled)):
        say(f"{what}: {', '.join(f'{key} {count}' for key, count in sorted(counts.items())) or 'none'}")
    say("reached: " + ", ".join(f"{key} {count}" for key, count in sorted(report.reached.items()) if count))
    if found is None:
        return 0
    say()
    _show(found, left())
    return EXIT_DIFFERS


def _replay(options: dict[str, Any], left: Callable[[], Workbench], right: Callable[[], Workbench]) -> int:
    try:
        program = load_program(Path(options["replay"]))
    except OSError as error:
        raise ArgumentError(f"{options['replay']}: {error.strerror}") from None
    result = lockstep(program, left(), right())
    if options["form"] == "json":
        say(json.dumps({"steps": result.steps, "scans": result.scans, **_as_dict(result)}, indent=1))
    elif result.agrees:
        masked = ", ".join(f"{key} {count}" for key, count in sorted(result.masked.items())) or "none"
        say(f"{result.steps} steps, {result.scans} scans: no difference; masks used: {masked}")
    else:
        _show(result, left())
    return 0 if result.agrees else EXIT_DIFFERS


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
            for line in describe(look, profile, FrameNames()):
                say(line)
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
