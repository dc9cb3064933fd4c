"""A tool that reads page tables as they are to be read: what it cannot know it does not say. It knows no pmcore.

Runs on a real kernel and on a machine in its place.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
PAGEMAP_SCAN = 0xC0606610
WPALLOWED, WRITTEN, PRESENT, SWAPPED = 1, 2, 8, 16
#: Categories that newer headers have; a kernel may know fewer.
CATEGORIES = (1 << 7, 1 << 8, 1 << 9)
SWAP_AREAS = 23


def maps(pid, areas=None):
    """Start and end of each mapping, or of its part in `areas`."""
    return [(start, end) for start, end, _ in mappings(pid, areas)]


def mappings(pid, areas=None):
    """The same, and whether there is a file behind it."""
    for start, end, file in _maps(pid):
        if areas is None:
            yield start, end, file
            continue
        for low, high in areas:
            if start < high and low < end:
                yield max(start, low), min(end, high), file


def _maps(pid):
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            words = line.split()
            start, end = (int(number, 16) for number in words[0].split("-"))
            if end <= 1 << 47:
                yield start, end, words[4] != "0"


def kernel():
    """The version, from /proc/version: (6, 12)."""
    with open("/proc/version") as file:
        found = re.search(r"(\d+)\.(\d+)", file.read())
    return int(found[1]), int(found[2])


def scan(file, start, end, *, mask=0, anyof=0, shown, room=64, pages=0, flags=0):
    """All regions of a range, however many calls that takes."""
    vec = (ctypes.c_uint64 * (3 * room))()
    found = []
    while start < end:
        argument = bytearray(
            struct.pack(
                "=12Q", 96, flags, start, end, 0, ctypes.addressof(vec), room, pages, 0, mask, anyof, shown
            )
        )
        number = fcntl.ioctl(file, PAGEMAP_SCAN, argument)
        found += [tuple(vec[3 * i : 3 * i + 3]) for i in range(number)]
        reached = struct.unpack("=12Q", argument)[4]
        # walk_end can be stale; what is behind the last region has not been told yet either way.
        start = max(reached, found[-1][1] if number else start)
        if number < room and not pages:
            break
    return found


def known_categories(file):
    """Each category of newer kernels is tried with an empty range."""
    known = 0x7F
    for category in CATEGORIES:
        try:
            fcntl.ioctl(file, PAGEMAP_SCAN, bytearray(struct.pack("=12Q", 96, 0, 0, 0, *[0] * 7, category)))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            known |= category
    return known


def has_scan(file):
    try:
        fcntl.ioctl(file, PAGEMAP_SCAN, bytearray(struct.pack("=12Q", 96, *[0] * 11)))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return False
    return True


def frames(name, pages):
    """The words of a frame file for the pages that have a frame; none where it is not there, or may not be read."""
    try:
        with open(f"/proc/{name}", "rb") as file:
            for page in pages:
                if page["pfn"]:
                    file.seek(page["pfn"] * 8)
                    yield page, struct.unpack("=Q", file.read(8))[0]
    except (PermissionError, FileNotFoundError):
        return


def idle(pages):
    """Whether pages that were marked idle have been used since: reading the bitmap looks."""
    try:
        with open("/sys/kernel/mm/page_idle/bitmap", "rb", buffering=0) as file:
            for page in pages:
                if page["pfn"]:
                    word = os.pread(file.fileno(), 8, page["pfn"] // 64 * 8)
                    yield page, bool(struct.unpack("=Q", word)[0] >> page["pfn"] % 64 & 1)
    except (PermissionError, FileNotFoundError):
        return


def careful(pid, areas=None):
    """What is where in the process, or in `areas` of it: see the protocol."""
    version, pages = kernel(), []
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        scanning = has_scan(file)
        if scanning:
            assert known_categories(file) & 0x7F == 0x7F
        for start, end, behind in mappings(pid, areas):
            file.seek(start // PAGE * 8)
            entries = struct.unpack(f"={(end - start) // PAGE}Q", file.read((end - start) // PAGE * 8))
            spans = [_page(word, start + i * PAGE, version, behind) for i, word in enumerate(entries)]
            if scanning:
                _written(file, start, end, spans)
            pages += spans
    # The bitmap comes first: what kpageflags shows of idle pages is true after that.
    for page, bit in idle(pages):
        page["idle"] = bit
    for key, name in (("flags", "kpageflags"), ("mapcount", "kpagecount"), ("cgroup", "kpagecgroup")):
        for page, word in frames(name, pages):
            page[key] = word
    return {"pages": pages}


def _page(word, address, version, behind):
    present, other = word >> 63 & 1, word >> 62 & 1
    page = {"start": address, "end": address + PAGE, "present": bool(present)}
    shifts = version < (4, 2)
    page["swapped"] = bool(other and not present and word & 31 < SWAP_AREAS)
    if other and not present and not word & (1 << 55) - 1:
        page["swapped"] = None  # hidden
    page["file"] = bool(word >> 61 & 1) if version >= (3, 5) else None
    page["soft_dirty"] = None if shifts else bool(word >> 55 & 1)
    page["exclusive"] = None if shifts else bool(word >> 56 & 1)
    page["uffd_wp"] = bool(word >> 57 & 1) if version >= (5, 13) else None
    page["guard"] = bool(word >> 58 & 1) if version >= (6, 15) else None
    pfn = word & (1 << 55) - 1 if present else 0
    # What a file has, and other processes have mapped of it, pagemap does not tell; nor what is in the swap cache.
    empty = not present and not other
    page["allocated"] = None if (empty and behind) or (other and not page["swapped"]) else not empty
    page["in_core"] = True if present else False if empty and not behind else None
    page["flags"] = page["mapcount"] = page["cgroup"] = page["written"] = page["idle"] = None
    page["pfn"] = pfn or None  # 0: hidden
    return page


def _written(file, start, end, spans):
    for low, high, categories in scan(file, start, end, mask=WPALLOWED, shown=WPALLOWED | WRITTEN):
        for address in range(low, high, PAGE):
            spans[(address - start) // PAGE]["written"] = bool(categories & WRITTEN)
