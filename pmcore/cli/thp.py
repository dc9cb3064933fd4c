"""`pmcore thp`: thpmaps' counterpart."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from pmcore.analysis.huge import HugeStats, cont_order, huge_rollup, huge_stats
from pmcore.cli.options import backend_options, format_option, open_backend, pid_of
from pmcore.cli.output import Column, Report, emit, progress_bar, say
from pmcore.errors import ArgumentError, FormatError, Missing, NotPermitted, ProcessGone, syscall_error
from pmcore.protocols import Kernel

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@click.command(name="thp")
@click.argument("pids", nargs=-1, metavar="[PID]...")
@click.option(
    "--pid", "more_pids", multiple=True, metavar="PID", help="The same as an argument, as thpmaps has it."
)
@click.option("--cgroup", metavar="PATH", help="All processes of this cgroup and those below it.")
@click.option("--rollup", is_flag=True, help="One sum over everything.")
@click.option("--cont", multiple=True, metavar="SIZE[KMG]", help="Also aligned contiguous blocks of SIZE.")
@click.option("--inc-smaps", is_flag=True, help="Also the counters of smaps.")
@click.option("--inc-empty", is_flag=True, help="Also what is 0.")
@click.option(
    "--periodic", type=click.IntRange(0), metavar="MS", help="Again and again, every MS milliseconds."
)
@click.option("--no-progress", is_flag=True, help="No bar, however long it takes.")
@backend_options
@format_option()
def command(
    pids: tuple[str, ...],
    more_pids: tuple[str, ...],
    cgroup: str | None,
    rollup: bool,
    cont: tuple[str, ...],
    inc_smaps: bool,
    inc_empty: bool,
    periodic: int | None,
    no_progress: bool,
    backend: str,
    backend_settings: tuple[str, ...],
    form: str,
) -> None:
    """How transparent huge pages are mapped: by processes, a cgroup, or the whole system.

    Takes thpmaps' options and prints its figures under its labels.
    """
    named = [*pids, *more_pids]
    if named and cgroup:
        raise ArgumentError("processes and a cgroup exclude each other")
    with open_backend(backend, backend_settings) as kernel:
        geometry = kernel.profile.geometry
        orders = [cont_order(_size(text), geometry) for text in cont]
        while True:
            chosen = [pid_of(text) for text in named] if named else _pids(kernel, cgroup)
            with progress_bar("processes", wanted=not no_progress) as progress:
                stats = _collect(kernel, chosen, orders, progress, strict=bool(named), smaps=inc_smaps)
                if rollup:
                    stats = iter([(None, huge_rollup(one for _, one in stats))])
                _show(stats, form, inc_empty=inc_empty)
            if periodic is None:
                return
            say()
            time.sleep(periodic / 1000)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([kmgKMG]?)", text)
    if match is None:
        raise FormatError(f"--cont {text!r}: a whole number, with K, M or G where wanted")
    return int(match[1]) * _UNITS[match[2].lower()]


def _pids(kernel: Kernel, cgroup: str | None) -> list[int]:
    if cgroup is None:
        return list(kernel.pids())
    found: set[int] = set()
    try:
        for path in (Path(cgroup), *Path(cgroup).rglob("*/")):
            found |= {int(line) for line in (path / "cgroup.procs").read_text().split()}
    except OSError as error:
        raise syscall_error(
            error.errno or 2, f"read({error.filename})", remedy="name a cgroup's directory"
        ) from None
    return sorted(found)


def _collect(
    kernel: Kernel,
    pids: list[int],
    orders: list[int],
    progress: Callable[[int, int], object],
    *,
    strict: bool,
    smaps: bool,
) -> Iterator[tuple[int | None, HugeStats]]:
    """Statistics VMA by VMA. A process that was not named may come and go, or be forbidden, unnoticed."""
    for number, pid in enumerate(pids):
        progress(number, len(pids))
        try:
            process = kernel.process(pid)
            counters: dict[int, Any] = {e.vma.start: e.counters for e in process.smaps()} if smaps else {}
            for one in huge_stats(process, cont=orders):
                if smaps and one.vma is not None:
                    kept = {k: v for k, v in counters.get(one.vma.start, {}).items() if "PageSize" not in k}
                    one = HugeStats(vma=one.vma, values={**kept, **one.values}, anon=one.anon, file=one.file)
                yield pid, one
        except (ProcessGone, NotPermitted, Missing):
            if strict:
                raise


def _show(stats: Iterator[tuple[int | None, HugeStats]], form: str, *, inc_empty: bool) -> None:
    columns = [Column("pid", "int"), Column("start", "address"), Column("end", "address"), Column("mapping")]
    columns += [Column("statistic"), Column("bytes", "bytes", "size"), Column("percent", "float")]

    def rows() -> Iterator[tuple[Any, ...]]:
        for pid, one in stats:
            where = (one.vma.start, one.vma.end, one.vma.name) if one.vma else (None, None, "")
            for label, value in one.values.items():
                if value or inc_empty:
                    share = one.share(label) if label.startswith(("anon-", "file-")) else None
                    yield (pid, *where, label, value, None if share is None else round(100 * share, 1))

    emit(Report(columns, rows()), form)
