"""One guest: a module that runs as a thread of this process, its limits, its streams, and how it ended."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final

import wasmtime
from wasmtime import _ffi as ffi

from unisandbox.api import InvalidArgumentError, UnavailableError, UnsupportedError
from unisandbox.backends.wasm import memory, running, thread
from unisandbox.backends.wasm.domain import CallError, Domain, GuestModule, Instance
from unisandbox.backends.wasm.memory import LinearMemory, MemoryOwner
from unisandbox.backends.wasm.spec import EndReason, GuestEnd, GuestLimits, GuestSpec, Preopen
from unisandbox.backends.wasm.streams import Stream
from unisandbox.backends.wasm.waiting import Waiter

if TYPE_CHECKING:
    from unisandbox.backends.wasm.disk import Disk

__all__ = ["EndReason", "Guest", "GuestEnd", "GuestLimits", "GuestSpec", "Preopen"]

_IGNORED_SIGNALS: Final = frozenset({signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG, signal.SIGCONT})
_STOPPING_SIGNALS: Final = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})

_UNREACHABLE: Final = wasmtime.TrapCode.UNREACHABLE.value
_OUT_OF_FUEL: Final = wasmtime.TrapCode.OUT_OF_FUEL.value

_FIRST_PREOPEN: Final = 3  # after the three streams
_DETAIL_CHARACTERS: Final = 8192
_TEXTS: Final = ctypes.POINTER(ctypes.POINTER(ctypes.c_char))
_LONGEST_NAP_SECONDS: Final = 0.1


class Guest:
    """A running guest.

    Args:
        domain: where it runs; the guest counts as one of its users until it has ended.
        module: what it runs.
        spec: how.
    """

    def __init__(self, domain: Domain, module: GuestModule, spec: GuestSpec) -> None:
        self._domain = domain
        self._module = module
        self._spec = spec
        self.in_call = False
        self.memories: MemoryOwner = MemoryOwner(spec.limits.memory)
        self.waiter: Waiter = Waiter()
        self.writer: Hashable = self.waiter
        self.streams = tuple(
            Stream(fd, number, output=number > 0, watch=domain.watch, waiter=self.waiter)
            for number, fd in enumerate((spec.stdin, spec.stdout, spec.stderr))
        )  # type: tuple[Stream, Stream, Stream]  # type: ignore[assignment]
        self._guard = threading.Lock()
        self._reason: tuple[EndReason, int | None, int] | None = None
        self._failure: BaseException | None = None
        self._inner_failure: CallError | None = None
        self._end: GuestEnd | None = None
        self._wakers: list[Callable[[], None]] = []
        self._running = _thread.allocate_lock()
        self._thread = 0
        self._clock = 0
        self._usual_priority: int | None = None
        self._insisted = False
        self._used_before = 0.0
        self._charged = 0.0
        self._returned = False
        self._instance: Instance | None = None
        self._memory: LinearMemory | None = None

    # What its calls ask; in its own thread.

    @property
    def ending(self) -> bool:
        """It is to end now."""
        return self.waiter.ending

    @property
    def memory(self) -> LinearMemory:
        """The memory that it exports."""
        found = self._memory
        if found is None:
            assert self._instance is not None  # noqa: S101
            found = self._memory = self.memories.at(self._instance.memory_base())
            if found is None:
                raise OSError(14, "the guest has no memory")  # EFAULT: one without pages
        return found

    def exit(self, code: int) -> None:
        """proc_exit. Preview 1 has codes of 32 bits; the low 8 count, as for a process (exit(3))."""
        self._note("exited", None, code & 0xFF)

    def broken_output(self) -> None:
        """What SIGPIPE does to a process."""
        self._note("signaled", signal.SIGPIPE, 128 + signal.SIGPIPE)

    def failed(self, error: BaseException) -> None:
        """A call of ours did not succeed: Wasm that it ran for the guest ended, or it has a mistake."""
        if isinstance(error, CallError):  # a kill, a limit or a trap, as it can meet the guest itself
            self._inner_failure = error
            return
        self._failure = error
        self._note("trap", None, 134)

    def kind(self, fd: int, at: int) -> int:
        """The kind of a descriptor that is wasmtime's, or -errno."""
        assert self._instance is not None  # noqa: S101
        return self._instance.kind(fd, at)

    def now(self, at: int) -> int:
        """Its monotonic clock, in nanoseconds."""
        assert self._instance is not None  # noqa: S101
        return self._instance.now(at)

    @property
    def disk(self) -> Disk:
        """Where what it writes is counted."""
        assert self._spec.disk is not None  # noqa: S101
        return self._spec.disk

    def move(self, arguments: Sequence[int]) -> int:
        """Have the gate link or rename a file now; the errno."""
        assert self._instance is not None  # noqa: S101
        return self._instance.move(arguments)

    # For others; from any thread.

    def start(self) -> None:
        """Begin to run it; never blocks for the guest's sake. Once; its descriptors stay the caller's when it fails.

        Everything that can be known without running it is checked here: imports and their types, `_start`, directories.
        What happens from the first instruction on is the guest's own, and its end tells of it.

        Raises:
            InvalidArgumentError: an import is missing, there is no `_start`, a preopened directory does not exist.
            UnsupportedError: fuel in a domain that does not count it.
            UnavailableError: no more threads or memory, or the interpreter ends.
        """
        self._module.check()
        if self._spec.limits.fuel is not None and not self._domain.counts_fuel:
            raise UnsupportedError("fuel", "wasm", reason="this domain does not count instructions")
        wasi = _wasi(self._spec)
        self._domain.use()
        # Its own: whoever holds the module may close it while the guest's thread makes an instance of it.
        module = ffi.wasmtime_module_clone(self._module.module.ptr())
        running.begun(self)
        self._running.acquire()
        try:
            self._domain.threads.run(lambda: self._main(wasi, module))
        except BaseException as error:
            self._running.release()
            running.over(self)
            ffi.wasmtime_module_delete(module)
            self._domain.close()
            if isinstance(error, RuntimeError | MemoryError):
                raise UnavailableError(f"cannot start a thread for a Wasm guest: {error}") from None
            raise

    def kill(self, signal: int = 9) -> None:
        """End it as this signal would; synchronous, idempotent, never blocks, from any thread.

        A guest has no handlers: signal 0 does nothing, and one whose default is to be ignored neither.

        Raises:
            UnsupportedError: a signal that stops.
        """
        if signal in _STOPPING_SIGNALS:
            raise UnsupportedError("pause", "wasm", reason="a Wasm guest cannot be stopped and continued")
        if signal == 0 or signal in _IGNORED_SIGNALS or self._end is not None:
            return
        self._note("signaled", signal, 128 + signal)
        with self._guard:
            # Before its end is known, so that its thread is not another guest's by now.
            if self._end is None and self._thread and self._usual_priority is None:
                self._usual_priority = thread.hurry(self._thread)
        self.waiter.wake()
        # One that is in a call of ours looks at its end before it returns from it. An epoch would disturb all others.
        if not self.in_call:
            self._domain.increment_epoch()
            self._insist()

    def _insist(self) -> None:
        """Let the epoch go on until it has ended.

        It may have looked for its end a moment before that was set, and be about to say that it wants to look again at
        the next epoch but this one: wasmtime counts from where the epoch is when the look is over.
        """
        with self._guard:
            if self._end is not None or self._insisted:
                return
            # No thread can be started: at the end of the interpreter, say. Then this end depends on the next epoch.
            with contextlib.suppress(RuntimeError, OSError):
                self._domain.watch.want_ticks()
                self._insisted = True

    @property
    def ended(self) -> GuestEnd | None:
        """How it ended; its memory, its streams and its store are gone then."""
        return self._end

    async def wait(self) -> GuestEnd:
        """Wait for its end; any number of waiters, on asyncio and trio."""
        if self._end is None:
            import anyio  # a process that only runs a guest has no event loop

            event = anyio.Event()
            waker = _waker(event.set)
            with self._guard:
                if self._end is None:
                    self._wakers.append(waker)
                else:
                    event.set()
            try:
                await event.wait()
            finally:
                with self._guard, contextlib.suppress(ValueError):
                    self._wakers.remove(waker)
        assert self._end is not None  # noqa: S101
        return self._end

    def join(self) -> None:
        """Wait for its end, blocking."""
        with self._running:
            pass

    @property
    def memory_bytes(self) -> int:
        """Bytes of its linear memories now."""
        return self.memories.size

    @property
    def cpu_seconds(self) -> float:
        """Processor time of its thread until now; what wasmtime's own threads do for its files is not in it."""
        if self._end is not None:
            return self._end.cpu_seconds
        try:
            return time.clock_gettime(self._clock) - self._used_before if self._clock else 0.0
        except OSError:  # ended meanwhile
            return self._end.cpu_seconds if self._end is not None else 0.0

    # Its own thread.

    def _main(self, wasi: wasmtime.WasiConfig, module: Any) -> None:
        running.enter(self)
        self._used_before = self._charged = time.thread_time()
        self._thread = _thread.get_native_id()
        self._clock = thread.clock(self._thread)
        limits = self._spec.limits
        ticking = limits.cpu is not None or limits.cpu_seconds is not None
        failure: CallError | None = None
        try:
            if ticking:
                self._domain.watch.want_ticks()
            failure = self._run(wasi, module)
        except BaseException as error:
            self.failed(error)
        ffi.wasmtime_module_delete(module)
        if ticking:
            self._domain.watch.need_no_ticks()
        self._close_streams()
        inner = self._inner_failure
        end = self._how(failure if inner is None or inner.code is None else inner)
        running.leave()
        self._domain.close()
        with self._guard:
            self._end = end
            wakers, self._wakers = self._wakers, []
            insisted = self._insisted
        if insisted:
            self._domain.watch.need_no_ticks()
        running.over(self)
        self._running.release()
        for wake in wakers:
            wake()
        if self._usual_priority is not None:
            thread.as_usual(self._usual_priority)

    def _run(self, wasi: wasmtime.WasiConfig, module: Any) -> CallError | None:
        limits = self._spec.limits
        store = ffi.wasmtime_store_new(self._domain.engine.ptr(), None, _nothing)
        try:
            # One more table, and two more instances: the gate's.
            ffi.wasmtime_store_limiter(store, -1, limits.table_elements, 3, limits.tables + 1, limits.memories)
            context = ffi.wasmtime_store_context(store)
            error = ffi.wasmtime_context_set_wasi(context, wasi._consume())
            if error:
                return CallError.of(error, None)
            ffi.wasmtime_store_epoch_deadline_callback(store, _epoch, None, _nothing)
            ffi.wasmtime_context_set_epoch_deadline(context, 1)
            if limits.fuel is not None or self._domain.counts_fuel:
                fuel = limits.fuel if limits.fuel is not None else (1 << 64) - 1
                ffi.wasmtime_context_set_fuel(context, fuel)
            if self.waiter.ending:
                return None
            self._instance = self._made(context, module)
            if self.waiter.ending:
                return None
            self._instance.run()
            self._returned = True
        except CallError as failure:
            return failure
        finally:
            self._instance = None
            self._memory = None
            ffi.wasmtime_store_delete(store)
            if self._spec.disk is not None:
                self._spec.disk.forget(self.writer)
        return None

    def _made(self, context: Any, module: Any) -> Instance:
        files, guest, disk = self._spec.limits.files, self._module, self._spec.disk
        if disk is None:
            return self._domain.instance(context, module, files, calls=guest.calls)
        made = self._domain.instance(context, module, files, calls=guest.writes, counted=True)
        if guest.writes:
            for number, preopen in enumerate(self._spec.preopens):
                if not preopen.counted:
                    made.free(_FIRST_PREOPEN + number)
        return made

    def _how(self, failure: CallError | None) -> GuestEnd:
        cpu = time.thread_time() - self._used_before
        now = time.time()
        noted = self._reason
        if self._failure is not None:
            return GuestEnd(134, "trap", None, f"internal error: {self._failure!r}", cpu, now)
        if self._returned:
            return GuestEnd(0, cpu_seconds=cpu, ended_at=now)
        detail = "" if failure is None else _detail(failure)
        if noted is not None and (failure is None or failure.code is None):
            reason, number, code = noted
            return GuestEnd(code, reason, number, detail if reason == "cpu" else "", cpu, now)
        assert failure is not None  # noqa: S101
        if self.memories.refused and failure.code in {None, _UNREACHABLE}:
            return GuestEnd(137, "oom", None, detail, cpu, now)
        if failure.code == _OUT_OF_FUEL:
            return GuestEnd(137, "fuel", None, detail, cpu, now)
        return GuestEnd(134, "trap", None, detail, cpu, now)

    def _note(self, reason: EndReason, number: int | None, code: int) -> None:
        """The first reason counts."""
        with self._guard:
            if self._reason is None:
                self._reason = reason, number, code
        self.waiter.ending = True

    def ask(self) -> bool:
        """The epoch has moved: whether the guest may go on. In its own thread; sleeps when its rate says so."""
        limits = self._spec.limits
        if self.waiter.ending:
            return False
        if limits.cpu is None and limits.cpu_seconds is None:
            return True
        used = time.thread_time()
        if limits.cpu_seconds is not None and used - self._used_before >= limits.cpu_seconds:
            self._note("cpu", None, 137)
            return False
        # Never in a call of ours, which may hold what others wait for: it is charged when it is over.
        if limits.cpu is not None and not self.in_call:
            owed = limits.cpu.charge(used - self._charged)
            self._charged = used
            while owed > 0:
                self.waiter.clear()
                if self.waiter.ending:
                    return False
                self.waiter.wait(min(owed, _LONGEST_NAP_SECONDS))
                owed = limits.cpu.charge(0.0)
        return True

    def _close_streams(self) -> None:
        for stream in self.streams:
            stream.close()


def _wasi(spec: GuestSpec) -> wasmtime.WasiConfig:
    wasi = wasmtime.WasiConfig()
    env = spec.env if spec.cwd == "/" else {**spec.env, "PWD": spec.cwd}
    # wasmtime-py's own setters would encode it all once more.
    if not ffi.wasi_config_set_argv(wasi.ptr(), len(spec.argv), _texts("argv", spec.argv)) or not (
        ffi.wasi_config_set_env(wasi.ptr(), len(env), _texts("env", env), _texts("env", env.values()))
    ):
        raise InvalidArgumentError("argv and env of a Wasm guest cannot be used")
    for preopen in spec.preopens:
        try:
            wasi.preopen_dir(preopen.path, preopen.target, preopen.writable)
        except (wasmtime.WasmtimeError, UnicodeEncodeError):
            raise InvalidArgumentError(f"cannot open the directory {preopen.path!r} for {preopen.target!r}") from None
    return wasi


def _texts(what: str, texts: Collection[str]) -> Any:
    """As an array of C strings."""
    array = (ctypes.c_char_p * len(texts))()
    for number, text in enumerate(texts):
        try:
            array[number] = text.encode()
        except UnicodeEncodeError:
            raise _not_unicode(what, text) from None
        if "\0" in text:
            raise _not_unicode(what, text)
    return ctypes.cast(array, _TEXTS)


def _not_unicode(what: str, text: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{what} of a Wasm guest must be Unicode without NUL, got {text!r}")


def _detail(failure: CallError) -> str:
    name = "" if failure.code is None else wasmtime.TrapCode(failure.code).name.lower() + "\n"
    return (name + failure.detail)[:_DETAIL_CHARACTERS]


def _waker(wake: Callable[[], object]) -> Callable[[], None]:
    """What has this event loop call `wake`, from any thread; both loops have a method that takes calls from outside."""
    from anyio.lowlevel import current_token

    loop: Any = current_token()
    loop = getattr(loop, "native_token", loop)
    call: Callable[[Callable[[], object]], object]
    call = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon

    def waker() -> None:
        with contextlib.suppress(RuntimeError):  # that loop is closed
            call(wake)

    return waker


_nothing: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(0)
_EpochCallback = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.POINTER(ffi.wasmtime_context_t),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint8),
)


@_EpochCallback  # type: ignore[untyped-decorator]
def _epoch(_context: Any, _data: Any, delta: Any, kind: Any) -> int:
    try:
        if running.guest_of_thread().ask():
            delta[0] = 1
            kind[0] = 0
            return 0
    except BaseException as error:
        with contextlib.suppress(KeyError):
            running.guest_of_thread().failed(error)
    return ctypes.cast(ffi.wasmtime_error_new(b"ended by unisandbox"), ctypes.c_void_p).value or 0


memory.owned_by(running.memories_of_thread)
