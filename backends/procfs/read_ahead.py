"""Reading kpageflags while the rest of the program is still being loaded.

Nearly all the time of counting frames is the kernel's, and a processor that waits for Python to import things can
spend it there. Needs nothing that takes time to import itself.
"""

from __future__ import annotations

import os
import threading

__all__ = ["CHUNK", "ReadAhead"]

#: Bytes handed out at a time; the survey asks for as many.
CHUNK = 1 << 20
#: Bytes read in one call: rarely enough that waiting for the interpreter's lock in between does not matter.
_READ = 4 << 20
#: Bytes kept at the most.
_MOST = 64 << 20


class ReadAhead:
    """Begins at once, from the start of the file. What was read is handed out once; then reading has stopped."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._chunks: dict[int, memoryview] = {}
        self._stop = False
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # whoever asks for the frames is told why
        try:
            for place in range(0, _MOST, _READ):
                buffer = bytearray(_READ)
                if self._stop or os.preadv(fd, [buffer], place) != _READ:
                    return
                for first in range(0, _READ, CHUNK):
                    self._chunks[place + first] = memoryview(buffer)[first : first + CHUNK]
        except OSError:
            return
        finally:
            os.close(fd)

    def take(self, offset: int, length: int) -> memoryview | None:
        """The `length` bytes from `offset`, if they were read and not yet handed out; stops the reading."""
        self._stop = True
        return self._chunks.pop(offset, None) if length == CHUNK else None
