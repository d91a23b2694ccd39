"""A pid namespace that all containers of a sandbox share: our init alone in an empty read-only root.

Somebody has to be PID 1 of it. With a root of its own that holds nothing, /proc/1/root shows a container nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Final

import anyio
import attrs

from unisandbox.backends.runc.planner import PodPlanner
from unisandbox.backends.runc.pod import Pod
from unisandbox.host import namespaces
from unisandbox.host.cgroups import Cgroup
from unisandbox.host.keeper import Keeper
from unisandbox.host.pidfd import has_ended
from unisandbox.host.services import Host
from unisandbox.oci.made import Created
from unisandbox.oci.processes import ended_process, streams
from unisandbox.oci.runtime import Runtime
from unisandbox.oci.starting import START_SECONDS

EMPTY_ROOT: Final = "/empty"
"""Below the sandbox's directory; made with its root file system."""

# Its name where containers have theirs, which begin with a letter or a digit.
_NAME: Final = ".pid"
# The name, below the sandbox's prefix, of what is known of the process.
_FIRST: Final = "pid-first"


@attrs.define(eq=False, repr=False)
class SharedPids:
    """The one process of a shared pid namespace.

    Attributes:
        oci_id: its name for the runtime.
        cgroup: its own.
        created: the process.
        ending: we end it.
    """

    oci_id: str
    cgroup: Cgroup
    created: Created
    ending: bool = attrs.field(default=False, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    @classmethod
    async def make(cls, host: Host, runtime: Runtime, pod: Pod, planner: PodPlanner, init_fd: int) -> SharedPids:
        """Start it and pin its namespace as `pid` of the pod."""
        oci_id = f"{pod.short}-{_NAME}"
        cgroup = pod.cgroup.child("pid", for_process=True)
        bundle = f"{pod.work}/b/{_NAME}"
        try:
            planner.pause_bundle(f"{pod.work}{EMPTY_ROOT}").write(host.keeper.outside(bundle))
            with streams() as stdio:
                created = await runtime.create(
                    oci_id,
                    bundle,
                    stdio=stdio,
                    extra_fds=(init_fd,),
                    cgroup_procs=cgroup.entry,
                    entered=planner.entered,
                    mounts=pod.held("mnt"),
                    timeout=START_SECONDS,
                )
        except BaseException:
            cgroup.kill()
            cgroup.remove(timeout=5.0)  # or every later start would meet it
            raise
        made = cls(oci_id, cgroup, created)
        try:
            await runtime.start(oci_id, created=created, timeout=START_SECONDS)
            fd = os.open(f"/proc/{created.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            try:
                pod.pins["pid"] = await host.keeper.hold(f"{pod.short}/pid", fd)
                pod.inodes["pid"] = namespaces.namespace_inode(fd)
                if host.shared:
                    await host.keeper.spools.hold_now({f"{pod.short}/{_FIRST}": created.pidfd})
                    await host.keeper.note(f"{pod.short}/{_FIRST}", json.dumps([created.pid, created.start_time]))
            finally:
                os.close(fd)
        except BaseException:
            with anyio.CancelScope(shield=True), anyio.move_on_after(START_SECONDS):
                await made.end(host, runtime, pod)
            raise
        return made

    @classmethod
    async def restore(cls, host: Host, pod: Pod) -> SharedPids | None:
        """Take over one that another process has made; None while there is none."""
        name = f"{pod.short}/{_FIRST}"
        note = (await host.keeper.notes(name)).get(name)
        if note is None:
            return None
        pid, start_time = json.loads(note)
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
        return cls(f"{pod.short}-{_NAME}", cgroup, Created(pid, start_time, pidfd, f"{pod.work}/b/{_NAME}"))

    @property
    def has_ended(self) -> bool:
        """Nothing can be started in the namespace any more."""
        return has_ended(self.created.pidfd)

    async def ended_at(self, keeper: Keeper) -> float:
        """Wait for its end; when that came, in seconds since the epoch.

        Raises:
            UnavailableError: the keeper has ended, which alone knows.
        """
        return (await keeper.wait_exit(self.created.pid, self.created.start_time)).at

    @staticmethod
    async def clear(host: Host, runtime: Runtime, pod: Pod) -> None:
        """Free what a beginning or an ending that was cut has left, known by its name only."""
        with contextlib.suppress(FileNotFoundError):
            cgroup = pod.cgroup.find("pid")
            cgroup.kill()
            cgroup.remove(timeout=5.0)
        await runtime.delete(f"{pod.short}-{_NAME}", force=True)
        await host.keeper.drop([f"{pod.short}/pid", f"{pod.short}/{_FIRST}"])
        pod.pins.pop("pid", None)
        pod.inodes.pop("pid", None)

    def close(self) -> None:
        """Close what this process holds of it; ends nothing. Repeating is harmless."""
        if not self._closed:
            self._closed = True
            os.close(self.created.pidfd)

    async def end(self, host: Host, runtime: Runtime, pod: Pod) -> None:
        """End it: with it everything that is still in the namespace ends. May be repeated until it has returned."""
        self.ending = True
        self.cgroup.kill()
        await ended_process(host.keeper, self.created)
        await runtime.delete(self.oci_id)
        await host.keeper.drop([f"{pod.short}/pid", f"{pod.short}/{_FIRST}"])
        pod.pins.pop("pid", None)
        pod.inodes.pop("pid", None)
        self.cgroup.remove(timeout=5.0)
        self.close()
