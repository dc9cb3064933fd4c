"""Random questions to PROCMAP_QUERY, and what the API answers to them."""

from __future__ import annotations

from typing import Any

from pmcore.lockstep.generator import Seeded
from pmcore.procmap import MapAnswer, MapQuery

__all__ = ["by_the_api", "questions", "read"]

_SIZES = (104, 104, 104, 104, 24, 23, 40, 103, 0, 200, 4096, 4097)


def questions(machine: Any, seed: str, count: int) -> list[list[int]]:
    """[process, size, flags, address, name room, build id room], around the mappings of all processes."""
    draw, found = Seeded(f"maps:{seed}"), []
    pids = list(machine.pids())
    for _ in range(count):
        pid = draw.of(pids)
        vmas = machine.process(pid).maps()
        at = draw.of([0, 1 << 46, (1 << 47) - 1, (1 << 64) - 1])
        room = draw.of((0, 0, 1, 4096))
        if vmas and draw.integer(0, 7):
            vma = draw.of(list(vmas))
            at = max(
                0, draw.of((vma.start, vma.end, (vma.start + vma.end) // 2)) + draw.of((-4096, -1, 0, 1))
            )
            room = draw.of((0, room, len(vma.name_bytes), len(vma.name_bytes) + 1))
        flags = draw.of((0, 16, 16 | 1 << draw.integer(0, 6), 1 << draw.integer(0, 63), draw.integer(0, 127)))
        found.append([pid, draw.of(_SIZES), flags, at, room, draw.of((0, 0, 0, 1, 20))])
    return found


def by_the_api(machine: Any, asked: list[list[int]]) -> list[MapAnswer | int]:
    """What `Process.query_maps` says, or the errno."""
    answers: list[MapAnswer | int] = []
    for pid, size, flags, address, name_room, build_room in asked:
        query = MapQuery(
            address=address, flags=flags, name_room=name_room, build_id_room=build_room, size=size
        )
        try:
            answers.append(machine.process(pid).query_maps(query))
        except OSError as error:
            answers.append(error.errno or 0)
    return answers


def read(answers: list[Any]) -> list[MapAnswer | int]:
    """The tool's answers as values."""
    return [
        answer if isinstance(answer, int) else MapAnswer.unpacked(*(bytes.fromhex(part) for part in answer))
        for answer in answers
    ]
