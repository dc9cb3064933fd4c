"""Reading what tools print: how each is called, and what its output says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Protocol

from pmcore.analysis.huge import huge_rollup, huge_stats
from pmcore.errors import FormatError
from pmcore.pagetypes import display_table
from pmcore.uapi import PageFlag
from pmcore.validate.case import Scene
from pmcore.validate.report import Finding
from pmcore.validate.says import Says, compare, read_says
from pmcore.validate.truth import Truth

__all__ = ["ADAPTERS", "Adapter", "JsonAdapter", "PageTypesAdapter", "ThpmapsAdapter"]


class Adapter(Protocol):
    """How a tool is asked, and its answer read."""

    name: str

    def command(self, command: Sequence[str], pid: int) -> list[str]:
        """The command that makes the tool tell of the process `pid`."""
        ...

    def judge(self, scene: Scene, output: str) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """The keys that the output tells, and what it tells wrong. Raises FormatError."""
        ...


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
    #: Bits moved to tell two meanings apart: where they are, and what they were.
    _MOVED = (
        (47, PageFlag.OWNER_2),
        (48, PageFlag.RECLAIM),
        (50, PageFlag.ACTIVE),
        (51, PageFlag.ERROR),
    )

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
            for bit, flag in self._MOVED:
                if word >> bit & 1:
                    word = word & ~(1 << bit) | int(flag)
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
    adapter.name: adapter for adapter in (JsonAdapter(), PageTypesAdapter(), ThpmapsAdapter())
}
