"""Checked by mypy --strict and pyright, never run: what type checkers infer of the public surface.

Each `type: ignore` with a code is an error that must be there: with `warn_unused_ignores` its absence is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import anyio.abc

import unisandbox
from unisandbox import (
    Completed,
    Container,
    ContainerStatus,
    Engine,
    Exit,
    FileInfo,
    Network,
    Opening,
    Output,
    Process,
    Resources,
    Rootfs,
    Sandbox,
    SandboxStatus,
    Terminal,
)


async def opening_both_ways() -> None:
    """`T` of Opening[T] is inferred by await and by async with."""
    assert_type(Sandbox.create(), Opening[Sandbox])
    assert_type(await Sandbox.create(), Sandbox)
    async with Sandbox.create(rootfs="host", isolation="runc", resources=Resources(memory="256M", pids=64)) as sb:
        assert_type(sb, Sandbox)
        assert_type(sb.exec(["cat"]), Opening[Process])
        assert_type(await sb.exec(["cat"], stdin="pipe", tty=Terminal(1, 2)), Process)
        async with sb.exec(["cat"], stdin="pipe", tty=True) as process:
            assert_type(process, Process)
        assert_type(sb.containers.add(argv=["true"]), Opening[Container])
        assert_type(await sb.containers.add(argv=["true"], rootfs=Rootfs.dir("/x")), Container)
        async with sb.containers.add(argv=["true"], rootfs=Path("/x")) as container:
            assert_type(container, Container)
            assert_type(await container.wait(), Exit)
            assert_type(await container.logs("stderr"), bytes)
    assert_type(Engine.open(), Opening[Engine])
    assert_type(await Engine.open("/some/dir"), Engine)
    async with Engine.open(Path("/some/dir")) as engine:
        assert_type(engine, Engine)
        assert_type(engine.create(), Opening[Sandbox])
        assert_type(await engine.create(rootfs="/path", name="w"), Sandbox)
        async with engine.create(network=Network.host()) as made:
            assert_type(made, Sandbox)
        assert_type(await engine.get("w"), Sandbox)
        assert_type(await engine.list(), list[SandboxStatus])


async def results(sb: Sandbox, process: Process) -> None:
    """Types of results do not depend on flags."""
    assert_type(await sb.run(["true"]), Completed)
    assert_type(await sb.run(("true",), input="x", check=True, timeout=1, env={"A": "b"}, user=0), Completed)
    done = await sb.sh("true")
    assert_type(done.exit_code, int)
    assert_type(done.stdout, bytes)
    assert_type(done.stderr, bytes)
    assert_type(done.text, str)
    assert_type(done.exit, Exit)
    assert_type(done.exit.signal, int | None)
    assert_type(done.truncated, bool)
    assert_type(process.pid, int)
    assert_type(process.stdin, anyio.abc.ByteSendStream)
    assert_type(process.stdout, anyio.abc.ByteReceiveStream)
    assert_type(process.stderr, anyio.abc.ByteReceiveStream)
    assert_type(await process.wait(), Exit)
    async for output in process:
        assert_type(output, Output)
        assert_type(output.data, bytes)
    assert_type(await sb.files.read("/a"), bytes)
    assert_type(await sb.files.list("/"), list[FileInfo])
    assert_type(await sb.files.stat("/a"), FileInfo)
    assert_type(await sb.containers.list(), list[ContainerStatus])
    assert_type(await sb.status(), SandboxStatus)
    assert_type(sb.id, str)
    assert_type(sb.name, str | None)
    assert_type(unisandbox.__version__, str)


async def mistakes(sb: Sandbox, engine: Engine) -> None:
    """What a type checker must not let through."""
    str(unisandbox.Sandbux)  # type: ignore[attr-defined]  # pyright: ignore
    Sandbox.create(memory="1G")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Sandbox.create(userns="none")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    engine.create(rootfs=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await sb.run(["true"], limit=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    sb.exec(["true"], stdin="inherit")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sb.containers.add()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Resources(memory=[])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await sb.files.write("/a", 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with sb.exec(["true"]):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    done = await sb.run(["true"])
    done.exit.code = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
