"""A Python process whose /proc and /sys are a machine's: a simulated one, a recording, any kernel of the protocols.

    with fake_proc(machine, pid=task.pid):
        tool.main()     # opens /proc/self/pagemap, seeks, reads, calls fcntl.ioctl: answered by the machine

While the context lasts, these answer from the machine for paths below /proc and /sys, and go through untouched for
all others: `open`, `io.open`, `os.fdopen`, `os.open`, `read`, `readv`, `pread`, `preadv`, `write`, `writev`, `pwrite`,
`lseek`, `fstat`, `ftruncate`, `dup`, `dup2`, `close`, `listdir`, `scandir`, `walk`, `stat`, `lstat`, `access`,
`readlink`, `os.path`, `pathlib`, `glob`, `fcntl.ioctl` (PAGEMAP_SCAN and PROCMAP_QUERY fill the caller's own memory),
and of the machine as such `resource.getpagesize`, `os.sysconf` (page size, pages of memory), `mmap.PAGESIZE`,
`os.kill(pid, 0)` and, where `pid` is given, `os.getpid`. Modules that a platform lacks (`fcntl`, `resource`), functions
and constants of `os` and `mmap` are there for the time: import the tool inside the context on such a platform.

Files behave as the kernel's do (rules FS-): whole words, whole records, seeking, permission by `opener`, errno.

Limits:

- Only what Python code of this process does through these names. Names that a module took before (`from os import
  pread`) are found and replaced, in modules outside the standard library; what a class, a closure or a default
  argument holds is not. Extension modules that call the C library, `io.FileIO(path)`, `mmap`, and other processes
  do not see the machine; C code that is given a descriptor finds it not readable (EBADF).
- `numpy.fromfile` copies the descriptor with `os.dup` and reads it in C: it is given a sparse file of what the machine
  shows at that moment (not of pagemap on Windows). With count=-1 that works, where a kernel refuses to seek to the end.
- Links that lead into /proc from elsewhere, and relative paths, are not followed into the machine. What changes a
  file system (`os.unlink`, `mkdir`, `chdir`, ...) is refused below /proc and /sys (NotModelled).
- The replacement is of the whole process: all threads see it, calls take turns, and a context ends for all of them.
  Contexts nest: the innermost answers, files stay with the one that opened them, and answer EBADF after it.
- `os.getuid` and the like stay real: privilege is that of `opener`. So does `os.uname`; /proc/version is the machine's.
"""

from __future__ import annotations

from pmcore.testing.fakeproc.fake import FakeProc, fake_proc

__all__ = ["FakeProc", "fake_proc"]
