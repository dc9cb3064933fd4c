"""Making a recording of any backend: all its frames and some or all of its processes, a piece at a time."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from pmcore._version import __version__
from pmcore.arrays import U64Array
from pmcore.errors import ArgumentError, HiddenPfn, Missing, NotPermitted, ProcessGone, SyscallError
from pmcore.profile import KernelProfile
from pmcore.protocols import FrameFile, Kernel, Process
from pmcore.recording.anonymise import FrameShuffle
from pmcore.recording.container import FORMAT_VERSION, PIECE, RecordingWriter
from pmcore.vma import Vma, parse_maps

__all__ = ["Captured", "record"]

#: Texts of the machine and of each process that are kept where they can be read.
KERNEL_TEXTS = ("version", "meminfo", "vmstat", "buddyinfo", "swaps", "config.gz")
PROCESS_TEXTS = ("maps", "smaps", "smaps_rollup", "comm")
_ALL = 1 << 40


@attrs.frozen(kw_only=True)
class Captured:
    """What went into a recording."""

    path: Path
    #: Bytes of the file.
    size: int
    frames: int
    #: Numbers of the processes recorded, of those that were refused, and of those that ended meanwhile.
    pids: tuple[int, ...]
    refused: tuple[int, ...]
    gone: tuple[int, ...]
    #: Pagemap entries recorded.
    entries: int
    seconds: float


def record(
    kernel: Kernel,
    path: str | Path,
    *,
    pids: Sequence[int] | None = None,
    anonymise: bool = False,
    files: bool = False,
    seed: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Captured:
    """Write what `kernel` shows to `path`: all frames, and the processes `pids` (None: all).

    `anonymise` gives frames other numbers, by a permutation that is not kept (`seed` makes it repeatable, for tests).
    `files` also asks which pages of mapped files exist and are in memory. `progress(done, total)` counts processes.
    Memory does not grow with the machine, but for 4 bytes a frame where numbers are changed.
    Raises ProcessGone for a process of `pids` that is not there, HiddenPfn where numbers to change are hidden.
    """
    path, began = Path(path), time.time()
    if not overwrite and path.exists():
        raise ArgumentError(f"{path} is there already", remedy="another name, or overwrite it on purpose")
    if anonymise and not kernel.pfn_visible:
        raise HiddenPfn("giving frames other numbers")
    chosen = list(kernel.pids()) if pids is None else sorted(set(pids))
    if pids is not None:
        for pid in chosen:
            kernel.process(pid)
    with RecordingWriter(path) as writer:
        rng = np.random.default_rng(seed)
        frames, shuffle = _frames(kernel, writer, rng if anonymise else None)
        rows: list[dict[str, Any]] = []
        gone: list[int] = []
        for number, pid in enumerate(chosen):
            if progress is not None:
                progress(number, len(chosen))
            try:
                rows.append(_process(writer, kernel.process(pid), shuffle, files=files))
            except ProcessGone:
                gone.append(pid)
        index = {
            "pmcore_recording": FORMAT_VERSION,
            "made_by": f"pmcore {__version__}",
            "began": began,
            "ended": time.time(),
            "backend": kernel.name,
            "pfn_visible": bool(kernel.pfn_visible),
            "anonymised": anonymise,
            "whole_machine": pids is None,
            "profile": _profile(kernel.profile),
            "frames": frames,
            "texts": _texts(writer, "kernel", kernel, KERNEL_TEXTS)[0],
            "processes": rows,
        }
        size = writer.finish(index)
    return Captured(
        path=path,
        size=size,
        frames=frames["count"],
        pids=tuple(row["pid"] for row in rows if "maps" in row["texts"]),
        refused=tuple(row["pid"] for row in rows if "maps" not in row["texts"]),
        gone=tuple(gone),
        entries=sum(row["pagemap"]["words"] for row in rows),
        seconds=time.time() - began,
    )


def _profile(profile: KernelProfile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "capabilities": sorted(profile.capabilities),
        "config": sorted(profile.config),
        "arch": profile.arch,
        "geometry": attrs.asdict(profile.geometry),
    }


def _frames(
    kernel: Kernel, writer: RecordingWriter, rng: np.random.Generator | None
) -> tuple[dict[str, Any], FrameShuffle | None]:
    """Write the frame files; their rows for the index, and the permutation that was used."""
    row: dict[str, Any] = {"count": 0, "files": {}, "refused": {}}
    try:
        count = row["count"] = kernel.frame_count()
    except (NotPermitted, Missing) as error:
        row["refused"] = {str(file): error.errno for file in FrameFile}
        return row, None
    shuffle = FrameShuffle(count, rng) if rng is not None else None
    for file in (FrameFile.KPAGEFLAGS, FrameFile.KPAGECOUNT, FrameFile.KPAGECGROUP):
        try:
            kernel.read_frames(file, 0, np.zeros(min(count, 1), dtype=np.uint64))
        except (NotPermitted, Missing) as error:
            row["refused"][str(file)] = error.errno
            continue
        if shuffle is None:
            chunks = _straight(kernel, file, count)
        elif file is FrameFile.KPAGEFLAGS:
            chunks = shuffle.flags(kernel)
        else:
            chunks = shuffle.other(kernel, file)
        row["files"][str(file)] = writer.words(f"frames/{file}", _pieces(chunks))
    return row, shuffle


def _straight(kernel: Kernel, file: FrameFile, count: int) -> Iterator[U64Array]:
    for first in range(0, count, PIECE):
        words = np.zeros(min(PIECE, count - first), dtype=np.uint64)
        kernel.read_frames(file, first, words)
        yield words


def _pieces(chunks: Iterable[U64Array]) -> Iterator[U64Array]:
    for words in chunks:
        for first in range(0, len(words), PIECE):
            yield words[first : first + PIECE]


def _texts(
    writer: RecordingWriter, folder: str, source: Kernel | Process, names: Sequence[str]
) -> tuple[list[str], dict[str, int], dict[str, bytes]]:
    """Write texts; those that were read, those that were refused with the errno, and the first one's bytes."""
    read: list[str] = []
    refused: dict[str, int] = {}
    kept: dict[str, bytes] = {}
    for name in names:
        try:
            data = source.pread(name, 0, _ALL)
        except SyscallError as error:
            if error.errno == errno.ESRCH and name == "maps":
                raise
            refused[name] = error.errno
            continue
        writer.text(f"{folder}/{name}", data)
        read.append(name)
        if name == "maps":
            kept[name] = data
    return read, refused, kept


def _process(
    writer: RecordingWriter, process: Process, shuffle: FrameShuffle | None, *, files: bool
) -> dict[str, Any]:
    """Write one process; its row for the index. Raises ProcessGone."""
    folder = f"processes/{process.pid}"
    texts, refused, kept = _texts(writer, folder, process, PROCESS_TEXTS)
    vmas = parse_maps(kept.get("maps", b""), source=f"maps of {process.pid}")
    spans = _spans(process, vmas)
    stream = writer.words(f"{folder}/pagemap", _entries(process, spans, shuffle))
    if stream["words"] != sum(pages for _, pages in spans):
        raise _gone(process)
    return {
        "pid": process.pid,
        "texts": texts,
        "refused": refused,
        "spans": spans,
        "pagemap": stream,
        "files": _files(writer, folder, process, vmas) if files else None,
    }


def _gone(process: Process) -> SyscallError:
    return ProcessGone(errno.ESRCH, f"read(pagemap of {process.pid})", remedy="the process is gone")


def _spans(process: Process, vmas: Iterable[Vma]) -> list[list[int]]:
    """[first page, pages] of what the VMAs cover, ascending, neighbours joined."""
    geometry = process.kernel.profile.geometry
    joined: list[list[int]] = []
    for vma in vmas:
        first, end = vma.start >> geometry.page_shift, min(vma.end, geometry.task_size) >> geometry.page_shift
        if joined and first <= joined[-1][0] + joined[-1][1]:
            first = joined[-1][0] + joined[-1][1]
            joined[-1][1] += max(end - first, 0)
        elif first < end:
            joined.append([first, end - first])
    return joined


def _entries(process: Process, spans: list[list[int]], shuffle: FrameShuffle | None) -> Iterator[U64Array]:
    """The entries of all spans, one after the other, PIECE at a time."""
    out = np.zeros(PIECE, dtype=np.uint64)
    filled = 0
    for first, pages in spans:
        position = first
        while position < first + pages:
            part = out[filled : filled + min(PIECE - filled, first + pages - position)]
            got = process.read_pagemap(position, part)
            if got < len(part):
                return  # the process is gone: the caller sees that words are missing
            if shuffle is not None:
                shuffle.entries(part)
            position, filled = position + got, filled + got
            if filled == PIECE:
                yield out
                filled = 0
    yield out[:filled]


def _files(
    writer: RecordingWriter, folder: str, process: Process, vmas: Iterable[Vma]
) -> list[dict[str, Any]]:
    """Write which pages of the files behind mappings exist and are in memory, one stream a mapping."""
    rows: list[dict[str, Any]] = []
    for vma in vmas:
        if not vma.inode:
            continue
        try:
            found = process.file_residency(vma, vma.start, vma.end)
        except SyscallError as error:
            rows.append({"start": vma.start, "errno": error.errno})
            continue
        words = found.data.astype(np.uint64) | found.in_core.astype(np.uint64) << np.uint64(1)
        rows.append(
            {"start": vma.start, "pages": writer.words(f"{folder}/file-{vma.start:x}", _pieces([words]))}
        )
    return rows
