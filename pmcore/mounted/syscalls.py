"""The system calls that Python 3.11 has no names for: mounts, namespaces, another process's memory."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

from pmcore.errors import BackendUnavailable, syscall_error

__all__ = [
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "CLONE_NEWUSER",
    "MNT_DETACH",
    "MS_BIND",
    "MS_PRIVATE",
    "MS_REC",
    "CallersMemory",
    "die_with_parent",
    "mount",
    "umount",
    "unshare",
]

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9

if not sys.platform.startswith("linux"):
    raise BackendUnavailable("machines are mounted on Linux", remedy="pmcore dump works everywhere")

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.process_vm_writev.argtypes = [
    ctypes.c_int,
    ctypes.POINTER(_Iovec),
    ctypes.c_ulong,
    ctypes.POINTER(_Iovec),
    ctypes.c_ulong,
    ctypes.c_ulong,
]
_libc.process_vm_writev.restype = ctypes.c_ssize_t


def _check(result: int, call: str) -> int:
    if result < 0:
        raise syscall_error(ctypes.get_errno(), call)
    return result


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    done = _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode())
    _check(done, f"mount({source}, {target}, {kind})")


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), f"umount({target})")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def die_with_parent(parent: int) -> None:
    """Be killed when the parent, whose number is given (0: outside of this PID namespace), is no more."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(_SIGKILL + 128)


class CallersMemory:
    """The memory of a process that has made a call, written from outside."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def write(self, address: int, data: bytes) -> None:
        """Put `data` there. Raises BadAddress where there is no such memory, NotPermitted where ptrace is refused."""
        done = 0
        while done < len(data):
            piece = data[done:]
            local = _Iovec(ctypes.cast(ctypes.c_char_p(piece), ctypes.c_void_p), len(piece))
            remote = _Iovec(address + done, len(piece))
            got = _libc.process_vm_writev(self.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
            if got <= 0:
                number = ctypes.get_errno() if got < 0 else errno.EFAULT
                raise syscall_error(
                    number,
                    f"process_vm_writev({self.pid}, {address:#x}, {len(data)})",
                    remedy="the caller's memory is written as its user, or as root"
                    if number == errno.EPERM
                    else None,
                )
            done += got
