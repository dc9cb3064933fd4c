"""A machine's /proc and /sys as plain files, sparse where they have nothing, for tools that read files."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import numpy as np

from pmcore._version import __version__
from pmcore.arrays import U64Array
from pmcore.errors import ArgumentError, NotPermitted, ProcessGone, SyscallError, syscall_error
from pmcore.geometry import align_up
from pmcore.procview.opener import ROOT, Opener
from pmcore.procview.tree import Node, ProcView
from pmcore.profile import profile_row
from pmcore.protocols import FrameFile, Process

__all__ = ["PROFILE", "Dumped", "dump"]

#: Beside proc and sys: what the kernel could do, for whoever reads the dump as a kernel.
PROFILE = "profile.json"
#: Words looked at together: zeros of that many are left out of the file.
_BLOCK = 512
#: Words read at a time.
_PIECE = 1 << 16
_TEXT = 1 << 20


@attrs.frozen(kw_only=True)
class Dumped:
    """What was written."""

    path: Path
    files: int
    #: Bytes that hold something, and bytes that the files seem to have.
    written: int
    apparent: int
    #: Paths of the tree that could not be read, with the errno.
    refused: tuple[tuple[str, int], ...]


def dump(
    view: ProcView,
    path: str | Path,
    *,
    opener: Opener = ROOT,
    progress: Callable[[int, int], object] | None = None,
) -> Dumped:
    """Write every file that `opener` may read to the directory `path`, under the same names; it must not be there yet.

    What can only be written (clear_refs) is left out. `progress(done, total)` counts processes. Raises ArgumentError
    for a path that is there, SyscallError where nothing can be written; nothing is left then.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ArgumentError(f"{path} is there already", remedy="name a directory that is not")
    partial = path.with_name(f"{path.name}.partial")
    try:
        work = _Work(view, opener, partial)
        done = work.all(progress)
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, SyscallError):
            raise syscall_error(error.errno or errno.EIO, f"write({error.filename or path})") from None
        raise
    return attrs.evolve(done, path=path)


class _Work:
    def __init__(self, view: ProcView, opener: Opener, place: Path) -> None:
        self.view, self.opener, self.place = view, opener, place
        self.files = self.written = self.apparent = 0
        self.refused: list[tuple[str, int]] = []

    def all(self, progress: Callable[[int, int], object] | None) -> Dumped:
        self.place.mkdir()
        pids = list(self.view.kernel.pids())
        for name in self.view.node("/proc").names():
            if not name.isdigit():
                self._node(f"/proc/{name}")
        for number, pid in enumerate(pids):
            if progress is not None:
                progress(number, len(pids))
            try:
                self._node(f"/proc/{pid}")
            except (ProcessGone, FileNotFoundError):
                continue  # it has ended meanwhile
        if "sys" in self.view.node("/").names():
            self._node("/sys")
        note = {**profile_row(self.view.kernel.profile), "dumped_by": f"pmcore {__version__}"}
        (self.place / PROFILE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        return Dumped(
            path=self.place,
            files=self.files,
            written=self.written,
            apparent=self.apparent,
            refused=tuple(self.refused),
        )

    def _node(self, path: str) -> None:
        node = self.view.node(path)
        target = self.place / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if node.is_link:
            target.symlink_to(node.target)
        elif node.is_dir:
            target.mkdir(exist_ok=True)
            for name in node.names():
                self._node(f"{path}/{name}")
        elif node.mode & 0o444:
            try:
                self._file(node, target)
            except (NotPermitted, ProcessGone) as error:
                target.unlink(missing_ok=True)
                self.refused.append((path, error.errno))

    def _file(self, node: Node, target: Path) -> None:
        parts = node.path.split("/")
        name = parts[-1]
        if name in tuple(FrameFile):
            count = self.view.kernel.frame_count()
            self._words(node, target, iter([(0, count)]), count)
        elif name == "pagemap":
            process = self.view.kernel.process(int(parts[2]))
            geometry = self.view.kernel.geometry
            self._words(node, target, _spans(process), geometry.task_size >> geometry.page_shift)
        else:
            file, text = node.open(opener=self.opener), b""
            while piece := file.read(len(text), _TEXT):
                text += piece
            target.write_bytes(text)
            self._count(len(text), len(text))

    def _count(self, written: int, apparent: int) -> None:
        self.files += 1
        self.written += written
        self.apparent += apparent

    def _words(self, node: Node, target: Path, spans: Iterator[tuple[int, int]], words: int) -> None:
        source, end, written = node.open(opener=self.opener), 0, 0
        with target.open("wb") as file:
            for first, last in spans:
                for low in range(first, last, _PIECE):
                    data = source.read(low * 8, min(_PIECE, last - low) * 8)
                    found = np.frombuffer(data, dtype=np.uint64)
                    for offset, block in _blocks(found):
                        file.seek((low + offset) * 8)
                        file.write(block.tobytes())
                        written += block.nbytes
                end = last
            try:
                file.truncate(words * 8)
            except OSError as error:
                if error.errno not in (errno.EFBIG, errno.EINVAL):
                    raise
                if not end:
                    raise syscall_error(errno.EFBIG, f"truncate({target})") from None
                # A file system with smaller files: what lies behind the last mapping is left away.
                file.truncate(end * 8)
        self._count(written, words * 8)


def _spans(process: Process) -> Iterator[tuple[int, int]]:
    """Page numbers of the mappings, in whole blocks, joined where they touch."""
    geometry = process.kernel.geometry
    limit = geometry.task_size >> geometry.page_shift
    low = high = 0
    for vma in process.maps():
        first = (vma.start >> geometry.page_shift) & -_BLOCK
        last = min(align_up(vma.end >> geometry.page_shift, _BLOCK), limit)
        if first >= limit:
            break
        if first > high:
            if high > low:
                yield low, high
            low = first
        high = max(high, last)
    if high > low:
        yield low, high


def _blocks(words: U64Array) -> Iterator[tuple[int, U64Array]]:
    """Runs of blocks with anything in them: (first word, words)."""
    whole = np.zeros(-(-len(words) // _BLOCK) * _BLOCK, dtype=np.bool_)
    whole[: len(words)] = words != 0
    there = whole.reshape(-1, _BLOCK).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2).tolist():
        yield first * _BLOCK, words[first * _BLOCK : last * _BLOCK]
