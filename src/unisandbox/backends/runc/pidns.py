"""A pid namespace that all containers of a sandbox share: our init alone in an empty read-only root.

Somebody has to be PID 1 of it. With a mount namespace and a root of its own that hold nothing, /proc/1/root shows a
container nothing. It needs no runtime: init itself gives up everything and makes the namespace (`begin` in
native/init/init.c), which takes a fourth of the time.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Final

import anyio
import attrs

from unisandbox.api import BackendError
from unisandbox.backends.runc.pod import Pod
from unisandbox.host import namespaces
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import Cgroup, patience
from unisandbox.host.init.protocol import STEPS
from unisandbox.host.keeper import Guard, Keeper
from unisandbox.host.pidfd import has_ended, is_ending
from unisandbox.host.readiness import readable
from unisandbox.host.services import Host
from unisandbox.oci import calls
from unisandbox.oci.ends import wait_end_of_init
from unisandbox.oci.made import Created, child_of
from unisandbox.oci.processes import end_init, streams
from unisandbox.oci.starting import START_SECONDS

EMPTY_ROOT: Final = "/empty"
"""Below the sandbox's directory; made with its root file system."""

# How long the kernel may take to free the process after its end.
_END_SECONDS: Final = 5.0
# The name, below the sandbox's prefix, of what is known of the process.
_FIRST: Final = "pid-first"
# The user namespace comes last: a given network may belong to the host's.
_JOINED: Final = ("net", "ipc", "uts", "user")
_SAID: Final = struct.Struct("=2i")  # a step, and a pid or an errno below zero


@attrs.define(eq=False, repr=False)
class SharedPids:
    """The one process of a shared pid namespace.

    Attributes:
        cgroup: its own.
        created: the process.
        ending: we end it.
    """

    cgroup: Cgroup
    created: Created
    ending: bool = attrs.field(default=False, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    @classmethod
    async def make(cls, host: Host, pod: Pod, init_fd: int) -> SharedPids:
        """Start it and pin its namespace as `pid` of the pod."""
        cgroup = pod.cgroup.child("pid", for_process=True)
        created: Created | None = None
        try:
            created = await _start(host.keeper, pod, cgroup, init_fd)
            _verify(created.pid, pod, cgroup)
            fd = os.open(f"/proc/{created.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            try:
                pod.pins["pid"] = await host.keeper.hold(f"{pod.short}/pid", fd)
                pod.inodes["pid"] = namespaces.namespace_inode(fd)
                if not cgroup.holds_processes:
                    await host.keeper.guard([_guard(pod, created)])
                if host.shared:
                    name = f"{pod.short}/{_FIRST}"
                    await host.keeper.notes.write_process(name, created.pid, created.start_time, created.pidfd)
            finally:
                os.close(fd)
        except BaseException as error:
            end_init(cgroup, created)
            with anyio.CancelScope(shield=True):
                await patience.remove(cgroup.dirs, _END_SECONDS)  # or every later start would meet it
            if created is not None:
                os.close(created.pidfd)
                host.keeper.drop_now([f"{pod.short}/pid", f"{pod.short}/{_FIRST}"])
                pod.pins.pop("pid", None)
                pod.inodes.pop("pid", None)
            if isinstance(error, ProcessLookupError):
                raise BackendError(f"the first process of sandbox {pod.label!r} has ended at once") from error
            raise
        return cls(cgroup, created)

    @classmethod
    async def restore(cls, host: Host, pod: Pod) -> SharedPids | None:
        """Take over one that another process has made; None while there is none."""
        name = f"{pod.short}/{_FIRST}"
        noted = await host.keeper.notes.find_process(name)
        if noted is None:
            return None
        try:
            cgroup = pod.cgroup.find("pid")
            fd = await host.keeper.take(f"{pod.short}/pid")
            try:
                pod.inodes["pid"] = namespaces.namespace_inode(fd)
            finally:
                os.close(fd)
            pidfd = await host.keeper.take(name)
        except FileNotFoundError:
            return None  # ended meanwhile
        found = cls(cgroup, Created(*noted, pidfd, ""))
        if is_ending(found.created.pid):  # whoever stopped the sandbox was cut: nothing can begin in it any more
            with anyio.move_on_after(_END_SECONDS):
                await readable(pidfd)
        return found

    @property
    def has_ended(self) -> bool:
        """Nothing can be started in the namespace any more; False for one that was let go of."""
        return not self._closed and has_ended(self.created.pidfd)

    def is_same(self, other: SharedPids | None) -> bool:
        """Whether it is about the same process."""
        identity = (self.created.pid, self.created.start_time)
        return other is not None and identity == (other.created.pid, other.created.start_time)

    async def ended_at(self, keeper: Keeper) -> float:
        """Wait for its end; when that came, in seconds since the epoch.

        Raises:
            UnavailableError: the keeper has ended, which alone knows.
        """
        return (await keeper.wait_exit(self.created.pid, self.created.start_time)).at

    @staticmethod
    async def clear(host: Host, pod: Pod) -> None:
        """Free what a beginning or an ending that was cut has left, known by its name only."""
        with contextlib.suppress(FileNotFoundError):
            cgroup = pod.cgroup.find("pid")
            cgroup.kill()
            await patience.remove(cgroup.dirs, _END_SECONDS)
        await host.keeper.drop([f"{pod.short}/pid", f"{pod.short}/{_FIRST}"])
        pod.pins.pop("pid", None)
        pod.inodes.pop("pid", None)

    def close(self) -> None:
        """Close what this process holds of it; ends nothing. Repeating is harmless."""
        if not self._closed:
            self._closed = True
            os.close(self.created.pidfd)

    async def end(self, host: Host, pod: Pod) -> None:
        """End it: with it everything that is still in the namespace ends. May be repeated until it has returned."""
        self.ending = True
        end_init(self.cgroup, self.created)
        await wait_end_of_init(host.keeper, self.created)
        await host.keeper.drop([f"{pod.short}/pid", f"{pod.short}/{_FIRST}"])
        pod.pins.pop("pid", None)
        pod.inodes.pop("pid", None)
        await patience.remove(self.cgroup.dirs, _END_SECONDS)
        self.close()


def _guard(pod: Pod, created: Created) -> Guard:
    """How to end it where no cgroup does."""
    return Guard(f"{pod.short}/process", "kill_process", (f"/{created.pid}/{created.start_time}",))


async def _start(keeper: Keeper, pod: Pod, cgroup: Cgroup, init_fd: int) -> Created:
    what = f"the first process of sandbox {pod.label!r}"
    with contextlib.ExitStack() as opened:
        spaces = [keeper.open_held(pod.pins[kind], os.O_RDONLY) for kind in _JOINED if kind in pod.pins]
        for fd in spaces:
            opened.callback(os.close, fd)
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        opened.callback(os.close, reader)
        opened.callback(os.close, writer)
        null, said, errors = opened.enter_context(streams((-1, writer, -1)))
        call = calls.Call(
            label=what,
            argv=["/proc/self/fd/3", "first", f"{pod.work}{EMPTY_ROOT}", *["groups"] * pod.is_single],
            log="",
            fds=(null, said, errors, init_fd, *spaces),
            cgroup_procs=cgroup.entry,
            mounts=pod.held("mnt"),
            timeout=START_SECONDS,
        )
        reached("before first.create", pod.sandbox_id)
        await calls.run(keeper, call)
        reached("after first.create", pod.sandbox_id)
        try:
            step, value = _SAID.unpack(os.read(reader, _SAID.size))
        except (BlockingIOError, struct.error):
            raise BackendError(f"{what} was killed before it could begin") from None
    if value < 0:
        raise BackendError(f"{what} cannot be made: {STEPS[step - 1]}: {os.strerror(-value)}")
    created = child_of(keeper, value)
    if created is None:
        raise BackendError(f"{what} has ended at once")
    return created


def _verify(pid: int, pod: Pod, cgroup: Cgroup) -> None:
    """It is in the sandbox's namespaces, in a pid and a mount namespace of its own, and in its cgroup."""
    found, ours = namespaces.process_namespaces(pid), namespaces.process_namespaces(os.getpid())
    wrong: list[str] = [kind for kind in _JOINED if kind in pod.inodes and found[kind] != pod.inodes[kind]]
    wrong += [kind for kind in ("pid", "mnt") if found[kind] == ours[kind]]
    if wrong:
        raise BackendError(f"the first process of sandbox {pod.label!r} is in another {wrong[0]} namespace")
    if not cgroup.holds(pid):
        raise BackendError(f"the first process of sandbox {pod.label!r} is not in its cgroup")
