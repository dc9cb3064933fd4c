"""`pmcore doctor`."""

from __future__ import annotations

import platform

import click

from pmcore.cli.options import backend_options, format_option, open_backend
from pmcore.cli.output import Column, Report, emit, say


@click.command(name="doctor")
@backend_options
@format_option()
def command(backend: str, backend_settings: tuple[str, ...], form: str) -> int:
    """What this kernel and this user can see, and how to get the rest.

    Nothing is changed by asking. The exit code is 1 where frame numbers or frame flags cannot be seen.
    """
    with open_backend(backend, backend_settings) as kernel:
        profile = kernel.profile
        report = getattr(kernel, "report", None)
        probes = report() if report is not None else ()
        seen = {probe.name: probe.ok for probe in probes}
        rows = [(probe.name, probe.ok, probe.seen, probe.remedy, probe.capability) for probe in probes] or [
            (name, True, "", "", name) for name in sorted(profile.capabilities)
        ]
        if form == "table":
            say(f"backend   {kernel.name}")
            say(f"kernel    {profile.name} on {profile.arch or platform.machine()}")
            geometry = profile.geometry
            say(f"pages     {geometry.page_size} bytes, PMD maps {geometry.pmd_size >> 20} MiB")
            say(f"frames    {'numbers shown' if kernel.pfn_visible else 'numbers hidden'}")
            say()
        columns = [
            Column("name"),
            Column("ok", "bool"),
            Column("seen"),
            Column("remedy", heading="to get it"),
        ]
        if form != "table":
            columns.append(Column("capability"))
        emit(Report(columns, (row[: len(columns)] for row in rows)), form)
        return 0 if kernel.pfn_visible and seen.get("kpageflags", True) else 1
