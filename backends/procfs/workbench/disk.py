"""A disk of our own: a file system on a loop device, made for a workbench and gone with it.

ext4 as its page cache is modelled: no large folios (the feature `encrypt` keeps them away), no journal that writes by
itself, nothing read ahead unless asked for. The image lies in memory where that can be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from pmcore.errors import BackendUnavailable

__all__ = ["Disk"]

#: Seconds that a read or write of the disk may be under way.
_PATIENCE = 10.0
_MEMORY = Path("/dev/shm")


class Disk:
    """A file system to come: `prepare` makes the directory that `mount` mounts it on; its image is a file elsewhere."""

    def __init__(self, length: int) -> None:
        for tool in ("mkfs.ext4", "mount"):
            if shutil.which(tool, path=_path()) is None:
                raise BackendUnavailable(f"no {tool}", remedy="install e2fsprogs and mount, or use no disk")
        self.length = length
        self.directory = self.image = Path()
        self._device: Path | None = None

    def prepare(self) -> None:
        """Make the directory, and name the image: whoever is to remove both can be told of them."""
        self.directory = Path(tempfile.mkdtemp(prefix="pmcore-disk-"))
        where = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        self.image = where / f"{self.directory.name}.img"

    def mount(self, readahead: int = 0) -> None:
        """Make the file system and mount it, with `readahead` bytes read ahead. Raises BackendUnavailable."""
        with self.image.open("xb") as image:
            image.truncate(self.length)
        options = "loop,noauto_da_alloc,noatime"
        features = "encrypt,^has_journal"
        for command in (
            ["mkfs.ext4", "-q", "-F", "-b", "4096", "-O", features, str(self.image)],
            ["mount", "-t", "ext4", "-o", options, str(self.image), str(self.directory)],
        ):
            done = subprocess.run(
                command, env={**os.environ, "PATH": _path()}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise BackendUnavailable(
                    f"{command[0]}: {done.stderr.strip()}", remedy="run as root, with loop devices and ext4"
                )
        number = self.directory.stat().st_dev
        self._device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        self.set_readahead(readahead)

    def set_readahead(self, length: int) -> None:
        """How many bytes files that are opened from now on read ahead."""
        assert self._device is not None
        (self._device / "bdi" / "read_ahead_kb").write_text(str(length >> 10))

    def settle(self) -> None:
        """Wait until nothing is being read or written. Raises BackendUnavailable if that never comes."""
        assert self._device is not None
        end = time.monotonic() + _PATIENCE
        while (self._device / "inflight").read_text().split() != ["0", "0"]:
            if time.monotonic() > end:
                raise BackendUnavailable(f"{self._device} is busy for {_PATIENCE} s")


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin:/sbin"
