"""Letting ksmd make an exact number of full scans, and unmerging; the knobs of /sys/kernel/mm/ksm.

ksmd scans, then sleeps for `sleep_millisecs`, an hour here. Writing another number there wakes it for one more scan;
between the two we wait until it sleeps, so that no wake-up is lost and none is one too many.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

from pmcore.errors import BackendUnavailable, NotModelled, syscall_error

__all__ = ["COUNTERS", "KNOBS", "TURNED", "Ksmd"]

_DIRECTORY = Path("/sys/kernel/mm/ksm")
_HOUR = 3_600_000
_SHARING = 256
#: What a still machine has; in this order, because the adviser refuses a number of pages by hand.
KNOBS = {
    f"{_DIRECTORY}/{name}": value
    for name, value in {
        "run": "0",
        "advisor_mode": "none",
        "smart_scan": "0",
        "use_zero_pages": "0",
        # As many as there are: a full scan is one piece.
        "pages_to_scan": "1000000000",
        "sleep_millisecs": str(_HOUR),
        # Look at all copies of a node each time, not once in two seconds.
        "stable_node_chains_prune_millisecs": "0",
    }.items()
}
#: Those that are turned while the machine is still: put back even if they were as wanted before.
TURNED = tuple(
    f"{_DIRECTORY}/{name}" for name in ("run", "use_zero_pages", "max_page_sharing", "sleep_millisecs")
)
#: Counters that a scan is answered with. Without ksm_zero_pages: forks count those of mappings that they left out, too.
COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
#: Seconds for one scan.
_PATIENCE = 30.0
_MADV_MERGEABLE = 12


class Ksmd:
    """The kernel's ksmd, led by the hand. The machine is to be held still (`steady`), which sets `KNOBS`."""

    def __init__(self) -> None:
        self._pid = _find("ksmd")
        if self._pid is None or not (_DIRECTORY / "run").exists():
            raise BackendUnavailable(
                "no ksmd is there to be led", remedy="a kernel with CONFIG_KSM, and root"
            )
        # ksmd does nothing at all while nobody has asked for merging. This mapping never holds a page.
        self._watched = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._watched.madvise(_MADV_MERGEABLE)
        self._nap = _HOUR

    def close(self) -> None:
        """Let go of the mapping; whatever is still merged by others stays as it is."""
        self._watched.close()

    def scan(
        self, full_scans: int, *, use_zero_pages: bool, max_page_sharing: int, ours: Iterable[int]
    ) -> dict[str, int]:
        """Exactly that many full scans; the counters afterwards. `ours` are the processes that may be merged.

        Raises Busy where pages are shared and `max_page_sharing` is another than before, BackendUnavailable where ksmd
        does not come to an end.
        """
        _alone(ours)
        _write("max_page_sharing", max_page_sharing)
        _write("use_zero_pages", int(use_zero_pages))
        try:
            for number in range(full_scans):
                done = _read("full_scans")
                if number:
                    self._wake()
                else:
                    _write("run", 1)
                self._wait(done)
        finally:
            _write("run", 0)
            self._wake()
            self._wait(None)
            _write("use_zero_pages", 0)
        return self.counters()

    def unmerge(self, ours: Iterable[int]) -> dict[str, int]:
        """Give everybody pages of their own again, and forget all that was found; the counters afterwards."""
        _alone(ours)
        self._forget()
        return self.counters()

    def reset(self) -> None:
        """Forget what dead processes have left, and take the default for `max_page_sharing`."""
        self._forget()
        _write("max_page_sharing", _SHARING)

    def _forget(self) -> None:
        _write("run", 2)
        _write("run", 0)

    def counters(self) -> dict[str, int]:
        """`COUNTERS` now."""
        return {name: _read(name) for name in COUNTERS}

    def _wake(self) -> None:
        self._nap = _HOUR + 1 if self._nap == _HOUR else _HOUR
        _write("sleep_millisecs", self._nap)

    def _wait(self, done: int | None) -> None:
        """Until there are more than `done` full scans (None: anyway), and ksmd sleeps."""
        deadline = time.monotonic() + _PATIENCE
        while _read("full_scans") == done or _state(self._pid) != "S":
            if time.monotonic() > deadline:
                raise BackendUnavailable("ksmd does not come to the end of its scan")
            time.sleep(0.0002)


def _find(name: str) -> int | None:
    """The kernel thread of that name."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text() == f"{name}\n":
                return int(comm.parent.name)
        except OSError:
            continue
    return None


def _alone(ours: Iterable[int]) -> None:
    """See that nobody else's pages are merged with ours. Raises NotModelled: such a step is not compared."""
    others = _asking({os.getpid(), *ours})
    if others:
        raise NotModelled(
            "merging while others ask for it", remedy=f"try again when these have ended: {', '.join(others)}"
        )


def _asking(ours: set[int]) -> list[str]:
    """Processes that ksmd would look at, but for ours."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) not in ours:
            try:
                with open(f"/proc/{entry.name}/ksm_stat") as file:  # noqa: PTH123
                    words = file.read().split()
            except OSError:
                continue
            known = dict(zip(words[::2], words[1::2], strict=False))
            if known.get("ksm_rmap_items", "0") != "0" or (
                known.get("ksm_mergeable:") == "yes" and _holds_pages(entry.name)
            ):
                found.append(entry.name)
    return found


def _holds_pages(pid: str) -> bool:
    """Whether mappings that are to be merged hold any: the one of another workbench never does."""
    try:
        text = Path(f"/proc/{pid}/smaps").read_text()
    except OSError:
        return True
    held = 0
    for line in text.splitlines():
        if line.startswith("Anonymous:"):
            held = int(line.split()[1])
        elif line.startswith("VmFlags:") and held and " mg" in line:
            return True
    return False


def _state(pid: int | None) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _read(name: str) -> int:
    return int((_DIRECTORY / name).read_text())


def _write(name: str, value: int) -> None:
    try:
        (_DIRECTORY / name).write_text(str(value))
    except OSError as error:
        raise syscall_error(error.errno or 0, f"write({_DIRECTORY / name}, {value})") from None
