"""The promises of the codec: what is valid is read as Google's own protobuf reads it, and nothing else is read."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from betterproto2 import Message
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Theirs

import unisandbox.api.proto.methods
from unisandbox.api import proto
from unisandbox.api.errors import InvalidArgumentError
from unisandbox.api.proto.containerd.events import TaskExit
from unisandbox.api.proto.containerd.services.sandbox.v1 import ControllerStopRequest, ControllerUpdateRequest
from unisandbox.api.proto.containerd.task.v3 import CreateTaskRequest, StateRequest, StateResponse
from unisandbox.api.proto.google.protobuf import Any
from unisandbox.api.proto.io.containerd.cgroups import v1, v2
from unisandbox.api.proto.message_pool import default_message_pool
from unisandbox.api.rpc import Method
from unisandbox.wire import codec

SOURCES = Path(next(iter(proto.__path__))) / "sources"
FIELDPATH = """
syntax = "proto3"; package containerd.types; import "google/protobuf/descriptor.proto";
extend google.protobuf.FileOptions { bool fieldpath_all = 63300; }
extend google.protobuf.MessageOptions { bool fieldpath = 64400; }
"""
METRICS = (v1.Metrics, v2.Metrics, TaskExit)  # so that these modules count among the tested ones too

NUMBERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_ENUM: (0, 5),
}


class Oracle:
    """Google's protobuf, with the same published files."""

    def __init__(self, scratch: Path) -> None:
        (scratch / "types").mkdir()
        (scratch / "types/fieldpath.proto").write_text(FIELDPATH)
        names = sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.proto"))
        out = scratch / "descriptors"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{SOURCES}", f"-I{scratch}", f"-o{out}"]
        subprocess.run([*command, "--include_imports", *names], check=True)
        self.files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
        pool = descriptor_pool.DescriptorPool()
        for file in self.files.file:
            pool.Add(file)
        self.kinds: list[tuple[type[Message], type[Theirs]]] = []
        for url, kind in sorted(default_message_pool.url_to_type.items()):
            if kind.__name__ not in {"Timestamp", "Any", "Empty"}:  # of these only what is inside of others
                descriptor = pool.FindMessageTypeByName(url.removeprefix("type.googleapis.com/"))
                self.kinds.append((kind, message_factory.GetMessageClass(descriptor)))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("oracle"))


def fill(message: Theirs, rng: random.Random) -> None:
    """Set some fields at random."""
    descriptor: Descriptor = message.DESCRIPTOR
    if descriptor.full_name == "google.protobuf.Timestamp":  # ours keeps microseconds
        message.seconds = rng.randrange(-62_135_596_800, 253_402_300_800)
        message.nanos = rng.randrange(10**6) * 1000
        return
    for field in descriptor.fields:
        if rng.random() < 0.5:
            continue
        inside = field.message_type
        times = rng.randrange(1, 4)
        if inside is not None and inside.GetOptions().map_entry:
            values = getattr(message, field.name)
            for _ in range(times):
                if inside.fields_by_name["value"].message_type is not None:
                    fill(values[text(rng)], rng)
                else:
                    values[text(rng)] = scalar(inside.fields_by_name["value"], rng)
        elif field.is_repeated and inside is not None:
            for _ in range(times):
                fill(getattr(message, field.name).add(), rng)
        elif field.is_repeated:
            getattr(message, field.name).extend(scalar(field, rng) for _ in range(times))
        elif inside is not None:
            getattr(message, field.name).SetInParent()
            fill(getattr(message, field.name), rng)
        else:
            setattr(message, field.name, scalar(field, rng))


def scalar(field: FieldDescriptor, rng: random.Random) -> object:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return text(rng)
        case FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.randrange(20))
        case FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.TYPE_DOUBLE:
            return rng.random()
        case kind:
            low, high = NUMBERS[kind]
            return rng.choice([0, 1, low, high, rng.randint(low, high)])


def text(rng: random.Random) -> str:
    return "".join(rng.choices("aé漢🎉 \0", k=rng.randrange(8)))


def test_every_message_is_read_and_written_as_google_does(oracle: Oracle, count: Callable[[int], int]) -> None:
    rng = random.Random(3)
    assert len(oracle.kinds) > 100
    for ours, theirs in oracle.kinds * count(50):
        message = theirs()
        fill(message, rng)
        data = message.SerializeToString()
        assert theirs.FromString(codec.encode(codec.decode(ours, data))) == message, ours


def test_a_message_that_is_cut_short_is_refused_wherever_it_is_cut(oracle: Oracle, count: Callable[[int], int]) -> None:
    """Cut between two fields it is a whole shorter message, which nobody can tell; so Google's code is asked too."""
    rng = random.Random(4)
    for ours, theirs in oracle.kinds * count(40):
        message = theirs()
        fill(message, rng)
        data = message.SerializeToString()
        for _ in range(10):
            cut = data[: rng.randrange(len(data) + 1)]
            assert read(ours, cut) == read_theirs(theirs, cut), (ours, cut)


def test_damaged_messages_are_refused_or_read_and_never_anything_else(
    oracle: Oracle, count: Callable[[int], int]
) -> None:
    """A fuzz target. Ours is the stricter one: it refuses fields of another type, which Google's code passes over."""
    rng = random.Random(5)
    for ours, theirs in oracle.kinds * count(300):
        message = theirs()
        fill(message, rng)
        data = bytearray(message.SerializeToString())
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        assert not read(ours, bytes(data)) or read_theirs(theirs, bytes(data)), (ours, bytes(data))


def read(kind: type[Message], data: bytes) -> bool:
    try:
        codec.encode(codec.decode(kind, data))
    except InvalidArgumentError:
        return False
    return True


def read_theirs(kind: type[Theirs], data: bytes) -> bool:
    try:
        kind.FromString(data)
    except DecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "data", "why"),
    [
        (StateRequest, b"\x0a\x05abc", "cut short"),
        (StateRequest, b"\x0a\x02\xff\xfe", "utf-8"),
        (StateRequest, b"\x08\x01", "id has wire type 0, not 2"),
        (StateRequest, b"\x80", "cut short"),
        (StateResponse, b"\x1a\x01\x01", "pid has wire type 2, not 0"),  # one number is no list of numbers
        (StateResponse, b"\x52\x0a\x08" + b"\xff" * 8 + b"\x7f", "too large|days|range"),  # a time beyond all years
        (CreateTaskRequest, b"\x1a\x04\x0a\x05ab", "cut short"),  # inside of another message
        (v1.Metrics, b"\x1a\x05\x0a\x03\x12\x02\x80\x80", "cut short"),  # inside of a packed list
    ],
)
def test_the_error_says_what_is_wrong(kind: type[Message], data: bytes, why: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"(?i)no valid {kind.__name__}: .*({why})"):
        codec.decode(kind, data)


def test_a_message_of_very_many_values_is_refused_before_it_holds_others_up() -> None:
    """Reading one takes microseconds, and 4 MiB have room for two million of them."""
    mount = b"\x1a\x00"  # an empty message in `rootfs`
    assert len(codec.decode(CreateTaskRequest, mount * 32768).rootfs) == 32768
    for kind, data in (
        (CreateTaskRequest, mount * 32769),
        (CreateTaskRequest, b"\xf8\x3f\x00" * 40000),  # unknown ones, too
        (v1.Metrics, b"\x1a\x8e\x80\x02\x0a\x8a\x80\x02\x22\x86\x80\x02" + b"\x00" * 32774),  # in a packed list
    ):
        with pytest.raises(InvalidArgumentError, match=f"no valid {kind.__name__}: more than 32768 values"):
            codec.decode(kind, data)


def test_a_value_that_a_map_leaves_out_is_the_default_one() -> None:
    """As from Rust's prost, which writes no defaults; also when the map is inside of another message."""
    request = codec.decode(ControllerUpdateRequest, b"\x1a\x0d\x0a\x03pod\x3a\x06\x0a\x04task")
    assert request.sandbox is not None
    assert request.sandbox.extensions == {"task": Any()}
    assert codec.decode(ControllerUpdateRequest, codec.encode(request)) == request


def test_what_a_newer_peer_adds_is_kept_and_written_again() -> None:
    data = b"\x0a\x01x" + b"\xfa\x3f\x03new" + b"\xf8\x3f\x07"
    assert codec.encode(codec.decode(StateRequest, data)) == data


def test_the_type_of_an_any_may_be_empty_or_without_a_slash() -> None:
    """iSulad sends the first, containerd the second."""
    for url in ("", "runtime.v1.PodSandboxConfig"):
        assert codec.decode(Any, codec.encode(Any(type_url=url, value=b"x"))).type_url == url


def test_every_method_of_the_published_services_is_in_the_table(oracle: Oracle) -> None:
    published = {
        f"{file.package}.{service.name}/{method.name}": (
            method.input_type.removeprefix("."),
            method.output_type.removeprefix("."),
            method.client_streaming,
            method.server_streaming,
        )
        for file in oracle.files.file
        for service in file.service
        for method in service.method
    }
    names = {kind: url.removeprefix("type.googleapis.com/") for kind, url in default_message_pool.type_to_url.items()}
    table = {
        str(method): (names[method.request], names[method.reply], method.client_streams, method.server_streams)
        for group in vars(unisandbox.api.proto.methods).values()
        if isinstance(group, type)
        for method in vars(group).values()
        if isinstance(method, Method)
    }
    assert table == published
    assert len(table) > 40


def test_both_task_services_have_the_same_messages(oracle: Oracle) -> None:
    """So one table serves both."""
    fields: dict[str, dict[str, list[object]]] = {"containerd.task.v2": {}, "containerd.task.v3": {}}
    for _, theirs in oracle.kinds:
        descriptor: Descriptor = theirs.DESCRIPTOR
        package, _, name = descriptor.full_name.rpartition(".")
        if package in fields:
            fields[package][name] = [
                (
                    field.number,
                    field.name,
                    field.type,
                    field.is_repeated,
                    field.message_type and field.message_type.name,
                )
                for field in descriptor.fields
            ]
    assert fields["containerd.task.v2"] == fields["containerd.task.v3"]
    assert len(fields["containerd.task.v3"]) > 20


def test_containerds_stop_request_is_read() -> None:
    """Bytes as they come from containerd: sandbox_id, no timeout, sandboxer in field 10."""
    request = codec.decode(ControllerStopRequest, b"\x0a\x03pod\x52\x03uni")
    assert (request.sandbox_id, request.timeout_secs, request.sandboxer) == ("pod", 0, "uni")
