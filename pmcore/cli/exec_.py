"""`pmcore exec`."""

from __future__ import annotations

from typing import Any

import click

from pmcore.cli.machine import machine_options
from pmcore.cli.mount import tree_of
from pmcore.mounted import execute


@click.command(name="exec", context_settings={"ignore_unknown_options": False})
@click.argument("arguments", nargs=-1, required=True, metavar="-- COMMAND...")
@machine_options
@click.option("--self", "self_pid", type=click.IntRange(1), metavar="PID", help="Process that /proc/self is.")
@click.option(
    "--privilege",
    type=click.Choice(["caller", "root", "none"]),
    default="caller",
    show_default=True,
    help="What the command may see: by its user (0 may all), or all, or as somebody unprivileged.",
)
@click.option(
    "--step", is_flag=True, help="Run the program by writing numbers of steps to /proc/pmcore/step."
)
def command(
    arguments: tuple[str, ...], self_pid: int | None, privilege: str, step: bool, **options: Any
) -> int:
    """Run COMMAND, unchanged, where /proc and /sys/kernel/mm are those of a simulated machine or a recording.

    Processes are simulated tasks, numbered from 1 in the order in which the program makes them; /proc/self is the
    command itself unless --self says otherwise. The exit code is the command's.
    """
    return execute(tree_of(options, self_pid=self_pid, privilege=privilege, step=step), arguments)
