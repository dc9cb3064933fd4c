"""`pmcore spec`."""

from __future__ import annotations

import difflib
import json
from typing import Any

import click

from pmcore import spec as law
from pmcore.cli.output import say
from pmcore.errors import FormatError


@click.command(name="spec")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--list", "listing", is_flag=True, help="One line for each rule and divergence.")
@click.option("--search", metavar="WORD", help="Rules and divergences that speak of WORD.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(names: tuple[str, ...], listing: bool, search: str | None, form: str) -> None:
    """Show rules (PM-006), families (SC), divergences (DV-003), flags (THP), capabilities (scan.guard).

    The families: PM pagemap, KC kpagecount, KF kpageflags, KG kpagecgroup, SC PAGEMAP_SCAN, SH shared memory,
    AC access and errors, VM memory semantics, DV divergences, and those of `--list`.
    """
    if not names and not search:
        listing = True
    entries: list[law.Rule | law.Divergence] = [*law.rules().values(), *law.divergences().values()]
    chosen: list[Any] = []
    if listing:
        chosen = list(entries)
    if search:
        word = search.lower()
        chosen += [e for e in entries if word in f"{e.id} {e.title} {e.text}".lower()]
        if not chosen:
            raise FormatError(f"no rule speaks of {search!r}")
    for name in names:
        chosen += _named(name)
    if form == "json":
        say(json.dumps([entry._asdict() for entry in chosen], indent=1))
        return
    short = listing or (bool(search) and not names)
    for number, entry in enumerate(chosen):
        if short:
            say(f"{entry.id:8} {entry.title}")
        else:
            say(("\n" if number else "") + _text(entry))


def _named(name: str) -> list[Any]:
    rules, divergences = law.rules(), law.divergences()
    upper = name.upper()
    if upper in rules:
        return [rules[upper]]
    if upper in divergences:
        return [divergences[upper]]
    every: list[law.Rule | law.Divergence] = [*rules.values(), *divergences.values()]
    family = [e for e in every if e.id.startswith(upper.rstrip("-") + "-")]
    flags = [row for row in law.kpageflags() if upper in (row.name, f"KPF_{row.name}")]
    categories = [
        row
        for row in (*law.scan_categories(), *law.scan_flags())
        if upper in (row.name, f"PAGE_IS_{row.name}", f"PM_SCAN_{row.name}")
    ]
    fields = [row for row in law.pagemap_bits() if upper in (row.name.upper(), row.kernel_name)]
    feature = law.features().get(name.lower())
    found = [*family, *flags, *categories, *fields, *([feature] if feature else [])]
    if not found:
        known = [*rules, *divergences, *law.features(), *(row.name for row in law.kpageflags())]
        close = difflib.get_close_matches(upper, known, n=3) or difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "pmcore spec --list shows all"
        raise FormatError(f"nothing in the specification is called {name!r}", remedy=hint)
    return found


def _text(entry: Any) -> str:
    lines: list[str] = []
    if isinstance(entry, law.Rule):
        lines = [f"{entry.id}  {entry.title}", "", f"    {entry.text}", ""]
        until = f", until {entry.until}" if entry.until else ""
        lines.append(f"    since      {entry.since}{until}")
        if entry.capability:
            lines.append(f"    needs      {entry.capability}")
        lines += [f"    source     {source}" for source in entry.source]
        lines += [f"    verified   {how}" for how in entry.verified]
    elif isinstance(entry, law.Divergence):
        lines = [f"{entry.id}  {entry.title}", "", f"    {entry.text}", ""]
        if entry.document:
            lines.append(f"    document   {entry.document}")
        lines += [f"    kernel     {kernel}" for kernel in entry.kernels]
        lines += [f"    rule       {number}" for number in entry.rules]
        lines += ["    reproduce", *(f"        {line}" for line in entry.reproduce.strip().splitlines())]
    else:
        row = entry._asdict()
        lines = [f"{row.pop('name')}  {row.pop('meaning', '')}"]
        lines += [
            f"    {key:10} {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
            for key, value in row.items()
            if value not in (None, "", ())
        ]
    return "\n".join(lines)
