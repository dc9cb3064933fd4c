"""Options that several commands share, and the opening of backends and processes by them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pmcore import registry
from pmcore.cli.output import FORMATS
from pmcore.errors import ArgumentError

if TYPE_CHECKING:
    from pmcore.protocols import Kernel, Process

__all__ = ["Address", "backend_options", "format_option", "open_backend", "pid_of", "process_of"]

_F = TypeVar("_F", bound=Callable[..., Any])


class Address(click.ParamType[int]):
    """An address or number: decimal, 0x..., 0b..., or bare hex digits with a letter among them."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; a value that is none is a usage error."""
        if isinstance(value, int):
            return value
        for base in (0, 16):
            try:
                number = int(value, base)
            except ValueError:
                continue
            if 0 <= number < 1 << 64:
                return number
        return self.fail(f"{value!r} is no unsigned 64-bit number", param, ctx)


_ROOT = "pmcore.proc_root"


def _note_root(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """--proc-root is another word for a backend: noted here, and looked up when the backend is opened."""
    if value is not None:
        ctx.meta[_ROOT] = value


def backend_options(function: _F) -> _F:
    """--backend, --backend-option, --proc-root."""
    function = click.option(
        "--proc-root",
        metavar="DIR",
        expose_value=False,
        callback=_note_root,
        help="Look at a directory that pmcore dump wrote.",
    )(function)
    function = click.option(
        "--backend",
        default="procfs",
        show_default=True,
        metavar="NAME[:WHAT]",
        help="Where to look; recording:PATH is a recording.",
    )(function)
    return click.option(
        "--backend-option",
        "backend_settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Passed to the backend; may be repeated.",
    )(function)


def format_option(*more: str) -> Callable[[_F], _F]:
    """--format, with formats of the command's own added."""
    return click.option(
        "--format",
        "form",
        type=click.Choice([*FORMATS, *more]),
        default="table",
        show_default=True,
        help="Table for people, the others for machines.",
    )


def open_backend(backend: str, settings: tuple[str, ...], *, all_frames: bool = False) -> Kernel:
    """The kernel behind --backend. Raises BackendUnavailable, ArgumentError.

    `all_frames`: the command is going to read all of kpageflags; a backend that can begin at once may.
    """
    context = click.get_current_context(silent=True)
    root = context.meta.get(_ROOT) if context is not None else None
    if root is not None:
        if backend != "procfs" or settings:
            raise ArgumentError("--proc-root and --backend are different places to look at: give one")
        return registry.open("recording", root)
    options = {}
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found or not key:
            raise ArgumentError(f"--backend-option {setting!r} is not KEY=VALUE")
        options[key] = value
    name, given, what = backend.partition(":")
    place = (what,) if given else ()
    if all_frames:
        with contextlib.suppress(
            TypeError
        ):  # a backend that knows no such option says so before it does anything
            return registry.open(name, *place, **options, read_ahead=True)
    try:
        return registry.open(name, *place, **options)
    except TypeError as error:
        raise ArgumentError(f"backend {name!r} refuses its options: {error}") from None


def pid_of(text: str) -> int:
    """A process number, or "self" for pmcore's own process."""
    if text == "self":
        return os.getpid()
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"{text!r} is no process number") from None


def process_of(kernel: Kernel, text: str) -> Process:
    """The process that a PID argument names. Raises ProcessGone."""
    return kernel.process(pid_of(text))
