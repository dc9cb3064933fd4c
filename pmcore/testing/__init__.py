"""For tests: of tools that read page tables (fixtures, strategies, a machine for /proc), and of backends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmcore.testing.fakeproc import FakeProc, fake_proc

__all__ = ["FakeProc", "fake_proc"]


def __getattr__(name: str) -> Any:
    # pytest imports this package at every start: what few tests need is imported by them.
    if name in __all__:
        from pmcore.testing import fakeproc

        return getattr(fakeproc, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
