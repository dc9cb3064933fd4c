"""Tables out: for people by rich, for machines as JSON, NDJSON, CSV or Arrow.

Machine formats give plain numbers (addresses, flag words, bytes and pages as integers) under stable column
names; tables for people give addresses and words in hex and sizes in human units.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import attrs
import click

from pmcore.errors import ArgumentError

__all__ = ["FORMATS", "Column", "Report", "emit", "human_size", "progress_bar", "say"]

FORMATS = ("table", "json", "ndjson", "csv", "arrow")
_ARROW_ROWS = 1 << 16
#: Rows up to which a table for people is measured as a whole; longer ones stream with fixed widths.
_TABLE_ROWS = 5000


@attrs.frozen
class Column:
    """A column: its machine name, what its values are (text, int, float, bool, hex, address, bytes), its heading."""

    name: str
    kind: str = "text"
    heading: str | None = None

    def shown(self, value: Any) -> str:
        """A value as people see it."""
        if value is None:
            return "-"
        if self.kind == "bytes":
            return human_size(int(value))
        if self.kind == "hex":
            return f"{int(value):#018x}"
        if self.kind == "address":
            return f"{int(value):x}"
        if self.kind == "float":
            return f"{value:.1f}"
        if self.kind == "bool":
            return "yes" if value else "no"
        return str(value)

    @property
    def right(self) -> bool:
        """Whether values are aligned to the right."""
        return self.kind not in ("text", "bool")


@attrs.frozen
class Report:
    """Columns and rows (tuples of plain Python values, None for what is not known)."""

    columns: Sequence[Column]
    rows: Iterable[Sequence[Any]]


def human_size(value: int) -> str:
    """Bytes in the largest unit that keeps the number at 1 or more."""
    if value == 0:
        return "0"
    number, sign = float(abs(value)), "-" if value < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            return f"{sign}{number:.0f} {unit}" if unit == "B" else f"{sign}{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")


def say(text: str = "") -> None:
    """A line for people on standard output."""
    click.echo(text)


def emit(report: Report, form: str) -> None:
    """Write `report` to standard output in one of FORMATS."""
    out = sys.stdout
    names = [column.name for column in report.columns]
    if form == "table":
        _table(report, out)
    elif form == "json":
        opening = "["
        for row in report.rows:
            out.write(f"{opening}\n {json.dumps(dict(zip(names, row, strict=True)))}")
            opening = ","
        out.write("[]\n" if opening == "[" else "\n]\n")
    elif form == "ndjson":
        for row in report.rows:
            out.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")
    elif form == "csv":
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(report.rows)
    elif form == "arrow":
        _arrow(report)
    else:
        raise ArgumentError(f"no format {form!r}", remedy=f"one of {', '.join(FORMATS)}")


def _table(report: Report, out: TextIO) -> None:
    rows = iter(report.rows)
    first = list(itertools.islice(rows, _TABLE_ROWS))
    cells = [[column.shown(v) for column, v in zip(report.columns, row, strict=True)] for row in first]
    headings = [column.heading or column.name for column in report.columns]
    if out.isatty() and len(first) < _TABLE_ROWS:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for column, heading in zip(report.columns, headings, strict=True):
            table.add_column(heading, justify="right" if column.right else "left", no_wrap=column.right)
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        Console(file=out).print(table)
        return
    widths = [max([len(heading), *(len(row[i]) for row in cells)]) for i, heading in enumerate(headings)]

    def line(values: Sequence[str]) -> str:
        parts = (
            value.rjust(width) if column.right else value.ljust(width)
            for value, width, column in zip(values, widths, report.columns, strict=True)
        )
        return "  ".join(parts).rstrip() + "\n"

    out.write(line(headings))
    out.writelines(line(row) for row in cells)
    for more in rows:
        out.write(line([column.shown(v) for column, v in zip(report.columns, more, strict=True)]))


def _arrow(report: Report) -> None:
    if sys.stdout.isatty():
        raise ArgumentError("Arrow data are not for a terminal", remedy="send them to a file or a program")
    try:
        import pyarrow as pa
    except ImportError:
        raise ArgumentError("this format needs pyarrow", remedy="pip install 'pmcore[arrow]'") from None
    kinds = {
        "text": pa.string(),
        "bool": pa.bool_(),
        "float": pa.float64(),
        "hex": pa.uint64(),
        "address": pa.uint64(),
        "bytes": pa.int64(),
        "int": pa.int64(),
    }
    schema = pa.schema([(column.name, kinds[column.kind]) for column in report.columns])
    with pa.ipc.new_stream(sys.stdout.buffer, schema) as stream:
        rows = iter(report.rows)
        while batch := list(itertools.islice(rows, _ARROW_ROWS)):
            arrays = [
                pa.array(values, type=field.type)
                for values, field in zip(zip(*batch, strict=True), schema, strict=True)
            ]
            stream.write_batch(pa.record_batch(arrays, schema=schema))


@contextmanager
def progress_bar(what: str, *, wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that draws a bar on standard error, once a second has passed, on a terminal only."""
    began = time.monotonic()
    bar: Any = None
    task: Any = None

    def update(done: int, total: int) -> None:
        nonlocal bar, task
        if not wanted or not sys.stderr.isatty() or time.monotonic() - began < 1:
            return
        if bar is None:
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
            bar.start()
            task = bar.add_task(what, total=total)
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()
