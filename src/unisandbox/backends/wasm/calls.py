"""Our own functions of wasi_snapshot_preview1, called by wasmtime in the guest's thread.

None of them ever raises into wasmtime, and none goes through wasmtime-py's own wrapper, which keeps an exception in one
variable for the whole process: an error becomes an errno for the guest, and an end (a kill, an exit) is noted in the
guest before its thread is unwound by a trap.
Source: wasi_snapshot_preview1.witx (layouts of iovec, subscription, event, numbers of errno).
"""

from __future__ import annotations

import ctypes
import errno
import struct
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import wasmtime
from wasmtime import _ffi as ffi

from unisandbox.backends.wasm.memory import LinearMemory
from unisandbox.backends.wasm.streams import Stream
from unisandbox.backends.wasm.trampoline import OURS, WASI
from unisandbox.backends.wasm.waiting import Waiter

if TYPE_CHECKING:
    from unisandbox.backends.wasm.disk import Disk

_SUCCESS: Final = 0
_BADF: Final = 8
_FAULT: Final = 21
_INVAL: Final = 28
_IO: Final = 29
_NOTSUP: Final = 58
_NONBLOCK_AND_APPEND: Final = 5
_CLOSED: Final = 0xFFFFFFFF
"""-1, the number of a stream that the guest has closed."""

ERRNO: Final = {
    errno.EACCES: 2, errno.EAGAIN: 6, errno.EBADF: 8, errno.EFAULT: 21, errno.EFBIG: 22, errno.EINTR: 27,
    errno.EINVAL: 28, errno.EIO: 29, errno.EISDIR: 31, errno.ENODEV: 43, errno.ENOMEM: 48, errno.ENOSPC: 51,
    errno.ENOTSUP: 58, errno.ENXIO: 60, errno.EOVERFLOW: 61, errno.EPERM: 63, errno.EPIPE: 64, errno.ESPIPE: 70,
    errno.ECONNRESET: 15, errno.EDQUOT: 19,
}  # fmt: skip
"""Numbers of preview 1 for those of Linux; what is missing is said to be EIO."""

_REGULAR_FILE: Final = 4
_SUBSCRIPTION: Final = 48
_EVENT: Final = 32
_MOST_BUFFERS: Final = 1024  # IOV_MAX: the kernel takes no more
_MOST_SUBSCRIPTIONS: Final = 4096
"""In one call: until they are looked through nothing ends the guest, and what is noted of them is the host's memory."""


class EndNow(Exception):
    """The guest's end has been noted; its thread is to be unwound. Never leaves this package."""


class Caller(Protocol):
    """What the calls know of the guest that makes them."""

    waiter: Waiter
    streams: tuple[Stream, Stream, Stream]
    in_call: bool
    """It is in one of these calls, and will look at `ending` before it goes on."""

    @property
    def memory(self) -> LinearMemory: ...

    @property
    def ending(self) -> bool:
        """It is to end now."""
        ...

    def exit(self, code: int) -> None:
        """It asked for its end."""
        ...

    def broken_output(self) -> None:
        """It wrote to an output that nobody reads any more."""
        ...

    def failed(self, error: BaseException) -> None:
        """A call of ours did not succeed; the guest ends for it, and its end tells why."""
        ...

    def kind(self, fd: int, at: int) -> int:
        """The kind of the file behind a descriptor of wasmtime's, or -errno; uses 24 bytes of its memory at `at`."""
        ...

    def now(self, at: int) -> int:
        """Its monotonic clock in nanoseconds; uses 8 bytes of its memory at `at`."""
        ...

    writer: Hashable
    """Who it is for `disk`."""

    @property
    def disk(self) -> Disk:
        """What it writes is counted there; only for one of which that is so."""
        ...

    def move(self, arguments: Sequence[int]) -> int:
        """Have the gate link or rename a file now; the errno."""
        ...


def _buffers(memory: memoryview, at: int, count: int) -> list[memoryview]:
    size = len(memory)
    found = []
    for base, length in struct.iter_unpack("<II", memory[at : _end(size, at, min(count, _MOST_BUFFERS) * 8)]):
        _end(size, base, length)
        if length:
            found.append(memory[base : base + length])
    return found


def _end(size: int, at: int, length: int) -> int:
    if at + length > size:
        raise OSError(errno.EFAULT, "outside of the guest's memory")
    return at + length


def read(guest: Caller, iovs: int, count: int, result: int) -> int:
    """fd_read of the standard input."""
    view = guest.memory.view
    _end(len(view), result, 4)
    done = guest.streams[0].read(_buffers(view, iovs, count))
    struct.pack_into("<I", view, result, done)
    return _SUCCESS


def write(guest: Caller, stream: int, iovs: int, count: int, result: int) -> int:
    """fd_write of a standard output."""
    view = guest.memory.view
    _end(len(view), result, 4)
    try:
        done = guest.streams[stream].write(_buffers(view, iovs, count))
    except BrokenPipeError:
        guest.broken_output()
        raise EndNow from None
    struct.pack_into("<I", view, result, done)
    return _SUCCESS


def moved(guest: Caller, stream: int, number: int) -> None:
    """fd_renumber or fd_close of a standard stream."""
    guest.streams[stream].number = number
    if number == _CLOSED:
        guest.streams[stream].close()


def flags(guest: Caller, stream: int) -> int:
    """What fd_fdstat_get says of a standard stream."""
    return guest.streams[stream].flags


def set_flags(guest: Caller, stream: int, value: int) -> int:
    """fd_fdstat_set_flags of a standard stream; append means nothing to a pipe, the others are those of files."""
    if value & ~_NONBLOCK_AND_APPEND:
        return _INVAL
    guest.streams[stream].flags = value
    return _SUCCESS


def proc_exit(guest: Caller, code: int) -> None:
    """proc_exit: wasmtime's own knows codes up to 125 only."""
    guest.exit(code)
    raise EndNow


def room(guest: Caller, size: int) -> int:
    """So many bytes, or more, that it may write; 0: there is no room."""

    def nap(seconds: float) -> None:
        guest.waiter.clear()
        if guest.ending:
            raise EndNow
        guest.waiter.wait(seconds)

    try:
        return guest.disk.take(guest.writer, size, nap)
    except OSError:  # also where what is there cannot be counted
        return 0


def move(guest: Caller, *arguments: int) -> int:
    """path_rename (0) or path_link (1) while nobody counts what is there."""
    with guest.disk.lock:
        return guest.move(arguments)


def poll_oneoff(guest: Caller, subscriptions: int, events: int, count: int, result: int) -> int:
    """Wait for the first of several clocks and descriptors; EINVAL for too many, as poll(2) says it."""
    if not count:
        return _INVAL
    memory = guest.memory
    size = memory.size
    _end(size, events, count * _EVENT)
    if count > _MOST_SUBSCRIPTIONS:
        return _INVAL
    _end(size, result, 4)
    wanted = bytes(memory.view[subscriptions : _end(size, subscriptions, count * _SUBSCRIPTION)])
    clocks: list[tuple[int, Callable[[], float], float]] = []
    files: list[tuple[int, int, Stream]] = []
    happened: list[bytes] = []
    for at in range(0, len(wanted), _SUBSCRIPTION):
        userdata, kind = struct.unpack_from("<QB", wanted, at)
        if kind == 0:
            clock, timeout, absolute = struct.unpack_from("<I4xQ8xH", wanted, at + 16)
            if clock > 1 or absolute & ~1:
                return _NOTSUP if clock in {2, 3} else _INVAL
            if absolute and clock == 0:
                clocks.append((userdata, time.time, timeout / 1e9))
            else:
                rest = timeout - (guest.now(events) if absolute else 0)
                clocks.append((userdata, time.monotonic, time.monotonic() + rest / 1e9))
        elif kind in {1, 2}:
            (fd,) = struct.unpack_from("<I", wanted, at + 16)
            stream = next((stream for stream in guest.streams if stream.number == fd), None)
            if stream is not None:
                if (stream is guest.streams[0]) != (kind == 1):
                    return _BADF
                files.append((userdata, kind, stream))
                continue
            what = guest.kind(fd, events)
            if what != _REGULAR_FILE:
                return -what if what < 0 else _BADF
            happened.append(_event(userdata, kind, 1, gone=False))
        else:
            return _INVAL
    happened += _first(guest, clocks, files, at_once=bool(happened))
    view = guest.memory.view
    view[events : events + len(happened) * _EVENT] = b"".join(happened)
    struct.pack_into("<I", view, result, len(happened))
    return _SUCCESS


def _first(
    guest: Caller,
    clocks: list[tuple[int, Callable[[], float], float]],
    files: list[tuple[int, int, Stream]],
    *,
    at_once: bool,
) -> list[bytes]:
    while True:
        guest.waiter.clear()
        if guest.ending:
            raise EndNow
        happened = []
        for userdata, kind, stream in files:
            ready, there, gone = stream.readiness()
            if ready:
                happened.append(_event(userdata, kind, there, gone=gone))
        left = [(userdata, when - now()) for userdata, now, when in clocks]
        happened += [_event(userdata, 0, 0, gone=False) for userdata, rest in left if rest <= 0]
        if happened or at_once:
            return happened
        for _, _, stream in files:
            stream.expect()
        guest.waiter.wait(min((rest for _, rest in left), default=None))


def _event(userdata: int, kind: int, there: int, *, gone: bool) -> bytes:
    return struct.pack("<QHB5xQH6x", userdata, 0, kind, there, gone)


_FUNCTIONS: Final[tuple[tuple[str, str, Callable[..., int | None], int, bool], ...]] = (
    (OURS, "read", read, 3, True),
    (OURS, "write", write, 4, True),
    (OURS, "moved", moved, 2, False),
    (OURS, "flags", flags, 1, True),
    (OURS, "set_flags", set_flags, 2, True),
    (OURS, "room", room, 1, True),
    (OURS, "move", move, 8, True),
    (WASI, "poll_oneoff", poll_oneoff, 4, True),
    (WASI, "proc_exit", proc_exit, 1, False),
)

_nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(0)
_END_MESSAGE: Final = b"ended by unisandbox"


class Calls:
    """The calls as functions that wasmtime can call; kept alive by this object.

    Args:
        guest_of_thread: whose call it is.
    """

    def __init__(self, guest_of_thread: Callable[[], Caller]) -> None:
        self._guest_of_thread = guest_of_thread
        self._kept: list[Any] = []

    def define(self, linker: wasmtime.Linker) -> None:
        """Define them all; they shadow wasmtime's."""
        i32 = wasmtime.ValType.i32
        for module, name, function, parameters, returns in _FUNCTIONS:
            kind = wasmtime.FuncType([i32()] * parameters, [i32()] if returns else [])
            callback = ffi.wasmtime_func_unchecked_callback_t(self._callable(function, parameters, returns))
            self._kept.append(callback)
            error = ffi.wasmtime_linker_define_func_unchecked(
                linker.ptr(), *_text(module), *_text(name), kind.ptr(), callback, None, _nothing
            )
            if error:
                raise wasmtime.WasmtimeError._from_ptr(error)

    def _callable(self, function: Callable[..., int | None], parameters: int, returns: bool) -> Callable[..., int]:
        guest_of_thread = self._guest_of_thread
        numbers = range(parameters)

        def call(_env: Any, _caller: Any, values: Any, _count: int) -> int:
            try:
                guest = guest_of_thread()
            except BaseException:
                # No guest of ours runs in this thread, so there is nobody to keep the error for; and nothing may be
                # raised into wasmtime, which would keep it for whichever guest comes next. The trap ends what called.
                return _unwind()
            try:
                guest.in_call = True
                if guest.ending:
                    return _unwind()
                try:
                    answer = function(guest, *[values[number].i32 & 0xFFFFFFFF for number in numbers])
                except OSError as error:
                    answer = ERRNO.get(error.errno or 0, _IO)
                if returns:
                    values[0].i32 = answer
                guest.in_call = False
                if guest.ending:  # a kill that saw it in here has left the epoch alone
                    return _unwind()
            except EndNow:
                return _unwind()
            except BaseException as error:
                guest.failed(error)
                return _unwind()
            return 0

        return call


def _text(text: str) -> tuple[Any, int]:
    raw = text.encode()
    return ctypes.create_string_buffer(raw), len(raw)


def _unwind() -> int:
    trap = ffi.wasmtime_trap_new(ctypes.create_string_buffer(_END_MESSAGE), len(_END_MESSAGE))
    return ctypes.cast(trap, ctypes.c_void_p).value or 0
