"""A recording as a backend: what another kernel showed at another time, looked at as if it were here.

`open_recording` is what `pmcore.open("recording", path)` calls. Recordings are made by `pmcore record`, or by
`pmcore.recording.record`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmcore.protocols import Kernel

__all__ = ["open_recording"]


def open_recording(path: str | Path) -> Kernel:
    """The recorded kernel of the file `path`, or of the directory that `pmcore dump` wrote.

    Raises FormatError for what is neither, SyscallError where there is nothing.
    """
    if Path(path).is_dir():
        from pmcore.backends.recording.directory import DumpedKernel

        return DumpedKernel(Path(path))
    from pmcore.backends.recording.kernel import RecordedKernel

    return RecordedKernel(path)
