"""`pmcore record`."""

from __future__ import annotations

from typing import Any

import click

from pmcore.cli.options import backend_options, format_option, open_backend, pid_of
from pmcore.cli.output import Column, Report, emit, human_size, progress_bar, say
from pmcore.recording import record


@click.command(name="record")
@click.argument("path", type=click.Path(dir_okay=False))
@click.argument("pids", nargs=-1, metavar="[PID]...")
@click.option(
    "--anonymise", is_flag=True, help="Give frames other numbers; compound pages stay in order and aligned."
)
@click.option("--files", is_flag=True, help="Also ask which pages of mapped files exist and are in memory.")
@click.option("--force", is_flag=True, help="Replace PATH if it is there.")
@click.option("--no-progress", is_flag=True, help="No bar, however long it takes.")
@backend_options
@format_option()
def command(
    path: str,
    pids: tuple[str, ...],
    anonymise: bool,
    files: bool,
    force: bool,
    no_progress: bool,
    backend: str,
    backend_settings: tuple[str, ...],
    form: str,
) -> int:
    """Record what the machine shows to the file PATH: all frames, and all processes or those named.

    Look at it with --backend recording:PATH, on any machine. It holds frame numbers (unless --anonymise), names of
    processes and of the files that they map, but no contents of memory. The exit code is 1 where a process could
    not be read.
    """
    chosen = [pid_of(text) for text in pids] if pids else None
    with (
        open_backend(backend, backend_settings) as kernel,
        progress_bar("processes", wanted=not no_progress) as progress,
    ):
        done = record(
            kernel,
            path,
            pids=chosen,
            anonymise=anonymise,
            files=files,
            overwrite=force,
            progress=progress,
        )
    figures: dict[str, Any] = {
        "path": path,
        "bytes": done.size,
        "frames": done.frames,
        "processes": len(done.pids),
        "entries": done.entries,
        "refused": len(done.refused),
        "gone": len(done.gone),
        "seconds": round(done.seconds, 3),
    }
    if form == "table":
        say(
            f"{path}: {human_size(done.size)}, {done.frames} frames, {len(done.pids)} processes with "
            f"{done.entries} pages, in {done.seconds:.1f} s"
        )
        for what, which in (("could not be read", done.refused), ("ended meanwhile", done.gone)):
            if which:
                shown = ", ".join(map(str, which[:8])) + (", ..." if len(which) > 8 else "")
                say(f"{len(which)} {what}: {shown}")
    else:
        kinds = {"path": "text", "bytes": "bytes", "seconds": "float"}
        columns = [Column(name, kinds.get(name, "int")) for name in figures]
        emit(Report(columns, [tuple(figures.values())]), form)
    return 1 if done.refused else 0
