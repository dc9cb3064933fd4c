"""What a kernel answered to a program, step by step, as a value and as compact JSON: lockstep without the kernel.

What the program and the kernel's profile do not say of the machine (the kind of its swap area) is `swap_kind`.

Frames and swap slots are numbered anew in the order in which they appear, so that the same behaviour is the same text:
single frames one after the other, frames of compound pages by aligned blocks of 512 that keep their order.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np

from pmcore.arrays import BoolArray, U64Array
from pmcore.errors import FormatError
from pmcore.lockstep.compare import Comparer, Difference
from pmcore.lockstep.look import Look, TaskLook, take
from pmcore.lockstep.run import Result, renewed
from pmcore.profile import KernelProfile, profile_from_row, profile_row
from pmcore.program import Outcome, Program, Run, program_from_json, program_to_json
from pmcore.program.run import named_frames
from pmcore.program.steps import Map, Scan
from pmcore.protocols import Workbench
from pmcore.smaps import SmapsEntry
from pmcore.uapi import (
    MAX_SWAPFILES,
    MAX_SWAPFILES_SHIFT,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SWAP,
    PM_SWAP_TYPE_MASK,
    PageFlag,
)
from pmcore.vma import format_maps_line, parse_maps_line

__all__ = ["Answers", "answers_from_json", "answers_to_json", "ask", "changes", "replay"]

_VERSION = 2
_FIELD = np.uint64(PM_PFRAME_MASK)
_COMPOUND = int(PageFlag.COMPOUND_HEAD | PageFlag.COMPOUND_TAIL)
_BLOCK = 512
#: Where numbers of frames of compound pages begin.
_BLOCKS = 1 << 20


@attrs.frozen(kw_only=True, eq=False)
class Answers:
    """A program, the kernel that ran it, and after each step the outcome (as JSON shows it) and the look."""

    program: Program
    profile: KernelProfile
    version: str
    pfn_visible: bool
    outcomes: tuple[str, ...]
    looks: tuple[Look, ...]
    #: What kind of swap area the machine had, as the simulated one names them: "compressed", "device" or "disk".
    swap_kind: str = "compressed"
    #: Whether somebody sampled accesses meanwhile (`Workbench.watched`); taken for granted where a file does not say.
    watched: bool = False


def ask(
    program: Program, workbench: Workbench, *, version: str = "", swap_kind: str = "compressed"
) -> Answers:
    """Run `program`, and keep what everything shows after each step. `version` says which kernel, in words."""
    run, numbers = Run(program, workbench), _Numbers()
    outcomes, looks = [], []
    try:
        for step in program.steps:
            outcomes.append(_outcome(run.advance(step)))
            looks.append(numbers.renumbered(take(run)))
    finally:
        run.end()
    kernel = workbench.kernel
    return Answers(
        program=program,
        profile=kernel.profile,
        version=version,
        pfn_visible=bool(kernel.pfn_visible),
        outcomes=tuple(outcomes),
        looks=tuple(looks),
        swap_kind=swap_kind,
        watched=workbench.watched,
    )


def replay(answers: Answers, workbench: Workbench) -> Result:
    """Lockstep of `workbench` (left) with the recorded answers (right); ends at the first step that differs."""
    run, comparer = Run(answers.program, workbench), Comparer(watched=answers.watched)
    try:
        for number, step in enumerate(answers.program.steps):
            outcome = _outcome(run.advance(step))
            looks = take(run), answers.looks[number]
            both = outcome, answers.outcomes[number]
            found = _differences(type(step).__name__, *both, comparer, *looks, renewed(run, step))
            if found:
                break
    finally:
        run.end()
    return _result(answers.program, number, found, looks, comparer.masked)


def changes(old: Answers, new: Answers) -> Result:
    """Lockstep of two recordings of one program; ends at the first step that differs."""
    comparer = Comparer(watched=old.watched or new.watched)
    for number, step in enumerate(old.program.steps):
        looks = old.looks[number], new.looks[number]
        both = old.outcomes[number], new.outcomes[number]
        # Where a step maps anew is not known without running it: over what was there, or nowhere.
        anew = (0, (1 << 64) - 1) if isinstance(step, Map) and step.within else (0, 0)
        found = _differences(type(step).__name__, *both, comparer, *looks, anew)
        if found:
            break
    return _result(old.program, number, found, looks, comparer.masked)


def _differences(
    step: str, left: str, right: str, comparer: Comparer, one: Look, other: Look, anew: tuple[int, int]
) -> list[Difference]:
    found = [] if left == right else [Difference("outcome", step.lower(), left[:800], right[:800])]
    return [*found, *comparer.compare(one, other, anew)]


def _result(
    program: Program, number: int, found: list[Difference], looks: tuple[Look, Look], masked: Counter[str]
) -> Result:
    return Result(
        program=program,
        steps=number + 1,
        scans=sum(isinstance(step, Scan) for step in program.steps[: number + 1]),
        differs_at=number if found else None,
        differences=tuple(found),
        looks=looks if found else None,
        masked=masked,
    )


def _outcome(outcome: Outcome) -> str:
    value = outcome.value.hex() if isinstance(outcome.value, bytes) else outcome.value
    parts = {
        "value": value,
        "errno": outcome.errno,
        "signal": outcome.signal,
        "fault": outcome.fault,
        "lsb": outcome.lsb,
    }
    return json.dumps({key: part for key, part in parts.items() if part not in (None, 0)})


# -- numbers ---------------------------------------------------------------------------------------------


class _Numbers:
    """New numbers of frames and swap slots, in the order in which they appear in a program."""

    def __init__(self) -> None:
        self._single: dict[int, int] = {}
        self._block: dict[int, int] = {}
        self._slot: dict[int, int] = {}

    def _frame(self, pfn: int, flags: int) -> int:
        if flags & _COMPOUND:
            self._single.pop(pfn, None)
            block = self._block.setdefault(pfn // _BLOCK, len(self._block))
            return _BLOCKS + block * _BLOCK + pfn % _BLOCK
        if pfn not in self._single and pfn // _BLOCK in self._block:
            return _BLOCKS + self._block[pfn // _BLOCK] * _BLOCK + pfn % _BLOCK
        # Numbers of singles are never given again: a frame that became another one has another number.
        # None is so small that an entry that names it could be taken for a marker.
        return self._single.setdefault(pfn, 1 + max(self._single.values(), default=15))

    def renumbered(self, look: Look) -> Look:
        """The look with the new numbers."""
        flags = dict(zip(look.pfns.tolist(), look.kpageflags.tolist(), strict=True))
        new: dict[int, int] = {}
        tasks = {}
        for name, task in look.tasks.items():
            words = task.words.copy()
            present = (words & np.uint64(PM_PRESENT)) != 0
            swapped = (words & np.uint64(PM_PRESENT | PM_SWAP)) == np.uint64(PM_SWAP)
            swapped &= (words & np.uint64(PM_SWAP_TYPE_MASK)) < MAX_SWAPFILES
            named = named_frames(words)
            for index in np.flatnonzero(present | swapped | named).tolist():
                field = int(words[index] & _FIELD)
                if not field:
                    continue
                kind = field & PM_SWAP_TYPE_MASK
                if named[index]:
                    field >>= MAX_SWAPFILES_SHIFT
                if swapped[index]:
                    number = self._slot.setdefault(field, len(self._slot) + 1) << 5
                else:
                    if field not in new:
                        new[field] = self._frame(field, flags[field])
                    number = new[field] << MAX_SWAPFILES_SHIFT | kind if named[index] else new[field]
                words[index] = (words[index] & ~_FIELD) | np.uint64(number)
            tasks[name] = attrs.evolve(task, words=words)
        pfns = np.array([new[pfn] for pfn in look.pfns.tolist()], dtype=np.uint64)
        order = np.argsort(pfns)
        return Look(
            tasks=tasks,
            pfns=pfns[order],
            kpageflags=look.kpageflags[order],
            kpagecount=look.kpagecount[order],
            groups=look.groups[order] if len(look.groups) else look.groups,
            pool=look.pool,
        )


# -- JSON ------------------------------------------------------------------------------------------------


def answers_to_json(answers: Answers) -> str:
    """The text: each step gives only what is not as after the step before."""
    vmas: dict[str, int] = {}
    before: dict[str, Any] = {}
    steps = []
    for outcome, look in zip(answers.outcomes, answers.looks, strict=True):
        parts = _look_parts(look, vmas)
        gone = sorted(before.keys() - parts.keys())
        row = {key: part for key, part in parts.items() if before.get(key) != part}
        steps.append({"outcome": json.loads(outcome), **row, **({"gone": gone} if gone else {})})
        before = parts
    head = {
        "pmcore_answers": _VERSION,
        "kernel": answers.version,
        "pfn_visible": answers.pfn_visible,
        "swap_kind": answers.swap_kind,
        "watched": answers.watched,
        "profile": profile_row(answers.profile),
        "program": json.loads(program_to_json(answers.program)),
        "vmas": [json.loads(text) for text in vmas],
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines.append('"steps": [\n' + ",\n".join(json.dumps(step) for step in steps) + "\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _look_parts(look: Look, vmas: dict[str, int]) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "pfns": _runs(look.pfns),
        "flags": _runs(look.kpageflags),
        "counts": _runs(look.kpagecount),
        "pool": list(look.pool),
        **({"groups": _runs(look.groups)} if len(look.groups) else {}),
    }
    for name, task in look.tasks.items():
        rows = [vmas.setdefault(json.dumps(_vma_row(entry)), len(vmas)) for entry in task.vmas]
        core = [None if c is None else _runs(c.astype(np.uint64)) for c in task.in_core]
        parts |= {
            f"{name}.spans": task.spans,
            f"{name}.words": _runs(task.words),
            f"{name}.addresses": _runs(task.addresses >> np.uint64(12)),
            f"{name}.in_core": core,
            f"{name}.vmas": rows,
        }
    # Tuples become lists in JSON: the comparison with the step before is one of texts.
    loaded: dict[str, Any] = json.loads(json.dumps(parts))
    return loaded


def _vma_row(entry: SmapsEntry) -> dict[str, Any]:
    return {
        "maps": format_maps_line(entry.vma).decode("utf-8", "surrogateescape"),
        "kb": {name: value >> 10 for name, value in entry.counters.items()},
        "plain": dict(entry.plain),
        "flags": None if entry.vm_flags is None else " ".join(entry.vm_flags),
    }


def answers_from_json(text: str, *, source: str = "answers") -> Answers:
    """The answers of that text. Raises FormatError."""
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("pmcore_answers") != _VERSION:
            raise FormatError(f"not answers of version {_VERSION}", source=source)
        program = program_from_json(json.dumps(data["program"]), source=source)
        vmas = [_vma_entry(row) for row in data["vmas"]]
        parts: dict[str, Any] = {}
        looks = []
        for step in data["steps"]:
            for key in step.get("gone", ()):
                del parts[key]
            parts |= {key: part for key, part in step.items() if key not in ("outcome", "gone")}
            looks.append(_look(parts, vmas))
        if len(looks) != len(program.steps):
            raise FormatError("not one answer for each step", source=source)
        return Answers(
            program=program,
            profile=profile_from_row(data["profile"]),
            version=str(data["kernel"]),
            pfn_visible=bool(data["pfn_visible"]),
            outcomes=tuple(json.dumps(step["outcome"]) for step in data["steps"]),
            looks=tuple(looks),
            swap_kind=str(data["swap_kind"]),
            watched=bool(data.get("watched", True)),
        )
    except FormatError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise FormatError(f"not answers: {type(error).__name__}: {error}", source=source) from None


def _vma_entry(row: Any) -> SmapsEntry:
    return SmapsEntry(
        vma=parse_maps_line(row["maps"].encode("utf-8", "surrogateescape")),
        counters={name: value << 10 for name, value in row["kb"].items()},
        plain=row["plain"],
        vm_flags=None if row["flags"] is None else tuple(row["flags"].split()),
    )


def _look(parts: dict[str, Any], vmas: list[SmapsEntry]) -> Look:
    tasks = {}
    for key in parts:
        name, _, what = key.partition(".")
        if what == "spans":
            tasks[name] = TaskLook(
                spans=tuple((start, end) for start, end in parts[key]),
                words=_array(parts[f"{name}.words"]),
                addresses=_array(parts[f"{name}.addresses"]) << np.uint64(12),
                in_core=tuple(map(_flags, parts[f"{name}.in_core"])),
                vmas=tuple(vmas[index] for index in parts[f"{name}.vmas"]),
            )
    return Look(
        tasks=tasks,
        pfns=_array(parts["pfns"]),
        kpageflags=_array(parts["flags"]),
        kpagecount=_array(parts["counts"]),
        groups=_array(parts.get("groups", "")),
        pool=tuple(map(str, parts["pool"])),
    )


def _flags(text: str | None) -> BoolArray | None:
    return None if text is None else _array(text) != 0


def _runs(words: U64Array) -> str:
    """Words in hex: "w*n" is w n times, "w+n" are n words that ascend by one, "w" is one."""
    if not len(words):
        return ""
    steps = np.diff(words)
    steps[(words[1:] == 0) & (steps == 1)] = 2  # from the last word to 0 is no ascent
    bounds = np.append(0, np.flatnonzero(steps[1:] != steps[:-1]) + 1) if len(steps) else np.zeros(1, np.intp)
    found: list[str] = []
    position = 0
    for low, high in itertools.pairwise([*bounds.tolist(), len(steps)]):
        low, step = max(low, position), int(steps[low]) if high > low else 2
        if step in (0, 1) and high > low:
            found.append(f"{int(words[low]):x}{'*+'[step]}{high - low + 1}")
            position = high + 1
        else:
            found += [f"{int(word):x}" for word in words[low:high]]
            position = high
    found += [f"{int(word):x}" for word in words[position:]]
    return " ".join(found)


def _array(text: str) -> U64Array:
    parts: list[Iterable[int]] = []
    for token in text.split():
        for sign in "*+":
            word, found, count = token.partition(sign)
            if found:
                first, number = int(word, 16), int(count)
                if number > 1 << 24:
                    raise FormatError(f"{token}: more words than a program has")
                parts.append(itertools.repeat(first, number) if sign == "*" else range(first, first + number))
                break
        else:
            parts.append((int(token, 16),))
    return np.array(list(itertools.chain.from_iterable(parts)), dtype=np.uint64)
