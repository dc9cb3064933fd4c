"""The program that runs inside a task: it obeys one request after the other and touches nothing else.

Run as `python -I -S -B _child.py FD`. It imports next to nothing, never collects garbage, and keeps its own memory away
from the addresses under test: all of it was mapped before the first step, and malloc does not reach down there.

A request is a header (length of a JSON text, length of a payload), the text, the payload; an answer looks the same.
`fork` answers with the new task's channel attached to the message. End of file on the channel ends the task.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import platform
import signal
import socket
import struct
import sys
from typing import Any

HEADER = struct.Struct("=II")
#: x86-64: read(address, step, count, buffer, fault) and write(...), one byte every `step` bytes, in user mode; a signal
#: handler that makes them return early with the signal and the address in `fault`. Any other fault kills as usual.
#:
#:   0x00 read:    for (i = 0; i < count; i++, address += step) { byte b = *address; if (buffer) buffer[i] = b; }
#:   0x20 write:   the same, with *address = buffer[i], or a locked *address |= 0 without a buffer: one write
#:                 access; without the lock an emulated processor reads first, and has two faults
#:   0x50 recover: fault[0] = signal | code << 8 | address_lsb << 40; fault[1] = address; return i
#:   0x60 handler: if the faulting instruction lies before 0x58: go on at recover; otherwise restore the default action
_CODE = bytes.fromhex(
    "31c04839d07314448a1f4885c9740444881c014801f748ffc0ebe7c30f1f400031c04839d0731a4885c97409448a1c01"
    "44881feb04f0800f004801f748ffc0ebe1c3662e0f1f8400000000000f1f40004d89084d895008c30f1f840000000000"
    "488b8aa8000000488d0592ffffff4839c1723f488d05deffffff4839c173334863ff8b460848c1e0084809c70fb74618"
    "48c1e0284809c748897a30488b461048894238488d05a6ffffff488982a8000000c34883ec2848c704240000000048c7"
    "4424080000000048c74424100000000048c7442418000000004863ff4889e631d241ba08000000b80d0000000f054883"
    "c428c3"
)
_READ, _WRITE, _HANDLER = 0x00, 0x20, 0x60
_SA_SIGINFO, _SA_NODEFER = 4, 0x40000000
_SYS_BRK = {"x86_64": 12, "aarch64": 214, "riscv64": 214, "ppc64le": 45, "s390x": 45}
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
#: MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE.
_MAP_POPULATED = 0x8022
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}
_SYS_MOVE_PAGES = {"x86_64": 279, "aarch64": 239, "riscv64": 239, "ppc64le": 301, "s390x": 310}
_UNWRITTEN = 0x7FFF_FFFF
_SYS_PIDFD_GETFD = 438
_UFFDIO = {
    "api": 0xC018AA3F,
    "register": 0xC020AA00,
    "unregister": 0x8010AA01,
    "wake": 0x8010AA02,
    "copy": 0xC028AA03,
    "zeropage": 0xC020AA04,
    "move": 0xC028AA05,
    "writeprotect": 0xC018AA06,
    "continue": 0xC020AA07,
    "poison": 0xC020AA08,
}

#: BUS_MCEERR_AR and BUS_MCEERR_AO of siginfo; where the code, the address and its lsb are.
_MCEERR = (4, 5)
_SI_CODE, _SI_ADDR, _SI_LSB = 8, 16, 24
_INT = 0xFFFF_FFFF

libc = ctypes.CDLL(None, use_errno=True)
_WORD = ctypes.c_ulong
_FAILED = (1 << 64) - 1


class Refused(Exception):
    """A system call failed with this errno."""


class Fault(Exception):
    """An access would have killed: (signal, address, accesses done before it, lsb of a machine check or 0)."""


def _declare() -> None:
    for name, count in (
        ("mmap", 6),
        ("munmap", 2),
        ("mprotect", 3),
        ("mremap", 5),
        ("madvise", 3),
        ("mlock", 2),
        ("mlock2", 3),
        ("munlock", 2),
        ("mlockall", 1),
        ("munlockall", 0),
        ("mincore", 3),
        ("msync", 3),
    ):
        function = getattr(libc, name)
        function.argtypes = [_WORD] * count
        function.restype = _WORD
    libc.ioctl.argtypes = [ctypes.c_int, _WORD, ctypes.c_void_p]
    libc.prctl.argtypes = [_WORD] * 5


def call(name: str, *arguments: int) -> int:
    """A libc function that returns -1 and errno."""
    result = int(getattr(libc, name)(*arguments))
    if result in (-1, _FAILED, 0xFFFFFFFF):
        raise Refused(ctypes.get_errno())
    return result


def libc_brk(number: int, addr: int) -> int:
    """brk(2), behind the back of the C library, whose malloc has a heap elsewhere."""
    libc.syscall.restype = _WORD
    try:
        return int(libc.syscall(number, _WORD(addr)))
    finally:
        libc.syscall.restype = ctypes.c_int


def _move_heap(start: int) -> None:
    """Have the kernel take `start` for the place where the heap begins; malloc's own stays mapped, but cannot grow."""
    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123
        words = [int(word) for word in file.read().rpartition(b")")[2].split()[1:]]
    # Fields of proc(5), from the fourth on: code, data, stack, arguments, environment.
    code, data, stack, rest = words[22:24], words[41:43], words[24], words[44:48]
    layout = struct.pack("=11QQIi", *code, *data, start, start, stack, *rest, 0, 0, -1)
    buffer = ctypes.create_string_buffer(layout, len(layout))
    if libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.addressof(buffer), len(layout), 0):
        raise Refused(ctypes.get_errno())


def _lsb(code: int, lsb: int) -> int:
    """How many low bits of the address say nothing, where a signal tells of corrupted memory; else 0."""
    return lsb if code in _MCEERR else 0


class _Native:
    """Accesses in user mode, by the machine code above."""

    def __init__(self) -> None:
        size = os.sysconf("SC_PAGE_SIZE")
        base = call("mmap", 0, size, 7, 0x22, _FAILED, 0)
        ctypes.memmove(base, _CODE, len(_CODE))
        call("mprotect", base, size, 5)
        kind = ctypes.CFUNCTYPE(_WORD, _WORD, _WORD, _WORD, _WORD, _WORD)
        self._read, self._write = kind(base + _READ), kind(base + _WRITE)
        self._fault = (_WORD * 2)()
        self._where = ctypes.addressof(self._fault)
        self._handler = base + _HANDLER
        self._note = ctypes.CFUNCTYPE(None, ctypes.c_int, _WORD, _WORD)(self._noted)
        self._signals: list[tuple[int, int, int]] = []
        for number in (signal.SIGSEGV, signal.SIGBUS):
            self._handle(int(number), self._handler)

    def _handle(self, number: int, handler: int) -> None:
        # struct sigaction of glibc and musl on x86-64: handler, mask of 128 bytes, flags, restorer.
        action = struct.pack("=Q128xi4xQ", handler, _SA_SIGINFO | _SA_NODEFER, 0)
        if libc.sigaction(number, action, None):
            raise OSError(ctypes.get_errno(), "sigaction")

    def _noted(self, number: int, info: int, _context: int) -> None:
        raw = ctypes.string_at(info, _SI_LSB + 2)
        code, address = struct.unpack_from("=i", raw, _SI_CODE)[0], struct.unpack_from("=Q", raw, _SI_ADDR)[0]
        self._signals.append((number, address, _lsb(code, struct.unpack_from("=H", raw, _SI_LSB)[0])))

    def advise(self, *arguments: int) -> None:
        """madvise that sends SIGBUS to who asks: the first one is raised as a fault once the call is done."""
        self._signals.clear()
        self._handle(int(signal.SIGBUS), ctypes.cast(self._note, ctypes.c_void_p).value or 0)
        try:
            call("madvise", *arguments)
        finally:
            self._handle(int(signal.SIGBUS), self._handler)
            if self._signals:
                number, address, lsb = self._signals[0]
                raise Fault(number, address, 0, lsb)

    def access(self, address: int, step: int, count: int, buffer: int, *, write: bool) -> None:
        self._fault[0] = 0
        done = (self._write if write else self._read)(address, step, count, buffer, self._where)
        if self._fault[0]:
            word = int(self._fault[0])
            raise Fault(word & 0xFF, int(self._fault[1]), int(done), _lsb(word >> 8 & _INT, word >> 40))


class _Portable:
    """Accesses that the kernel makes for us, by copying to and from a scratch file: they fail instead of killing."""

    def __init__(self) -> None:
        self._scratch = os.memfd_create("scratch")
        os.ftruncate(self._scratch, 1)

    def access(self, address: int, step: int, count: int, buffer: int, *, write: bool) -> None:
        for index in range(count):
            place = address + index * step
            if write and buffer:
                os.pwrite(self._scratch, ctypes.string_at(buffer + index, 1), 0)
            else:
                self._copy(libc.pwrite, place, index)
            if write:
                self._copy(libc.pread, place, index)
            elif buffer:
                ctypes.memmove(buffer + index, os.pread(self._scratch, 1, 0), 1)

    def _copy(self, function: Any, place: int, index: int) -> None:
        if function(self._scratch, ctypes.c_void_p(place), ctypes.c_size_t(1), ctypes.c_long(0)) != 1:
            raise Fault(int(signal.SIGSEGV), place, index, 0)


class Task:
    """The operations. Each takes the JSON arguments and the payload, and returns (value, payload)."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.memory = _Native() if platform.machine() == "x86_64" else _Portable()

    def fork(self) -> None:
        """Fork; the child serves a channel of its own, whose other end goes to the driver with the answer."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        pid = os.fork()
        if pid == 0:
            ours.close()
            self.channel.close()
            self.channel = theirs
            return
        theirs.close()
        text = json.dumps({"value": pid}).encode()
        socket.send_fds(self.channel, [HEADER.pack(len(text), 0) + text], [ours.fileno()])
        ours.close()

    def do(self, op: str, args: dict[str, int], payload: bytes) -> tuple[Any, bytes]:
        return getattr(self, f"do_{op}")(payload=payload, **args)  # type: ignore[no-any-return]

    def do_call(self, *, payload: bytes, **args: Any) -> tuple[int, bytes]:
        return call(args["name"], *args["arguments"]), b""

    def do_read(self, *, start: int, length: int, payload: bytes) -> tuple[int, bytes]:
        buffer = ctypes.create_string_buffer(length)
        self.memory.access(start, 1, length, ctypes.addressof(buffer), write=False)
        return length, buffer.raw

    def do_write(self, *, start: int, payload: bytes) -> tuple[int, bytes]:
        buffer = ctypes.create_string_buffer(payload, len(payload))
        self.memory.access(start, 1, len(payload), ctypes.addressof(buffer), write=True)
        return len(payload), b""

    def do_touch(self, *, start: int, step: int, count: int, write: int, payload: bytes) -> tuple[int, bytes]:
        self.memory.access(start, step, count, 0, write=bool(write))
        return count, b""

    def do_mincore(self, *, start: int, length: int, payload: bytes) -> tuple[int, bytes]:
        size = os.sysconf("SC_PAGE_SIZE")
        buffer = ctypes.create_string_buffer(-(-length // size) or 1)
        call("mincore", start, length, ctypes.addressof(buffer))
        return 0, buffer.raw[: -(-length // size)]

    def do_flush_tlb(self, *, payload: bytes) -> tuple[int, bytes]:
        # Unmapping more pages than are flushed one by one (33 on x86) flushes all of the address space.
        length = 64 * os.sysconf("SC_PAGE_SIZE")
        area = call("mmap", 0, length, 3, _MAP_POPULATED, _FAILED, 0)
        call("munmap", area, length)
        return 0, b""

    def do_poison(self, *, start: int, length: int, advice: int, payload: bytes) -> tuple[int, bytes]:
        if not isinstance(self.memory, _Native):
            raise Refused(errno.ENOSYS)
        self.memory.advise(start, length, advice)
        return 0, b""

    def do_move_pages(
        self, *, pid: int, pages: list[int], nodes: list[int] | None, flags: int, payload: bytes
    ) -> tuple[int, bytes]:
        number = _SYS_MOVE_PAGES.get(platform.machine())
        if number is None:
            raise Refused(errno.ENOSYS)
        count = len(pages)
        where = (_WORD * count)(*pages)
        to = None if nodes is None else (ctypes.c_uint * count)(*nodes)
        status = (ctypes.c_int * count)(*[_UNWRITTEN] * count)
        left = int(libc.syscall(number, pid, _WORD(count), where, to, status, flags))
        if left < 0:
            raise Refused(ctypes.get_errno())
        return left, bytes(status)

    def do_brk(self, *, heap: int, addr: int, payload: bytes) -> tuple[int, bytes]:
        number = _SYS_BRK.get(platform.machine())
        if number is None:
            raise Refused(errno.ENOSYS)
        if libc_brk(number, 0) >> 40 != heap >> 40:
            _move_heap(heap)
        return libc_brk(number, addr), b""

    def do_memfd(self, *, name: str, flags: int, payload: bytes) -> tuple[int, bytes]:
        return os.memfd_create(name, flags), b""

    def do_open(self, *, path: str, pages: int, payload: bytes) -> tuple[int, bytes]:
        if pages >= 0:
            self._make(path, pages)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), b""

    def _make(self, path: str, pages: int) -> None:
        """A new file, written to its disk and dropped from the cache."""
        if os.path.lexists(path):
            os.unlink(path)  # noqa: PTH108
        size, name = os.sysconf("SC_PAGE_SIZE"), path.rpartition("/")[2]
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for page in range(pages):
                os.pwrite(fd, f"{name}:{page}\n".encode().ljust(size, b"\0"), page * size)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def do_sync(self, *, directory: str, payload: bytes) -> tuple[int, bytes]:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return call("syncfs", fd), b""
        finally:
            os.close(fd)

    def do_fadvise(
        self, *, fd: int, offset: int, length: int, advice: int, payload: bytes
    ) -> tuple[int, bytes]:
        os.posix_fadvise(fd, offset, length, advice)
        return 0, b""

    def do_ftruncate(self, *, fd: int, length: int, payload: bytes) -> tuple[int, bytes]:
        os.ftruncate(fd, length)
        return 0, b""

    def do_fallocate(
        self, *, fd: int, mode: int, offset: int, length: int, payload: bytes
    ) -> tuple[int, bytes]:
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        return call("fallocate", fd, mode, offset, length), b""

    def do_pread(self, *, fd: int, length: int, offset: int, payload: bytes) -> tuple[int, bytes]:
        data = os.pread(fd, length, offset)
        return len(data), data

    def do_pwrite(self, *, fd: int, offset: int, payload: bytes) -> tuple[int, bytes]:
        return os.pwrite(fd, payload, offset), b""

    def do_lseek(self, *, fd: int, offset: int, whence: int, payload: bytes) -> tuple[int, bytes]:
        return os.lseek(fd, offset, whence), b""

    def do_fsync(self, *, fd: int, payload: bytes) -> tuple[int, bytes]:
        return call("fsync", fd), b""  # os.fsync makes no call for what is no descriptor

    def do_close(self, *, fd: int, payload: bytes) -> tuple[int, bytes]:
        if fd == self.channel.fileno():
            raise Refused(errno.EBADF)
        os.close(fd)
        return 0, b""

    def do_userfaultfd(self, *, features: int, payload: bytes) -> tuple[int, bytes]:
        number = _SYS_USERFAULTFD.get(platform.machine())
        if number is None:
            raise Refused(errno.ENOSYS)
        fd = int(libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK))
        if fd < 0:
            raise Refused(ctypes.get_errno())
        try:
            self._uffd(fd, "api", struct.pack("=3Q", 0xAA, features, 0))
        except Refused:
            os.close(fd)
            raise
        return fd, b""

    def do_take(self, *, pid: int, fd: int, payload: bytes) -> tuple[int, bytes]:
        handle = os.pidfd_open(pid)
        try:
            return call("syscall", _SYS_PIDFD_GETFD, handle, fd, 0), b""
        finally:
            os.close(handle)

    def do_uffd(self, *, fd: int, what: str, words: list[int], payload: bytes) -> tuple[int, bytes]:
        answer = self._uffd(fd, what, struct.pack(f"={len(words)}Q", *words))
        return struct.unpack(f"={len(words)}Q", answer)[-1], b""

    def _uffd(self, fd: int, what: str, argument: bytes) -> bytes:
        buffer = ctypes.create_string_buffer(argument, len(argument))
        if libc.ioctl(fd, _UFFDIO[what], buffer) < 0:
            raise Refused(ctypes.get_errno())
        return buffer.raw

    # -- the loop --------------------------------------------------------------------------------------

    def receive(self, length: int) -> bytes:
        pieces = []
        while length:
            piece = self.channel.recv(length)
            if not piece:
                os._exit(0)
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)

    def serve(self) -> None:
        while True:
            text_length, payload_length = HEADER.unpack(self.receive(HEADER.size))
            request = json.loads(self.receive(text_length))
            payload = self.receive(payload_length)
            answer: dict[str, Any]
            data = b""
            try:
                if request["op"] == "fork":
                    self.fork()
                    continue
                if request["op"] == "exit":
                    os._exit(0)
                value, data = self.do(request["op"], request["args"], payload)
                answer = {"value": value}
            except Refused as error:
                answer = {"errno": error.args[0]}
            except OSError as error:
                answer = {"errno": error.errno}
            except Fault as error:
                answer = {"fault": error.args}
            text = json.dumps(answer).encode()
            self.channel.sendall(HEADER.pack(len(text), len(data)) + text + data)


def main() -> None:
    """Serve the channel whose descriptor is the first argument."""
    gc.disable()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    _declare()
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: the fork server reaps tasks whose parents are gone
    Task(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
