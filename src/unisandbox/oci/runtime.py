"""The driver of an OCI runtime's command line: crun, runc, youki.

Every call is a child of the keeper with a deadline. `start` of a tested runtime and `delete` of a stopped crun
container need no call at all. Source: runtime-spec, runtime.md; crun.1.md; runc man pages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api.errors import (
    AlreadyExistsError,
    BackendError,
    DeadlineExceededError,
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from unisandbox.api.names import check_name
from unisandbox.host.boundary import reached
from unisandbox.host.pidfd import has_ended
from unisandbox.host.sealed import sealed_copy
from unisandbox.oci import fifo
from unisandbox.oci.answers import failure, read_log, why
from unisandbox.oci.calls import NOWHERE, Call, Spawner, nsenter, run
from unisandbox.oci.features import RuntimeProgram, keyring_arguments
from unisandbox.oci.made import Created, enter, identify
from unisandbox.oci.own_cgroups import OwnCgroups
from unisandbox.oci.states import RuntimeFiles

DEFAULT_TIMEOUT: Final = 30.0
# For cleaning up after a call that failed or was cancelled.
_CLEANUP_SECONDS: Final = 10.0
_STATE_BYTES: Final = 1 << 20
_BUNDLE_LOG: Final = "runtime.log"


class ContainerState(NamedTuple):
    """What the runtime says about a container: "creating", "created", "running", "stopped" or "paused"."""

    container_id: str
    status: str
    pid: int
    bundle: str


@attrs.define(eq=False, repr=False)
class _Prepared:
    executable: str = ""


@attrs.frozen(eq=False, repr=False)
class Runtime:
    """An installed runtime with a state directory of ours.

    Attributes:
        program: which one.
        root: absolute; made when missing. The containers' states and short-lived logs live below it. As the keeper
            sees it: it may lie in the keeper's private mounts, as bundles may.
        keeper: the parent of every call.
    """

    program: RuntimeProgram
    root: str
    keeper: Spawner
    _prepared: _Prepared = attrs.field(factory=_Prepared, init=False, eq=False, repr=False)
    _own_cgroups: OwnCgroups = attrs.field(init=False, eq=False, repr=False)

    @_own_cgroups.default
    def _default_own_cgroups(self) -> OwnCgroups:
        return OwnCgroups(self.keeper, are_made=not self.program.features.cgroup_disabled)

    async def create(
        self,
        container_id: str,
        bundle: str,
        *,
        stdio: tuple[int, int, int],
        extra_fds: Sequence[int] = (),
        cgroup_procs: Sequence[str] = (),
        console_socket: str | None = None,
        entered: Mapping[str, str] = NOWHERE,
        mounts: str = "",
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Created:
        """Make a container; its init waits for `start`. When this raises, nothing of it is left.

        Args:
            container_id: not in use with this root.
            bundle: absolute; its log `runtime.log` is written into it.
            stdio: become fds 0-2 of the container's first process as they are.
            extra_fds: become its fds 3, 4 ...
            cgroup_procs: the `cgroup.procs` files of the container's cgroup. crun's container is born there. runc
                insists on a cgroup of its own (leave `cgroupsPath` out: it is made below the keeper's), from which its
                waiting init is moved here before this returns: that leaf is empty then, and `delete` removes it.
            console_socket: path of a listening unix socket that gets the terminal's master (`terminal: true`).
            entered: paths of namespaces ("net", "ipc", "uts") to enter first, for a config without them, by a runtime
                that cannot join them (`Features.foreign_netns`, `Features.held_userns`).
            mounts: name of the mount namespace, held by the keeper, in which the root file system is mounted; empty:
                the keeper's own.
            timeout: seconds.

        Raises:
            AlreadyExistsError: the id is in use.
            InvalidArgumentError: the program cannot be started (`exit_code` 127 or 126).
            BackendError: the runtime failed; carries its log.
            DeadlineExceededError, UnavailableError: see `calls.run`.
        """
        check_name(container_id, "container id")
        self._check_fds(extra_fds)
        if self._files.exists(container_id):
            raise AlreadyExistsError(f"{self.program.name} has a container {container_id!r} already")
        pid_file = f"{bundle}/{os.urandom(8).hex()}.pid"
        log = f"{bundle}/{_BUNDLE_LOG}"
        arguments = ["--bundle", bundle, "--pid-file", pid_file, *keyring_arguments(self.program)]
        if extra_fds:
            arguments += ["--preserve-fds", str(len(extra_fds))]
        if console_socket is not None:
            arguments += ["--console-socket", console_socket]
        self._files.unlink(log)  # what an earlier attempt said (youki would write over its beginning)
        try:
            call = await self._call(
                "create",
                container_id,
                [*arguments, container_id],
                log=log,
                fds=(*stdio, *extra_fds),
                cgroup_procs=cgroup_procs,
                entered=entered,
                mounts=mounts,
                timeout=timeout,
            )
            reached("before runtime.create", container_id)
            code = await run(self.keeper, call)
            if code != 0:
                raise failure(call.label, code, read_log(call.log), starts_program=True)
            reached("after runtime.create", container_id)
            created = await identify(self._files, call, pid_file, bundle)
            if not self.program.features.cgroup_disabled:
                enter(call, created, cgroup_procs)
            return created
        except BaseException:
            await self._scrap(container_id)
            raise
        finally:
            self._files.unlink_pid_file(pid_file)

    async def start(
        self, container_id: str, *, created: Created | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Let a created container execute its program.

        With `created` by the exec FIFO where the runtime is a tested one, otherwise by its `start`. When this raises
        or is cancelled, the container may or may not have been started: delete it.

        Raises:
            NotFoundError: no such container.
            FailedPreconditionError: it was started before.
            BackendError: its init ended before; carries the runtime's log.
            DeadlineExceededError: it did not come to the point of starting in time.
        """
        self._check_exists(container_id)
        if created is None or not self.program.features.fifo or self._files.has_hooks(created.bundle, "poststart"):
            await self._command_start(container_id, created, timeout)
            return
        path = f"{self._files.state_dir(container_id)}/exec.fifo"
        reached("before runtime.start", container_id)
        try:
            with anyio.fail_after(timeout):
                await fifo.release(path, self.program.features.fifo, created.pidfd)
        except TimeoutError:
            raise DeadlineExceededError(
                f"container {container_id!r} was not ready to start within {timeout:g} s"
            ) from None
        except FileNotFoundError:
            raise FailedPreconditionError(f"container {container_id!r} was started before") from None
        except fifo.InitEnded:
            raise self._ended_early(container_id, created) from None
        except OSError as error:
            raise BackendError(f"container {container_id!r} cannot be started: {error}") from error
        reached("after runtime.start", container_id)

    async def exec(
        self,
        container_id: str,
        bundle: str,
        process: str | bytes | Mapping[str, object],
        *,
        stdio: tuple[int, int, int],
        exec_id: str = "",
        extra_fds: Sequence[int] = (),
        cgroup_procs: Sequence[str] = (),
        console_socket: str | None = None,
        entered: Mapping[str, str] = NOWHERE,
        mounts: str = "",
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Created:
        """Start another process in a running container; detached, so that "not found" is no exit code.

        Args:
            container_id: of a started container.
            bundle: where the request and the log are written; files of this call are removed again.
            process: the OCI process object, or its JSON text.
            exec_id: for messages.
            stdio, extra_fds, cgroup_procs, console_socket, entered, mounts, timeout: see `create`.

        Raises:
            InvalidArgumentError: the program cannot be started (`exit_code` 127: not found, 126: not executable).
            NotFoundError: no such container.
            FailedPreconditionError: it is not running.
            BackendError, DeadlineExceededError, UnavailableError: see `create`.
        """
        self._check_exists(container_id)
        self._check_fds(extra_fds)
        base = f"{bundle}/exec-{os.urandom(8).hex()}"
        pid_file, request, log = f"{base}.pid", f"{base}.json", f"{base}.log"
        arguments = ["--detach", "--pid-file", pid_file, "--process", request]
        if extra_fds:
            arguments += ["--preserve-fds", str(len(extra_fds))]
        if console_socket is not None:
            arguments += ["--console-socket", console_socket]
        try:
            self._files.write(request, json.dumps(process) if isinstance(process, Mapping) else process)
            call = await self._call(
                "exec",
                container_id,
                [*arguments, container_id],
                log=log,
                fds=(*stdio, *extra_fds),
                cgroup_procs=cgroup_procs,
                entered=entered,
                mounts=mounts,
                timeout=timeout,
                what=f"exec {exec_id!r} in container {container_id!r}" if exec_id else "",
            )
            before = self.keeper.last_seq
            reached("before runtime.exec", container_id)
            code = await run(self.keeper, call)
            if code != 0:
                raise failure(call.label, code, read_log(call.log), starts_program=True)
            reached("after runtime.exec", container_id)
            created = await identify(self._files, call, pid_file, bundle, exits_after=before)
            if not self.program.features.cgroup_disabled:
                enter(call, created, cgroup_procs)
            return created
        finally:
            self._files.unlink_pid_file(pid_file)
            for path in (request, log):
                self._files.unlink(path)

    async def kill(self, container_id: str, signal: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Send a signal to a container's first process; one that has ended is no error.

        Rarely right: the holder of a pidfd needs no runtime.

        Raises:
            NotFoundError: no such container.
        """
        self._check_exists(container_id)
        try:
            await self._simple("kill", container_id, [container_id, str(signal)], timeout=timeout)
        except FailedPreconditionError:
            return

    async def delete(self, container_id: str, *, force: bool = False, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Forget a stopped container. May be repeated; an unknown container is forgotten already.

        Args:
            container_id: which.
            force: kill it first if it lives. Not after a seen exit: runc sleeps 100 ms for it.
            timeout: seconds.

        Raises:
            FailedPreconditionError: it is not stopped and `force` is not given.
            BackendError, DeadlineExceededError: it could not be done; try again.
        """
        check_name(container_id, "container id")
        if not self._files.exists(container_id) or (
            self.program.features.removable_state and self._files.remove_stopped(container_id)
        ):
            await anyio.lowlevel.checkpoint()
            return
        arguments = ["--force", container_id] if force else [container_id]
        reached("before runtime.delete", container_id)
        try:
            await self._simple("delete", container_id, arguments, timeout=timeout)
        except NotFoundError:
            pass
        except BackendError:
            if not force:
                raise
        reached("after runtime.delete", container_id)
        if force:
            await self._own_cgroups.remove(container_id)
        if force and self._files.exists(container_id) and not self._files.discard(container_id):
            # A state that the runtime cannot read (it was killed while it wrote) belongs to nothing that we could ask.
            raise BackendError(f"{self.program.name} could not delete container {container_id!r} by force")

    async def state(self, container_id: str, *, timeout: float = DEFAULT_TIMEOUT) -> ContainerState | None:
        """What the runtime says about a container; None when it has none of this id."""
        check_name(container_id, "container id")
        if not self._files.exists(container_id):
            await anyio.lowlevel.checkpoint()
            return None
        reader, writer = os.pipe()
        try:
            try:
                # A pipe is the bound: more than fits is never a state, and the deadline ends who writes it.
                with contextlib.suppress(PermissionError):  # above the user's limit: 64 KiB must do
                    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _STATE_BYTES)
                await self._simple("state", container_id, [container_id], stdout=writer, timeout=timeout)
            except NotFoundError:
                return None
            finally:
                os.close(writer)
            os.set_blocking(reader, False)
            text = bytearray()
            with contextlib.suppress(BlockingIOError):  # something still holds the other end
                while part := os.read(reader, _STATE_BYTES):
                    text += part
        finally:
            os.close(reader)
        try:
            said = json.loads(bytes(text))
            return ContainerState(str(said["id"]), str(said["status"]), int(said.get("pid") or 0), str(said["bundle"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BackendError(
                f"{self.program.name} state of container {container_id!r} is not readable: {bytes(text[:200])!r}"
            ) from error

    def was_started(self, container_id: str) -> bool:
        """Whether a container that was created does not wait any more; False where that cannot be seen."""
        directory = self._files.state_dir(check_name(container_id, "container id"))
        has_fifo = bool(self.program.features.fifo)
        return has_fifo and os.path.isdir(directory) and not os.path.lexists(f"{directory}/exec.fifo")

    def own_cgroups(self, container_id: str) -> tuple[str, ...]:
        """The cgroup directories that the runtime itself makes and `delete` removes, to be removed after a crash.

        Empty for a runtime that leaves cgroups alone.
        """
        return self._own_cgroups.of(check_name(container_id, "container id"))

    async def remove_own_cgroups(self, prefix: str) -> None:
        """Remove these of all containers whose ids begin so. For who has lost the keeper, and with it all states."""
        await self._own_cgroups.remove_all(prefix)

    # --- calls ---

    async def _simple(
        self, verb: str, container_id: str, arguments: Sequence[str], *, stdout: int | None = None, timeout: float
    ) -> None:
        """A call that makes no process of ours; raises by what its log says."""
        log = self._files.log(os.urandom(8).hex())
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            fds = (null, null if stdout is None else stdout, null)
            call = await self._call(verb, container_id, arguments, log=log, fds=fds, timeout=timeout)
            code = await run(self.keeper, call)
            if code != 0:
                raise failure(call.label, code, read_log(call.log))
        finally:
            os.close(null)
            self._files.unlink(log)

    async def _call(
        self,
        verb: str,
        container_id: str,
        arguments: Sequence[str],
        *,
        log: str,
        fds: Sequence[int],
        cgroup_procs: Sequence[str] = (),
        entered: Mapping[str, str] = NOWHERE,
        mounts: str = "",
        timeout: float,
        what: str = "",
    ) -> Call:
        name = self.program.name
        try:
            os.makedirs(self._files.view(self._files.states()), mode=0o700, exist_ok=True)
            os.makedirs(self._files.view(self._files.logs()), mode=0o700, exist_ok=True)
            executable = await self._executable()
        except OSError as error:
            raise BackendError(
                f"{name} {verb} of container {container_id!r} failed: its directory {self.root} cannot be used: "
                f"{error.strerror or error}"
            ) from error
        options = ["--root", self._files.states(), "--log", log, "--log-format", "json"]
        if self.program.features.cgroup_disabled:
            options.append("--cgroup-manager=disabled")
        prefix = nsenter(entered) if entered else []
        return Call(
            label=f"{name} {what or f'{verb} of container {container_id!r}'}",
            argv=[*prefix, executable, *options, verb, *arguments],
            log=self._files.view(log),
            fds=fds,
            cgroup_procs=cgroup_procs if self.program.features.cgroup_disabled else (),
            mounts=mounts,
            timeout=timeout,
        )

    async def _command_start(self, container_id: str, created: Created | None, timeout: float) -> None:
        try:
            await self._simple("start", container_id, [container_id], timeout=timeout)
        except FailedPreconditionError:
            # "Stopped" may mean either; whoever keeps the state of a container does not start it twice.
            if created is not None and has_ended(created.pidfd) and not self.was_started(container_id):
                raise self._ended_early(container_id, created) from None
            raise

    def _ended_early(self, container_id: str, created: Created) -> BackendError:
        log = read_log(self._files.view(f"{created.bundle}/{_BUNDLE_LOG}"))
        reason = why(log) or "its log is empty"
        return BackendError(f"container {container_id!r} ended before it was started: {reason}", log=log)

    async def _executable(self) -> str:
        """Where the keeper's children find the program.

        crun copies itself into a read-only mount and executes that copy, at every call, so that a container cannot
        overwrite it (CVE-2019-5736); unless it runs from a memory file with all seals, which nobody can write. That
        saves 1.0 to 1.5 ms of each call. Source: crun src/libcrun/cloned_binary.c, is_self_cloned().
        """
        if not self._prepared.executable:
            self._prepared.executable = await self._seal() if self.program.features.sealed else self.program.path
        return self._prepared.executable

    async def _seal(self) -> str:
        name = f"engine/runtime/{self.program.name}"  # no sandbox's: nothing that a keeper would stay for
        try:
            memory = sealed_copy(self.program.path, name)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.EACCES}:
                raise UnavailableError(
                    f"{self.program.path} cannot be read any more: {error.strerror}",
                    hint="Install it: apt install crun.",
                ) from error
            # No memory files that may be executed (vm.memfd_noexec): it works without, only slower.
            return self.program.path
        try:
            try:
                number = await self.keeper.hold(name, memory)
            except FileExistsError:
                number = (await self.keeper.held(name))[name]
        finally:
            os.close(memory)
        return f"/proc/{self.keeper.pid}/fd/{number}"

    async def _scrap(self, container_id: str) -> None:
        """Remove what a failed or cancelled `create` left."""
        # The error that is under way says what happened; a remainder is found again by `delete`.
        with (
            anyio.CancelScope(shield=True),
            contextlib.suppress(BackendError, DeadlineExceededError, UnavailableError, OSError),
        ):
            if self._files.exists(container_id):
                await self.delete(container_id, force=True, timeout=_CLEANUP_SECONDS)
            await self._own_cgroups.remove(container_id)

    @property
    def _files(self) -> RuntimeFiles:
        return RuntimeFiles(self.root, self.keeper)

    # --- checks ---

    def _check_exists(self, container_id: str) -> None:
        check_name(container_id, "container id")
        if not self._files.exists(container_id):
            raise NotFoundError(f"{self.program.name} has no container {container_id!r}")

    def _check_fds(self, extra_fds: Sequence[int]) -> None:
        if extra_fds and not self.program.features.preserve_fds:
            raise UnsupportedError("passing file descriptors", self.program.name)
