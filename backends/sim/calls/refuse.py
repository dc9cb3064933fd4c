"""Refusing a system call: the kernel's errno, with Linux's number on every operating system."""

from __future__ import annotations

from typing import NoReturn

from pmcore.errors import syscall_error
from pmcore.uapi import Errno

__all__ = ["refuse"]


def refuse(number: Errno, call: str, reason: str | None = None) -> NoReturn:
    """Raise the error of that number."""
    raise syscall_error(int(number), call, reason=reason)
