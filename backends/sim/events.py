"""What happened, for observers: faults, allocations, changes of entries and of flags, as values that carry arrays.

Nothing of this exists while nobody looks. While somebody does, the machine's objects are of subclasses whose public
methods are bracketed: what a call changed is found by comparing the page tables and the frame table before and after
it, faults and allocations are noted on the way. Events are told after the call, in order; within a call faults,
allocations and frees come first, as they happened, then what changed. Observing changes nothing of the state.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import numpy as np
from numpy.typing import NDArray

from pmcore.arrays import U64Array
from pmcore.backends.sim.physical.buddy import MAX_ORDER, Zone
from pmcore.backends.sim.virtual.pte import FIELD, LEAF, PRESENT, SPECIAL, UFFD_WP
from pmcore.backends.sim.virtual.zap import swap_entries
from pmcore.errors import AddressSpaceFault

if TYPE_CHECKING:
    from pmcore.backends.sim.machine import Core, SimMachine
    from pmcore.backends.sim.physical.buddy import Pfns
    from pmcore.backends.sim.virtual.space import AddressSpace

__all__ = ["Allocation", "EntryChange", "Event", "Fault", "FlagChange", "Free", "observing"]

_FIELD, _PRESENT, _SPECIAL = np.uint64(FIELD), np.uint64(PRESENT), np.uint64(SPECIAL)


@attrs.frozen(kw_only=True, eq=False)
class Event:
    """Base of all events; `call` is the public method during which it happened."""

    call: str


@attrs.frozen(kw_only=True, eq=False)
class Fault(Event):
    """Page faults of one sort that came one after the other: an array of addresses, ascending.

    `outcome` is what they came to: "zero page", "new page", "copy", "reused", "swapped in", "huge page",
    "huge zero page", "mapped by PTEs", "unprotected", "again" (another fault follows), "SIGSEGV", "SIGBUS", ....
    """

    pid: int
    write: bool
    addresses: U64Array
    outcome: str


@attrs.frozen(kw_only=True, eq=False)
class Allocation(Event):
    """Blocks of 2**order frames taken from the buddy allocator, by their first frame."""

    pfns: Pfns
    order: int


@attrs.frozen(kw_only=True, eq=False)
class Free(Event):
    """Blocks of 2**order frames given back to the buddy allocator, by their first frame."""

    pfns: Pfns
    order: int


@attrs.frozen(kw_only=True, eq=False)
class EntryChange(Event):
    """Entries that changed, by address; the words are those of `virtual/pte.py`. `level` 0: PTEs, 1: huge PMDs."""

    pid: int
    level: int
    addresses: U64Array
    old: U64Array
    new: U64Array


@attrs.frozen(kw_only=True, eq=False)
class FlagChange(Event):
    """Frames whose flags changed (KPF_* bits, and those of `physical/frames.py`)."""

    pfns: Pfns
    old: U64Array
    new: U64Array


class _Pending(NamedTuple):
    """Faults whose handler has not returned yet."""

    mm: AddressSpace
    addresses: U64Array
    write: bool
    old: U64Array


class _Entries(NamedTuple):
    """One level of an address space's tables."""

    addresses: U64Array
    words: U64Array


class _Observer:
    """Brackets the calls of one machine, and tells what they did."""

    def __init__(self, machine: SimMachine) -> None:
        self.machine = machine
        self.tellers: list[Callable[[Event], object]] = []
        self._depth = 0
        self._call = ""
        self._events: list[Event] = []
        self._pending: _Pending | None = None
        self._inside_zone = False
        self._flags: U64Array = np.zeros(0, dtype=np.uint64)
        self._spaces: dict[int, tuple[_Entries, _Entries]] = {}

    # -- coming and going ------------------------------------------------------------------------------

    def arm(self) -> None:
        """Have every object there is now bracketed, and remember the state."""
        for thing in self._things():
            if not hasattr(type(thing), "observed_class"):
                thing.__class__ = _bracketed(type(thing))
            thing.observer = self
        for zone in self.machine.core.memory.zones:
            zone.__class__ = _ObservedZone
            zone.observer = self  # type: ignore[attr-defined]
        self.machine.core.on_fault = self._fault
        self._remember()

    def disarm(self) -> None:
        """Have everything be what it was."""
        for thing in (*self._things(), *self.machine._known.values()):
            if hasattr(type(thing), "observed_class"):
                thing.__class__ = type(thing).observed_class
                del thing.observer
        for zone in self.machine.core.memory.zones:
            zone.__class__ = Zone
            del zone.observer  # type: ignore[attr-defined]
        self.machine.core.on_fault = None

    def _things(self) -> Iterator[Any]:
        yield self.machine
        for task in self.machine._tasks.values():
            yield task
            yield task.process

    # -- one call --------------------------------------------------------------------------------------

    def bracket(self, call: str, pid: int, function: Callable[[], Any], *, write: bool) -> Any:
        """Do it, and tell what came of it. Calls within the call, and those of observers, are not told apart."""
        if self._depth:
            return function()
        self._depth, self._call = 1, call
        try:
            try:
                return function()
            except AddressSpaceFault as fault:
                self._refused(pid, fault, write=write)
                raise
            finally:
                self._settle()
                self._compare()
                self.arm()
                events, self._events = self._events, []
                for event in events:
                    for tell in tuple(self.tellers):
                        tell(event)
        finally:
            self._depth = 0

    def _pid(self, mm: AddressSpace) -> int:
        return next((pid for pid, task in self.machine._tasks.items() if task.mm is mm), 0)

    # -- faults ----------------------------------------------------------------------------------------

    def _fault(self, mm: AddressSpace, addresses: int | U64Array, write: bool) -> None:
        """Told by the fault handler before it does anything."""
        self._settle()
        if isinstance(addresses, int):
            addresses = np.array([addresses], dtype=np.uint64)
        if len(addresses):
            self._pending = _Pending(mm, addresses, write, self._words(mm, addresses))

    def _settle(self) -> None:
        """The handler of the last faults has done its work: what did they come to?"""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        new = self._words(pending.mm, pending.addresses)
        outcomes = _outcomes(pending.old, new, pending.write)
        names = np.unique(outcomes)
        if len(names) == 1:
            groups = [(str(names[0]), np.arange(len(new)))]
        else:
            groups = [(str(name), np.flatnonzero(outcomes == name)) for name in names]
        pid = self._pid(pending.mm)
        for name, index in groups:
            self._note(pid, pending.write, pending.addresses[index], name)

    def _note(self, pid: int, write: bool, addresses: U64Array, outcome: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, Fault) and (last.pid, last.write, last.outcome) == (pid, write, outcome):
            joined = np.concatenate([last.addresses, addresses])
            self._events[-1] = attrs.evolve(last, addresses=joined)
            return
        self._events.append(
            Fault(call=self._call, pid=pid, write=write, addresses=addresses, outcome=outcome)
        )

    def _refused(self, pid: int, fault: AddressSpaceFault, *, write: bool) -> None:
        """An access that came to a signal, before a handler began or in it."""
        pending = self._pending
        if pending is not None and int(pending.addresses[-1]) == fault.address:
            write, self._pending = pending.write, None
        else:
            self._settle()
        self._note(pid, write, np.array([fault.address], dtype=np.uint64), fault.signal)

    def _words(self, mm: AddressSpace, addresses: U64Array) -> U64Array:
        """The entries of the pages, PMDs that map huge pages for those that they cover."""
        pool, tables = self.machine.core.pool, mm.tables
        if len(addresses) == 1:
            addr = int(addresses[0])
            slot = tables.pmd_slot(addr)
            word = pool.at[slot] if slot >= 0 else 0
            if word and not word & LEAF:
                word = pool.at[tables.pte_slot(addr)]
            return np.array([word], dtype=np.uint64)
        found = np.zeros(len(addresses), dtype=np.uint64)
        size = self.machine.core.geometry.page_size
        for extent in tables.extents(int(addresses[0]) & -size, int(addresses[-1]) + size & -size):
            low, high = np.searchsorted(
                addresses, np.array([extent.start, extent.end], dtype=np.uint64)
            ).tolist()
            index = (addresses[low:high] - np.uint64(extent.start)) // np.uint64(extent.size)
            found[low:high] = extent.entries[index.astype(np.intp)]
        return found

    # -- frames ----------------------------------------------------------------------------------------

    def zone(self, function: Callable[[], Any], note: Callable[[Any], Event]) -> Any:
        """A request to the buddy allocator; what it does to itself meanwhile is not told."""
        if self._inside_zone or not self._depth:
            return function()
        self._inside_zone = True
        try:
            result = function()
        finally:
            self._inside_zone = False
        event = note(result)
        if len(event.pfns):  # type: ignore[attr-defined]
            self._events.append(event)
        return result

    def allocated(self, pfns: Pfns, order: int) -> Event:
        """Frames were taken."""
        return Allocation(call=self._call, pfns=pfns, order=order)

    def freed(self, pfns: Pfns, order: int) -> Event:
        """Frames were given back."""
        return Free(call=self._call, pfns=pfns, order=order)

    # -- what changed ----------------------------------------------------------------------------------

    def _remember(self) -> None:
        core = self.machine.core
        self._flags = core.memory.frames.flags.copy()
        self._spaces = {pid: _levels(core, task.mm) for pid, task in self.machine._tasks.items()}

    def _compare(self) -> None:
        core = self.machine.core
        now = {pid: _levels(core, task.mm) for pid, task in self.machine._tasks.items()}
        nothing = _Entries(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint64))
        for pid in sorted(now.keys() | self._spaces.keys()):
            before = self._spaces.get(pid, (nothing, nothing))
            for level, (old, new) in enumerate(zip(before, now.get(pid, (nothing, nothing)), strict=True)):
                addresses, was, becomes = _changes(old, new)
                if len(addresses):
                    self._events.append(
                        EntryChange(
                            call=self._call, pid=pid, level=level, addresses=addresses, old=was, new=becomes
                        )
                    )
        flags = core.memory.frames.flags
        count = min(len(flags), len(self._flags))
        changed = np.flatnonzero(flags[:count] != self._flags[:count])
        changed = np.concatenate([changed, np.flatnonzero(flags[count:]) + count])
        if len(changed):
            shown = np.zeros(len(changed), dtype=np.uint64)
            there = changed < count
            shown[there] = self._flags[changed[there]]
            self._events.append(FlagChange(call=self._call, pfns=changed, old=shown, new=flags[changed]))


class _ObservedZone(Zone):
    """A zone that somebody watches."""

    observer: _Observer

    def take(self, order: int) -> int:
        """As `Zone.take`."""
        watch = self.observer

        def note(pfn: int) -> Event:
            return watch.allocated(np.array([pfn] if pfn >= 0 else [], dtype=np.int64), order)

        return int(watch.zone(lambda: Zone.take(self, order), note))

    def take_one(self) -> int:
        """As `Zone.take_one`."""
        return self.take(0)

    def take_pages(self, count: int) -> Pfns:
        """As `Zone.take_pages`."""
        watch = self.observer
        found: Pfns = watch.zone(lambda: Zone.take_pages(self, count), lambda pfns: watch.allocated(pfns, 0))
        return found

    def take_run(self, pages: int) -> int:
        """As `Zone.take_run`: told as the blocks that it consists of."""
        watch = self.observer
        order = MAX_ORDER

        def note(pfn: int) -> Event:
            end = pfn + pages if pfn >= 0 else pfn
            return watch.allocated(np.arange(pfn, end, 1 << order, dtype=np.int64), order)

        return int(watch.zone(lambda: Zone.take_run(self, pages), note))

    def take_blocks(self, order: int, count: int) -> Pfns:
        """As `Zone.take_blocks`."""
        watch: _Observer = self.observer
        found: Pfns = watch.zone(
            lambda: Zone.take_blocks(self, order, count), lambda pfns: watch.allocated(pfns, order)
        )
        return found

    def give(self, pfn: int, order: int) -> None:
        """As `Zone.give`."""
        watch = self.observer
        given = np.array([pfn], dtype=np.int64)
        watch.zone(lambda: Zone.give(self, pfn, order), lambda _: watch.freed(given, order))

    def give_one(self, pfn: int) -> None:
        """As `Zone.give_one`."""
        self.give(pfn, 0)

    def give_pages(self, pfns: Pfns, order: int = 0) -> None:
        """As `Zone.give_pages`."""
        watch = self.observer
        watch.zone(lambda: Zone.give_pages(self, pfns, order), lambda _: watch.freed(pfns.copy(), order))


_CLASSES: dict[type, type] = {}


def _bracketed(kind: type) -> type:
    """A subclass of `kind` whose public methods an observer brackets; made once."""
    if kind in _CLASSES:
        return _CLASSES[kind]
    members: dict[str, Any] = {"observed_class": kind, "__doc__": kind.__doc__, "__module__": kind.__module__}
    for name, member in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_") and name not in ("observe", "adopt", "forget", "tasks"):
            members[name] = _bracket(name, member)
    _CLASSES[kind] = types.new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(members))
    return _CLASSES[kind]


def _bracket(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def bracketed(self: Any, *arguments: Any, **named: Any) -> Any:
        write = name == "write" or (name == "touch" and bool(named.get("write", True)))
        pid = getattr(self, "pid", 0)
        return self.observer.bracket(name, pid, lambda: method(self, *arguments, **named), write=write)

    return bracketed


def _levels(core: Core, mm: AddressSpace) -> tuple[_Entries, _Entries]:
    """All entries of an address space that are not empty: PTEs, and PMDs that map huge pages."""
    pieces: tuple[list[_Entries], list[_Entries]] = ([], [])
    for extent in mm.tables.extents(0, core.geometry.task_size):
        index = np.flatnonzero(extent.entries)
        addresses = np.uint64(extent.start) + index.astype(np.uint64) * np.uint64(extent.size)
        pieces[extent.huge].append(_Entries(addresses, extent.entries[index]))
    empty: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
    small, huge = (
        _Entries(
            np.concatenate([empty, *(part.addresses for part in level)]),
            np.concatenate([empty, *(part.words for part in level)]),
        )
        for level in pieces
    )
    return small, huge


def _changes(old: _Entries, new: _Entries) -> tuple[U64Array, U64Array, U64Array]:
    """Addresses whose entries differ, with both words (0: empty)."""
    if np.array_equal(old.addresses, new.addresses):
        index = np.flatnonzero(old.words != new.words)
        return new.addresses[index], old.words[index], new.words[index]
    addresses = np.union1d(old.addresses, new.addresses)
    words = []
    for side in (old, new):
        column = np.zeros(len(addresses), dtype=np.uint64)
        column[np.searchsorted(addresses, side.addresses)] = side.words
        words.append(column)
    differ = np.flatnonzero(words[0] != words[1])
    return addresses[differ], words[0][differ], words[1][differ]


def _outcomes(old: U64Array, new: U64Array, write: bool) -> NDArray[np.str_]:
    """What faults came to, by the entries before and after."""
    was, present = (old & _PRESENT) != 0, (new & _PRESENT) != 0
    leaf = (new & np.uint64(LEAF)) != 0
    special = (new & _SPECIAL) != 0
    slot = swap_entries(old)
    moved = was & present & (((old ^ new) & _FIELD) != 0)
    split = was & ((old & np.uint64(LEAF)) != 0) & ~leaf
    conditions = [
        ~present,
        split,
        was & leaf & moved,
        moved,
        was & ((old & np.uint64(UFFD_WP)) != 0) & ((new & np.uint64(UFFD_WP)) == 0),
        was,
        slot,
        special & leaf,
        special,
        leaf,
    ]
    names = [
        "again",
        "mapped by PTEs",
        "huge page",
        "copy",
        "unprotected",
        "reused",
        "swapped in",
        "huge zero page",
        "zero page",
        "huge page",
    ]
    return np.select(conditions, names, "new page")


@contextmanager
def observing(machine: SimMachine, tell: Callable[[Event], object] | None) -> Iterator[list[Event]]:
    """See `SimMachine.observe`."""
    collected: list[Event] = []
    teller = collected.append if tell is None else tell
    observer: _Observer | None = getattr(machine, "observer", None)
    if observer is None:
        observer = _Observer(machine)
        observer.arm()
    observer.tellers.append(teller)
    try:
        yield collected
    finally:
        with suppress(ValueError):
            observer.tellers.remove(teller)
        if not observer.tellers:
            observer.disarm()
