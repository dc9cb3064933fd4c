"""The kernel's own tools, unchanged: page-types and thpmaps out of Debian's kernel source.

    python tests/tools/build.py            prints where they are, as NAME=PATH lines that a shell can read

They are not part of this project. The source is that of an installed package (/usr/src) or is fetched from the
archive; what is built is kept below the user's cache directory. Needs apt, dpkg and a C compiler. Exits with 2 where it
cannot be done, and says why.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # at the end: the installed project comes first

from tests.kernels.archive import Apt, MatrixError, run  # noqa: E402

SERIES = "6.12"
PACKAGE = f"linux-source-{SERIES}"
INSTALLED = Path("/usr/src")
#: Environment variables that name the tools, with their files in the cache.
TOOLS = {"PMCORE_PAGE_TYPES": "page-types", "PMCORE_THPMAPS": "thpmaps"}
#: What page-types is made of, below the source's directory.
_PARTS = re.compile(
    r"tools/mm/(page-types\.c|thpmaps)|tools/lib/api/.*\.[ch]|tools/lib/str_error_r\.c|tools/include/linux/.*\.h"
    r"|tools/include/(uapi/)?asm(-generic)?/.*\.h|include/uapi/linux/(magic|kernel-page-flags)\.h"
)
_COMPILED = ("mm/page-types.c", "lib/api/fs/fs.c", "lib/api/fs/tracing_path.c", "lib/api/debug.c")
_FLAGS = ("-O2", "-w", "-D_GNU_SOURCE", "-pthread")
_INCLUDED = ("lib", "lib/api", "include")


def cache() -> Path:
    """Where the tools are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pmcore-tools"


def find(variable: str) -> str | None:
    """The tool that a variable names, or that was built before; None where there is none."""
    named = os.environ.get(variable) or shutil.which(TOOLS[variable])
    built = cache() / SERIES / TOOLS[variable]
    return named or (str(built) if built.exists() else None)


def build(place: Path) -> None:
    """Put the tools into `place`. Raises MatrixError, OSError."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MatrixError("no C compiler: apt-get install gcc libc6-dev")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as work:
        source, made = Path(work) / "source", Path(work) / "made"
        made.mkdir()
        unpack(_archive(Path(work)), source)
        tools = source / "tools"
        included = [f"-I{tools / name}" for name in _INCLUDED]
        compiled = [str(tools / name) for name in (*_COMPILED, "lib/str_error_r.c")]
        run([compiler, *_FLAGS, *included, "-o", str(made / "page-types"), *compiled])
        shutil.copy(tools / "mm" / "thpmaps", made / "thpmaps")
        (made / "thpmaps").chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)


def _archive(work: Path) -> Path:
    """The source as Debian packs it."""
    installed = sorted(INSTALLED.glob(f"{PACKAGE}.tar.*"))
    if installed:
        return installed[0]
    apt = Apt(cache() / "apt")
    package = apt.download(PACKAGE, work)
    run(["dpkg-deb", "-x", str(package), str(work / "package")])
    package.unlink()
    return next((work / "package" / "usr" / "src").glob(f"{PACKAGE}.tar.*"))


def unpack(archive: Path, place: Path) -> None:
    """The few files that are needed out of the kernel's source."""
    with tarfile.open(archive, "r|*") as files:
        for file in files:
            name = file.name.partition("/")[2]
            # They lie close together, before usr and virt: the rest need not be decompressed.
            if name.startswith(("usr/", "virt/")):
                break
            data = files.extractfile(file) if file.isreg() and _PARTS.fullmatch(name) else None
            if data is not None:
                target = place / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data.read())
    if not (place / "tools/mm/page-types.c").exists():
        raise MatrixError(f"{archive} has no tools/mm/page-types.c")


def main() -> int:
    """Build what is not there yet, and print where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", action="store_true", help="also where it was built before")
    again = parser.parse_args().again
    place = cache() / SERIES
    try:
        if again or not all((place / name).exists() for name in TOOLS.values()):
            build(place)
    except (MatrixError, OSError, tarfile.TarError, StopIteration) as error:
        print(f"tools: {error}", file=sys.stderr)
        return 2
    for variable, name in TOOLS.items():
        print(f"{variable}={place / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
