"""The work of `pmcore types`, apart from its options: what it imports takes longer than reading the options does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pmcore.analysis.bits import parse_addr, parse_bits, parse_flags
from pmcore.analysis.listing import page_ranges
from pmcore.analysis.rows import FrameRows, RowOptions, file_rows, frame_rows, process_rows, rows_from_words
from pmcore.analysis.survey import Survey, Tally, summarise, survey
from pmcore.cli import pagetypes_text
from pmcore.cli.options import process_of
from pmcore.cli.output import Column, Report, emit, progress_bar, say
from pmcore.errors import ArgumentError, FormatError, syscall_error
from pmcore.pagetypes import long_names, symbolic
from pmcore.protocols import Kernel

__all__ = ["describe", "live", "saved"]

_WORDS = 1 << 17


def describe(text: str) -> None:
    """--describe."""
    word = parse_flags(text)
    say(f"{word:#018x}\t{symbolic(word)}\t{long_names(word)}")


def _row_options(options: dict[str, Any]) -> RowOptions:
    return RowOptions(
        raw=options["raw"],
        filters=tuple(parse_bits(text) for text in options["bits"]),
        cgroup=_cgroup(options["cgroup"]),
        show_cgroup=options["list_cgroup"] and options["listing"] is not None,
        show_mapcount=options["list_mapcnt"] and options["listing"] is not None,
    )


def _cgroup(text: str | None) -> int | None:
    """The inode number that --cgroup names."""
    if text is None:
        return None
    if text.startswith("@"):
        try:
            return int(text[1:], 0)
        except ValueError:
            raise ArgumentError(f"--cgroup {text!r}: after @ comes an inode number") from None
    path = Path(text)
    try:
        number = path.stat().st_ino
    except OSError as error:
        raise syscall_error(error.errno or 2, f"stat({text})", remedy="name a cgroup's directory") from None
    if not path.is_dir():
        raise ArgumentError(f"{text} is no directory", remedy="name a cgroup's directory")
    return number


def _ranges(options: dict[str, Any]) -> tuple[tuple[int, int | None], ...]:
    return tuple(parse_addr(text) for text in options["addrs"]) or ((0, None),)


def live(kernel: Kernel, options: dict[str, Any]) -> None:
    """Frames of the machine, of a process or of files."""
    chosen, ranges = _row_options(options), _ranges(options)
    acting = options["mark_idle"] or options["hwpoison"] or options["unpoison"]
    size = kernel.geometry.page_size
    counting = options["listing"] is None and not acting
    if options["pid"] is None and options["path"] is None and counting and options["form"] != "page-types":
        with progress_bar("counting frames", wanted=not options["no_progress"]) as progress:
            found = survey(
                kernel,
                raw=chosen.raw,
                filters=chosen.filters,
                ranges=ranges,
                cgroup=chosen.cgroup,
                threads=options["threads"],
                progress=progress,
            )
        _summary(found, options)
        return
    if options["pid"] is not None:
        rows = process_rows(process_of(kernel, options["pid"]), chosen, ranges=ranges)
    elif options["path"] is not None:
        rows = _file_rows(kernel, options["path"], chosen, ranges)
    else:
        rows = frame_rows(kernel, chosen, ranges=ranges)
    if acting:
        rows = _act(kernel, rows, options)
    _output(rows, options, size)


def _file_rows(
    kernel: Kernel, path: str, chosen: RowOptions, ranges: tuple[tuple[int, int | None], ...]
) -> Iterator[FrameRows]:
    """Rows of a file, or of each regular file of a directory on the same file system, links not followed."""
    if not Path(path).is_dir():
        yield from file_rows(kernel, path, chosen, ranges=ranges)
        return
    device = Path(path).stat().st_dev
    for directory, folders, files in os.walk(path):
        folders[:] = [name for name in folders if Path(directory, name).lstat().st_dev == device]
        for name in sorted(files):
            file = Path(directory, name)
            if file.is_file() and not file.is_symlink():
                yield from file_rows(kernel, str(file), chosen, ranges=ranges)


def _act(kernel: Kernel, rows: Iterable[FrameRows], options: dict[str, Any]) -> Iterator[FrameRows]:
    """Do to each frame what was asked for, and pass the rows on."""
    if (options["hwpoison"] or options["unpoison"]) and not options["yes"]:
        raise ArgumentError(
            "poisoned memory is lost, and processes that use it are killed",
            remedy="add --yes if that is meant",
        )
    for name, wanted in (("mark_idle", "mark_idle"), ("hwpoison", "hwpoison"), ("unpoison", "unpoison")):
        if options[wanted] and not hasattr(kernel, name):
            raise ArgumentError(f"backend {kernel.name!r} cannot {wanted.replace('_', ' ')}")
    for batch in rows:
        for name in ("hwpoison", "unpoison", "mark_idle"):
            if options[name]:
                getattr(kernel, name)(batch.offset)
        yield batch


def saved(options: dict[str, Any]) -> None:
    """--kpageflags FILE: words from a file, no kernel."""
    path, chosen = Path(options["saved"]), _row_options(options)
    if chosen.cgroup is not None or options["list_cgroup"] or options["list_mapcnt"]:
        raise ArgumentError("a saved kpageflags file knows nothing of cgroups and map counts")
    try:
        size = path.stat().st_size
        if size % 8:
            raise FormatError(f"{size} bytes are not whole 64-bit words", source=str(path))
        words = np.memmap(path, dtype="<u8", mode="r") if size else np.zeros(0, dtype="<u8")
    except OSError as error:
        raise syscall_error(error.errno or 5, f"open({path})") from None

    def rows() -> Iterator[FrameRows]:
        for start, end in _ranges(options):
            stop = len(words) if end is None else min(end, len(words))
            for first in range(start, stop, _WORDS):
                part = np.array(words[first : min(first + _WORDS, stop)], dtype=np.uint64)
                yield rows_from_words(part, chosen, first=first)

    _output(rows(), options, 4096)


# -- showing ---------------------------------------------------------------------------------------------


def _output(rows: Iterable[FrameRows], options: dict[str, Any], page_size: int) -> None:
    if options["form"] == "page-types":
        pagetypes_text.write(rows, options, page_size)
        return
    if options["listing"] is None:
        _summary(summarise(rows, page_size=page_size), options)
        return
    tally = Tally()
    summed = options["form"] == "table" and not options["no_summary"]

    def counted() -> Iterator[FrameRows]:
        for batch in rows:
            if summed:
                tally.add(batch.flags)
            yield batch

    walked = options["pid"] is not None or options["path"] is not None
    columns = [Column("offset", "address")]
    if walked:
        columns.insert(0, Column("voffset" if options["pid"] is not None else "foffset", "address"))
    if options["list_cgroup"]:
        columns.append(Column("cgroup", "int"))
    if options["list_mapcnt"]:
        columns.append(Column("mapcount", "int"))
    each = options["listing"] == "each"
    if not each:
        columns.append(Column("pages", "int"))
    columns += [Column("flags", "hex"), Column("names")]
    emit(Report(columns, _listed(counted(), columns, each=each)), options["form"])
    if summed:
        say()
        _summary(tally.survey(page_size=page_size), options)


def _listed(rows: Iterable[FrameRows], columns: list[Column], *, each: bool) -> Iterator[tuple[Any, ...]]:
    names: dict[int, str] = {}

    def named(word: int) -> str:
        if word not in names:
            names[word] = long_names(word)
        return names[word]

    fields = [{"foffset": "voffset"}.get(column.name, column.name) for column in columns[:-1]]
    if each:
        for batch in rows:
            for row in zip(*(getattr(batch, field).tolist() for field in fields), strict=True):
                yield (*row, named(row[-1]))
    else:
        for ranges in page_ranges(rows):
            for row in zip(*(ranges[field].tolist() for field in fields), strict=True):
                yield (*row, named(row[-1]))


def _summary(found: Survey, options: dict[str, Any]) -> None:
    columns = [Column("flags", "hex"), Column("pages", "int"), Column("bytes", "bytes", "size")]
    columns += [Column("symbolic"), Column("names")]
    rows: list[tuple[Any, ...]] = [
        (word, pages, pages * found.page_size, symbolic(word), long_names(word))
        for word, pages in zip(found.flags.tolist(), found.pages.tolist(), strict=True)
    ]
    emit(Report(columns, rows), options["form"])
    if options["form"] == "table":
        total = columns[2].shown(found.total_bytes)
        say(f"total {found.total_pages} pages, {total}, in {len(rows)} kinds")
