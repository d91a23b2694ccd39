"""The contracts: what a spec accepts, what it refuses and how, and the one table of errors."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisandbox import api
from unisandbox.api import errors
from unisandbox.api.names import short_name
from unisandbox.api.newcomers import check_new_sandbox
from unisandbox.api.plain import plain, sandbox_spec_of
from unisandbox.api.spec import LONGEST_TTL
from unisandbox.api.units import GIB, MIB, parse_size
from unisandbox.host.keeper.protocol import EXPIRE_LIMIT

SPECS: tuple[type[Any], ...] = (
    api.SandboxSpec,
    api.ContainerSpec,
    api.ProcessSpec,
    api.Resources,
    api.Rootfs,
    api.Network,
    api.Mount,
    api.Dns,
    api.Security,
    api.Terminal,
)

# Anything that a program may pass by mistake; the right words too, so that more than the first check is met.
WORDS = st.sampled_from(["", "/", "/tmp", "host", "none", "bind", "tmpfs", "a\0b", "../x", "x" * 5000, "ä", "\ud800"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=4) | st.text(max_size=8) | WORDS
ANYTHING = st.recursive(
    SCALARS | st.just(object()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3) | st.sets(SCALARS, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("kind", SPECS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_a_spec_takes_a_value_or_says_why_not(kind: type[Any], data: st.DataObject) -> None:
    names = [field.name for field in attrs.fields(kind)]
    needed = [field.name for field in attrs.fields(kind) if field.default is attrs.NOTHING]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    good = {"name": "c", "argv": ["true"], "kind": "host", "target": "/t", "rows": 1, "columns": 1}
    given = {name: good.get(name) for name in needed} | {name: data.draw(ANYTHING) for name in chosen}
    try:
        made = kind(**given)
    except errors.InvalidArgumentError:
        return
    assert attrs.evolve(made) == made  # what was taken can be taken again: nothing is converted twice
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(made, names[0], None)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: api.SandboxSpec(name="a/b"), "a/b"),
        (lambda: api.SandboxSpec(name="x" * 77), "76"),
        (lambda: api.SandboxSpec(userns="root"), "userns"),  # type: ignore[arg-type]
        (lambda: api.SandboxSpec(hostname="-x"), "hostname"),
        (lambda: api.SandboxSpec(env={"A=B": "1"}), "A=B"),
        (lambda: api.SandboxSpec(env={"A": "1\0"}), "A"),
        (lambda: api.SandboxSpec(cwd="tmp"), "tmp"),
        (lambda: api.SandboxSpec(ttl=0), "ttl"),
        (lambda: api.SandboxSpec(ttl=1e18), "ttl must be at most 315360000"),
        (lambda: api.SandboxSpec(sysctls={"hostname": "x"}), "hostname"),
        (lambda: api.SandboxSpec(sysctls={"net.x": "1\n2"}), "one line"),
        (lambda: api.SandboxSpec(mounts=(api.Mount.tmpfs("/a"), api.Mount.tmpfs("/a"))), "/a"),
        (lambda: api.ProcessSpec([]), "command"),
        (lambda: api.ProcessSpec("true"), "true"),
        (lambda: api.ProcessSpec({"a": 1}), "list of words"),  # type: ignore[arg-type]
        (lambda: api.ProcessSpec({"a", "b"}), "list of words"),  # type: ignore[arg-type]
        (lambda: api.ProcessSpec(b"true"), "list of words"),  # type: ignore[arg-type]
        (lambda: api.Resources(memory="much"), "much"),
        (lambda: api.Resources(cpu=0), "cpu"),
        (lambda: api.Resources(pids=-1), "pids"),
        (lambda: api.Resources(cpu=float("nan")), "cpu"),
        (lambda: api.Resources(cpu="2"), "cpu must be a number > 0, got '2'"),  # type: ignore[arg-type]
        (lambda: api.Resources(cpu=10**400), "cpu must be a number > 0, got 10000"),
        (lambda: api.SandboxSpec(ttl=10**400), "ttl must be a number > 0, got 10000"),
        (lambda: api.Rootfs.parse(""), "rootfs"),
        (lambda: api.Rootfs.dir("/tmp/.."), "root directory"),
        (lambda: api.Rootfs(kind="dir", path="//."), "root directory"),
        (lambda: check_new_sandbox(api.SandboxSpec(rootfs=api.Rootfs(kind="host"))), "always read-only"),
        (lambda: check_new_sandbox(api.SandboxSpec(rootfs=api.Rootfs(kind="dir", path="/a", local=True))), "local"),
        (lambda: api.Network.parse("bridge"), "bridge"),
        (
            lambda: check_new_sandbox(api.SandboxSpec(dns=api.Dns(servers=["not-an-address"]))),
            "'not-an-address' is no IP address",
        ),
        (lambda: check_new_sandbox(api.SandboxSpec(dns=api.Dns(servers=["10.1"]))), "'10.1' is no IP address"),
        (lambda: check_new_sandbox(api.SandboxSpec(hosts={"a": "999.1.1.1"})), "'999.1.1.1' is no IP address"),
        (lambda: check_new_sandbox(api.SandboxSpec(hosts={"a": ":::::"})), "':::::' is no IP address"),
        (lambda: api.Security(capabilities=frozenset({"CAP_NONE"})), "CAP_NONE"),
        (lambda: api.Terminal(0, 80), "0"),
    ],
)
def test_what_is_refused_is_named(make: Callable[[], object], word: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=word):
        make()


@pytest.mark.parametrize("address", ["192.0.2.1", "::1", "fe80::1%eth0"])
def test_a_name_server_has_an_address_of_either_kind(address: str) -> None:
    assert api.Dns(servers=[address]).servers == (address,)


def test_the_longest_ttl_is_what_the_keeper_takes() -> None:
    assert LONGEST_TTL == EXPIRE_LIMIT
    assert api.SandboxSpec(ttl=LONGEST_TTL).ttl == LONGEST_TTL


@given(st.integers(1, 1 << 40), st.sampled_from([("", 1), ("K", 1 << 10), ("MiB", MIB), ("g", GIB)]))
def test_sizes_are_powers_of_1024(number: int, unit: tuple[str, int]) -> None:
    if number * unit[1] <= 1 << 62:
        assert parse_size(f"{number}{unit[0]}") == number * unit[1]
        assert parse_size(f" {number} {unit[0]} ") == number * unit[1]


def test_the_disk_is_half_of_the_memory_unless_said() -> None:
    assert api.Resources(memory="256M").disk_limit == 128 * MIB
    assert api.Resources(memory="64G").disk_limit == GIB
    assert api.Resources(memory="256M", disk="2G").disk_limit == 2 * GIB
    assert api.Resources.unlimited().disk_limit is None


def test_every_size_may_be_written_as_people_do() -> None:
    sizes = api.Resources(memory="1G", swap="256M", disk="2G", core="1.5K")
    assert (sizes.memory, sizes.swap, sizes.disk, sizes.core) == (GIB, 256 * MIB, 2 * GIB, 1536)
    nothing = api.Resources(swap="0", core=0)
    assert (nothing.swap, nothing.core) == (0, 0)
    wrong: Any
    for wrong in ("much", -1, "-1", True, 1.5, 1 << 63):
        with pytest.raises(errors.InvalidArgumentError, match="swap must be"):
            api.Resources(swap=wrong)
        with pytest.raises(errors.InvalidArgumentError, match="core must be"):
            api.Resources(core=wrong)


def test_short_names_differ_by_engine_and_id_and_fit_into_what_the_kernel_limits() -> None:
    names = {short_name(engine, identity) for engine in ("e1", "e2") for identity in map(str, range(1000))}
    assert len(names) == 2000
    assert {len(name) for name in names} == {10}
    assert short_name("e1", "7") == short_name("e1", "7")


def test_every_error_has_a_status_of_its_own() -> None:
    """As the table of gRPC has them; source: grpc/doc/statuscodes.md."""
    tree = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SandboxError)}
    assert set(errors.GRPC_STATUS) == tree
    assert len(set(errors.GRPC_STATUS.values())) == len(tree)
    assert {status.name: int(status) for status in errors.GrpcStatus} == {
        "UNKNOWN": 2,
        "INVALID_ARGUMENT": 3,
        "DEADLINE_EXCEEDED": 4,
        "NOT_FOUND": 5,
        "ALREADY_EXISTS": 6,
        "RESOURCE_EXHAUSTED": 8,
        "FAILED_PRECONDITION": 9,
        "ABORTED": 10,
        "UNIMPLEMENTED": 12,
        "INTERNAL": 13,
        "UNAVAILABLE": 14,
    }


def test_the_status_of_an_error_is_that_of_its_nearest_class() -> None:
    class OutOfPaper(errors.UnavailableError):
        pass

    assert errors.grpc_status(OutOfPaper("no paper")) is errors.GrpcStatus.UNAVAILABLE
    assert errors.grpc_status(errors.UnsupportedError("tty", "wasm")) is errors.GrpcStatus.UNIMPLEMENTED
    assert errors.grpc_status(KeyError()) is errors.GrpcStatus.INTERNAL


COMPLETED = api.Completed(("false",), api.Exit(1), b"out", b"err")


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgumentError("m", hint="h", exit_code=127),
        errors.NotFoundError("m"),
        errors.UnsupportedError("pause", "wasm", alternatives=["runc"], reason="r"),
        errors.BackendError("m", log="l"),
        errors.DeadlineExceededError("m", completed=COMPLETED),
        errors.ProcessFailedError("m", completed=COMPLETED),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_in_another_process_and_as_a_copy(error: errors.SandboxError) -> None:
    error.add_note("said later")
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in protocols]  # noqa: S301 (our own words)
    for again in (*copies, copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_an_error_says_what_and_what_to_do() -> None:
    error = errors.UnavailableError("crun is missing", hint="Install it: apt install crun.")
    assert str(error) == "crun is missing. Install it: apt install crun."
    assert str(errors.BackendError("crun failed", log="last words\n")) == "crun failed\nlast words"
    assert "runc" in str(errors.UnsupportedError("tty", "wasm", alternatives=["runc"]))


@pytest.mark.parametrize("code", [0, 1, 127, 255])
def test_a_code_is_what_waitpid_says(code: int) -> None:
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {code}"], {})
    end = api.Exit.from_wait_status(os.waitpid(pid, 0)[1], exited_at=1.0)
    assert (end.code, end.signal, end.reason) == (code, None, "exited")


def test_a_kill_for_memory_is_told_from_others() -> None:
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    ends = [
        api.Exit.from_wait_status(status, exited_at=1.0, oom_kills=kills, killed_by_us=ours)
        for kills, ours in ((0, False), (1, False), (1, True))
    ]
    assert [(end.code, end.signal, end.reason) for end in ends] == [
        (137, 9, "signaled"),
        (137, 9, "oom"),
        (137, 9, "signaled"),
    ]
    assert api.Exit.lost(exited_at=1.0).code == 255


VALUES: tuple[Any, ...] = (
    api.Exit(code=137, signal=9, reason="oom", exited_at=1.5, oom_kills=1),
    api.Completed(("true",), api.Exit(code=0, signal=None, reason="exited", exited_at=1.0), stdout=b"x" * 100),
    api.Rootfs.host(),
    api.Mount.tmpfs("/t"),
    api.Resources(),
    api.FileInfo("a", "file", 1, 0o644, 1.0),
    api.Terminal(24, 80),
)


def twin(value: Any) -> Any:
    """The same value of a class for which attrs has generated all methods."""
    fields = {field.name: attrs.field(repr=field.repr) for field in attrs.fields(type(value))}
    made = attrs.make_class(type(value).__qualname__, fields, frozen=True)
    return made(**attrs.asdict(value, recurse=False))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_shown_compared_and_hashed_as_attrs_would(value: Any) -> None:
    assert repr(value) == repr(twin(value))
    again = attrs.evolve(value)
    assert again is not value
    assert again == value
    assert hash(again) == hash(value)
    assert value != twin(value)  # of another class
    assert not value == object()  # noqa: SIM201 (the operator itself)


def test_values_differ_by_each_of_their_fields() -> None:
    first = api.Exit(code=0, signal=None, reason="exited", exited_at=1.0, oom_kills=0)
    for change in ({"code": 1}, {"signal": 9}, {"reason": "lost"}, {"exited_at": 2.0}, {"oom_kills": 1}):
        other = attrs.evolve(first, **change)
        assert other != first
        assert hash(other) != hash(first)


def test_a_value_that_holds_a_mapping_has_no_hash() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(api.SandboxSpec(env={"A": "1"}))


def test_every_class_of_the_contracts_is_a_frozen_value_with_slots() -> None:
    for name in api.__all__:
        kind = getattr(api, name)
        if isinstance(kind, type) and attrs.has(kind):
            assert "__slots__" in vars(kind), name
            assert kind.__setattr__ is not object.__setattr__, name
            assert kind.__eq__ is api.Exit.__eq__, f"{name}: attrs has compiled methods for it; write @by_fields"


def test_every_name_of_the_contracts_can_be_imported() -> None:
    for name in api.__all__:
        assert getattr(api, name) is not None
    with pytest.raises(AttributeError, match="'NoSuchName'"):
        _ = api.NoSuchName  # type: ignore[attr-defined]


def test_a_spec_of_a_former_version_can_be_read_though_a_new_one_would_be_refused() -> None:
    former = api.SandboxSpec(
        rootfs=api.Rootfs(kind="host"), dns=api.Dns(servers=("ns1",)), hosts={"x": "1.2"}, name="former"
    )
    assert sandbox_spec_of(plain(former)) == former
    with pytest.raises(errors.InvalidArgumentError):
        check_new_sandbox(former)


def test_mounts_stay_in_the_order_in_which_they_were_given() -> None:
    mounts = (api.Mount.tmpfs("/a/b"), api.Mount.tmpfs("/a"))
    assert api.SandboxSpec(mounts=mounts).mounts == mounts


def test_a_request_takes_what_is_no_spec_for_others_to_refuse() -> None:
    assert api.CreateSandbox("x", None).spec is None  # type: ignore[arg-type]
