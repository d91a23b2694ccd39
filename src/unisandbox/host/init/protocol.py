"""The words between the host and init: packets in, packets out, no I/O. native/init/init.c says the same in C.

What init says is a stranger's word: every answer is parsed strictly, and an answer that is not one is a ValueError.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import attrs

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.api.names import CAPABILITIES

MAGIC: Final = 0x54494E55  # "UNIT" in little endian
VERSION: Final = 2
REQUEST: Final = struct.Struct("=IHHIIIIIIIIHHI8xQ")
ANSWER: Final = struct.Struct("=Iii")

FLAG_TTY: Final = 1
FLAG_NO_NEW_PRIVS: Final = 2
FLAG_AMBIENT: Final = 4
FLAG_MAIN: Final = 8
FLAG_CGROUP: Final = 16
FLAG_DENY_CLONE3: Final = 32
FLAG_KEEP_GROUPS: Final = 64

STARTED: Final = 1
ENDED: Final = 2
FAILED: Final = 3
TTY: Final = 4
PLACED: Final = 5

KILLED: Final = tuple(ANSWER.pack(ENDED, 9 | core, 0) for core in (0, 0x80))
"""The packets that tell of an end by SIGKILL."""

MAX_SPEC: Final = 8 << 20
"""Bytes. The kernel takes at most 6 MiB of arguments and environment (bprm_stack_limits(), fs/exec.c)."""
MAX_GROUPS: Final = 65536  # NGROUPS_MAX
_NO_ID: Final = 0xFFFFFFFF  # "leave it as it is" to setresuid

STEPS: Final = (
    "table",
    "clone",
    "reply",
    "fds",
    "spec",
    "setsid",
    "tty",
    "rlimits",
    "bounding",
    "groups",
    "gid",
    "uid",
    "capabilities",
    "ambient",
    "no_new_privs",
    "cwd",
    "signals",
    "exec",
    "cgroup",
    "namespaces",
    "root",
    "go",
)
"""Where a start can fail, in the order of the numbers that init sends (from 1)."""

# Source: include/uapi/asm-generic/resource.h.
RLIMITS: Final = {
    "RLIMIT_CPU": 0,
    "RLIMIT_FSIZE": 1,
    "RLIMIT_DATA": 2,
    "RLIMIT_STACK": 3,
    "RLIMIT_CORE": 4,
    "RLIMIT_RSS": 5,
    "RLIMIT_NPROC": 6,
    "RLIMIT_NOFILE": 7,
    "RLIMIT_MEMLOCK": 8,
    "RLIMIT_AS": 9,
    "RLIMIT_LOCKS": 10,
    "RLIMIT_SIGPENDING": 11,
    "RLIMIT_MSGQUEUE": 12,
    "RLIMIT_NICE": 13,
    "RLIMIT_RTPRIO": 14,
    "RLIMIT_RTTIME": 15,
}


class ExecFailed(Exception):
    """A process could not be started: the `step` that failed (of STEPS, or "oom_score_adj"), and its errno.

    Internal: the caller, who knows what was to be started and where, turns it into an error of the public tree.
    """

    def __init__(self, step: str, number: int) -> None:
        super().__init__(f"{step}: {os.strerror(number)}")
        self.step = step
        self.errno = number


def capability_mask(capabilities: int | Collection[str]) -> int:
    """The 64-bit mask of capability names such as `CAP_CHOWN`; a mask is given back as it is."""
    if isinstance(capabilities, int):
        return capabilities
    mask = 0
    for name in capabilities:
        if name not in CAPABILITIES:
            raise InvalidArgumentError(f"unknown capability {name!r}")
        mask |= 1 << CAPABILITIES.index(name)
    return mask


def _bytes(words: Sequence[str | bytes]) -> tuple[bytes, ...]:
    if isinstance(words, str | bytes):
        raise InvalidArgumentError(f"argv must be a list of words, got {words!r}")
    return tuple(os.fsencode(word) for word in words)


def _environment(env: Mapping[str, str] | Sequence[bytes]) -> tuple[bytes, ...]:
    if not isinstance(env, Mapping):
        return tuple(env)
    for name in env:
        if not name or "=" in name:
            raise InvalidArgumentError(f"environment variable {name!r}: a name must not be empty nor contain '='")
    return tuple(os.fsencode(f"{name}={value}") for name, value in env.items())


def _in_range(what: str, value: int, last: int) -> None:
    if not 0 <= value <= last:
        raise InvalidArgumentError(f"{what} must be from 0 to {last}, got {value}")


@attrs.frozen(kw_only=True, eq=False, repr=False)
class SpawnRequest:
    """One process to start. Ids are numbers of the container; names are looked up by the caller.

    `capabilities` become the bounding set, and for uid 0 (or with `ambient`) the permitted and effective sets.
    `rlimits` are (soft, hard) by OCI name, -1 for unlimited; they can only lower what the container has. `tty` is
    (rows, columns) of a terminal of its own in place of three fds. Without a "/" in it `argv[0]` is looked up in the
    PATH of `env`. With `main` the end of the process ends the container. `deny_clone3` takes clone3 from the process
    where the container's seccomp filter lets it through for init; it needs `no_new_privs`. With `keep_groups` it has
    the groups of init, whatever they are: where nobody may change them.

    Raises:
        InvalidArgumentError: a value that no kernel could take.
    """

    argv: tuple[bytes, ...] = attrs.field(converter=_bytes)
    env: tuple[bytes, ...] = attrs.field(converter=_environment, default=())
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    groups: Sequence[int] = ()
    capabilities: int = attrs.field(converter=capability_mask, default=0)
    ambient: bool = False
    rlimits: Mapping[str, tuple[int, int]] = attrs.field(factory=dict)
    umask: int = 0o022
    no_new_privs: bool = True
    tty: tuple[int, int] | None = None
    oom_score_adj: int | None = None
    main: bool = False
    deny_clone3: bool = False
    keep_groups: bool = False

    def __attrs_post_init__(self) -> None:
        if not self.argv:
            raise InvalidArgumentError("argv is empty: there is no program to start")
        for what, words in (("argv", self.argv), ("env", self.env), ("cwd", (os.fsencode(self.cwd),))):
            if any(b"\0" in word for word in words):
                raise InvalidArgumentError(f"{what} contains a NUL byte")
        for what, number in (("uid", self.uid), ("gid", self.gid), *(("group", group) for group in self.groups)):
            _in_range(what, number, _NO_ID - 1)
        _in_range("the number of groups", len(self.groups), 0 if self.keep_groups else MAX_GROUPS)
        _in_range("umask", self.umask, 0o777)
        _in_range("capabilities", self.capabilities, 2**64 - 1)
        for size in self.tty or ():
            _in_range("a terminal size", size, 0xFFFF)
        if self.oom_score_adj is not None and not -1000 <= self.oom_score_adj <= 1000:
            raise InvalidArgumentError(f"oom_score_adj must be from -1000 to 1000, got {self.oom_score_adj}")
        for name, (soft, hard) in self.rlimits.items():
            if name not in RLIMITS:
                raise InvalidArgumentError(f"unknown resource limit {name!r}")
            for value in (soft, hard):
                _in_range(name, value + 1, 2**64 - 1)


def encode_spec(request: SpawnRequest) -> bytes:
    """What varies in size, as the child reads it. Raises ExecFailed (E2BIG) when the kernel could never take it."""
    groups = struct.pack(f"={len(request.groups)}I", *request.groups)
    rlimits = b"".join(
        struct.pack("=IIQQ", RLIMITS[name], 0, soft % 2**64, hard % 2**64)
        for name, (soft, hard) in request.rlimits.items()
    )
    strings = b"\0".join((os.fsencode(request.cwd), *request.argv, *request.env, b""))
    spec = groups.ljust(-len(groups) % 8 + len(groups), b"\0") + rlimits + strings
    if len(spec) > MAX_SPEC:
        raise ExecFailed("exec", errno.E2BIG)
    return spec


def encode_request(request: SpawnRequest, spec_size: int, tasks: int | None = None) -> bytes:
    """The packet itself; the fds go beside it: with `tasks` a cgroup2 directory and so many open files `tasks`."""
    rows, columns = request.tty or (0, 0)
    return REQUEST.pack(
        MAGIC,
        VERSION,
        (FLAG_TTY if request.tty is not None else 0)
        | (FLAG_NO_NEW_PRIVS if request.no_new_privs else 0)
        | (FLAG_AMBIENT if request.ambient else 0)
        | (FLAG_MAIN if request.main else 0)
        | (FLAG_CGROUP if tasks is not None else 0)
        | (FLAG_DENY_CLONE3 if request.deny_clone3 else 0)
        | (FLAG_KEEP_GROUPS if request.keep_groups else 0),
        spec_size,
        len(request.groups),
        len(request.rlimits),
        len(request.argv),
        len(request.env),
        request.uid,
        request.gid,
        request.umask,
        rows,
        columns,
        tasks or 0,
        request.capabilities,
    )


def decode_answer(packet: bytes) -> tuple[int, int, int]:
    """(kind, a, b) of a packet of the right size; what kind may come when is the reader's to check."""
    if len(packet) != ANSWER.size:
        raise ValueError(f"an answer of {len(packet)} bytes")
    kind, a, b = ANSWER.unpack(packet)
    return kind, a, b


def decode_failure(a: int, b: int) -> ExecFailed:
    """The step and errno of a FAILED answer."""
    if not 1 <= a <= len(STEPS) or not 1 <= b < 4096:
        raise ValueError(f"a failure of step {a} with errno {b}")
    return ExecFailed(STEPS[a - 1], b)


def decode_status(a: int, b: int) -> int:
    """The raw wait status of an ENDED answer, if it is one that a process can end with."""
    exited = a & ~0xFF00 == 0
    signaled = a & ~0xFF == 0 and 1 <= a & 0x7F <= 64
    if b or not (exited or signaled):
        raise ValueError(f"a wait status of {a:#x}")
    return a
