"""`pmcore dirty`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click

from pmcore.analysis.dirty import DirtyTracker
from pmcore.cli.options import backend_options, format_option, open_backend, process_of
from pmcore.cli.output import Column, Report, emit


@click.command(name="dirty")
@click.argument("pid")
@click.option(
    "-i", "--interval", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Seconds."
)
@click.option(
    "-n", "--count", type=click.IntRange(1), default=1, show_default=True, help="Intervals to watch."
)
@click.option(
    "--method", type=click.Choice(["soft-dirty", "uffd-wp"]), help="Default: what works, uffd-wp first."
)
@click.option("--regions", is_flag=True, help="One row a region instead of one an interval.")
@backend_options
@format_option()
def command(
    pid: str,
    interval: float,
    count: int,
    method: str | None,
    regions: bool,
    backend: str,
    backend_settings: tuple[str, ...],
    form: str,
) -> None:
    """Which pages process PID writes, interval by interval.

    By soft-dirty bits (any process; clearing them disturbs others who watch the same process), or by userfaultfd
    write protection where the process has registered its memory for it.
    """
    with open_backend(backend, backend_settings) as kernel:
        tracker = DirtyTracker(process_of(kernel, pid), method)
        shift = kernel.profile.geometry.page_shift

        def rows() -> Iterator[tuple[int | float | str, ...]]:
            for number in range(1, count + 1):
                tracker.reset()
                began = time.monotonic()
                time.sleep(interval)
                found = tracker.dirty()
                seconds = round(time.monotonic() - began, 3)
                pages = int((found["end"] - found["start"]).sum()) >> shift
                if not regions:
                    yield number, seconds, pages, pages << shift, len(found), str(tracker.method)
                    continue
                for low, high, _ in found.tolist():
                    yield number, low, high, (high - low) >> shift, high - low

        if regions:
            columns = [Column("interval", "int"), Column("start", "address"), Column("end", "address")]
            columns += [Column("pages", "int"), Column("bytes", "bytes", "size")]
        else:
            columns = [Column("interval", "int"), Column("seconds", "float"), Column("pages", "int")]
            columns += [Column("bytes", "bytes", "size"), Column("regions", "int"), Column("method")]
        emit(Report(columns, rows()), form)
