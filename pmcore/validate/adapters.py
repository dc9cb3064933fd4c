"""Reading what tools print: how each is called, and what its output says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pmcore.analysis.huge import huge_rollup, huge_stats
from pmcore.arrays import U64Array
from pmcore.errors import FormatError
from pmcore.pageflags import FrameFlags
from pmcore.pagetypes import display_table
from pmcore.protocols import FrameFile
from pmcore.uapi import PageFlag
from pmcore.validate.case import Scene
from pmcore.validate.report import Finding
from pmcore.validate.says import Says, compare, read_says
from pmcore.validate.truth import RULES, Truth, rule_of_flags

__all__ = [
    "ADAPTERS",
    "Adapter",
    "JsonAdapter",
    "PageTypesAdapter",
    "PageTypesSummaryAdapter",
    "ThpmapsAdapter",
]


class Adapter(Protocol):
    """How a tool is asked, and its answer read."""

    name: str

    def command(self, command: Sequence[str], pid: int) -> list[str]:
        """The command that makes the tool tell of the process `pid`."""
        ...

    def judge(self, scene: Scene, output: str) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """The keys that the output tells, and what it tells wrong. Raises FormatError."""
        ...


#: Bits that page-types moves to tell two meanings apart: where they are, and what they were.
_MOVED = (
    (47, PageFlag.OWNER_2),
    (48, PageFlag.RECLAIM),
    (50, PageFlag.ACTIVE),
    (51, PageFlag.ERROR),
)


def moved_back(word: int) -> int:
    """A word of page-types as the kernel has it."""
    for bit, flag in _MOVED:
        if word >> bit & 1:
            word = word & ~(1 << bit) | int(flag)
    return word


def _judge(says: Says, scene: Scene) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
    truth = Truth.of(scene.shown, scene.pid, hidden=scene.case.unprivileged)
    return says.keys, compare(says, truth, scene.case)


class JsonAdapter:
    """Any tool that prints JSON in the protocol of docs/validate.md; {pid} in its command is the process."""

    name = "json"

    def command(self, command: Sequence[str], pid: int) -> list[str]:
        """The command, with the process in the place of {pid}."""
        return [word.replace("{pid}", str(pid)) for word in command]

    def judge(self, scene: Scene, output: str) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """See the protocol."""
        try:
            data = json.loads(output)
        except ValueError as error:
            raise FormatError(f"not JSON: {error}") from None
        return _judge(read_says(data), scene)


class PageTypesAdapter:
    """The kernel's page-types, in its raw view (-r): flags by position, since letters collide."""

    name = "page-types"

    #: The bits that it takes from pagemap, by key.
    _PAGEMAP = ((40, "soft_dirty"), (61, "file"), (62, "swapped"), (63, "exclusive"))

    def command(self, command: Sequence[str], pid: int) -> list[str]:
        """List page by page, with map counts."""
        return [*command, "-r", "-p", str(pid), "-L", "-M", "-N"]

    def judge(self, scene: Scene, output: str) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """Each line is a page that is present, or has an entry."""
        bits = sorted(display_table())
        size = scene.shown.geometry.page_size
        spans: list[tuple[int, int, dict[str, int | None]]] = []
        for line in output.splitlines():
            if not line or line.startswith("voffset"):
                continue
            fields = line.split("\t")
            if len(fields) != 4 or len(fields[3]) != len(bits):
                raise FormatError(f"not a line of page-types -r -p -L -M: {line!r}")
            voffset, mapcount, offset = int(fields[0], 16), int(fields[1]), int(fields[2], 16)
            word = sum(1 << bit for bit, letter in zip(bits, fields[3], strict=True) if letter != "_")
            told: dict[str, int | None] = {key: word >> bit & 1 for bit, key in self._PAGEMAP}
            word = moved_back(word)
            told["present"] = int(not told["swapped"])
            if told["present"]:
                told |= {
                    "pfn": offset,
                    "mapcount": mapcount,
                    "flags": word & ~sum(1 << b for b, _ in self._PAGEMAP),
                }
            spans.append((voffset * size, (voffset + 1) * size, told))
        keys = ("present", "swapped", "file", "exclusive", "soft_dirty", "pfn", "flags", "mapcount")
        # An empty page of a soft-dirty mapping is in no list of page-types'.
        return _judge(Says(keys=keys, spans=spans, of_listed_alone=frozenset({"soft_dirty"})), scene)


class PageTypesSummaryAdapter:
    """The kernel's page-types over the whole machine, in its raw view: pages by their flags, compared bit by bit."""

    name = "page-types-summary"
    _LINE = re.compile(r"0x([0-9a-f]{16})\t +(\d+) +\d+  (\S+)\t\S*")
    _TOTAL = re.compile(r" +total\t +(\d+) +\d+")

    def command(self, command: Sequence[str], pid: int) -> list[str]:
        """All frames, whoever has them."""
        return [*command, "-r"]

    def judge(self, scene: Scene, output: str) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """Pages in all, and with each flag: what is counted wrong breaks that flag's rule."""
        words, pages, total = self._read(output)
        shown = np.zeros(scene.shown.frame_count(), dtype=np.uint64)
        filled = scene.shown.read_frames(FrameFile.KPAGEFLAGS, 0, shown)
        true_words, true_pages = np.unique(shown[:filled], return_counts=True)
        findings = [
            self._finding(scene, bit, said, true)
            for bit, said, true in (
                (bit, _with(words, pages, bit), _with(true_words, true_pages, bit)) for bit in range(64)
            )
            if said != true
        ]
        told = dict(zip(words.tolist(), pages.tolist(), strict=True))
        true_told = dict(zip(true_words.tolist(), true_pages.tolist(), strict=True))
        if total != filled:
            findings.insert(0, self._finding(scene, None, total, filled))
        elif not findings and told != true_told:
            word = min(
                word for word in told.keys() | true_told.keys() if told.get(word) != true_told.get(word)
            )
            findings.append(self._finding(scene, None, told.get(word, 0), true_told.get(word, 0), word))
        return ("flags",), tuple(findings)

    def _read(self, output: str) -> tuple[U64Array, NDArray[np.int64], int]:
        """Distinct words as the kernel has them, pages with each, and the sum at the end."""
        found: dict[int, int] = {}
        total: int | None = None
        for line in output.splitlines():
            if line.strip().startswith("flags"):
                continue
            if end := self._TOTAL.fullmatch(line):
                total = int(end[1])
            elif row := self._LINE.fullmatch(line):
                word = moved_back(int(row[1], 16))
                found[word] = found.get(word, 0) + int(row[2])
            else:
                raise FormatError(f"not a line of page-types -r: {line!r}")
        if total is None:
            raise FormatError("no total: not the summary of page-types -r")
        if total != sum(found.values()):
            raise FormatError(f"a total of {total} over lines that add up to {sum(found.values())}")
        return (
            np.array(list(found), dtype=np.uint64),
            np.array(list(found.values()), dtype=np.int64),
            total,
        )

    def _finding(
        self, scene: Scene, bit: int | None, said: int, true: int, word: int | None = None
    ) -> Finding:
        if bit is not None:
            what, rule = f" with {FrameFlags(1 << bit)}", rule_of_flags(1 << bit)
        else:
            what, rule = "" if word is None else f" with {word:#x}", RULES["flags"]
        rule = scene.case.rule_of.get("flags", rule)
        return Finding(
            rule=rule,
            key="flags",
            count=1,
            start=0,
            end=0,
            said=f"{said} frames{what}",
            true=f"{true}",
        )


def _with(words: U64Array, pages: NDArray[np.int64], bit: int) -> int:
    return int(pages[(words >> np.uint64(bit) & np.uint64(1)) != 0].sum())


class ThpmapsAdapter:
    """The kernel's thpmaps: its figures for the process together."""

    name = "thpmaps"
    #: The rule that a figure stands on.
    _RULE = "KF-023"

    def command(self, command: Sequence[str], pid: int) -> list[str]:
        """One sum over the process, with what is 0."""
        return [*command, "--pid", str(pid), "--rollup", "--inc-empty"]

    def judge(self, scene: Scene, output: str) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """Labels and kB, compared with the same statistics of ours."""
        told: dict[str, int] = {}
        for line in output.splitlines():
            match = re.fullmatch(
                r"([a-z]+-thp-[-a-z0-9]+kB|[a-z]+-thp-pte-partial): +(\d+) kB( \(.*\))?", line.strip()
            )
            if match is None:
                raise FormatError(f"not a line of thpmaps --rollup: {line!r}")
            told[match[1]] = int(match[2]) << 10
        true = huge_rollup(huge_stats(scene.shown.process(scene.pid))).values
        findings = [
            Finding(
                rule=scene.case.rule_of.get("thp", self._RULE),
                key="thp",
                count=1,
                start=0,
                end=0,
                said=f"{label} {told.get(label, 0)} bytes",
                true=f"{true.get(label, 0)} bytes",
            )
            for label in dict.fromkeys((*true, *told))
            if told.get(label, 0) != true.get(label, 0)
        ]
        return ("thp",), tuple(findings)


ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (JsonAdapter(), PageTypesAdapter(), PageTypesSummaryAdapter(), ThpmapsAdapter())
}
