"""`pmcore mount`."""

from __future__ import annotations

import sys
from typing import Any

import click

from pmcore.cli.machine import machine_options, open_machine
from pmcore.cli.output import say
from pmcore.errors import ArgumentError
from pmcore.mounted import Stepper, Tree, mount
from pmcore.procview import ROOT, Opener, ProcView


@click.command(name="mount")
@click.argument("directory", type=click.Path(file_okay=False))
@machine_options
@click.option("--self", "self_pid", type=click.IntRange(1), metavar="PID", help="Process that proc/self is.")
@click.option(
    "--privilege",
    type=click.Choice(["caller", "root", "none"]),
    default="caller",
    show_default=True,
    help="What callers may see: by their user (0 may all), or all alike.",
)
@click.option("--step", is_flag=True, help="Run the program by writing numbers of steps to proc/pmcore/step.")
@click.option("--others", is_flag=True, help="Let other users in.")
def command(
    directory: str, self_pid: int | None, privilege: str, step: bool, others: bool, **options: Any
) -> None:
    """Mount a machine's /proc and /sys on DIRECTORY, until interrupted or unmounted.

    For tools that can be told another root; `pmcore exec` runs those that cannot. Processes are simulated tasks,
    numbered from 1 in the order in which the program makes them.
    """
    tree = tree_of(options, self_pid=self_pid, privilege=privilege, step=step)

    def ready() -> None:
        say(f"mounted on {directory}: proc and sys; interrupt to unmount")
        sys.stdout.flush()

    mount(tree, directory, others=others, ready=ready)


def tree_of(options: dict[str, Any], *, self_pid: int | None, privilege: str, step: bool) -> Tree:
    """The tree of the machine that the options name."""
    kernel, run = open_machine(options, run=not step)
    if step and run is None:
        raise ArgumentError("--step needs a program", remedy="--machine PROGRAM.json")
    owner = _NOBODY if privilege == "none" else 0
    view = ProcView(kernel, owner=owner, self_pid=self_pid)
    return Tree(view, opener=_OPENERS[privilege], stepper=Stepper(run) if step and run else None)


#: Whose the processes are where nobody is privileged.
_NOBODY = 65534
_OPENERS = {
    "caller": lambda uid: ROOT if uid == 0 else Opener.user(uid),
    "root": lambda _uid: ROOT,
    "none": lambda _uid: Opener.user(_NOBODY),
}
