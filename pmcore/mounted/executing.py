"""A command run inside a machine: in its own user, mount and PID namespace, where /proc and /sys are the machine's.

Three processes: this one answers for the file system; the *mounter* makes the namespaces, mounts, and waits; the
*warden* is the first process of the PID namespace and runs the command. Each is killed with the one before it, and
with the warden the kernel kills everything inside, and the mounts go with the last process: nothing can be left.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pmcore.errors import BackendUnavailable, PmcoreError, SyscallError
from pmcore.mounted import syscalls as sc
from pmcore.mounted.fusefs import KERNEL_PROC, Tree, mfusepy, serve

__all__ = ["execute"]

#: Numbers of processes inside begin here, or so far behind the machine's, so that they are none of its.
_FIRST_PID, _APART = 30000, 1000
_NOT_FOUND, _NOT_RUN = 127, 126
_GO, _FAILED = b"G", b"F"
#: What a terminal sends to all that run in it.
_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
#: How often we look whether everything inside has ended, once the file system has.
_PATIENCE = 200


def execute(tree: Tree, command: Sequence[str]) -> int:
    """Run `command` inside the machine that `tree` shows; its exit code (128 and the signal's number if killed).

    Raises BackendUnavailable where the system gives no namespaces or no FUSE.
    """
    mfusepy()
    tree.passed = "/proc"
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    mounter = os.fork()
    if mounter == 0:
        ours.close()
        first = max(_FIRST_PID, max(tree.view.kernel.pids(), default=0) + _APART)
        _mounter(theirs, parent, list(command), first)
    theirs.close()
    # A terminal's Ctrl-C is for the command; this process answers as long as there is one.
    signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL)
    try:
        device = _receive(ours, mounter)
        serve(tree, f"/dev/fd/{device}")
        return _result(mounter)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(mounter, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(mounter, 0)
        _unblock()


def _unblock() -> None:
    """Take signals again; those that came meanwhile were the command's."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _TERMINAL}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERMINAL)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _receive(ours: socket.socket, mounter: int) -> int:
    """Wait for the namespaces (giving them their users), then for the mounted device's descriptor."""
    told = ours.recv(1)
    if told == _GO:
        _map_users(mounter)
        ours.send(_GO)
        told, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                return int(array.array("i", data[:4])[0])
    reason = ours.makefile("rb").read(1000).decode(errors="replace")
    raise BackendUnavailable(
        f"no namespaces to run the command in: {reason or 'the mounter has ended'}",
        remedy="be root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone, "
        "user.max_user_namespaces); in a container, seccomp may forbid them",
    )


def _result(mounter: int) -> int:
    """The file system is gone: either everything inside has ended, or a signal told us to."""
    for _ in range(_PATIENCE):
        pid, status = os.waitpid(mounter, os.WNOHANG)
        if pid:
            return _code(status)
        time.sleep(0.005)
    return 128 + signal.SIGTERM


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _map_users(mounter: int) -> None:
    """Inside, we are root; root itself keeps all users."""
    where = Path(f"/proc/{mounter}")
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # no user namespace was made, or it is mapped
            for name in ("uid_map", "gid_map"):
                (where / name).write_text("0 0 4294967295\n")
        return
    (where / "setgroups").write_text("deny\n")
    (where / "uid_map").write_text(f"0 {os.geteuid()} 1\n")
    (where / "gid_map").write_text(f"0 {os.getegid()} 1\n")


# -- the mounter -----------------------------------------------------------------------------------------


def _mounter(channel: socket.socket, parent: int, command: list[str], first: int) -> NoReturn:
    code = _NOT_RUN
    try:
        sc.die_with_parent(parent)
        _namespaces()
        channel.send(_GO)
        channel.recv(1)
        _mount(channel)
        channel.close()
        warden = os.fork()
        if warden == 0:
            _warden(command, first)
        signal.pthread_sigmask(signal.SIG_BLOCK, [*_TERMINAL, signal.SIGTERM])
        _, status = os.waitpid(warden, 0)
        code = _code(status)
    except (OSError, PmcoreError) as error:
        with contextlib.suppress(OSError):
            channel.send(_FAILED + str(error).encode())
    finally:
        os._exit(code)


def _namespaces() -> None:
    others = sc.CLONE_NEWNS | sc.CLONE_NEWPID
    try:
        sc.unshare(sc.CLONE_NEWUSER | others)
    except SyscallError:
        if os.geteuid() != 0:
            raise
        sc.unshare(others)


def _mount(channel: socket.socket) -> None:
    """Mount the machine, and put its directories over the real ones."""
    sc.mount("none", "/", flags=sc.MS_REC | sc.MS_PRIVATE)
    device = os.open("/dev/fuse", os.O_RDWR)
    place = tempfile.gettempdir()  # covered for this moment, and in this namespace alone
    data = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    sc.mount("pmcore", place, "fuse.pmcore", sc.MS_NOSUID | sc.MS_NODEV, data)
    channel.sendmsg([_GO], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [device]))])
    os.close(device)
    sc.mount("/proc", f"{place}/proc/{KERNEL_PROC}", flags=sc.MS_BIND | sc.MS_REC)
    for name in ("/sys/kernel/mm", "/sys/devices/system/memory", "/sys/fs/cgroup"):
        if os.path.isdir(f"{place}{name}") and os.path.isdir(name):  # noqa: PTH112
            sc.mount(f"{place}{name}", name, flags=sc.MS_BIND | sc.MS_REC)
    sc.mount(f"{place}/proc", "/proc", flags=sc.MS_BIND | sc.MS_REC)
    sc.umount(place, sc.MNT_DETACH)


# -- the warden ------------------------------------------------------------------------------------------


def _warden(command: list[str], first: int) -> NoReturn:
    code = _NOT_RUN
    try:
        sc.die_with_parent(0)
        with contextlib.suppress(OSError):
            Path(f"/proc/{KERNEL_PROC}/sys/kernel/ns_last_pid").write_text(f"{first}\n")
        child = os.fork()
        if child == 0:
            _command(command)
        for number in _TERMINAL:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pid, status = os.wait()
            if pid == child:
                code = _code(status)
                break
    finally:
        os._exit(code)


def _command(command: list[str]) -> NoReturn:
    code = _NOT_RUN
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)
    except FileNotFoundError:
        code = _NOT_FOUND
        print(f"pmcore: {command[0]}: no such command", file=sys.stderr, flush=True)
    except OSError as error:
        print(f"pmcore: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)
