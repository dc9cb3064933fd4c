"""`pmcore completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from pmcore.cli.output import say
from pmcore.errors import ArgumentError


@click.command(name="completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL.

    For bash: pmcore completion bash >> ~/.bashrc
    """
    from pmcore.cli.entry import cli

    made = get_completion_class(shell)
    if made is None:
        raise ArgumentError(f"no completion for {shell}")
    say(made(cli, {}, "pmcore", "_PMCORE_COMPLETE").source())
