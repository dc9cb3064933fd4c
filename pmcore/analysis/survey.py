"""How many frames have which flags: the summary of page-types, over all frames in parallel, or over any rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.analysis.bits import BitFilter
from pmcore.analysis.rows import FrameRows, RowOptions
from pmcore.arrays import U64Array
from pmcore.errors import ArgumentError
from pmcore.pageflags import count_words, merge_counts
from pmcore.protocols import FrameFile, Kernel

__all__ = ["Survey", "Tally", "summarise", "survey"]

#: Frames that one thread reads and counts at a time: 1 MiB of words, so memory does not grow with the machine.
_CHUNK = 1 << 17


@attrs.frozen(kw_only=True, eq=False)
class Survey:
    """Distinct flag words, as shown, ascending, and the number of pages with each."""

    flags: U64Array
    pages: NDArray[np.int64]
    page_size: int

    @property
    def total_pages(self) -> int:
        """All pages counted."""
        return int(self.pages.sum())

    @property
    def total_bytes(self) -> int:
        """Their size."""
        return self.total_pages * self.page_size

    def pages_with(self, flag: int) -> int:
        """Pages that show all bits of `flag`."""
        return int(self.pages[(self.flags & np.uint64(flag)) == np.uint64(flag)].sum())


def survey(
    kernel: Kernel,
    *,
    raw: bool = False,
    filters: Sequence[BitFilter] = (),
    ranges: Iterable[tuple[int, int | None]] = ((0, None),),
    cgroup: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Survey:
    """Count the machine's frames by their flags.

    `raw` shows all bits as page-types --raw does, the default hides those for kernel developers. `ranges` are frame
    numbers, end exclusive. `cgroup` counts only frames charged to that inode. `progress(done, total)` is called from
    worker threads after each chunk. `threads` defaults to what the backend says is useful.
    """
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads={threads}: at least one is needed")
    options = RowOptions(raw=raw, filters=tuple(filters), cgroup=cgroup)
    count = kernel.frame_count()
    chunks = [
        (first, min(first + _CHUNK, stop))
        for start, end in ranges
        for stop in (count if end is None else min(end, count),)
        for first in range(start, stop, _CHUNK)
    ]
    total = sum(stop - first for first, stop in chunks)
    workers = min(threads or kernel.concurrency, max(len(chunks), 1))
    queue, lock = iter(chunks), threading.Lock()
    finished = 0

    def work() -> list[tuple[U64Array, NDArray[np.int64]]]:
        nonlocal finished
        buffer = np.empty(_CHUNK, dtype=np.uint64)
        parts: list[tuple[U64Array, NDArray[np.int64]]] = []
        while True:
            with lock:
                chunk = next(queue, None)
            if chunk is None:
                return [merge_counts(parts)]
            first, stop = chunk
            words = buffer[: stop - first]
            words = words[: kernel.read_frames(FrameFile.KPAGEFLAGS, first, words)]
            if cgroup is not None:
                owner = np.zeros(len(words), dtype=np.uint64)
                kernel.read_frames(FrameFile.KPAGECGROUP, first, owner)
                words = words[owner == np.uint64(cgroup)]
            parts.append(count_words(words))
            if len(parts) > 64:
                parts = [merge_counts(parts)]
            if progress is not None:
                with lock:
                    finished += stop - first
                    progress(finished, total)

    counted: list[tuple[U64Array, NDArray[np.int64]]] = []
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            counted.extend(work())
        except BaseException as error:
            failures.append(error)

    helpers = [threading.Thread(target=guarded) for _ in range(workers - 1)]
    for helper in helpers:
        helper.start()
    guarded()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    words, pages = merge_counts(counted)
    return _shown(words, pages, options, kernel.geometry.page_size)


class Tally:
    """A survey in the making: words are counted as they come, and memory does not grow with them."""

    def __init__(self) -> None:
        self._parts = [merge_counts([])]

    def add(self, words: U64Array) -> None:
        """Count `words`, one a page, as they are to be shown."""
        self._parts.append(count_words(words))
        if len(self._parts) > 64:
            self._parts = [merge_counts(self._parts)]

    def survey(self, *, page_size: int) -> Survey:
        """What was counted so far."""
        words, pages = merge_counts(self._parts)
        return Survey(flags=words, pages=pages, page_size=page_size)


def summarise(rows: Iterable[FrameRows], *, page_size: int) -> Survey:
    """The survey of any rows (of a process, a file, ...)."""
    tally = Tally()
    for batch in rows:
        tally.add(batch.flags)
    return tally.survey(page_size=page_size)


def _shown(words: U64Array, pages: NDArray[np.int64], options: RowOptions, page_size: int) -> Survey:
    """What the raw words are shown as, the filters applied; different words can look the same."""
    shown = options.shown(words)
    passed = options.passes(shown)
    flags, counts = merge_counts([(shown[passed], pages[passed])])
    return Survey(flags=flags, pages=counts, page_size=page_size)
