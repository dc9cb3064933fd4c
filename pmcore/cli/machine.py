"""Options that say which simulated machine, or which recording, a tool is shown; and the making of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pmcore import registry
from pmcore.errors import ArgumentError, syscall_error
from pmcore.program import Program, Run, load_program

if TYPE_CHECKING:
    from pmcore.protocols import Kernel

__all__ = ["SHAPE", "machine_options", "open_machine"]

_F = TypeVar("_F", bound=Callable[..., Any])

#: Options that shape a machine, and mean nothing for a recording.
SHAPE = ("memory", "swap", "kernel", "config", "hugepages", "thp")
_MEMORY, _SWAP = "64 MiB", "16 MiB"


def machine_options(function: _F) -> _F:
    """--machine and what shapes a simulated one."""
    for option in reversed(
        (
            click.option(
                "--machine",
                metavar="FILE",
                help="A program (JSON), run on a fresh machine, or a recording, or a dump. [default: a fresh machine]",
            ),
            click.option("--memory", metavar="SIZE", help=f"Memory of the machine. [default: {_MEMORY}]"),
            click.option("--swap", metavar="SIZE", help=f"Swap, 0 for none. [default: {_SWAP}]"),
            click.option("--kernel", metavar="VERSION", help="Its kernel. [default: 6.12]"),
            click.option(
                "--config",
                multiple=True,
                metavar="[!]CONFIG",
                help="What its kernel was configured with, or without.",
            ),
            click.option(
                "--hugepages", metavar="N[+M]", help="hugetlb pages set aside, and surplus ones allowed."
            ),
            click.option(
                "--thp",
                multiple=True,
                metavar="SIZE=SETTING",
                help="Huge pages of that size: 64kB=always, enabled=madvise.",
            ),
        )
    ):
        function = option(function)
    return function


def open_machine(options: dict[str, Any], *, run: bool = True) -> tuple[Kernel, Run | None]:
    """The kernel to be shown, and the program that runs on it (`run`: has run), where there is one.

    Raises ArgumentError, FormatError, Missing.
    """
    path = options["machine"]
    program = Program(name="a fresh machine", steps=())
    if path is not None:
        try:
            head = b"" if Path(path).is_dir() else _head(path)
        except OSError as error:
            raise syscall_error(error.errno or 5, f"open({path})") from None
        if not head.lstrip().startswith(b"{"):
            given = [f"--{name}" for name in SHAPE if options[name]]
            if given:
                raise ArgumentError(f"a recording is as it was: {', '.join(given)} cannot be set")
            return registry.open("recording", path), None
        program = load_program(path)
    machine = registry.open_workbench("sim", **_settings(options))
    if path is None:
        machine.spawn()
        return machine.kernel, None
    state = Run(program, machine)
    if run:
        for step in program.steps:
            state.advance(step)
    return machine.kernel, state


def _head(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(64)


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"memory": options["memory"] or _MEMORY, "swap": options["swap"] or _SWAP}
    if options["kernel"]:
        found["kernel"] = options["kernel"]
    if options["config"]:
        found["config"] = options["config"]
    if options["hugepages"]:
        count, plus, surplus = options["hugepages"].partition("+")
        try:
            found["hugepages"] = {"2 MiB": (int(count), int(surplus) if plus else 0)}
        except ValueError:
            raise ArgumentError(f"--hugepages {options['hugepages']!r} is not N or N+M") from None
    sizes = {}
    for setting in options["thp"]:
        size, equals, how = setting.partition("=")
        if not equals:
            raise ArgumentError(f"--thp {setting!r} is not SIZE=SETTING")
        sizes[size] = how
    policy: dict[str, Any] = {"pmd": sizes.pop("enabled")} if "enabled" in sizes else {}
    if sizes:
        policy["thp_sizes"] = sizes
    if policy:
        found["policy"] = policy
    return found
