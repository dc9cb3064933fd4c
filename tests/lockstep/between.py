"""What makes kernels differ, and which kept program shows it: spec/between-kernels.md, from recorded answers alone.

    .venv/bin/python tests/lockstep/between.py

The simulated machine agrees with each kernel's answers. Here it runs the same programs with one capability or quirk
as the other kernel has it: where it then no longer agrees, the program shows that one. Takes some minutes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from pathlib import Path

import attrs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))  # at the end: the installed project comes first

from pmcore import spec  # noqa: E402
from pmcore.errors import PmcoreError  # noqa: E402
from pmcore.lockstep.answers import Answers, answers_from_json, changes, replay  # noqa: E402
from pmcore.profile import KernelProfile  # noqa: E402
from tests.kernels.asked import machine_for  # noqa: E402

KERNELS = ("6.1", "6.12", "6.18")
TABLE = ROOT / "spec" / "between-kernels.md"
_HEAD = """# What makes the kernels differ

Made by `python tests/lockstep/between.py` from the answers of three kernels to kept programs
(`tests/lockstep/answers`). For each pair of neighbours: how many programs both answered, and how many otherwise.
Then each capability or quirk that only one of the two has, and the programs that show it: with it changed, and
nothing else, the simulated machine no longer answers as the kernel did.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    text = _HEAD
    for older, newer in itertools.pairwise(KERNELS):
        text += _pair(older, newer)
    TABLE.write_text(text, encoding="utf-8")
    return 0


def _answers(kernel: str) -> dict[str, Answers]:
    found = {}
    for path in sorted((HERE / "answers" / kernel).glob("*.json")):
        found[path.stem] = answers_from_json(path.read_text(encoding="utf-8"), source=str(path))
    return found


def _pair(older: str, newer: str) -> str:
    left, right = _answers(older), _answers(newer)
    both = [name for name in left if name in right and left[name].program == right[name].program]
    differing = [name for name in both if not changes(left[name], right[name]).agrees]
    shown: dict[str, list[str]] = defaultdict(list)
    one, other = left[both[0]].profile, right[both[0]].profile
    known = spec.features()
    apart = [name for name in sorted(known) if one.has(name) != other.has(name)]
    for name in both:
        for feature in apart:
            # A kernel with the feature is the better one to take it from: nothing else hides it there.
            answers = left[name] if one.has(feature) else right[name]
            if _matters(answers, feature):
                shown[feature].append(name)
        print(
            f"{older} and {newer}: {name}: {', '.join(f for f in apart if name in shown[f]) or '-'}",
            flush=True,
        )
    text = f"\n## {older} and {newer}\n\n{len(both)} programs, {len(differing)} answered otherwise.\n\n"
    text += f"| capability or quirk | {older} | {newer} | programs | such as | rules | means |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for feature in sorted(apart, key=lambda f: (-len(shown[f]), f)):
        names = sorted(shown[feature], key=lambda n: len(left[n].program.steps))
        cells = [f"`{feature}`", "yes" if one.has(feature) else "", "yes" if other.has(feature) else ""]
        cells += [
            str(len(names)),
            names[0] if names else "",
            ", ".join(known[feature].rules),
            known[feature].meaning,
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def _matters(answers: Answers, feature: str) -> bool:
    """Whether a machine without that feature answers otherwise."""
    profile: KernelProfile = answers.profile.changed(name=answers.profile.name, remove=[feature])
    try:
        return not replay(answers, machine_for(attrs.evolve(answers, profile=profile))).agrees
    except PmcoreError:
        return True  # refused at all


if __name__ == "__main__":
    sys.exit(main())
