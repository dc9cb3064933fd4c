"""Making a recording of any backend: all its frames and some or all of its processes, a piece at a time."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from pmcore._version import __version__
from pmcore.arrays import U64Array
from pmcore.errors import ArgumentError, HiddenPfn, Missing, NotPermitted, ProcessGone, SyscallError
from pmcore.profile import profile_row
from pmcore.protocols import IDLE_BITMAP, FrameFile, Kernel, Process
from pmcore.recording.anonymise import FrameShuffle
from pmcore.recording.container import FORMAT_VERSION, PIECE, RecordingWriter
from pmcore.vma import Vma, parse_maps

__all__ = ["Captured", "record"]

#: Texts of the machine and of each process that are kept where they can be read.
KERNEL_TEXTS = ("version", "meminfo", "vmstat", "buddyinfo", "swaps", "config.gz")
PROCESS_TEXTS = ("maps", "smaps", "smaps_rollup", "comm")
_ALL = 1 << 40
#: Entries that are noted together when it comes to what changed; sums with odd weights tell whether they did.
BLOCK = 512
_WEIGHTS = np.random.default_rng(1).integers(0, 1 << 63, BLOCK, dtype=np.uint64) << np.uint64(1) | np.uint64(
    1
)


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
        blocks: list[list[U64Array]] = []
        gone: list[int] = []
        for number, pid in enumerate(chosen):
            if progress is not None:
                progress(number, len(chosen))
            try:
                sums: list[U64Array] = []
                rows.append(_process(writer, kernel.process(pid), shuffle, sums, files=files))
                blocks.append(sums)
            except ProcessGone:
                gone.append(pid)
        # What changes while it is recorded is told: entries first, then flags and counts, are looked at once more.
        for row, sums in zip(rows, blocks, strict=True):
            row["moved"] = _moved(kernel, row, sums)
        later = [
            file for file in (FrameFile.KPAGEFLAGS, FrameFile.KPAGECOUNT) if str(file) in frames["files"]
        ]
        frames["later"] = _frame_words(kernel, writer, "later", later, frames["count"], shuffle)
        index = {
            "pmcore_recording": FORMAT_VERSION,
            "made_by": f"pmcore {__version__}",
            "began": began,
            "ended": time.time(),
            "backend": kernel.name,
            "pfn_visible": bool(kernel.pfn_visible),
            "anonymised": anonymise,
            "whole_machine": pids is None,
            "profile": profile_row(kernel.profile),
            "frames": frames,
            "texts": _texts(writer, "kernel", kernel, [*KERNEL_TEXTS, *_settings(kernel)])[0],
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


def _frames(
    kernel: Kernel, writer: RecordingWriter, rng: np.random.Generator | None
) -> tuple[dict[str, Any], FrameShuffle | None]:
    """Write the frame files; their rows for the index, and the permutation that was used."""
    row: dict[str, Any] = {"count": 0, "files": {}, "later": {}, "refused": {}}
    try:
        count = row["count"] = kernel.frame_count()
    except (NotPermitted, Missing) as error:
        row["refused"] = {str(file): error.errno for file in FrameFile}
        return row, None
    shuffle = FrameShuffle(count, rng) if rng is not None else None
    files = []
    for file in (FrameFile.KPAGEFLAGS, FrameFile.KPAGECOUNT, FrameFile.KPAGECGROUP):
        try:
            kernel.read_frames(file, 0, np.zeros(min(count, 1), dtype=np.uint64))
            files.append(file)
        except (NotPermitted, Missing) as error:
            row["refused"][str(file)] = error.errno
    row["files"] = _frame_words(kernel, writer, "frames", files, count, shuffle)
    return row, shuffle


def _frame_words(
    kernel: Kernel,
    writer: RecordingWriter,
    folder: str,
    files: Sequence[FrameFile],
    count: int,
    shuffle: FrameShuffle | None,
) -> dict[str, Any]:
    """Write `files` side by side, so that what they say of a frame is of about the same moment; their rows."""
    streams = {file: writer.stream(f"{folder}/{file}") for file in files}
    blocks = _straight(kernel, files, count) if shuffle is None else shuffle.blocks(kernel, files)
    for block in blocks:
        for file, words in block.items():
            streams[file].add(words)
    return {str(file): stream.row() for file, stream in streams.items()}


def _straight(kernel: Kernel, files: Sequence[FrameFile], count: int) -> Iterator[dict[FrameFile, U64Array]]:
    for first in range(0, count, PIECE):
        block = {}
        for file in files:
            block[file] = np.zeros(min(PIECE, count - first), dtype=np.uint64)
            kernel.read_frames(file, first, block[file])
        yield block


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
        writer.text(f"{folder}/{name.lstrip('/')}", data)
        read.append(name)
        if name == "maps":
            kept[name] = data
    return read, refused, kept


def _settings(kernel: Kernel) -> list[str]:
    """Files of sysfs: tools ask there how huge pages are set up. The idle bitmap is none: reading it changes frames."""
    return [name for name in kernel.files() if name.startswith("/sys/") and name != IDLE_BITMAP]


def _process(
    writer: RecordingWriter,
    process: Process,
    shuffle: FrameShuffle | None,
    sums: list[U64Array],
    *,
    files: bool,
) -> dict[str, Any]:
    """Write one process; its row for the index. Raises ProcessGone."""
    folder = f"processes/{process.pid}"
    texts, refused, kept = _texts(writer, folder, process, PROCESS_TEXTS)
    vmas = parse_maps(kept.get("maps", b""), source=f"maps of {process.pid}")
    spans = _spans(process, vmas)
    stream = writer.words(f"{folder}/pagemap", _entries(process, spans, shuffle, sums))
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


def _entries(
    process: Process, spans: list[list[int]], shuffle: FrameShuffle | None, sums: list[U64Array]
) -> Iterator[U64Array]:
    """The entries of all spans, one after the other, PIECE at a time; sums of their blocks are added to `sums`."""
    out = np.zeros(PIECE, dtype=np.uint64)
    filled = 0
    for first, pages in spans:
        position = first
        while position < first + pages:
            part = out[filled : filled + min(PIECE - filled, first + pages - position)]
            got = process.read_pagemap(position, part)
            if got < len(part):
                return  # the process is gone: the caller sees that words are missing
            position, filled = position + got, filled + got
            if filled == PIECE:
                yield _noted(out, shuffle, sums)
                filled = 0
    yield _noted(out[:filled], shuffle, sums)


def _noted(words: U64Array, shuffle: FrameShuffle | None, sums: list[U64Array]) -> U64Array:
    whole = np.zeros(-(-len(words) // BLOCK) * BLOCK, dtype=np.uint64)
    whole[: len(words)] = words
    sums.append((whole.reshape(-1, BLOCK) * _WEIGHTS).sum(axis=1, dtype=np.uint64))
    if shuffle is not None:
        shuffle.entries(words)
    return words


def _moved(kernel: Kernel, row: dict[str, Any], sums: list[U64Array]) -> list[list[int]]:
    """[first, number] of the blocks of entries that are others now than when they were recorded."""
    before = np.concatenate([np.zeros(0, dtype=np.uint64), *sums])
    changed = np.ones(len(before), dtype=np.bool_)
    again: list[U64Array] = []
    with suppress(ProcessGone, NotPermitted):
        for _ in _entries(kernel.process(row["pid"]), row["spans"], None, again):
            pass
        after = np.concatenate([np.zeros(0, dtype=np.uint64), *again])
        if len(after) == len(before):
            changed = before != after
    edges = np.flatnonzero(np.diff(changed, prepend=False, append=False)).reshape(-1, 2)
    return [[int(first), int(end - first)] for first, end in edges]


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
        rows.append({"start": vma.start, "pages": writer.words(f"{folder}/file-{vma.start:x}", [words])})
    return rows
