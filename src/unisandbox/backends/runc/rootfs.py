"""Plans root file systems as lists of mount operations (see `host.jobs`), without doing anything.

Kind "host": a read-only skeleton with this machine's /usr and a synthesised /etc, made once per engine and cloned as
one tree for each sandbox. Kind "dir": an overlay over the directory, whose ids are mapped, or the directory read-only.
What is written goes to one bounded layer per sandbox.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from unisandbox.api import Dns, Mount, Resources, Rootfs, SandboxSpec
from unisandbox.api.resources import LEAST_DISK
from unisandbox.api.units import GIB
from unisandbox.network.pasta import NAME_SERVER

Op = dict[str, object]

_SAFE: Final = ["nosuid", "nodev"]
SAFE_READONLY: Final = ["readonly", "nosuid", "nodev"]
# Where programs live on hosts that have not merged them into /usr, and links to /usr where they have.
_PROGRAM_DIRECTORIES: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_EMPTY_DIRECTORIES: Final = ("dev", "home", "media", "mnt", "opt", "proc", "run", "srv", "sys", "tmp")
# What /etc holds: trees that are bound, and files that are copied when everybody may read them.
_ETC_TREES: Final = ("alternatives", "ssl/certs")
_ETC_FILES: Final = ("ld.so.cache", "localtime")
_ETC_PER_SANDBOX: Final = ("hostname", "hosts", "resolv.conf")
_NSSWITCH: Final = "passwd: files\ngroup: files\nhosts: files dns\nnetworks: files\nprotocols: files\nservices: files\n"
_LARGEST_ETC_FILE: Final = 1 << 20
# The kernel's own ratio for ext4 is one inode per 16 KiB; a tmpfs inode costs about 1 KiB, so small files fit twice.
_BYTES_PER_INODE: Final = 8192
_LARGEST_TMPFS: Final = GIB

WRITABLE: Final = ("tmp", "run", "home")
"""What can be written in a read-only root file system, too."""


def root_attributes(rootfs: Rootfs) -> list[str]:
    """Those of the mount that is the root directory."""
    return SAFE_READONLY if rootfs.readonly else _SAFE


class Layer(NamedTuple):
    """The bounded place for what a sandbox writes.

    Attributes:
        size: bytes; None: not bounded.
        in_memory: a tmpfs, charged to the sandbox; otherwise a sparse ext4 image.
    """

    size: int | None
    in_memory: bool

    @classmethod
    def of(cls, resources: Resources) -> Layer:
        """A tmpfs while it is at most half of the memory (measured: 0.05 ms against 20 ms and more for an image)."""
        size = resources.disk_limit
        if size is None:
            return cls(None, in_memory=True)
        room = _LARGEST_TMPFS if resources.memory is None else resources.memory // 2
        return cls(size, in_memory=size <= max(room, LEAST_DISK))

    def ops(self, path: str, image: str, first_id: int) -> list[Op]:
        """Mount it at `path` (made), and make the directories that every root file system has in it."""
        ops: list[Op] = [{"op": "mkdir", "path": path}]
        if self.in_memory:
            size = self.size or 0  # 0 is "not bounded" for a tmpfs; source: tmpfs(5)
            ops.append(
                {
                    "op": "tmpfs",
                    "path": path,
                    "size": size,
                    "inodes": size and max(size // _BYTES_PER_INODE, 1024),
                    "uid": first_id,
                    "gid": first_id,
                    "attributes": _SAFE,
                }
            )
        else:
            ops.append(
                {
                    "op": "image",
                    "path": path,
                    "image": image,
                    "size": self.size,
                    "unlink": True,
                    "uid": first_id,
                    "gid": first_id,
                    "attributes": _SAFE,
                }
            )
        return ops


class Identity(NamedTuple):
    """What a sandbox's /etc says about it."""

    hostname: str
    hosts: str
    resolv_conf: str

    @classmethod
    def of(cls, spec: SandboxSpec, hostname: str) -> Identity:
        """hosts(5) and resolv.conf(5) for the spec."""
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback", f"127.0.1.1 {hostname}"]
        lines += [f"{address} {name}" for name, address in spec.hosts.items()]
        return cls(hostname, "\n".join(lines) + "\n", _resolv_conf(spec))

    def files(self) -> dict[str, str]:
        """By name below /etc."""
        return {"hostname": self.hostname + "\n", "hosts": self.hosts, "resolv.conf": self.resolv_conf}


def _resolv_conf(spec: SandboxSpec) -> str:
    dns = spec.dns
    if dns is None:
        if spec.network.kind == "host":
            return _text("/etc/resolv.conf") or ""
        dns = Dns()
        if spec.network.kind == "user":
            dns = Dns(servers=(NAME_SERVER,))
    lines = [f"nameserver {server}" for server in dns.servers]
    if dns.search:
        lines.append(f"search {' '.join(dns.search)}")
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    return "".join(line + "\n" for line in lines)


def _text(path: str) -> str | None:
    """A small file's text, if everybody may read it."""
    content = _world_readable(path)
    return None if content is None else content.decode("utf-8", "replace")


def _world_readable(path: str) -> bytes | None:
    try:
        if not os.stat(path).st_mode & 0o004:
            return None
        with open(path, "rb") as file:
            return file.read(_LARGEST_ETC_FILE)
    except OSError:
        return None


def _passwd() -> str:
    shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    return (
        f"root:x:0:0:root:/root:{shell}\n"
        f"user:x:1000:1000:user:/home/user:{shell}\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    )


_GROUP: Final = "root:x:0:\ntty:x:5:\nuser:x:1000:\nnogroup:x:65534:\n"


def host_tree(path: str, *, local: bool) -> list[Op]:
    """Build the skeleton of kind "host" at `path`: this machine's programs and nothing of its data."""
    ops: list[Op] = [{"op": "mkdir", "path": path}]
    ops += [{"op": "mkdir", "path": f"{path}/{name}"} for name in (*_EMPTY_DIRECTORIES, "etc", "etc/ssl", "usr", "var")]
    ops += [
        {"op": "symlink", "path": f"{path}/root", "target": "home/root"},
        {"op": "symlink", "path": f"{path}/var/run", "target": "/run"},
        {"op": "symlink", "path": f"{path}/var/tmp", "target": "/tmp"},
        _bind(os.path.realpath("/usr"), f"{path}/usr"),
    ]
    if not local and os.path.isdir("/usr/local"):
        ops.append({"op": "tmpfs", "path": f"{path}/usr/local", "size": 4096, "inodes": 1, "attributes": SAFE_READONLY})
    for name in _PROGRAM_DIRECTORIES:
        if os.path.islink(f"/{name}"):
            ops.append({"op": "symlink", "path": f"{path}/{name}", "target": os.readlink(f"/{name}")})
        elif os.path.isdir(f"/{name}"):
            ops += [{"op": "mkdir", "path": f"{path}/{name}"}, _bind(f"/{name}", f"{path}/{name}")]
    return ops + _etc(f"{path}/etc")


def _etc(path: str) -> list[Op]:
    ops: list[Op] = [
        {"op": "file", "path": f"{path}/passwd", "content": _passwd()},
        {"op": "file", "path": f"{path}/group", "content": _GROUP},
        {"op": "file", "path": f"{path}/nsswitch.conf", "content": _NSSWITCH},
    ]
    ops += [{"op": "symlink", "path": f"{path}/{name}", "target": f"../run/etc/{name}"} for name in _ETC_PER_SANDBOX]
    for name in _ETC_FILES:
        content = _world_readable(f"/etc/{name}")
        if content is not None:
            ops.append({"op": "file", "path": f"{path}/{name}", "base64": _base64(content)})
    for name in _ETC_TREES:
        source = os.path.realpath(f"/etc/{name}")
        if os.path.isdir(source):
            ops += [{"op": "mkdir", "path": f"{path}/{name}"}, _bind(source, f"{path}/{name}")]
    return ops


def _base64(content: bytes) -> str:
    import base64

    return base64.b64encode(content).decode()


def not_shown(program: str, rootfs: Rootfs) -> str:
    """Why a program of this machine is not inside; "" when it is, or is none."""
    if rootfs.kind != "host" or ("/" in program and not os.path.isabs(program)):
        return ""
    import shutil  # heavy, and only for the words of an error

    where = shutil.which(program)
    if where is None:
        return ""
    directory, name = os.path.split(where)
    # Both the place and what is there must be inside: either may be a link from /usr to elsewhere, or the other way.
    ways = [os.path.join(os.path.realpath(directory), name), os.path.realpath(where)]
    said = f"{where} exists on this machine, but rootfs 'host' shows only programs below /usr"
    if not all(way.startswith("/usr/") for way in ways):
        leads = "" if ways[1] == where else f", and it is a link to {ways[1]}"
        return f"{said}{leads}. Install it there, or mount its directory with Mount.bind()."
    if not rootfs.local and any(way.startswith("/usr/local/") for way in ways):
        return f"{said} without /usr/local: use Rootfs.host(local=True)."
    return ""


def _bind(source: str, path: str) -> Op:
    return {"op": "bind", "source": source, "path": path, "attributes": SAFE_READONLY}


def _writable(place: Place, identity: Identity) -> list[Op]:
    """The directories that can be written, below the layer of `place`."""
    layer, first_id = place.layer, place.first_id
    owner = {"uid": first_id, "gid": first_id}
    user = {"uid": first_id + 1000, "gid": first_id + 1000}
    ops: list[Op] = [
        {"op": "mkdir", "path": f"{layer}/tmp", "mode": 0o1777, **owner},
        {"op": "mkdir", "path": f"{layer}/run", **owner},
        {"op": "mkdir", "path": f"{layer}/run/etc", **owner},
        {"op": "mkdir", "path": f"{layer}/home", **owner},
        {"op": "mkdir", "path": f"{layer}/home/root", "mode": 0o700, **owner},
    ]
    if place.others:
        ops.append({"op": "mkdir", "path": f"{layer}/home/user", "mode": 0o700, **user})
    return ops + [
        {"op": "file", "path": f"{layer}/run/etc/{name}", "content": text, **owner}
        for name, text in identity.files().items()
    ]


def _shadow_writable(work: str, layer: str, root: str) -> list[Op]:
    """Mount the writable directories of `layer` over those of `root`."""
    return [
        {
            "op": "bind",
            "source": f"{work}{layer}/{name}",
            "path": f"{root}/{name}",
            "recursive": False,
            "attributes": _SAFE,
        }
        for name in WRITABLE
    ]


class Place(NamedTuple):
    """Where one container's root file system is built.

    Attributes:
        work: the sandbox's directory in the keeper's file system; operations are below it.
        root: where the root file system is mounted, below `work`.
        layer: the directory in the bounded layer that takes its writes, below `work`.
        base: a directory of its own outside of the layer, below `work`.
        first_id: the host's id of root inside.
        mapped: it has a user namespace of its own, to whose ids those of files of the host are mapped.
        others: there are more users than root.
    """

    work: str
    root: str
    layer: str
    base: str
    first_id: int
    mapped: bool
    others: bool = True


def until_served(ops: list[Op]) -> tuple[list[Op], list[Op]]:
    """What can be done before a program serves what one of these mounts, and what waits for it; see `root_ops`."""
    after = next((number for number, op in enumerate(ops, 1) if op["op"] == "fuse"), len(ops))
    return ops[:after], ops[after:]


def root_ops(
    place: Place,
    rootfs: Rootfs,
    identity: Identity,
    mounts: Sequence[Mount],
    shared_host: str,
    *,
    served: bool = False,
) -> list[Op]:
    """Build a root file system.

    Args:
        place: where.
        rootfs: of kind "host", or "dir" whose directory is the first descriptor of the request.
        identity: what its /etc says.
        mounts: what is mounted into it; looked at only to make mount points.
        shared_host: path of the engine's skeleton of kind "host"; "" makes one of its own.
        served: a program lays the writable layer over the directory, which is to be found at `place.base`.
    """
    owner = {"uid": place.first_id, "gid": place.first_id}
    ops: list[Op] = [{"op": "mkdir", "path": place.root}]
    if place.layer.count("/") > 1:
        ops.append({"op": "mkdir", "path": place.layer, "parents": True, **owner})
    if rootfs.kind == "host":
        source = shared_host
        outside = [m.target for m in mounts if not m.target.startswith(tuple(f"/{name}/" for name in WRITABLE))]
        if outside or not source:
            # The skeleton is shared and read-only: one of its own, with the mount points in it.
            ops += host_tree(place.base, local=rootfs.local)
            for mount in mounts:
                if mount.target in outside:
                    ops += _mount_point(f"{place.base}{mount.target}", mount, place.first_id)
            source = f"{place.work}{place.base}"
        ops += _writable(place, identity)
        ops.append({"op": "bind", "source": source, "path": place.root, "attributes": SAFE_READONLY})
        return ops + _shadow_writable(place.work, place.layer, place.root)
    if rootfs.readonly:
        # A directory in front of the user's that holds the mount points, so that nothing is written into his.
        ops.append({"op": "mkdir", "path": place.base, **owner})
        ops += [{"op": "mkdir", "path": f"{place.base}/{name}", **owner} for name in (*_EMPTY_DIRECTORIES, "etc")]
        ops += [
            {"op": "file", "path": f"{place.base}/etc/{name}", "content": text, **owner}
            for name, text in identity.files().items()
        ]
        for mount in mounts:
            ops += _mount_point(f"{place.base}{mount.target}", mount, place.first_id)
        ops += _writable(place, identity)
        ops.append(
            {
                "op": "overlay",
                "path": place.root,
                # Not mapped: before Linux 6.3 a tmpfs cannot be.
                "front": [f"{place.work}{place.base}"],
                "lower": [{"fd": 0}],
                "idmap": place.mapped,
                "attributes": _SAFE,
            }
        )
        return ops + _shadow_writable(place.work, place.layer, place.root)
    upper = f"{place.layer}/upper"
    ops += [
        {"op": "mkdir", "path": upper, **owner},
        {"op": "mkdir", "path": f"{place.layer}/work", **owner},
        {"op": "mkdir", "path": f"{upper}/etc", **owner},
    ]
    ops += [
        {"op": "file", "path": f"{upper}/etc/{name}", "content": text, **owner}
        for name, text in identity.files().items()
    ]
    if served:
        ops += [
            {"op": "mkdir", "path": place.base},
            # As an overlay sees it: without what is mounted in it.
            {**_bind("", place.base), "source": {"fd": 0}, "recursive": False},
            {"op": "fuse", "path": place.root, "name": "fuse", "attributes": _SAFE},
        ]
    else:
        ops.append(
            {
                "op": "overlay",
                "path": place.root,
                "lower": [{"fd": 0}],
                "upper": f"{place.work}{upper}",
                "work": f"{place.work}{place.layer}/work",
                "idmap": place.mapped,
                "attributes": _SAFE,
            }
        )
    modes = {"tmp": 0o1777}
    return ops + [
        {"op": "mkdir", "path": f"{place.root}/{name}", "mode": modes.get(name, 0o755), "follow": False, **owner}
        for name in ("dev", "proc", "sys", "tmp", "run")
    ]


def _mount_point(path: str, mount: Mount, first_id: int) -> list[Op]:
    """What a mount is mounted on; a directory for a directory, a file for a file."""
    owner = {"uid": first_id, "gid": first_id}
    if mount.source and not os.path.isdir(mount.source):
        parent = os.path.dirname(path)
        return [{"op": "mkdir", "path": parent, "parents": True, **owner}, {"op": "file", "path": path, **owner}]
    return [{"op": "mkdir", "path": path, "parents": True, **owner}]


def mount_ops(place: Place, mounts: Sequence[Mount], first_fd: int) -> list[Op]:
    """Mount what the user asked for, in this order; sources are descriptors of the request from `first_fd` on."""
    ops: list[Op] = []
    fd = first_fd
    for mount in mounts:
        path = f"{place.root}{mount.target}"
        attributes = SAFE_READONLY if mount.readonly else _SAFE
        if not mount.source:
            ops += [
                {"op": "mkdir", "path": path, "parents": True, "uid": place.first_id, "gid": place.first_id},
                {
                    "op": "tmpfs",
                    "path": path,
                    "size": mount.size or 0,
                    "inodes": max((mount.size or 0) // _BYTES_PER_INODE, 1024),
                    "mode": 0o1777,
                    "uid": place.first_id,
                    "gid": place.first_id,
                    "attributes": attributes,
                },
            ]
            continue
        ops.append(
            {
                "op": "bind",
                "source": {"fd": fd},
                "path": path,
                "create": True,
                "uid": place.first_id,
                "gid": place.first_id,
                "idmap": mount.idmap and place.mapped,
                "attributes": attributes,
            }
        )
        fd += 1
    return ops
