"""Sandboxes from Linux namespaces and cgroups, with containers run by an OCI runtime (crun, runc, youki).

`sandboxer` manages the sandboxes, `making` makes one, `pod` is what it holds, `planner` makes what its containers need,
`rootfs` plans files, `checks` refuses, `probe` says whether it can run here. May know: oci/, host/, api/. Must not
know: the engine, another backend.
"""

from __future__ import annotations

from typing import Final

from unisandbox.api import Capabilities, Probe, Sandboxer
from unisandbox.backends.runc.capabilities import CAPABILITIES
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
        """What it can do where it runs."""
        return CAPABILITIES

    async def probe(self, *, deep: bool = False) -> Probe:
        """Whether it can run here; see `probe.probe`."""
        from unisandbox.backends.runc.probe import probe

        return await probe(deep=deep, runtime=self._runtime)

    async def open(self, host: Host) -> Sandboxer:
        """The sandboxer of one engine."""
        from unisandbox.backends.runc.sandboxer import RuncSandboxer
        from unisandbox.oci.features import pick_runtime
        from unisandbox.oci.runtime import Runtime

        program = await pick_runtime(self._runtime)
        return RuncSandboxer(host, Runtime(program=program, root=f"{host.work_dir}/runtime", keeper=host.keeper))


backend: Final = RuncBackend()
