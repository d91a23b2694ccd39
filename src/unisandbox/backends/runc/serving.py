"""The helpers that serve writable layers, where the kernel's overlay does not: one for each root file system.

A helper is in the keeper's user namespace, since whoever mounts must have opened /dev/fuse there, and in the sandbox's
mount namespace; it has a network namespace of its own with nothing in it. Its cgroup is one below the sandbox's and
beside those of the containers: what is written is charged to the sandbox, and a container that is paused pauses
nobody whom another one, or `files`, waits for.

Whoever looks at files that it serves waits for it, and cannot even be killed while it holds what he asked. So this
process never looks at them itself (nor may it, being outside of that user namespace); what a job of the keeper does has
a deadline, and then the helper is killed: all who wait get an error, and go on.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import os
from collections.abc import Mapping, Sequence
from typing import Final, cast

import anyio

from unisandbox.api import BackendError, UnavailableError
from unisandbox.backends.runc import overlays
from unisandbox.backends.runc.pod import Pod
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import patience
from unisandbox.host.helper import END_SECONDS, Helper
from unisandbox.host.keeper import JobFailed, JobResult, Spawned, SpawnFailed
from unisandbox.host.services import Host
from unisandbox.oci.users import FILE_OF_GROUPS, FILE_OF_USERS, Copied

_ANSWER_SECONDS: Final = 30.0
# Of one file, in one message of the keeper.
_LARGEST_FILE: Final = 65536
_LARGEST_SAID: Final = 4096
_LAYER: Final = "layer"
_GONE: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


def device_of(container: str) -> str:
    """What the descriptor is held as, below the sandbox's prefix, until the helper has it."""
    return f"fuse-{container}" if container else "fuse"


def held_names(pod: Pod, container: str) -> list[str]:
    """All names under which the keeper knows of one container's helper."""
    return [pod.held(device_of(container)), _name(pod, container)]


class Serving:
    """The helper of one root file system as it begins: its mount is there, and all wait who look at it."""

    def __init__(self, host: Host, pod: Pod, container: str, helper: Helper, said: int) -> None:
        self._host = host
        self._pod = pod
        self._container = container
        self._helper = helper
        self._said = said

    @classmethod
    async def begin(cls, host: Host, pod: Pod, container: str) -> Serving:
        """Start the helper of a layer whose descriptor is held as `device_of`; close what this returns.

        Raises:
            UnavailableError: it is not installed any more.
            BackendError: it cannot be started.
        """
        cgroup = pod.cgroup.child(_cgroup(container), for_process=True)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        fds = [writer]
        try:
            os.set_blocking(reader, False)
            device = pod.held(device_of(container))
            fds += [await host.keeper.take(device), os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)]
            started = await cls._start(host, pod, container, (fds[2], fds[2], writer, fds[1]), cgroup.entry)
            pod.layers[container] = settled = await Helper.settle(host, _name(pod, container), cgroup, started)
            # From now on its end is the end of the mount.
            await host.keeper.drop([device])
        except BaseException:
            os.close(reader)
            cgroup.kill()
            with anyio.CancelScope(shield=True):
                await patience.remove(cgroup.dirs, END_SECONDS)
            raise
        finally:
            for fd in fds:
                os.close(fd)
        return cls(host, pod, container, settled, reader)

    @staticmethod
    async def _start(host: Host, pod: Pod, container: str, fds: Sequence[int], cgroup_procs: Sequence[str]) -> Spawned:
        why, remedy = overlays.obstacle()
        if why:
            raise UnavailableError(f"cannot make sandbox {pod.label!r}: {why} any more", hint=remedy)
        place = pod.place(container)
        below = (place.base[1:], f"{place.layer}/upper"[1:], f"{place.layer}/work"[1:])
        reached("before layer.start", pod.label)
        try:
            spawned = await host.keeper.spawn(
                f"{_name(pod, container)}/{os.urandom(8).hex()}",
                overlays.command(below, device=3),
                env={"PATH": overlays.PATH, "LC_ALL": "C"},
                cwd=pod.work,
                cgroup_procs=cgroup_procs,
                mounts=pod.held("mnt"),
                fds=fds,
            )
        except SpawnFailed as error:
            raise BackendError(f"{overlays.PROGRAM} of {pod.label!r} cannot be started: {error.strerror}") from error
        reached("after layer.start", pod.label)
        return spawned

    async def job(
        self, steps: Sequence[Mapping[str, object]], hold: Mapping[str, str], fds: Sequence[int]
    ) -> JobResult:
        """The first job that looks at what it serves; its first step enters the sandbox's mount namespace.

        Raises:
            JobFailed: for another reason than the helper.
            BackendError: it has ended; with its words.
        """
        # Another version may not know the option; see `overlays.command`.
        root = f"{self._pod.work}{self._pod.place(self._container).root}"
        steps = [steps[0], {"do": "no_attributes", "path": root}, *steps[1:]]
        try:
            return await self._host.keeper.job(steps, hold=hold, fds=fds, timeout=_ANSWER_SECONDS)
        except BaseException as error:
            # Its descriptor is closed a moment before its end can be seen.
            has_ended = self._helper.has_ended or getattr(error, "errno", 0) in _GONE
            self._helper.kill()  # or the job's process waits for it
            if isinstance(error, JobFailed) and has_ended:
                raise BackendError(
                    f"cannot make sandbox {self._pod.label!r}: {overlays.PROGRAM} has ended: {self._words()}",
                    hint="It takes some 5 MB of the sandbox's memory, and one of its processes.",
                ) from error
            raise

    def _words(self) -> str:
        try:
            said = os.read(self._said, _LARGEST_SAID).decode(errors="replace")
        except BlockingIOError:
            said = ""
        return "; ".join(line.strip() for line in said.splitlines()) or "it said nothing"

    def close(self) -> None:
        """Its words are wanted no more. (It ignores that nobody reads them.)"""
        os.close(self._said)


async def served(
    host: Host,
    pod: Pod,
    container: str,
    steps: Sequence[Mapping[str, object]],
    hold: Mapping[str, str],
    fds: Sequence[int],
) -> Mapping[str, int]:
    """Start a helper, and do what has waited for it: the numbers in the keeper of what is held then.

    Raises:
        JobFailed: for another reason than the helper.
        BackendError, UnavailableError: see `Serving`.
    """
    serving = await Serving.begin(host, pod, container)
    try:
        return (await serving.job(steps, hold, fds)).held
    finally:
        serving.close()


async def restore(host: Host, pod: Pod, container: str = "") -> None:
    """Take over one that another process has started, if there is one."""
    if container not in pod.layers:
        found = await Helper.restore(host, _name(pod, container), pod.cgroup, _cgroup(container))
        if found is not None:
            pod.layers[container] = found


async def end(pod: Pod, container: str = "") -> None:
    """End one, if there is one; whoever looks at what it served gets an error."""
    helper = pod.layers.get(container)
    if helper is not None:
        await helper.end()
        pod.layers.pop(container, None)
        return
    with contextlib.suppress(FileNotFoundError):  # one whose start was cut
        cgroup = pod.cgroup.find(_cgroup(container))
        cgroup.kill()
        await patience.remove(cgroup.dirs, END_SECONDS)


async def clear(host: Host, pod: Pod) -> None:
    """End those of which only the names are known, where no cgroup does."""
    for name in await host.keeper.held(pod.held(_LAYER)):
        await Helper.clear(host.keeper, name)


async def users_of(host: Host, pod: Pod, container: str, root: int) -> Copied:
    """Its files of users and groups, of each the first 64 KiB.

    Raises:
        UnavailableError: they cannot be read.
    """
    helper = pod.layers[container]
    helper.wake()
    files: dict[str, bytes | None] = {}
    for path in (FILE_OF_USERS, FILE_OF_GROUPS):
        step = {"do": "read", "fd": 0, "path": path, "most": _LARGEST_FILE}
        try:
            result = (await host.keeper.job([step], fds=[root], timeout=_ANSWER_SECONDS)).result
        except JobFailed as error:
            if error.do is None:
                helper.kill()
            raise UnavailableError(
                f"{path} of sandbox {pod.label!r} cannot be read: {error.strerror}", hint="Give users by number."
            ) from error
        except BaseException:
            helper.wake()
            raise
        encoded = cast("list[dict[str, str | None]]", result["steps"])[0]["base64"]
        files[path] = None if encoded is None else binascii.a2b_base64(encoded)
    return Copied(files)


def _cgroup(container: str) -> str:
    """The name of a helper's cgroup below the sandbox's; those of containers begin with "c-"."""
    return f"l-{container}" if container else _LAYER


def _name(pod: Pod, container: str) -> str:
    return pod.held(f"{_LAYER}-{container}" if container else _LAYER)
