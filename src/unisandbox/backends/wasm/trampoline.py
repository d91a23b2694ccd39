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

from collections.abc import Mapping
from typing import Final

WASI: Final = "wasi_snapshot_preview1"
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

# The calls that write to files, or move them, beside "fd_write" and "path_open".
_WRITING: Final = {
    "fd_pwrite": "i32 i32 i32 i64 i32",
    "fd_allocate": "i32 i64 i64",
    "fd_filestat_set_size": "i32 i64",
    "path_create_directory": "i32 i32 i32",
    "path_symlink": "i32 i32 i32 i32 i32",
    "path_link": "i32 i32 i32 i32 i32 i32 i32",
    "path_rename": "i32 i32 i32 i32 i32 i32",
}
COUNTED: Final = frozenset({*GUARDED, *_WRITING})
"""The same where what a guest writes is counted before (`disk`)."""


def _front_function(index: int, name: str, parameters: str) -> str:
    gets = " ".join(f"(local.get {number})" for number in range(len(parameters.split())))
    return (
        f"(type $t{index} (func (param {parameters}) (result i32)))\n"
        f'(func (export "{name}") (type $t{index}) (call_indirect (type $t{index}) {gets} (i32.const {index})))\n'
    )


def _front(types: Mapping[str, str]) -> str:
    functions = (_front_function(index, name, parameters) for index, (name, parameters) in enumerate(types.items()))
    return f'(module $unisandbox_front (table (export "gate") {len(types)} {len(types)} funcref)\n{"".join(functions)})'


def _native(types: Mapping[str, str]) -> str:
    return "\n".join(
        f'(import "{WASI}" "{name}" (func $native_{name} (param {parameters}) (result i32)))'
        for name, parameters in {
            **types,
            "path_filestat_get": "i32 i32 i32 i32 i32",
            "clock_time_get": "i32 i64 i32",
        }.items()
    )


FRONT: Final = _front(_TYPES)
COUNTED_FRONT: Final = _front(_TYPES | _WRITING)

# Bytes that a call may take for what it makes: a block for that, and one for its directory, or for what a write begins
# and ends in.
_EACH: Final = 8192


def _take(fd: str, size: str = "(i64.const 0)") -> str:
    """Take them, and so many more, for what a descriptor is in; a function that cannot returns the errno."""
    return f"(if (local.tee $errno (call $take {fd} {size})) (then (return (local.get $errno))))"


def _gets(first: int, count: int) -> str:
    return " ".join(f"(local.get {first + number})" for number in range(count))


def _words(act: str) -> str:
    """Do `act` with the global of the word in which the bit of `$fd` is."""
    which = "(i32.shr_u (local.get $fd) (i32.const 6))"
    numbers = range(MOST_DESCRIPTORS // 64)
    return "".join(f"(if (i32.eq {which} (i32.const {n})) (then {act.format(f'$free{n}')}))" for n in numbers)


_WORD: Final = _words("(return (global.get {}))")
_SET_WORD: Final = _words("(global.set {} (local.get $value))")

# What a guest has taken of its sandbox's disk and not used up; asked for in large pieces, so that few writes ask. What
# is in directories of the host is not counted: `$free` has a bit for each such descriptor.
_COUNTING: Final = f"""
(import "{OURS}" "room" (func $room (param i32) (result i32)))
(import "{OURS}" "move" (func $move (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
(global $credit (mut i64) (i64.const 0))
{" ".join(f"(global $free{n} (mut i64) (i64.const 0))" for n in range(MOST_DESCRIPTORS // 64))}
(func $word (param $fd i32) (result i64)
  {_WORD}
  (i64.const 0))
(func $is_free (param $fd i32) (result i32)
  (i32.wrap_i64 (i64.and (i64.const 1)
    (i64.shr_u (call $word (local.get $fd)) (i64.extend_i32_u (local.get $fd))))))
;; whether the descriptor `$fd` is free
(func $like (param $fd i32) (param $free i32) (local $bit i64) (local $value i64)
  (local.set $bit (i64.shl (i64.const 1) (i64.extend_i32_u (local.get $fd))))
  (local.set $value (select (i64.or (call $word (local.get $fd)) (local.get $bit))
    (i64.and (call $word (local.get $fd)) (i64.xor (local.get $bit) (i64.const -1))) (local.get $free)))
  {_SET_WORD})
(func (export "free") (param $fd i32) (call $like (local.get $fd) (i32.const 1)))
;; take what `$bytes` come to at most, in whatever `$fd` is in; the errno (51 is nospc)
(func $take (param $fd i32) (param $bytes i64) (result i32) (local $more i32)
  (if (call $is_free (local.get $fd)) (then (return (i32.const 0))))
  (local.set $bytes (i64.add (local.get $bytes) (i64.const {_EACH})))
  (if (i64.gt_u (local.get $bytes) (i64.const 0x7fffffff)) (then (return (i32.const 51))))
  (if (i64.gt_s (local.get $bytes) (global.get $credit))
    (then
      (local.set $more (call $room (i32.wrap_i64 (local.get $bytes))))
      (if (i32.eqz (local.get $more)) (then (return (i32.const 51))))
      (global.set $credit (i64.extend_i32_u (local.get $more)))))
  (global.set $credit (i64.sub (global.get $credit) (local.get $bytes)))
  (i32.const 0))
;; the bytes of the buffers that are in the memory; wasmtime refuses others
(func $length (param $at i32) (param $count i32) (result i64) (local $sum i64)
  (block $done (loop $next
    (br_if $done (i32.eqz (local.get $count)))
    (br_if $done (i64.gt_u (i64.add (i64.extend_i32_u (local.get $at)) (i64.const 8))
      (i64.mul (i64.extend_i32_u (memory.size)) (i64.const 65536))))
    (local.set $sum (i64.add (local.get $sum) (i64.extend_i32_u (i32.load offset=4 (local.get $at)))))
    (local.set $at (i32.add (local.get $at) (i32.const 8)))
    (local.set $count (i32.sub (local.get $count) (i32.const 1)))
    (br $next)))
  (local.get $sum))
(func $fd_pwrite (param i32 i32 i32 i64 i32) (result i32) (local $errno i32)
  {_take("(local.get 0)", "(call $length (local.get 1) (local.get 2))")}
  (call $native_fd_pwrite (local.get 0) (local.get 1) (local.get 2) (local.get 3) (local.get 4)))
(func $fd_allocate (param i32 i64 i64) (result i32) (local $errno i32)
  (if (i64.gt_u (local.get 2) (i64.const 0x7fffffff)) (then (return (i32.const 51))))
  {_take("(local.get 0)", "(local.get 2)")}
  (call $native_fd_allocate (local.get 0) (local.get 1) (local.get 2)))
(func $fd_filestat_set_size (param i32 i64) (result i32) (local $errno i32)
  {_take("(local.get 0)")}
  (call $native_fd_filestat_set_size (local.get 0) (local.get 1)))
(func $path_create_directory (param i32 i32 i32) (result i32) (local $errno i32)
  {_take("(local.get 0)")}
  (call $native_path_create_directory (local.get 0) (local.get 1) (local.get 2)))
(func $path_symlink (param i32 i32 i32 i32 i32) (result i32) (local $errno i32)
  {_take("(local.get 2)", "(i64.const 4096)")}
  (call $native_path_symlink (local.get 0) (local.get 1) (local.get 2) (local.get 3) (local.get 4)))
;; these two while nobody counts: ours calls "moved_now" when it may be done. Between what is counted and what is not
;; they are refused, as between file systems (75 is xdev)
(func $path_link (param i32 i32 i32 i32 i32 i32 i32) (result i32) (local $errno i32)
  (if (i32.ne (call $is_free (local.get 0)) (call $is_free (local.get 4))) (then (return (i32.const 75))))
  (if (call $is_free (local.get 0)) (then (return (call $native_path_link {_gets(0, 7)}))))
  {_take("(local.get 4)")}
  (call $move (i32.const 1) {_gets(0, 7)}))
(func $path_rename (param i32 i32 i32 i32 i32 i32) (result i32) (local $errno i32)
  (if (i32.ne (call $is_free (local.get 0)) (call $is_free (local.get 3))) (then (return (i32.const 75))))
  (if (call $is_free (local.get 0)) (then (return (call $native_path_rename {_gets(0, 6)}))))
  {_take("(local.get 3)")}
  (call $move (i32.const 0) {_gets(0, 6)} (i32.const 0)))
(func (export "moved_now") (param $link i32) (param i32 i32 i32 i32 i32 i32 i32) (result i32)
  (if (local.get $link) (then (return (call $native_path_link {_gets(1, 7)}))))
  (call $native_path_rename {_gets(1, 6)}))
"""


def _gate(types: Mapping[str, str], *, counted: bool) -> str:
    """The text of the gate that puts functions of these types into the table."""

    def counting(text: str) -> str:
        return text if counted else ""

    return f"""(module $unisandbox_gate
(import "guest" "memory" (memory 0))
(import "guest" "gate" (table {len(types)} funcref))
{_native(types)}
(import "{OURS}" "read" (func $read (param i32 i32 i32) (result i32)))
(import "{OURS}" "write" (func $write (param i32 i32 i32 i32) (result i32)))
(import "{OURS}" "moved" (func $moved (param i32 i32)))
(import "{OURS}" "set_flags" (func $set_flags (param i32 i32) (result i32)))
(import "{OURS}" "flags" (func $flags (param i32) (result i32)))
(export "memory" (memory 0))
{counting(_COUNTING)}
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
(func $fd_write (param i32 i32 i32 i32) (result i32) (local $errno i32)
  (if (i32.eq (local.get 0) (global.get $out))
    (then (return (call $write (i32.const 1) (local.get 1) (local.get 2) (local.get 3)))))
  (if (i32.eq (local.get 0) (global.get $err))
    (then (return (call $write (i32.const 2) (local.get 1) (local.get 2) (local.get 3)))))
  {counting(_take("(local.get 0)", "(call $length (local.get 1) (local.get 2))"))}
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
  {counting("(call $like (local.get $to) (call $is_free (local.get $from)))")}
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
  {counting(f"(if (i32.and (local.get $oflags) (i32.const 1)) (then {_take('(local.get $fd)')}))")}
  (local.set $errno (call $native_path_open (local.get $fd) (local.get $lookup) (local.get $path) (local.get $length)
    (local.get $oflags) (local.get $rights) (local.get $inheriting) (local.get $fdflags) (local.get $to)))
  (if (local.get $errno) (then (return (local.get $errno))))
  ;; the lowest free number is given, so that a number says how many are open
  (if (i32.ge_u (i32.load (local.get $to)) (global.get $most))
    (then
      (drop (call $native_fd_close (i32.load (local.get $to))))
      (return (i32.const 33))))
  {counting("(call $like (i32.load (local.get $to)) (call $is_free (local.get $fd)))")}
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
(elem (i32.const 0) {" ".join(f"${name}" for name in types)}))"""


GATE: Final = _gate(_TYPES, counted=False)
COUNTED_GATE: Final = _gate(_TYPES | _WRITING, counted=True)
