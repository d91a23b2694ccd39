"""Which devices the processes of a cgroup may make and open: rules, and for v2 the BPF program that holds them.

Source: Documentation/admin-guide/cgroup-v1/devices.rst; include/uapi/linux/bpf.h (BPF_PROG_TYPE_CGROUP_DEVICE).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from typing import Final, Literal

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host import syscalls

_PROG_LOAD: Final = 5
_PROG_ATTACH: Final = 8
_PROG_DETACH: Final = 9
_PROG_GET_FD_BY_ID: Final = 13
_PROG_QUERY: Final = 16
_TYPE_CGROUP_DEVICE: Final = 15
_ATTACH_CGROUP_DEVICE: Final = 6
# With it the programs of a cgroup and of all above it must each say yes; without, one of systemd's would exclude ours.
_F_ALLOW_MULTI: Final = 2
_MAX_PROGRAMS: Final = 64  # BPF_CGROUP_MAX_PROGS

_KINDS: Final = {"b": 1, "c": 2}  # BPF_DEVCG_DEV_*
_ACCESS: Final = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_*


def _access(_: object, __: object, value: str) -> None:
    if not value or set(value) - set("rwm") or len(set(value)) != len(value):
        raise InvalidArgumentError(f"device access must be of the letters r, w and m, got {value!r}")


def _kind(_: object, __: object, value: str) -> None:
    if value not in _KINDS:
        raise InvalidArgumentError(f"device kind must be 'c' or 'b', got {value!r}")


def _number(_: object, attribute: attrs.Attribute[int | None], value: int | None) -> None:
    if value is not None and not 0 <= value < 1 << 32:
        raise InvalidArgumentError(f"device {attribute.name} must be 0 to 4294967295, got {value}")


@attrs.frozen
@by_fields
class DeviceRule:
    """What is allowed: `kind` "c" (character) or "b" (block), its numbers (None: any), "r"ead, "w"rite, "m"knod."""

    kind: Literal["c", "b"] = attrs.field(validator=_kind)
    major: int | None = attrs.field(default=None, validator=_number)
    minor: int | None = attrs.field(default=None, validator=_number)
    access: str = attrs.field(default="rwm", validator=_access)

    def __str__(self) -> str:
        """As v1 writes it: `c 1:3 rwm`."""
        major, minor = ("*" if number is None else str(number) for number in (self.major, self.minor))
        return f"{self.kind} {major}:{minor} {self.access}"


def program(rules: Sequence[DeviceRule]) -> bytes:
    """The BPF program which answers 1 for what `rules` allow and 0 for everything else.

    Its context is `struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }`, access_type being
    `access << 16 | kind`.
    """
    code = [
        _insn(0x61, 2, 1, 0, 0),  # r2 = access_type
        _insn(0xBC, 3, 2, 0, 0),  # w3 = w2
        _insn(0x54, 2, 0, 0, 0xFFFF),  # w2 &= 0xffff: the kind
        _insn(0x74, 3, 0, 0, 16),  # w3 >>= 16: what is to be done
        _insn(0x61, 4, 1, 4, 0),  # r4 = major
        _insn(0x61, 5, 1, 8, 0),  # r5 = minor
    ]
    for rule in rules:
        refused = 7 & ~sum(_ACCESS[letter] for letter in rule.access)
        tests = [(0x56, 2, _KINDS[rule.kind])]  # if w2 != kind: next rule
        if refused:
            tests.append((0x46, 3, refused))  # if w3 & refused: next rule
        if rule.major is not None:
            tests.append((0x56, 4, rule.major))
        if rule.minor is not None:
            tests.append((0x56, 5, rule.minor))
        # From the test at `index` to the next rule: the tests after it, then the two instructions of "yes".
        code += [
            _insn(op, register, 0, len(tests) - index + 1, value) for index, (op, register, value) in enumerate(tests)
        ]
        code += [_insn(0xB7, 0, 0, 0, 1), _insn(0x95, 0, 0, 0, 0)]  # return 1
    code += [_insn(0xB7, 0, 0, 0, 0), _insn(0x95, 0, 0, 0, 0)]  # return 0
    return b"".join(code)


def _insn(op: int, dst: int, src: int, offset: int, value: int) -> bytes:
    """`struct bpf_insn`, whose two registers share a byte. JMP32 (class 6) needs Linux 5.1. Little endian only."""
    return struct.pack("<BBhI", op, src << 4 | dst, offset, value)


def load(rules: Sequence[DeviceRule]) -> int:
    """The fd of a loaded program. OSError (EPERM) without CAP_BPF + CAP_NET_ADMIN (or CAP_SYS_ADMIN)."""
    code = program(rules)
    code_buffer = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    attr = struct.pack(
        "=IIQQIIQII16s",
        _TYPE_CGROUP_DEVICE,
        len(code) // 8,
        ctypes.addressof(code_buffer),
        ctypes.addressof(licence),
        0,
        0,
        0,
        0,
        0,
        b"unisandbox_dev",
    )
    return syscalls.bpf(_PROG_LOAD, attr)


def attach(directory: str, rules: Sequence[DeviceRule]) -> None:
    """Make `rules` the device rules of a v2 cgroup, in the place of earlier ones. They live as long as the cgroup.

    Raises:
        OSError: the kernel refused (permission, no CONFIG_CGROUP_BPF).
    """
    try:
        cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise OSError(error.errno, f"cannot open cgroup {directory}: {error.strerror}") from None
    try:
        before = _attached(cgroup)
        new = load(rules)
        try:
            syscalls.bpf(_PROG_ATTACH, struct.pack("=IIII", cgroup, new, _ATTACH_CGROUP_DEVICE, _F_ALLOW_MULTI))
        finally:
            os.close(new)
        # The new rules hold already, and all programs must agree: at no moment is more allowed than before or after.
        for identity in before:
            old = syscalls.bpf(_PROG_GET_FD_BY_ID, struct.pack("=II", identity, 0))
            try:
                syscalls.bpf(_PROG_DETACH, struct.pack("=III", cgroup, old, _ATTACH_CGROUP_DEVICE))
            finally:
                os.close(old)
    except OSError as error:
        raise OSError(error.errno, f"cannot set the device rules of {directory}: {error.strerror}") from None
    finally:
        os.close(cgroup)


def _attached(cgroup: int) -> tuple[int, ...]:
    """The ids of the device programs of this very cgroup."""
    ids = ctypes.create_string_buffer(4 * _MAX_PROGRAMS)
    attr = ctypes.create_string_buffer(
        struct.pack("=IIIIQI", cgroup, _ATTACH_CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), _MAX_PROGRAMS), 32
    )
    # The count comes back in the attribute: `syscalls.bpf` works on a copy, so it is learnt from the zeros after it.
    syscalls.bpf(_PROG_QUERY, attr.raw)
    return tuple(identity for identity in struct.unpack(f"={_MAX_PROGRAMS}I", ids.raw) if identity)
