"""A small backend for unisandbox, to learn from: namespaces, a private tree and cgroups, and no OCI runtime.

`sandboxer` makes, verifies, recovers and frees sandboxes, `task` runs processes in them, `root` says what they see, and
`launcher` is the small program that enters a sandbox and becomes what was asked for.
"""

from __future__ import annotations

import os
from typing import Final

import anyio.lowlevel

from unisandbox.api import Capabilities, Probe, Sandboxer, UnavailableError
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.services import Host
from unisandbox_unshare.sandboxer import CAPABILITIES, UnshareSandboxer

_USER_NAMESPACES: Final = os.path.exists("/proc/self/ns/user")


class UnshareBackend:
    """The entry point `unshare` of the group `unisandbox.backends`."""

    name: Final = "unshare"
    # Below those of unisandbox itself: "auto" takes it only where nothing else runs.
    rank: Final = -10

    @property
    def capabilities(self) -> Capabilities:
        """What it can do where it runs."""
        return CAPABILITIES

    async def probe(self, *, deep: bool = False) -> Probe:
        """Whether it can run here, from cheap facts; nothing of it can fail that only a trial would show."""
        await anyio.lowlevel.checkpoint()
        facts = {"kernel": os.uname().release}
        try:
            missing = Cgroups.detect("unisandbox-probe").reasons()
        except UnavailableError as error:  # no cgroup file system is mounted at all
            missing = [error.message]
        why, hint = "", ""
        if os.geteuid() != 0:
            why, hint = "it needs root", "Run as root."
        elif not _USER_NAMESPACES:
            why, hint = "this kernel has no user namespaces", "Use a kernel with CONFIG_USER_NS."
        elif missing:
            why, hint = missing[0], "Mount the cgroup file systems."
        reason = why or "root, user namespaces and cgroups are here"
        return Probe(self.name, available=not why, reason=reason, hint=hint, facts=facts)

    async def open(self, host: Host) -> Sandboxer:
        """The sandboxer of one engine."""
        return UnshareSandboxer(host)


backend: Final = UnshareBackend()
