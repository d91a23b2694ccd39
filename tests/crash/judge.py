"""Who comes after a crash: opens the state directory again, and compares what is there with what was promised."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import anyio
import attrs
from tests.crash.stories import CONTENT, COUNTED, FILE, SMALL, STARTS
from tests.crash.told import Telling, untrue

from unisandbox import Engine, NotFoundError, Process, Sandbox, SandboxError
from unisandbox.engine.durable import TEMPORARY
from unisandbox.engine.operations import OperationLog
from unisandbox.oci.task import OciTaskService

# The states of a sandbox in which it has to be there, and those in which it may be.
_THERE = frozenset({"made", "stopped", "changing", "pausing"})
_MAYBE = frozenset({"making", "removing"})
_DEADLINE = 20.0
_DEATH_SECONDS = 2.0


@attrs.define
class Promised:
    """What was said to the user of one sandbox."""

    state: str = ""
    file: bool = False
    background: bool = False
    processes: dict[str, str] = attrs.field(factory=dict)
    containers: dict[str, str] = attrs.field(factory=dict)


@attrs.define
class Promises:
    """All that a story said before it was killed.

    Attributes:
        sandboxes: what was said of each, by name.
        steps: those that were begun.
        operations: by id, whether their user was told that they are done.
        damaged: the names of records that the story itself has damaged.
        killed: who was.
        missed: the point was not reached.
        directory: of the engine, if the story does not know it.
    """

    sandboxes: dict[str, Promised] = attrs.field(factory=dict)
    steps: list[str] = attrs.field(factory=list)
    operations: dict[str, bool] = attrs.field(factory=dict)
    damaged: list[str] = attrs.field(factory=list)
    killed: str = ""
    missed: bool = False
    directory: str = ""

    @classmethod
    def read(cls, place: str) -> Promises:
        """Read them."""
        promises = cls()
        for line in Path(place, "promises").read_text().splitlines():
            promises._hear(json.loads(line))
        return promises

    def _hear(self, said: Mapping[str, str]) -> None:
        if "step" in said:
            self.steps.append(said["step"])
        elif "killed" in said:
            self.killed = said["killed"]
        elif "missed" in said:
            self.missed = True
        elif "directory" in said:
            self.directory = said["directory"]
        elif "damaged" in said:
            self.damaged.append(said["damaged"])
        elif "operation" in said:
            self.operations[said["operation"]] = said["state"] == "done"
        elif "lost" in said:
            for promised in self.sandboxes.values():
                promised.state = "lost"
        else:
            self._hear_of(self.sandboxes.setdefault(said["sandbox"], Promised()), said)

    @staticmethod
    def _hear_of(promised: Promised, said: Mapping[str, str]) -> None:
        if "container" in said:
            promised.containers[said["container"]] = said["state"]
        elif "process" in said:
            promised.processes[said["process"]] = said["kind"]
        elif "processes" in said:
            promised.processes.clear()
        elif "background" in said:
            promised.background = True
        elif "file" in said:
            promised.file = True
        else:
            promised.state = said["state"]
            promised.background &= promised.state != "stopped"


@attrs.define
class Judge:
    """Opens it again, twice.

    Attributes:
        place: of the story.
        policy: of its engine.
        on_recover: what to do with what is found.
        complaints: what is not as promised.
    """

    place: str
    policy: Literal["stop", "keep"]
    on_recover: Literal["adopt", "stop"]
    complaints: list[str] = attrs.field(factory=list)
    _tellings: list[Telling] = attrs.field(factory=list)

    async def judge(self) -> list[str]:
        """All that is wrong."""
        promises = Promises.read(self.place)
        try:
            with anyio.fail_after(_DEADLINE):
                await self._judge(promises)
        except (SandboxError, TimeoutError, OSError, ValueError) as error:
            self.complain(f"{type(error).__name__}: {error}")
        return self.complaints

    def complain(self, text: str) -> None:
        """Something is not as promised."""
        self.complaints.append(text)

    async def _judge(self, promises: Promises) -> None:
        lives = promises.killed == "host" and self.policy == "keep"
        async with self._opened() as engine:
            names = await self._compare(engine, promises, lives=lives and self.on_recover == "adopt")
        async with self._opened() as engine:
            report = engine.recovery
            expected = {(name, "removed" if self.on_recover == "stop" else "adopted") for name in names}
            if {(found.name, found.action) for found in report.sandboxes} != expected or report.damaged:
                self.complain(f"the second recovery of {sorted(names)} found something to do: {report}")
            for name in names if self.on_recover == "adopt" else ():
                await engine.remove(name)
            if left := await engine.list():
                self.complain(f"after all were removed there are: {left}")
        self._look_at_files(promises)
        self.complaints += untrue(self._tellings, unreadable=int("free a stray" in promises.steps))
        if lives:
            self._compare_ends(promises)

    def _look_at_files(self, promises: Promises) -> None:
        """What stays in the state directory for good is what the story has asked for."""
        aside = Path(self.place, "state/damaged")
        for name in sorted(file.name for file in aside.iterdir()) if aside.exists() else ():
            if not name.startswith(tuple(promises.damaged)):
                self.complain(f"set aside is {name}, which nobody has damaged")
        directory = Path(self.place, "state/operations")
        log = OperationLog(str(directory), durable=False)
        for operation_id, is_done in promises.operations.items():
            found = log.find(operation_id)
            # That of a process is finished when somebody has learned how it ended.
            if is_done and (found is None or (found.kind != "exec" and found.state != "finished")):
                self.complain(f"operation {operation_id} was done, and of it is noted {found}")
        known = {f"{operation_id}.json" for operation_id in promises.operations}
        others = {file.name for file in directory.iterdir()} - known if directory.exists() else set()
        # A writer that is killed leaves the file that it was at; it goes when it is old.
        cut = {name for name in others if name.endswith(TEMPORARY) and name.rpartition(".json.")[0] + ".json" in known}
        if others - cut or len(cut) > int(promises.killed != "keeper"):
            self.complain(f"among the operations is left: {sorted(others)}")

    def _compare_ends(self, promises: Promises) -> None:
        """The end that is told of a process that ends by itself is its own, whoever was there to see it."""
        told = [event for telling in self._tellings for event in telling.events if event.kind == "process.exited"]
        processes = [process for promised in promises.sandboxes.values() for process in promised.processes.items()]
        for exec_id in [exec_id for exec_id, kind in processes if kind == "ends"]:
            ends = [(event.exit.code, event.exit.reason) for event in told if event.exec_id == exec_id and event.exit]
            if ends != [(7, "exited")]:
                self.complain(f"of process {exec_id}, which ends with 7, is told {ends}")

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[Engine]:
        """The next engine; all that its readers of events are told is kept."""
        seen = [event.seq for telling in self._tellings for event in telling.events]
        opened_at = time.time()
        engine = await Engine.open(f"{self.place}/state", policy=self.policy, on_recover=self.on_recover)
        events = engine.events(after=max(seen, default=0))
        try:
            yield engine
        finally:
            await engine.close()
        self._tellings.append(Telling(opened_at, engine.recovery, [event async for event in events]))

    async def _compare(self, engine: Engine, promises: Promises, *, lives: bool) -> set[str]:
        report = engine.recovery
        actions = {found.name: found for found in report.sandboxes}
        for bad in report.damaged:
            if Path(bad.path).name not in promises.damaged:
                self.complain(f"nobody has damaged {bad}")
        for found in report.sandboxes:
            if found.action not in {"adopted", "removed"}:
                self.complain(f"{found.action}: {found}")
        listed = {str(status.name) for status in await engine.list()}
        if strangers := listed - set(promises.sandboxes):
            self.complain(f"nobody has made {strangers}")
        for name, promised in promises.sandboxes.items():
            must = lives and promised.state in _THERE
            may = lives and promised.state in _MAYBE | _THERE
            if must and name not in listed:
                self.complain(f"{name} was promised ({promised.state}) and is gone: {actions.get(name)}")
            elif name in listed and not may:
                self.complain(f"{name} should be gone ({promised.state})")
            elif name in listed:
                await self._use_or_lose(engine, name, promises)
            elif self._must_tell(promises, promised) and name not in actions:
                self.complain(f"{name} was promised and its end is not told")
        await self._again(engine, promises, listed)
        return {str(status.name) for status in await engine.list()}

    def _must_tell(self, promises: Promises, promised: Promised) -> bool:
        """Whether this is the first engine that can tell of its end."""
        return self.policy == "keep" and promised.state in _THERE and "adopt" not in promises.steps

    async def _use_or_lose(self, engine: Engine, name: str, promises: Promises) -> None:
        """Use it. Where the keeper was to end it by itself, that may happen in the middle: all of it, and in time."""
        complaints = len(self.complaints)
        try:
            await self._use(await engine.get(name), promises.sandboxes[name], promises.steps)
        except NotFoundError:
            if "expire" not in promises.steps:
                raise
        if "expire" in promises.steps and name not in {status.name for status in await engine.list()}:
            del self.complaints[complaints:]

    async def _use(self, sandbox: Sandbox, promised: Promised, steps: Sequence[str]) -> None:
        status = await sandbox.status()
        if promised.state in {"made", "stopped"} and status.state != {"made": "ready"}.get(promised.state, "stopped"):
            self.complain(f"{sandbox.name} is {status.state}, and was {promised.state}")
        if promised.state == "pausing":
            await sandbox.resume()
        processes = {process.id: process for process in await sandbox.processes()}
        for exec_id, kind in promised.processes.items():
            if exec_id not in processes:
                self.complain(f"process {exec_id} of {sandbox.name}, which {kind}, is not listed")
        await self._look_for_strangers(sandbox, promised, processes)
        for exec_id, process in processes.items():
            await self._end(process, promised.processes.get(exec_id, ""))
        if promised.containers.get("main") == "removing":
            await sandbox.stop(grace=0)  # otherwise one is told that the launched program has ended
        if promised.state in {"stopped", "changing", "removing"} or "main" in promised.containers:
            await sandbox.start()
        if (await sandbox.run(["true"])).exit_code != 0:
            self.complain(f"{sandbox.name} runs nothing")
        if promised.file and await sandbox.files.read(FILE) != CONTENT:
            self.complain(f"the file of {sandbox.name} is another one")
        if "exec that ends" in steps and sandbox.name == "a" and promised.state == "made":
            again = await sandbox.exec(COUNTED, operation_id="op-x")
            if (exit := await again.wait()).code != 7:
                self.complain(f"the operation of a process ended with {exit}")
            await again.aclose()
            if (starts := await sandbox.files.read(STARTS)) != b"started\n":
                self.complain(f"the operation of a process started it {starts.count(b'started')} times")

    async def _end(self, process: Process, kind: str) -> None:
        if kind == "stays":
            if process.pid == 0:
                self.complain(f"process {process.id} ran on and has ended: {await process.wait()}")
                return
            await process.stdin.send(b"heard\n")
            heard = b""
            while b"heard" not in heard:
                heard += await process.stdout.receive()
            await process.stdin.aclose()
            if (exit := await process.wait()).code != 0:
                self.complain(f"process {process.id} ended with {exit}")
        elif kind == "ends":
            exit, output = await process.wait(), await process.stdout.receive()
            if exit.code != 7 or exit.reason != "exited" or output != b"told\n":
                self.complain(f"process {process.id} ended with {exit}, and wrote {output!r}")
        await process.aclose()

    async def _look_for_strangers(self, sandbox: Sandbox, promised: Promised, processes: Mapping[str, Process]) -> None:
        """What runs is a process that is listed, or a container's."""
        containers = {container.name: container for container in await sandbox.containers.list()}
        for name, state in promised.containers.items():
            if state == "made" and (name not in containers or containers[name].state != "running"):
                self.complain(f"container {name} of {sandbox.name} is not as promised: {containers.get(name)}")
        known = {process.pid for process in processes.values()}
        known |= {container.pid for container in containers.values() if container.pid}
        task = sandbox._entry.task
        assert isinstance(task, OciTaskService)
        for container_id, exec_id in await task.running():
            known.add((await task.state(container_id, exec_id)).pid or 0)
        strangers: dict[int, str] = {}
        with anyio.move_on_after(_DEATH_SECONDS):
            while strangers := {
                pid: _command(pid)
                for name, container in containers.items()
                if container.state != "created"  # a bundle's stands before its program
                for pid in await task.pids(name)
                if pid not in known and not (promised.background and _command(pid) == "sleep 1000")
            }:
                await anyio.sleep(0.005)  # it may have been killed, and end in a moment
        for command in strangers.values():
            self.complain(f"{command!r} runs in {sandbox.name}, and nobody knows of it")

    async def _again(self, engine: Engine, promises: Promises, listed: set[str]) -> None:
        """Operations are repeated with the same answers."""
        if "a" in listed and "run" in promises.steps and promises.sandboxes["a"].state in _THERE:
            there = await engine.get("a")
            again = await engine.create(name="a", resources=SMALL, ttl=1000, operation_id="op-a")
            if again.id != there.id:
                self.complain("the operation that creates has made another one")
        if "remove by operation" in promises.steps and "b" in promises.sandboxes:
            try:
                await engine.remove("b", operation_id="op-rm")
            except NotFoundError:
                if "b" in listed:
                    self.complain("the operation that removes cannot be repeated")
            if "b" in {status.name for status in await engine.list()}:
                self.complain("the operation that removes has left it")


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return "(ended)"
