"""Network interfaces, addresses and routes, as rtnetlink(7) makes them. Standard library only.

Each function acts in the network namespace of the calling thread and returns when the kernel has done it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

_NEWLINK, _NEWADDR, _NEWROUTE = 16, 20, 24
_ERROR = 2
_REQUEST, _ACK, _EXCL, _CREATE = 0x1, 0x4, 0x200, 0x400
_IFF_UP = 1
_NESTED = 0x8000
# Attributes; source: linux/if_link.h, if_addr.h, rtnetlink.h, veth.h.
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 3, 4, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_GATEWAY = 4, 5
_MAIN_TABLE, _BY_STATIC, _UNICAST = 254, 4, 1

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=8BI")


def add_pair(name: str, peer: str, peer_network: int, mtu: int) -> None:
    """Make two interfaces that are one cable: `name` here, `peer` in the network namespace of that descriptor.

    Raises:
        OSError: EOPNOTSUPP: this kernel has no such interfaces (CONFIG_VETH); EEXIST: a name is taken.
    """
    # Not up yet: the first of them has no other end before both are made (ENOTCONN, drivers/net/veth.c).
    down = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    other = down + _text(_IFLA_IFNAME, peer) + _number(_IFLA_MTU, mtu) + _number(_IFLA_NET_NS_FD, peer_network)
    data = _attribute(_INFO_DATA | _NESTED, _attribute(_VETH_INFO_PEER | _NESTED, other))
    info = _attribute(_IFLA_LINKINFO | _NESTED, _text(_INFO_KIND, "veth") + data)
    _ask(_NEWLINK, down + _text(_IFLA_IFNAME, name) + _number(_IFLA_MTU, mtu) + info, f"interface {name!r}")


def set_up(name: str) -> None:
    """Let an interface take and send."""
    body = _LINK.pack(socket.AF_UNSPEC, 0, socket.if_nametoindex(name), _IFF_UP, _IFF_UP)
    _ask(_NEWLINK, body, f"interface {name!r}", flags=0)


def add_address(name: str, address: str, prefix: int) -> None:
    """Give an interface an IPv4 address with the network around it."""
    raw = socket.inet_aton(address)
    head = _ADDRESS.pack(socket.AF_INET, prefix, 0, 0, socket.if_nametoindex(name))
    body = head + _attribute(_IFA_LOCAL, raw) + _attribute(_IFA_ADDRESS, raw)
    _ask(_NEWADDR, body, f"address {address}/{prefix} of {name!r}")


def add_default_route(name: str, gateway: str) -> None:
    """Send all IPv4 that is for nobody else over this interface, by way of `gateway`."""
    head = _ROUTE.pack(socket.AF_INET, 0, 0, 0, _MAIN_TABLE, _BY_STATIC, 0, _UNICAST, 0)
    body = head + _attribute(_RTA_GATEWAY, socket.inet_aton(gateway))
    body += _number(_RTA_OIF, socket.if_nametoindex(name))
    _ask(_NEWROUTE, body, f"default route by {gateway} of {name!r}")


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _ask(kind: int, body: bytes, what: str, *, flags: int = _CREATE | _EXCL) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body)
        # The kernel acts within the send: its answer is there.
        answer = kernel.recv(1 << 16, socket.MSG_DONTWAIT)
    if len(answer) < _HEADER.size + 4 or _HEADER.unpack_from(answer)[1] != _ERROR:
        raise OSError(errno.EPROTO, f"{what}: the kernel's answer is none")
    number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
    if number:
        raise OSError(number, f"{what}: {os.strerror(number)}")
