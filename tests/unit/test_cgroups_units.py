"""What of host.cgroups needs no kernel: validation, parsing, the BPF program, and what the keeper may import."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import unisandbox.host.cgroups.ending
from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host.cgroups import DeviceRule, Limits
from unisandbox.host.cgroups.devices import program
from unisandbox.host.cgroups.files import parse
from unisandbox.host.cgroups.hierarchy import Mount

_KINDS = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}


def run(code: bytes, access_type: int, major: int, minor: int) -> int:
    """A BPF machine for the instructions that we use."""
    insns = [struct.unpack_from("<BBhI", code, at) for at in range(0, len(code), 8)]
    register = {1: 0}
    context = {0: access_type, 4: major, 8: minor}
    at = 0
    while True:
        op, registers, offset, value = insns[at]
        dst, src = registers & 15, registers >> 4
        at += 1
        match op:
            case 0x61:
                register[dst] = context[offset]
            case 0xBC:
                register[dst] = register[src]
            case 0x54:
                register[dst] &= value
            case 0x74:
                register[dst] >>= value
            case 0xB7:
                register[dst] = value
            case 0x56:
                at += offset if register[dst] != value else 0
            case 0x46:
                at += offset if register[dst] & value else 0
            case 0x95:
                return register[0]
            case _:
                raise AssertionError(hex(op))


def allowed(rules: list[DeviceRule], kind: str, access: str, major: int, minor: int) -> bool:
    return any(
        rule.kind == kind
        and set(access) <= set(rule.access)
        and rule.major in (None, major)
        and rule.minor in (None, minor)
        for rule in rules
    )


_access = st.sets(st.sampled_from("rwm"), min_size=1).map(lambda letters: "".join(sorted(letters)))
_number = st.integers(0, 3) | st.just((1 << 32) - 1)
_rules = st.lists(
    st.builds(DeviceRule, st.sampled_from("bc"), st.none() | _number, st.none() | _number, _access), max_size=5
)


@given(_rules, st.sampled_from("bc"), _access, _number, _number)
def test_the_device_program_allows_what_the_rules_say(
    rules: list[DeviceRule], kind: str, access: str, major: int, minor: int
) -> None:
    access_type = sum(_ACCESS[letter] for letter in access) << 16 | _KINDS[kind]
    assert run(program(rules), access_type, major, minor) == allowed(rules, kind, access, major, minor)


@pytest.mark.parametrize(
    ("rule", "text"),
    [(DeviceRule("c", 1, 3), "c 1:3 rwm"), (DeviceRule("b", None, 0, "r"), "b *:0 r"), (DeviceRule("c"), "c *:* rwm")],
)
def test_device_rules_are_written_as_v1_reads_them(rule: DeviceRule, text: str) -> None:
    assert str(rule) == text


@pytest.mark.parametrize("access", ["", "x", "rr", "rwmx"])
def test_device_access_is_checked(access: str) -> None:
    with pytest.raises(InvalidArgumentError, match="access"):
        DeviceRule("c", 1, 3, access)


@pytest.mark.parametrize("number", [-1, 1 << 32])
def test_device_numbers_are_checked(number: int) -> None:
    with pytest.raises(InvalidArgumentError, match="major"):
        DeviceRule("c", number, 3)


@pytest.mark.parametrize(
    "arguments",
    [{"memory": 0}, {"memory": -1}, {"swap": -1}, {"cpu": 0.0}, {"cpu": float("nan")}, {"cpu_weight": 0}, {"pids": 0}],
)
def test_absurd_limits_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        Limits(**arguments)


@pytest.mark.parametrize(
    ("text", "value"), [("max", None), ("-1", None), ("9223372036854771712", None), ("4096", 4096), ("0", 0)]
)
def test_limits_are_parsed_as_the_kernel_prints_them(text: str, value: int | None) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("root", "path", "below"),
    [("/", "/", ""), ("/", "/a/b", "/a/b"), ("/docker/x", "/docker/x", ""), ("/docker/x", "/docker/x/c", "/c")],
)
def test_a_cgroup_is_found_below_the_mount_that_shows_it(tmp_path: Path, root: str, path: str, below: str) -> None:
    directory = Path(f"{tmp_path}{below}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cgroup.procs").touch()
    mount = Mount(str(tmp_path), root, frozenset(), unified=True)
    assert mount.find(path) == str(directory)
    assert mount.name(str(directory)) == path


@pytest.mark.parametrize(
    ("root", "path"), [("/docker/x", "/"), ("/docker/x", "/docker/xy"), ("/", "/../y"), ("/..", "/")]
)
def test_a_cgroup_outside_of_the_mount_is_not_invented(tmp_path: Path, root: str, path: str) -> None:
    (tmp_path / "cgroup.procs").touch()
    assert Mount(str(tmp_path), root, frozenset(), unified=True).find(path) is None


def test_ending_is_light_enough_for_the_keeper() -> None:
    source = Path(unisandbox.host.cgroups.ending.__file__).parents[3]
    code = (
        f"import sys; sys.path.insert(0, {str(source)!r}); import unisandbox.host.cgroups.ending; "
        "print([m for m in ('attrs', 'attr', 'anyio', 'asyncio', 'ctypes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
