"""Running a tool on the cases."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from pmcore.errors import ArgumentError, BackendUnavailable, FormatError
from pmcore.testing.fakeproc import fake_proc
from pmcore.validate.adapters import ADAPTERS, Adapter
from pmcore.validate.case import Case, Scene, cases
from pmcore.validate.report import Finding, Report, Result
from pmcore.validate.says import compare, read_says
from pmcore.validate.truth import RULES, Truth

__all__ = ["CommandTool", "FunctionTool", "Tool", "validate"]

_LINES = 3


@attrs.frozen
class _Failed(Exception):
    """The tool ended with an error, or its answer cannot be read."""

    note: str


class Tool(Protocol):
    """What can be asked about a scene."""

    name: str

    def ask(self, scene: Scene) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """The keys told and the findings. Raises _Failed."""
        ...


class FunctionTool:
    """A Python function in this process: `function(pid)` returns what it says (see the protocol in docs/validate.md).

    It opens files of /proc as it would anywhere: `pmcore.testing.fake_proc` is in force, and /proc/self is the task.
    """

    def __init__(self, function: Callable[[int], Any], *, name: str | None = None) -> None:
        self.name: str = name or str(getattr(function, "__name__", "function"))
        self._function = function

    def ask(self, scene: Scene) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """Call it."""
        with fake_proc(scene.shown, pid=scene.pid, opener=scene.opener, owner=scene.owner):
            try:
                said = self._function(scene.pid)
            except Exception as error:
                raise _Failed(f"{type(error).__name__}: {error}") from error
        try:
            says = read_says(said)
        except FormatError as error:
            raise _Failed(str(error)) from error
        return says.keys, compare(
            says, Truth.of(scene.shown, scene.pid, hidden=scene.case.unprivileged), scene.case
        )


class CommandTool:
    """A command, run inside the machine. `runner`: "mount" (any command; Linux, FUSE), "python" (a Python script, in
    this process, on any operating system), or "auto": in this process what is a script, where mounting cannot be.

    Raises ArgumentError for an adapter or runner that there is not.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        adapter: str | Adapter | None = None,
        runner: str = "auto",
        timeout: float = 30.0,
    ) -> None:
        if not command:
            raise ArgumentError("no command")
        self.name = " ".join(command)
        self._command = list(command)
        self._adapter = _adapter(_by_name(command) if adapter is None else adapter)
        if runner not in ("auto", "mount", "python"):
            raise ArgumentError(f"runner {runner!r}", remedy="auto, mount or python")
        self._runner = runner
        self._timeout = timeout

    def ask(self, scene: Scene) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """Run it, and read its output."""
        argv = self._adapter.command(self._command, scene.pid)
        place = self._script()
        if self._runner == "python" and place is None:
            raise ArgumentError(f"{self._command[0]} is no Python script", remedy="--runner mount")
        if place is not None and (self._runner == "python" or (self._runner == "auto" and not _can_mount())):
            code, out, err = _in_process(scene, argv[place:])
        else:
            code, out, err = self._mounted(scene, argv)
        if code:
            last = [line for line in err.strip().splitlines() if line.strip()][-_LINES:]
            raise _Failed(f"exit code {code}: {' / '.join(last) or 'nothing on standard error'}")
        try:
            return self._adapter.judge(scene, out)
        except FormatError as error:
            raise _Failed(str(error)) from error

    def _script(self) -> int | None:
        """Which word is the Python script that the command is: the first, or the one after an interpreter's name."""
        words = self._command
        place = int(Path(words[0]).name.startswith("python") and len(words) > 1)
        path = Path(words[place])
        try:
            with path.open("rb") as file:
                head = file.readline(200)
        except OSError:
            return None
        return place if path.suffix == ".py" or (head.startswith(b"#!") and b"python" in head) else None

    def _mounted(self, scene: Scene, argv: list[str]) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "pmcore.validate.inside", scene.case.name, scene.kernel, "--", *argv]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, timeout=self._timeout
            )
        except subprocess.TimeoutExpired:
            raise _Failed(f"not done after {self._timeout:.0f} s") from None
        if done.returncode == UNAVAILABLE:
            raise BackendUnavailable(done.stderr.strip() or "the machine cannot be mounted")
        return done.returncode, done.stdout, done.stderr


#: Exit code of `pmcore.validate.inside` where nothing can be mounted: no tool of ours uses it.
UNAVAILABLE = 241


def _by_name(command: Sequence[str]) -> str:
    """The adapter that has the name of the command, or of the script in it."""
    return next((name for name in (Path(word).stem for word in command[:2]) if name in ADAPTERS), "json")


def _adapter(wanted: str | Adapter) -> Adapter:
    if not isinstance(wanted, str):
        return wanted
    if wanted not in ADAPTERS:
        raise ArgumentError(f"no adapter {wanted!r}", remedy=f"there are: {', '.join(ADAPTERS)}")
    return ADAPTERS[wanted]


def _can_mount() -> bool:
    from importlib.util import find_spec

    return sys.platform.startswith("linux") and find_spec("mfusepy") is not None


def _in_process(scene: Scene, argv: list[str]) -> tuple[int, str, str]:
    """Run a Python script as the main program of this process."""
    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = argv
    try:
        with (
            fake_proc(scene.shown, pid=scene.pid, opener=scene.opener, owner=scene.owner),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        code = 1
        err.write(f"{type(error).__name__}: {error}")
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue() or (out.getvalue() if code else "")


def validate(
    tool: Tool,
    chosen: Iterable[Case] | None = None,
    *,
    kernels: Sequence[str] = (),
    progress: Callable[[int, int], object] | None = None,
) -> Report:
    """Run `tool` on each case (default: all) on each of its kernels, or those of `kernels` that it names."""
    runs = [
        (case, kernel)
        for case in (cases() if chosen is None else chosen)
        for kernel in case.kernels
        if not kernels or kernel in kernels
    ]
    results = []
    for number, (case, kernel) in enumerate(runs):
        if progress is not None:
            progress(number, len(runs))
        results.append(_result(tool, case, kernel))
    return Report(tool=tool.name, results=tuple(results))


def _result(tool: Tool, case: Case, kernel: str) -> Result:
    began = time.monotonic()
    failing = case.rule_of.get("", "")
    result = Result(case=case.name, kernel=kernel, rules=case.rules, failing=failing, verdict="right")
    with _closing(case.scene(kernel)) as scene:
        try:
            told, findings = tool.ask(scene)
            asked = (keys for keys in case.asks if not set(keys.split("|")) & set(told))
            silent = tuple(
                (key, case.rule_of.get(key, RULES[key])) for keys in asked for key in keys.split("|")[:1]
            )
            verdict = "wrong" if findings else "silent" if silent else "right"
            result = attrs.evolve(result, verdict=verdict, told=told, silent=silent, findings=findings)
        except _Failed as failed:
            result = attrs.evolve(
                result, verdict="refused" if case.may_refuse else "failed", note=failed.note
            )
        except BackendUnavailable as error:
            result = attrs.evolve(result, verdict="skipped", note=str(error))
    return attrs.evolve(result, seconds=time.monotonic() - began)


@contextlib.contextmanager
def _closing(scene: Scene) -> Iterator[Scene]:
    try:
        yield scene
    finally:
        scene.run.workbench.close()
