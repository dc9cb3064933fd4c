"""Kernels from Debian's archive: meta-package to package to an unpacked directory, in a cache of our own.

The system's sources are used with lists and caches of our own, so that neither root is needed nor anything installed.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import attrs

HERE = Path(__file__).parent
#: Seconds after which the archive's lists are fetched anew.
_FRESH = 86400


class MatrixError(Exception):
    """What is missing, and what to do about it."""


@attrs.frozen(kw_only=True)
class KernelChoice:
    """A row of kernels.toml."""

    name: str
    meta: str
    modules: tuple[str, ...] = attrs.field(converter=tuple)
    append: str = ""


@attrs.frozen(kw_only=True)
class KernelTree:
    """An unpacked kernel package."""

    choice: KernelChoice
    #: "6.12.117+deb12-cloud-amd64"
    release: str
    #: Version of the package.
    package: str
    image: Path
    config: Path
    modules: Path


def choices() -> tuple[KernelChoice, ...]:
    """The rows of kernels.toml."""
    rows = tomllib.loads((HERE / "kernels.toml").read_text(encoding="utf-8"))["kernel"]
    return tuple(KernelChoice(**row) for row in rows)


def fetch(choice: KernelChoice, cache: Path) -> KernelTree:
    """The newest package of that meta-package, unpacked below `cache`. Raises MatrixError."""
    apt = Apt(cache / "apt")
    package = apt.depends_on(choice.meta)
    version = apt.candidate(package)
    place = cache / "trees" / f"{package}_{version}".replace(":", "%3a")
    if not (place / "done").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        archive = apt.download(package, place)
        run(["dpkg-deb", "-x", str(archive), str(place)])
        archive.unlink()
        (place / "done").touch()
    images = sorted((place / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise MatrixError(f"{package} holds {len(images)} kernels")
    release = images[0].name.removeprefix("vmlinuz-")
    return KernelTree(
        choice=choice,
        release=release,
        package=version,
        image=images[0],
        config=place / "boot" / f"config-{release}",
        modules=place / "lib" / "modules" / release,
    )


class Apt:
    """apt with lists and caches in a directory of ours."""

    def __init__(self, place: Path) -> None:
        self._options: list[str] = []
        for key, name in (("Dir::State::lists", "lists"), ("Dir::Cache", "cache")):
            (place / name / "partial").mkdir(parents=True, exist_ok=True)
            self._options += ["-o", f"{key}={place / name}"]
        self._options += ["-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1"]
        stamp = place / "updated"
        if not stamp.exists() or time.time() - stamp.stat().st_mtime > _FRESH:
            try:
                run(["apt-get", *self._options, "-qq", "update"])
            except MatrixError:
                if not stamp.exists():  # else yesterday's lists do
                    raise
            stamp.touch()

    def depends_on(self, meta: str) -> str:
        text = run(["apt-cache", *self._options, "depends", meta])
        found = re.search(r"Depends: (linux-image-\S+)", text)
        if found is None:
            raise MatrixError(f"the archive has no {meta}: check the sources of apt")
        return found[1]

    def candidate(self, package: str) -> str:
        found = re.search(r"Candidate: (\S+)", run(["apt-cache", *self._options, "policy", package]))
        if found is None:
            raise MatrixError(f"the archive has no {package}")
        return found[1]

    def download(self, package: str, place: Path) -> Path:
        run(["apt-get", *self._options, "-qq", "download", package], cwd=place)
        return next(place.glob("*.deb"))


def module(tree: KernelTree, name: str) -> bytes | None:
    """A module's file, decompressed; None where the kernel has it built in, or not at all."""
    wanted = name.replace("_", "-")
    for path in sorted(tree.modules.rglob("*.ko*")):
        if path.name.partition(".")[0].replace("_", "-") == wanted:
            data = path.read_bytes()
            return lzma.decompress(data) if path.suffix == ".xz" else data
    return None


def emulator() -> str:
    """Path of qemu-system-x86_64. Raises MatrixError."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        raise MatrixError("no qemu-system-x86_64: apt-get install --no-install-recommends qemu-system-x86")
    return found


def run(command: list[str], *, cwd: Path | None = None) -> str:
    """A command's output. Raises MatrixError with what it said."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MatrixError(f"no {command[0]}: the kernels come from Debian's archive") from None
    if done.returncode:
        raise MatrixError(f"{' '.join(command)}: {done.stderr.strip()[-400:]}")
    return done.stdout
