"""Jobs: short lists of mechanical steps which run in a forked child of the keeper. Standard library only.

A job runs as root in the keeper's own mount namespace, alone in its process. Its steps come as JSON, so this module
checks every field and turns steps into calls of `namespaces` and `mounts`. An unknown field is an error, never ignored.

Steps are `{"do": NAME, ...}`; fields without "=" are required.

- `namespaces`: `kinds` (of user, net, ipc, uts), `uid_map=null`, `gid_map=null` (rows `[inside, outside, count]`; both,
  with "user"), `hostname=null`, `domainname=null`, `sysctls={}` (strings by dotted name), `loopback=true`. Makes them,
  the others owned by the new "user" one; names their fds by kind; result `{"inodes": {kind: number}}`.
- `mounts`: `root` (an absolute path without symbolic links), `ops`: see below; result `{"unmapped": [paths]}`: mounts
  whose ids could not be mapped although `idmap` was "try".
- `mount_namespace`: makes a mount namespace for the steps that follow, and names its fd "mnt". All that they mount ends
  with it, and no other job or program sees it, nor is slowed down by it.
- `enter`: `fd` (the n-th of the request). Enters a mount namespace that a former job made.
- `unmount`: `path`, `rmdir=false` (also remove the then empty directory; a missing one is fine). Everything at and
  below `path`, at once. Result `{"unmounted": n}`.
- `remove_tree`: `path`. Removes a directory with all below it; never follows a link, never enters a mount.
- `given`: `fd` (the n-th of the request), `name`. Names it for later steps; as "user" it must be a user namespace.
- `dirfd`: `path` (absolute, without symbolic links), `name`. Names an O_PATH fd of a directory.

Mount operations are `{"op": NAME, "path": "/below/root", ...}`. `follow=false` everywhere: symbolic links on the way
are followed, inside `root`. `attributes=[]`: of readonly, nosuid, nodev, noexec, nosymfollow.

- `mkdir`: `mode=0o755`, `uid=0`, `gid=0`, `parents=false`. One that exists stays as it is.
- `file`: `content=null` (text; null: an empty file, or the one that is there), `base64=null` (the same as bytes),
  `mode=0o644`, `uid=0`, `gid=0`.
- `symlink`: `target`, `uid=0`, `gid=0`.
- `tmpfs`: `size` (bytes), `inodes`, `mode=0o755`, `uid=0`, `gid=0`, `attributes`.
- `image`: `image` (path of this machine), `size=null` (bytes; make it), `uid=0`, `gid=0`, `attributes` (nosuid, nodev
  always), `unlink=false` (remove its name once it is mounted).
- `bind`: `source`, `recursive=true`, `attributes` (hold for the whole tree), `idmap=false` (true, or "try"),
  `create=false` (make the mount point, and directories above it), `detached=false` (the source is a tree that
  `mounts.detached_tree` made).
- `overlay`: `lower` (sources, the uppermost first), `front=[]` (lower ones above these whose ids are never mapped),
  `upper=null`, `work=null` (sources), `idmap=false`, `volatile=false`, `attributes`.
- `readonly`: `recursive=true`.

A source is an absolute path without symbolic links (a string), `{"fd": n}` (the n-th fd of the request), `{"name": s}`
(what a former step has named), or `{"below": directory, "path": path}` (a path as seen by a process with that root).
"""

from __future__ import annotations

import contextlib
import errno
import os

from unisandbox.host import mounts, namespaces, syscalls
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
    job = _Job(fds, leave_children)
    results: list[dict[str, object]] = []
    do = "job"
    try:
        for step in steps:
            fields = Fields(step)
            do = fields.text("do")
            action = _STEPS.get(do)
            if action is None:
                raise ValueError(f"unknown step {do!r} (known: {', '.join(_STEPS)})")
            result = action(job, fields)
            fields.end()
            results.append(result)
    except BaseException as error:
        job.undo()
        if isinstance(error, OSError):
            raise StepError(len(results), do, error.errno or errno.EIO, error.strerror or str(error)) from error
        if isinstance(error, ValueError):
            raise StepError(len(results), do, errno.EINVAL, str(error)) from error
        raise
    job.close()
    return {"steps": results}, job.named


class Fields:
    """The fields of one step or operation, each taken once and of the right type; `end` refuses what nobody took."""

    def __init__(self, values: object) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"an object is wanted, got {values!r}")
        self._values: dict[str, object] = dict(values)

    def _take(self, name: str, kind: type, default: object, *, required: bool) -> object:
        if name not in self._values:
            if required:
                raise ValueError(f"field {name!r} is missing")
            return default
        value = self._values.pop(name)
        if value is None and default is None and not required:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"field {name!r} must be of type {kind.__name__}, got {value!r}")
        return value

    def text(self, name: str) -> str:
        """A required string."""
        value = self._take(name, str, None, required=True)
        assert isinstance(value, str)  # noqa: S101 (for the type checker; _take has raised otherwise)
        if "\0" in value:
            raise ValueError(f"field {name!r} contains a NUL")
        return value

    def text_or_none(self, name: str) -> str | None:
        """A string that may be absent or null."""
        if self._values.get(name) is None:
            self._values.pop(name, None)
            return None
        return self.text(name)

    def number(self, name: str, default: int | None = None) -> int:
        """An integer that is not negative; required without a default."""
        value = self._take(name, int, default, required=default is None)
        assert isinstance(value, int)  # noqa: S101
        if value < 0:
            raise ValueError(f"field {name!r} must not be negative, got {value}")
        return value

    def number_or_none(self, name: str) -> int | None:
        """The same, absent or null."""
        if self._values.get(name) is None:
            self._values.pop(name, None)
            return None
        return self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._take(name, bool, default, required=False)
        return value is True

    def items(self, name: str, *, required: bool = True) -> list[object]:
        """A list."""
        if not required and self._values.get(name) is None:
            self._values.pop(name, None)
            return []
        value = self._take(name, list, None, required=True)
        assert isinstance(value, list)  # noqa: S101
        return value

    def any(self, name: str) -> object:
        """Whatever is there; None when absent."""
        return self._values.pop(name, None)

    def end(self) -> None:
        """Refuse fields that nobody asked for."""
        if self._values:
            raise ValueError(f"unknown field {', '.join(map(repr, self._values))}")


class _Job:
    """What one job has made so far."""

    def __init__(self, fds: list[int], leave_children: bool) -> None:
        self.fds = fds
        self.leave_children = leave_children
        self.named: dict[str, int] = {}
        self.trees: list[Tree] = []

    def name(self, name: str, fd: int) -> None:
        if name in self.named:
            os.close(fd)
            raise ValueError(f"two steps name a descriptor {name!r}")
        self.named[name] = fd

    def given(self, number: int) -> int:
        """The n-th descriptor that came with the request."""
        if number >= len(self.fds):
            raise ValueError(f"there is no descriptor {number}: {len(self.fds)} came with the request")
        return self.fds[number]

    def close(self) -> None:
        for tree in self.trees:
            tree.close()

    def undo(self) -> None:
        for tree in reversed(self.trees):
            tree.undo()
        for fd in self.named.values():
            os.close(fd)
        self.named = {}

    def source(self, value: object) -> tuple[int, bool]:
        """A descriptor of a source, and whether it is to be closed after use."""
        if isinstance(value, str):
            return mounts.open_source(value), True
        fields = Fields(value)
        name = fields.text_or_none("name")
        number = fields.number_or_none("fd")
        below = fields.text_or_none("below")
        if [name, number, below].count(None) != 2:
            raise ValueError("a source is a path, or has one of 'fd', 'name', 'below'")
        if below is not None:
            path = fields.text("path")
            fields.end()
            root = mounts.open_source(below)
            try:
                return mounts.open_below(root, path, os.O_PATH, follow=True), True
            finally:
                os.close(root)
        fields.end()
        if name is not None:
            if name not in self.named:
                raise ValueError(f"no step before this one has named a descriptor {name!r}")
            return self.named[name], False
        assert number is not None  # noqa: S101
        if number >= len(self.fds):
            raise ValueError(f"there is no descriptor {number}: {len(self.fds)} came with the request")
        return self.fds[number], False

    def userns(self, fields: Fields) -> tuple[int | None, bool]:
        """The user namespace to map ids by, and whether they must be mapped."""
        wanted = fields.any("idmap")
        if wanted is None or wanted is False:
            return None, False
        if wanted is not True and wanted != "try":
            raise ValueError(f"field 'idmap' must be true, false or 'try', got {wanted!r}")
        if "user" not in self.named:
            raise ValueError("ids can only be mapped after a step that names a user namespace 'user'")
        return self.named["user"], wanted is True


def _id_map(rows: list[object]) -> namespaces.IdMap:
    result = []
    for row in rows:
        if not (isinstance(row, list) and len(row) == 3 and all(type(n) is int and n >= 0 for n in row)):
            raise ValueError(f"a row of an id map is [inside, outside, count], got {row!r}")
        result.append((row[0], row[1], row[2]))
    return result


def _strings(name: str, values: list[object]) -> list[str]:
    strings = [value for value in values if isinstance(value, str)]
    if len(strings) != len(values):
        raise ValueError(f"field {name!r} must be a list of strings, got {values!r}")
    return strings


def _namespaces(job: _Job, fields: Fields) -> dict[str, object]:
    sysctls = fields.any("sysctls") or {}
    if not isinstance(sysctls, dict) or not all(isinstance(text, str) for pair in sysctls.items() for text in pair):
        raise ValueError(f"field 'sysctls' must have strings by name, got {sysctls!r}")
    made = namespaces.create(
        _strings("kinds", fields.items("kinds")),
        uid_map=_id_map(fields.items("uid_map", required=False)) or None,
        gid_map=_id_map(fields.items("gid_map", required=False)) or None,
        hostname=fields.text_or_none("hostname"),
        domainname=fields.text_or_none("domainname"),
        sysctls=sysctls,
        loopback=fields.flag("loopback", True),
        leave_child=job.leave_children,
    )
    for kind, fd in made.items():
        job.name(kind, fd)
    return {"inodes": {kind: namespaces.namespace_inode(fd) for kind, fd in made.items()}}


def _mounts(job: _Job, fields: Fields) -> dict[str, object]:
    tree = Tree(fields.text("root"))
    job.trees.append(tree)
    unmapped: list[object] = []
    for number, values in enumerate(fields.items("ops")):
        op_fields = Fields(values)
        op = op_fields.text("op")
        path = op_fields.text("path")
        try:
            action = _OPS.get(op)
            if action is None:
                raise ValueError(f"unknown operation (known: {', '.join(_OPS)})")
            if not action(job, tree, path, op_fields):
                unmapped.append(path)
            op_fields.end()
        except OSError as error:
            raise OSError(error.errno, f"{op} {path} (operation {number}): {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{op} {path} (operation {number}): {error}") from error
    return {"unmapped": unmapped}


def _unmount(job: _Job, fields: Fields) -> dict[str, object]:
    path = fields.text("path")
    if not path.startswith("/") or os.path.normpath(path) == "/":
        raise ValueError(f"an absolute path below the root is wanted, got {path!r}")
    rmdir = fields.flag("rmdir", False)
    done = mounts.unmount_below(path)
    if rmdir:
        with contextlib.suppress(FileNotFoundError):  # an ending may be repeated
            os.rmdir(path)
    return {"unmounted": done}


def _remove_tree(job: _Job, fields: Fields) -> dict[str, object]:
    remove_tree(fields.text("path"))
    return {}


def _dirfd(job: _Job, fields: Fields) -> dict[str, object]:
    path, name = fields.text("path"), fields.text("name")
    flags = os.O_PATH | os.O_DIRECTORY
    resolve = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    job.name(name, syscalls.openat2(syscalls.AT_FDCWD, path, flags, resolve=resolve))
    return {}


def _mount_namespace(job: _Job, fields: Fields) -> dict[str, object]:
    del fields
    syscalls.unshare(syscalls.CLONE_NEWNS)
    job.name("mnt", os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
    return {}


def _enter(job: _Job, fields: Fields) -> dict[str, object]:
    syscalls.setns(job.given(fields.number("fd")), syscalls.CLONE_NEWNS)
    return {}


def _given(job: _Job, fields: Fields) -> dict[str, object]:
    number, name = fields.number("fd"), fields.text("name")
    fd = job.given(number)
    if name == "user" and (kind := namespaces.kind_of(fd)) != "user":
        raise ValueError(f"descriptor {number} is a namespace of kind {kind}, not a user namespace")
    job.name(name, os.dup(fd))
    return {}


def _op_mkdir(job: _Job, tree: Tree, path: str, fields: Fields) -> bool:
    mode, uid, gid = fields.number("mode", 0o755), fields.number("uid", 0), fields.number("gid", 0)
    tree.mkdir(path, mode, uid, gid, parents=fields.flag("parents", False), follow=fields.flag("follow", False))
    return True


def _op_file(job: _Job, tree: Tree, path: str, fields: Fields) -> bool:
    text, encoded = fields.text_or_none("content"), fields.text_or_none("base64")
    if text is not None and encoded is not None:
        raise ValueError("either 'content' or 'base64'")
    content = text.encode() if text is not None else None
    if encoded is not None:
        import binascii

        content = binascii.a2b_base64(encoded, strict_mode=True)
    mode, uid, gid = fields.number("mode", 0o644), fields.number("uid", 0), fields.number("gid", 0)
    tree.file(path, content, mode, uid, gid, follow=fields.flag("follow", False))
    return True


def _op_symlink(job: _Job, tree: Tree, path: str, fields: Fields) -> bool:
    uid, gid = fields.number("uid", 0), fields.number("gid", 0)
    tree.symlink(fields.text("target"), path, uid, gid, follow=fields.flag("follow", False))
    return True


def _attributes(fields: Fields) -> int:
    return mounts.attribute_bits(_strings("attributes", fields.items("attributes", required=False)))


def _op_tmpfs(job: _Job, tree: Tree, path: str, fields: Fields) -> bool:
    tree.tmpfs(
        path,
        size=fields.number("size"),
        inodes=fields.number("inodes"),
        mode=fields.number("mode", 0o755),
        uid=fields.number("uid", 0),
        gid=fields.number("gid", 0),
        attributes=_attributes(fields),
        follow=fields.flag("follow", False),
    )
    return True


def _op_image(job: _Job, tree: Tree, path: str, fields: Fields) -> bool:
    tree.image(
        path,
        fields.text("image"),
        size=fields.number_or_none("size"),
        uid=fields.number("uid", 0),
        gid=fields.number("gid", 0),
        attributes=_attributes(fields),
        unlink=fields.flag("unlink", False),
        follow=fields.flag("follow", False),
    )
    return True


def _op_bind(job: _Job, tree: Tree, path: str, fields: Fields) -> bool:
    userns_fd, required = job.userns(fields)
    recursive, attributes = fields.flag("recursive", True), _attributes(fields)
    create, detached, follow = (
        fields.flag("create", False),
        fields.flag("detached", False),
        fields.flag("follow", False),
    )
    source, owned = job.source(fields.any("source"))
    try:
        mapped = tree.bind(
            source,
            path,
            recursive=recursive,
            attributes=attributes,
            userns_fd=userns_fd,
            require_idmap=required,
            create=create,
            detached=detached,
            follow=follow,
        )
    finally:
        if owned:
            os.close(source)
    return mapped or userns_fd is None


def _op_overlay(job: _Job, tree: Tree, path: str, fields: Fields) -> bool:
    userns_fd, required = job.userns(fields)
    attributes, volatile, follow = _attributes(fields), fields.flag("volatile", False), fields.flag("follow", False)
    opened: list[tuple[int, bool]] = []

    def source(value: object) -> int:
        opened.append(job.source(value))
        return opened[-1][0]

    try:
        lower = [source(value) for value in fields.items("lower")]
        front = [source(value) for value in fields.items("front", required=False) or ()]
        upper, work = fields.any("upper"), fields.any("work")
        mapped = tree.overlay(
            path,
            lower=lower,
            front=front,
            upper=None if upper is None else source(upper),
            work=None if work is None else source(work),
            userns_fd=userns_fd,
            require_idmap=required,
            attributes=attributes,
            volatile=volatile,
            follow=follow,
        )
    finally:
        for fd, owned in opened:
            if owned:
                os.close(fd)
    return mapped or userns_fd is None


def _op_readonly(job: _Job, tree: Tree, path: str, fields: Fields) -> bool:
    tree.readonly(path, recursive=fields.flag("recursive", True), follow=fields.flag("follow", False))
    return True


_STEPS: dict[str, Callable[[_Job, Fields], dict[str, object]]] = {
    "namespaces": _namespaces,
    "mounts": _mounts,
    "mount_namespace": _mount_namespace,
    "enter": _enter,
    "unmount": _unmount,
    "remove_tree": _remove_tree,
    "given": _given,
    "dirfd": _dirfd,
}

_OPS: dict[str, Callable[[_Job, Tree, str, Fields], bool]] = {
    "mkdir": _op_mkdir,
    "file": _op_file,
    "symlink": _op_symlink,
    "tmpfs": _op_tmpfs,
    "image": _op_image,
    "bind": _op_bind,
    "overlay": _op_overlay,
    "readonly": _op_readonly,
}
