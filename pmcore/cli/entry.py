"""The entry point: finds commands without importing them, and turns every error into one line and an exit code.

Exit codes: 0 done; 1 done, and something was found or could not be fully answered; 2 wrong usage; 3 the kernel refused;
4 the backend is not to be had; 5 bad input; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import NoReturn

try:
    import click

    _MISSING = False
except ImportError:  # pragma: no cover - the extra is missing
    _MISSING = True

__all__ = ["COMMANDS", "main"]

#: Command -> one line of help. Its module is pmcore.cli.<command>, its click command is called `command`.
COMMANDS = {
    "tour": "See page tables change, step by step, on a simulated machine.",
    "doctor": "What this kernel and this user can see, and how to get the rest.",
    "types": "Count or list page frames by their flags, as page-types does.",
    "map": "A process's memory: per VMA, per page, or one page explained.",
    "scan": "PAGEMAP_SCAN: regions of a process whose pages match.",
    "dirty": "Which pages a process writes, interval by interval.",
    "thp": "How transparent huge pages are mapped, as thpmaps does.",
    "exec": "Run a command where /proc is a simulated machine's, or a recording's.",
    "mount": "Mount a simulated machine's /proc and /sys, or a recording's.",
    "dump": "Write a machine's /proc and /sys as plain files.",
    "record": "Record a machine or processes to a file, to be looked at anywhere.",
    "check": "Whether frames, page tables and counters agree with each other.",
    "validate": "A tool against the truth, on machines made to show what tools get wrong.",
    "lockstep": "The same programs on a model and on a kernel, every difference shown.",
    "decode": "Explain raw pagemap, kpageflags or category words.",
    "spec": "Show rules, divergences, flags and capabilities.",
    "completion": "Print the completion script for a shell.",
}
_MODULES = {"exec": "exec_", "map": "map_", "types": "types_"}

EXIT_USAGE, EXIT_KERNEL, EXIT_BACKEND, EXIT_INPUT, EXIT_INTERRUPTED = 2, 3, 4, 5, 130


if not _MISSING:

    class _Commands(click.Group):
        """A group that imports a command only when it is used."""

        def list_commands(self, ctx: click.Context) -> list[str]:
            return list(COMMANDS)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in COMMANDS:
                return None
            from importlib import import_module

            gc.disable()  # nothing that importing makes is garbage
            module = import_module(f"pmcore.cli.{_MODULES.get(cmd_name, cmd_name)}")
            gc.freeze()
            gc.enable()
            command: click.Command = module.command
            return command

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl(list(COMMANDS.items()))

    @click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(package_name="pmcore", prog_name="pmcore")
    def cli() -> None:
        """Linux's page tables: surveyed, decoded and explained.

        Looking at frames and at other users' processes needs root; `pmcore doctor` says what works here.
        """


def main() -> NoReturn:
    """Run the command line and exit."""
    if _MISSING:
        print("pmcore: the command line needs click and rich; pip install 'pmcore[cli]'", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    # We multiply no matrices: numpy need not start threads for that.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code = _run(sys.argv[1:])
    # All is written and closed: taking the interpreter apart would cost as much as a good part of the work.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run(arguments: list[str]) -> int:
    """Run one command line; its exit code."""
    from pmcore import errors

    try:
        result = cli.main(args=arguments, prog_name="pmcore", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except SystemExit as error:
        # Click ends a program whose reader has gone with 1; that is no failure of ours.
        gone = type(sys.stdout).__name__.endswith("PacifyFlushWrapper")
        return 0 if gone or not isinstance(error.code, int) else error.code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", None, EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read us has seen enough. Nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except errors.BackendUnavailable as error:
        return _fail(error.message, error.remedy, EXIT_BACKEND)
    except (errors.ArgumentError, errors.UnknownCapability) as error:
        return _fail(str(getattr(error, "message", error)), error.remedy, EXIT_USAGE)
    except errors.FormatError as error:
        where = f"{error.source}: {error.message}" if error.source else error.message
        return _fail(where, error.remedy, EXIT_INPUT)
    except errors.PmcoreError as error:
        text, _, remedy = str(error).partition("; ")
        return _fail(text, error.remedy or remedy or None, EXIT_KERNEL)
    except Exception as error:
        if os.environ.get("PMCORE_TRACEBACK"):
            raise
        remedy = "this is a bug of pmcore; set PMCORE_TRACEBACK=1 to see where"
        return _fail(f"{type(error).__name__}: {error}", remedy, 1)


def _fail(message: str, remedy: str | None, code: int) -> int:
    print(f"pmcore: {message}", file=sys.stderr)
    if remedy:
        print(f"        {remedy}", file=sys.stderr)
    return code
