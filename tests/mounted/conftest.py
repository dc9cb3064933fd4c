"""Skips where no file system can be mounted, and says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pmcore.errors import BackendUnavailable
from pmcore.program import Program, save_program
from pmcore.program import steps as s

#: A program whose machine the tests look at.
PROGRAM = Program(
    name="mounted",
    steps=(
        s.Map(area="a", pages=64),
        s.Touch(area="a", pages=20),
        s.Fork(child="child"),
        s.Write(task="child", area="a", text="mine"),
        s.Advise(area="a", page=10, pages=2, advice=21),
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/mounted" in item.path.as_posix():
            item.add_marker(pytest.mark.xdist_group("mounted"))  # they look at what is mounted: one at a time


@pytest.fixture(scope="session", autouse=True)
def _mountable() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("machines are mounted on Linux")
    from pmcore.mounted.fusefs import mfusepy

    try:
        mfusepy()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    probe = subprocess.run([*PMCORE, "exec", "--", "true"], capture_output=True, text=True, check=False)
    if probe.returncode == 4:
        pytest.skip(probe.stderr)
    assert probe.returncode == 0, probe.stderr


PMCORE = [sys.executable, "-m", "pmcore.cli"]


@pytest.fixture
def program(tmp_path: Path) -> str:
    """The program's file."""
    save_program(PROGRAM, tmp_path / "program.json")
    return str(tmp_path / "program.json")


@pytest.fixture
def inside(program: str) -> Any:
    """Run a command inside the program's machine: its exit code and output."""

    def go(*command: str, options: tuple[str, ...] = (), **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PMCORE, "exec", "--machine", program, *options, "--", *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **more,
        )

    return go


@pytest.fixture
def python(inside: Any) -> Any:
    """Run a Python script inside; what it printed."""

    def go(script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        done = inside(sys.executable, "-c", script, *arguments, options=options)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    return go


def mounts() -> list[str]:
    """What of ours is mounted in this namespace."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "fuse.pmcore" in line or " pmcore " in line or "- fuse " in line]


def ended(pid: int) -> bool:
    """Whether the process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(what: Any, *, seconds: float = 10) -> None:
    """Wait until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def started() -> Iterator[Any]:
    """Start pmcore and go on; killed at the end."""
    running: list[subprocess.Popen[str]] = []

    def go(*arguments: str, **more: Any) -> subprocess.Popen[str]:
        # Whoever runs the tests in the background has these ignored, and so would have what is started here.
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
        try:
            running.append(subprocess.Popen([*PMCORE, *arguments], stdout=subprocess.PIPE, text=True, **more))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return running[-1]

    yield go
    for each in running:
        if each.poll() is None:
            os.kill(each.pid, signal.SIGKILL)
        each.wait()
        if each.stdout is not None:
            each.stdout.close()
