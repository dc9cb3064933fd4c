"""A tool that asks maps by PROCMAP_QUERY: `python asking.py FILE` reads questions, and prints what came.

It knows no pmcore. A question is [process, size, flags, address, room for the name, room for the build id]; an answer
is the structure and the name as they are after the call, in hexadecimal, or the errno.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import struct
import sys

_QUERY = 0xC0686611


def ask(questions):
    """The answers, in their order."""
    answers, opened = [], {}
    for pid, size, flags, address, name_room, build_room in questions:
        if pid not in opened:
            opened[pid] = os.open(f"/proc/{pid}/maps", os.O_RDONLY)
        name, build = (
            ctypes.create_string_buffer(room) if room else None for room in (name_room, build_room)
        )
        places = (ctypes.addressof(buffer) if buffer is not None else 0 for buffer in (name, build))
        argument = bytearray(
            struct.pack("=9Q4L2Q", size, flags, address, *[0] * 8, name_room, build_room, *places)
        )
        try:
            fcntl.ioctl(opened[pid], _QUERY, argument)
        except OSError as error:
            answers.append(error.errno)
        else:
            answers.append([argument.hex(), "" if name is None else name.raw.hex()])
    for fd in opened.values():
        os.close(fd)
    return answers


if __name__ == "__main__":
    with open(sys.argv[1]) as file:  # noqa: PTH123
        print(json.dumps(ask(json.load(file))))
