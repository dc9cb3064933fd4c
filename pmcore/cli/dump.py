"""`pmcore dump`."""

from __future__ import annotations

from typing import Any

import click

from pmcore.cli.machine import machine_options, open_machine
from pmcore.cli.options import format_option, open_backend
from pmcore.cli.output import Column, Report, emit, human_size, progress_bar, say
from pmcore.errors import ArgumentError
from pmcore.procview import ProcView
from pmcore.procview.dump import dump


@click.command(name="dump")
@click.argument("directory", type=click.Path(file_okay=False))
@machine_options
@click.option(
    "--backend", metavar="NAME[:WHAT]", help="What a backend shows, instead of a simulated machine."
)
@click.option(
    "--backend-option", "backend_settings", multiple=True, metavar="KEY=VALUE", help="Passed to the backend."
)
@click.option("--self", "self_pid", type=click.IntRange(1), metavar="PID", help="Process that proc/self is.")
@click.option("--no-progress", is_flag=True, help="No bar, however long it takes.")
@format_option()
def command(
    directory: str,
    backend: str | None,
    backend_settings: tuple[str, ...],
    self_pid: int | None,
    no_progress: bool,
    form: str,
    **options: Any,
) -> int:
    """Write a machine's /proc and /sys to DIRECTORY, as plain files: sparse ones where they are large.

    For tools that read files or can be told another root: page-types -F DIRECTORY/proc/kpageflags, or our own commands
    with --proc-root DIRECTORY/proc. The exit code is 1 where a file could not be read.
    """
    if backend is None:
        kernel, _ = open_machine(options)
    else:
        given = [name for name, value in options.items() if value]
        if given:
            raise ArgumentError(f"--backend and --{given[0]} are different places to look at: give one")
        kernel = open_backend(backend, backend_settings)
    with kernel, progress_bar("processes", wanted=not no_progress) as progress:
        done = dump(ProcView(kernel, self_pid=self_pid), directory, progress=progress)
    figures = {
        "path": directory,
        "files": done.files,
        "written": done.written,
        "apparent": done.apparent,
        "refused": len(done.refused),
    }
    if form == "table":
        say(
            f"{directory}: {done.files} files, {human_size(done.written)} written, {human_size(done.apparent)} apparent"
        )
        if done.refused:
            shown = ", ".join(path for path, _ in done.refused[:4]) + (
                ", ..." if len(done.refused) > 4 else ""
            )
            say(f"{len(done.refused)} could not be read: {shown}")
    else:
        kinds = {"path": "text", "written": "bytes", "apparent": "bytes"}
        columns = [Column(name, kinds.get(name, "int")) for name in figures]
        emit(Report(columns, [tuple(figures.values())]), form)
    return 1 if done.refused else 0
