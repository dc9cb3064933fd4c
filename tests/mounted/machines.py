"""Random simulated machines for tools to look at: each has run a random program, and is known by its number."""

from __future__ import annotations

from typing import Any

from pmcore.lockstep.generator import Seeded, random_program, random_thp
from pmcore.profile import preset
from pmcore.program import Program, Run
from pmcore.registry import open_workbench
from pmcore.uapi import UffdFeature

KERNELS = ("6.12", "6.12", "6.18", "6.1", "6.7")


def random_machine(
    seed: str, *, memory: str = "128 MiB", huge: bool = False, kernels: tuple[str, ...] = KERNELS
) -> tuple[Any, Program]:
    """A machine and the program that it has run. `huge`: with many huge pages of several sizes."""
    draw = Seeded(f"tools:{seed}")
    kernel = draw.of(kernels)
    profile = preset(kernel)
    mthp = profile.has("mm.mthp")
    settings: dict[str, Any] = {"hugepages": {"2 MiB": (6, 2)}}
    if huge:
        policy: dict[str, Any] = {"pmd": draw.of(("always", "madvise"))}
        if mthp:
            sizes = ("16kB", "32kB", "64kB", "128kB", "256kB", "512kB", "1024kB")
            policy["thp_sizes"] = {size: draw.of(("always", "madvise", "never")) for size in sizes}
        settings["policy"] = policy
    machine: Any = open_workbench("sim", memory=memory, swap="64 MiB", kernel=kernel, **settings)
    thp = dict(random_thp(draw)) if mthp and not huge else {}
    program = random_program(draw, profile, max_steps=40, thp=thp)
    run = Run(program, machine)
    for step in program.steps:
        run.advance(step)
    if huge:
        task = machine.spawn()
        for number in range(draw.integer(2, 6)):
            length = draw.integer(1, 6 << 20) & -4096 or 4096
            start = task.mmap(length, addr=0x3000_0000_0000 + (number << 30) + draw.integer(0, 600) * 4096)
            if draw.flip():
                task.madvise(start, length, 14)
            for _ in range(draw.integer(1, 4)):
                first = draw.integer(0, length - 1) & -4096
                task.touch(start + first, min(length - first, draw.integer(1, 3 << 20)))
            if draw.flip():
                task.madvise(start + (length // 2 & -4096), 4096, 4)
    if not list(machine.tasks()):
        machine.spawn()
    return machine, program


def arm(machine: Any, seed: str) -> int:
    """A task more, with areas under asynchronous write protection, partly written and partly huge; its number."""
    draw = Seeded(f"armed:{seed}")
    task = machine.spawn()
    fd = task.userfaultfd(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED)
    start = 0x2000_0000_0000
    for _ in range(draw.integer(1, 4)):
        pages = draw.integer(1, 1200)
        start = task.mmap(pages * 4096, addr=start + draw.integer(0, 3) * 4096)
        task.madvise(start, pages * 4096, draw.of((14, 15)))
        for _ in range(draw.integer(0, 3)):
            first = draw.integer(0, pages - 1)
            task.touch(
                start + first * 4096, min(pages - first, draw.integer(1, 600)) * 4096, write=draw.flip()
            )
        if draw.integer(0, 3):
            task.uffd_register(fd, start, pages * 4096, 2)
            if draw.flip():
                task.uffd_writeprotect(fd, start, pages * 4096, protect=True)
                task.touch(start, min(pages, draw.integer(1, 40)) * 4096)
        start += pages * 4096
    return int(task.pid)
