"""The task service of pods, by ttrpc. Source: containerd, api/runtime/task/v3/shim.proto; v2 has the same messages.

One table serves all pods: each pod has a socket of its own, and what comes by it is marked with the pod's id.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import anyio
import attrs

from unisandbox import __version__
from unisandbox.api import (
    CreateTask,
    ExecTask,
    Exit,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RootMount,
    SupportsPause,
    SupportsUpdate,
    TaskState,
    Terminal,
    UnsupportedError,
)
from unisandbox.api.proto.containerd import events
from unisandbox.api.proto.containerd.runc.v1 import Options
from unisandbox.api.proto.containerd.task import v3
from unisandbox.api.proto.containerd.v1.types import ProcessInfo, Status
from unisandbox.api.proto.google.protobuf import Any as AnyMessage
from unisandbox.api.proto.google.protobuf import Empty
from unisandbox.api.proto.methods import TaskV2, TaskV3
from unisandbox.api.rpc import Method
from unisandbox.serve.bundles import adapted, changed_resources, owner_of, read_config
from unisandbox.serve.metrics import any_of
from unisandbox.serve.moments import moment
from unisandbox.serve.pods import POD_KEY, Place, Pods, facts_of
from unisandbox.serve.stdio import LAST_OUTPUT_SECONDS, Ends, Streams, copy_terminal
from unisandbox.serve.streaming import Streaming
from unisandbox.serve.telling import Telling
from unisandbox.wire import codec
from unisandbox.wire.services import Call, Services, namespace_of
from unisandbox.wire.ttrpc import Messages, Request, Shape

_logger: Final = logging.getLogger("unisandbox.serve")

_STATES: Final = {
    "created": Status.CREATED,
    "running": Status.RUNNING,
    "paused": Status.PAUSED,
    "stopped": Status.STOPPED,
}
_OPTIONS: Final = "containerd.runc.v1.Options"
# What of containerd's options for its shim would change what is done; cgroups are ours, whatever their driver.
_REFUSED_OPTIONS: Final = ("no_pivot_root", "no_new_keyring", "binary_name", "criu_image_path", "criu_work_path")
_SIGKILL: Final = 9


class OfPod:
    """The table as one pod's peers see it; see `wire.ttrpc.serving.Handlers`."""

    def __init__(self, services: Services, sandbox_id: str) -> None:
        self._services = services
        self._sandbox_id = sandbox_id

    def shape(self, service: str, method: str) -> Shape | None:
        """The shape of a method."""
        return self._services.shape(service, method)

    async def answer(self, request: Request) -> bytes:
        """Handle a call."""
        return await self._services.answer(self._marked(request))

    async def converse(self, request: Request, messages: Messages) -> None:
        """Handle a stream."""
        await self._services.converse(self._marked(request), messages)

    def _marked(self, request: Request) -> Request:
        return attrs.evolve(request, metadata={**request.metadata, POD_KEY: (self._sandbox_id,)})


class _Ids(Protocol):
    id: str


class Tasks:
    """All methods; add them to a table by `add_to`.

    Args:
        pods: whose containers these are.
        telling: of what happens.
        streaming: the streams of those that have no FIFOs.
        group: where terminals are copied.
    """

    def __init__(self, pods: Pods, telling: Telling, streaming: Streaming, group: anyio.abc.TaskGroup) -> None:
        self._pods = pods
        self._telling = telling
        self._streaming = streaming
        self._group = group
        pods.on_removed.append(self._forget_pod)
        # Set when a process that was added has started, or never will: engines wait for it before that.
        self._starts: dict[tuple[str, str, str], anyio.Event] = {}
        # The ends of terminals that were not started yet.
        self._terminals: dict[tuple[str, str, str], Ends] = {}
        # Those that were started and are copied.
        self._copies: dict[tuple[str, str, str], anyio.CancelScope] = {}

    def add_to(self, services: Services) -> None:
        """Add all methods of both versions. iSulad says no namespace."""
        methods: dict[Method[Any, Any], Callable[[Any, Call], Awaitable[Any]]] = {
            TaskV3.CREATE: self.create,
            TaskV3.START: self.start,
            TaskV3.STATE: self.state,
            TaskV3.DELETE: self.delete,
            TaskV3.PIDS: self.pids,
            TaskV3.PAUSE: self.pause,
            TaskV3.RESUME: self.resume,
            TaskV3.KILL: self.kill,
            TaskV3.EXEC: self.exec,
            TaskV3.UPDATE: self.update,
            TaskV3.RESIZE_PTY: self.resize_pty,
            TaskV3.CLOSE_IO: self.close_io,
            TaskV3.WAIT: self.wait,
            TaskV3.STATS: self.stats,
            TaskV3.CONNECT: self.connect,
            TaskV3.SHUTDOWN: self.shutdown,
        }
        for method, handler in methods.items():
            services.add(method, handler, namespaced=False)
            services.add(method.under(TaskV2.CREATE.service), handler, namespaced=False)

    async def _place(self, call: Call) -> Place:
        sandbox_id = call.metadata[POD_KEY][0]
        namespace = namespace_of(call.metadata)
        return self._pods.place(await self._pods.entry(sandbox_id, namespace or None))

    # --- containers ---

    async def create(self, request: v3.CreateTaskRequest, call: Call) -> v3.CreateTaskResponse:
        """Make a container from the engine's bundle."""
        place = await self._place(call)
        if request.checkpoint or request.parent_checkpoint:
            raise UnsupportedError("restoring a checkpoint", "serve")
        ids = place.entry.spec.user_ids
        _check_options(request.options, is_mapped=ids is not None)
        place.entry.check_started()
        if (await place.entry.sandboxer.status(place.entry.sandbox_id)).state != "ready":
            raise FailedPreconditionError(f"pod {place.entry.sandbox_id!r} has ended")
        streams = Streams(request.stdin, request.stdout, request.stderr, request.terminal, request.bundle)
        config = read_config(request.bundle)
        rootfs = tuple(
            RootMount(mount.type, mount.source, tuple(mount.options), mount.target) for mount in request.rootfs
        )
        rootfs = rootfs or self._pods.announced.get(place.entry.sandbox_id, {}).get(request.id, ())
        ends = Ends.open(streams, self._pods.address(place.entry.sandbox_id))
        key = (place.entry.sandbox_id, request.id, "")
        try:
            if ids is not None:
                ends.give_to(*owner_of(config.get("process"), ids))
            wanted = CreateTask(
                request.id,
                bundle=request.bundle,
                terminal=request.terminal,
                stdio=CreateTask("").stdio if request.terminal else ends.stdio(),
                config=adapted(config, facts_of(place.entry)),
                rootfs=rootfs,
            )
            async with place.entry.sharing.changing():
                await place.task.create(wanted)
            await self._keep(place, key, streams, ends)
        except BaseException:
            ends.close()
            raise
        pid = (await place.task.state(request.id)).pid or 0
        self._telling.expect(place, request.id, "", pid)
        io = events.TaskIo(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal)
        self._telling.tell(
            place,
            events.TaskCreate(
                container_id=request.id, bundle=request.bundle, rootfs=list(request.rootfs), io=io, pid=pid
            ),
        )
        return v3.CreateTaskResponse(pid=pid)

    async def _keep(self, place: Place, key: tuple[str, str, str], streams: Streams, ends: Ends) -> None:
        """Hand the outer ends to the keeper; those of a terminal wait for it."""
        await place.streams.hold(key[1], key[2], streams, ends)
        self._streaming.made(*key, streams)
        if streams.terminal:
            self._terminals[key] = ends
        else:
            ends.close()

    async def start(self, request: v3.StartRequest, call: Call) -> v3.StartResponse:
        """Start the first process, or one that was added."""
        place = await self._place(call)
        key = (place.entry.sandbox_id, request.id, request.exec_id)
        if request.exec_id:
            started = await place.task.start(request.id, request.exec_id)
        else:
            async with place.entry.sharing.changing():
                started = await place.task.start(request.id)
        self._has_started(key)
        self._tell_start(place, request, started.pid or 0)
        if started.terminal is not None:
            ends = self._terminals.pop(key, None) or Ends()
            self._copies[key] = anyio.CancelScope()
            self._group.start_soon(self._copy, key, self._copies[key], started.terminal, ends)
        return v3.StartResponse(pid=started.pid or 0)

    def _tell_start(self, place: Place, request: v3.StartRequest, pid: int) -> None:
        """Before its end can be told."""
        if request.exec_id:
            self._telling.expect(place, request.id, request.exec_id, pid)
            event = events.TaskExecStarted(container_id=request.id, exec_id=request.exec_id, pid=pid)
            self._telling.tell(place, event)
        else:
            self._telling.started(place, request.id, pid)
            self._telling.tell(place, events.TaskStart(container_id=request.id, pid=pid))
        self._telling.watch(place, request.id, request.exec_id)

    async def _copy(self, key: tuple[str, str, str], scope: anyio.CancelScope, master: int, ends: Ends) -> None:
        """Copy a terminal; what fails ends this one alone."""
        try:
            with scope:
                await copy_terminal(master, ends)
        except Exception as error:
            _logger.error("the terminal of %s in pod %s is not copied any more: %r", key[2] or key[1], key[0], error)
        finally:
            if self._copies.get(key) is scope:
                del self._copies[key]

    def _has_started(self, key: tuple[str, str, str]) -> None:
        if event := self._starts.pop(key, None):
            event.set()

    async def exec(self, request: v3.ExecProcessRequest, call: Call) -> Empty:
        """Add a process; it is not started yet."""
        place = await self._place(call)
        if request.spec is None:
            raise InvalidArgumentError("exec needs an OCI process object")
        streams = Streams(request.stdin, request.stdout, request.stderr, request.terminal)
        try:
            text = request.spec.value.decode()
            process = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"the OCI process object cannot be read: {error}") from error
        ends = Ends.open(streams, self._pods.address(place.entry.sandbox_id))
        key = (place.entry.sandbox_id, request.id, request.exec_id)
        try:
            if (ids := place.entry.spec.user_ids) is not None:
                ends.give_to(*owner_of(process, ids))
            wanted = ExecTask(request.id, request.exec_id, oci_process=text)
            if not request.terminal:
                wanted = attrs.evolve(wanted, stdio=ends.stdio())
            await place.task.exec(wanted)
            await self._keep(place, key, streams, ends)
        except BaseException:
            ends.close()
            raise
        self._telling.tell(place, events.TaskExecAdded(container_id=request.id, exec_id=request.exec_id))
        return Empty()

    async def delete(self, request: v3.DeleteRequest, call: Call) -> v3.DeleteResponse:
        """Free an ended process, or a container that has ended or was never started."""
        place = await self._place(call)
        state = await self._state(place, request.id, request.exec_id)
        if state.state in {"running", "paused"}:
            raise FailedPreconditionError(f"process {request.exec_id or request.id!r} still runs")
        exit = state.exit
        # Before it is freed, with the cgroup that counts what is killed for memory.
        pid = 0 if exit is None else await self._telling.ended(place, request.id, request.exec_id, exit)
        if request.exec_id:
            last = await place.task.delete(request.id, request.exec_id)
        else:
            async with place.entry.sharing.changing():
                last = await place.task.delete(request.id)
        if exit is None and last is not None:  # it was being started, and its end was waited for
            exit = last
            pid = await self._telling.ended(place, request.id, request.exec_id, exit)
        self._forget(place, request.id, request.exec_id)
        code, at = (0, None) if exit is None else (exit.code, moment(exit.exited_at))
        if not request.exec_id:
            gone = events.TaskDelete(container_id=request.id, pid=pid, exit_status=code, exited_at=at)
            self._telling.tell(place, gone)
        return v3.DeleteResponse(pid=pid, exit_status=code, exited_at=at)

    def _forget(self, place: Place, container: str, exec_id: str) -> None:
        place.streams.forget(container, exec_id)
        self._forget_all(place.entry.sandbox_id, container, *filter(None, [exec_id]))

    def _forget_pod(self, sandbox_id: str) -> None:
        self._forget_all(sandbox_id)

    def _forget_all(self, *beginning: str) -> None:
        """Forget what never came to its start, wake whoever waits for that, and let terminals end."""
        self._telling.forget(beginning)
        self._streaming.forget(beginning)
        for key in {*self._terminals, *self._starts, *self._copies}:
            if key[: len(beginning)] == beginning:
                if copy := self._copies.pop(key, None):
                    # By itself it would not end as long as nobody reads.
                    copy.deadline = anyio.current_time() + LAST_OUTPUT_SECONDS
                self._has_started(key)
                if ends := self._terminals.pop(key, None):
                    ends.close()

    # --- what is known of them ---

    async def _state(self, place: Place, container: str, exec_id: str) -> TaskState:
        """The state, with the exit of what has ended."""
        state = await place.task.state(container, exec_id)
        if state.state == "stopped" and state.exit is None:
            try:
                state = attrs.evolve(state, exit=await place.task.wait(container, exec_id))
            except FailedPreconditionError:  # it was added and never started, and its container has ended
                state = attrs.evolve(state, state="created")
        return state

    async def state(self, request: v3.StateRequest, call: Call) -> v3.StateResponse:
        """What a process does now; never waits for one."""
        place = await self._place(call)
        state = await self._state(place, request.id, request.exec_id)
        streams = await place.streams.of(request.id, request.exec_id)
        bundle = streams.bundle or (await place.streams.of(request.id, "")).bundle
        return v3.StateResponse(
            id=request.id,
            bundle=bundle,
            pid=state.pid or 0,
            status=_STATES[state.state],
            stdin=streams.stdin,
            stdout=streams.stdout,
            stderr=streams.stderr,
            terminal=streams.terminal,
            exit_status=0 if state.exit is None else state.exit.code,
            exited_at=None if state.exit is None else moment(state.exit.exited_at),
            exec_id=request.exec_id,
        )

    async def wait(self, request: v3.WaitRequest, call: Call) -> v3.WaitResponse:
        """Wait for a process's end, also of one that is about to be started."""
        place = await self._place(call)
        state = await place.task.state(request.id, request.exec_id)
        if state.state == "created" and request.exec_id:
            await self._start_of(place, request.id, request.exec_id)
        exit: Exit = await place.task.wait(request.id, request.exec_id)
        return v3.WaitResponse(exit_status=exit.code, exited_at=moment(exit.exited_at))

    async def _start_of(self, place: Place, container: str, exec_id: str) -> None:
        """Wait until a process that was added has started, or never will."""
        starts = self._starts.setdefault((place.entry.sandbox_id, container, exec_id), anyio.Event())
        async with anyio.create_task_group() as group:

            async def end_of_container() -> None:
                with contextlib.suppress(NotFoundError):
                    await place.task.wait(container)
                group.cancel_scope.cancel()

            group.start_soon(end_of_container)
            await starts.wait()
            group.cancel_scope.cancel()

    async def pids(self, request: v3.PidsRequest, call: Call) -> v3.PidsResponse:
        """All its processes."""
        place = await self._place(call)
        return v3.PidsResponse(processes=[ProcessInfo(pid=pid) for pid in await place.task.pids(request.id)])

    async def stats(self, request: v3.StatsRequest, call: Call) -> v3.StatsResponse:
        """What it uses."""
        place = await self._place(call)
        unified = self._pods.core.host.cgroups.version == "v2"
        return v3.StatsResponse(stats=any_of(await place.task.stats(request.id), unified=unified))

    async def connect(self, request: v3.ConnectRequest, call: Call) -> v3.ConnectResponse:
        """Who we are, and its first process."""
        place = await self._place(call)
        state = await place.task.state(request.id)
        return v3.ConnectResponse(shim_pid=os.getpid(), task_pid=state.pid or 0, version=__version__)

    async def shutdown(self, request: v3.ShutdownRequest, call: Call) -> Empty:
        """Nothing: what a shim would do at its end is done with the pod."""
        await self._place(call)
        return Empty()

    # --- what is done to them ---

    async def kill(self, request: v3.KillRequest, call: Call) -> Empty:
        """Send a signal; NOT_FOUND for what has ended, as engines expect."""
        place = await self._place(call)
        if (await place.task.state(request.id, request.exec_id)).state == "stopped":
            raise NotFoundError("process already finished")
        signal = request.signal or _SIGKILL
        await place.task.kill(request.id, request.exec_id, signal=signal, all=request.all)
        return Empty()

    async def pause(self, request: v3.PauseRequest, call: Call) -> Empty:
        """Stop all its processes."""
        return await self._freeze(request, call, go_on=False)

    async def resume(self, request: v3.ResumeRequest, call: Call) -> Empty:
        """Let them go on."""
        return await self._freeze(request, call, go_on=True)

    async def _freeze(self, request: _Ids, call: Call, *, go_on: bool) -> Empty:
        place = await self._place(call)
        if not isinstance(place.task, SupportsPause):
            raise UnsupportedError("pause", place.entry.backend)
        await (place.task.resume if go_on else place.task.pause)(request.id)
        kind = events.TaskResumed if go_on else events.TaskPaused
        self._telling.tell(place, kind(container_id=request.id))
        return Empty()

    async def update(self, request: v3.UpdateTaskRequest, call: Call) -> Empty:
        """Change its limits; what is not said stays as it is."""
        place = await self._place(call)
        if not isinstance(place.task, SupportsUpdate):
            raise UnsupportedError("changing the limits of a container", place.entry.backend)
        if request.annotations:
            raise UnsupportedError("annotations of changed limits", "serve")
        if request.resources is None:
            raise InvalidArgumentError("an update needs resources")
        await place.task.state(request.id)  # what is gone has no bundle either, and that would be told in its place
        bundle = (await place.streams.of(request.id, "")).bundle
        text = changed_resources(request.resources.value, bundle)
        await place.task.update(request.id, text)
        return Empty()

    async def resize_pty(self, request: v3.ResizePtyRequest, call: Call) -> Empty:
        """Change a terminal's size."""
        place = await self._place(call)
        await place.task.resize_pty(request.id, request.exec_id, Terminal(request.height, request.width))
        return Empty()

    async def close_io(self, request: v3.CloseIoRequest, call: Call) -> Empty:
        """No more comes to its standard input."""
        place = await self._place(call)
        await place.task.close_io(request.id, request.exec_id)
        if request.stdin:
            await place.streams.close_stdin(request.id, request.exec_id)
            ends = self._terminals.get((place.entry.sandbox_id, request.id, request.exec_id))
            if ends is not None and ends.outside[0] >= 0:
                os.close(ends.outside[0])
                ends.outside[0] = -1
        return Empty()


def _check_options(options: AnyMessage | None, *, is_mapped: bool) -> None:
    """Refuse what would be ignored."""
    if options is None or (not options.type_url and not options.value):
        return
    if options.type_url.rpartition("/")[2] not in {"", _OPTIONS}:
        raise UnsupportedError(f"options of type {options.type_url!r}", "serve", hint=f"Use {_OPTIONS}.")
    given = codec.decode(Options, options.value)
    for name in _REFUSED_OPTIONS:
        if getattr(given, name):
            raise UnsupportedError(f"the runtime option {name}", "serve", hint="Leave it out of containerd's config.")
    if (given.io_uid or given.io_gid) and not is_mapped:  # with a user namespace they are what the process's user is
        raise UnsupportedError("the runtime options io_uid and io_gid without a user namespace", "serve")
