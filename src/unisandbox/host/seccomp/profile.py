"""What a seccomp profile is: rules from names of system calls to answers, and the same as OCI's JSON.

A profile answers every system call: one of its rules decides, or `default_errno` does. Rules for the same name add up,
so those with different answers must test the same argument in ways that exclude each other; a rule without tests must
be the only one for its name. `Profile` checks that much when it is made.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Literal, NamedTuple

import attrs

Comparison = Literal["EQ", "NE", "LT", "LE", "GT", "GE", "MASKED_EQ"]

MACHINES: Mapping[str, str] = {
    "x86_64": "SCMP_ARCH_X86_64",
    "aarch64": "SCMP_ARCH_AARCH64",
}
"""The machines that our profiles are written for (by `uname -m`): 64 bits, and clone(2) with its flags in front."""


@attrs.frozen(cache_hash=True)
class ArgumentTest:
    """A condition on one argument of a system call.

    The comparison is of 64 bits, while the kernel looks only at 32 of an `int`: what is allowed by equality must be
    equal in all bits, what is forbidden must not be avoidable by setting high ones.

    Attributes:
        index: which argument, 0-5.
        comparison: MASKED_EQ: argument & value == second.
        value: what to compare with, or the mask.
        second: see MASKED_EQ.
    """

    index: int = attrs.field(validator=attrs.validators.in_(range(6)))
    comparison: Comparison
    value: int
    second: int = 0


class Rule(NamedTuple):
    """An answer to some system calls.

    Attributes:
        names: of the system calls. Names that a machine does not have are passed over.
        errno: 0: allowed. Otherwise the call fails with this error, and the kernel does nothing else.
        tests: all of these must hold; none: always.
    """

    names: tuple[str, ...]
    errno: int = 0
    tests: tuple[ArgumentTest, ...] = ()


@attrs.frozen(cache_hash=True)
class Profile:
    """A seccomp profile.

    Attributes:
        name: to speak of it.
        rules: see the module's text.
        default_errno: the answer to every call that no rule decides. ENOSYS, so that programs which try a newer system
            call than the profile knows fall back to an older one, as on an older kernel.
        numbers: numbers of system calls that libseccomp may be too old to know by name; the same on every machine, as
            are all since 424 (Linux 5.1).
    """

    name: str
    rules: tuple[Rule, ...]
    default_errno: int = errno.ENOSYS
    numbers: Mapping[str, int] = attrs.field(factory=dict, hash=False)

    def __attrs_post_init__(self) -> None:
        unconditional: set[str] = set()
        conditional: set[str] = set()
        for rule in self.rules:
            for name in rule.names:
                if name in unconditional or (not rule.tests and name in conditional):
                    raise ValueError(f"profile {self.name!r}: {name} has a rule without tests and another one")
                (conditional if rule.tests else unconditional).add(name)

    def answers(self, name: str) -> frozenset[int]:
        """The errors with which this call may be answered (0: allowed), for whatever arguments."""
        return frozenset(rule.errno for rule in self.rules if name in rule.names) or frozenset({self.default_errno})

    def to_oci(self, machine: str) -> dict[str, object]:
        """The object `linux.seccomp` of an OCI runtime config, for the machine of that name (`uname -m`).

        Source: https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md#seccomp
        """
        return {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": self.default_errno,
            "architectures": [MACHINES[machine]],
            "syscalls": [_rule_to_oci(rule) for rule in self.rules if rule.tests or rule.errno != self.default_errno],
        }


def _rule_to_oci(rule: Rule) -> dict[str, object]:
    result: dict[str, object] = {"names": list(rule.names), "action": "SCMP_ACT_ALLOW"}
    if rule.errno:
        result |= {"action": "SCMP_ACT_ERRNO", "errnoRet": rule.errno}
    if rule.tests:
        result["args"] = [
            {"index": test.index, "op": f"SCMP_CMP_{test.comparison}", "value": test.value, "valueTwo": test.second}
            for test in rule.tests
        ]
    return result
