"""Each operation of a program, its rules, its kept programs, the kernels that answered them: spec/operations.md.

.venv/bin/python tests/lockstep/operations.py
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))  # at the end: the installed project comes first


from pmcore.program import STEPS, Program, Step, load_program  # noqa: E402
from pmcore.program import steps as s  # noqa: E402
from pmcore.uapi import Madvise  # noqa: E402

TABLE = ROOT / "spec" / "operations.md"
KEPT = HERE / "kept"
KERNELS = ("6.18", "6.12", "6.1")
#: In nearly every program: a rule is theirs only where its programs have nothing else.
_PLAIN = {"map", "touch", "write", "read", "fork", "exit"}
_HEAD = """# Every operation, and the kernels that it was verified on

Made by `python tests/lockstep/operations.py` from `pmcore.program.STEPS`, the kept programs and the recorded answers. A
rule is named with an operation if every kept program that names the rule has the operation; `map`, `touch`, `write`,
`read`, `fork` and `exit`, which most programs have, are named with rules whose programs have nothing else. Programs:
the shortest two, and how many there are. Kernels: how many of them each answered, the same as the model (the tests
replay them). Flags are in `flags.md`, the figures of random programs in `lockstep.md` and `kernels.md`.

| operation | does | rules | programs | kernels |
|---|---|---|---|---|
"""


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    TABLE.write_text(table(), encoding="utf-8")
    return 0


def programs() -> dict[str, Program]:
    """The kept programs by their path below kept, without the ending."""
    paths = sorted(KEPT.rglob("*.json"))
    return {str(path.relative_to(KEPT).with_suffix("")): load_program(path) for path in paths}


def operation(step: Step) -> str:
    """The step's name; of advice, with the advice."""
    name = type(step).__name__.lower()
    if isinstance(step, s.Advise):
        known = {int(advice): advice.name for advice in Madvise}
        return f"{name} {known.get(step.advice, step.advice)}"
    return name


def table() -> str:
    """The text of spec/operations.md."""
    kept = programs()
    having = {name: {operation(step) for step in program.steps} for name, program in kept.items()}
    naming: dict[str, list[str]] = {}
    for name, program in kept.items():
        for rule in program.rules:
            naming.setdefault(rule, []).append(name)
    answered = {kernel: {name for name in kept if answer(kernel, name).exists()} for kernel in KERNELS}
    text = _HEAD
    for what, does in operations(having):
        with_it = sorted(
            (name for name in kept if what in having[name]), key=lambda n: (len(kept[n].steps), n)
        )
        rules = [
            rule
            for rule, names in sorted(naming.items())
            if all(what in having[name] for name in names)
            and (what not in _PLAIN or all(having[name] <= _PLAIN for name in names))
        ]
        shown = ", ".join(with_it[:2]) + (f" and {len(with_it) - 2} more" if len(with_it) > 2 else "")
        counts = [f"{kernel}: {sum(n in answered[kernel] for n in with_it)}" for kernel in KERNELS]
        cells = [what, does, ", ".join(rules), shown or "none: tests", ", ".join(counts) if with_it else ""]
        text += f"| {' | '.join(cells)} |\n"
    text += (
        "\n## What is not modelled\n\nWhat the simulated machine refuses by `NotModelled`, in its own words (`{...}` "
        "stands for what was asked for), with the way\nout or the reason, by room:\n\n"
    )
    for room, words, remedy in refused():
        text += f"- `{room}`: {words}" + (f" ({remedy})" if remedy else "") + "\n"
    return text + "\n`lockstep.md` says what else is left out of the comparison, and why.\n"


def operations(having: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Each operation, and what it does in the words of its step."""
    every = set().union(*having.values())
    for kind in STEPS.values():
        name, does = kind.__name__.lower(), (kind.__doc__ or "").strip().split("\n")[0].replace("|", "\\|")
        if kind is s.Advise:
            for what in sorted(one for one in every if one.startswith(f"{name} ")):
                yield what, f"madvise, {what.split()[1]}"
        else:
            yield name, does


def answer(kernel: str, name: str) -> Path:
    """Where a kernel's answer to a kept program is."""
    return HERE / "answers" / kernel / f"{name}.json"


def refused() -> Iterator[tuple[str, str, str]]:
    """Room, words and remedy of each NotModelled of the simulated machine."""
    found = set()
    for path in sorted((ROOT / "backends" / "sim").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "NotModelled" and node.args:
                remedy = next((said(word.value) for word in node.keywords if word.arg == "remedy"), "")
                found.add((str(path.relative_to(ROOT / "backends" / "sim")), said(node.args[0]), remedy))
    yield from sorted(found)


def said(node: ast.expr) -> str:
    """The words of a literal; what is put into them as {...}."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) if isinstance(part, ast.Constant) else "{...}" for part in node.values)
    return "{...}"


if __name__ == "__main__":
    sys.exit(main())
