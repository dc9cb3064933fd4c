"""The paths that a fake /proc answers for: those of the view, and texts that its user has added."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Mapping, Sequence

from pmcore.errors import ArgumentError, Missing, syscall_error
from pmcore.procview import Node, Opener, OpenFile, ProcView

__all__ = ["Tree", "claimed"]


def claimed(path: object) -> str | None:
    """The absolute path below /proc or /sys that `path` names, without dots; None for every other."""
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    text = os.fsdecode(os.fspath(path))
    if os.sep == "\\":
        text = os.path.splitdrive(text)[1].replace("\\", "/")
    if not text.startswith("/"):
        return None
    whole = "/" + posixpath.normpath(text).lstrip("/")
    if not (whole + "/").startswith(("/proc/", "/sys/")):
        return None
    return whole + "/" if text.endswith(("/", "/.")) else whole


class _Text(OpenFile):
    def __init__(self, path: str, text: bytes) -> None:
        super().__init__(path)
        self._text = text

    def read(self, offset: int, size: int) -> bytes:
        return self._text[offset : offset + size]


class Tree:
    """A view and the texts added to it, by path as `claimed` gives it; links are followed here."""

    def __init__(self, view: ProcView, added: Mapping[str, bytes | str]) -> None:
        self._view = view
        self._added: dict[str, bytes] = {}
        for path, text in added.items():
            whole = claimed(path)
            if whole is None or whole.endswith("/") or whole.count("/") < 2:
                raise ArgumentError(f"files: {path!r}", remedy="a file's whole path, below /proc or /sys")
            self._added[whole] = text.encode() if isinstance(text, str) else bytes(text)

    def node(self, path: str, *, follow: bool = True) -> Node:
        """What `path` names, a link itself only without `follow`. Raises OSError with its errno."""
        slash, path = path.endswith("/"), path.rstrip("/")
        parts = path.split("/")
        if (
            parts[1:3] == ["proc", "self"]
            and self._view.self_pid is not None
            and (parts[3:] or follow or slash)
        ):
            path = "/".join(["", "proc", str(self._view.self_pid), *parts[3:]])
        node = self._find(path)
        if slash and not node.is_dir:
            raise syscall_error(errno.ENOTDIR, path)
        return node

    def _find(self, path: str) -> Node:
        text = self._added.get(path)
        if text is not None:
            return Node(path=path, mode=stat.S_IFREG | 0o444, open=lambda _o, _r: _Text(path, text))
        below = {
            added[len(path) + 1 :].split("/")[0] for added in self._added if added.startswith(path + "/")
        }
        try:
            node = self._view.node(path)
        except Missing:
            if not below:
                raise self._not_there(path) from None
            return Node(path=path, mode=stat.S_IFDIR | 0o555, list_names=lambda: sorted(below))
        if not below or not node.is_dir:
            return node

        def names() -> Sequence[str]:
            there = list(node.names())
            return [*there, *sorted(below.difference(there))]

        return Node(path=path, mode=node.mode, uid=node.uid, size=node.size, list_names=names)

    def _not_there(self, path: str) -> OSError:
        """ENOTDIR below a file, ENOENT else."""
        parent = path.rpartition("/")[0]
        while parent.count("/") > 1:
            try:
                above = self._added.get(parent) is not None or not self._view.node(parent).is_dir
            except Missing:
                parent = parent.rpartition("/")[0]
                continue
            if above:
                return syscall_error(errno.ENOTDIR, path)
            break
        return syscall_error(errno.ENOENT, path)

    def may(self, node: Node, opener: Opener, mode: int) -> bool:
        """access(2) by `opener`."""
        permissions = stat.S_IMODE(node.mode)
        return (
            (not mode & os.R_OK or opener.may(permissions, node.uid, write=False))
            and (not mode & os.W_OK or opener.may(permissions, node.uid, write=True))
            and (not mode & os.X_OK or bool(permissions & 0o111))
        )

    def status(self, node: Node) -> os.stat_result:
        """stat(2). Times are 0, inode numbers made of the path."""
        import zlib

        in_proc = node.path.startswith("/proc")
        head = (
            node.mode,
            node.inode or zlib.crc32(node.path.encode()) | 1,
            21 if in_proc else 22,
            1,
            node.uid,
            0,
            node.size,
        )
        times = {f"st_{which}time_ns": 0 for which in "amc"}
        return os.stat_result(
            (*head, 0, 0, 0),
            {"st_blksize": block_size(node), "st_blocks": 0, "st_rdev": 0, **times},
        )


def block_size(node: Node) -> int:
    """st_blksize, which is also the size of Python's buffer (rule FD-003)."""
    return 1024 if node.path.startswith("/proc") else 4096
