"""Refusing a system call: the kernel's errno, with Linux's number on every operating system."""

from __future__ import annotations

from typing import Any, NoReturn, TypeAlias

from pmcore.errors import syscall_error
from pmcore.uapi import Errno

__all__ = ["Call", "refuse"]

#: A call in words: as text, or as a format and what belongs into it, made text only where it is refused.
Call: TypeAlias = str | tuple[Any, ...]


def refuse(number: Errno, call: Call, reason: str | None = None) -> NoReturn:
    """Raise the error of that number."""
    words = call if isinstance(call, str) else call[0].format(*call[1:])
    raise syscall_error(int(number), words, reason=reason)
