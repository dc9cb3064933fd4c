"""The text of /proc/PID/smaps and smaps_rollup: a VMA with its counters, parsed and formatted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import attrs

from pmcore.errors import FormatError
from pmcore.vma import Vma, format_maps_line, parse_maps_line

__all__ = ["SmapsEntry", "format_smaps", "parse_smaps"]

_COUNTER = re.compile(rb"([A-Za-z_]\w*):\s+(\d+) kB")
_PLAIN = re.compile(rb"([A-Za-z_]\w*):\s+(\d+)")
_HEADER = re.compile(rb"[0-9a-f]+-[0-9a-f]+ ")
_FLAGS = b"VmFlags: "


def _frozen(mapping: Mapping[str, int]) -> Mapping[str, int]:
    return MappingProxyType(dict(mapping))


@attrs.frozen(kw_only=True)
class SmapsEntry:
    """A VMA and what the kernel counts of it."""

    vma: Vma
    #: Counters that smaps gives in kB, here in bytes, under the kernel's names ("Rss", "Pss", "Swap", ...).
    counters: Mapping[str, int] = attrs.field(converter=_frozen, factory=dict)
    #: Numbers without a unit ("THPeligible", "ProtectionKey").
    plain: Mapping[str, int] = attrs.field(converter=_frozen, factory=dict)
    #: The two-letter codes of VmFlags ("rd", "wr", "sd", "uw", ...); None where the kernel shows none.
    vm_flags: tuple[str, ...] | None = None
    #: Lines that are none of these, kept as they came.
    other: tuple[bytes, ...] = ()

    def bytes_of(self, *names: str) -> int:
        """Sum of these counters; one that this kernel does not show counts 0."""
        return sum(self.counters.get(name, 0) for name in names)

    def has_flag(self, code: str) -> bool:
        """Whether VmFlags has `code`; False where the kernel shows no VmFlags."""
        return self.vm_flags is not None and code in self.vm_flags


def parse_smaps(data: bytes, *, source: str = "smaps") -> tuple[SmapsEntry, ...]:
    """All of smaps, or smaps_rollup. Raises FormatError that names the line."""
    entries: list[SmapsEntry] = []
    vma: Vma | None = None
    counters: dict[str, int] = {}
    plain: dict[str, int] = {}
    flags: tuple[str, ...] | None = None
    other: list[bytes] = []

    def finish() -> None:
        if vma is not None:
            entries.append(
                SmapsEntry(vma=vma, counters=counters, plain=plain, vm_flags=flags, other=tuple(other))
            )

    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line:
            continue
        if _HEADER.match(line):
            finish()
            try:
                vma = parse_maps_line(line)
            except FormatError as error:
                raise FormatError(error.message, source=f"{source}:{number}") from None
            counters, plain, flags, other = {}, {}, None, []
        elif vma is None:
            raise FormatError(
                f"counters before the first mapping: {line[:80]!r}", source=f"{source}:{number}"
            )
        elif match := _COUNTER.fullmatch(line):
            counters[match[1].decode()] = int(match[2]) << 10
        elif line.startswith(_FLAGS):
            flags = tuple(line[len(_FLAGS) :].decode("ascii", "replace").split())
        elif match := _PLAIN.fullmatch(line):
            plain[match[1].decode()] = int(match[2])
        else:
            other.append(line)
    finish()
    return tuple(entries)


def format_smaps(entries: Iterable[SmapsEntry]) -> bytes:
    """The text of smaps for `entries`, laid out as kernels since 4.20 do."""
    lines: list[bytes] = []
    for entry in entries:
        lines.append(format_maps_line(entry.vma))
        lines += [f"{name + ':':<16}{value >> 10:8d} kB".encode() for name, value in entry.counters.items()]
        lines += [f"{name + ':':<16}{value:8d}".encode() for name, value in entry.plain.items()]
        lines += entry.other
        if entry.vm_flags is not None:
            lines.append(_FLAGS + "".join(f"{code} " for code in entry.vm_flags).encode())
    return b"".join(line + b"\n" for line in lines)
