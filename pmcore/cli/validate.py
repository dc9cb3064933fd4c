"""`pmcore validate`."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import click

from pmcore import spec
from pmcore.cli.output import progress_bar, say
from pmcore.errors import ArgumentError
from pmcore.validate import ADAPTERS, CommandTool, FunctionTool, Report, Tool, cases, validate

EXIT_BROKEN = 1
_SHOWN = 3


@click.command(name="validate")
@click.argument("arguments", nargs=-1, metavar="[-- COMMAND...]")
@click.option(
    "--function",
    metavar="MODULE:NAME",
    help="Instead of a command: a Python function of the process's number.",
)
@click.option(
    "--adapter",
    type=click.Choice(list(ADAPTERS)),
    help="How the output is read. [default: by the command's name, else json]",
)
@click.option(
    "--runner",
    type=click.Choice(["auto", "mount", "python"]),
    default="auto",
    show_default=True,
    help="Mounted machine (any command), or in this process (Python scripts).",
)
@click.option("--case", "names", multiple=True, metavar="NAME", help="This case only; may be repeated.")
@click.option(
    "--kernel", "kernels", multiple=True, metavar="VERSION", help="On this kernel only; may be repeated."
)
@click.option("--timeout", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Seconds a run.")
@click.option("--list", "listing", is_flag=True, help="Show the cases and do nothing else.")
@click.option("--no-progress", is_flag=True, help="No bar, however long it takes.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of the report.",
)
def command(
    arguments: tuple[str, ...],
    function: str | None,
    adapter: str | None,
    runner: str,
    names: tuple[str, ...],
    kernels: tuple[str, ...],
    timeout: float,
    listing: bool,
    no_progress: bool,
    form: str,
) -> int:
    """Run a tool, unchanged, on simulated machines that each show one thing that tools get wrong.

    What it says is compared with what is true, page by page; the report names the rules that it breaks. The command
    is told the process by the adapter's options, or by {pid} in it, and prints what it says (docs/validate.md).
    The exit code is 1 where a rule is broken.
    """
    chosen = cases(names)
    if listing:
        _list(chosen, form)
        return 0
    if bool(arguments) == bool(function):
        raise ArgumentError("one of --function and a command is needed", remedy="pmcore validate -- COMMAND")
    tool: Tool
    if function:
        tool = FunctionTool(_function(function), name=function)
    else:
        tool = CommandTool(arguments, adapter=adapter, runner=runner, timeout=timeout)
    with progress_bar("cases", wanted=not no_progress) as progress:
        report = validate(tool, chosen, kernels=kernels, progress=progress)
    if form == "json":
        say(json.dumps(report.as_data(), indent=1))
    else:
        _text(report)
    return 0 if report.well else EXIT_BROKEN


def _function(place: str) -> Any:
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(
            f"--function {place!r}: {error}", remedy="MODULE:NAME, importable from here"
        ) from None


def _list(chosen: Any, form: str) -> None:
    if form == "json":
        rows = [
            {"name": c.name, "mistake": c.mistake, "wrong": c.wrong, "right": c.right, "seen": c.seen}
            | {"rules": c.rules, "asks": c.asks, "kernels": c.kernels}
            for c in chosen
        ]
        say(json.dumps(rows, indent=1))
        return
    for case in chosen:
        say(f"{case.name}  ({', '.join(case.rules)}; {', '.join(case.kernels)})")
        say(f"  {case.mistake}")


def _text(report: Report) -> None:
    for result in report.results:
        if result.verdict == "right":
            continue
        rules = f" {', '.join(result.broken)}" if result.broken else ""
        say(f"{result.verdict:7} {result.case} on {result.kernel}{rules}")
        for finding in result.findings[:_SHOWN]:
            say(f"          {finding}")
        if len(result.findings) > _SHOWN:
            say(f"          ... and {len(result.findings) - _SHOWN} more")
        if result.silent:
            told = ", ".join(f"{key} ({rule})" for key, rule in result.silent)
            say(f"          says nothing of {told}")
        if result.note:
            say(f"          {result.note}")
    counts = dict.fromkeys(("right", "wrong", "failed", "silent", "refused", "skipped"), 0)
    for result in report.results:
        counts[result.verdict] += 1
    say(
        f"{report.tool}: {len(report.results)} runs: " + ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    )
    for rule, names in report.broken.items():
        say(f"breaks {rule} ({spec.rule(rule).title}): {', '.join(names)}")
    for (key, rule), names in report.untold.items():
        say(f"does not tell {key} ({rule} {spec.rule(rule).title}): {', '.join(names)}")
    if not report.broken:
        say("breaks no rule")
