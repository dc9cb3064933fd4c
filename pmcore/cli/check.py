"""`pmcore check`."""

from __future__ import annotations

import json

import attrs
import click

from pmcore import spec
from pmcore.analysis.invariants import Health, check
from pmcore.cli.options import backend_options, open_backend
from pmcore.cli.output import progress_bar, say

EXIT_BROKEN = 1


@click.command(name="check")
@click.option("--only", multiple=True, metavar="RULE", help="Check this rule; may be repeated.")
@click.option("--ignore", multiple=True, metavar="RULE", help="Do not check this rule; may be repeated.")
@click.option("--no-progress", is_flag=True, help="No bar, however long it takes.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of the report.",
)
@backend_options
def command(
    only: tuple[str, ...],
    ignore: tuple[str, ...],
    no_progress: bool,
    form: str,
    backend: str,
    backend_settings: tuple[str, ...],
) -> int:
    """Whether frames, page tables and counters agree with each other (rules IN-001 to IN-020; `pmcore spec IN-001`).

    Reads all frames and all processes; what disagrees is looked at again before it is reported, as a machine changes
    while it is read. Changes nothing. The exit code is 1 where a rule does not hold.
    """
    chosen, without = (tuple(name.upper() for name in names) for names in (only, ignore))
    with (
        open_backend(backend, backend_settings) as kernel,
        progress_bar("reading frames", wanted=not no_progress) as progress,
    ):
        health = check(kernel, only=chosen, ignore=without, progress=progress)
    if form == "json":
        figures = attrs.asdict(health)
        figures["findings"] = [
            {**row, "title": spec.rule(row["rule"]).title} for row in figures.pop("findings")
        ]
        say(json.dumps({"well": health.well, **figures}, indent=1))
    else:
        _text(health)
    return 0 if health.well else EXIT_BROKEN


def _text(health: Health) -> None:
    for finding in health.findings:
        rule = spec.rule(finding.rule)
        known = f" (known: {', '.join(finding.known)})" if finding.known else ""
        say(f"{rule.id} {rule.title}: not so for {finding.count} {finding.what}{known}")
        for place in finding.places:
            say(f"  {place}")
        if finding.count > len(finding.places):
            say(f"  ... and {finding.count - len(finding.places)} more")
    broken = f"{len(health.findings)} of {len(health.rules)} rules do not hold"
    say(
        f"{health.frames} frames, {health.processes} processes, {health.entries} entries in {health.seconds:.1f} s: "
        f"{broken if health.findings else f'all {len(health.rules)} rules hold'}"
    )
    if health.unreadable:
        shown = ", ".join(map(str, health.unreadable[:8])) + (", ..." if len(health.unreadable) > 8 else "")
        say(
            f"{len(health.unreadable)} processes could not be read ({shown}): "
            f"{health.unexplained} frames have more mappings than were seen"
        )
    if health.unsettled:
        say(f"{health.unsettled} places went on changing")
