"""Without root: it works where the system gives user namespaces and /dev/fuse; elsewhere one line says what is missing.

The user is nobody, in a mount namespace where /dev/fuse has other permissions; only reading of what is root's stays
allowed, for the interpreter may lie in root's directories.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from .conftest import PMCORE, mounts

SETUP = """
set -e
mknod "$1/fuse" c 10 229
chmod "$2" "$1/fuse"
chmod 755 "$1"
mount --bind "$1/fuse" /dev/fuse
shift 2
exec "$@"
"""
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
NOBODY += [f"--{name}=-all,+dac_read_search" for name in ("inh-caps", "ambient-caps", "bounding-set")]
#: A user namespace in which there are no more of them; what follows runs there, as the same users.
NO_MORE = """
import os, sys
from pathlib import Path
from pmcore.mounted import syscalls
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(ready[0], 1)
for name in ("uid_map", "gid_map"):
    Path(f"/proc/{child}/{name}").write_text("0 0 4294967295")
os.write(go[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture
def as_nobody(tmp_path):
    """Run a command as nobody, where /dev/fuse has these permissions."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare", "mknod"))):
        pytest.skip("needs root, setpriv and unshare to be somebody else")
    place = tmp_path / "device"
    place.mkdir()
    for folder in (tmp_path, *tmp_path.parents):  # pytest's directories are its user's alone
        if folder.stat().st_uid == 0 and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o055)

    def go(*command, mode="666", before=()):
        whole = ["unshare", "--mount", "sh", "-c", SETUP, "sh", str(place), mode, *before, *NOBODY, *command]
        done = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=120, cwd="/")
        if "mknod" in done.stderr or done.stderr.startswith(("unshare:", "setpriv:", "mount:")):
            pytest.skip(done.stderr)
        (place / "fuse").unlink()
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return go


def test_a_command_runs_without_root(as_nobody, program):
    """Inside, nobody is root of a namespace, with no power outside; the machine's files are as root sees them."""
    before = mounts()
    script = "id -u; cat /proc/1/maps; head -c 16 /proc/kpageflags | wc -c; "
    script += "echo 4 > /proc/1/clear_refs && echo cleared; touch /etc/pmcore-test; exit 7"
    done = as_nobody(*PMCORE, "exec", "--machine", program, "--", "sh", "-c", script)
    assert done.returncode == 7, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "0"
    assert lines[1].startswith("100000000000-")
    assert lines[-2:] == ["16", "cleared"]
    assert "Permission denied" in done.stderr
    assert mounts() == before


def test_ioctls_without_root(as_nobody, program, tmp_path):
    """The caller's memory is its own user's: PAGEMAP_SCAN reaches it."""
    script = (
        "import ctypes, fcntl, os, struct\n"
        "fd = os.open('/proc/1/pagemap', os.O_RDONLY)\n"
        "vec = (ctypes.c_uint64 * 24)()\n"
        "start = 0x100000000000\n"
        "words = (96, 0, start, start + 64 * 4096, 0, ctypes.addressof(vec), 8, 0, 0, 8, 0, 8)\n"
        "argument = bytearray(struct.pack('=12Q', *words))\n"
        "print(fcntl.ioctl(fd, 0xC0606610, argument), (vec[1] - vec[0]) // 4096)\n"
    )
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        pytest.skip("no interpreter that is for everybody")
    done = as_nobody(*PMCORE, "exec", "--machine", program, "--", python, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "20"]


def test_no_fuse_for_this_user(as_nobody):
    done = as_nobody(*PMCORE, "exec", "--", "true", mode="600")
    assert done.returncode == 4
    assert "/dev/fuse cannot be opened" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_no_namespaces_for_this_user(as_nobody):
    done = as_nobody(*PMCORE, "exec", "--", "true", before=(sys.executable, "-c", NO_MORE))
    assert done.returncode == 4, done.stderr
    assert "no namespaces to run the command in" in done.stderr
    assert "allow user namespaces" in done.stderr


def test_mounting_on_a_directory_without_root(as_nobody, tmp_path):
    """That is fusermount3's business; where it is not there, it is said."""
    place = tmp_path / "place"
    place.mkdir()
    os.chown(place, 65534, 65534)
    if shutil.which("fusermount3"):
        pytest.skip("fusermount3 is there, and would mount it")
    done = as_nobody(*PMCORE, "mount", str(place))
    assert done.returncode == 4
    assert "needs fusermount3" in done.stderr
    assert list(place.iterdir()) == []
