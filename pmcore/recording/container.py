"""The file format of recordings: a zip archive of word streams and texts, and an index in JSON, written last.

A stream is cut into pieces of at most PIECE words. A piece of equal words stands in the index alone; another one is a
member: its words as differences to the word before (the first to 0), little-endian, all lowest bytes first, then
the next ones, deflated. What a file claims is checked against its size before memory is asked for.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pmcore.arrays import U64Array
from pmcore.errors import FormatError, SyscallError, syscall_error

__all__ = ["FORMAT_VERSION", "PIECE", "RecordingFile", "RecordingWriter", "WordStream", "format_errors"]

FORMAT_VERSION = 1
#: Words in a piece at the most: what is read and unpacked at a time, 512 KiB.
PIECE = 1 << 16
INDEX = "recording.json"
#: A text may be this many times as long as its member; a longer one is stored as it is.
_MOST_RATIO = 256
#: Unpacked pieces that a reader keeps, 64 MiB at the most.
_KEPT = 128
_DATE = (1980, 1, 1, 0, 0, 0)


@contextmanager
def format_errors(source: str) -> Iterator[None]:
    """Whatever reading a damaged file raises inside comes out as a FormatError."""
    try:
        yield
    except (FormatError, SyscallError):
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        OSError,
    ) as error:
        raise FormatError(
            f"not a whole recording: {type(error).__name__}: {error}",
            source=source,
            remedy="record again, or copy the file again",
        ) from None


def encode_piece(words: U64Array) -> bytes:
    """The bytes of a member for `words`, before compression."""
    steps = np.diff(words, prepend=np.uint64(0)).astype("<u8")
    return steps.view(np.uint8).reshape(-1, 8).T.tobytes()


def decode_piece(data: bytes) -> U64Array:
    """The words that `encode_piece` was given."""
    planes = np.frombuffer(data, dtype=np.uint8).reshape(8, -1)
    steps = np.ascontiguousarray(planes.T).view("<u8").reshape(-1)
    return np.cumsum(steps, dtype=np.uint64)


class StreamWriter:
    """A stream in the making."""

    def __init__(self, add: Callable[..., None], name: str) -> None:
        self._add, self._name = add, name
        self._pieces: list[list[int]] = []
        self._total = 0

    def add(self, words: U64Array) -> None:
        """Write the words that follow."""
        for first in range(0, len(words), PIECE):
            self._piece(words[first : first + PIECE])

    def _piece(self, words: U64Array) -> None:
        pieces = self._pieces
        self._total += len(words)
        if not (words == words[0]).all():
            self._add(f"{self._name}.{len(pieces)}", encode_piece(words), pack=True)
            pieces.append([len(words)])
        elif pieces and pieces[-1][1:] == [int(words[0])]:
            pieces[-1][0] += len(words)
        else:
            pieces.append([len(words), int(words[0])])

    def row(self) -> dict[str, Any]:
        """Its description for the index."""
        return {"name": self._name, "words": self._total, "pieces": self._pieces}


class RecordingWriter:
    """Writes a recording beside `path`, and puts it there when it is complete. Use it as a context manager.

    Left by an exception nothing stays behind. Raises SyscallError where the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115 (closed in finish or abandon)
                dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part", delete=False
            )
        except OSError as error:
            raise syscall_error(error.errno or 5, f"create a file beside {self.path}") from None
        self._zip = zipfile.ZipFile(self._file, "w")

    def _add(self, name: str, data: bytes, *, pack: bool) -> None:
        info = zipfile.ZipInfo(name, _DATE)
        info.compress_type = zipfile.ZIP_DEFLATED if pack else zipfile.ZIP_STORED
        try:
            self._zip.writestr(info, data, compresslevel=1)
        except OSError as error:
            raise syscall_error(error.errno or 5, f"write({self.path})") from None

    def stream(self, name: str) -> StreamWriter:
        """A stream to be written; several can be at a time."""
        return StreamWriter(self._add, name)

    def words(self, name: str, chunks: Iterable[U64Array]) -> dict[str, Any]:
        """Write a whole stream; its description for the index."""
        stream = self.stream(name)
        for words in chunks:
            stream.add(words)
        return stream.row()

    def text(self, name: str, data: bytes) -> None:
        """Write a text."""
        self._add(name, data, pack=len(data) < _MOST_RATIO * len(zlib.compress(data, 1)))

    def finish(self, index: dict[str, Any]) -> int:
        """Write the index, and put the file in its place; its size in bytes."""
        # Not packed: whoever reads it then needs no more memory than the file is long.
        self._add(INDEX, json.dumps(index, separators=(",", ":")).encode(), pack=False)
        try:
            self._zip.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.close()
            Path(self._file.name).replace(self.path)
        except OSError as error:
            raise syscall_error(error.errno or 5, f"write({self.path})") from None
        return size

    def abandon(self) -> None:
        """Remove what was written. After `finish` there is nothing to remove."""
        with suppress(OSError, ValueError):
            self._zip.close()
        with suppress(OSError):
            self._file.close()
        Path(self._file.name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


class RecordingFile:
    """A recording opened for reading. Raises FormatError for what is none, SyscallError where it cannot be opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.source = str(path)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, U64Array] = OrderedDict()
        try:
            self._file = self.path.open("rb")
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise syscall_error(error.errno or 5, f"open({path})") from None
        try:
            with format_errors(self.source):
                self._zip = zipfile.ZipFile(self._file)
                self.index = self._read_index()
        except BaseException:
            self._file.close()
            raise

    def _read_index(self) -> dict[str, Any]:
        info = self._zip.getinfo(INDEX)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.size:
            raise FormatError("the index is longer than the file", source=self.source)
        try:
            index = json.loads(self._zip.read(info))
        except RecursionError:
            raise FormatError("the index is nested too deeply", source=self.source) from None
        version = index.get("pmcore_recording") if isinstance(index, dict) else None
        if version != FORMAT_VERSION:
            raise FormatError(
                f"a recording of format {version!r}; this pmcore reads {FORMAT_VERSION}"[:200],
                source=self.source,
                remedy="use the pmcore that made it, or record again",
            )
        found: dict[str, Any] = index
        return found

    def has(self, name: str) -> bool:
        """Whether there is a text of that name."""
        return name in self._zip.NameToInfo

    def text(self, name: str) -> bytes:
        """A text, whole. Raises FormatError."""
        with format_errors(self.source), self._lock:
            info = self._zip.getinfo(name)
            packed = info.compress_type != zipfile.ZIP_STORED
            if info.file_size > (_MOST_RATIO if packed else 1) * max(info.compress_size, 16):
                raise FormatError(f"{name} claims {info.file_size} bytes", source=self.source)
            return self._zip.read(info)

    def piece(self, name: str, words: int) -> U64Array:
        """The words of a member. Raises FormatError."""
        with format_errors(self.source), self._lock:
            found = self._kept.get(name)
            if found is None:
                info = self._zip.getinfo(name)
                if info.file_size != words * 8:
                    raise FormatError(f"{name} has {info.file_size} bytes", source=self.source)
                found = decode_piece(self._zip.read(info))
                self._kept[name] = found
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(name)
            return found

    def stream(self, row: Any, *, limit: int) -> WordStream:
        """The stream that `row` of the index describes, of at most `limit` words. Raises FormatError."""
        with format_errors(self.source):
            return WordStream(self, row, limit)

    def close(self) -> None:
        """Let go of the file; twice is allowed."""
        self._zip.close()
        self._file.close()


class WordStream:
    """A long array of words in a recording, read piece by piece."""

    def __init__(self, file: RecordingFile, row: Any, limit: int) -> None:
        self._file = file
        self._name, self.words, pieces = row["name"], row["words"], row["pieces"]
        if not isinstance(self._name, str) or not _whole(self.words, limit):
            raise FormatError("a stream without name or length", source=file.source)
        bounds, self._values = [0], []
        for piece in pieces:
            count, *value = piece
            if not _whole(count, limit) or not count or len(value) > 1:
                raise FormatError(f"{self._name}: a piece {piece!r}"[:200], source=file.source)
            if not value and count > PIECE:
                raise FormatError(f"{self._name}: a piece of {count} words", source=file.source)
            if value and not _whole(value[0], (1 << 64) - 1):
                raise FormatError(f"{self._name}: {value[0]!r} is no word"[:200], source=file.source)
            self._values.append(value[0] if value else None)
            bounds.append(bounds[-1] + count)
        if bounds[-1] != self.words:
            raise FormatError(f"{self._name}: pieces of {bounds[-1]} words", source=file.source)
        self._bounds = np.array(bounds, dtype=np.int64)

    def read(self, start: int, out: U64Array) -> int:
        """Fill `out` with the words from `start` on; the number filled, fewer only at the end."""
        count: int = min(len(out), max(0, self.words - start))
        if count <= 0:
            return 0
        index = int(np.searchsorted(self._bounds, start, side="right")) - 1
        done = 0
        while done < count:
            low = start + done - int(self._bounds[index])
            size = min(count - done, int(self._bounds[index + 1] - self._bounds[index]) - low)
            value = self._values[index]
            if value is not None:
                out[done : done + size] = np.uint64(value)
            else:
                whole = int(self._bounds[index + 1] - self._bounds[index])
                words = self._file.piece(f"{self._name}.{index}", whole)
                out[done : done + size] = words[low : low + size]
            done += size
            index += 1
        return count


def _whole(value: Any, limit: int) -> bool:
    """Whether it is a number from 0 to `limit`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit
