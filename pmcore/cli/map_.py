"""`pmcore map`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import attrs
import click
import numpy as np

from pmcore.analysis.residency import residency
from pmcore.cli.options import Address, backend_options, format_option, open_backend, process_of
from pmcore.cli.output import Column, Report, emit, progress_bar, say
from pmcore.errors import ArgumentError, Missing, NotPermitted
from pmcore.geometry import align_down, align_up
from pmcore.pagemap import PagemapEntries
from pmcore.protocols import FrameFile, Process
from pmcore.vma import Vma

_FIGURES = ("rss", "pss", "uss", "swap", "anon", "file", "shared", "huge")
_MORE = ("present", "exclusive", "zero", "special", "uffd_wp", "soft_dirty", "guard", "hidden")
_FLAGS = ("present", "swapped", "file", "exclusive", "soft_dirty", "uffd_wp", "guard")
_BATCH = 1 << 16


@click.command(name="map")
@click.argument("pid")
@click.option("--pages", is_flag=True, help="Every page that is not empty, in runs, decoded.")
@click.option("--each", is_flag=True, help="With --pages: one row a page.")
@click.option("--addr", metavar="START-END", help="Only this range (hex, as maps writes it).")
@click.option("--explain", type=Address(), metavar="ADDRESS", help="Explain one page in words.")
@click.option("--no-progress", is_flag=True, help="No bar, however long it takes.")
@backend_options
@format_option()
def command(
    pid: str,
    pages: bool,
    each: bool,
    addr: str | None,
    explain: int | None,
    no_progress: bool,
    backend: str,
    backend_settings: tuple[str, ...],
    form: str,
) -> None:
    """The memory of process PID ("self"): per VMA by default.

    Sizes count what smaps counts. A figure that needs frame numbers is "-" where they are hidden.
    """
    with open_backend(backend, backend_settings) as kernel:
        process = process_of(kernel, pid)
        if explain is not None:
            _explain(process, explain, form)
            return
        vmas = _within(process.maps(), addr, kernel.geometry.page_size)
        if pages or each:
            columns = [Column("start", "address"), Column("end", "address"), Column("pages", "int")]
            columns += [
                Column("pfn", "address"),
                Column("swap_type", "int"),
                Column("swap_offset", "address"),
            ]
            columns += [Column("flags"), Column("mapping")]
            emit(Report(columns, _page_rows(process, vmas, each=each)), form)
        else:
            _vma_table(process, vmas, form, bars=not no_progress)


def _within(vmas: tuple[Vma, ...], addr: str | None, page_size: int) -> tuple[Vma, ...]:
    """The VMAs cut to `addr`, rounded outwards to whole pages."""
    if addr is None:
        return vmas
    first, _, last = addr.partition("-")
    try:
        start, end = align_down(int(first, 16), page_size), align_up(int(last, 16), page_size)
    except ValueError:
        raise ArgumentError(f"--addr {addr!r} is not START-END in hex") from None
    return tuple(
        attrs.evolve(vma, start=max(vma.start, start), end=min(vma.end, end))
        for vma in vmas
        if vma.start < end and vma.end > start
    )


def _vma_table(process: Process, vmas: tuple[Vma, ...], form: str, *, bars: bool) -> None:
    with progress_bar("reading page tables", wanted=bars) as progress:
        found = residency(process, vmas, progress=progress)
    size = process.kernel.profile.geometry.page_size
    figures = _FIGURES if form == "table" else _FIGURES + _MORE
    columns = [
        Column("start", "address"),
        Column("end", "address"),
        Column("perms"),
        Column("bytes", "bytes", "size"),
    ]
    columns += [
        Column(name, "bytes", name.upper() if name in {"rss", "pss", "uss"} else name) for name in figures
    ]
    columns.append(Column("mapping"))
    scale = {name: 1 if name == "pss" else size for name in figures}

    def rows() -> Iterator[tuple[Any, ...]]:
        for row, vma in zip(found.rows, found.vmas, strict=True):
            values = (None if n in found.unknown else int(row[n]) * scale[n] for n in figures)
            yield (vma.start, vma.end, vma.perms, vma.length, *values, vma.name)
        if form == "table":
            totals = [found.total(n) for n in figures]
            sums = (None if t is None else t * scale[n] for n, t in zip(figures, totals, strict=True))
            yield (
                None,
                None,
                "total",
                sum(v.length for v in found.vmas),
                *sums,
                f"{len(found.vmas)} mappings",
            )

    emit(Report(columns, rows()), form)
    if found.frames_hidden and form == "table":
        say('frame numbers are hidden: run as root for RSS, PSS, USS and what else shows "-"')


def _page_rows(process: Process, vmas: tuple[Vma, ...], *, each: bool) -> Iterator[tuple[Any, ...]]:
    geometry = process.kernel.profile.geometry
    for vma in vmas:
        if vma.end > geometry.task_size:
            continue
        for start in range(vma.start, vma.end, _BATCH << geometry.page_shift):
            end = min(vma.end, start + (_BATCH << geometry.page_shift))
            yield from _runs(process.pagemap(start, end), vma, each=each)


def _runs(entries: PagemapEntries, vma: Vma, *, each: bool) -> Iterator[tuple[Any, ...]]:
    """Runs of pages that go on in address and frame (or swap offset) with equal flags; empty ones left out."""
    fields, size = entries.decode(), entries.profile.geometry.page_size
    where = np.flatnonzero(entries.values)
    if len(where) == 0:
        return
    words = entries.values[where]
    high = words & ~np.uint64((1 << 55) - 1)
    place = np.where(fields.present[where], fields.pfn[where], fields.swap_offset[where])
    kind = fields.swap_type[where]
    breaks = (np.diff(where) != 1) | (np.diff(high) != 0) | (np.diff(kind.astype(np.int16)) != 0)
    breaks |= (place[1:] - place[:-1] != 1) & ((place[1:] != 0) | (place[:-1] != 0))
    first = np.append(0, np.flatnonzero(breaks) + 1) if not each else np.arange(len(where))
    length = np.diff(first, append=len(where))
    columns = {name: getattr(fields, name)[where][first].tolist() for name in _FLAGS}
    for i, (index, pages) in enumerate(zip(first.tolist(), length.tolist(), strict=True)):
        start = entries.start + int(where[index]) * size
        present, swapped = columns["present"][i], columns["swapped"][i] and not columns["present"][i]
        names = [name for name in _FLAGS if columns[name][i]]
        pfn = int(place[index]) if present and place[index] else None
        if present and pfn is None:
            names.append("pfn-hidden")
        shown = swapped and bool(place[index] or kind[index])
        if swapped and not shown:
            names.append("swap-hidden")
        yield (
            start,
            start + pages * size,
            pages,
            pfn,
            int(kind[index]) if shown else None,
            int(place[index]) if shown else None,
            ",".join(names),
            vma.name,
        )


def _explain(process: Process, address: int, form: str) -> None:
    kernel = process.kernel
    size = kernel.profile.geometry.page_size
    start = address & -size
    vma = next((vma for vma in process.maps() if vma.start <= address < vma.end), None)
    entry = process.pagemap(start, start + size)[0]
    parts: list[Any] = [entry.explain()]
    count = None
    if entry.pfn is not None:
        try:
            parts.append(kernel.kpageflags(entry.pfn, 1)[0].explain())
            count = int(kernel.frames_at(FrameFile.KPAGECOUNT, np.array([entry.pfn], dtype=np.uint64))[0])
        except (NotPermitted, Missing):
            pass
    if form != "table":
        found = {"address": start, "vma": str(vma) if vma else None, "mapcount": count}
        say(json.dumps({**found, "words": [part.as_dict() for part in parts]}, indent=1))
        return
    say(f"address {start:#x} of process {process.pid}: {vma if vma else 'not mapped'}")
    for part in parts:
        say()
        say(str(part))
    if count is not None:
        say(f"\nkpagecount: the frame is mapped {count} times [KC-001]")
