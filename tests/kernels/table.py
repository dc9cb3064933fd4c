"""What a run of the matrix came to, and the table of it in spec/."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

_COLUMNS = (
    *(
        "kernel",
        "release",
        "date",
        "answers kept",
        "kept programs",
        "random programs",
        "seed",
        "steps",
        "scans",
        "differences",
    ),
    *("masks used", "not modelled"),
)
_HEAD = f"""# Kernels that the simulated machine was held against

Made by `tox -e kernels -- --table` from `tests/kernels/results/`; a row is renewed by
`tox -e kernels -- --kernel NAME --programs 500 --seed N --record`. Each guest is booted under qemu's software emulation
with one processor; `live` is the kernel that this project is developed on. Programs are compared after each step in
everything visible (`spec/lockstep.md`). Answers to kept programs (`tests/lockstep/answers`) are replayed by every run
of the tests; kept and random programs are those of the last run of the matrix. What was most surprising is in
`findings.md`.

| {" | ".join(_COLUMNS)} |
{"|---" * len(_COLUMNS)}|
"""


def summary(told: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """Figures of a kernel from the lines that lockstep wrote."""
    figures: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    not_modelled: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    complete = False
    for line in told["lines"]:
        if line["kind"] == "end":
            complete = line["complete"]
        if line["kind"] not in ("kept", "random"):
            continue
        if line["kind"] == "kept" and "not_modelled" in line:
            not_modelled[line["not_modelled"]] += 1
            continue
        figures["kept" if line["kind"] == "kept" else "programs"] += line.get("programs", 1)
        figures["steps"] += line["steps"]
        figures["scans"] += line["scans"]
        masks.update(line["masks"])
        reached.update(line.get("reached", {}))
        not_modelled.update(line.get("not_modelled") or {})
        differing = [line["difference"]] if line.get("difference") else line.get("found", [])
        for difference in differing:
            figures["differences"] += 1
            found.append({"kind": line["kind"], "of": line.get("program"), **difference})
    names = [line for line in told["lines"] if line["kind"] == "kernel"]
    return {
        **{key: figures[key] for key in ("kept", "programs", "steps", "scans", "differences")},
        "seed": seed,
        "masks": dict(sorted(masks.items())),
        "reached": dict(sorted(reached.items())),
        "not_modelled": sum(not_modelled.values()),
        "found": found,
        "complete": complete,
        "capabilities": names[0]["capabilities"] if names else [],
        **told["kernel"],
    }


def write_table(results: Path, target: Path, answers: Path | None = None) -> None:
    """The table of all results that are kept; `answers` is where answers to kept programs are, by kernel."""
    rows = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")}
    order = sorted(
        rows,
        key=lambda name: [int(part) for part in rows[name]["release"].split("-")[0].split("+")[0].split(".")],
    )
    text = _HEAD
    for name in order:
        row = rows[name]
        masks = ", ".join(f"{key} {count}" for key, count in row["masks"].items()) or "none"
        cells = [
            name,
            row["release"],
            row["date"],
            len(list(answers.glob(f"{name}/*.json"))) if answers else 0,
            row["kept"],
            row["programs"],
            row["seed"],
            row["steps"],
            row["scans"],
        ]
        cells += [row["differences"], masks, row["not_modelled"]]
        text += "| " + " | ".join(str(cell) for cell in cells) + " |\n"
    text += "\n## Configurations\n\n"
    for name in order:
        row = rows[name]
        package = f"package version {row['package']}; " if row["package"] else ""
        config = ", ".join(f"`{option}`" for option in row["config"]) or "see `pmcore doctor`"
        text += f"- **{name}**: {package}{config}; swap: {row['swap']}.\n"
    text += "\n## Where the kernels differ\n\nCapabilities and quirks that not all of them have.\n\n"
    sets = {name: set(rows[name]["capabilities"]) for name in order}
    differing = sorted(set.union(*sets.values()) - set.intersection(*sets.values())) if sets else []
    text += "| capability or quirk | " + " | ".join(order) + " |\n|---|" + "---|" * len(order) + "\n"
    for capability in differing:
        text += (
            f"| `{capability}` | "
            + " | ".join("yes" if capability in sets[n] else "" for n in order)
            + " |\n"
        )
    target.write_text(text, encoding="utf-8")
