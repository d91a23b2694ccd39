"""The profile is complete, consistent, and compiles for every machine that it is written for."""

from __future__ import annotations

import ctypes
import errno
import json

import pytest

from unisandbox.api.errors import UnavailableError
from unisandbox.host.seccomp import DEFAULT, ArgumentTest, Profile, Rule, compile_bpf, library_version
from unisandbox.host.seccomp import compile as compiling
from unisandbox.host.seccomp.profile import MACHINES

NAMED = frozenset(name for rule in DEFAULT.rules for name in rule.names)


def _names_of(machine: str) -> set[str]:
    """Every system call of a machine that the installed libseccomp knows."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p
    library.seccomp_syscall_resolve_num_arch.argtypes = [ctypes.c_uint32, ctypes.c_int]
    token = library.seccomp_arch_resolve_name(machine.encode())
    found = (library.seccomp_syscall_resolve_num_arch(token, number) for number in range(1000))
    return {name.decode() for name in found if name}


@pytest.mark.parametrize("machine", MACHINES)
def test_every_known_system_call_has_an_answer_of_its_own(machine: str) -> None:
    names = _names_of(machine)
    assert len(names) > 300
    newer_than_the_profile = {n for n in names if n not in NAMED and n not in DEFAULT.numbers}
    if library_version() == "2.5.4":  # newer libraries may know calls that the profile leaves to ENOSYS
        assert not newer_than_the_profile


@pytest.mark.parametrize("machine", MACHINES)
def test_it_compiles_to_a_filter_that_the_kernel_can_hold(machine: str) -> None:
    program = compile_bpf(DEFAULT, machine)
    assert len(program) % 8 == 0
    assert 100 * 8 < len(program) <= 4096 * 8  # BPF_MAXINSNS


def test_compiling_is_deterministic() -> None:
    assert compile_bpf(DEFAULT) == compile_bpf(DEFAULT)


def test_answers_can_be_asked_for() -> None:
    assert DEFAULT.answers("read") == {0}
    assert DEFAULT.answers("bpf") == {errno.EPERM}
    assert DEFAULT.answers("clone3") == {errno.ENOSYS}
    assert DEFAULT.answers("clone") == {0, errno.EPERM}
    assert DEFAULT.answers("socket") == {0, errno.EAFNOSUPPORT}
    assert DEFAULT.answers("a_call_of_the_future") == {errno.ENOSYS}


def test_the_oci_form_says_the_same() -> None:
    oci = json.loads(json.dumps(DEFAULT.to_oci("x86_64")))
    assert oci["defaultAction"] == "SCMP_ACT_ERRNO"
    assert oci["defaultErrnoRet"] == errno.ENOSYS
    assert oci["architectures"] == ["SCMP_ARCH_X86_64"]
    said: dict[str, set[int]] = {}
    for rule in oci["syscalls"]:
        for name in rule["names"]:
            said.setdefault(name, set()).add(rule.get("errnoRet", 0))
    assert {name: DEFAULT.answers(name) for name in said} == said
    assert NAMED - set(said) == {"clone3"}  # ENOSYS is the default's answer too


def test_contradictions_are_refused() -> None:
    tests = (ArgumentTest(0, "EQ", 1),)
    for rules in (
        (Rule(("read",)), Rule(("read",), errno.EPERM)),
        (Rule(("read",), tests=tests), Rule(("read",), errno.EPERM)),
        (Rule(("read",)), Rule(("read",), errno.EPERM, tests)),
    ):
        with pytest.raises(ValueError, match="read"):
            Profile("bad", rules)
    with pytest.raises(ValueError, match="in range"):
        ArgumentTest(6, "EQ", 1)


def test_a_missing_library_is_said_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_LIBRARY", "libno-such-seccomp.so.2")
    compiling._library.cache_clear()
    try:
        with pytest.raises(UnavailableError, match=r"libno-such-seccomp") as caught:
            compile_bpf(DEFAULT)
        assert "apt install libseccomp2" in caught.value.hint
    finally:
        compiling._library.cache_clear()


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(UnavailableError, match="pdp11"):
        compile_bpf(DEFAULT, "pdp11")
