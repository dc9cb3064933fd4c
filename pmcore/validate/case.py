"""Cases: a state of a machine that shows one mistake, as a program with what it is about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import attrs

from pmcore import registry
from pmcore.errors import ArgumentError, FormatError
from pmcore.procview import ROOT, Opener
from pmcore.program import Program, Run, program_from_json, run
from pmcore.protocols import Kernel
from pmcore.validate.future import FutureKernel

__all__ = ["Case", "Scene", "cases", "load_case"]

_VERSION = 1
#: Who looks where a case is about somebody without privilege. The task is theirs.
_SOMEBODY = Opener.user(1000)
_TEXTS = ("name", "mistake", "wrong", "right", "seen", "opener")
_FIELDS = {
    "pmcore_case",
    *_TEXTS,
    "rules",
    "asks",
    "kernels",
    "needs",
    "machine",
    "refusal",
    "future",
    "program",
}


@attrs.frozen(kw_only=True)
class Case:
    """See docs/validate.md for what is in a case's file."""

    name: str
    #: What tools get wrong, the wrong reading and the right one, in words; where it was seen.
    mistake: str
    wrong: str
    right: str
    seen: str
    #: The rule that the mistake breaks first; others by what is told wrong.
    rules: tuple[str, ...]
    #: Rule by key, where it is another than the usual one for that key; "": of ending with an error.
    rule_of: Mapping[str, str]
    #: What a tool has to tell to be judged by this case.
    asks: tuple[str, ...]
    kernels: tuple[str, ...]
    #: Capabilities without which a kernel of these versions cannot show it: its configuration decides.
    needs: tuple[str, ...]
    machine: Mapping[str, Any]
    #: Whether somebody without privilege looks.
    unprivileged: bool
    #: Whether ending with an error is an answer.
    may_refuse: bool
    #: Flag bits that a later kernel has given to the frames of the task.
    future_flags: int
    program: Program

    def scene(self, kernel: str) -> Scene:
        """The machine of this case, running `kernel`, in its state."""
        settings = {"memory": "64 MiB", "swap": "16 MiB", **self.machine, "kernel": kernel}
        machine: Any = registry.open_workbench("sim", **settings)
        state = run(self.program, machine)
        pid = state.task("main").pid
        shown: Kernel = machine
        if self.future_flags:
            shown = FutureKernel(machine, pid=pid, flags=self.future_flags)
        opener, owner = (_SOMEBODY, _SOMEBODY.uid) if self.unprivileged else (ROOT, 0)
        return Scene(case=self, kernel=kernel, run=state, shown=shown, pid=pid, opener=opener, owner=owner)


@attrs.frozen(kw_only=True)
class Scene:
    """A case's machine, ready to be looked at: `shown` is what the tool sees, by `opener`."""

    case: Case
    kernel: str
    #: The program that has run.
    run: Run
    shown: Kernel
    pid: int
    opener: Opener
    owner: int


def load_case(text: str, *, source: str = "case") -> Case:
    """The case in a file's text. Raises FormatError."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise FormatError(f"not JSON: {error}", source=source) from None
    if not isinstance(data, dict) or data.get("pmcore_case") != _VERSION:
        raise FormatError(f"not a case of version {_VERSION}", source=source)
    unknown = data.keys() - _FIELDS
    if unknown:
        raise FormatError(f"unknown fields {sorted(unknown)}", source=source)
    try:
        return Case(
            name=data["name"],
            mistake=data["mistake"],
            wrong=data["wrong"],
            right=data["right"],
            seen=data.get("seen", ""),
            rules=tuple(dict.fromkeys(data["rules"].values())),
            rule_of=dict(data["rules"]),
            asks=tuple(data["asks"]),
            kernels=tuple(data["kernels"]),
            needs=tuple(data.get("needs", ())),
            machine=data.get("machine", {}),
            unprivileged=data.get("opener", "root") == "user",
            may_refuse=data.get("refusal", False),
            future_flags=sum(1 << bit for bit in data.get("future", [])),
            program=program_from_json(json.dumps(data["program"]), source=source),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{type(error).__name__}: {error}", source=source) from None


def cases(names: Sequence[str] = ()) -> tuple[Case, ...]:
    """The cases that come with pmcore, or those of the given names. Raises ArgumentError for one that there is not."""
    folder = resources.files("pmcore.validate").joinpath("cases")
    found = [
        load_case(file.read_text(encoding="utf-8"), source=file.name)
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".json")
    ]
    if not names:
        return tuple(found)
    by_name = {case.name: case for case in found}
    for name in names:
        if name not in by_name:
            raise ArgumentError(f"no case {name!r}", remedy=f"there are: {', '.join(by_name)}")
    return tuple(by_name[name] for name in names)
