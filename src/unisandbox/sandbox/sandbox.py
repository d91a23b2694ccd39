"""The object that most users meet: one sandbox."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Final, Literal, Self

from typing_extensions import TypedDict, Unpack

from unisandbox.api import (
    Completed,
    Dns,
    InvalidArgumentError,
    Metrics,
    Mount,
    Network,
    ProcessSpec,
    Resources,
    Rootfs,
    SandboxSpec,
    SandboxStatus,
    Security,
    Terminal,
)
from unisandbox.api.checks import is_number
from unisandbox.engine.entry import Entry
from unisandbox.sandbox.containers import Container, Containers
from unisandbox.sandbox.files import Files
from unisandbox.sandbox.opening import Opening
from unisandbox.sandbox.process import Process
from unisandbox.sandbox.run import run

DEFAULT_MAX_OUTPUT: Final = 16 << 20
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


class SandboxOptions(TypedDict, total=False):
    """What `Sandbox.create` and `Engine.create` take; meanings and defaults are those of `SandboxSpec`."""

    rootfs: Rootfs | str | os.PathLike[str]
    isolation: str
    name: str | None
    resources: Resources
    network: Network | str
    mounts: Sequence[Mount]
    env: Mapping[str, str]
    cwd: str
    user: str | int | None
    userns: Literal["private", "host"]
    hostname: str | None
    sysctls: Mapping[str, str]
    dns: Dns | None
    hosts: Mapping[str, str]
    security: Security
    share_pid: bool
    ttl: float | None
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


def make_spec(
    *,
    rootfs: Rootfs | str | os.PathLike[str] = "host",
    network: Network | str = "none",
    mounts: Sequence[Mount] = (),
    isolation: str = "auto",
    name: str | None = None,
    resources: Resources | None = None,
    env: Mapping[str, str] = NOTHING,
    cwd: str = "/",
    user: str | int | None = None,
    userns: Literal["private", "host"] = "private",
    hostname: str | None = None,
    sysctls: Mapping[str, str] = NOTHING,
    dns: Dns | None = None,
    hosts: Mapping[str, str] = NOTHING,
    security: Security | None = None,
    share_pid: bool = False,
    ttl: float | None = None,
    labels: Mapping[str, str] = NOTHING,
    annotations: Mapping[str, str] = NOTHING,
    **unknown: object,
) -> SandboxSpec:
    """A checked spec from the options as users write them."""
    for option in unknown:
        known = ", ".join(SandboxOptions.__annotations__)
        raise TypeError(f"a sandbox has no option {option!r}; there are {known}")  # as Python does for any function
    return SandboxSpec(
        isolation=isolation,
        name=name,
        rootfs=Rootfs.parse(rootfs),
        resources=Resources() if resources is None else resources,
        network=Network.parse(network),
        mounts=mounts,
        env=env,
        cwd=cwd,
        user=user,
        userns=userns,
        hostname=hostname,
        sysctls=sysctls,
        dns=dns,
        hosts=hosts,
        security=Security() if security is None else security,
        share_pid=share_pid,
        ttl=ttl,
        labels=labels,
        annotations=annotations,
    )


class Sandbox:
    """An isolated environment: files, limits and a network of its own, in which programs run.

    Made by `Sandbox.create` or `Engine.create`, found by `Engine.get`. Handles are light: any number may speak of the
    same sandbox, from any task of the engine's event loop.

    Attributes:
        id: generated, never reused.
        name: the user's, or None.
        backend: who runs it.
        files: its files, also with nothing running.
        containers: more containers in it.
    """

    def __init__(self, entry: Entry) -> None:
        self.id: str = entry.sandbox_id
        self.name: str | None = entry.spec.name
        self.backend: str = entry.backend
        self.files: Files = Files(entry)
        self.containers: Containers = Containers(entry)
        self._entry = entry

    @classmethod
    def create(cls, **options: Unpack[SandboxOptions]) -> Opening[Sandbox]:
        """Create a sandbox in the event loop's own default engine, which is opened now if need be.

        `async with Sandbox.create() as sb` removes it at the end; `sb = await Sandbox.create()` leaves that to the
        caller, at the latest to the end of the event loop.

        Raises:
            InvalidArgumentError: an option is wrong.
            UnsupportedError: the backend cannot do what was asked; nothing was done.
            UnavailableError: no backend can run on this host; what is missing is said.

        Example:
            async with Sandbox.create(rootfs="host", resources=Resources(memory="256M")) as sb:
                print((await sb.run(["uname", "-a"])).text)
        """
        spec = make_spec(**options)

        async def open() -> Sandbox:
            from unisandbox.sandbox.default import default_core

            return cls(await (await default_core()).create(spec))

        return Opening("Sandbox.create()", open)

    def __repr__(self) -> str:
        name = f" name={self.name!r}" if self.name else ""
        return f"<Sandbox {self.id}{name} backend={self.backend}>"

    async def status(self) -> SandboxStatus:
        """The state at this moment; never waits for another call.

        Raises:
            NotFoundError: it was removed.
        """
        return await self._entry.status()

    async def metrics(self) -> Metrics:
        """What it uses now: memory, processor time, processes, disk.

        Raises:
            NotFoundError: it was removed.
        """
        return await self._entry.metrics()

    async def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] = NOTHING,
        user: str | int | None = None,
        timeout: float | None = None,
        check: bool = False,
        max_output: int = DEFAULT_MAX_OUTPUT,
    ) -> Completed:
        """Run a program to its end and collect what it writes.

        Returns when the program has ended and what it wrote was taken; what it left in the background goes on.

        Args:
            argv: the program and its arguments; a name without "/" is looked for in PATH.
            input: given to its standard input, which is empty otherwise.
            cwd: absolute directory inside.
            env: added to the sandbox's environment.
            user: name or number inside, optionally ":group".
            timeout: seconds; then it and everything that it started is killed.
            check: raise ProcessFailedError when it ends with another code than 0.
            max_output: bytes kept of each stream; more is read and thrown away, and `truncated` is set.

        Raises:
            InvalidArgumentError: the program cannot be started; `exit_code` is the shell's 127 or 126.
            FailedPreconditionError: there is no room for it now: a limit of processes or of memory is reached; or the
                sandbox is stopped or paused.
            DeadlineExceededError: the timeout has passed; `completed` has what there was so far.
            ProcessFailedError: see `check`; `completed` has everything.
        """
        return await run(
            self._entry,
            argv,
            input=input,
            cwd=cwd,
            env=env,
            user=user,
            timeout=timeout,
            check=check,
            max_output=max_output,
        )

    async def sh(
        self,
        script: str,
        *,
        input: bytes | str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] = NOTHING,
        user: str | int | None = None,
        timeout: float | None = None,
        check: bool = False,
        max_output: int = DEFAULT_MAX_OUTPUT,
    ) -> Completed:
        """Run a script of the sandbox's /bin/sh; otherwise as `run`."""
        return await self.run(
            ["/bin/sh", "-c", script],
            input=input,
            cwd=cwd,
            env=env,
            user=user,
            timeout=timeout,
            check=check,
            max_output=max_output,
        )

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: Literal["pipe", "null"] = "null",
        tty: bool | Terminal = False,
        cwd: str | None = None,
        env: Mapping[str, str] = NOTHING,
        user: str | int | None = None,
        operation_id: str | None = None,
    ) -> Opening[Process]:
        """Start a program and talk to it while it runs.

        Leaving the context ends it with all that it has started; `p = await sb.exec(...)` leaves it running.
        One that nobody waits for is kept, with its exit and its open pipes, for `processes()`; after `wait` its streams
        are closed when they are dropped, if not before.

        Args:
            argv, cwd, env, user: as for `run`.
            stdin: "pipe" to write to it, "null" for none.
            tty: a terminal instead of three streams, of 24 x 80 or the given size.
            operation_id: asked again under the same one, also by another process after a crash, the process that was
                started the first time is the answer.

        Example:
            async with sb.exec(["cat"], stdin="pipe") as p:
                await p.stdin.send(b"hello")
                await p.stdin.aclose()
                async for output in p:
                    print(output.text)
        """

        async def open() -> Process:
            return await Process.open(
                self._entry, argv, stdin=stdin, tty=tty, cwd=cwd, env=env, user=user, operation_id=operation_id
            )

        return Opening("Sandbox.exec()", open)

    async def processes(self) -> list[Process]:
        """The processes that `exec` has started and that have not been waited for to their end.

        Those of this process, and those whose own is gone (killed, say) while the sandbox was kept: these can be gone
        on with. Their streams begin with what was kept of their output meanwhile (the last 1 MiB of each). Those that
        another living process reads are left out. After another owner has taken the sandbox over those of this process
        come in new handles, with the streams of the former ones, which are closed.
        """
        return await Process.all_of(self._entry)

    async def launch(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] = NOTHING,
        user: str | int | None = None,
    ) -> Container:
        """Start a program that nobody has to wait for: it is the sandbox's own, and `run` and `exec` join it.

        The last of its output is kept (`Container.logs`). When it ends everything in its container ends.

        Args:
            argv, cwd, env, user: as for `run`.

        Raises:
            FailedPreconditionError: a launched program, or what `run` or `exec` has started, runs in the sandbox or was
                not waited for; or another process, which uses the same engine, may be about to start something in it.
        """
        pid = await self._entry.programs.launch(ProcessSpec(argv=argv, env=env, cwd=cwd, user=user))
        return Container(self._entry, self._entry.main, pid)

    async def pause(self) -> None:
        """Stop every process of the sandbox until `resume`; nothing can be started in it meanwhile. May be repeated.

        What is to end meanwhile ends: `Process.kill`, a timeout, `stop`, `remove`. Other signals arrive at the resume.

        Raises:
            FailedPreconditionError: nothing runs in it.
        """
        await self._entry.pause()

    async def resume(self) -> None:
        """Let its processes go on. May be repeated."""
        await self._entry.resume()

    async def start(self) -> None:
        """Make a stopped sandbox ready again, with its files; a ready one stays as it is."""
        await self._entry.start()

    async def stop(self, grace: float = 10.0) -> None:
        """End every process and keep the files: SIGTERM first, SIGKILL after `grace` seconds. May be repeated.

        With a grace period what is paused goes on, to have the use of it.
        """
        if not (is_number(grace) and grace >= 0):
            raise InvalidArgumentError(f"grace must be >= 0 seconds, got {grace!r}")
        await self._entry.stop(grace)

    async def kill(self) -> None:
        """End every process at once and keep the files. May be repeated."""
        await self._entry.kill()

    async def update(self, resources: Resources) -> None:
        """Change the limits while it runs; all of them or none.

        Raises:
            UnsupportedError: a limit cannot be changed in a living sandbox.
            FailedPreconditionError: more memory is in use; how much is said.
        """
        await self._entry.update(resources)

    async def remove(self) -> None:
        """End it and free everything; nothing of it is left on the host. May be repeated, also from two tasks."""
        await self._entry.remove()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        if self._entry.engine_open:
            await self._entry.remove()
