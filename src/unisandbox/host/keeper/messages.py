"""Records as messages of the keeper, and back; what is wrong is said before anything is sent. Client side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from unisandbox.api.errors import InvalidArgumentError
from unisandbox.host.keeper import protocol
from unisandbox.host.keeper.link import checked
from unisandbox.host.keeper.protocol import Message
from unisandbox.host.keeper.records import CloseReport, Guard, Hello, KeeperVersionError, Policy


def guard_request(guards: Sequence[Guard]) -> Message:
    """To register these.

    Raises:
        InvalidArgumentError: a path is not absolute, is "/" or has "..".
    """
    entries: list[Message] = []
    for guard in guards:
        if guard.kind not in protocol.GUARD_KINDS:
            raise InvalidArgumentError(f"guard {guard.name!r}: {guard.kind!r} is none of {protocol.GUARD_KINDS}")
        for path in guard.paths:
            try:
                protocol.path(path, f"guard {guard.name!r}: path")
            except OSError as error:
                raise InvalidArgumentError(str(error.strerror)) from None
        entries.append({"name": guard.name, "kind": guard.kind, "paths": list(guard.paths)})
    return {"op": "guard", "guards": entries}


def note_request(name: str, value: str) -> Message:
    """To keep this note.

    Raises:
        InvalidArgumentError: `value` has more than 64 KiB, or NUL.
    """
    checked(name)
    size = len(value.encode("utf-8", "surrogatepass"))
    if size > protocol.NOTE_LIMIT:
        raise InvalidArgumentError(f"note {name!r} has {size} bytes; at most {protocol.NOTE_LIMIT}")
    if "\0" in value:
        raise InvalidArgumentError(f"note {name!r} has a NUL")
    return {"op": "note", "name": name, "value": value}


def hello_in(message: Message, state_dir: str) -> Hello:
    """What the keeper of this state directory says about itself.

    Raises:
        KeeperVersionError: it speaks another version of the protocol.
    """
    version = message.get("version")
    if version != protocol.VERSION:
        raise KeeperVersionError(
            f"the keeper of {state_dir} speaks version {version} of its protocol, this library version "
            f"{protocol.VERSION}",
            hint="Close it with the version of unisandbox that started it.",
        )
    return Hello(
        pid=cast("int", message["pid"]),
        start_time=cast("int", message["start_time"]),
        boot_id=cast("str", message["boot_id"]),
        version=protocol.VERSION,
        policy=cast("Policy", message["policy"]),
        owner=cast("bool", message["owner"]),
        private_mounts=cast("bool", message["private_mounts"]),
        workdir=cast("str", message["workdir"]),
        client=cast("int", message["client"]),
        owner_pid=cast("int", message["owner_pid"]),
    )


def close_report_in(message: Message) -> CloseReport:
    """What the answer to a close says of the guards."""
    failed = cast("dict[str, str]", message["failed"])
    return CloseReport(cast("int", message["done"]), cast("int", message["failures"]), failed)
