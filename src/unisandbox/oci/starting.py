"""How the containers of a sandbox, and the processes in them, come to run: through the runtime or through our init."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from typing import Final

import anyio
import attrs

from unisandbox.api import (
    BackendError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ProcessSpec,
    SandboxError,
    UnavailableError,
)
from unisandbox.host.cgroups import Cgroup
from unisandbox.host.init import ExecFailed, spawn
from unisandbox.host.keeper import Keeper
from unisandbox.host.pidfd import has_ended
from unisandbox.host.readiness import readable
from unisandbox.oci.answers import NO_ROOM_HINT
from unisandbox.oci.console import Console, listening
from unisandbox.oci.ledger import Ledger
from unisandbox.oci.made import Created
from unisandbox.oci.processes import Container, Process, birthplace, last_words, streams, streams_to_own
from unisandbox.oci.runtime import Runtime

START_SECONDS: Final = 30.0
"""How long a start may take."""

OWN_LEAVES: Final = frozenset({"init", "main"})
"""Names of our own cgroups in a container's, where those of its other processes have the name of the process."""

_DYING_SECONDS: Final = 0.1
_TOLD_SECONDS: Final = 1.0
# A shell's answers for a program that cannot be started. Source: POSIX, 2.8.2 Exit Status for Commands.
_NOT_FOUND: Final = 127
_NOT_EXECUTABLE: Final = 126


class Starter:
    """Starts what belongs to one sandbox.

    Args:
        label: of the sandbox, for messages.
        keeper: who sees the bundles.
        runtime: what makes containers.
        ledger: where it is written down before it runs.
    """

    def __init__(self, label: str, keeper: Keeper, runtime: Runtime, ledger: Ledger) -> None:
        self._label = label
        self._keeper = keeper
        self._runtime = runtime
        self._ledger = ledger

    async def create(self, container: Container, main: Process) -> None:
        """Let the runtime make a container, with our init or with the program of a bundle; verified."""
        plan = container.plan
        leaf = plan.cgroup.leaf("init")
        if container.with_init:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            container.control = ours
            # Init needs none of the three, and what a runtime gives away must be nobody else's.
            with theirs, last_words() as memory:
                container.created = await self._runtime.create(
                    plan.oci_id,
                    plan.bundle,
                    stdio=(memory, memory, memory),
                    extra_fds=(theirs.fileno(), *plan.extra_fds),
                    cgroup_procs=leaf.entry,
                    entered=plan.entered,
                    mounts=plan.mounts,
                    timeout=START_SECONDS,
                )
        else:
            main.cgroup = leaf
            with streams_to_own(main.stdio) as stdio, self._console(container, main) as console:
                container.created = await self._runtime.create(
                    plan.oci_id,
                    plan.bundle,
                    stdio=stdio,
                    cgroup_procs=leaf.entry,
                    console_socket=console.path if console is not None else None,
                    entered=plan.entered,
                    mounts=plan.mounts,
                    timeout=START_SECONDS,
                )
                if console is not None:
                    main.master = await console.master()
        await plan.verify(container.created.pid)

    @contextlib.contextmanager
    def _console(self, container: Container, process: Process) -> Iterator[Console | None]:
        if not process.terminal:
            yield None
            return
        with listening(self._keeper, container.plan.bundle) as console:
            yield console

    async def spawn(self, container: Container, process: Process) -> None:
        """Start a process through the init of a container of the SDK."""
        assert process.spec is not None  # noqa: S101 (a container of the SDK)
        if container.control is None:
            raise self._being_removed(container)
        request = await container.plan.request(process.spec)
        if process.exec_id == "":
            request = attrs.evolve(request, main=True)
        process.cgroup = await self._cgroup(container, process.exec_id or "main")
        if container.control is None:  # meanwhile
            raise self._being_removed(container)

        async def hold(life: int, pid: int, pidfd: int) -> None:
            facts = self._ledger.facts(container, process, pid, started=False)
            await self._ledger.process(facts, {"life": life, "pidfd": pidfd})

        try:
            with streams(process.stdio) as stdio, birthplace(process.cgroup, container.plan.admitted) as cgroup:
                started = await spawn(
                    container.control,
                    request,
                    None if request.tty is not None else stdio,
                    before_exec=lambda pid, pidfd: self._before_exec(container, process, pid, pidfd),
                    timeout=START_SECONDS,
                    hold_life=hold if self._ledger.kept else None,
                    cgroup=cgroup,
                )
        except UnavailableError:
            # Init's socket closes a moment before its death can be seen: who asks again shall see it.
            if container.created is not None:
                with anyio.move_on_after(_TOLD_SECONDS):
                    await readable(container.created.pidfd)
            raise
        except FileNotFoundError:  # its cgroup is gone again
            raise self._being_removed(container) from None
        except ExecFailed as error:
            raise self._not_started(container, process.spec, request.cwd, error) from error
        process.pid, process.pidfd, process.life = started.pid, started.pidfd, started.life
        process.master = started.master if started.master is not None else -1
        facts = self._ledger.facts(container, process, started.pid, started=True)
        await self._ledger.process(facts, {} if started.master is None else {"master": started.master})

    async def _cgroup(self, container: Container, name: str) -> Cgroup:
        try:
            return await _cgroup_for(container, name)
        except FileNotFoundError:  # whoever removes it was quicker
            raise self._being_removed(container) from None

    def _being_removed(self, container: Container) -> NotFoundError:
        return NotFoundError(f"container {container.name!r} of sandbox {self._label!r} is being removed")

    @staticmethod
    def _before_exec(container: Container, process: Process, pid: int, pidfd: int) -> None:
        if process.closed:
            raise NotFoundError(f"process {process.exec_id or 'main'} was removed while it started")
        try:
            process.enter(pid)
            if not container.verified:
                container.plan.verify_process(pid)
                container.verified = True
        except OSError as error:
            # One that is killed leaves its cgroup before its end can be seen. Source: do_exit() in kernel/exit.c.
            if has_ended(pidfd, wait=_DYING_SECONDS):
                return  # and `wait` will say by what
            raise BackendError(f"process {process.exec_id or 'main'} cannot enter its cgroup: {error}") from error

    async def exec(self, container: Container, process: Process) -> None:
        """Start a process in a bundle of somebody else, through the runtime."""
        bundle = container.plan.bundle
        request = process.oci_process
        if process.spec is not None:
            request = _process_json(self._keeper.outside(bundle), process.spec)
        await self._ledger.process(self._ledger.facts(container, process, 0, started=False))
        process.cgroup = await self._cgroup(container, process.exec_id)
        created: Created | None = None
        try:
            with streams_to_own(process.stdio) as stdio, self._console(container, process) as console:
                created = await self._runtime.exec(
                    container.plan.oci_id,
                    bundle,
                    request,
                    stdio=stdio,
                    exec_id=process.exec_id,
                    cgroup_procs=process.cgroup.entry,
                    console_socket=console.path if console is not None else None,
                    mounts=container.plan.mounts,
                    timeout=START_SECONDS,
                )
                if console is not None:
                    process.master = await console.master()
        except BaseException:
            # The runtime may have started it, and nobody will ever be told of it.
            process.cgroup.kill()
            if created is not None and created.pidfd >= 0:
                os.close(created.pidfd)
            raise
        process.pid, process.pidfd, process.start_time = created.pid, created.pidfd, created.start_time
        facts = self._ledger.facts(container, process, created.pid, started=True)
        held = {"pidfd": created.pidfd, "master": process.master}
        await self._ledger.process(facts, {name: fd for name, fd in held.items() if fd >= 0})

    def _not_started(self, container: Container, spec: ProcessSpec, cwd: str, error: ExecFailed) -> SandboxError:
        program = spec.argv[0]
        where = f"in sandbox {self._label!r}"
        if error.errno in {errno.EAGAIN, errno.ENOMEM}:  # nothing that was asked for is wrong
            return FailedPreconditionError(
                f"cannot start {program!r} {where}: {error.step}: {os.strerror(error.errno)}",
                hint=NO_ROOM_HINT if error.errno == errno.EAGAIN else "Its limit of memory, or the host's, is reached.",
            )
        if error.step == "cwd":
            return InvalidArgumentError(
                f"cannot start {program!r} {where}: working directory {cwd!r}: {os.strerror(error.errno)}",
                exit_code=_NOT_EXECUTABLE,
            )
        if error.step == "exec" and error.errno == errno.ENOENT:
            return InvalidArgumentError(
                f"cannot start {program!r} {where}: no such program, or its interpreter is missing",
                hint=container.plan.explain(spec),
                exit_code=_NOT_FOUND,
            )
        return InvalidArgumentError(
            f"cannot start {program!r} {where}: {error.step}: {os.strerror(error.errno)}",
            hint="The program's arguments and environment are too large." if error.errno == errno.E2BIG else "",
            exit_code=_NOT_EXECUTABLE,
        )


async def _cgroup_for(container: Container, name: str) -> Cgroup:
    """A cgroup for a process that is to be started."""
    try:
        return container.plan.cgroup.child(name, for_process=True)
    except FileExistsError:
        # A start that was cut has left it. Ids are not used twice, so nobody has to be ended; who is in there is
        # about to be gone.
        stale = container.plan.cgroup.find(name)
        with anyio.move_on_after(_TOLD_SECONDS):
            while not stale.remove():
                await anyio.sleep(0.001)
        return container.plan.cgroup.child(name, for_process=True)


def is_with_terminal(oci_process: str) -> bool:
    """Whether an OCI process object wants a terminal. Raises InvalidArgumentError when it is none."""
    try:
        process = json.loads(oci_process)
        if isinstance(process["args"], list) and process["args"]:
            return process.get("terminal") is True
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise InvalidArgumentError(f"this is no OCI process object: {oci_process!r:.80}")


def _process_json(bundle: str, spec: ProcessSpec) -> str:
    """The OCI process object for an exec: that of the container with another program."""
    try:
        with open(os.path.join(bundle, "config.json"), "rb") as file:
            process = json.load(file)["process"]
    except (OSError, ValueError, KeyError) as error:
        raise BackendError(f"the bundle {bundle} has no readable config.json: {error}") from error
    if spec.user is not None:
        uid, _, gid = spec.user.partition(":")
        if not uid.isdecimal() or not (gid or "0").isdecimal():
            raise InvalidArgumentError(f"user {spec.user!r}: exec in a bundle takes numbers only")
        process["user"] = {"uid": int(uid), "gid": int(gid or 0)}
    process["args"] = list(spec.argv)
    process["env"] = [*process.get("env", []), *(f"{name}={value}" for name, value in spec.env.items())]
    process["cwd"] = spec.cwd or process.get("cwd", "/")
    process["terminal"] = False
    return json.dumps(process)
