"""What imports where: the core and the decoding need no Linux."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Who may all the same, with the wall's own exceptions in pyproject.toml: on the platforms where it is.
ALLOWED = {"pmcore/testing/fakeproc/memory.py": {"ctypes"}}
#: Beside procfs the one room that works on Linux alone.
MOUNTED = ROOT / "pmcore" / "mounted"
UNIX_ONLY = {"fcntl", "ctypes", "mmap", "resource", "pwd", "grp", "termios", "select", "signal"}

_WITHOUT = """
import builtins, sys
real = builtins.__import__
def guarded(name, *args, **kwargs):
    caller = (args[0] or {}).get("__name__", "") if args else ""
    if name.partition(".")[0] in {"fcntl", "resource", "pwd", "termios"} and caller.startswith("pmcore"):
        raise ImportError(name)
    return real(name, *args, **kwargs)
builtins.__import__ = guarded
sys.platform = "win32"
import pmcore
from pmcore.pagemap import PagemapEntry
from pmcore import analysis, program, scan, testing
import pmcore.analysis.survey, pmcore.analysis.huge, pmcore.testing.snapshot, pmcore.program.run, pmcore.backends.procfs
assert PagemapEntry(1 << 63 | 5).pfn == 5
try:
    pmcore.open("procfs")
except pmcore.PmcoreError as error:
    assert "Linux" in str(error) and error.remedy
else:
    raise SystemExit("procfs opened on win32")
try:
    import pmcore.mounted
except pmcore.PmcoreError as error:
    assert "Linux" in str(error) and error.remedy
else:
    raise SystemExit("machines are mounted on win32")
import pmcore.procview.dump
"""


def test_core_works_where_there_is_no_linux():
    subprocess.run([sys.executable, "-c", _WITHOUT], check=True)


def _elsewhere(folder):
    return [path for path in (ROOT / folder).rglob("*.py") if MOUNTED not in path.parents]


def test_only_procfs_imports_what_only_unix_has():
    found = []
    for folder in ("pmcore", "spec", "backends/recording"):
        for path in _elsewhere(folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                barred = UNIX_ONLY - ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
                found += [f"{path}: {name}" for name in names if name.partition(".")[0] in barred]
    assert found == []


def test_nothing_but_procfs_reads_proc():
    for folder in ("pmcore", "spec", "backends/recording"):
        for path in _elsewhere(folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
                    raise AssertionError(f"{path}:{node.lineno} opens a file")


def test_every_core_module_stands_behind_the_walls():
    """A new module of the core is in each contract that is about the core."""
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    modules = {
        f"pmcore.{path.stem}"
        for path in (ROOT / "pmcore").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and not path.stem.startswith("_")
    }
    missing = {contract["name"]: modules - set(contract.get("source_modules", ())) for contract in contracts}
    assert missing["the core knows no backend"] == set()
    assert missing["only procfs and mounted touch the operating system"] == {"pmcore.mounted"}
