"""Stories: everything that an engine does, in steps, each with what its user was promised before and after it."""

from __future__ import annotations

# ruff: noqa: ASYNC240 - a story may block its own event loop
import contextlib
import json
import os
import select
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import anyio
from tests.crash.points import Stage, kill_keeper

from unisandbox import Engine, Exit, InvalidArgumentError, Process, Resources
from unisandbox.api import CreateTask, ExecTask, ProcessSpec, RootMount, Stdio, short_name

Story = Callable[[Stage], Awaitable[None]]

SMALL: Final = Resources(memory="64M")
ON_DISK: Final = Resources(memory="32M", disk="96M")
CONTENT: Final = b"still here"
FILE: Final = "/tmp/kept"
STARTS: Final = "/tmp/starts"
COUNTED: Final = ("sh", "-c", f"echo started >> {STARTS}; echo told; exit 7")


def judged(engine: Engine, exit: Exit, *, right: bool) -> None:
    """An end is told as it was. Where the keeper has died, what ran may have died with it, and nobody may know how."""
    with_it = exit.reason == "lost" or exit.signal == signal.SIGKILL
    assert right or (with_it and engine._core.host.keeper.ends_within(5.0)), exit


async def life(stage: Stage) -> None:
    """One sandbox, its processes, and a second one beside it."""
    engine = await opened(stage, "open")
    with stage.at("create"), making(stage, "a"), asking(stage, "op-a"):
        a = await engine.create(name="a", resources=SMALL, ttl=1000, operation_id="op-a")
    with stage.at("run"):
        done = await a.run(["true"])
        judged(engine, done.exit, right=done.exit_code == 0)
    await a.files.write(FILE, CONTENT)
    stage.say(sandbox="a", file=True)
    with stage.at("exec"), executing(stage, "a", "stays") as told:
        told.append(await a.exec(["cat"], stdin="pipe"))
    with stage.at("exec with a terminal"), executing(stage, "a", "stays") as told:
        told.append(await a.exec(["cat"], tty=True))
    with stage.at("exec that ends"), executing(stage, "a", "ends") as told, asking(stage, "op-x"):
        told.append(await a.exec(COUNTED, operation_id="op-x"))
    with stage.at("exec and wait"):
        async with a.exec(["sh", "-c", "exit 3"]) as waited:
            exit = await waited.wait()
            judged(engine, exit, right=exit.code == 3)
    with stage.at("signal"):
        async with a.exec(["sleep", "1000"]) as signalled:
            await signalled.signal(signal.SIGTERM)
            exit = await signalled.wait()
            judged(engine, exit, right=exit.signal == signal.SIGTERM)
    with stage.at("background"):
        stage.say(sandbox="a", background=True)
        async with a.exec(["sh", "-c", "sleep 1000 & exit 0"]) as left:
            await left.wait()
    with stage.at("pause"), pausing(stage, "a"):
        await a.pause()
    with stage.at("resume"), pausing(stage, "a"):
        await a.resume()
    stage.say(sandbox="a", state="made")
    with stage.at("update"):
        await a.update(Resources(memory="96M"))
    with stage.at("create on disk"), making(stage, "b"):
        await engine.create(name="b", resources=ON_DISK)
    with stage.at("remove by operation"), removing(stage, "b"), asking(stage, "op-rm"):
        await engine.remove("b", operation_id="op-rm")
    with stage.at("stop"), changing(stage, "a", "stopped"):
        await a.stop(grace=0)
    with stage.at("start"), changing(stage, "a", "made"):
        await a.start()
    with stage.at("run again"):
        done = await a.run(["cat", FILE])
        judged(engine, done.exit, right=done.stdout == CONTENT)
    with stage.at("events"):
        async for event in engine.events():
            assert event.kind == "sandbox.created"
            break
    with stage.at("remove"), removing(stage, "a"):
        await a.remove()
    await closed(stage, engine)


async def containers(stage: Stage) -> None:
    """Containers beside the main one, launched programs, a shared pid namespace."""
    engine = await opened(stage, "open")
    with stage.at("create with shared pids"), making(stage, "a"):
        a = await engine.create(name="a", resources=SMALL, share_pid=True)
    with stage.at("add"), adding(stage, "a", "box"):
        await a.containers.add(name="box", argv=["sh", "-c", "echo logged; exec sleep 1000"])
    with stage.at("add another"), adding(stage, "a", "gone"):
        gone = await a.containers.add(name="gone", argv=["sleep", "1000"])
    with stage.at("remove a container"):
        stage.say(sandbox="a", container="gone", state="removing")
        await gone.remove()
    with stage.at("create"), making(stage, "b"):
        b = await engine.create(name="b", resources=SMALL)
    with stage.at("launch"), adding(stage, "b", "main"):
        main = await b.launch(["sh", "-c", "echo logged; exec sleep 1000"])
    with stage.at("follow"):
        logged = main.follow()
        await anext(logged)
        with stage.cut_at("after keeper.ring_read"):  # there is no more: its answer does not come first
            await anext(logged)
    with stage.at("exec beside it"), executing(stage, "b", "stays") as told:
        told.append(await b.exec(["cat"], stdin="pipe"))
    with stage.at("kill"):
        stage.say(sandbox="b", container="main", state="removing")
        stage.say(sandbox="b", processes="ended")
        await main.kill()
    with stage.at("stop"), changing(stage, "a", "stopped"):
        stage.say(sandbox="a", container="box", state="removing")
        await a.stop(grace=0.01)
    with stage.at("start"), changing(stage, "a", "made"):
        await a.start()
    with stage.at("remove"), removing(stage, "a"):
        await a.remove()
    with stage.at("remove the other"), removing(stage, "b"):
        await b.remove()
    await closed(stage, engine)


async def bundle(stage: Stage) -> None:
    """A bundle of somebody else, as an engine above us would have it run."""
    engine = await opened(stage, "open")
    with making(stage, "a"):
        a = await engine.create(name="a", resources=SMALL, userns="host")
    task = a._entry.task
    path = foreign_bundle(Path(stage.place, "bundle"), "sleep", "1000")
    with stage.at("create a task"):
        stage.say(sandbox="a", container="theirs", state="making")
        await task.create(CreateTask("theirs", bundle=path, stdio=Stdio()))
    with stage.at("start it"):
        await task.start("theirs")
    stage.say(sandbox="a", container="theirs", state="made")
    with stage.at("exec in it"):
        await task.exec(ExecTask("theirs", "e1", ProcessSpec(argv=["sleep", "1000"]), Stdio()))
        await task.start("theirs", "e1")
    with stage.at("kill all"):
        await task.kill("theirs", "e1", signal=signal.SIGTERM, all=True)
        await task.wait("theirs", "e1")
    with stage.at("delete it"):
        stage.say(sandbox="a", container="theirs", state="removing")
        task.kill_now("theirs")
        await task.delete("theirs")
    with stage.at("create another one by its config"):
        stage.say(sandbox="a", container="adapted", state="making")
        text = Path(path, "config.json").read_text()
        layers = [f"{name}dir={Path(stage.place, name)}" for name in ("upper", "work")]
        for layer in layers:
            Path(layer.partition("=")[2]).mkdir()
        root = RootMount("overlay", "overlay", (f"lowerdir={path}/rootfs", *layers))
        await task.create(CreateTask("adapted", bundle=path, config=text, rootfs=(root,)))
    with stage.at("start that"):
        await task.start("adapted")
    stage.say(sandbox="a", container="adapted", state="made")
    with stage.at("delete that"):
        stage.say(sandbox="a", container="adapted", state="removing")
        await task.delete("adapted")
    with stage.at("run beside them"):
        done = await a.run(["true"])
        judged(engine, done.exit, right=done.exit_code == 0)
    with removing(stage, "a"):
        await a.remove()
    await closed(stage, engine)


async def recovered(stage: Stage) -> None:
    """Engines that come after others: the keeper ran on, or not, and not all records are good."""
    engine = await opened(stage, "")
    with making(stage, "a"):
        a = await engine.create(name="a", resources=SMALL)
    with making(stage, "b"):
        b = await engine.create(name="b", resources=SMALL)
    with executing(stage, "a", "stays") as told:
        told.append(await a.exec(["sh", "-c", "echo kept; exec cat"], stdin="pipe"))
    await a.files.write(FILE, CONTENT)
    stage.say(sandbox="a", file=True)
    with adding(stage, "a", "box"):
        await a.containers.add(name="box", argv=["sh", "-c", "echo logged; exec sleep 1000"])
    with changing(stage, "b", "stopped"):
        await b.stop(grace=0)
    with stage.at("detach"):
        await engine.close()
    engine = await opened(stage, "adopt")
    with stage.at("use"):
        a = await engine.get("a")
        done = await a.run(["cat", FILE])
        judged(engine, done.exit, right=done.stdout == CONTENT)
    with stage.at("take over"):
        [process] = await a.processes()
        await process.stdout.receive()
        stage.say(sandbox="a", processes="ended")
        await process.aclose()
    await engine.close()
    stage.say(lost=True)
    kill_keeper(stage.state_dir)
    records = Path(stage.state_dir, "sandboxes")
    damaged = records / "0123456789abcdef0123456789abcdef.json"
    stage.say(damaged=damaged.name)
    damaged.write_text("no record")
    (records / "0123456789abcdef0123456789abcdee.json.01234567.tmp").write_text("{")
    Path(stage.state_dir, f"unisandbox-{engine.id}-{'a' * 10}.img").write_bytes(b"")
    short = f"unisandbox-{engine.id}-{short_name(engine.id, a.id)}.img"
    Path(stage.state_dir, short).write_bytes(b"")  # as if it had been killed before it was unlinked
    engine = await opened(stage, "clean up")
    assert {found.action for found in engine.recovery.sandboxes} == {"removed"}
    with making(stage, "c"):
        c = await engine.create(name="c", resources=SMALL)
    await c.run(["true"])
    # What no readable record speaks of, with a keeper that ran on.
    stage.say(sandbox="c", state="removing")
    path = records / f"{c.id}.json"
    stage.say(damaged=path.name)
    path.write_text("damaged")
    await engine.close()
    engine = await opened(stage, "free a stray")
    await closed(stage, engine)


async def attached(stage: Stage) -> None:
    """Two engines on one directory; here in one process, so that both are killed at once."""
    owner = await opened(stage, "")
    with making(stage, "a"):
        a = await owner.create(name="a", resources=SMALL)
    await a.run(["true"])
    with stage.at("attach"):
        engine = await Engine.attach(stage.state_dir)
    stage.engines.insert(0, engine)
    other = await engine.get("a")
    with stage.at("run by another"):
        done = await other.run(["true"])
        judged(engine, done.exit, right=done.exit_code == 0)
    with stage.at("exec by another"), executing(stage, "a", "stays") as told:
        told.append(await other.exec(["cat"], stdin="pipe"))
    with stage.at("create by another"), making(stage, "b"):
        await engine.create(name="b", resources=SMALL)
    with stage.at("wait in vain"):
        async with a._entry.sharing.changing():
            with stage.cut_at("after keeper.lock"):
                await other.update(Resources(memory="96M"))
    with stage.at("stop by another"), changing(stage, "a", "stopped"):
        await other.stop(grace=0)
    with stage.at("start by the owner"), changing(stage, "a", "made"):
        await a.start()
    with stage.at("remove by another"), removing(stage, "b"):
        await engine.remove("b")
    with stage.at("leave"):
        await engine.close()
    with removing(stage, "a"):
        await a.remove()
    await closed(stage, owner)


async def cancelled(stage: Stage) -> None:
    """Calls that are cut: what they had begun is cleaned away."""
    engine = await opened(stage, "")
    with stage.at("create, cut"):
        stage.say(sandbox="a", state="removing")
        with stage.cut_at("after keeper.job"):
            await engine.create(name="a", resources=SMALL)
    with stage.at("create in vain"):
        try:
            await engine.create(name="a", resources=Resources(memory="64M", cpu=1e-9))
        except InvalidArgumentError:
            stage.say(sandbox="a", state="removed")
    with making(stage, "b"):
        b = await engine.create(name="b", resources=SMALL)
    with stage.at("first run, cut"), stage.cut_at("after runtime.create"):
        await b.run(["true"])
    with stage.at("exec, cut before it runs"), stage.cut_at("after init.started"):
        await b.exec(["sleep", "1000"])
    with stage.at("run, cut"), stage.cut_at("after init.exec"):
        await b.run(["sleep", "1000"])
    with stage.at("add, cut"):
        stage.say(sandbox="b", container="box", state="removing")
        with stage.cut_at("after keeper.ring"):
            await b.containers.add(name="box", argv=["sleep", "1000"])
    with stage.at("stop, cut"), changing(stage, "b", "stopped"), stage.cut_at("after process.signal"):
        await b.exec(["sleep", "1000"])
        await b.stop(grace=1000)
    with stage.at("remove, cut"), removing(stage, "b"), stage.cut_at("after keeper.drop"):
        await b.remove()
    await closed(stage, engine)


async def turned(stage: Stage) -> None:
    """An engine that is to end what one of policy "keep" has left."""
    engine = await opened(stage, "")
    with making(stage, "a"):
        a = await engine.create(name="a", resources=SMALL)
    with executing(stage, "a", "stays") as told:
        told.append(await a.exec(["cat"], stdin="pipe"))
    await engine.close()
    stage.say(sandbox="a", state="removing")
    with stage.at("open with another policy"):
        engine = await Engine.open(stage.state_dir, policy="stop")
    stage.engines.append(engine)
    with removing(stage, "a"):
        await closed(stage, engine)


async def expired(stage: Stage) -> None:
    """The keeper ends one by itself, when its time is over."""
    engine = await opened(stage, "")
    with making(stage, "a"):
        a = await engine.create(name="a", resources=ON_DISK, ttl=1000)
    await a.run(["true"])
    with adding(stage, "a", "box"):
        await a.containers.add(name="box", argv=["sleep", "1000"])
    with stage.at("expire"), removing(stage, "a"):
        await a._entry.sharing.set_expiry(0.001)
        while await engine.list():
            await anyio.sleep(0.005)
    await closed(stage, engine)


async def abandoned(stage: Stage) -> None:
    """The keeper finds itself without its owner, and ends everything by its guards."""
    engine = await Engine.open(stage.state_dir, policy="stop")
    stage.engines.append(engine)
    with making(stage, "a"):
        a = await engine.create(name="a", resources=SMALL)
    await a.run(["true"])
    with adding(stage, "a", "box"):
        await a.containers.add(name="box", argv=["sleep", "1000"])
    with making(stage, "b"):
        await engine.create(name="b", resources=ON_DISK)
    keeper = engine._core.host.keeper
    with stage.at("let go"), removing(stage, "a"), removing(stage, "b"):
        ended = os.pidfd_open(keeper.pid)
        keeper.abandon()
        select.select([ended], [], [], 10.0)
        os.close(ended)
    with stage.at("close"):
        await engine.close()


async def private(stage: Stage) -> None:
    """An engine that nobody else can find: its sandboxes end with its process."""
    with stage.at("open"):
        engine = await Engine.open()
    stage.engines.append(engine)
    with stage.at("create"):
        a = await engine.create(resources=SMALL)
    with stage.at("run"):
        await a.run(["true"])
    with stage.at("remove"):
        await a.remove()
    with stage.at("close"):
        await engine.close()


STORIES: Final[Mapping[str, Story]] = {
    "life": life,
    "containers": containers,
    "bundle": bundle,
    "recovered": recovered,
    "attached": attached,
    "cancelled": cancelled,
    "turned": turned,
    "expired": expired,
    "abandoned": abandoned,
    "private": private,
}


# --- what is promised when ---


async def opened(stage: Stage, step: str) -> Engine:
    """Open the engine, as a step if it has a name."""
    with stage.at(step) if step else contextlib.nullcontext():
        engine = await Engine.open(stage.state_dir, policy=stage.policy)
    stage.engines.append(engine)
    return engine


async def closed(stage: Stage, engine: Engine) -> None:
    """The last step."""
    with stage.at("close"):
        await engine.close()


@contextlib.contextmanager
def making(stage: Stage, name: str) -> Iterator[None]:
    """A sandbox is being created, then it is there."""
    stage.say(sandbox=name, state="making")
    yield
    stage.say(sandbox=name, state="made")


@contextlib.contextmanager
def removing(stage: Stage, name: str) -> Iterator[None]:
    """It is being removed, then it is gone."""
    stage.say(sandbox=name, state="removing")
    yield
    stage.say(sandbox=name, state="removed")


@contextlib.contextmanager
def asking(stage: Stage, operation_id: str) -> Iterator[None]:
    """Something is asked for under an operation id, then it is done."""
    stage.say(operation=operation_id, state="begun")
    yield
    stage.say(operation=operation_id, state="done")


@contextlib.contextmanager
def changing(stage: Stage, name: str, to: str) -> Iterator[None]:
    """It is being stopped or started; what runs in it is not promised any more."""
    stage.say(sandbox=name, state="changing")
    stage.say(sandbox=name, processes="ended")
    yield
    stage.say(sandbox=name, state=to)


@contextlib.contextmanager
def pausing(stage: Stage, name: str) -> Iterator[None]:
    """It is being paused or resumed."""
    stage.say(sandbox=name, state="pausing")
    yield


@contextlib.contextmanager
def executing(stage: Stage, name: str, kind: Literal["stays", "ends"]) -> Iterator[list[Process]]:
    """A process is being started; the caller puts it into the list once it is there.

    Args:
        stage, name: where.
        kind: "stays": it runs on until its input ends. "ends": it writes "told" and exits with 7.
    """
    told: list[Process] = []
    yield told
    for process in told:
        stage.say(sandbox=name, process=process.id, kind=kind)


@contextlib.contextmanager
def adding(stage: Stage, name: str, container: str) -> Iterator[None]:
    """A container is being added, then it is there."""
    stage.say(sandbox=name, container=container, state="making")
    yield
    stage.say(sandbox=name, container=container, state="made")


def foreign_bundle(directory: Path, *args: str) -> str:
    """A bundle with this machine's programs and namespaces of its own."""
    for name in ("rootfs", *(f"rootfs/{name}" for name in ("proc", "dev", "usr"))):
        (directory / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (directory / "rootfs" / name).symlink_to(f"usr/{name}")
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": False},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro", "nosuid", "nodev"]},
        ],
        # With it the runtime has to be asked to delete the container: without, its state is just removed.
        "hooks": {"poststop": [{"path": "/bin/cat"}]},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)
