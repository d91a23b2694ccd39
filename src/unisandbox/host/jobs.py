"""Jobs: short lists of mechanical steps which run in a worker, a fork of the keeper. Standard library only.

A job runs as root in the keeper's own mount namespace, alone in its process, which takes another job after it: so the
only thing of the process that a step may leave changed is its mount namespace. Its steps come as JSON, so this module
checks every field and turns steps into calls of `namespaces` and `mounts`. An unknown field is an error, never ignored.

Steps are `{"do": NAME, ...}`; fields without "=" are required.

- `namespaces`: `kinds` (of user, net, ipc, uts), `user=null` (the n-th fd of the request: a user namespace that is
  there already, in place of the kind), `uid_map=null`, `gid_map=null` (rows `[inside, outside, count]`; both, with
  either), `hostname=null`, `domainname=null`, `sysctls={}` (strings by dotted name), `loopback=true`. Makes them, the
  others owned by the "user" one; names their fds by kind; result `{"inodes": {kind: number}}`.
- `detached`: `name`, `size`, `inodes`, `mode=0o755`, `directories={}` (modes by relative path, each after the one that
  it is in). Names an fd of a tmpfs with these directories that is mounted nowhere, to build on (Linux 6.15). It lasts
  as long as this fd, with all that is mounted in it.
- `mounts`: `root` (an absolute path without symbolic links, or `{"name": s}`), `ops`: see `mount_operations`; result
  `{"unmapped": [paths]}`: mounts whose ids could not be mapped although `idmap` was "try".
- `mount_namespace`: makes a mount namespace for the steps that follow, and names its fd "mnt". All that they mount ends
  with it, and no other job or program sees it, nor is slowed down by it.
- `enter`: `fd` (the n-th of the request). Enters a mount namespace that a former job made.
- `unmount`: `path`, `rmdir=false` (also remove the then empty directory; a missing one is fine). Everything at and
  below `path`, at once. Result `{"unmounted": n}`.
- `remove_tree`: `path`. Removes a directory with all below it; never follows a link, never enters a mount.
- `given`: `fd` (the n-th of the request), `name`. Names it for later steps; as "user" it must be a user namespace.
- `give`: `fd` (the n-th of the request), `uid`, `gid`. Gives the file behind it to these ids.
- `cable`: `fd` (the n-th of the request: a network namespace), `peer` (what a former step has named: another one),
  `name`, `peer_name`, `mtu`, `address`, `peer_address` (both IPv4), `prefix`. Makes two interfaces that are one cable
  between them, with these addresses, both up; in the first one the peer is the default gateway.
- `read`: `fd` (the n-th of the request: a root directory), `path`, `most`. Result `{"base64": s}`: the first bytes of a
  regular file below it, null where there is none.
- `no_attributes`: `path` (a source: see `job`). Makes sure that extended attributes cannot be had there.
- `dirfd`: `path` (a source: see `job`), `name`. Names an O_PATH fd of a directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from unisandbox.host import mount_operations, mounts, namespaces, netlink, syscalls
from unisandbox.host.boundary import reached
from unisandbox.host.job import Fields, Job, strings
from unisandbox.host.removal import remove_tree
from unisandbox.host.tree import Tree

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Callable


class StepError(Exception):
    """A step failed; what the job had mounted is unmounted again, and nothing is left of it.

    Attributes:
        index: which step, from 0.
        do: its kind.
        errno: the kernel's error, EINVAL for a step that is wrongly written.
        message: what failed and why.
    """

    def __init__(self, index: int, do: str, errno: int, message: str) -> None:
        super().__init__(message)
        self.index = index
        self.do = do
        self.errno = errno
        self.message = message


def run(
    steps: list[dict[str, object]], fds: list[int], *, leave_children: bool = False
) -> tuple[dict[str, object], dict[str, int]]:
    """Run `steps` in order in the calling process.

    Args:
        steps: see the module's text.
        fds: descriptors that came with the request; they stay the caller's.
        leave_children: leave killed children to the caller to be reaped, who may be in a hurry to answer first.

    Returns:
        `{"steps": [one result for each]}`, and the named descriptors, which now are the caller's.

    Raises:
        StepError: a step failed; whatever the job had mounted or opened is undone.
    """
    job = Job(fds, leave_children)
    results: list[dict[str, object]] = []
    do = "job"
    try:
        for step in steps:
            fields = Fields(step)
            do = fields.text("do")
            action = STEPS.get(do)
            if action is None:
                raise ValueError(f"unknown step {do!r} (known: {', '.join(STEPS)})")
            reached("before step.*", do)
            result = action(job, fields)
            fields.end()
            results.append(result)
            reached("after step.*", do)
    except BaseException as error:
        job.undo()
        if isinstance(error, OSError):
            raise StepError(len(results), do, error.errno or errno.EIO, error.strerror or str(error)) from error
        if isinstance(error, ValueError):
            raise StepError(len(results), do, errno.EINVAL, str(error)) from error
        raise
    job.close()
    return {"steps": results}, job.named


def _id_map(rows: list[object]) -> namespaces.IdMap:
    result = []
    for row in rows:
        if not (isinstance(row, list) and len(row) == 3 and all(type(n) is int and n >= 0 for n in row)):
            raise ValueError(f"a row of an id map is [inside, outside, count], got {row!r}")
        result.append((row[0], row[1], row[2]))
    return result


def _namespaces(job: Job, fields: Fields) -> dict[str, object]:
    sysctls = fields.any("sysctls") or {}
    if not isinstance(sysctls, dict) or not all(isinstance(text, str) for pair in sysctls.items() for text in pair):
        raise ValueError(f"field 'sysctls' must have strings by name, got {sysctls!r}")
    given = fields.number_or_none("user")
    user_fd = None if given is None else job.given(given)
    made = namespaces.create(
        strings("kinds", fields.items("kinds")),
        user_fd=user_fd,
        uid_map=_id_map(fields.items("uid_map", required=False)) or None,
        gid_map=_id_map(fields.items("gid_map", required=False)) or None,
        hostname=fields.text_or_none("hostname"),
        domainname=fields.text_or_none("domainname"),
        sysctls=sysctls,
        loopback=fields.flag("loopback", True),
        leave_child=job.leave_children,
    )
    if user_fd is not None:
        made["user"] = os.dup(user_fd)
    for kind, fd in made.items():
        job.name(kind, fd)
    return {"inodes": {kind: namespaces.namespace_inode(fd) for kind, fd in made.items()}}


def _mounts(job: Job, fields: Fields) -> dict[str, object]:
    root = fields.any("root")
    if isinstance(root, dict):
        fd, owned = job.source(root)
        try:
            tree = Tree(fd)
        finally:
            if owned:
                os.close(fd)
    elif isinstance(root, str) and "\0" not in root:
        tree = Tree(root)
    else:
        raise ValueError(f"field 'root' must be a path or name a descriptor, got {root!r}")
    job.trees.append(tree)
    unmapped: list[object] = []
    for number, values in enumerate(fields.items("ops")):
        op_fields = Fields(values)
        op = op_fields.text("op")
        path = op_fields.text("path")
        try:
            action = mount_operations.OPERATIONS.get(op)
            if action is None:
                raise ValueError(f"unknown operation (known: {', '.join(mount_operations.OPERATIONS)})")
            reached("before mount.*", op)
            if not action(job, tree, path, op_fields):
                unmapped.append(path)
            op_fields.end()
        except OSError as error:
            raise OSError(error.errno, f"{op} {path} (operation {number}): {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{op} {path} (operation {number}): {error}") from error
    return {"unmapped": unmapped}


def _unmount(job: Job, fields: Fields) -> dict[str, object]:
    path = fields.text("path")
    if not path.startswith("/") or os.path.normpath(path) == "/":
        raise ValueError(f"an absolute path below the root is wanted, got {path!r}")
    rmdir = fields.flag("rmdir", False)
    done = mounts.unmount_below(path)
    if rmdir:
        with contextlib.suppress(FileNotFoundError):  # an ending may be repeated
            os.rmdir(path)
    return {"unmounted": done}


def _remove_tree(job: Job, fields: Fields) -> dict[str, object]:
    remove_tree(fields.text("path"))
    return {}


def _dirfd(job: Job, fields: Fields) -> dict[str, object]:
    name = fields.text("name")
    source, owned = job.source(fields.any("path"))
    if not owned:
        source = os.dup(source)
    if not stat.S_ISDIR(os.fstat(source).st_mode):
        os.close(source)
        raise OSError(errno.ENOTDIR, f"what is to be named {name!r} is no directory")
    job.name(name, source)
    return {}


def _detached(job: Job, fields: Fields) -> dict[str, object]:
    options = [("source", "tmpfs"), ("size", str(fields.number("size"))), ("nr_inodes", str(fields.number("inodes")))]
    options.append(("mode", f"{fields.number('mode', 0o755):o}"))
    directories = fields.any("directories") or {}
    if not isinstance(directories, dict):
        raise ValueError(f"field 'directories' must have modes by path, got {directories!r}")
    name = fields.text("name")
    fd = mounts.new_mount("tmpfs", options, syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV)
    job.name(name, fd)
    for path, mode in directories.items():
        _make_directory(fd, path, mode)
    return {}


def _make_directory(root: int, path: object, mode: object) -> None:
    """In a new file system, which holds nothing but what we have made there: no path in it can lead astray."""
    if not isinstance(path, str) or not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise ValueError(f"the path of a directory must be relative and plain, got {path!r}")
    if type(mode) is not int or not 0 <= mode <= 0o7777:
        raise ValueError(f"the mode of directory {path!r} must be permission bits, got {mode!r}")
    os.mkdir(path, dir_fd=root)
    os.chmod(path, mode, dir_fd=root)  # does not depend on our umask


def _mount_namespace(job: Job, fields: Fields) -> dict[str, object]:
    del fields
    syscalls.unshare(syscalls.CLONE_NEWNS)
    job.name("mnt", os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
    return {}


def _enter(job: Job, fields: Fields) -> dict[str, object]:
    syscalls.setns(job.given(fields.number("fd")), syscalls.CLONE_NEWNS)
    return {}


def _given(job: Job, fields: Fields) -> dict[str, object]:
    number, name = fields.number("fd"), fields.text("name")
    fd = job.given(number)
    if name == "user" and (kind := namespaces.kind_of(fd)) != "user":
        raise ValueError(f"descriptor {number} is a namespace of kind {kind}, not a user namespace")
    job.name(name, os.dup(fd))
    return {}


def _cable(job: Job, fields: Fields) -> dict[str, object]:
    network, peer = job.given(fields.number("fd")), fields.text("peer")
    if peer not in job.named:
        raise ValueError(f"no step before this one has named a descriptor {peer!r}")
    name, peer_name = fields.text("name"), fields.text("peer_name")
    mtu, prefix = fields.number("mtu"), fields.number("prefix")
    address, gateway = fields.text("address"), fields.text("peer_address")

    def here() -> None:
        netlink.add_pair(name, peer_name, job.named[peer], mtu)
        netlink.add_address(name, address, prefix)
        netlink.set_up(name)
        netlink.add_default_route(name, gateway)

    def there() -> None:
        netlink.add_address(peer_name, gateway, prefix)
        netlink.set_up(peer_name)

    namespaces.inside_network(network, here)
    namespaces.inside_network(job.named[peer], there)
    return {}


def _give(job: Job, fields: Fields) -> dict[str, object]:
    # By its path, as nothing can be done with a descriptor that is open as a path only.
    os.chown(f"/proc/self/fd/{job.given(fields.number('fd'))}", fields.number("uid"), fields.number("gid"))
    return {}


def _read(job: Job, fields: Fields) -> dict[str, object]:
    root, path, most = job.given(fields.number("fd")), fields.text("path"), fields.number("most")
    try:
        probe = mounts.open_below(root, path, os.O_PATH, follow=True)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES}:
            raise
        return {"base64": None}
    try:
        # What is opened is what was looked at: no device, and no FIFO, whose writer would see it.
        if not stat.S_ISREG(os.fstat(probe).st_mode):
            return {"base64": None}
        with open(f"/proc/self/fd/{probe}", "rb", buffering=0) as file:
            content = file.read(most)
    finally:
        os.close(probe)
    import binascii

    return {"base64": binascii.b2a_base64(content, newline=False).decode()}


def _no_attributes(job: Job, fields: Fields) -> dict[str, object]:
    source, owned = job.source(fields.any("path"))
    try:
        os.listxattr(f"/proc/self/fd/{source}")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return {}
    finally:
        if owned:
            os.close(source)
    raise OSError(errno.EPERM, "extended attributes are served, although they were to be left out")


STEPS: dict[str, Callable[[Job, Fields], dict[str, object]]] = {
    "namespaces": _namespaces,
    "detached": _detached,
    "mounts": _mounts,
    "mount_namespace": _mount_namespace,
    "enter": _enter,
    "unmount": _unmount,
    "remove_tree": _remove_tree,
    "given": _given,
    "give": _give,
    "cable": _cable,
    "read": _read,
    "no_attributes": _no_attributes,
    "dirfd": _dirfd,
}
