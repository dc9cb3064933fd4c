"""The guest's first file system: an archive that the kernel unpacks, of this Python, numpy and the project.

Two archives, one after the other: the kernel unpacks both. The first (Python, numpy, ...) is kept between runs, the
second (kernel modules, the project, what is to be done) is made anew.
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import json
import os
import py_compile
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tests.kernels.archive import HERE, KernelTree, MatrixError, module

#: Of the standard library, what no guest needs.
_LEFT_OUT = (
    *("site-packages", "test", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "distutils"),
    *("pydoc_data", "config-*", "__pycache__", "_test*.so", "_ctypes_test*.so", "_tkinter*.so"),
)
#: Distributions that the project needs in a guest.
_DISTRIBUTIONS = (
    "numpy",
    "attrs",
    "click",
    "rich",
    "pygments",
    "markdown-it-py",
    "mdurl",
)
_NUMPY_LEFT_OUT = (
    "tests",
    "f2py",
    "include",
    "*.pyi",
    "lib*.a",
    "__pycache__",
    "_pyinstaller",
    "distutils",
    "doc",
)
#: Of the system, what makes and mounts the file system of a workbench's disk; without them a guest has no disk.
_TOOLS = ("mkfs.ext4", "mount")
_TOOL_SETTINGS = Path("/etc/mke2fs.conf")
PREFIX = "/python"
SITE = "/site"


class Cpio:
    """A writer of the archive format that the kernel unpacks ("newc")."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._made: set[str] = set()
        self._inode = 0

    def _entry(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._out.write(head + raw + b"\0" * (-(len(head) + len(raw)) % 4))
        self._out.write(data + b"\0" * (-len(data) % 4))

    def directory(self, name: str) -> None:
        """A directory, and those above it."""
        name = name.strip("/")
        if not name or name in self._made:
            return
        self.directory(name.rpartition("/")[0])
        self._made.add(name)
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file."""
        name = name.strip("/")
        if name in self._made:
            return
        self.directory(name.rpartition("/")[0])
        self._made.add(name)
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        name = name.strip("/")
        self.directory(name.rpartition("/")[0])
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """A device node; no privilege is needed to write one here."""
        self.directory(name.rpartition("/")[0])
        self._entry(name.strip("/"), stat.S_IFCHR | 0o600, b"", (major, minor))

    def tree(self, root: Path, below: str) -> None:
        """All files of a directory."""
        for path in sorted(root.rglob("*")):
            if path.is_file():
                self.file(f"{below}/{path.relative_to(root)}", path.read_bytes(), path.stat().st_mode & 0o777)

    def close(self) -> None:
        """The end mark."""
        self._entry("TRAILER!!!", 0, b"")
        self._out.write(b"\0" * (-self._out.tell() % 512))


def base(cache: Path) -> Path:
    """The first archive; made where the cache has none of this Python and these distributions."""
    versions = {name: importlib.metadata.version(name) for name in _wanted()}
    tools = [name for name in _TOOLS if _tool(name)]
    said = json.dumps([sys.version, versions, tools, Path(__file__).read_text(encoding="utf-8")])
    place = cache / f"base-{hashlib.sha256(said.encode()).hexdigest()[:16]}.cpio"
    if place.exists():
        return place
    with tempfile.TemporaryDirectory(dir=cache) as work:
        stage = Path(work)
        lib = stage / "lib"
        shutil.copytree(sysconfig.get_path("stdlib"), lib, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        site = stage / "site"
        site.mkdir()
        for name in versions:
            _copy_distribution(name, site)
        _compile(lib, site)
        part = stage / "cpio"
        with part.open("wb") as out:
            cpio = Cpio(out)
            for name in ("proc", "sys", "dev", "tmp", "run"):
                cpio.directory(name)
            cpio.character_device("dev/console", 5, 1)
            python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            cpio.file(f"{PREFIX}/bin/{version}", python.read_bytes(), 0o755)
            cpio.tree(lib, f"{PREFIX}/lib/{version}")
            cpio.tree(site, SITE)
            tools = {name: Path(found).resolve() for name in _TOOLS if (found := _tool(name))}
            for name, tool in tools.items():
                cpio.file(f"bin/{name}", tool.read_bytes(), 0o755)
            if _TOOL_SETTINGS.is_file():
                cpio.file(str(_TOOL_SETTINGS), _TOOL_SETTINGS.read_bytes())
            objects = [python, *tools.values(), *lib.rglob("*.so"), *site.rglob("*.so*")]
            for library in _libraries(objects, stage):
                cpio.file(str(library), library.read_bytes(), 0o755)
            cpio.close()
        part.rename(place)
    return place


def overlay(
    tree: KernelTree, job: dict[str, Any], place: Path, *, package: Path, extra: Iterable[Path] = ()
) -> None:
    """The second archive, written to `place`: the modules, the project as in `package`, the job and its files."""
    with tempfile.TemporaryDirectory() as work, place.open("wb") as out:
        site = Path(work) / "site"
        shutil.copytree(package, site / "pmcore", ignore=shutil.ignore_patterns("__pycache__"))
        metadata = site / "pmcore-0.dist-info"
        metadata.mkdir()
        dist = importlib.metadata.distribution("pmcore")
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pmcore\nVersion: {dist.version}\n")
        (metadata / "entry_points.txt").write_text(dist.read_text("entry_points.txt") or "")
        _compile(site)
        cpio = Cpio(out)
        loaded = []
        for name in tree.choice.modules:
            data = module(tree, name)
            if data is not None:
                cpio.file(f"modules/{name}.ko", data)
                loaded.append(name)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        script = (HERE / "guest.py").read_text(encoding="utf-8")
        cpio.file("init", f"#!{PREFIX}/bin/{version} -IBS\n{script}".encode(), 0o755)
        command = (
            f"#!{PREFIX}/bin/{version} -BP\nimport sys\nfrom pmcore.cli.entry import main\nsys.exit(main())\n"
        )
        cpio.file("bin/pmcore", command.encode(), 0o755)
        cpio.file("job.json", json.dumps({**job, "modules": loaded, "site": SITE}).encode())
        cpio.tree(site, SITE)
        for path in extra:
            cpio.file(f"files/{path.name}", path.read_bytes())
        cpio.close()


def _wanted() -> Iterator[str]:
    for name in _DISTRIBUTIONS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in ("pygments", "markdown-it-py", "mdurl"):
                continue  # needed by some versions of others
            raise MatrixError(f"{name} is not installed here: pip install 'pmcore[cli,test]'") from None
        yield name


def _copy_distribution(name: str, site: Path) -> None:
    dist = importlib.metadata.distribution(name)
    ignored = shutil.ignore_patterns(*_NUMPY_LEFT_OUT)(
        "", [part for f in dist.files or () for part in f.parts]
    )
    for file in dist.files or ():
        source = Path(str(dist.locate_file(file)))
        if (
            ".." in file.parts
            or (ignored & set(file.parts) and file.parts[0] == "numpy")
            or not source.is_file()
        ):
            continue
        if file.suffix == ".pyc":
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _compile(*places: Path) -> None:
    """Compiled beforehand: an emulated processor is slow."""
    for place in places:
        compileall.compile_dir(
            place, quiet=2, force=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _libraries(objects: Iterable[Path], stage: Path) -> list[Path]:
    """The shared libraries of the system that these need, the loader included."""
    found: dict[str, Path] = {}
    for path in objects:
        text = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
        for name in re.findall(r"(/\S+)", text):
            library = Path(name)
            if library.is_file() and not os.path.realpath(name).startswith(str(stage)):
                found[name] = library
    return list(found.values())
