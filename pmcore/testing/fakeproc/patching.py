"""Putting the replacements in their places, in every module that has taken the originals, and taking them out again."""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from pmcore.testing.fakeproc.calls import CALLS
from pmcore.testing.fakeproc.fake import active
from pmcore.testing.fakeproc.opening import open_file
from pmcore.testing.fakeproc.real import REAL, module
from pmcore.testing.fakeproc.table import TABLE

__all__ = ["abandon", "announce", "install", "remove"]


class _Replacement:
    """A function in the place of a built-in one: like that, it does not become a method where a class holds it."""

    def __init__(self, name: str, function: Any, original: Any) -> None:
        self.__name__ = self.__qualname__ = name.rpartition(".")[2]
        self.__module__ = name.rpartition(".")[0]
        self.__doc__ = getattr(original, "__doc__", None)
        self.__wrapped__ = original
        self._function = function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(*arguments, **options)

    def __repr__(self) -> str:
        return f"<function {self.__module__}.{self.__name__}, with a machine's /proc>"


_OPEN = _Replacement("io.open", open_file, io.open)
_REPLACEMENTS: dict[str, _Replacement] = {
    "builtins.open": _OPEN,
    "io.open": _OPEN,
    **{name: _Replacement(name, function, REAL[name]) for name, function in CALLS.items()},
}
#: Constants that tools for Linux use, for platforms without them. (Flags of open are 0: the real open sees them, too.)
_CONSTANTS: dict[str, dict[str, Any]] = {
    "os": {
        **dict.fromkeys(("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NOCTTY", "O_SYNC"), 0),
        "sysconf_names": {"SC_PAGESIZE": 30, "SC_PAGE_SIZE": 30, "SC_PHYS_PAGES": 85, "SC_AVPHYS_PAGES": 86},
    },
    "mmap": {
        "PROT_READ": 1,
        "PROT_WRITE": 2,
        "PROT_EXEC": 4,
        "MAP_SHARED": 1,
        "MAP_PRIVATE": 2,
        "MAP_ANONYMOUS": 0x20,
        "MAP_ANON": 0x20,
    },
    "fcntl": {
        "F_GETFD": 1,
        "F_SETFD": 2,
        "F_GETFL": 3,
        "F_SETFL": 4,
        "FD_CLOEXEC": 1,
        "LOCK_SH": 1,
        "LOCK_EX": 2,
        "LOCK_NB": 4,
        "LOCK_UN": 8,
    },
    "resource": {
        "error": OSError,
        "RLIM_INFINITY": -1,
        "RLIMIT_AS": 9,
        "RLIMIT_MEMLOCK": 8,
        "RLIMIT_NOFILE": 7,
    },
}
_ABSENT = object()
#: What was where, to be put back: (module, name, what).
_before: list[tuple[Any, str, Any]] = []
_stand_ins: dict[str, Any] = {}


def _set(where: Any, name: str, value: Any) -> None:
    _before.append((where, name, getattr(where, name, _ABSENT)))
    setattr(where, name, value)


def _others() -> Iterator[ModuleType]:
    """Loaded modules that may have taken a function for themselves: none of Python's own, none of ours."""
    for name, found in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top != "pmcore" and top not in sys.stdlib_module_names and isinstance(found, ModuleType):
            yield found


def _exchange(new: dict[int, Any], old: list[Any]) -> None:
    """Replace, in the others' names, each object of `old` by what `new` has under its identity."""
    chosen = {id(one): one for one in old}
    for found in _others():
        names = vars(found)
        for name, value in list(names.items()):
            if id(value) in new and chosen[id(value)] is value:
                names[name] = new[id(value)]


def install() -> None:
    """Replace everything."""
    try:
        _install()
    except BaseException:
        remove()
        raise


def _install() -> None:
    TABLE.begin()
    for name in ("fcntl", "resource", "mmap"):
        if module(name) is None:
            _stand_ins[name] = sys.modules.get(name, _ABSENT)
            sys.modules[name] = ModuleType(name, "Stands in for what this platform lacks.")
    places: dict[str, Any] = {"builtins": builtins, "io": io, "os": os, "os.path": os.path}
    for name in ("fcntl", "resource", "mmap"):
        places[name] = sys.modules[name]
    for name, constants in _CONSTANTS.items():
        for constant, value in constants.items():
            if not hasattr(places[name], constant):
                _set(places[name], constant, value)
    for name, replacement in _REPLACEMENTS.items():
        where, _, attribute = name.rpartition(".")
        original = REAL[name]
        # What is no more than refused below /proc needs no stand-in where the platform lacks it.
        if original is None and not _needed(name):
            continue
        _set(places[where], attribute, replacement)
    originals = [original for original in REAL.values() if original is not None]
    _exchange(
        {id(REAL[name]): new for name, new in _REPLACEMENTS.items() if REAL[name] is not None}, originals
    )
    for name in ("PAGESIZE", "ALLOCATIONGRANULARITY"):
        _set(places["mmap"], name, getattr(places["mmap"], name, 4096))


def _needed(name: str) -> bool:
    from pmcore.testing.fakeproc.calls import REFUSED

    return name not in REFUSED and name not in ("os.sendfile", "os.copy_file_range", "os.splice")


def announce() -> None:
    """The machine that answers has changed: constants that depend on it follow."""
    fake = active()
    if fake is not None:
        for name in ("PAGESIZE", "ALLOCATIONGRANULARITY"):
            setattr(sys.modules["mmap"], name, fake.machine.geometry.page_size)


def remove() -> None:
    """Put everything back."""
    while _before:
        where, name, value = _before.pop()
        if value is _ABSENT:
            if hasattr(where, name):
                delattr(where, name)
        else:
            setattr(where, name, value)
    replaced = {id(new): REAL[name] for name, new in _REPLACEMENTS.items() if REAL[name] is not None}
    _exchange(replaced, list(_REPLACEMENTS.values()))
    TABLE.end()
    for name, value in _stand_ins.items():
        if value is _ABSENT:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = value
    _stand_ins.clear()


def abandon(owner: object) -> None:
    """A context has ended: so have its files."""
    TABLE.abandon(owner)
