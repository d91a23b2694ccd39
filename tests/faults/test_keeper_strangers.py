"""Clients that say what no client of ours says, and keepers that do: none harms the other, nor those beside it."""


# ruff: noqa: PT012 - where the error comes from a loop, the loop is what raises

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from tests.keepers import (
    DEADLINE,
    fd_count,
    keeper_at,
    private_bytes,
    raw_client,
    sh_exit,
    until,
)

from unisandbox.api.errors import FailedPreconditionError, UnavailableError
from unisandbox.host.keeper import Keeper, protocol

pytestmark = [pytest.mark.anyio, pytest.mark.root]


async def in_thread(action: Callable[[], None]) -> None:
    await anyio.to_thread.run_sync(action)


def is_ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


_GARBAGE = [
    b"\0",
    b"not json",
    b"[]",
    b'"text"',
    b"{" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"id":"text","op":"held"}',
    b'{"id":1e400}',
    b'{"op":"held","fds":1}',
    b'{"op":"held","fds":-1}',
    b'{"op":"held","fds":1000000}',
    b'\xff\xfe{"op":"held"}',
    b'{"op":' + b"1" * 10_000 + b"}",
    b"x" * 204_801,
]


@pytest.mark.parametrize("data", _GARBAGE, ids=range(len(_GARBAGE)))
async def test_garbage_ends_its_own_connection_only(tmp_path: Path, data: bytes) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.held()
        fds = fd_count(keeper.pid)
        with raw_client(tmp_path) as sock:
            sock.send(data)
            assert is_ended(sock)
        assert (await sh_exit(keeper, "exit 3")).status == 3 << 8
        assert fd_count(keeper.pid) == fds


async def test_more_fds_than_allowed_end_the_connection_and_leak_nothing(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.held()
        fds = fd_count(keeper.pid)
        for number, announced in ((65, 65), (65, 64), (200, 200), (3, 2), (3, 0)):
            with raw_client(tmp_path) as sock:
                socket.send_fds(sock, [json.dumps({"op": "held", "fds": announced}).encode()], [0] * number)
                assert is_ended(sock)
        # Those that nobody asked for are closed.
        with raw_client(tmp_path) as sock:
            request = {"id": 1, "op": "held", "prefix": "", "after": "", "fds": 64}
            socket.send_fds(sock, [json.dumps(request).encode()], [0] * 64)
            assert json.loads(sock.recv(1000))["held"] == {}
        until(lambda: fd_count(keeper.pid) == fds, "no fd is left")


_WRONG: list[dict[str, object]] = [
    {},
    {"op": 1},
    {"op": "no such"},
    {"op": "spawn"},
    {"op": "spawn", "key": "k", "argv": [], "env": {}, "cwd": "/", "cgroup_procs": []},
    {"op": "spawn", "key": "k", "argv": ["/bin/true"], "env": {"A": 1}, "cwd": "/", "cgroup_procs": []},
    {"op": "spawn", "key": "k", "argv": ["/bin/true"], "env": {}, "cwd": "x", "cgroup_procs": []},
    {"op": "spawn", "key": "k", "argv": ["/bin/true", "a\0b"], "env": {}, "cwd": "/", "cgroup_procs": []},
    {"op": "spawn", "key": "k", "argv": "/bin/true", "env": {}, "cwd": "/", "cgroup_procs": [1]},
    {"op": "job", "steps": 1},
    {"op": "job", "steps": [1], "hold": {}, "timeout": 1},
    {"op": "job", "steps": [], "hold": {"a": "x", "b": "x"}, "timeout": 1},
    {"op": "job", "steps": [], "hold": {}, "timeout": -1},
    {"op": "job", "steps": [], "hold": {}, "timeout": "1"},
    {"op": "hold", "name": "no fd came"},
    {"op": "hold", "name": "x" * 200},
    {"op": "take", "name": ["x"]},
    {"op": "held", "prefix": None},
    {"op": "ring", "name": "r", "limit": 0},
    {"op": "ring_read", "name": "r", "offset": 0},
    {"op": "guard", "guards": 1},
    {"op": "guard", "guards": [{"name": "g", "kind": "rm -rf", "paths": ["/x"]}]},
    {"op": "guard", "guards": [{"name": "g", "kind": "remove_tree", "paths": ["/"]}]},
    {"op": "guard", "guards": [{"name": "g", "kind": "remove_tree", "paths": ["/a/../.."]}]},
    {"op": "lease", "directory": "relative", "first": 0, "count": 1, "name": "n"},
    {"op": "lease", "directory": "/no/such", "first": 0, "count": 1, "name": "n"},
    {"op": "lease", "directory": "/tmp", "first": -1, "count": 1, "name": "n"},
    {"op": "lease", "directory": "/tmp", "first": 0, "count": 1, "name": 1},
    {"op": "close", "run_guards": True},
    {"op": "own"},
    {"op": "hold_now", "names": ["no fd came"], "spool": {}, "stamp": []},
    {"op": "hold_now", "names": [], "spool": {"stranger": 1}, "stamp": []},
    {"op": "hold_now", "names": [], "spool": [], "stamp": []},
    {"op": "hold_now", "names": [], "spool": {}, "stamp": 1},
    {"op": "reclaim", "name": "no such"},
    {"op": "reclaimed", "name": "no such", "spool": -1, "end": 0},
    {"op": "note", "name": "", "value": "x"},
    {"op": "note", "name": "n", "value": 1},
    {"op": "note", "name": "n", "value": "x" * 65_537},
    {"op": "notes", "prefix": ""},
    {"op": "publish", "event": {}},
    {"op": "publish", "event": "[]"},
    {"op": "publish", "event": "{}", "end": 1},
    {"op": "publish", "event": "{}", "end": {"name": "n", "noted": "k", "counter": "", "line": "", "events": [1]}},
    {"op": "publish", "event": "{}", "end": {"name": "n", "noted": "k", "counter": "../x", "line": "", "events": [{}]}},
    {"op": "publish", "event": "{}", "end": {"name": "n", "noted": "k", "counter": "", "line": "", "events": [{}] * 5}},
    {"op": "publish", "event": "{"},
    {"op": "publish", "event": "[" * 16_000},
    {"op": "publish", "event": '{"x":"' + "x" * 16_384 + '"}'},
    {"op": "events_after", "after": -1, "limit": 1},
    {"op": "events_after", "after": 0, "limit": 0},
    {"op": "events_after", "after": 0, "limit": 1, "wait": float("nan")},
    {"op": "cancel_wait"},
    {"op": "lock", "name": "x" * 257, "ticket": 1},
    {"op": "lock", "name": "l", "ticket": "1"},
    {"op": "unlock", "name": "l"},
    {"op": "cancel_lock", "name": "l", "ticket": None},
    {"op": "expire", "prefix": "", "seconds": 1},
    {"op": "expire", "prefix": "p", "seconds": -1},
    {"op": "expire", "prefix": "p", "seconds": 1e300},
    {"op": "lease", "directory": "/tmp", "first": 0, "count": 1, "name": 1},
    {"op": "set_policy", "policy": "stop"},
    {"op": "exit_of", "pid": 0, "start_time": 0},
    {"op": "hello", "after": -1},
]


async def test_wrong_requests_are_answered_with_an_error(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        fds = fd_count(keeper.pid)
        with raw_client(tmp_path) as sock:
            for number, request in enumerate(_WRONG):
                sock.send(json.dumps({"id": number, **request}).encode())
                answer = json.loads(sock.recv(1 << 16))
                assert answer["id"] == number
                assert answer["error"], request
                assert answer["errno"] > 0
                assert "the keeper failed" not in answer["error"], answer
                # The same, of somebody who does not want an answer.
                sock.send(json.dumps(request).encode())
        assert (await sh_exit(keeper, "exit 3")).status == 3 << 8
        until(lambda: fd_count(keeper.pid) == fds, "no fd is left")


async def test_a_client_that_asks_and_never_reads_is_not_served_for_ever(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        await keeper.held()
        memory = private_bytes(keeper.pid)
        names = [f"{number:0120}" for number in range(200)]
        null = os.open("/dev/null", os.O_RDONLY)
        for name in names:
            await keeper.hold(name, null)
        os.close(null)
        with raw_client(tmp_path) as sock:
            sock.setblocking(False)
            request = json.dumps({"id": 1, "op": "held", "prefix": "", "after": ""}).encode()
            sent = 0
            with pytest.raises(BlockingIOError):
                while sent < 20_000:
                    sock.send(request)
                    sent += 1
                    if sent % 100 == 0:
                        await keeper.exits_after(0)  # the keeper answers others, and works on
            grown = private_bytes(keeper.pid) - memory
            assert sent < 5_000
            assert grown < 40 << 20
        assert (await sh_exit(keeper, "exit 3")).status == 3 << 8


async def test_clients_beyond_the_limit_are_refused_and_others_go_on(tmp_path: Path) -> None:
    async with keeper_at(tmp_path) as keeper:
        clients = [raw_client(tmp_path) for _ in range(protocol.CLIENTS_LIMIT + 5)]
        try:
            assert b"clients already" in clients[-1].recv(4096)
            assert is_ended(clients[-1])
            with pytest.raises(FailedPreconditionError, match="takes no more"):
                await Keeper.attach(f"{tmp_path}/state")
            assert (await sh_exit(keeper, "exit 3")).status == 3 << 8
        finally:
            for client in clients:
                client.close()


async def test_a_keeper_that_speaks_another_version_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with keeper_at(tmp_path):
        spoken = protocol.VERSION
        monkeypatch.setattr(protocol, "VERSION", 99)
        with pytest.raises(UnavailableError, match=f"speaks version {spoken} .* this library version 99"):
            await Keeper.attach(f"{tmp_path}/state")


async def test_a_keeper_that_says_garbage_is_as_good_as_dead(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(state / "keeper.sock"))
        listener.listen()
        for garbage in (b"garbage", b'{"id":1,"fds":3}', b"x" * 204_801):

            def answer(garbage: bytes = garbage) -> None:
                sock, _ = listener.accept()
                with sock:
                    sock.recv(1000)
                    sock.send(garbage)
                    sock.recv(1000)

            async with anyio.create_task_group() as group:
                group.start_soon(in_thread, answer)
                with anyio.fail_after(DEADLINE), pytest.raises(UnavailableError, match="cannot be understood"):
                    await Keeper.attach(str(state))
