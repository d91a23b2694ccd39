"""Compile a profile to the kernel's filter program, by libseccomp.

libseccomp is called through ctypes: every host that has crun or runc has it, and no Python package is needed.
Source: seccomp_init(3), seccomp_rule_add(3), seccomp_attr_set(3), seccomp_export_bpf(3).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from typing import Final

from unisandbox.api.errors import UnavailableError
from unisandbox.host.seccomp.profile import MACHINES, ArgumentTest, Profile, Rule

_LIBRARY: Final = "libseccomp.so.2"
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_KILL_PROCESS: Final = 0x80000000
_ATTR_ACT_BADARCH: Final = 2
_ATTR_CTL_NNP: Final = 3
_ATTR_CTL_OPTIMIZE: Final = 8
_BINARY_TREE: Final = 2
_COMPARISONS: Final = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}
_OPTIMIZE_SINCE: Final = (2, 5)
_LEAST: Final = (2, 4)
"""SCMP_ACT_KILL_PROCESS came with this."""
_UNKNOWN: Final = -1
"""__NR_SCMP_ERROR. Other negative numbers are calls that this machine does not have."""


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise UnavailableError(
            f"cannot compile a seccomp filter: {_LIBRARY} is not installed ({error})", hint="apt install libseccomp2"
        ) from None
    context = ctypes.c_void_p
    library.seccomp_version.restype = ctypes.POINTER(_Version)
    library.seccomp_init.restype = context
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.restype = None
    library.seccomp_release.argtypes = [context]
    library.seccomp_arch_native.restype = ctypes.c_uint32
    library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    library.seccomp_arch_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_arch_add.argtypes = [context, ctypes.c_uint32]
    library.seccomp_arch_remove.argtypes = [context, ctypes.c_uint32]
    library.seccomp_attr_set.argtypes = [context, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        context, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Comparison),
    ]  # fmt: skip
    library.seccomp_export_bpf.argtypes = [context, ctypes.c_int]
    return library


def library_version() -> str:
    """The version of the installed libseccomp, like "2.5.4".

    Raises:
        UnavailableError: it is not installed.
    """
    return ".".join(map(str, _version()))


def _version() -> tuple[int, int, int]:
    version = _library().seccomp_version().contents
    return version.major, version.minor, version.micro


def compile_bpf(profile: Profile, machine: str | None = None) -> bytes:
    """The filter program of `profile`: an array of `struct sock_filter`, 8 bytes each.

    System calls of another ABI than `machine`'s own (i386 and x32 on x86_64) kill the process by SIGSYS.

    Args:
        profile: what to compile.
        machine: as by `uname -m`; None: this one. For another, system calls that the installed libseccomp does not know
            get the profile's default answer.

    Raises:
        UnavailableError: libseccomp is missing or older than 2.4, or the profiles are not written for this machine.
    """
    library = _library()
    if _version() < _LEAST:
        raise UnavailableError(
            f"cannot compile a seccomp filter: libseccomp {library_version()} is older than 2.4",
            hint="install a newer libseccomp2",
        )
    machine = machine or os.uname().machine
    if machine not in MACHINES:
        raise UnavailableError(
            f"seccomp profile {profile.name!r} is not written for machine {machine!r} (only {', '.join(MACHINES)})"
        )
    context = library.seccomp_init(_ERRNO | profile.default_errno)
    if not context:
        raise MemoryError("seccomp_init")
    try:
        native = _set_machine(library, context, machine)
        _check(library.seccomp_attr_set(context, _ATTR_ACT_BADARCH, _KILL_PROCESS), "choose the answer to other ABIs")
        _check(library.seccomp_attr_set(context, _ATTR_CTL_NNP, 0), "leave no_new_privs to the caller")
        if _version() >= _OPTIMIZE_SINCE:
            _check(library.seccomp_attr_set(context, _ATTR_CTL_OPTIMIZE, _BINARY_TREE), "make a binary tree")
        for rule in profile.rules:
            for name in rule.names:
                _add(library, context, profile, rule, name, native)
        return _export(library, context)
    finally:
        library.seccomp_release(context)


def _set_machine(library: ctypes.CDLL, context: int, machine: str) -> bool:
    """Compile for `machine` only; whether it is the one we run on."""
    wanted = library.seccomp_arch_resolve_name(machine.encode())
    native = library.seccomp_arch_native()
    if wanted == 0:
        raise UnavailableError(f"libseccomp {library_version()} does not know machine {machine!r}")
    if wanted == native:
        return True
    _check(library.seccomp_arch_add(context, wanted), f"add machine {machine}")
    _check(library.seccomp_arch_remove(context, native), "remove the native machine")
    return False


def _add(library: ctypes.CDLL, context: int, profile: Profile, rule: Rule, name: str, native: bool) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number == _UNKNOWN and native:
        number = profile.numbers.get(name, _UNKNOWN)
    if number == _UNKNOWN or (number < 0 and native):
        return
    action = _ERRNO | rule.errno if rule.errno else _ALLOW
    if action == _ERRNO | profile.default_errno and not rule.tests:
        return  # libseccomp refuses rules that say what the default says
    tests = (_Comparison * len(rule.tests))(*map(_comparison, rule.tests))
    result = library.seccomp_rule_add_array(context, action, number, len(rule.tests), tests)
    if result == -errno.EDOM and not native:
        return  # the call does not exist on that machine
    _check(result, f"add a rule for {name}")


def _comparison(test: ArgumentTest) -> _Comparison:
    return _Comparison(test.index, _COMPARISONS[test.comparison], test.value, test.second)


def _export(library: ctypes.CDLL, context: int) -> bytes:
    fd = os.memfd_create("seccomp-bpf", os.MFD_CLOEXEC)
    try:
        _check(library.seccomp_export_bpf(context, fd), "export the filter")
        size = os.fstat(fd).st_size
        program = os.pread(fd, size, 0)
    finally:
        os.close(fd)
    if not program or len(program) % 8:
        raise OSError(errno.EIO, f"libseccomp exported {len(program)} bytes, which is no filter program")
    return program


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"libseccomp {library_version()} could not {what}: {os.strerror(-result)}")
