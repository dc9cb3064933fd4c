"""Cutting a reStructuredText document into sentences, with the lines that each stands on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

_ITEM = re.compile(r"\s*(?:\*|-|\d+\.|\d+ -)\s")
_RULER = re.compile(r"(=+|-+)$")
_END = re.compile(r"(?<=[^\d\s][.:])(?<!i\.e\.)(?<!e\.g\.)\s+(?=[A-Z`])")


@dataclass(frozen=True)
class Piece:
    """A sentence: first and last line, its number among those that begin on the first line, its digest, its text."""

    first: int
    last: int
    part: int
    digest: str
    text: str

    @property
    def lines(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def pieces(document: str) -> list[Piece]:
    """All sentences, headings and examples of the document, in order."""
    found: list[Piece] = []
    begun: dict[int, int] = {}
    for numbers, text in _sentences(document.splitlines()):
        first, last = numbers
        begun[first] = begun.get(first, 0) + 1
        normal = " ".join(text.split())
        digest = hashlib.sha256(normal.encode()).hexdigest()[:16]
        found.append(Piece(first, last, begun[first], digest, normal))
    return found


def _sentences(lines: list[str]) -> Iterator[tuple[tuple[int, int], str]]:
    for block in _blocks(lines):
        if block[0][1].lstrip().startswith("struct pm_scan_arg arg"):
            yield (block[0][0], block[-1][0]), "\n".join(line for _, line in block)
            continue
        text, starts = "", []
        for number, line in block:
            starts.append((len(text), number))
            text += line.strip() + " "
        position = 0
        for sentence in _END.split(text.rstrip()):
            begin = text.index(sentence, position)
            position = begin + len(sentence)
            first = max(number for offset, number in starts if offset <= begin)
            last = max(number for offset, number in starts if offset < position)
            yield (first, last), sentence


def _blocks(lines: list[str]) -> Iterator[list[tuple[int, str]]]:
    block: list[tuple[int, str]] = []
    example = False
    for number, line in enumerate(lines, start=1):
        if example and line.strip():
            block.append((number, line))
            example = not line.strip().startswith("};")
            continue
        if line.strip().startswith("struct pm_scan_arg arg"):
            example = True
            block = [(number, line)]
            continue
        if (
            not line.strip()
            or (_ITEM.match(line) and block)
            or (block and _RULER.match(block[-1][1].strip()))
        ):
            if block and not all(_RULER.match(text.strip()) for _, text in block):
                yield block
            block = []
        if line.strip() and not _RULER.match(line.strip()):
            block.append((number, line))
        elif line.strip():
            block.append((number, line)) if block else None
    if block:
        yield block
