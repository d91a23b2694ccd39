"""The kill domain: one wasmtime Engine for all guests of this process that have the same configuration."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final, NamedTuple

import wasmtime
from wasmtime import _ffi as ffi

from unisandbox.api import InvalidArgumentError, UnavailableError, UnsupportedError
from unisandbox.backends.wasm import running
from unisandbox.backends.wasm.calls import Calls
from unisandbox.backends.wasm.config import WASM_STACK_BYTES, configuration
from unisandbox.backends.wasm.memory import create_memories_for
from unisandbox.backends.wasm.threads import Threads
from unisandbox.backends.wasm.trampoline import (
    COUNTED,
    COUNTED_FRONT,
    COUNTED_GATE,
    FRONT,
    GATE,
    GUARDED,
    MOST_DESCRIPTORS,
    WASI,
)
from unisandbox.backends.wasm.waiting import Watch

_STACK_BYTES: Final = WASM_STACK_BYTES + 1024 * 1024
"""Of a guest's thread: its own frames, and below them wasmtime's and Python's (addresses only, touched as used)."""

_COMPONENT_HEADER: Final = b"\0asm\x0d\x00\x01\x00"
"""Source: component-model/design/mvp/Binary.md: version 13, layer 1."""


class GuestModule(NamedTuple):
    """A compiled module, checked once: what it imports, whether it can be started. Shared by any number of guests.

    Attributes:
        module: wasmtime's.
        calls: it imports calls that go through our gate.
        writes: or such that do where what it writes is counted.
        problem: why it cannot be started, or None.
    """

    module: wasmtime.Module
    calls: bool
    writes: bool
    problem: str | None

    def check(self) -> None:
        """Raises InvalidArgumentError when it cannot be started."""
        if self.problem is not None:
            raise InvalidArgumentError(self.problem, exit_code=126)


class _Passage(NamedTuple):
    """The two modules between a guest and its calls; see `trampoline`."""

    front: Any
    gate: wasmtime.Module


class Domain:
    """One Engine, its epochs and our threads for it. Get it with `Domain.get`, give it back with `close`.

    Guests of a domain use it too, so that it stays until the last of them has ended.
    """

    _domains: ClassVar[dict[tuple[bool, bool], Domain]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()
    _exiting: ClassVar[bool] = False

    def __init__(self, *, trust_signals: bool, fuel: bool) -> None:
        self._key = (trust_signals, fuel)
        self._users = 0
        self.counts_fuel: Final = fuel
        config = configuration(trust_signals=trust_signals, fuel=fuel)
        create_memories_for(config)
        self.engine: Final = wasmtime.Engine(config)
        self.watch: Final = Watch(self.increment_epoch)
        self.threads: Final = Threads(_STACK_BYTES)
        self._calls = Calls(running.guest_of_thread)
        self._linker = wasmtime.Linker(self.engine)
        self._linker.define_wasi()
        self._linker.allow_shadowing = True
        self._calls.define(self._linker)
        self._passages: dict[bool, _Passage] = {}

    @classmethod
    def get(cls, *, trust_signals: bool = False, fuel: bool = False) -> Domain:
        """The domain of this process for a configuration, counted: each `get` needs its `close`.

        Raises:
            UnavailableError: the interpreter is about to end.
        """
        with cls._guard:
            cls._open_for_guests()
            domain = cls._domains.get((trust_signals, fuel))
            if domain is None:
                domain = cls._domains[trust_signals, fuel] = cls(trust_signals=trust_signals, fuel=fuel)
            domain._users += 1
            return domain

    def use(self) -> Domain:
        """One more user of this domain, who closes it too."""
        with self._guard:
            self._open_for_guests()
            self._users += 1
            return self

    def close(self) -> None:
        """Give it back. The last user's close ends our threads and frees the Engine; guests that run still hold it."""
        with self._guard:
            self._users -= 1
            if self._users:
                return
            if self._domains.get(self._key) is self:
                del self._domains[self._key]
        self.threads.close()
        self.watch.close()
        passages, self._passages = self._passages, {}
        for part in (*(part for passage in passages.values() for part in passage), self._linker, self.engine):
            part.close()

    @classmethod
    def _open_for_guests(cls) -> None:
        if cls._exiting:
            raise UnavailableError("the interpreter is about to end: no Wasm guest can be started any more")

    def increment_epoch(self) -> None:
        """Ask every running guest whether it is to end. Never blocks."""
        with contextlib.suppress(ValueError):  # closed: there are no guests
            self.engine.increment_epoch()

    def load(self, path: str) -> GuestModule:
        """Map an artefact that an Engine of this configuration compiled (`configuration_key`). Native code: trusted.

        Raises:
            InvalidArgumentError: it is no artefact, or of another configuration.
            UnsupportedError: it is a component.
        """
        if _is_component(path):
            raise _component()
        try:
            module = wasmtime.Module.deserialize_file(self.engine, path)
        except wasmtime.WasmtimeError as error:
            raise InvalidArgumentError(f"{path} is no module compiled for this wasmtime and machine: {error}") from None
        return self._checked(module)

    def compile(self, source: str | bytes) -> GuestModule:
        """Compile trusted text or a trusted binary here and now: cannot be interrupted, blocks."""
        if isinstance(source, bytes) and source.startswith(_COMPONENT_HEADER):
            raise _component()
        try:
            module = wasmtime.Module(self.engine, source)
        except wasmtime.WasmtimeError as error:
            raise InvalidArgumentError(f"no Wasm module: {error}", exit_code=126) from None
        return self._checked(module)

    def _checked(self, module: wasmtime.Module) -> GuestModule:
        imports = [(one.module, one.name or "") for one in module.imports]
        names = {name for origin, name in imports if origin == WASI}
        exports = {export.name: export.type for export in module.exports}
        problem = self._problem(module, imports, exports)
        return GuestModule(module, bool(names & GUARDED), bool(names & COUNTED), problem)

    def _problem(self, module: wasmtime.Module, imports: list[tuple[str, str]], exports: dict[str, Any]) -> str | None:
        strangers = sorted({f"{origin}.{name}" for origin, name in imports if origin != WASI})
        if strangers:
            return f"the module imports {', '.join(strangers[:8])}: a guest is given {WASI} and nothing else"
        try:
            self._linker.instantiate_pre(module).close()
        except wasmtime.WasmtimeError as error:
            return f"an import of the module cannot be given: {error}"
        start = exports.get("_start")
        if not isinstance(start, wasmtime.FuncType) or start.params or start.results:
            return "the module exports no function _start without parameters and results: it is no program (a library?)"
        if imports and not isinstance(exports.get("memory"), wasmtime.MemoryType):
            return f"the module imports from {WASI} and does not export its memory as 'memory'"
        return None

    def _passage(self, *, counted: bool) -> _Passage:
        """Made when first needed: few processes need both."""
        found = self._passages.get(counted)
        if found is None:
            front, gate = (COUNTED_FRONT, COUNTED_GATE) if counted else (FRONT, GATE)
            with self._guard:
                found = self._passages.get(counted)
                if found is None:
                    pre = self._linker.instantiate_pre(wasmtime.Module(self.engine, front))
                    found = self._passages[counted] = _Passage(pre, wasmtime.Module(self.engine, gate))
        return found

    def instance(self, context: Any, module: Any, files: int, *, calls: bool, counted: bool = False) -> Instance:
        """Make the instances of one guest in its store, in the guest's thread; runs the module's start function.

        Args:
            context: of the store.
            module: wasmtime's, which nobody closes meanwhile.
            files: it may have open, at most `MOST_DESCRIPTORS`.
            calls: see `GuestModule`.
            counted: what it writes is counted.

        Raises:
            CallError: it could not be made, or its start function did not return.
        """
        guest = ffi.wasmtime_instance_t()
        if not calls:
            _checked_call(
                ffi.wasmtime_linker_instantiate,
                self._linker.ptr(),
                context,
                module,
                ctypes.byref(guest),
            )
            return Instance(context, guest)
        front, passage = ffi.wasmtime_instance_t(), self._passage(counted=counted)
        _checked_call(ffi.wasmtime_instance_pre_instantiate, passage.front.ptr(), context, ctypes.byref(front))
        with self._linked() as linker:
            _checked_error(ffi.wasmtime_linker_define_instance(linker, context, *_WASI_NAME, ctypes.byref(front)))
            _checked_call(ffi.wasmtime_linker_instantiate, linker, context, module, ctypes.byref(guest))
        made = Instance(context, guest)
        # Another linker: in the first one the front lies over wasmtime's functions, which the gate is to reach.
        with self._linked() as linker:
            for name, item in (
                (_MEMORY_NAME, made.export(_MEMORY_NAME)),
                (_GATE_NAME, _export(context, front, _GATE_NAME)),
            ):
                _checked_error(ffi.wasmtime_linker_define(linker, context, *_GUEST_NAME, *name, ctypes.byref(item)))
            made.gate = ffi.wasmtime_instance_t()
            _checked_call(ffi.wasmtime_linker_instantiate, linker, context, passage.gate.ptr(), ctypes.byref(made.gate))
        if files < MOST_DESCRIPTORS:
            made.bound(files)
        return made

    @contextlib.contextmanager
    def _linked(self) -> Iterator[Any]:
        """A copy of the linker, for the definitions of one store."""
        linker = ffi.wasmtime_linker_clone(self._linker.ptr())
        try:
            yield linker
        finally:
            ffi.wasmtime_linker_delete(linker)


class CallError(Exception):
    """A guest did not return: its trap, or wasmtime's error.

    Attributes:
        code: wasmtime's number of the trap, or None.
        detail: its message with the Wasm backtrace.
    """

    def __init__(self, code: int | None, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail

    @classmethod
    def of(cls, error: Any, trap: Any) -> CallError:
        """From what wasmtime returned; frees it."""
        message = ffi.wasm_byte_vec_t()
        if error:
            ffi.wasmtime_error_message(error, ctypes.byref(message))
            ffi.wasmtime_error_delete(error)
            code = None
        else:
            number = ffi.wasmtime_trap_code_t()
            code = number.value if ffi.wasmtime_trap_code(trap, ctypes.byref(number)) else None
            ffi.wasm_trap_message(trap, ctypes.byref(message))
            ffi.wasm_trap_delete(trap)
        text = bytes(ctypes.string_at(message.data, message.size)).rstrip(b"\0").decode(errors="replace")
        ffi.wasm_byte_vec_delete(ctypes.byref(message))
        return cls(code, text)


class Instance:
    """A guest's instance in its store."""

    __slots__ = ("context", "gate", "instance")

    def __init__(self, context: Any, instance: Any) -> None:
        self.context: Any = context
        self.instance: Any = instance
        self.gate: Any = None

    def export(self, name: tuple[Any, int]) -> Any:
        """The extern of this name, which the module is known to export."""
        return _export(self.context, self.instance, name)

    def memory_base(self) -> int:
        """Where the memory that it exports begins."""
        item = self.export(_MEMORY_NAME)
        return (
            ctypes.cast(ffi.wasmtime_memory_data(self.context, ctypes.byref(item.of.memory)), ctypes.c_void_p).value
            or 0
        )

    def run(self) -> None:
        """Call `_start`. Raises CallError when it does not return."""
        item = self.export(_START_NAME)
        _checked_call(ffi.wasmtime_func_call, self.context, ctypes.byref(item.of.func), None, 0, None, 0)

    def kind(self, fd: int, at: int) -> int:
        """The kind of what a descriptor of wasmtime's is, or -errno; uses 24 bytes of its memory at `at`."""
        values = (ffi.wasmtime_val_raw_t * 2)()
        values[0].i32 = ctypes.c_int32(fd).value
        values[1].i32 = ctypes.c_int32(at).value
        self._ask_gate(_KIND_NAME, values)
        return int(values[0].i32)

    def now(self, at: int) -> int:
        """The guest's monotonic clock in nanoseconds, which wasmtime starts with the guest; uses 8 bytes at `at`."""
        values = (ffi.wasmtime_val_raw_t * 1)()
        values[0].i32 = ctypes.c_int32(at).value
        self._ask_gate(_NOW_NAME, values)
        return int(values[0].i64)

    def bound(self, files: int) -> None:
        """Let it have no more than so many files open."""
        values = (ffi.wasmtime_val_raw_t * 1)()
        values[0].i32 = files
        self._ask_gate(_BOUND_NAME, values)

    def free(self, fd: int) -> None:
        """Do not count what is written below this directory that it begins with."""
        values = (ffi.wasmtime_val_raw_t * 1)()
        values[0].i32 = fd
        self._ask_gate(_FREE_NAME, values)

    def move(self, arguments: Sequence[int]) -> int:
        """Link (1) or rename (0) a file, with the arguments of that call; the errno."""
        values = (ffi.wasmtime_val_raw_t * len(arguments))()
        for value, argument in zip(values, arguments, strict=True):
            value.i32 = ctypes.c_int32(argument).value
        self._ask_gate(_MOVE_NAME, values)
        return int(values[0].i32)

    def _ask_gate(self, name: tuple[Any, int], values: Any) -> None:
        item = _export(self.context, self.gate, name)
        _checked_call(ffi.wasmtime_func_call_unchecked, self.context, ctypes.byref(item.of.func), values, len(values))


def _export(context: Any, instance: Any, name: tuple[Any, int]) -> Any:
    item = ffi.wasmtime_extern_t()
    if not ffi.wasmtime_instance_export_get(context, ctypes.byref(instance), *name, ctypes.byref(item)):
        raise CallError(None, f"no export {name[0].value!r}")
    return item


def _checked_error(error: Any) -> None:
    if error:
        raise CallError.of(error, None)


def _checked_call(function: Callable[..., Any], *arguments: Any) -> None:
    trap = ctypes.POINTER(ffi.wasm_trap_t)()
    error = function(*arguments, ctypes.byref(trap))
    if error or trap:
        raise CallError.of(error, trap)


def _name(text: str) -> tuple[Any, int]:
    return ctypes.create_string_buffer(text.encode()), len(text)


_WASI_NAME: Final = _name(WASI)
_GUEST_NAME: Final = _name("guest")
_MEMORY_NAME: Final = _name("memory")
_GATE_NAME: Final = _name("gate")
_START_NAME: Final = _name("_start")
_KIND_NAME: Final = _name("kind")
_NOW_NAME: Final = _name("now")
_BOUND_NAME: Final = _name("bound")
_FREE_NAME: Final = _name("free")
_MOVE_NAME: Final = _name("moved_now")


def _is_component(path: str) -> bool:
    """Whether an artefact is a component's, by the flags of its ELF header.

    Source: EF_WASMTIME_COMPONENT in wasmtime's crates/environ/src/obj.rs; e_flags in elf(5).
    """
    try:
        with open(path, "rb") as file:
            header = file.read(52)
    except OSError:
        return False  # whoever loads it says why
    return header.startswith(b"\x7fELF") and len(header) == 52 and bool(int.from_bytes(header[48:], "little") & 2)


def _component() -> UnsupportedError:
    return UnsupportedError(
        "components",
        "wasm",
        reason="the sleeps of a component cannot be ended in this process",
        hint="Use isolation='wasm+process'.",
    )


def _end_all_guests() -> None:
    Domain._exiting = True
    for guest in running.all_guests():
        guest.kill(9)
    running.wait_for_none()
    with Domain._guard:
        domains = list(Domain._domains.values())
    for domain in domains:
        domain.threads.close()
        domain.watch.close()


# Every Store is closed before the interpreter ends, else it crashes in wasmtime. Not atexit: that runs after the
# interpreter has waited for all threads, guests among them. concurrent.futures uses the same door.
threading._register_atexit(_end_all_guests)  # type: ignore[attr-defined]
