"""Sandboxes from Linux namespaces and cgroups, with containers run by an OCI runtime (crun, runc, youki).

`sandboxer` manages the sandboxes, `making` makes one, `pod` is what it holds, `planner` makes what its containers need,
`rootfs` plans files, `rlimits` says what a process may take of the kernel, `checks` refuses, `users` tells what is left
to users who are not root, `probe` says whether it can run here. May know: oci/, host/, api/. Must not know: the engine,
another backend.
"""

from __future__ import annotations

from typing import Final

from unisandbox.api import Capabilities, Probe, Sandboxer, UnavailableError
from unisandbox.backends.runc.capabilities import roots_capabilities
from unisandbox.host.keeper.protocol import LOG_NAME
from unisandbox.host.power import standing
from unisandbox.host.services import Host


class RuncBackend:
    """The entry point `runc` of the group `unisandbox.backends`."""

    name: Final = "runc"
    rank: Final = 10

    def __init__(self, runtime: str | None = None) -> None:
        """Args: runtime: "crun", "runc" or "youki"; None: the first of them that is installed."""
        self._runtime = runtime

    @property
    def capabilities(self) -> Capabilities:
        """What it can do where it runs; of what root can, a user who is not root has a part."""
        if not standing.lacking():
            return roots_capabilities()
        from unisandbox.backends.runc import users

        return users.capabilities()

    async def probe(self, *, deep: bool = False) -> Probe:
        """Whether it can run here; see `probe.probe`."""
        from unisandbox.backends.runc.probe import probe

        return await probe(deep=deep, runtime=self._runtime)

    async def open(self, host: Host) -> Sandboxer:
        """The sandboxer of one engine."""
        from unisandbox.backends.runc.sandboxer import RuncSandboxer
        from unisandbox.oci.features import pick_runtime
        from unisandbox.oci.runtime import Runtime

        if not host.keeper.hello.private_mounts and not standing.lacking():
            # What it mounts would be mounted on the host, for everybody, and stay there.
            raise UnavailableError(
                "backend 'runc' cannot be used: the keeper has no mounts of its own, since the process that started it"
                f" may make no namespaces, see {host.state_dir}/{LOG_NAME}",
                hint="Open the engine with a program that may: look for what confines that one (a filter of system"
                " calls, RestrictNamespaces= in its unit).",
            )
        if standing.lacking() and host.keeper.ids is None:
            from unisandbox.host.power import obstacles

            reason, hint = obstacles.of_power_in_them(obstacles.of_namespaces()) or ("", "")
            raise UnavailableError(
                "backend 'runc' cannot be used: the keeper has no user namespace of its own: "
                + (reason or f"this host forbids it, see {host.state_dir}/{LOG_NAME}"),
                hint=hint or "Look for what confines this process (a container, a filter of system calls).",
            )
        program = await pick_runtime(self._runtime)
        return RuncSandboxer(host, Runtime(program=program, root=f"{host.work_dir}/runtime", keeper=host.keeper))


backend: Final = RuncBackend()
