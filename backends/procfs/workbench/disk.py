"""A disk of our own: a file system on compressed memory (zram), made for a workbench and gone with it.

ext4 as its page cache is modelled: no large folios (the feature `encrypt` keeps them away), no journal that writes by
itself, nothing read ahead unless asked for. zram has read or written all by the time that it was asked to; where there
is none, a loop device over a file does, and what is read ahead in a second piece may come late.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from pmcore.errors import ArgumentError, BackendUnavailable

__all__ = ["Disk"]

#: Seconds that a read or write of the disk may be under way.
_PATIENCE = 10.0
_MEMORY = Path("/dev/shm")
_ZRAM = Path("/sys/class/zram-control")
_KINDS = ("compressed", "disk")


class Disk:
    """A file system to come: `prepare` makes the directory that `mount` mounts it on, and what its blocks lie on."""

    def __init__(self, length: int, kind: str = "") -> None:
        """`kind`: "compressed" (zram), "disk" (a loop device); "" the first of both that this machine has."""
        if kind not in ("", *_KINDS):
            raise ArgumentError(f"disk_kind={kind!r}", remedy=f"known: {', '.join(_KINDS)}")
        for tool in ("mkfs.ext4", "mount"):
            if shutil.which(tool, path=_path()) is None:
                raise BackendUnavailable(f"no {tool}", remedy="install e2fsprogs and mount, or use no disk")
        self.length, self._wanted = length, kind
        self.directory = self.image = Path()
        #: Number of its zram device; None for an image on a loop device.
        self.zram: int | None = None
        self._device: Path | None = None

    @property
    def kind(self) -> str:
        """What it became: "compressed", which has done at once all that it was asked to, or "disk"."""
        return _KINDS[self.zram is None]

    def prepare(self) -> None:
        """Make the directory, and name the image or device: whoever is to remove both can be told of them."""
        if self._wanted != "disk":
            with suppress(OSError):
                self.zram = int((_ZRAM / "hot_add").read_text())
                self.image = Path(f"/dev/zram{self.zram}")
            if self._wanted and self.zram is None:
                raise BackendUnavailable(
                    "no zram device can be had", remedy="run as root, on a kernel with zram"
                )
        self.directory = Path(tempfile.mkdtemp(prefix="pmcore-disk-"))
        if self.zram is None:
            where = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
            self.image = where / f"{self.directory.name}.img"

    def mount(self, readahead: int = 0) -> None:
        """Make the file system and mount it, with `readahead` bytes read ahead. Raises BackendUnavailable."""
        options = "noauto_da_alloc,noatime"
        if self.zram is not None:
            Path(f"/sys/block/zram{self.zram}/disksize").write_text(str(self.length))
        else:
            with self.image.open("xb") as image:
                image.truncate(self.length)
            options = f"loop,{options}"
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
                    f"{command[0]}: {done.stderr.strip()}",
                    remedy="run as root, with ext4 and zram or loop devices",
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
