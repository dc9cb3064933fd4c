"""pmcore exec: commands inside a machine see its files, with the kernel's errors; nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pmcore
from pmcore.procview import Opener, ProcView
from pmcore.program import Program, run, save_program
from pmcore.program import steps as s
from pmcore.recording import record
from pmcore.scan import ScanRequest
from pmcore.uapi import PageCategory

from .conftest import PMCORE, PROGRAM, ended, mounts, wait_for

PAGE, AREA = 4096, 0x1000_0000_0000


@pytest.fixture
def machine():
    """The machine that the command line makes of the program."""
    machine = pmcore.open("sim", memory="64 MiB", swap="16 MiB")
    run(PROGRAM, machine)
    return machine


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 128 + 9),
        (["sh", "-c", "kill -TERM $$"], 128 + 15),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_the_exit_code_is_the_commands(inside, command, code):
    """As a shell gives it."""
    done = inside(*command)
    assert done.returncode == code, done.stderr


READ_ALL = """
import os, sys
for path in sys.argv[1:]:
    fd, text = os.open(path, os.O_RDONLY), b""
    while piece := os.pread(fd, 1 << 20, len(text)):
        text += piece
    print(path, text.hex())
"""


def test_files_are_the_machines(python, machine):
    """Every file of the tree, byte for byte; nothing of the real machine's memory."""
    view = ProcView(machine)
    paths = [f"/proc/{pid}/{name}" for pid in (1, 2) for name in view.node("/proc/1").names()]
    paths += [f"/proc/{name}" for name in view.node("/proc").names() if not name.isdigit()]
    paths += [
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
    ]
    paths = [path for path in paths if path.rpartition("/")[2] not in ("pagemap", "clear_refs")]
    for line in python(READ_ALL, *paths).splitlines():
        path, _, text = line.partition(" ")
        file, expected = view.open(path), b""
        while piece := file.read(len(expected), 1 << 20):
            expected += piece
        assert bytes.fromhex(text) == expected, path
    listing = python("import os; print(*os.listdir('/proc'), *os.listdir('/sys/kernel/mm'))").split()
    assert {"1", "2", "self", "meminfo", "transparent_hugepage", "ksm"} <= set(listing)
    assert {"vmstat", "pagetypeinfo"} <= set(listing)
    assert not {"zoneinfo", "kcore", "damon", "3", str(os.getpid())} & set(listing)


ERRORS = """
import errno, fcntl, os
def refused(call, *arguments):
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
fd = os.open("/proc/1/pagemap", os.O_RDONLY)
flags = os.open("/proc/kpageflags", os.O_RDONLY)
clear = os.open("/proc/1/clear_refs", os.O_WRONLY)
at = 0x1000_0000_0000 // 4096 * 8
print(refused(os.pread, fd, 8, 4), refused(os.pread, fd, 7, 0), len(os.pread(fd, 160, at)), os.pread(fd, 8, 1 << 60))
print(refused(os.pread, flags, 8, 4), len(os.pread(flags, 1 << 22, 0)), os.pread(flags, 8, 1 << 40))
print(refused(os.write, clear, b"9"), refused(os.write, clear, b"1"), refused(os.read, clear, 1))
print(refused(os.open, "/proc/9/maps", 0), refused(os.open, "/sys/kernel/mm/lru_gen/enabled", 0))
print(refused(fcntl.ioctl, fd, 0x5401, bytearray(96)), refused(fcntl.ioctl, flags, 0xC0606610, bytearray(96)))
print(os.fstat(fd).st_size, oct(os.stat("/proc/1/pagemap").st_mode), os.stat("/proc/self/comm").st_mode > 0)
print(os.access("/proc/kpageflags", os.R_OK))
"""


@pytest.mark.rule("FS-001", "FS-002", "FS-006", "FS-007")
def test_errors_are_the_kernels(python):
    """EINVAL, ENOENT, EBADF, ENOTTY, and ends of files."""
    assert python(ERRORS).splitlines() == [
        "EINVAL EINVAL 160 b''",
        "EINVAL 131072 b''",
        "EINVAL 1 EBADF",
        "ENOENT ENOENT",
        "EINVAL ENOTTY",
        "0 0o100400 True",
        "True",
    ]


@pytest.mark.rule("AC-003", "AC-004", "FS-003")
def test_privilege(python, machine):
    """Somebody unprivileged sees no frame numbers, and not the frame files."""
    look = "import os; print(os.pread(os.open('/proc/1/pagemap', 0), 160, 0x1000_0000_0000 // 512).hex())"
    forbidden = "import os\ntry: os.open('/proc/kpageflags', 0)\nexcept OSError as e: print(e.errno)"
    whole, stranger = ProcView(machine), ProcView(machine, owner=65534)
    offset = AREA // 512
    shown = whole.open("/proc/1/pagemap").read(offset, 160).hex()
    hidden = stranger.open("/proc/1/pagemap", 0, Opener.user(65534)).read(offset, 160).hex()
    assert shown != hidden
    assert python(look).strip() == shown
    assert python(look, options=("--privilege", "none")).strip() == hidden
    assert python(forbidden, options=("--privilege", "none")).strip() == "13"


SCAN = """
import ctypes, fcntl, os, struct, sys
start, pages, vec_len = (int(word) for word in sys.argv[1:])
fd = os.open("/proc/1/pagemap", os.O_RDONLY)
vec = ctypes.create_string_buffer(24 * vec_len)
argument = bytearray(struct.pack("=12Q", 96, 0, start, start + pages * 4096, 0, ctypes.addressof(vec), vec_len, 0,
                                 0, 8, 0, 0x7F))
found = fcntl.ioctl(fd, 0xC0606610, argument)
print(found, struct.unpack_from("=Q", argument, 32)[0], vec.raw[: 24 * found].hex())
bad = struct.pack("=12Q", 96, 0, start, start + pages * 4096, 0, 4096, vec_len, 0, 0, 8, 0, 0x7F)
try:
    fcntl.ioctl(fd, 0xC0606610, bytearray(bad))
except OSError as error:
    print(error.errno)
"""
QUERY = """
import ctypes, fcntl, os, struct
fd = os.open("/proc/1/maps", os.O_RDONLY)
name = ctypes.create_string_buffer(100)
argument = bytearray(struct.pack("=9Q4L2Q", 104, 0x10, 0, *[0] * 8, 100, 0, ctypes.addressof(name), 0))
print(fcntl.ioctl(fd, 0xC0686611, argument), struct.unpack_from("=2Q", argument, 24))
"""


@pytest.mark.rule("FS-009")
def test_ioctls_reach_the_callers_memory(python, machine):
    """PAGEMAP_SCAN fills `vec` where the caller has it; EFAULT where there is nothing; PROCMAP_QUERY answers."""
    process = machine.process(1)
    lines = python(SCAN, str(AREA), "64", "8").splitlines()
    request = ScanRequest(
        start=AREA, end=AREA + 64 * PAGE, vec_len=8, category_mask=int(PageCategory.PRESENT), return_mask=0x7F
    )
    expected = process.pagemap_scan(request)
    assert lines == [
        f"{len(expected.regions)} {expected.walk_end} {expected.regions.tobytes().hex()}",
        "14",
    ]
    assert python(QUERY).strip() == f"0 ({AREA}, {AREA + 64 * PAGE})"


def test_processes_inside_are_not_the_machines(python):
    """The command's own number is none of the machine's, and /proc knows it by that number too."""
    script = "import os; me = os.getpid(); print(me > 1000, *(os.path.isdir(f'/proc/{p}/fd') for p in (me, 'self')))"
    assert python(script).split() == ["True"] * 3
    other = "import os; print(os.readlink('/proc/self'), os.path.exists('/proc/self/fd'))"
    assert python(other, options=("--self", "2")).split() == ["2", "False"]


def test_a_program_step_by_step(inside):
    """The machine changes while it is looked at; a number that is none is EINVAL."""
    script = """
        ls -d /proc/[0-9]* | wc -l
        echo 3 > /proc/pmcore/step
        ls -d /proc/[0-9]* | wc -l
        grep -c done /proc/pmcore/step
        echo x > /proc/pmcore/step && echo taken
        echo all > /proc/pmcore/step
        grep -c done /proc/pmcore/step
    """
    done = inside("sh", "-c", script, options=("--step",))
    assert done.stdout.split() == ["0", "2", "3", "5"], done.stderr
    assert inside("ls", "/proc/pmcore").returncode == 2


@pytest.mark.rule("AC-005", "AC-012")
def test_clear_refs_changes_the_machine(inside):
    """Soft-dirty bits are cleared by whoever writes, and shown cleared to the next."""
    script = """
        od -An -tx8 -j $((0x1000000000000 / 4096 / 2)) -N 8 /dev/null
        dd if=/proc/1/pagemap bs=8 skip=$((0x100000000000 / 4096)) count=1 2>/dev/null | od -An -tx8
        echo 4 > /proc/1/clear_refs
        dd if=/proc/1/pagemap bs=8 skip=$((0x100000000000 / 4096)) count=1 2>/dev/null | od -An -tx8
    """
    before, after = (int(word, 16) for word in inside("sh", "-c", script).stdout.split())
    assert (before >> 55 & 1, after >> 55 & 1) == (1, 0)


def test_a_recording(tmp_path, machine):
    """A recorded machine stands where a simulated one stands; it cannot be given another shape."""
    record(machine, tmp_path / "a.rec")
    command = [*PMCORE, "exec", "--machine", str(tmp_path / "a.rec")]
    thp = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
    read = [*command, "--", "cat", "/proc/1/maps", "/proc/kpagecount", "/proc/1/smaps", thp]
    done = subprocess.run(read, capture_output=True, check=True)
    process = machine.process(1)
    expected = process.pread("maps", 0, 1 << 20), machine.pread("kpagecount", 0, 1 << 20)
    assert done.stdout == b"".join((*expected, process.pread("smaps", 0, 1 << 20), b"2097152\n"))
    refused = subprocess.run(
        [*command, "--memory", "1 GiB", "--", "true"], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, "a recording is as it was" in refused.stderr) == (2, True)


def test_a_recording_of_the_running_machine(tmp_path):
    """What was recorded of this machine's kernel is what a command sees in it."""
    if os.geteuid() != 0:
        pytest.skip("frames are root's")
    with pmcore.open("procfs") as kernel:
        record(kernel, tmp_path / "live.rec", pids=[os.getpid()])
    command = [*PMCORE, "exec", "--machine", str(tmp_path / "live.rec"), "--", "cat"]
    paths = [
        f"/proc/{os.getpid()}/maps",
        "/proc/version",
        "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size",
    ]
    done = subprocess.run([*command, *paths], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    with pmcore.open("recording", tmp_path / "live.rec") as kernel:
        expected = kernel.process(os.getpid()).pread("maps", 0, 1 << 30) + kernel.pread("version", 0, 4096)
        assert done.stdout == expected + kernel.pread(paths[2], 0, 4096)


def test_wrong_use(inside, tmp_path):
    """No command, no file, no program to step through: one line, an exit code, no traceback."""
    for arguments, code in (
        ((), 2),
        (("--machine", str(tmp_path / "none"), "--", "true"), 3),
        (("--step", "--", "true"), 2),
        (("--hugepages", "x", "--", "true"), 2),
        (("--kernel", "1.0", "--", "true"), 2),
    ):
        done = subprocess.run([*PMCORE, "exec", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


FOREVER = (
    "import os, sys, time\nfd = os.open('/proc/1/maps', 0)\nprint('ready', flush=True)\ntime.sleep(1000)"
)


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        for thread in Path(f"/proc/{one}/task").glob("*/children"):
            todo += [int(child) for child in thread.read_text().split()]
    return found


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4])
def test_nothing_is_left_when_somebody_is_killed(started, program, which):
    """SIGKILL of pmcore, of a process between, of the command, of a child of the command's that stays behind."""
    before = mounts()
    nested = f'{sys.executable} -c "{FOREVER}" & wait'
    done = started("exec", "--machine", program, "--", "sh", "-c", nested)
    assert done.stdout.readline() == "ready\n"
    family = _tree(done.pid)
    assert len(family) == 5
    os.kill(family[which], signal.SIGKILL)
    wait_for(lambda: all(ended(pid) for pid in family))
    done.wait()
    assert done.returncode in ((-9,) if which == 0 else (137,) if which < 4 else (137, 0, 9))
    assert mounts() == before


def test_interrupt_goes_to_the_command(started, program):
    """Ctrl-C in a terminal: the command decides, and its code is passed on."""
    script = "trap 'exit 42' INT; echo ready; while :; do sleep 0.05; done"
    done = started("exec", "--machine", program, "--", "sh", "-c", script, start_new_session=True)
    assert done.stdout.readline() == "ready\n"
    os.killpg(done.pid, signal.SIGINT)
    assert done.wait(timeout=10) == 42


def test_termination_ends_everything(started, program):
    """SIGTERM of pmcore ends the command too."""
    done = started("exec", "--machine", program, "--", "sh", "-c", "echo ready; sleep 1000")
    assert done.stdout.readline() == "ready\n"
    family = _tree(done.pid)
    os.kill(done.pid, signal.SIGTERM)
    assert done.wait(timeout=10) == 143
    wait_for(lambda: all(ended(pid) for pid in family))


@pytest.fixture
def grouped(tmp_path):
    """A program with two groups, and a task in each."""
    steps = (
        s.Map(area="a", pages=64),
        s.MakeGroup(group="g"),
        s.MakeGroup(group="g/h"),
        s.MakeGroup(group="k"),
        s.MoveTask(group="g/h"),
        s.Touch(area="a", pages=20),
        s.Fork(child="c"),
        s.MoveTask(task="c", group="k"),
        s.Touch(task="c", area="a", pages=5),
    )
    save_program(Program(name="groups", steps=steps), tmp_path / "groups.json")
    return [*PMCORE, "exec", "--machine", str(tmp_path / "groups.json"), "--"]


@pytest.mark.rule("KG-003", "CG-010")
def test_the_cgroup_tree_is_there(grouped):
    script = (
        "cd /sys/fs/cgroup && cat g/h/cgroup.procs k/cgroup.procs /proc/2/cgroup && stat -c %i g/h k && ls g"
        " && echo 2 > g/h/cgroup.procs && cat /proc/2/cgroup && find . -name cgroup.procs | wc -l"
    )
    done = subprocess.run(
        [*grouped, "sh", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[:3] == ["1", "2", "0::/k"]
    assert lines[3:5] == ["129", "193"]
    assert "h" in lines
    assert lines[-3:] == ["0::/g/h", "4", ""]


def test_page_types_walks_a_group(grouped, page_types):
    """The kernel's page-types, unchanged, finds a group by its directory."""
    for group, pages in (("g/h", 20), ("k", 5)):
        done = subprocess.run(
            [*grouped, page_types, "-c", f"/sys/fs/cgroup/{group}", "-b", "anon"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].split()[:2] == ["total", str(pages)]
