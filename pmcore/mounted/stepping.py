"""A program run step by step, by whoever writes to a file of the mounted machine."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import attrs

from pmcore.errors import syscall_error
from pmcore.procview import OpenFile
from pmcore.procview.sequence import SequenceReader
from pmcore.program import Outcome, Run
from pmcore.program.steps import Step

__all__ = ["StepFile", "Stepper"]


class Stepper:
    """A program under way on a workbench. Machines know nothing of it: it is looked at between two steps."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def done(self) -> int:
        """How many steps have been taken."""
        return len(self.run.outcomes)

    @property
    def left(self) -> int:
        """How many are still to be taken."""
        return len(self.run.program.steps) - self.done

    def advance(self, count: int) -> int:
        """Take up to `count` steps; how many there were. Raises what a step raises that names what there is not."""
        taken = min(count, self.left)
        for _ in range(taken):
            self.run.advance(self.run.program.steps[self.done])
        return taken

    def lines(self) -> Sequence[bytes]:
        """One line a step: taken (with what came of it), next, or to come."""
        found = []
        for number, step in enumerate(self.run.program.steps):
            mark = "done" if number < self.done else "next" if number == self.done else "-"
            outcome = _words(self.run.outcomes[number]) if number < self.done else ""
            found.append(f"{number}\t{mark}\t{_step_words(step)}\t{outcome}".rstrip() + "\n")
        return [line.encode() for line in found]


def _step_words(step: Step) -> str:
    """A step's name, and what of it is not as it is by default."""
    fields = {
        f.name: getattr(step, f.name) for f in attrs.fields(type(step)) if getattr(step, f.name) != f.default
    }
    return " ".join([type(step).__name__.lower(), *(f"{name}={value}" for name, value in fields.items())])


def _words(outcome: Outcome) -> str:
    if outcome.errno:
        return f"refused: {errno.errorcode.get(outcome.errno, outcome.errno)}"
    if outcome.signal:
        return f"{outcome.signal} at {outcome.fault}"
    return "" if outcome.value is None else f"-> {outcome.value!r}"


class StepFile(OpenFile):
    """/proc/pmcore/step: read, it lists the steps; a number written to it takes as many, "all" takes the rest."""

    def __init__(self, path: str, stepper: Stepper) -> None:
        super().__init__(path)
        self._stepper = stepper
        self._reader = SequenceReader(stepper.lines, buffer=4096)

    def read(self, offset: int, size: int) -> bytes:
        """The steps, a line each."""
        return self._reader.read(offset, size)

    def write(self, offset: int, data: bytes) -> int:
        """A number of steps, or "all". EINVAL for anything else; fewer than asked for are no error."""
        text = data.strip()
        if text == b"all":
            count = self._stepper.left
        elif text.isdigit() and len(text) < 10:
            count = int(text)
        else:
            raise syscall_error(errno.EINVAL, f"write({self.path})", remedy='a number of steps, or "all"')
        self._stepper.advance(count)
        return len(data)
