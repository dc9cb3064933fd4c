"""A recording as a backend: what another kernel showed at another time, looked at as if it were here.

`open_recording` is what `pmcore.open("recording", path)` calls. Recordings are made by `pmcore record`, or by
`pmcore.recording.record`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmcore.backends.recording.kernel import RecordedKernel

__all__ = ["open_recording"]


def open_recording(path: str | Path) -> RecordedKernel:
    """The recorded kernel of the file `path`. Raises FormatError for a file that is none, SyscallError for no file."""
    from pmcore.backends.recording.kernel import RecordedKernel

    return RecordedKernel(path)
