"""The task service: one container per sandbox, whose first process only reaps, and the processes beside it.

Each process is the keeper's child and in a cgroup of its own. So its exit is exact, whoever is there to see it: the
keeper knows it by pid and start time, and the cgroup tells whether the kernel killed it for memory. What
another process needs to go on (after a crash, say) is in the keeper's notes; no file is needed, since without the
keeper nothing of a sandbox lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal as signals
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import (
    AlreadyExistsError,
    BackendError,
    CreateTask,
    ExecTask,
    Exit,
    FailedPreconditionError,
    InvalidArgumentError,
    Metrics,
    NotFoundError,
    ProcessSpec,
    SandboxSpec,
    StartedTask,
    Stdio,
    TaskState,
    Terminal,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.api.names import CAPABILITIES
from unisandbox.host import pidfd as pidfds
from unisandbox.host.cgroups import Cgroup
from unisandbox.host.keeper import Keeper, SpawnFailed
from unisandbox_unshare.root import PATH, user_of

_LAUNCHER: Final = str(Path(__file__).with_name("launcher.py"))
_START_SECONDS: Final = 30.0
_END_SECONDS: Final = 10.0
_TOLD_SECONDS: Final = 1.0
# The kernel takes a sandbox's programs before the process that holds it together.
_INIT_OOM_SCORE: Final = 100
_OOM_SCORE: Final = 500
_INIT: Final = "init"


@attrs.define
class _Process:
    """One that was asked for. Without a pidfd it has not been started, or has ended before it was found."""

    spec: ProcessSpec | None
    stdio: list[int] = attrs.field(factory=list)
    cgroup: Cgroup | None = None
    pid: int = 0
    start_time: int = 0
    pidfd: int = -1
    killed_by_us: bool = False
    exit: Exit | None = None

    def ended(self) -> bool:
        """Whether it is dead; a look."""
        if self.exit is not None or self.pidfd < 0:
            return self.pid > 0
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        for fd in (*self.stdio, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.stdio, self.pidfd = [], -1


@attrs.define
class _Container:
    name: str
    init: _Process
    processes: dict[str, _Process] = attrs.field(factory=dict)
    # Cgroups in which the background work of ended processes goes on, with their kills for memory.
    left: dict[Cgroup, int] = attrs.field(factory=dict)


class UnshareTasks:
    """See `TaskService`.

    Args:
        label, spec, cgroup: of the sandbox.
        keeper: who starts, reaps and remembers.
        prefix: of everything that the keeper holds for the sandbox.
        root: path of its root in the mount namespace that the keeper holds.
    """

    def __init__(
        self, label: str, spec: SandboxSpec, cgroup: Cgroup, keeper: Keeper, *, prefix: str, root: str
    ) -> None:
        self._label, self._spec, self._cgroup, self._keeper = label, spec, cgroup, keeper
        self._prefix, self._root = prefix, root
        self._container: _Container | None = None
        self._exits: dict[tuple[str, str], Exit] = {}
        self._oom_kills_gone = 0

    @property
    def container_ids(self) -> list[str]:
        """The container, if there is one."""
        return [self._container.name] if self._container is not None else []

    # --- beginning ---

    async def create(self, request: CreateTask) -> None:
        """See `TaskService.create`: starts the process that holds the pid namespace."""
        container = request.container
        if container is None:
            raise UnsupportedError("bundle", "unshare", hint="Give a ContainerSpec.")
        if self._container is not None:
            if self._container.name == container.name:
                raise AlreadyExistsError(f"sandbox {self._label!r} has a container {container.name!r} already")
            raise UnsupportedError("containers", "unshare", reason="a sandbox has one container")
        if container.rootfs is not None or container.resources is not None or container.mounts:
            raise UnsupportedError("rootfs, resources or mounts of a container", "unshare")
        fields = {"env": {**container.env}, "cwd": container.cwd, "user": container.user}
        init = _Process(ProcessSpec(["/bin/sleep", "infinity"], cwd="/", user="root"))
        self._container = _Container(container.name, init)
        if container.process is not None:
            spec = _with_defaults(container.process, **fields)  # type: ignore[arg-type]
            self._container.processes[""] = _Process(spec, _copies(request.stdio))
        self._exits.pop((container.name, ""), None)
        try:
            init.cgroup = self._cgroup.child(_INIT, for_process=True)
            kinds = ("user", "net", "ipc", "uts")
            fds = [await self._keeper.take(f"{self._prefix}{kind}") for kind in kinds]
            try:
                await self._launch(_INIT, init, fds, {"root": self._root, "namespaces": len(fds), "reap": True})
            finally:
                for fd in fds:
                    os.close(fd)
            facts = {"name": container.name, "main": container.process is not None, **_facts(init)}
            await self._keeper.notes.write(f"{self._prefix}container", json.dumps(facts))
        except BaseException as error:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_END_SECONDS):
                await self.delete(container.name)
            if isinstance(error, OSError):
                raise BackendError(f"sandbox {self._label!r} cannot start anything: {error.strerror}") from error
            raise

    async def exec(self, request: ExecTask) -> None:
        """See `TaskService.exec`."""
        container = self._get(request.container_id)
        process = request.given("unshare")
        if process.terminal is not None:
            raise UnsupportedError("tty", "unshare", hint="Leave tty= out.")
        if request.exec_id in container.processes:
            raise AlreadyExistsError(f"container {container.name!r} has a process {request.exec_id!r} already")
        self._sweep(container)
        container.processes[request.exec_id] = _Process(process, _copies(request.stdio))
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def start(self, container_id: str, exec_id: str = "") -> StartedTask:
        """See `TaskService.start`."""
        container = self._get(container_id)
        if not exec_id and "" not in container.processes:
            await anyio.lowlevel.checkpoint()
            return StartedTask(container.init.pid)  # it only takes `exec`
        process = self._process(container, exec_id)
        if process.pid or process.spec is None:
            raise FailedPreconditionError(f"process {exec_id or 'main'} of {container_id!r} was started before")
        try:
            process.cgroup = self._cgroup.child(f"p-{exec_id}", for_process=True)
            await self._launch(exec_id, process, [container.init.pidfd], {"root": ""})
        except OSError as error:
            raise BackendError(f"sandbox {self._label!r} cannot start a process: {error.strerror}") from error
        await self._keeper.notes.write(self._note(exec_id), json.dumps({"started": True, **_facts(process)}))
        return StartedTask(process.pid)

    async def _launch(self, exec_id: str, process: _Process, fds: Sequence[int], how: Mapping[str, object]) -> None:
        """Start a process in its cgroup, make sure that it is where it should be, and let it go."""
        assert process.spec is not None and process.cgroup is not None  # noqa: PT018 (set by both callers)
        request = json.dumps({**how, **_request(self._spec, process.spec, init=exec_id == _INIT)})
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("request", os.MFD_CLOEXEC)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        with ours, anyio.move_on_after(_START_SECONDS):
            try:
                os.write(memory, request.encode())
                stdio = [fd if fd >= 0 else null for fd in process.stdio or [-1, -1, -1]]
                spawned = await self._keeper.spawn(
                    f"{self._prefix}{exec_id}/{time.monotonic_ns()}",
                    [sys.executable, "-I", "-S", _LAUNCHER],
                    env={},
                    cgroup_procs=process.cgroup.entry,
                    mounts=f"{self._prefix}mnt",
                    fds=[*stdio, theirs.fileno(), memory, *fds],
                )
            except SpawnFailed as error:
                raise BackendError(f"sandbox {self._label!r} cannot start a process: {error.strerror}") from error
            finally:
                for fd in (memory, null, theirs.detach()):
                    os.close(fd)
            ours.setblocking(False)
            try:
                said = [await self._hear(ours, process), await self._hear(ours, process)]
                # Who forked it is gone: now it is the keeper's child, which will know how it ends.
                await anyio.wait_readable(spawned.pidfd)
            finally:
                os.close(spawned.pidfd)
            process.pid = next(int(str(word["pid"])) for word in said if word["step"] == "forked")
            try:
                process.pidfd = os.pidfd_open(process.pid)
                process.start_time = pidfds.start_time(process.pid)
                if not process.cgroup.holds(process.pid):
                    raise BackendError(f"a process of sandbox {self._label!r} is not in its cgroup")
            except ProcessLookupError as error:
                raise self._died(process) from error
            if exec_id != _INIT:
                await self._keeper.notes.write(self._note(exec_id), json.dumps({"started": False, **_facts(process)}))
            ours.send(b"go")
            for fd in process.stdio:
                if fd >= 0:
                    os.close(fd)
            process.stdio = []
            with contextlib.suppress(EOFError):  # that is what success looks like
                await self._hear(ours, process, end_is_success=True)
            return
        process.cgroup.kill()
        raise BackendError(f"a process of sandbox {self._label!r} did not start within {_START_SECONDS:g} s")

    async def _hear(
        self, sock: socket.socket, process: _Process, *, end_is_success: bool = False
    ) -> Mapping[str, object]:
        await anyio.wait_readable(sock)
        try:
            data = sock.recv(65536)
        except ConnectionResetError:  # it has died with our word unread
            data = b""
        if not data:
            if end_is_success:
                raise EOFError
            raise self._died(process)
        word: dict[str, object] = json.loads(data)
        if "errno" not in word:
            return word
        assert process.spec is not None  # it is being started
        process.pid, number = 0, int(str(word["errno"]))
        if word["step"] == "enter":
            text = f"a process cannot enter sandbox {self._label!r}: {word['text']}"
            if number in {errno.ESRCH, errno.ENOMEM} and await self._init_has_ended():
                raise UnavailableError(text)  # the engine makes a new container, and tries once more
            raise BackendError(text)
        program = f"cannot start {process.spec.argv[0]!r} in sandbox {self._label!r}"
        if word["step"] == "cwd":
            why = f"working directory {process.spec.cwd or self._spec.cwd!r}: {os.strerror(number)}"
            raise InvalidArgumentError(f"{program}: {why}", exit_code=126)
        code = 127 if number == errno.ENOENT else 126  # as a shell says it
        raise InvalidArgumentError(f"{program}: {os.strerror(number)}", exit_code=code)

    async def _init_has_ended(self) -> bool:
        """Whether the first process is dead. Its namespaces go a moment before that can be seen."""
        init = self._container.init if self._container is not None else None
        with anyio.move_on_after(_TOLD_SECONDS):
            while init is not None and init.pid and not init.ended():
                await anyio.sleep(0.001)
        return init is not None and init.ended()

    def _died(self, process: _Process) -> BackendError:
        if process.cgroup is not None:
            process.cgroup.kill()
        return BackendError(
            f"a process of sandbox {self._label!r} died before it could start",
            hint="Is a limit of the sandbox (memory, pids) too small?",
        )

    # --- going on ---

    async def restore(self, *, exclusive: bool) -> None:
        """Take over what other processes have started here, by the keeper's notes."""
        notes = await self._keeper.notes.read(self._prefix)
        facts = json.loads(notes.get(f"{self._prefix}container", "null"))
        known = self._container
        if known is not None and (facts is None or facts["start_time"] != known.init.start_time):
            if facts is None and not exclusive:
                return  # this process is making it
            self.forget()
        if facts is None:
            if exclusive and _INIT in self._cgroup.children():
                self._cgroup.kill()  # its creation was cut
                with contextlib.suppress(FileNotFoundError):
                    self._cgroup.find(_INIT).remove(timeout=_END_SECONDS)
            return
        if self._container is None:
            self._container = _Container(facts["name"], self._found(_INIT, facts))
            if facts["main"]:
                self._container.processes[""] = _Process(None)
        for name, text in notes.items():
            exec_id = name.removeprefix(f"{self._prefix}p/")
            if name == exec_id or (exec_id in self._container.processes and self._container.processes[exec_id].pid):
                continue
            told = json.loads(text)
            if told["started"]:  # else somebody is starting it; without him it ends by itself
                self._container.processes[exec_id] = self._found(f"p-{exec_id}", told)

    def _found(self, leaf: str, facts: Mapping[str, int]) -> _Process:
        process = _Process(None, pid=facts["pid"], start_time=facts["start_time"])
        process.killed_by_us = bool(facts["killed_by_us"])
        with contextlib.suppress(FileNotFoundError):
            process.cgroup = self._cgroup.find(leaf)
        with contextlib.suppress(ProcessLookupError):  # it has ended; the keeper knows how
            process.pidfd = pidfds.open_verified(process.pid, process.start_time)
        return process

    def forget(self) -> None:
        """Close what this process holds; ends nothing."""
        container, self._container = self._container, None
        for exec_id, process in (container.processes if container else {}).items():
            if container is not None and process.exit is not None:
                self._exits[container.name, exec_id] = process.exit
            process.close()
        if container is not None:
            container.init.close()

    async def state(self, container_id: str, exec_id: str = "") -> TaskState:
        """See `TaskService.state`."""
        container = self._get(container_id)
        process = container.processes.get("", container.init) if not exec_id else self._process(container, exec_id)
        await anyio.lowlevel.checkpoint_if_cancelled()
        if process.ended() or container.init.ended():
            return TaskState(container_id, exec_id, "stopped", None, process.exit)
        state: Literal["running", "created"] = "running" if process.pid else "created"
        return TaskState(container_id, exec_id, state, process.pid or None)

    async def pids(self, container_id: str) -> Sequence[int]:
        """See `TaskService.pids`."""
        first = self._get(container_id).init.pid
        await anyio.lowlevel.checkpoint_if_cancelled()
        return [pid for pid in self._cgroup.pids() if pid != first]

    async def stats(self, container_id: str) -> Metrics:
        """See `TaskService.stats`."""
        self._get(container_id)
        await anyio.lowlevel.checkpoint_if_cancelled()
        return self.metrics()

    def metrics(self) -> Metrics:
        """What the sandbox uses now."""
        names = [field.name for field in attrs.fields(Metrics)]
        stats = {name: value for name, value in self._cgroup.stats()._asdict().items() if name in names}
        return Metrics(**{**stats, "oom_kills": self.oom_kills()})

    def oom_kills(self) -> int:
        """Each cgroup counts only its own."""
        container = self._container
        if container is None:
            return self._oom_kills_gone
        living = sum(_oom_kills(process.cgroup) for process in (container.init, *container.processes.values()))
        return self._oom_kills_gone + living + sum(max(n, _oom_kills(cgroup)) for cgroup, n in container.left.items())

    async def resize_pty(self, container_id: str, exec_id: str, size: Terminal) -> None:
        """No process has a terminal."""
        self._process(self._get(container_id), exec_id)
        raise UnsupportedError("tty", "unshare")

    async def close_io(self, container_id: str, exec_id: str = "") -> None:
        """There is nothing to close: a process gets our copies when it starts."""
        self._get(container_id)
        await anyio.lowlevel.checkpoint()

    # --- ending ---

    def running(self) -> list[str]:
        """The exec ids of the processes that run."""
        processes = self._container.processes if self._container is not None else {}
        return [exec_id for exec_id, process in processes.items() if process.pid and not process.ended()]

    async def kill(self, container_id: str, exec_id: str = "", *, signal: int = 9, all: bool = False) -> None:
        """See `TaskService.kill`."""
        process = self._process(self._get(container_id), exec_id)
        if not 0 < signal < signals.NSIG:
            raise InvalidArgumentError(f"signal must be 1 to {signals.NSIG - 1}, got {signal}")
        if signal == signals.SIGKILL:
            self._mark(exec_id, process)
        if signal == signals.SIGKILL and all:
            self.kill_now(container_id, exec_id)
        elif process.pidfd >= 0:
            members = process.cgroup.pids() if all and process.cgroup is not None else ()
            for pid in members:
                _signal_member(process.cgroup, pid, signal)
            if not members:
                pidfds.send_signal(process.pidfd, signal)
        await anyio.lowlevel.checkpoint()

    def kill_now(self, container_id: str, exec_id: str = "") -> None:
        """See `TaskService.kill_now`."""
        container = self._container
        if container is None or container.name != container_id:
            return
        for name, process in container.processes.items():
            if exec_id in {"", name} and process.exit is None:
                self._mark(name, process)
                if process.cgroup is not None:
                    process.cgroup.kill()
        if not exec_id:
            for cgroup in container.left:
                cgroup.kill()

    def _mark(self, exec_id: str, process: _Process) -> None:
        """It gets a SIGKILL from us, which is no end for want of memory; who asks later shall know."""
        if process.pid and not process.killed_by_us and not process.ended():
            process.killed_by_us = True
            self._keeper.notes.write_now(self._note(exec_id), json.dumps({"started": True, **_facts(process)}))
        process.killed_by_us = True

    async def wait(self, container_id: str, exec_id: str = "") -> Exit:
        """See `TaskService.wait`: the keeper is the parent, and knows."""
        gone = self._exits.get((container_id, exec_id))
        if gone is not None:
            await anyio.lowlevel.checkpoint()
            return gone
        process = self._process(self._get(container_id), exec_id)
        if process.exit is not None:
            await anyio.lowlevel.checkpoint()
            return process.exit
        if not process.pid:
            raise FailedPreconditionError(f"process {exec_id or 'main'} of {container_id!r} has not been started")
        try:
            record = await self._keeper.wait_exit(process.pid, process.start_time)
        except ProcessLookupError:
            process.exit = process.exit or Exit.lost(exited_at=time.time())
        else:
            process.exit = process.exit or Exit.from_wait_status(
                record.status,
                exited_at=record.at,
                oom_kills=_oom_kills(process.cgroup),
                killed_by_us=process.killed_by_us,
            )
        return process.exit

    async def delete(self, container_id: str, exec_id: str = "") -> Exit | None:
        """See `TaskService.delete`."""
        container = self._container
        if container is None or container.name != container_id:
            await anyio.lowlevel.checkpoint()
            return self._exits.pop((container_id, exec_id), None)
        if not exec_id:
            return await self._delete_all(container)
        process = container.processes.get(exec_id)
        if process is None:
            await anyio.lowlevel.checkpoint()
            return None
        if process.pid and process.exit is None:
            await self.wait(container_id, exec_id)
        container.processes.pop(exec_id, None)
        self._keeper.drop_now([self._note(exec_id)])
        process.close()
        if process.cgroup is not None:
            container.left[process.cgroup] = 0
        self._sweep(container)
        return process.exit

    def _sweep(self, container: _Container) -> None:
        """Remove the cgroups in which nothing runs any more."""
        for cgroup in list(container.left):
            container.left[cgroup] = max(container.left[cgroup], _oom_kills(cgroup))
            if cgroup.remove():
                self._oom_kills_gone += container.left.pop(cgroup)

    async def _delete_all(self, container: _Container) -> Exit | None:
        self.kill_now(container.name)
        if container.init.cgroup is not None:
            container.init.cgroup.kill()  # and with it the pid namespace
        with anyio.move_on_after(_END_SECONDS):
            for exec_id, process in list(container.processes.items()):
                if process.pid and process.exit is None:
                    await self.wait(container.name, exec_id)
            if container.init.pid:
                with contextlib.suppress(ProcessLookupError):
                    await self._keeper.wait_exit(container.init.pid, container.init.start_time)
        self._oom_kills_gone = self.oom_kills()
        container.left.clear()
        for exec_id, process in container.processes.items():
            process.cgroup = None
            if process.pid:
                self._exits[container.name, exec_id] = process.exit or Exit.lost(exited_at=time.time())
        with anyio.move_on_after(_END_SECONDS):
            while not all(_removed(self._cgroup, name) for name in self._cgroup.children()):
                await anyio.sleep(0.001)  # the kernel frees the last process a moment after its end
        main = container.processes.get("")
        self._keeper.drop_now([f"{self._prefix}container"], prefix=f"{self._prefix}p/")
        if self._container is container:
            self.forget()
        return main.exit if main is not None else None

    def _note(self, exec_id: str) -> str:
        return f"{self._prefix}p/{exec_id}"

    def _get(self, container_id: str) -> _Container:
        if self._container is None or self._container.name != container_id:
            raise NotFoundError(f"sandbox {self._label!r} has no container {container_id!r}")
        return self._container

    def _process(self, container: _Container, exec_id: str) -> _Process:
        process = container.processes.get(exec_id)
        if process is None:
            raise NotFoundError(f"container {container.name!r} of sandbox {self._label!r} has no process {exec_id!r}")
        return process


def _facts(process: _Process) -> dict[str, object]:
    return {"pid": process.pid, "start_time": process.start_time, "killed_by_us": process.killed_by_us}


def _with_defaults(spec: ProcessSpec, env: dict[str, str], cwd: str, user: str | None) -> ProcessSpec:
    cwd = spec.cwd or ("" if cwd == "/" else cwd)
    return attrs.evolve(spec, env={**env, **spec.env}, cwd=cwd or None, user=spec.user or user)


def _request(sandbox: SandboxSpec, spec: ProcessSpec, *, init: bool) -> dict[str, object]:
    """What the launcher makes of itself."""
    uid, gid, home = user_of(spec.user or sandbox.user)
    limits = {"RLIMIT_NOFILE": sandbox.resources.nofile, "RLIMIT_CORE": sandbox.resources.core}
    kept = frozenset() if init else sandbox.security.capabilities
    return {
        "argv": spec.argv,
        "env": {"PATH": PATH, "LANG": "C.UTF-8", "HOME": home, **({} if init else sandbox.env), **spec.env},
        "cwd": spec.cwd or sandbox.cwd,
        "uid": uid,
        "gid": gid,
        "rlimits": {name: limit for name, limit in limits.items() if limit is not None and not init},
        "capabilities": [number for number, name in enumerate(CAPABILITIES) if name in kept],
        "no_new_privileges": init or sandbox.security.no_new_privileges,
        "oom_score_adj": _INIT_OOM_SCORE if init else _OOM_SCORE,
    }


def _copies(stdio: Stdio) -> list[int]:
    """Our own; -1 for none."""
    given = (stdio.stdin, stdio.stdout, stdio.stderr)
    return [-1 if fd is None else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0) for fd in given]


def _oom_kills(cgroup: Cgroup | None) -> int:
    with contextlib.suppress(FileNotFoundError):  # it is gone
        return cgroup.oom_kills() if cgroup is not None else 0
    return 0


def _removed(cgroup: Cgroup, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):  # another one was quicker
        return cgroup.find(name).remove()
    return True


def _signal_member(cgroup: Cgroup | None, pid: int, number: int) -> None:
    """Signal a process if it still is in the cgroup: its number may be another's by now."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if cgroup is not None and cgroup.holds(pid):
                signals.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)
