"""The operations of a job's `mounts` step. Standard library only; see `jobs`.

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
  `idmap_below=true` (false: not what is mounted below), `create=false` (make the mount point, and directories above
  it, for `uid=0` and `gid=0`), `detached=false` (the source is a tree that `mounts.detached_tree` made),
  `propagation="private"` (or "slave", "shared": see `Tree.bind`).
- `overlay`: `lower` (sources, the uppermost first), `front=[]` (lower ones above these whose ids are never mapped),
  `upper=null`, `work=null` (sources), `idmap=false`, `volatile=false`, `attributes`.
- `fuse`: `name`, `attributes`. Names an fd: that of the program which serves what is mounted. Others wait for it.
- `restrict`: `attributes` (what the mount at `path` has besides stays), `recursive=true`.
"""

from __future__ import annotations

import os

from unisandbox.host import mounts
from unisandbox.host.job import Fields, Job, strings
from unisandbox.host.tree import PROPAGATION, Tree

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Callable


def _op_mkdir(job: Job, tree: Tree, path: str, fields: Fields) -> bool:
    mode, uid, gid = fields.number("mode", 0o755), fields.number("uid", 0), fields.number("gid", 0)
    tree.mkdir(path, mode, uid, gid, parents=fields.flag("parents", False), follow=fields.flag("follow", False))
    return True


def _op_file(job: Job, tree: Tree, path: str, fields: Fields) -> bool:
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


def _op_symlink(job: Job, tree: Tree, path: str, fields: Fields) -> bool:
    uid, gid = fields.number("uid", 0), fields.number("gid", 0)
    tree.symlink(fields.text("target"), path, uid, gid, follow=fields.flag("follow", False))
    return True


def _attributes(fields: Fields) -> int:
    return mounts.attribute_bits(strings("attributes", fields.items("attributes", required=False)))


def _op_tmpfs(job: Job, tree: Tree, path: str, fields: Fields) -> bool:
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


def _op_image(job: Job, tree: Tree, path: str, fields: Fields) -> bool:
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


def _op_bind(job: Job, tree: Tree, path: str, fields: Fields) -> bool:
    userns_fd, required = job.userns(fields)
    recursive, attributes = fields.flag("recursive", True), _attributes(fields)
    create, detached, follow = (
        fields.flag("create", False),
        fields.flag("detached", False),
        fields.flag("follow", False),
    )
    propagation = fields.text_or_none("propagation") or "private"
    if propagation not in PROPAGATION:
        raise ValueError(f"field 'propagation' must be one of {', '.join(PROPAGATION)}, got {propagation!r}")
    source, owned = job.source(fields.any("source"))
    try:
        mapped = tree.bind(
            source,
            path,
            recursive=recursive,
            attributes=attributes,
            userns_fd=userns_fd,
            require_idmap=required,
            idmap_below=fields.flag("idmap_below", True),
            create=create,
            uid=fields.number("uid", 0),
            gid=fields.number("gid", 0),
            detached=detached,
            propagation=propagation,
            follow=follow,
        )
    finally:
        if owned:
            os.close(source)
    return mapped or userns_fd is None


def _op_overlay(job: Job, tree: Tree, path: str, fields: Fields) -> bool:
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


def _op_fuse(job: Job, tree: Tree, path: str, fields: Fields) -> bool:
    name = fields.text("name")
    job.name(name, tree.fuse(path, attributes=_attributes(fields), follow=fields.flag("follow", False)))
    return True


def _op_restrict(job: Job, tree: Tree, path: str, fields: Fields) -> bool:
    attributes, recursive = _attributes(fields), fields.flag("recursive", True)
    tree.restrict(path, attributes, recursive=recursive, follow=fields.flag("follow", False))
    return True


OPERATIONS: dict[str, Callable[[Job, Tree, str, Fields], bool]] = {
    "mkdir": _op_mkdir,
    "file": _op_file,
    "symlink": _op_symlink,
    "tmpfs": _op_tmpfs,
    "image": _op_image,
    "bind": _op_bind,
    "overlay": _op_overlay,
    "fuse": _op_fuse,
    "restrict": _op_restrict,
}
