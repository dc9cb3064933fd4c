"""What was seen in tools, each as a reader of its own: `WRONG` by the name of its case. None of them knows of pmcore.

Readers take the process's number and the areas to look at (all of it), and say what they think (docs/validate.md).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct

from .careful import PAGE, PAGEMAP_SCAN, PRESENT, WRITTEN, kernel, maps, scan

FRAME = (1 << 55) - 1


def entries(pid, areas=None):
    """(address, word) of all pages."""
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        for start, end in maps(pid, areas):
            file.seek(start // PAGE * 8)
            data = file.read((end - start) // PAGE * 8)
            yield from zip(range(start, end, PAGE), struct.unpack(f"={len(data) // 8}Q", data), strict=True)


def by_page(told):
    """A reader that tells of each page what `told(word)` says."""

    def reader(pid, areas=None):
        pages = [{"start": at, "end": at + PAGE, **told(word)} for at, word in entries(pid, areas)]
        return {"pages": pages}

    return reader


def one_call(pid, areas=None):
    """wasmtime #14357: walk_end was taken for the end of memory."""
    vec, pages = (ctypes.c_uint64 * (3 * 64))(), []
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        for start, end in maps(pid, areas):
            argument = struct.pack("=12Q", 96, 0, start, end, 0, ctypes.addressof(vec), 64, 0, 0, 8, 0, 8)
            number = fcntl.ioctl(file, PAGEMAP_SCAN, bytearray(argument))
            pages += [{"start": vec[3 * i], "end": vec[3 * i + 1], "present": True} for i in range(number)]
    return {"pages": pages, "keys": ["present"]}


def written_and_present(pid, areas=None):
    """wasmtime #14357: a written page that was swapped out is not PRESENT."""
    pages = []
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        for start, end in maps(pid, areas):
            regions = scan(file, start, end, mask=WRITTEN | PRESENT, shown=WRITTEN)
            pages += [{"start": low, "end": high, "written": True} for low, high, _ in regions]
    return {"pages": pages, "keys": ["written"]}


def every_category(pid, areas=None):
    """CRIU #2334: whatever the header names is asked for."""
    pages = []
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        for start, end in maps(pid, areas):
            regions = scan(file, start, end, anyof=0x3FF, shown=0x3FF)
            pages += [{"start": a, "end": b, "present": bool(c & PRESENT)} for a, b, c in regions]
    return {"pages": pages}


def referenced(pid, areas=None):
    """faasm/faabric #232: the bits that one tracker reads, another has cleared."""
    pages = []
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                start, end = (int(number, 16) for number in found.groups())
            if line.startswith("Referenced:") and list(_cut(start, end, areas)):
                none = int(line.split()[1]) == 0
                pages += [
                    {"start": a, "end": b, "written": False} for a, b in _cut(start, end, areas) if none
                ]
    return {"pages": pages, "keys": ["written"]}


def _cut(start, end, areas):
    for low, high in areas or [(0, 1 << 47)]:
        if start < high and low < end:
            yield max(start, low), min(end, high)


def half_words(pid, areas=None):
    """dwks/pagemap #1: entries as 32-bit words."""
    pages = []
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        for start, end in maps(pid, areas):
            file.seek(start // PAGE * 4 & -8)
            number = (end - start) // PAGE & -2
            for index, word in enumerate(struct.unpack(f"={number}I", file.read(number * 4))):
                at = start + index * PAGE
                pages.append({"start": at, "end": at + PAGE, "present": bool(word >> 31)})
    return {"pages": pages}


def in_core(state, area="a"):
    """firecracker #5274: what the program's own mincore said."""
    start, _ = state.area(area)
    [found] = [outcome.value for outcome in state.outcomes if outcome.value is not None]

    def reader(pid, areas=None):
        pages = [
            {"start": start + i * PAGE, "end": start + (i + 1) * PAGE, "present": bool(bit), "swapped": False}
            for i, bit in enumerate(found)
        ]
        return {"pages": pages}

    return reader


def going_on(pid, areas=None):
    """The first frame of a mapping, and those behind it."""
    pages, expected = [], {}
    for at, word in entries(pid, areas):
        if word >> 63:
            frame = expected.get(at, word & FRAME)
            pages.append({"start": at, "end": at + PAGE, "pfn": frame})
            expected[at + PAGE] = frame + 1
    return {"pages": pages, "keys": ["pfn"]}


def by_rss(pid, areas=None):
    """No Rss, no pages."""
    return _by_smaps(pid, areas, "Rss:", lambda line: {"present": line.split()[1] != "0"})


def by_vm_flags(pid, areas=None):
    """The mapping's flag for its pages'."""
    return _by_smaps(pid, areas, "VmFlags:", lambda line: {"soft_dirty": "sd" in line.split()})


def _by_smaps(pid, areas, wanted, told):
    pages = []
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                start, end = (int(number, 16) for number in found.groups())
            if line.startswith(wanted):
                pages += [{"start": a, "end": b, **told(line)} for a, b in _cut(start, end, areas)]
    return {"pages": pages}


def one_read(pid, areas=None):
    """smaps is what one read gives."""
    fd = os.open(f"/proc/{pid}/smaps", os.O_RDONLY)
    text = os.read(fd, 1 << 20).decode()
    os.close(fd)
    seen = [
        (int(low, 16), int(high, 16))
        for low, high in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", text, re.MULTILINE)
        if int(high, 16) <= 1 << 47
    ]
    told = by_page(lambda word: {"present": present(word)})
    parts = [part for low, high in seen for part in _cut(low, high, areas)]
    return told(pid, parts) if parts else {"pages": [], "keys": ["present"]}


def idle_by_flags(pid, areas=None):
    """What kpageflags shows, without a look at the bitmap."""
    pages = []
    with open("/proc/kpageflags", "rb") as file:
        for at, word in entries(pid, areas):
            if word >> 63:
                file.seek((word & FRAME) * 8)
                [flags] = struct.unpack("=Q", file.read(8))
                pages.append({"start": at, "end": at + PAGE, "idle": bool(flags >> 25 & 1)})
    return {"pages": pages}


def by_own_group(pid, areas=None):
    """The process's group for its pages'."""
    with open(f"/proc/{pid}/cgroup") as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file]
    [(_, name, path)] = [line for line in lines if line[1] in ("", "memory")]
    inode = os.stat(f"/sys/fs/cgroup{'/' + name if name else ''}{path}").st_ino
    return by_page(lambda word: {"cgroup": inode if present(word) else None})(pid, areas)


def two_mib(pid, areas=None):
    """THP in kpageflags: 2 MiB around it."""
    huge, pages = set(), []
    with open("/proc/kpageflags", "rb") as file:
        for at, word in entries(pid, areas):
            if word >> 63:
                file.seek((word & FRAME) * 8)
                if struct.unpack("=Q", file.read(8))[0] >> 22 & 1:
                    huge.add(at >> 21)
    for at, word in entries(pid, areas):
        pages.append({"start": at, "end": at + PAGE, "present": present(word) or at >> 21 in huge})
    return {"pages": pages}


def named(pid, areas=None):
    """What maps gives a name is the file's."""
    with open(f"/proc/{pid}/maps") as file:
        lines = [line.split(None, 5) for line in file]
    names = {int(line[0].split("-")[0], 16): len(line) == 6 for line in lines}
    pages = []
    for start, end in maps(pid, areas):
        pages.append({"start": start, "end": end, "file": names.get(start, False)})
    return {"pages": pages}


def aborts(pid, areas=None):
    """page-types: a bit without a name is fatal."""
    pages = []
    with open("/proc/kpageflags", "rb") as file:
        for at, word in entries(pid, areas):
            if word >> 63:
                file.seek((word & FRAME) * 8)
                [flags] = struct.unpack("=Q", file.read(8))
                if flags >> 27 & 0x1F:
                    raise ValueError("unknown flag bits")
                pages.append({"start": at, "end": at + PAGE, "flags": flags})
    return {"pages": pages}


def head_flags(pid, areas=None):
    """Every frame's own word, as if all kernels showed a tail's folio."""
    pages = aborts(pid, areas)["pages"]
    first = next((page["flags"] for page in pages if page["flags"] >> 15 & 1), 0)
    for page in pages:
        if kernel() < (6, 10) and page["flags"] >> 16 & 1:
            page["flags"] = first ^ 3 << 15
    return {"pages": pages}


def by_flags(told):
    """A reader that tells of each present page what `told(flags)` says, and of the others that they are not there."""

    def reader(pid, areas=None):
        pages = []
        with open("/proc/kpageflags", "rb") as file:
            for at, word in entries(pid, areas):
                if word >> 63:
                    file.seek((word & FRAME) * 8)
                    pages.append(
                        {"start": at, "end": at + PAGE, **told(struct.unpack("=Q", file.read(8))[0])}
                    )
        return {"pages": pages}

    return reader


def present(word):
    return bool(word >> 63)


def told_by_default(pid, areas=None):
    """Nothing is in swap."""
    return {"pages": [], "keys": ["swapped"]}


#: By case: made from the program's run.
WRONG_OF_RUN = {"not-in-core-is-not-gone": in_core}
#: By case.
WRONG = {
    "swapped-out-shared-memory": by_page(lambda w: {"allocated": w != 0}),
    "not-mapped-here-is-not-absent": by_page(lambda w: {"in_core": present(w), "allocated": w != 0}),
    "hugetlb-is-no-rss": by_rss,
    "poisoned-pages-are-not-swapped": by_page(lambda w: {"swapped": bool(w >> 62 & 1)}),
    "answered-with-poison": by_page(lambda w: {"swapped": bool(w >> 62 & 1)}),
    "idle-until-somebody-looks": idle_by_flags,
    "charged-to-who-touched-first": by_own_group,
    "what-was-read-is-in-memory": by_page(lambda w: {"in_core": present(w)}),
    "the-mapping-and-its-pages": by_vm_flags,
    "a-huge-page-need-not-be-2-mib": two_mib,
    "one-read-is-not-all": one_read,
    "frames-do-not-go-on": going_on,
    "walk-end-is-not-the-end": one_call,
    "dirty-and-swapped": written_and_present,
    "categories-come-with-kernels": every_category,
    "clear-bit-without-registration": by_page(lambda w: {"written": present(w) and not w >> 57 & 1}),
    "clear-refs-is-for-everybody": referenced,
    "hidden-frame-numbers": by_page(
        lambda w: {"present": present(w), "pfn": w & FRAME if present(w) else None}
    ),
    "words-are-64-bits": half_words,
    "not-empty-is-not-swapped": by_page(lambda w: {"swapped": bool(w >> 62 & 1)}),
    "marker-before-bit-58": by_page(lambda w: {"swapped": bool(w >> 62 & 1)}),
    "protected-pages": by_page(lambda w: {"uffd_wp": present(w) and bool(w >> 57 & 1)}),
    "unknown-flag-bits": aborts,
    "one-frame-many-pages": by_page(lambda w: {"exclusive": present(w)}),
    "mapped-twice-by-one": by_page(lambda w: {"exclusive": present(w)}),
    "private-copies-are-not-the-file": named,
    "the-zero-page": by_page(lambda w: {"exclusive": present(w)}),
    "tails-and-their-folio": head_flags,
    "a-new-mapping-is-soft-dirty": by_page(lambda w: {"soft_dirty": present(w) and bool(w >> 55 & 1)}),
    "swap-field-is-no-frame": by_page(lambda w: {"pfn": w & FRAME or None}),
    "bits-of-old-kernels": by_page(lambda w: {"soft_dirty": bool(w >> 55 & 1), "guard": bool(w >> 58 & 1)}),
    "no-scan-before-6.7": every_category,
    "empty-pages-are-written": by_page(lambda w: {"written": present(w) and not w >> 57 & 1}),
    "merged-pages": by_page(lambda w: {"exclusive": present(w) and not w >> 61 & 1}),
    "in-the-swap-cache": by_flags(lambda flags: {"swapped": bool(flags >> 13 & 1)}),
    "lazily-freed": by_flags(lambda flags: {"present": bool(flags >> 14 & 1) or not flags >> 12 & 1}),
    "hugetlb-pages": by_page(
        lambda w: {"present": present(w), "pfn": w & FRAME & -512 if present(w) else None}
    ),
}
