"""Every error that pmcore raises on purpose.

A call that the kernel refuses is a `SyscallError` of the class that fits its errno; each of them is also the
nearest builtin (`NotPermitted` is a `PermissionError`, ...), and both backends raise the same. What only a caller
of ours can get wrong is an `ArgumentError`; input that is not what it claims to be, a `FormatError`.
Each error carries `errno` (None where no kernel would have said it) and `remedy`, a sentence that says what to do.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any

__all__ = [
    "AddressSpaceFault",
    "ArgumentError",
    "BackendUnavailable",
    "BadAddress",
    "BadFile",
    "Busy",
    "Exists",
    "FormatError",
    "HiddenPfn",
    "InvalidArgument",
    "Missing",
    "NotModelled",
    "NotPermitted",
    "NotSupported",
    "OutOfMemory",
    "PmcoreError",
    "ProcessGone",
    "ShortRead",
    "SyscallError",
    "TryAgain",
    "UnknownCapability",
    "syscall_error",
]


class PmcoreError(Exception):
    """Base of all errors of pmcore."""

    errno: int | None = None
    remedy: str | None = None


class ArgumentError(PmcoreError, ValueError):
    """An argument that no kernel call would ever see: wrong type, impossible value, contradictory options."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy
        self.errno = _errno.EINVAL


class FormatError(PmcoreError, ValueError):
    """Text or bytes that are not what they should be (a maps line, a truncated file, a bits-spec)."""

    def __init__(self, message: str, *, source: str | None = None, remedy: str | None = None) -> None:
        where = message if source is None else f"{source}: {message}"
        super().__init__(where if remedy is None else f"{where}; {remedy}")
        self.message = message
        self.source = source
        self.remedy = remedy
        self.errno = None


class UnknownCapability(PmcoreError, LookupError):
    """A capability, kernel version or configuration option that `spec/tables` does not list."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class BackendUnavailable(PmcoreError, RuntimeError):
    """A backend that is not installed, failed to load, or cannot work on this operating system."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy
        self.errno = _errno.ENODEV


class NotModelled(PmcoreError, NotImplementedError):
    """Something that Linux does and the backend does not; `spec/` lists it."""

    def __init__(self, what: str, *, remedy: str | None = None) -> None:
        message = f"not modelled: {what}"
        super().__init__(message if remedy is None else f"{message}; {remedy}")
        self.what = what
        self.remedy = remedy
        self.errno = _errno.ENOSYS


class HiddenPfn(PmcoreError, PermissionError):
    """A frame number was needed, and the kernel hides it from this opener (rule AC-003: the field reads zero)."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.remedy = "open the file with CAP_SYS_ADMIN (run as root) to see frame numbers"
        super().__init__(_errno.EPERM, f"{what} needs frame numbers, and they are hidden; {self.remedy}")
        self.errno = _errno.EPERM

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.what,))


class AddressSpaceFault(PmcoreError):
    """An access that would have killed the process: `signal` is "SIGSEGV" or "SIGBUS", at `address`."""

    def __init__(self, signal: str, address: int, cause: str, *, lsb: int = 0) -> None:
        super().__init__(f"{signal} at {address:#x}: {cause}")
        #: Of a SIGBUS for corrupted memory (BUS_MCEERR_AR): how many low bits of the address say nothing; else 0.
        self.lsb = lsb
        self.signal = signal
        self.address = address
        self.cause = cause
        self.errno = _errno.EFAULT


class SyscallError(PmcoreError, OSError):
    """The kernel (real or modelled) refused a call. `call` says what was attempted."""

    errno: int

    def __init__(
        self, errno: int, call: str, *, reason: str | None = None, remedy: str | None = None
    ) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        message = f"{call}: {name} ({reason or os.strerror(errno)})"
        if remedy is not None:
            message = f"{message}; {remedy}"
        super().__init__(errno, message)
        self.errno = errno
        self.call = call
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.errno, self.call, self.reason, self.remedy))


class NotPermitted(SyscallError, PermissionError):
    """EPERM, EACCES: the caller may not."""


class ProcessGone(SyscallError, ProcessLookupError):
    """ESRCH: no such process, or it died while being read."""


class Missing(SyscallError, FileNotFoundError):
    """ENOENT, ENODEV: this kernel has no such file or device."""


class InvalidArgument(SyscallError, ValueError):
    """EINVAL, ENAMETOOLONG, E2BIG: the kernel rejects an argument."""


class BadAddress(SyscallError):
    """EFAULT: an address outside what the caller may name."""


class BadFile(SyscallError):
    """EBADF: not an open file of the needed kind."""


class NotSupported(SyscallError):
    """ENOSYS, ENOTTY, EOPNOTSUPP: this kernel does not know the call."""


class OutOfMemory(SyscallError, MemoryError):
    """ENOMEM: no memory, or (mmap and its kin) no such range of addresses."""


class Busy(SyscallError):
    """EBUSY: in use."""


class TryAgain(SyscallError, BlockingIOError):
    """EAGAIN: not now."""


class Exists(SyscallError, FileExistsError):
    """EEXIST: something is already there."""


class ShortRead(SyscallError):
    """EIO: a file ended before the bytes that its size or the maps had promised."""


_CLASSES: dict[int, type[SyscallError]] = {
    _errno.EPERM: NotPermitted,
    _errno.EACCES: NotPermitted,
    _errno.ESRCH: ProcessGone,
    _errno.ENOENT: Missing,
    _errno.ENODEV: Missing,
    _errno.EINVAL: InvalidArgument,
    _errno.ENAMETOOLONG: InvalidArgument,
    _errno.E2BIG: InvalidArgument,
    _errno.EFAULT: BadAddress,
    _errno.EBADF: BadFile,
    _errno.ENOSYS: NotSupported,
    _errno.ENOTTY: NotSupported,
    _errno.EOPNOTSUPP: NotSupported,
    _errno.ENOMEM: OutOfMemory,
    _errno.EBUSY: Busy,
    _errno.EAGAIN: TryAgain,
    _errno.EEXIST: Exists,
    _errno.EIO: ShortRead,
}


def syscall_error(
    errno: int, call: str, *, reason: str | None = None, remedy: str | None = None
) -> SyscallError:
    """The error for `errno` of `call`, as the class that fits it (`SyscallError` itself for a rare one)."""
    return _CLASSES.get(errno, SyscallError)(errno, call, reason=reason, remedy=remedy)


def _rebuild(
    cls: type[SyscallError], errno: int, call: str, reason: str | None, remedy: str | None
) -> SyscallError:
    return cls(errno, call, reason=reason, remedy=remedy)
