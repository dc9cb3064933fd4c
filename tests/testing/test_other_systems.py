"""fake_proc where the system is another one: modules, names and constants that it lacks are hidden, paths are its own.

No real Windows or macOS: a process of this system that is made to look like one, before pmcore is imported. What only
the real ones can show (their C library, their descriptors) is not shown by this; docs/fake-proc.md says so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: By Windows' rules: `ntpath`, and a `pathlib` of Windows paths; the real files are found by their names here.
WINDOWS = """
import builtins, ctypes, importlib.resources, io, ntpath, os, posixpath, subprocess, sys, tempfile, zipfile
import attr, attrs, numpy, tomllib
tempfile.gettempdir()

def here(call):
    def translated(path, *arguments, **options):
        if isinstance(path, (str, os.PathLike)):
            path = os.fspath(path).replace("\\\\", "/")
        return call(path, *arguments, **options)
    return translated

for name in ("open", "stat", "lstat", "listdir", "scandir", "mkdir", "unlink", "access", "readlink"):
    setattr(os, name, here(getattr(os, name)))
io.open = builtins.open = here(open)
hidden = ["fcntl", "resource", "termios", "pwd", "grp"]
lost = "pread preadv readv writev pwrite sysconf sysconf_names getuid geteuid getgid fork mkfifo mknod chown lchown"
lost += " chroot statvfs getxattr setxattr listxattr sendfile copy_file_range splice posix_spawn"
lost += " O_CLOEXEC O_NOFOLLOW O_DIRECTORY"
os.O_BINARY = 0x8000
os.name, os.sep, os.altsep, os.path = "nt", "\\\\", "/", ntpath
sys.modules["os.path"] = ntpath
sys.platform = "win32"
del sys.modules["pathlib"]
import pathlib
assert isinstance(pathlib.Path("x"), pathlib.WindowsPath)
"""
#: A Unix without /proc, and without what Linux alone has.
MACOS = """
import ctypes, os, subprocess, sys, tempfile
import attr, attrs, numpy
hidden = []
lost = "getxattr setxattr listxattr sendfile copy_file_range splice O_PATH sched_getaffinity preadv pwritev"
sys.platform = "darwin"
"""
#: Python in a browser: no processes, no such modules.
EMSCRIPTEN = """
import ctypes, os, subprocess, sys, tempfile
import attr, attrs, numpy
hidden = ["fcntl", "resource", "termios"]
lost = "fork posix_spawn pread preadv readv writev pwrite sendfile copy_file_range splice chroot"
lost += " getxattr setxattr listxattr"
sys.platform = "emscripten"
"""
HIDE = """
import mmap
for name in hidden:
    sys.modules[name] = None
for name in lost.split():
    if hasattr(os, name):
        delattr(os, name)
if hidden:
    for name in ("PROT_READ", "PROT_WRITE", "PROT_EXEC", "MAP_SHARED", "MAP_PRIVATE", "MAP_ANON", "MAP_ANONYMOUS"):
        if hasattr(mmap, name):
            delattr(mmap, name)
before = {name: dict(vars(sys.modules[name])) for name in ("os", "mmap", "io", "builtins")}
"""
#: All that a tool can do, by this system's habits; the same answers as on Linux.
TOOL = """
import pmcore
from pmcore.testing import fake_proc
machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB")
task = machine.spawn()
start = task.mmap(16 * 4096)
task.touch(start, 10 * 4096)
if os.name != "nt":
    sys.path.append({root!r})

def look():
    import fcntl, io, mmap, resource, struct, glob
    from pathlib import Path
    assert resource.getpagesize() == os.sysconf("SC_PAGE_SIZE") == mmap.PAGESIZE == 4096
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(start // 4096 * 8)
        words = struct.unpack("16Q", file.read(128))
        file.seek(start // 4096 * 8)
        assert numpy.array_equal(numpy.frombuffer(file.read(128), dtype=numpy.uint64), words)
    assert sum(word >> 63 for word in words) == 10
    wanted = os.O_RDONLY | getattr(os, "O_BINARY", 0) | os.O_CLOEXEC
    fd = os.open(os.path.join("/proc", str(os.getpid()), "pagemap"), wanted)
    assert struct.unpack("16Q", os.pread(fd, 128, start // 4096 * 8)) == words
    buffer = bytearray(128)
    assert os.preadv(fd, [buffer], start // 4096 * 8) == 128 and struct.unpack("16Q", buffer) == words
    os.lseek(fd, start // 4096 * 8, os.SEEK_SET)
    assert struct.unpack("2Q", os.read(fd, 16)) == words[:2]
    assert os.fstat(fd).st_size == 0
    for length, offset in ((8, 4), (7, 0)):
        try:
            os.pread(fd, length, offset)
            raise SystemExit("no EINVAL")
        except OSError as error:
            assert error.errno == 22
    import ctypes
    vec = (ctypes.c_uint64 * 24)()
    asked = (96, 0, start, start + 16 * 4096, 0, ctypes.addressof(vec), 8, 0, 0, 8, 0, 8)
    argument = bytearray(struct.pack("=12Q", *asked))
    assert fcntl.ioctl(fd, 0xC0606610, argument) == 1
    assert list(vec[:3]) == [start, start + 10 * 4096, 8]
    query = bytearray(struct.pack("=9Q4L2Q", 104, 16, 0, *[0] * 8, 0, 0, 0, 0))
    maps = open("/proc/self/maps", "rb", buffering=0)
    assert fcntl.ioctl(maps, 0xC0686611, query) == 0 and struct.unpack_from("=Q", query, 24) == (start,)
    maps.close()
    os.close(fd)
    place = Path("/proc")
    assert (place / "self" / "maps").read_text().startswith(f"{{start:x}}-")
    assert {{path.name for path in place.iterdir()}} >= {{"1", "self", "meminfo"}}
    assert (place / "1").is_dir() and (place / "meminfo").exists() and not (place / "99").exists()
    assert len(list(Path("/sys/kernel/mm/transparent_hugepage").glob("hugepages-*"))) == 8
    assert sorted(glob.glob("/proc/[0-9]*")) and os.listdir("/proc/1") == [e.name for e in os.scandir("/proc/1")]
    assert os.path.exists("/proc/kpageflags") and os.path.isdir("/proc/1") and os.access("/proc/1/maps", os.R_OK)
    assert os.stat("/proc/1/pagemap").st_mode & 0o777 == 0o400
    with open("/proc/self/clear_refs", "w") as file:
        file.write("1")
    flags = open("/proc/kpageflags", "rb")
    flags.seek((words[0] & (1 << 55) - 1) * 8)
    assert struct.unpack("Q", flags.read(8))[0] >> 12 & 1
    flags.close()
    try:
        open("/proc/nothing")
        raise SystemExit("no ENOENT")
    except FileNotFoundError:
        pass
    with tempfile.TemporaryFile() as file:
        file.write(b"untouched")

for _ in range(2):
    with fake_proc(machine, pid=task.pid):
        look()
        with fake_proc(machine):
            assert not os.path.exists("/proc/self")
for name, names in before.items():
    now = vars(sys.modules[name])
    changed = {{key for key in names if names[key] is not now.get(key)}} | now.keys() - names.keys()
    assert changed <= {{"__warningregistry__"}}, (name, changed)
assert all(sys.modules.get(name) is None for name in hidden)
"""
#: The reader of tests/validate, over cases that a tool is held against.
CASES = """
from pmcore.validate import FunctionTool, cases, validate
def look(pid):
    from tests.validate.careful import careful
    try:
        return careful(pid)
    finally:
        for name in [name for name in sys.modules if name.startswith("tests.validate.")]:
            del sys.modules[name]
report = validate(FunctionTool(look), cases(), kernels=["6.1", "6.18"])
wrong = [result for result in report.results if result.verdict not in ("right", "refused")]
assert not wrong and len(report.results) > 40, wrong
"""
ROOT = str(Path(__file__).parents[2])
SYSTEMS = {"windows": WINDOWS, "macos": MACOS, "emscripten": EMSCRIPTEN}


def ran(script):
    """The script in a process of its own, warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_tool_on_another_system(system):
    """Every call of the list, twice, nested; afterwards all is as it was."""
    ran(SYSTEMS[system] + HIDE + TOOL.format(root=ROOT))


@pytest.mark.parametrize("system", ["macos", "emscripten"])
def test_a_reader_of_all_cases_on_another_system(system):
    """A tool that imports fcntl and os as on Linux says what is true, case by case."""
    ran(SYSTEMS[system] + HIDE + f"sys.path.append({ROOT!r})\n" + CASES)
