"""Recordings: what a kernel showed, in one file that can be carried away and looked at anywhere.

`record` makes one from any backend; `pmcore.open("recording", path)` opens it. The format is described in
docs/recordings.md.
"""

from pmcore.recording.capture import Captured, record
from pmcore.recording.container import RecordingFile, RecordingWriter, WordStream

__all__ = ["Captured", "RecordingFile", "RecordingWriter", "WordStream", "record"]
