"""A network in user mode: one helper, pasta, opens on the host what a sandbox asks for. No privilege is needed.

The helper is not in the sandbox's network namespace but in one beside it, the gate; a cable (veth) joins the two, and
the gate passes on what comes. To the kernel that is traffic from outside, and it drops what is meant for a loopback.
Without the gate a socket bound to the interface (SO_BINDTODEVICE, which anybody may) sends packets for 127.0.0.1 to the
helper, and pasta of 2023 connects to the loopback of the host with them. Source: ip_route_input_slow() in
net/ipv4/route.c, ip6_rcv_core() in net/ipv6/ip6_input.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
from collections.abc import Sequence
from typing import Final, NamedTuple

import anyio
import attrs

from unisandbox.api import BackendError, InvalidArgumentError, UnavailableError
from unisandbox.host import pidfd as pidfds
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import Cgroup, patience
from unisandbox.host.helper import END_SECONDS, Helper
from unisandbox.host.keeper import JobFailed, Keeper, Spawned, SpawnFailed
from unisandbox.host.services import Host
from unisandbox.host.subordinate import Rows
from unisandbox.network import pasta

# Two networks of two hosts each: sandbox and gate, gate and helper.
_SANDBOX, _GATE, _PREFIX = "10.0.2.2", "10.0.2.1", 30
_GATE_OUTER, _HELPER = "10.0.2.6", "10.0.2.5"
# What pasta gives its own interface; larger packets would be cut at the gate.
_MTU: Final = 65520
# A new namespace has the host's settings, not the kernel's: kube-proxy lets packets for a loopback in from outside.
# Source: net.core.devconf_inherit_init_net, Documentation/admin-guide/sysctl/net.rst.
_GATE_SYSCTLS: Final = {
    "net.ipv4.ip_forward": "1",
    "net.ipv4.conf.all.route_localnet": "0",
    "net.ipv4.conf.default.route_localnet": "0",
}
_START_SECONDS: Final = 15.0
_LONGEST_SAID: Final = 16384
# The names, below the sandbox's prefix, of what the keeper holds and knows.
_HELD_GATE: Final = "gate"
_HELD_HELPER: Final = "network"
_CGROUP: Final = "net"


class Ends(NamedTuple):
    """The sandbox that is connected.

    Attributes:
        label: what to call it in messages.
        prefix: of the names of all that the keeper holds and guards for it.
        user, net: the numbers in the keeper of its namespaces.
        id_maps: of its user namespace.
        cgroup: its own.
        asks_helper: its /etc/resolv.conf names `pasta.NAME_SERVER`. Else pasta is not to know the host's name server:
            what that answers would come from there, also to who has asked it by its own address.
    """

    label: str
    prefix: str
    user: int
    net: int
    id_maps: tuple[Rows, Rows]
    cgroup: Cgroup
    asks_helper: bool


@attrs.frozen(eq=False, repr=False)
class UserNetwork:
    """The network of one sandbox, with its helper."""

    _helper: Helper

    @classmethod
    async def connect(cls, host: Host, ends: Ends) -> UserNetwork:
        """Start it; returns when all that it does for the sandbox is there.

        Raises:
            InvalidArgumentError: the sandbox's limit of memory is below what it takes.
            UnavailableError: the kernel lacks something.
            BackendError: it has ended instead, or is not ready in time; with its words.
        """
        keeper, prefix = host.keeper, ends.prefix
        with contextlib.ExitStack() as opened:
            user, net = (keeper.open_held(number, os.O_RDONLY) for number in (ends.user, ends.net))
            opened.callback(os.close, user)
            opened.callback(os.close, net)
            gate = keeper.open_held(await _make_gate(keeper, ends, user, net), os.O_RDONLY)
            opened.callback(os.close, gate)
            cgroup = ends.cgroup.child(_CGROUP, for_process=True)
            try:
                started = await _start(keeper, ends, cgroup, (user, gate))
            except BaseException as error:
                is_short = isinstance(error, BackendError) and _was_killed_for_memory(cgroup)
                cgroup.kill()
                with anyio.CancelScope(shield=True):
                    await patience.remove(cgroup.dirs, END_SECONDS)
                if is_short:
                    raise InvalidArgumentError(
                        f"the memory limit of sandbox {ends.label!r} is too small for network 'user': its helper was"
                        " killed for memory",
                        hint="The helper takes some 25 MB of it: give resources.memory that much more.",
                    ) from error
                raise
        return cls(await Helper.settle(host, f"{prefix}{_HELD_HELPER}", cgroup, started))

    @classmethod
    async def restore(cls, host: Host, prefix: str, cgroup: Cgroup) -> UserNetwork | None:
        """Take over one that another process has made; None when there is none."""
        helper = await Helper.restore(host, f"{prefix}{_HELD_HELPER}", cgroup, _CGROUP)
        return None if helper is None else cls(helper)

    @staticmethod
    async def clear(keeper: Keeper, prefix: str) -> None:
        """End one of which only the names are known, where no cgroup does."""
        await Helper.clear(keeper, f"{prefix}{_HELD_HELPER}")

    @property
    def pid(self) -> int:
        """Of its helper."""
        return self._helper.pid

    @property
    def warning(self) -> str:
        """What its users have to know; empty while it runs."""
        if not self._helper.has_ended:
            return ""
        return (
            f"nothing outside can be reached any more: its network helper, pasta (process {self.pid}), has ended;"
            " remedy: create it anew"
        )

    async def end(self) -> None:
        """End it, with all connections; see `Helper.end`."""
        await self._helper.end()

    def close(self) -> None:
        """Close what this process holds of it; ends nothing. Repeating is harmless."""
        self._helper.close()


def _was_killed_for_memory(cgroup: Cgroup) -> bool:
    """Whether something in it was, where that is counted."""
    return cgroup.oom_counter is not None and cgroup.oom_kills() > 0


async def _make_gate(keeper: Keeper, ends: Ends, user: int, net: int) -> int:
    """The number in the keeper of the network namespace beside the sandbox's; it is held as long as that one is."""
    uid_map, gid_map = ends.id_maps
    steps = [
        {
            "do": "namespaces",
            "kinds": ["net"],
            "user": 0,
            "uid_map": uid_map,
            "gid_map": gid_map,
            "sysctls": _GATE_SYSCTLS,
        },
        {
            "do": "cable",
            "fd": 1,
            "peer": "net",
            "name": "eth0",
            "peer_name": "inner",
            "mtu": _MTU,
            "address": _SANDBOX,
            "peer_address": _GATE,
            "prefix": _PREFIX,
        },
    ]
    held = f"{ends.prefix}{_HELD_GATE}"
    try:
        return (await keeper.job(steps, hold={"net": held}, fds=[user, net])).held[held]
    except JobFailed as error:
        if error.errno == errno.EOPNOTSUPP:
            raise UnavailableError(
                f"cannot connect sandbox {ends.label!r}: this kernel has no veth interfaces",
                hint="As root: modprobe veth (CONFIG_VETH).",
            ) from error
        raise BackendError(f"cannot connect sandbox {ends.label!r}: {error.do or 'job'}: {error.strerror}") from error


def _argv(path: str, *, asks_helper: bool) -> Sequence[str]:
    """Nothing is forwarded inwards, nor to a loopback; and it finds its namespaces by its own descriptors.

    Those of another process it may not open once it has put down its capabilities, and newer versions close all above
    2 as they begin. (Nor does it watch for the end of a namespace that has no path: we end it.)
    """
    names = ("--dns-forward", pasta.NAME_SERVER) if asks_helper else ("--dns", "none")
    return (
        *(path, "--foreground", "--quiet", "--ipv4-only", "--config-net", "--no-map-gw", "--no-netns-quit"),
        *("--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"),
        *("--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra"),
        *("--address", _GATE_OUTER, "--netmask", str(_PREFIX), "--gateway", _HELPER, *names),
        # Root of its user namespace, or of the host: else it becomes nobody, who may not enter the sandbox's.
        *("--runas", "0:0", "--ns-ifname", "outer", "--userns", "/proc/self/fd/0", "--netns", "/proc/self/fd/1"),
        # Written when all is set up, and where errors are, too: so the end of the pipe says that it has failed.
        *("--pid", "/proc/self/fd/2"),
    )


async def _start(keeper: Keeper, ends: Ends, cgroup: Cgroup, spaces: tuple[int, int]) -> Spawned:
    """The helper, once it is ready."""
    path = pasta.program()
    if path is None:
        raise UnavailableError("pasta is not installed any more", hint=pasta.INSTALL)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        os.set_blocking(reader, False)
        reached("before network.start", ends.label)
        try:
            spawned = await keeper.spawn(
                f"{ends.prefix}{_HELD_HELPER}/{os.urandom(8).hex()}",
                _argv(path, asks_helper=ends.asks_helper),
                env={"PATH": pasta.PATH, "LC_ALL": "C"},
                cgroup_procs=cgroup.entry,
                fds=[*spaces, writer],
            )
        except SpawnFailed as error:
            raise BackendError(f"the network helper of {ends.label!r} cannot be started: {error.strerror}") from error
        finally:
            os.close(writer)
        reached("after network.start", ends.label)
        try:
            await _await_ready(reader, ends.label)
        except BaseException:
            pidfds.send_signal(spawned.pidfd, signal.SIGKILL)
            os.close(spawned.pidfd)
            raise
        return spawned
    finally:
        os.close(reader)


async def _await_ready(reader: int, label: str) -> None:
    """Read what it says until that is its pid."""
    said = b""
    with anyio.move_on_after(_START_SECONDS):
        while not re.search(rb"^\d+\n", said, re.MULTILINE) and len(said) < _LONGEST_SAID:
            await anyio.wait_readable(reader)
            piece = os.read(reader, 4096)
            if not piece:
                raise BackendError(
                    f"cannot connect sandbox {label!r}: pasta has ended: {_words(said) or 'it said nothing'}",
                    hint="It needs an interface with a default route on the host, and /dev/net/tun.",
                    log=said.decode(errors="replace"),
                )
            said += piece
        return
    raise BackendError(
        f"cannot connect sandbox {label!r}: pasta was not ready within {_START_SECONDS:g} s",
        log=said.decode(errors="replace"),
    )


def _words(said: bytes) -> str:
    """Its complaints, but for the one that nobody reads the system's log."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines()]
    return "; ".join(line for line in lines if line and not line.endswith("to syslog"))[:400]
