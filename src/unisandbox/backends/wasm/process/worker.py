"""The process of one guest: waits for it, runs it, and ends as it ends.

It is started by its path in a container (see `interior`), with standard input a socket of the host: the one message
on it says which descriptors come with it. What the host is told of the end, beside the exit status, is in the report:
a sealed memory file of fixed size, which the host reads as a stranger's words.

Message: one byte, whose bits 0, 1 and 2 say which of the three standard streams are given. Descriptors: the request (a
JSON object), the compiled module or component, the report, and the streams that are given. Answer: a JSON object; with
`error` (and `code`, the shell's) the guest was not started, and this process has ended.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from unisandbox.backends.wasm.spec import GuestEnd

REPORT_BYTES: Final = 32 << 10
"""Size of the report; what is not written stays 0."""

MOST_ANSWER: Final = 16 << 10
_DETAIL_CHARACTERS: Final = 4096  # JSON may write each as 6 bytes
_MOST_FDS: Final = 8

MOST_INSTANCES: Final = 64
"""Core instances of a component: each of the modules that it is linked of is one or more."""

MOST_TABLES: Final = 64
"""Of all of them together, and as many memories, which the kernel counts as the sandbox's."""

MOST_TABLE_ELEMENTS: Final = 100_000
"""Of each table, 8 bytes each."""

_OWN_FILES: Final = 4
"""What a guest has open from the beginning: its streams and its root."""

_RUNTIME_FILES: Final = 3
"""What wasmtime opens for itself at a component's first call for a file, which thus cannot open more than it may."""

_TICK_SECONDS: Final = 0.005
_TRAP: Final = 134
_ENDED: Final = 137
_UNLIMITED: Final = 1 << 62


def main() -> None:
    """Wait for a guest, and become it."""
    # What signals do to a process that knows none of them: Python ignores some, and makes an exception of one.
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    channel = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    sys.path.append(str(Path(__file__).resolve().parents[4]))
    # Everything that can be done before there is a guest.
    from unisandbox.backends.wasm.domain import Domain
    from unisandbox.backends.wasm.guest import Guest  # noqa: F401

    fuel = "fuel" in sys.argv[1:]
    domain = Domain.get(fuel=fuel)
    # What compiling and importing took and does not need any more; it would count for the sandbox.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    message, fds, _, _ = socket.recv_fds(channel, 1, _MOST_FDS)
    if not message:
        os._exit(0)  # nobody wants a guest any more
    os.dup2(null, 2)  # what was said on it is for whoever waits for the start
    request, image, report = fds[:3]
    given = iter(fds[3:])
    streams = [next(given) if message[0] & 1 << number else None for number in range(3)]
    with open(request, encoding="ascii") as file:
        wanted = json.load(file)
    try:
        end = _run(domain, wanted, image, report, streams, channel, fuel=fuel)
    except BaseException as error:
        code = getattr(error, "exit_code", None)  # whatever it is, the host shall hear of it
        _answer(channel, {"error": getattr(error, "message", "") or repr(error), "code": code})
        os._exit(_TRAP)
    _finish(report, end.reason, end.signal, end.code, end.detail)


def _answer(channel: socket.socket, words: dict[str, Any]) -> None:
    if "error" in words:
        words["error"] = words["error"][: _DETAIL_CHARACTERS // 2]
    try:
        channel.send(json.dumps(words).encode())
    except OSError:
        return  # whoever asked is gone: the guest goes on, or was never started
    finally:
        channel.close()


def _run(
    domain: Any, wanted: dict[str, Any], image: int, report: int, streams: list[int | None], channel: socket.socket,
    *, fuel: bool,
) -> GuestEnd:  # fmt: skip
    """Run the guest to its end; a component ends this process itself."""
    from unisandbox.api import UnsupportedError
    from unisandbox.backends.wasm.budget import Budget
    from unisandbox.backends.wasm.guest import Guest
    from unisandbox.backends.wasm.spec import GuestLimits, GuestSpec, Preopen

    try:
        module = domain.load(f"/proc/self/fd/{image}")
    except UnsupportedError:
        _run_component(wanted, image, report, streams, channel, fuel=fuel)
    memory = None if wanted["memory"] is None else Budget(wanted["memory"])
    limits = GuestLimits(memory=memory, cpu_seconds=wanted["cpu_seconds"], fuel=wanted["fuel"], files=wanted["files"])
    root = Preopen(wanted["root"], "/", writable=True)
    stdin, stdout, stderr = streams
    spec = GuestSpec(wanted["argv"], wanted["env"], (root,), stdin, stdout, stderr, limits, wanted["cwd"])
    guest = Guest(domain, module, spec)
    guest.start()
    os.close(image)
    _answer(channel, {})
    guest.join()
    end = guest.ended
    assert end is not None  # noqa: S101 (its thread has ended)
    return end


def _run_component(
    wanted: dict[str, Any], image: int, report: int, streams: list[int | None], channel: socket.socket, *, fuel: bool
) -> NoReturn:
    """Run a component's wasi:cli/run in this thread, on this process's own standard streams: a kill ends both."""
    import wasmtime
    from wasmtime import component

    from unisandbox.api import InvalidArgumentError
    from unisandbox.backends.wasm.config import configuration

    engine = wasmtime.Engine(configuration(fuel=fuel))
    try:
        loaded = component.Component.deserialize_file(engine, f"/proc/self/fd/{image}")
    except wasmtime.WasmtimeError as error:
        raise InvalidArgumentError(f"it was compiled for another wasmtime: {error}") from None
    linker = component.Linker(engine)
    linker.add_wasip2()
    store = wasmtime.Store(engine)
    store.set_epoch_deadline(1 << 62)
    if wanted["fuel"] is not None or fuel:
        store.set_fuel(wanted["fuel"] if wanted["fuel"] is not None else (1 << 64) - 1)
    store.set_limits(
        memory_size=-1 if wanted["memory"] is None else wanted["memory"],
        table_elements=MOST_TABLE_ELEMENTS,
        instances=MOST_INSTANCES,
        tables=MOST_TABLES,
        memories=MOST_TABLES,
    )
    wasi = wasmtime.WasiConfig()
    wasi.argv = wanted["argv"]
    wasi.env = list({**wanted["env"], **({} if wanted["cwd"] == "/" else {"PWD": wanted["cwd"]})}.items())
    wasi.preopen_dir(wanted["root"], "/", True)
    for number, fd in enumerate(streams):
        if fd is not None:
            os.dup2(fd, number)
            os.close(fd)
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    store.set_wasi(wasi)
    os.close(image)
    _bound_files(wanted["files"], channel)
    try:
        instance = linker.instantiate(store, loaded)
    except wasmtime.WasmtimeError as error:
        raise InvalidArgumentError(f"the component cannot be given what it imports: {error}", exit_code=126) from None
    run = _entry(engine, loaded, instance, store)
    _answer(channel, {})
    if wanted["cpu_seconds"] is not None:
        threading.Thread(target=_watch, args=(report, wanted["cpu_seconds"]), daemon=True).start()
    try:
        result = run(store)
    except wasmtime.ExitTrap as error:
        _finish(report, "exited", None, error.code & 0xFF, "")
    except wasmtime.Trap as error:
        out = error.trap_code is wasmtime.TrapCode.OUT_OF_FUEL
        name = "" if error.trap_code is None else error.trap_code.name.lower() + "\n"
        _finish(report, "fuel" if out else "trap", None, _ENDED if out else _TRAP, name + str(error))
    except wasmtime.WasmtimeError as error:
        # A component's traps have no number here; their names are in the last words.
        text = str(error)
        name = text.rpartition("wasm trap: ")[2].strip() if "wasm trap: " in text else "error"
        out = name.startswith("all fuel consumed")
        _finish(report, "fuel" if out else "trap", None, _ENDED if out else _TRAP, f"{name}\n{text}")
    _finish(report, "exited", None, 1 if isinstance(result, component.Variant) and result.tag == "err" else 0, "")


def _bound_files(most: int, channel: socket.socket) -> None:
    """Let this process open no more than a guest that may have `most` files; the channel is about to be closed.

    The kernel's limit is the first descriptor that cannot be had. Source: getrlimit(2).
    """
    import resource

    there = {fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")}
    there.discard(channel.fileno())
    free = (fd for fd in itertools.count() if fd not in there)
    limit = next(itertools.islice(free, max(most - _OWN_FILES, 0) + _RUNTIME_FILES, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def _entry(engine: Any, loaded: Any, instance: Any, store: Any) -> Any:
    """The function `run` of the version of wasi:cli/run that the component exports."""
    from unisandbox.api import InvalidArgumentError

    names = [name for name in loaded.type.exports(engine) if name.startswith("wasi:cli/run@0.2.")]
    for name in names:
        outer = loaded.get_export_index(name)
        inner = outer and loaded.get_export_index("run", outer)
        function = inner and instance.get_func(store, inner)
        if function:
            return function
    raise InvalidArgumentError("the component exports no wasi:cli/run: it is no program (a library?)", exit_code=126)


def _watch(report: int, most: float) -> NoReturn:
    """End this process when so much processor time is used."""
    while (left := most - time.process_time()) > 0:
        # No faster than all processors together could use it.
        time.sleep(max(left / (os.cpu_count() or 1), _TICK_SECONDS))
    _finish(report, "cpu", None, _ENDED, "")


def _finish(report: int, reason: str, number: int | None, code: int, detail: str) -> NoReturn:
    """End as the guest did."""
    if reason not in {"exited", "signaled"}:
        words = json.dumps({"reason": reason, "detail": detail[:_DETAIL_CHARACTERS]}).encode("ascii")
        os.pwrite(report, words, 0)
    if number is not None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(code)


if __name__ == "__main__":
    main()
