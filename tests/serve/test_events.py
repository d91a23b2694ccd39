"""What containerd is told of containers: by a service of events that stands in its place."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio
import attrs
import pytest
from betterproto2 import Message
from tests.serve.client import CONTAINER, DEADLINE, POD, Engine, engine_at, shared

from unisandbox.api.proto.containerd import events
from unisandbox.api.proto.containerd.services.events.ttrpc.v1 import ForwardRequest
from unisandbox.api.proto.containerd.services.sandbox import v1
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.types import Envelope
from unisandbox.api.proto.containerd.v1.types import Status as TaskStatus
from unisandbox.api.proto.google.protobuf import Empty
from unisandbox.api.proto.methods import ControllerV1, EventsV1, TaskV3
from unisandbox.serve import publishing
from unisandbox.serve.config import ServeConfig
from unisandbox.serve.daemon import Server, serving
from unisandbox.serve.pods import Place
from unisandbox.serve.publishing import Publisher
from unisandbox.serve.stdio import Ends, Streams, Told
from unisandbox.serve.telling import Telling
from unisandbox.wire import codec
from unisandbox.wire.services import Call, Services
from unisandbox.wire.ttrpc import serve

pytestmark = [pytest.mark.anyio, pytest.mark.root]

KINDS: Final = {
    "containerd.events.TaskOOM": events.TaskOom,
    **{f"containerd.events.{name}": getattr(events, name) for name in events.__all__ if name != "TaskOom"},
}


@attrs.define
class Heard:
    """What containerd has got.

    Attributes:
        path: where.
        taking: what it takes next is acknowledged once this is set.
    """

    path: str
    envelopes: list[Envelope] = attrs.field(factory=list)
    news: anyio.Event = attrs.field(factory=anyio.Event)
    taking: anyio.Event | None = None

    async def forward(self, request: ForwardRequest, call: Call) -> Empty:
        assert request.envelope is not None
        assert request.envelope.timestamp is not None
        assert request.envelope.namespace == call.namespace == "k8s.io"
        self.envelopes.append(request.envelope)
        self.news.set()
        if self.taking is not None:
            await self.taking.wait()
        return Empty()

    @property
    def messages(self) -> list[Message]:
        told = [envelope.event for envelope in self.envelopes if envelope.event is not None]
        return [codec.decode(KINDS[event.type_url], event.value) for event in told]

    @property
    def topics(self) -> list[str]:
        return [envelope.topic.removeprefix("/tasks/") for envelope in self.envelopes]

    async def until(self, topic: str, count: int = 1) -> None:
        with anyio.fail_after(DEADLINE):
            while self.topics.count(topic) < count:
                self.news = anyio.Event()
                await self.news.wait()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        services = Services()
        services.add(EventsV1.FORWARD, self.forward)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen()
            async with anyio.create_task_group() as group:
                group.start_soon(serve, listener, services)
                yield
                group.cancel_scope.cancel()
        os.unlink(self.path)


@pytest.fixture
def heard(tmp_path: Path) -> Heard:
    return Heard(str(tmp_path / "containerd.sock.ttrpc"))


@pytest.fixture
def config(tmp_path: Path, heard: Heard) -> ServeConfig:
    return ServeConfig(root=str(tmp_path / "root"), socket=str(tmp_path / "run/s.sock"), events=heard.path)


async def kill(engine: Engine, exec_id: str = "") -> None:
    await engine.tasks(TaskV3.KILL, v3.KillRequest(id=CONTAINER, exec_id=exec_id, signal=signal.SIGKILL))


async def test_what_happens_is_told_as_shims_tell_it_although_nobody_waits(engine: Engine, heard: Heard) -> None:
    async with heard.listening():
        await engine.run_pod(linux=shared())
        main = await engine.run("sleep", "1000")
        fifos = engine.fifos("e1")
        added = await engine.exec("e1", fifos, "sh", "-c", "exit 3")
        await heard.until("exit")
        await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id="e1"))
        await engine.tasks(TaskV3.PAUSE, v3.PauseRequest(id=CONTAINER))
        await engine.tasks(TaskV3.RESUME, v3.ResumeRequest(id=CONTAINER))
        pid = (await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))).pid
        await kill(engine)
        await heard.until("exit", 2)
        gone = await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
        await heard.until("delete")
    order = ["create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"]
    assert heard.topics == order
    told = heard.messages
    assert isinstance(told[0], events.TaskCreate)
    assert told[0].io is not None
    assert (told[0].container_id, told[0].pid, told[0].io.stdout) == (CONTAINER, pid, main.path("stdout"))
    assert told[0].rootfs[0].type == "overlay"
    assert told[3] == events.TaskExecStarted(container_id=CONTAINER, exec_id="e1", pid=added.pid)
    assert isinstance(told[4], events.TaskExit)
    assert (told[4].id, told[4].pid, told[4].exit_status) == ("e1", added.pid, 3)
    assert isinstance(told[7], events.TaskExit)
    assert (told[7].id, told[7].container_id, told[7].pid) == (CONTAINER, CONTAINER, pid)
    assert (told[7].exit_status, told[7].exited_at) == (137, gone.exited_at)
    assert told[8] == events.TaskDelete(container_id=CONTAINER, pid=pid, exit_status=137, exited_at=gone.exited_at)
    assert gone.pid == pid
    for each in (main, fifos):
        each.close()


async def test_an_end_is_told_also_of_what_is_forgotten_as_it_begins(
    engine: Engine, server: Server, tmp_path: Path
) -> None:
    await engine.run_pod(linux=shared())
    main = await engine.run("sleep", "1000")
    place = server.pods.place(await server.pods.entry(POD, None))
    heard = Heard(str(tmp_path / "another.sock"))
    publisher = Publisher(heard.path)
    async with heard.listening(), anyio.create_task_group() as group:
        group.start_soon(publisher.run)
        telling = Telling(publisher, group)
        telling.expect(place, CONTAINER, "", 1)
        telling.watch(place, CONTAINER, "")
        telling.forget([POD])  # before the task that waits for the end has had its first step
        await kill(engine)
        await heard.until("exit")
        group.cancel_scope.cancel()
    main.close()


async def test_an_end_with_the_whole_pod_is_told(engine: Engine, heard: Heard) -> None:
    async with heard.listening():
        await engine.run_pod(linux=shared())
        main = await engine.run("sleep", "1000")
        await engine.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id=POD))
        await heard.until("exit")
        main.close()


async def test_what_is_killed_for_memory_is_told_while_its_container_lives_on(engine: Engine, heard: Heard) -> None:
    async with heard.listening():
        await engine.run_pod(linux=shared())
        limit = {"memory": {"limit": 32 << 20, "swap": 32 << 20}}
        script = "tail /dev/zero & wait; read x; exec tail /dev/zero"
        main = await engine.run("sh", "-c", script, resources=limit, stdin=True)
        await heard.until("oom")
        state = await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))
        assert state.status == TaskStatus.RUNNING
        os.write(main.ends["stdin"], b"now\n")
        await heard.until("exit")
        assert heard.topics == ["create", "start", "oom", "oom", "exit"]
        assert heard.messages[2] == events.TaskOom(container_id=CONTAINER)
        main.close()


async def test_events_wait_for_containerd_and_hold_up_no_call(engine: Engine, heard: Heard) -> None:
    await engine.run_pod(linux=shared())
    main = await engine.run("true")
    assert await engine.wait() == 0
    async with heard.listening():
        await heard.until("exit")
        assert heard.topics == ["create", "start", "exit"]
    await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))  # containerd is away again
    async with heard.listening():
        await heard.until("delete")
    assert heard.topics == ["create", "start", "exit", "delete"]
    main.close()


async def test_an_end_that_no_server_saw_is_told_by_the_next_one_and_not_again(
    config: ServeConfig, heard: Heard, tmp_path: Path
) -> None:
    async with heard.listening():
        async with serving(config), engine_at(config.socket, tmp_path) as engine:
            address = (await engine.run_pod(linux=shared())).address
            main = await engine.run("sh", "-c", "read x; exit 7", stdin=True)
            await heard.until("start")
        os.write(main.ends["stdin"], b"end\n")
        assert await main.read() == b"", "it has ended"
        for _ in range(2):
            async with serving(config):
                await heard.until("exit")
        async with serving(config) as server, engine_at(config.socket, tmp_path) as engine:
            await engine.connect(address)
            await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER))
            await heard.until("delete")
            for entry in server.pods.core.entries():
                await entry.remove()
    assert heard.topics == ["create", "start", "exit", "delete"]
    assert isinstance(heard.messages[2], events.TaskExit)
    assert heard.messages[2].exit_status == 7
    main.close()


async def test_a_pod_that_cannot_be_taken_over_harms_no_other(
    config: ServeConfig, heard: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, deaf = "1" * 64, "2" * 64
    async with heard.listening():
        async with serving(config) as server, engine_at(config.socket, tmp_path) as engine:
            for pod in (bad, deaf, POD):
                address = (await engine.run_pod(pod, linux=shared())).address
            main = await engine.run("sh", "-c", "read x; exit 7", stdin=True)
            keeper = server.pods.core.host.keeper
            streams = server.pods.place(await server.pods.entry(bad, None)).streams
            await streams.hold(CONTAINER, "", Streams(), Ends())
            keeper.notes.write_now(f"{server.pods.core.host.prefix(bad)}io/{CONTAINER}/-/told", "not what we write")
            path = server.pods.path(deaf)
        os.unlink(path)
        os.mkdir(path)
        async with serving(config) as server, engine_at(config.socket, tmp_path) as engine:
            assert f"what happens in pod {bad} from before is not told" in caplog.text
            assert f"the containers of pod {deaf} cannot be reached" in caplog.text
            await engine.connect(address)
            os.write(main.ends["stdin"], b"end\n")
            await heard.until("exit")
            for pod in (bad, deaf, POD):
                await engine.call(ControllerV1.SHUTDOWN, v1.ControllerShutdownRequest(sandbox_id=pod))
        os.rmdir(path)
    main.close()


async def test_no_call_is_answered_before_all_pods_are_taken_over(
    config: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(config), engine_at(config.socket, tmp_path) as engine:
        address = (await engine.run_pod(linux=shared())).address
        main = await engine.run("sleep", "1000")
    answered = anyio.Event()

    async def ask(engine: Engine) -> None:
        await engine.connect(address)  # it need not be tried again
        assert (await engine.tasks(TaskV3.STATE, v3.StateRequest(id=CONTAINER))).status == TaskStatus.RUNNING
        answered.set()

    async with engine_at(config.socket, tmp_path) as engine, anyio.create_task_group() as group:
        adopt = Telling.adopt

        async def slowly(telling: Telling, place: Place) -> None:
            await adopt(telling, place)
            group.start_soon(ask, engine)
            with anyio.move_on_after(0.3) as waited:
                await answered.wait()
            assert waited.cancelled_caught

        monkeypatch.setattr(Telling, "adopt", slowly)
        async with serving(config) as server:
            with anyio.fail_after(DEADLINE):
                await answered.wait()
            for entry in server.pods.core.entries():
                await entry.remove()
    main.close()


async def test_a_process_that_is_deleted_while_it_starts_has_its_end_told(
    engine: Engine, server: Server, heard: Heard
) -> None:
    async with heard.listening():
        await engine.run_pod(linux=shared())
        main, fifos = await engine.run("sleep", "1000"), engine.fifos("e1")
        await engine.add("e1", fifos, "sh", "-c", "exit 3")
        async with anyio.create_task_group() as group:
            keeper = server.pods.core.host.keeper.pid
            os.kill(keeper, signal.SIGSTOP)  # so that nothing starts
            try:
                group.start_soon(engine.tasks, TaskV3.START, v3.StartRequest(id=CONTAINER, exec_id="e1"))
                await anyio.wait_all_tasks_blocked()
                gone: list[v3.DeleteResponse] = []

                async def delete() -> None:
                    request = v3.DeleteRequest(id=CONTAINER, exec_id="e1")
                    gone.append(await engine.tasks(TaskV3.DELETE, request))

                group.start_soon(delete)
                # Requests come in order, and what answers this one asks no keeper.
                await engine.tasks(TaskV3.CONNECT, v3.ConnectRequest(id=CONTAINER))
                await anyio.wait_all_tasks_blocked()
                assert gone == []
            finally:
                os.kill(keeper, signal.SIGCONT)
        assert [answer.exit_status for answer in gone] == [3]
        await heard.until("exit")
        told = next(message for message in heard.messages if isinstance(message, events.TaskExit))
        assert (told.id, told.exit_status, told.exited_at) == ("e1", 3, gone[0].exited_at)
        for each in (main, fifos):
            each.close()


@pytest.mark.parametrize("with_pod", [False, True])
async def test_what_is_told_of_a_process_that_is_gone_is_not_kept(
    engine: Engine, server: Server, heard: Heard, *, with_pod: bool
) -> None:
    async with heard.listening():
        await engine.run_pod(linux=shared())
        main, fifos = await engine.run("sleep", "1000"), engine.fifos("e1")
        await heard.until("start")
        heard.taking = anyio.Event()
        await engine.exec("e1", fifos, "true")
        assert await engine.wait("e1") == 0
        if with_pod:  # by another process, say
            await (await server.pods.entry(POD, None)).remove()
        else:
            await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id="e1"))
            await kill(engine)
        heard.taking.set()
        await heard.until("exit", 2)  # what was told before is acknowledged
        notes = await server.pods.core.host.keeper.notes.read()
        assert [name for name in notes if "/e1" in name] == []
        for each in (main, fifos):
            each.close()


async def test_a_process_is_not_known_by_what_was_told_of_a_former_one_of_this_name(
    engine: Engine, server: Server
) -> None:
    await engine.run_pod(linux=shared())
    streams = server.pods.place(await server.pods.entry(POD, None)).streams
    streams.note_told(CONTAINER, "e1", Told(exit=True))
    await streams.hold(CONTAINER, "e1", Streams(), Ends())
    assert await streams.told() == {(CONTAINER, "e1"): Told()}


async def test_a_kill_for_memory_is_told_by_the_next_server_although_one_was_told_before(
    config: ServeConfig, heard: Heard, tmp_path: Path
) -> None:
    async with heard.listening():
        async with serving(config), engine_at(config.socket, tmp_path) as engine:
            address = (await engine.run_pod(linux=shared())).address
            limit = {"memory": {"limit": 32 << 20, "swap": 32 << 20}}
            main = await engine.run("sh", "-c", "read x; exec tail /dev/zero", resources=limit, stdin=True)
            fifos = engine.fifos("e1")
            await engine.exec("e1", fifos, "tail", "/dev/zero")
            assert await engine.wait("e1") == 137
            await engine.tasks(TaskV3.DELETE, v3.DeleteRequest(id=CONTAINER, exec_id="e1"))
            await engine.tasks(TaskV3.PAUSE, v3.PauseRequest(id=CONTAINER))
            await engine.tasks(TaskV3.RESUME, v3.ResumeRequest(id=CONTAINER))
            await heard.until("resumed")  # containerd has what was told before
        async with serving(config) as server, engine_at(config.socket, tmp_path) as engine:
            await engine.connect(address)
            os.write(main.ends["stdin"], b"now\n")
            await heard.until("exit", 2)
            assert heard.topics[heard.topics.index("resumed") :] == ["resumed", "oom", "exit"]
            for entry in server.pods.core.entries():
                await entry.remove()
    for each in (main, fifos):
        each.close()


async def test_a_pod_with_too_many_events_loses_its_oldest_and_takes_no_place_of_another(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publishing, "_MOST_OF_POD", 3)
    publisher = Publisher(heard.path)
    publish(publisher, "quiet", 0)
    for number in range(5):
        publish(publisher, "busy", number)
    publisher.publish("iSulad's", "", "/tasks/oom", events.TaskOom(container_id="for nobody"))
    publish(publisher, "quiet", 1)
    assert await sent(publisher, heard, 5) == ["quiet 0", "busy 2", "busy 3", "busy 4", "quiet 1"]
    assert "2 events of pod busy were lost" in caplog.text
    assert "quiet" not in caplog.text


async def test_of_too_many_events_of_all_pods_those_are_lost_of_the_pod_with_the_most(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publishing, "_MOST_WAITING", 6)
    publisher = Publisher(heard.path)
    for number in range(5):
        publish(publisher, "busy", number)
    for number in range(3):
        publish(publisher, "quiet", number)
    assert await sent(publisher, heard, 6) == [
        *(f"busy {number}" for number in (2, 3, 4)),
        *map("quiet {}".format, range(3)),
    ]
    assert "2 events of pod busy were lost" in caplog.text


async def test_what_is_lost_is_told_also_when_the_server_ends_before_containerd_is_back(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publishing, "_MOST_OF_POD", 1)
    publisher = Publisher(heard.path)
    async with anyio.create_task_group() as group:
        for number in range(3):
            publish(publisher, "busy", number)
        group.start_soon(publisher.run)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert "2 events of pod busy were lost" in caplog.text


def publish(publisher: Publisher, pod: str, number: int) -> None:
    publisher.publish(pod, "k8s.io", "/tasks/oom", events.TaskOom(container_id=f"{pod} {number}"))


async def sent(publisher: Publisher, heard: Heard, count: int) -> list[str]:
    """What arrives, in order, once containerd is there."""
    async with heard.listening(), anyio.create_task_group() as group:
        group.start_soon(publisher.run)
        await heard.until("oom", count)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    return [message.container_id for message in heard.messages if isinstance(message, events.TaskOom)]
