"""The functions as they were before anything was replaced, by "module.name"; None where this platform lacks one."""

from __future__ import annotations

import builtins
import importlib
import io
import os
from types import ModuleType
from typing import Any

__all__ = ["REAL", "module", "real"]


def module(name: str) -> ModuleType | None:
    """The module of that name, where the platform has it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_OS = """
open close read readv pread preadv write writev pwrite lseek fstat ftruncate dup dup2
listdir scandir stat lstat access readlink sysconf getpid kill sendfile copy_file_range splice
unlink remove rmdir mkdir rename replace link symlink chmod chown lchown truncate utime mknod mkfifo chdir chroot
statvfs getxattr setxattr listxattr
"""
_NAMES: dict[str, list[str]] = {
    "os": _OS.split(),
    "os.path": ["exists", "lexists", "isfile", "isdir", "islink"],
    "fcntl": ["ioctl"],
    "resource": ["getpagesize"],
}
REAL: dict[str, Any] = {"builtins.open": builtins.open, "io.open": io.open}
for _module, _functions in _NAMES.items():
    for _name in _functions:
        _where = os.path if _module == "os.path" else module(_module)
        REAL[f"{_module}.{_name}"] = getattr(_where, _name, None)


def real(name: str, *arguments: Any, **options: Any) -> Any:
    """Call the function of that name as it was. Raises OSError(ENOSYS) where this platform lacks it."""
    function = REAL[name]
    if function is None:
        import errno

        raise OSError(errno.ENOSYS, f"{os.strerror(errno.ENOSYS)}: {name}")
    return function(*arguments, **options)
