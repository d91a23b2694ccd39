"""The modules between a guest and its calls, as text: they keep Python off every call that is not ours.

A guest imports the functions of `FRONT`, which jump through a table. `GATE` is made after the guest, with the guest's
memory, and puts its own functions into that table: they hand on to wasmtime's functions (which look for the memory of
the instance that calls them: hence the re-export), or to ours for the three standard streams.

Which descriptor number is a standard stream is kept here, in three globals: a guest may close and renumber them.
wasmtime's table of descriptors holds a stream of its own under the same number, so that both always agree; preview 1
has no dup, so a stream has one number at most.

What is opened is asked for its kind first and again afterwards: a FIFO or a device could block where no kill reaches.
The 64 bytes that the answer needs are borrowed from the guest's memory and put back: its one thread waits for us.

What holds: no guest alone can block on such a file. What does not: where a FIFO lies in a directory that two guests of
a sandbox can write (a guest cannot make one), one can swap it in between the question and the opening of the other,
which then waits, and cannot be killed, until somebody opens the FIFO's other end.
Source: wasi_snapshot_preview1 (filetype 3 directory, 4 regular file, 7 symbolic link; errno 33 mfile, 37 nametoolong,
58 notsup).
"""

from __future__ import annotations

from typing import Final

OURS: Final = "unisandbox:wasm"
"""The module name under which our own functions are defined for `GATE`; no guest may import from it."""

MOST_DESCRIPTORS: Final = 256
"""What one guest may have open at most: its descriptors are those of the host process, which all sandboxes share."""

_TYPES: Final = {
    "fd_read": "i32 i32 i32 i32",
    "fd_write": "i32 i32 i32 i32",
    "fd_close": "i32",
    "fd_renumber": "i32 i32",
    "fd_fdstat_get": "i32 i32",
    "fd_fdstat_set_flags": "i32 i32",
    "path_open": "i32 i32 i32 i32 i32 i64 i64 i32 i32",
}
GUARDED: Final = frozenset({*_TYPES, "poll_oneoff"})
"""The calls that go through the gate, or need it."""


def _front(index: int, name: str, parameters: str) -> str:
    gets = " ".join(f"(local.get {number})" for number in range(len(parameters.split())))
    return (
        f"(type $t{index} (func (param {parameters}) (result i32)))\n"
        f'(func (export "{name}") (type $t{index}) (call_indirect (type $t{index}) {gets} (i32.const {index})))\n'
    )


FRONT: Final = (
    f'(module $unisandbox_front (table (export "gate") {len(_TYPES)} {len(_TYPES)} funcref)\n'
    + "".join(_front(index, name, parameters) for index, (name, parameters) in enumerate(_TYPES.items()))
    + ")"
)

_NATIVE: Final = "\n".join(
    f'(import "wasi_snapshot_preview1" "{name}" (func $native_{name} (param {parameters}) (result i32)))'
    for name, parameters in {
        **_TYPES,
        "path_filestat_get": "i32 i32 i32 i32 i32",
        "clock_time_get": "i32 i64 i32",
    }.items()
)

GATE: Final = f"""(module $unisandbox_gate
(import "guest" "memory" (memory 0))
(import "guest" "gate" (table {len(_TYPES)} funcref))
{_NATIVE}
(import "{OURS}" "read" (func $read (param i32 i32 i32) (result i32)))
(import "{OURS}" "write" (func $write (param i32 i32 i32 i32) (result i32)))
(import "{OURS}" "moved" (func $moved (param i32 i32)))
(import "{OURS}" "set_flags" (func $set_flags (param i32 i32) (result i32)))
(import "{OURS}" "flags" (func $flags (param i32) (result i32)))
(export "memory" (memory 0))
(global $in (mut i32) (i32.const 0))
(global $out (mut i32) (i32.const 1))
(global $err (mut i32) (i32.const 2))
(global $most (mut i32) (i32.const {MOST_DESCRIPTORS}))

;; which stream has this number: 0, 1, 2, or -1
(func $stream (param $fd i32) (result i32)
  (if (i32.eq (local.get $fd) (global.get $in)) (then (return (i32.const 0))))
  (if (i32.eq (local.get $fd) (global.get $out)) (then (return (i32.const 1))))
  (if (i32.eq (local.get $fd) (global.get $err)) (then (return (i32.const 2))))
  (i32.const -1))
(func $set (param $stream i32) (param $fd i32)
  (if (i32.eq (local.get $stream) (i32.const 0)) (then (global.set $in (local.get $fd))))
  (if (i32.eq (local.get $stream) (i32.const 1)) (then (global.set $out (local.get $fd))))
  (if (i32.eq (local.get $stream) (i32.const 2)) (then (global.set $err (local.get $fd))))
  (call $moved (local.get $stream) (local.get $fd)))

(func $fd_read (param i32 i32 i32 i32) (result i32)
  (if (i32.eq (local.get 0) (global.get $in))
    (then (return (call $read (local.get 1) (local.get 2) (local.get 3)))))
  (call $native_fd_read (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
(func $fd_write (param i32 i32 i32 i32) (result i32)
  (if (i32.eq (local.get 0) (global.get $out))
    (then (return (call $write (i32.const 1) (local.get 1) (local.get 2) (local.get 3)))))
  (if (i32.eq (local.get 0) (global.get $err))
    (then (return (call $write (i32.const 2) (local.get 1) (local.get 2) (local.get 3)))))
  (call $native_fd_write (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
(func $fd_close (param $fd i32) (result i32) (local $errno i32) (local $stream i32)
  (local.set $errno (call $native_fd_close (local.get $fd)))
  (local.set $stream (call $stream (local.get $fd)))
  (if (i32.and (i32.eqz (local.get $errno)) (i32.ge_s (local.get $stream) (i32.const 0)))
    (then (call $set (local.get $stream) (i32.const -1))))
  (local.get $errno))
(func $fd_renumber (param $from i32) (param $to i32) (result i32) (local $errno i32) (local $stream i32)
  (local.set $errno (call $native_fd_renumber (local.get $from) (local.get $to)))
  (if (i32.or (local.get $errno) (i32.eq (local.get $from) (local.get $to))) (then (return (local.get $errno))))
  (local.set $stream (call $stream (local.get $to)))
  (if (i32.ge_s (local.get $stream) (i32.const 0)) (then (call $set (local.get $stream) (i32.const -1))))
  (local.set $stream (call $stream (local.get $from)))
  (if (i32.ge_s (local.get $stream) (i32.const 0)) (then (call $set (local.get $stream) (local.get $to))))
  (i32.const 0))
(func $fd_fdstat_get (param $fd i32) (param $to i32) (result i32) (local $errno i32) (local $stream i32)
  (local.set $errno (call $native_fd_fdstat_get (local.get $fd) (local.get $to)))
  (local.set $stream (call $stream (local.get $fd)))
  (if (i32.and (i32.eqz (local.get $errno)) (i32.ge_s (local.get $stream) (i32.const 0)))
    (then (i32.store16 offset=2 (local.get $to) (call $flags (local.get $stream)))))
  (local.get $errno))
(func $fd_fdstat_set_flags (param $fd i32) (param $flags i32) (result i32) (local $stream i32)
  (local.set $stream (call $stream (local.get $fd)))
  (if (i32.ge_s (local.get $stream) (i32.const 0))
    (then (return (call $set_flags (local.get $stream) (local.get $flags)))))
  (call $native_fd_fdstat_set_flags (local.get $fd) (local.get $flags)))

(func $path_open
  (param $fd i32) (param $lookup i32) (param $path i32) (param $length i32) (param $oflags i32)
  (param $rights i64) (param $inheriting i64) (param $fdflags i32) (param $to i32) (result i32)
  (local $errno i32) (local $kind i32) (local $at i32)
  {" ".join(f"(local ${n} i64)" for n in range(8))}
  (if (i32.gt_u (local.get $length) (i32.const 4096)) (then (return (i32.const 37))))
  ;; a memory without pages holds no path: wasmtime says so
  (if (memory.size)
    (then
      ;; borrow 64 bytes that do not overlap the path
      (if (i32.lt_u (local.get $path) (i32.const 64))
        (then (local.set $at (i32.and (i32.add (i32.add (local.get $path) (local.get $length)) (i32.const 7))
          (i32.const -8)))))
      {"".join(f"(local.set ${n} (i64.load offset={8 * n} (local.get $at)))" for n in range(8))}
      (local.set $errno (call $native_path_filestat_get
        (local.get $fd) (local.get $lookup) (local.get $path) (local.get $length) (local.get $at)))
      (local.set $kind (i32.load8_u offset=16 (local.get $at)))
      {"".join(f"(i64.store offset={8 * n} (local.get $at) (local.get ${n}))" for n in range(8))}
      (if (i32.eqz (local.get $errno)) (then
        (if (i32.eqz (i32.or (i32.eq (local.get $kind) (i32.const 7))
              (i32.or (i32.eq (local.get $kind) (i32.const 3)) (i32.eq (local.get $kind) (i32.const 4)))))
          (then (return (i32.const 58))))))))
  (local.set $errno (call $native_path_open (local.get $fd) (local.get $lookup) (local.get $path) (local.get $length)
    (local.get $oflags) (local.get $rights) (local.get $inheriting) (local.get $fdflags) (local.get $to)))
  (if (local.get $errno) (then (return (local.get $errno))))
  ;; the lowest free number is given, so that a number says how many are open
  (if (i32.ge_u (i32.load (local.get $to)) (global.get $most))
    (then
      (drop (call $native_fd_close (i32.load (local.get $to))))
      (return (i32.const 33))))
  ;; what was opened may be another file than the one that was asked for its kind
  (local.set $at (select (i32.const 128) (i32.const 0) (i32.lt_u (local.get $to) (i32.const 64))))
  {"".join(f"(local.set ${n} (i64.load offset={8 * n} (local.get $at)))" for n in range(3))}
  (local.set $errno (call $native_fd_fdstat_get (i32.load (local.get $to)) (local.get $at)))
  (local.set $kind (i32.load8_u (local.get $at)))
  {"".join(f"(i64.store offset={8 * n} (local.get $at) (local.get ${n}))" for n in range(3))}
  (if (i32.or (local.get $errno)
        (i32.eqz (i32.or (i32.eq (local.get $kind) (i32.const 3)) (i32.eq (local.get $kind) (i32.const 4)))))
    (then
      (drop (call $native_fd_close (i32.load (local.get $to))))
      (return (i32.const 58))))
  (i32.const 0))

;; what this guest may have open, said before it runs
(func (export "bound") (param i32) (global.set $most (local.get 0)))
;; for our own calls: the kind of a descriptor of wasmtime's, or an errno below 0; and the guest's monotonic time.
;; both use bytes of the guest's memory that the caller of a call of ours has offered for its answer
(func (export "kind") (param $fd i32) (param $at i32) (result i32) (local $errno i32)
  (local.set $errno (call $native_fd_fdstat_get (local.get $fd) (local.get $at)))
  (if (local.get $errno) (then (return (i32.sub (i32.const 0) (local.get $errno)))))
  (i32.load8_u (local.get $at)))
(func (export "now") (param $at i32) (result i64)
  (if (call $native_clock_time_get (i32.const 1) (i64.const 1) (local.get $at)) (then unreachable))
  (i64.load (local.get $at)))
(elem (i32.const 0) {" ".join(f"${name}" for name in _TYPES)}))"""
