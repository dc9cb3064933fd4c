"""Who opens a file of /proc: what the kernel asks of a caller before it shows page tables."""

from __future__ import annotations

import enum

import attrs

__all__ = ["ROOT", "Capability", "Opener"]


class Capability(enum.IntEnum):
    """``CAP_*``, as far as these files ask for them."""

    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    SYS_PTRACE = 19
    SYS_ADMIN = 21


@attrs.frozen
class Opener:
    """A caller's user and capabilities. What is shown through an open file goes by who opened it (rule AC-003)."""

    uid: int = 0
    capabilities: frozenset[Capability] = frozenset(Capability)

    @classmethod
    def user(cls, uid: int) -> Opener:
        """Somebody with no capability at all."""
        return cls(uid, frozenset())

    def has(self, capability: Capability) -> bool:
        """Whether the capability is held."""
        return capability in self.capabilities

    def may(self, mode: int, owner: int, *, write: bool) -> bool:
        """Whether a file of these permission bits and owner opens, for reading or for writing. Groups are no matter."""
        if self.has(Capability.DAC_OVERRIDE) or (not write and self.has(Capability.DAC_READ_SEARCH)):
            return True
        bit = 2 if write else 4
        return bool(mode & (bit << 6 if self.uid == owner else bit))

    def may_inspect(self, owner: int) -> bool:
        """Whether processes of `owner` may be looked at (ptrace read access, rule AC-001)."""
        return self.uid == owner or self.has(Capability.SYS_PTRACE)


#: Everything is allowed.
ROOT = Opener()
