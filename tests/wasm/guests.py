"""Guests for tests, made from text, and how tests start them and wait for them."""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType

from unisandbox.backends.wasm.domain import Domain, GuestModule
from unisandbox.backends.wasm.guest import Guest, GuestEnd, GuestSpec

DEADLINE = 30.0

WASI = """
(import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_close" (func $fd_close (param i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_renumber" (func $fd_renumber (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_fdstat_get" (func $fd_fdstat_get (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_fdstat_set_flags" (func $fd_fdstat_set_flags (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_prestat_get" (func $fd_prestat_get (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_open"
  (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "poll_oneoff" (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
(import "wasi_snapshot_preview1" "clock_time_get" (func $clock_time_get (param i32 i64 i32) (result i32)))
(memory (export "memory") 1)
(func $say (param $from i32) (param $length i32)
  (i32.store (i32.const 0) (local.get $from)) (i32.store (i32.const 4) (local.get $length))
  (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
(func $check (param $errno i32)
  (if (local.get $errno) (then (call $proc_exit (i32.add (i32.const 100) (local.get $errno))))))
(func $listen (result i32)
  (i32.store (i32.const 0) (i32.const 2048)) (i32.store (i32.const 4) (i32.const 1024))
  (call $check (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
  (i32.load (i32.const 8)))
"""
"""Calls, and what the bodies of most tests use: $say(from, length), $check(errno), $listen() into 2048."""


def program(start: str, more: str = "") -> str:
    """The text of a module that does `start`."""
    return f'(module {WASI} {more} (func (export "_start") {start}))'


READS = program("(call $say (i32.const 1024) (i32.const 1)) (drop (call $listen))", '(data (i32.const 1024) ".")')
"""Says a dot and waits for input."""

SPINS = program("(loop br 0)")
"""Never ends and calls nothing."""

SLEEPS = program(
    """(i64.store offset=24 (i32.const 4096) (i64.const 1000000000000))
    (drop (call $poll_oneoff (i32.const 4096) (i32.const 8192) (i32.const 1) (i32.const 8)))"""
)
"""For 1,000 seconds."""

LOOKS_FOR_A_FILE = program(
    """(call $proc_exit (call $path_open (i32.const 3) (i32.const 1) (i32.const 8) (i32.const 1)
    (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 16)))""",
    '(data (i32.const 8) "f")',
)
"""Opens /f to read; exits with the errno."""


def wait_for(guest: Guest, timeout: float = DEADLINE) -> GuestEnd:
    """Its end, for tests without an event loop."""
    deadline = time.monotonic() + timeout
    while guest.ended is None:
        if time.monotonic() > deadline:
            raise TimeoutError("the guest does not end")
        time.sleep(0.0005)
    guest.join()
    return guest.ended


class Runner:
    """Starts guests whose ends are waited for."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.guests: list[Guest] = []

    def module(self, text: str) -> GuestModule:
        return self.domain.compile(text)

    def start(self, module: GuestModule | str, spec: GuestSpec | None = None) -> Guest:
        made = self.domain.compile(module) if isinstance(module, str) else module
        guest = Guest(self.domain, made, spec or GuestSpec(argv=["guest"]))
        guest.start()
        self.guests.append(guest)
        return guest

    def ended(self, guest: Guest) -> GuestEnd:
        return wait_for(guest)

    def end(self, module: GuestModule | str, spec: GuestSpec | None = None) -> GuestEnd:
        return wait_for(self.start(module, spec))


class Pipe:
    """A pipe whose ends are closed at last, but for those that were given to a guest."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
        self._ours = {self.reader, self.writer}

    def give_reader(self) -> int:
        self._ours.discard(self.reader)
        return self.reader

    def give_writer(self) -> int:
        self._ours.discard(self.writer)
        return self.writer

    def write(self, data: bytes) -> None:
        os.write(self.writer, data)

    def read(self) -> bytes:
        """All until the end; waits for it."""
        found = b""
        while piece := os.read(self.reader, 65536):
            found += piece
        return found

    def read_some(self) -> bytes:
        """What comes next."""
        return os.read(self.reader, 65536)

    def close_reader(self) -> None:
        self._close(self.reader)

    def close_writer(self) -> None:
        self._close(self.writer)

    def _close(self, end: int) -> None:
        if end in self._ours:
            self._ours.discard(end)
            os.close(end)

    def __enter__(self) -> Pipe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for end in list(self._ours):
            with contextlib.suppress(OSError):
                self._close(end)
