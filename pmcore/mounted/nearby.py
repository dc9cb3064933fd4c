"""Words of a file that is read a word at a time: answered from blocks around them, as long as nothing changes."""

from __future__ import annotations

from pmcore.procview import OpenFile
from pmcore.procview.files import PagemapFile, WordsFile

__all__ = ["SHORT", "Words", "words_of"]

#: Bytes up to which a read is a short one.
SHORT = 64
#: Bytes of a block: one costs about two single words of kpageflags, and seven of pagemap.
_BLOCK = 1 << 16
#: Blocks kept of one open file: those of 8 GiB of frames.
_MOST = 256


class Words:
    """Short reads of one open file. `always`: places far from each other are read in blocks, too."""

    def __init__(self, file: OpenFile, *, always: bool) -> None:
        self._file, self._always = file, always
        self._blocks: dict[int, bytes] = {}
        #: `changes` when the blocks were read, and where the last word was that was in none.
        self._changes, self._last = -1, -1

    def read(self, offset: int, size: int, changes: int) -> bytes:
        """`size` bytes at `offset`; `changes` is another number than before where the file may say something else."""
        if changes != self._changes:
            self._blocks.clear()
            self._changes, self._last = changes, -1
        first = offset & -_BLOCK
        block = self._blocks.get(first)
        if block is None:
            block = self._block(first, offset)
        found = block[offset - first : offset - first + size]
        # Words beside the end of a block, and at the end of the file.
        return found if len(found) == size else self._file.read(offset, size)

    def _block(self, first: int, offset: int) -> bytes:
        """The block at `first`; empty for the first word, and for one that is far from the last one."""
        last, self._last = self._last, offset
        if last < 0 or not (self._always or abs(offset - last) < _BLOCK):
            return b""
        if len(self._blocks) == _MOST:
            self._blocks.clear()
        block = self._blocks[first] = self._file.read(first, _BLOCK)
        return block


def words_of(file: OpenFile | None) -> Words | None:
    """The words of an open file that has words, and shows the same ones until something changes."""
    if isinstance(file, WordsFile):
        return Words(file, always=True)
    return Words(file, always=False) if isinstance(file, PagemapFile) else None
