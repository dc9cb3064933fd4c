"""A machine's /proc and /sys as a tree of paths whose files are bytes at offsets, over any kernel of the protocols.

This is the one source behind every way in which a tool is run on a simulated machine or a recording: a mounted file
system, a patched Python process, plain files. It touches no operating system, and renders nothing that the backend
does not answer: which files there are is `Kernel.files()` and `Process.files()`; others are ENOENT.

    view = ProcView(machine, self_pid=1)                 # any pmcore.protocols.Kernel
    node = view.node("/proc/1/pagemap")                  # Missing (FileNotFoundError, ENOENT) where there is none
    node.mode, node.size, node.uid, node.is_dir          # as stat(2): sizes are 0, as the kernel shows them
    view.node("/proc").names()                           # listing of a directory
    view.node("/proc/self").target                       # a link, where `self_pid` was given

    file = view.open("/proc/1/pagemap", os.O_RDONLY, Opener.user(1000))   # or node.open(flags, opener)
    file.read(offset, size)          # bytes; at most `size`, often fewer (texts come in whole records); b"" at the end
    file.write(offset, data)         # bytes taken
    file.ioctl(PAGEMAP_SCAN, argument, memory)           # return value; `argument` is a bytearray, changed in place
    file.close()

- `Opener` says who opens: user and capabilities (`ROOT`, the default, may everything; `Opener.user(uid)` has no
  capability). An open file shows what its opener may see, whoever reads it (rule AC-003). Tasks belong to `owner`.
- `memory` is the caller's memory, anything with `write(address, data)` (`CallerMemory`): PAGEMAP_SCAN puts its regions
  where `vec` points, PROCMAP_QUERY (on maps) the name where `vma_name_addr` points.
- Every refusal is an OSError with the kernel's errno (pmcore's SyscallErrors are OSErrors). An ioctl that fails
  half-way has changed `argument` and memory as the kernel would have.
- An open file keeps no position: seeking is the caller's business, as is EBADF for a file opened the wrong way.
- Not thread-safe: callers take turns.
"""

from __future__ import annotations

from pmcore.procview.files import OpenFile
from pmcore.procview.ioctls import CallerMemory
from pmcore.procview.opener import ROOT, Capability, Opener
from pmcore.procview.tree import Node, ProcView

__all__ = ["ROOT", "CallerMemory", "Capability", "Node", "OpenFile", "Opener", "ProcView"]
