"""What a sandbox sees: this machine's /usr, read-only, a few files and devices, and a bounded place to write to.

Everything here is a plan: a list of mount operations that the keeper carries out (see `unisandbox.host.jobs`).
"""

from __future__ import annotations

import os
from typing import Final

from unisandbox.api import InvalidArgumentError, SandboxSpec

IDS: Final = 65_536
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_DEVICES: Final = ("full", "null", "random", "tty", "urandom", "zero")
_DIRECTORIES: Final = (
    "dev", "dev/shm", "etc", "home", "media", "mnt", "opt", "proc", "run", "srv", "sys", "tmp", "usr", "var",
)  # fmt: skip
_LINKS: Final = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1"}
_SAFE: Final = ["nosuid", "nodev"]
_PASSWD: Final = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"  # noqa: S105 (the file's name)
# Name to user, group and home.
_USERS: Final = {"root": (0, 0, "/root"), "user": (1000, 1000, "/home/user")}

Op = dict[str, object]


def disk(spec: SandboxSpec) -> tuple[int | None, bool]:
    """(bytes of the writable layer, whether it fits into memory): `Resources.disk` says what is promised."""
    size, memory = spec.resources.disk_limit, spec.resources.memory
    return size, size is None or size <= max((memory or 1 << 31) // 2, 65_536)


def ops(base: str, spec: SandboxSpec, hostname: str, first_id: int, image: str) -> list[Op]:
    """Build it at `/root` below the directory `base` of the keeper; `/rw` holds what is written."""
    owner = {"uid": first_id, "gid": first_id}
    user = {"uid": first_id + 1000, "gid": first_id + 1000}
    size, in_memory = disk(spec)
    layer: Op = {"op": "image", "path": "/rw", "image": image, "size": size, "unlink": True, **owner}
    if in_memory:
        # The kernel needs about a kilobyte for each file; 0 is "no limit". Source: tmpfs(5).
        layer = {"op": "tmpfs", "path": "/rw", "size": size or 0, "inodes": (size or 0) // 8192, **owner}
    made: list[Op] = [_dir("/rw"), {**layer, "attributes": _SAFE}, _dir("/root")]
    made.append({"op": "tmpfs", "path": "/root", "size": 1 << 20, "inodes": 256, "attributes": _SAFE})
    made += [_dir(f"/root/{name}") for name in _DIRECTORIES]
    links = {"root": "home/root", "var/run": "/run", "var/tmp": "/tmp"}
    links |= {f"dev/{name}": target for name, target in {**_LINKS, "stderr": "/proc/self/fd/2"}.items()}
    links |= {name: os.readlink(f"/{name}") for name in ("bin", "sbin", "lib", "lib64") if os.path.islink(f"/{name}")}
    made += [{"op": "symlink", "path": f"/root/{name}", "target": target} for name, target in links.items()]
    made.append(_bind("/usr", "/root/usr", "readonly", *_SAFE))
    if os.path.isdir("/usr/local"):
        made.append({"op": "tmpfs", "path": "/root/usr/local", "size": 4096, "inodes": 1, "attributes": ["readonly"]})
    if os.path.isdir("/etc/alternatives"):
        made += [_dir("/root/etc/alternatives"), _bind("/etc/alternatives", "/root/etc/alternatives", "readonly")]
    hosts = f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n"
    files = {"passwd": _PASSWD, "group": "root:x:0:\nuser:x:1000:\n", "hosts": hosts, "hostname": f"{hostname}\n"}
    made += [{"op": "file", "path": f"/root/etc/{name}", "content": text} for name, text in files.items()]
    made += [_bind(f"/dev/{name}", f"/root/dev/{name}", "nosuid", "noexec") for name in _DEVICES]
    shm = {"size": 64 << 20, "inodes": 8192, "mode": 0o1777, "attributes": [*_SAFE, "noexec"]}
    made.append({"op": "tmpfs", "path": "/root/dev/shm", **shm, **owner})
    made += [{**_dir("/rw/tmp", 0o1777), **owner}, {**_dir("/rw/run"), **owner}, {**_dir("/rw/home"), **owner}]
    made += [{**_dir("/rw/home/root", 0o700), **owner}, {**_dir("/rw/home/user", 0o700), **user}]
    made += [_bind(f"{base}/rw/{name}", f"/root/{name}", *_SAFE) for name in ("tmp", "run", "home")]
    made.append({"op": "restrict", "path": "/root", "recursive": False, "attributes": ["readonly"]})
    return made


def user_of(text: str | None) -> tuple[int, int, str]:
    """User, group and home of "name", "1000" or "1000:1001".

    Raises:
        InvalidArgumentError: a name that is not in the sandbox's /etc/passwd.
    """
    name, _, group = (text or "root").partition(":")
    numbers = {str(uid): (uid, gid, home) for uid, gid, home in _USERS.values()}
    uid, gid, home = {**numbers, **_USERS}.get(name) or (int(name) if name.isdecimal() else -1, 0, "/")
    if group:
        gid = int(group) if group.isdecimal() else _USERS.get(group, (0, -1, ""))[1]
    if not (0 <= uid < IDS and 0 <= gid < IDS):
        raise InvalidArgumentError(f"user {text!r} is not known", hint=f"Use {', '.join(_USERS)} or a number.")
    return uid, gid, home


def _dir(path: str, mode: int = 0o755) -> Op:
    return {"op": "mkdir", "path": path, "mode": mode}


def _bind(source: str, path: str, *attributes: str) -> Op:
    return {"op": "bind", "source": source, "path": path, "create": True, "attributes": list(attributes)}
