"""VMAs, and the text of /proc/PID/maps: parsed and formatted byte for byte as the kernel writes it."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable

import attrs

from pmcore.errors import ArgumentError, FormatError

__all__ = ["Vma", "VmaKind", "format_maps", "format_maps_line", "parse_maps", "parse_maps_line"]

#: Column at which the kernel ends its padding before a name (25 + 6 pointers of 8 bytes - 1).
_NAME_COLUMN = 72
_LINE = re.compile(
    rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-])([w-])([x-])([ps]) ([0-9a-f]{1,16}) ([0-9a-f]+):([0-9a-f]+) (\d+) ?"
)


class VmaKind(enum.StrEnum):
    """What a VMA maps, as far as its maps line says."""

    ANON = "anon"
    HEAP = "heap"
    STACK = "stack"
    FILE = "file"
    SHMEM = "shmem"
    HUGETLB = "hugetlb"
    SPECIAL = "special"


@attrs.frozen(kw_only=True)
class Vma:
    """One mapping. Addresses and `offset` in bytes; `name` as maps shows it, undecodable bytes as surrogates."""

    start: int
    end: int
    readable: bool = True
    writable: bool = True
    executable: bool = False
    shared: bool = False
    offset: int = 0
    dev_major: int = 0
    dev_minor: int = 0
    inode: int = 0
    name: str = ""

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1 << 64:
            raise ArgumentError(f"{self.start:#x}-{self.end:#x} is not a range of addresses")

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def perms(self) -> str:
        """As maps writes them: "rw-p"."""
        return (
            ("r" if self.readable else "-")
            + ("w" if self.writable else "-")
            + ("x" if self.executable else "-")
            + ("s" if self.shared else "p")
        )

    @property
    def name_bytes(self) -> bytes:
        """The name as the kernel wrote it."""
        return self.name.encode("utf-8", "surrogateescape")

    @property
    def path(self) -> str | None:
        """The file's path, with the kernel's escape of newlines undone; None where no file is mapped."""
        if not self.name.startswith("/"):
            return None
        return self.name.removesuffix(" (deleted)").replace("\\012", "\n")

    @property
    def deleted(self) -> bool:
        """Whether maps says that the file has no name any more."""
        return self.name.startswith("/") and self.name.endswith(" (deleted)")

    @property
    def kind(self) -> VmaKind:
        """What is mapped, by name and inode."""
        name = self.name
        if name.startswith(("/anon_hugepage", "/memfd:hugetlb", "/dev/hugepages/")):
            return VmaKind.HUGETLB
        if name.startswith(("/dev/zero", "/memfd:", "/SYSV", "/dev/shm/", "[anon_shmem:")):
            return VmaKind.SHMEM
        if name.startswith("/") or self.inode:
            return VmaKind.FILE
        if name.startswith("[stack"):
            return VmaKind.STACK
        if name == "[heap]":
            return VmaKind.HEAP
        if name in {"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]", "[sigpage]", "[vectors]"}:
            return VmaKind.SPECIAL
        return VmaKind.ANON

    def __str__(self) -> str:
        return f"{self.start:x}-{self.end:x} {self.perms} {self.name}".rstrip()


def parse_maps_line(line: bytes) -> Vma:
    """One line of maps, without its newline. Raises FormatError."""
    match = _LINE.match(line)
    if match is None:
        raise FormatError(f"not a line of maps: {line[:80]!r}")
    name = b""
    if match.end() < len(line):
        column = max(_NAME_COLUMN, match.end()) + 1
        gap = line[match.end() : column]
        # A name may itself begin with blanks: only the padding is taken away.
        name = line[column:] if not gap.strip(b" ") else line[match.end() :].lstrip(b" ")
    start, end, r, w, x, p, offset, major, minor, inode = match.groups()
    try:
        return Vma(
            start=int(start, 16),
            end=int(end, 16),
            readable=r == b"r",
            writable=w == b"w",
            executable=x == b"x",
            shared=p == b"s",
            offset=int(offset, 16),
            dev_major=int(major, 16),
            dev_minor=int(minor, 16),
            inode=int(inode),
            name=name.decode("utf-8", "surrogateescape"),
        )
    except ArgumentError as error:
        raise FormatError(f"not a line of maps: {line[:80]!r}: {error}") from error


def parse_maps(data: bytes, *, source: str = "maps") -> tuple[Vma, ...]:
    """All of maps. Overlapping VMAs are let through: a process that changes while it is read can show them.

    Raises FormatError that names the line.
    """
    vmas = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line:
            continue
        try:
            vmas.append(parse_maps_line(line))
        except FormatError as error:
            raise FormatError(error.message, source=f"{source}:{number}") from None
    return tuple(vmas)


def format_maps_line(vma: Vma) -> bytes:
    """The line of maps for `vma`, without its newline."""
    line = (
        f"{vma.start:08x}-{vma.end:08x} {vma.perms} {vma.offset:08x} "
        f"{vma.dev_major:02x}:{vma.dev_minor:02x} {vma.inode} "
    ).encode()
    return line.ljust(_NAME_COLUMN) + b" " + vma.name_bytes if vma.name else line


def format_maps(vmas: Iterable[Vma]) -> bytes:
    """The text of maps for `vmas`."""
    return b"".join(format_maps_line(vma) + b"\n" for vma in vmas)
