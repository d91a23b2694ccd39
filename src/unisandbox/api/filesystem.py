"""What a container sees as its files: a root file system, and mounts in it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

import attrs

from unisandbox.api.by_fields import by_fields
from unisandbox.api.checks import is_of, is_one_of, kernel_text, several
from unisandbox.api.errors import InvalidArgumentError
from unisandbox.api.units import MIB, parse_size


@attrs.frozen
@by_fields
class Rootfs:
    """What a container sees as its files. Make it by `host()`, `dir()` or `image()`.

    Attributes:
        kind: "host", "dir" or "image".
        path: the directory of kind "dir", absolute.
        ref: the image's reference of kind "image".
        readonly: nothing outside /tmp, /run, /home and the mounts can be written; always so for kind "host".
        local: kind "host" shows /usr/local too.
    """

    kind: Literal["host", "dir", "image"] = attrs.field(validator=is_one_of("host", "dir", "image"))
    path: str = ""
    ref: str = ""
    readonly: bool = attrs.field(default=False, validator=is_of(bool))
    local: bool = attrs.field(default=False, validator=is_of(bool))

    def __attrs_post_init__(self) -> None:
        if (self.kind == "dir") != kernel_text(self.path, "rootfs path").startswith("/"):
            raise InvalidArgumentError(f"rootfs of kind {self.kind!r} with path {self.path!r}: only 'dir' has one")
        if self.kind == "dir" and os.path.normpath(self.path).strip("/") == "":
            raise InvalidArgumentError(
                "'/' cannot be a sandbox's root directory",
                hint="Use Rootfs.host() for this machine's programs without its data.",
            )
        if (self.kind == "image") != bool(kernel_text(self.ref, "image reference")):
            raise InvalidArgumentError(f"rootfs of kind {self.kind!r} with ref {self.ref!r}: only 'image' has one")

    @classmethod
    def host(cls, *, local: bool = False) -> Rootfs:
        """A curated view of this machine's programs: /usr read-only, a synthesised /etc, nothing of the user's."""
        return cls(kind="host", readonly=True, local=local)

    @classmethod
    def dir(cls, path: str | os.PathLike[str], *, readonly: bool = False) -> Rootfs:
        """A directory: read-only, or with a private layer on top that takes the writes. It is never changed itself."""
        return cls(kind="dir", path=os.path.abspath(kernel_text(os.fspath(path), "path")), readonly=readonly)

    @classmethod
    def image(cls, ref: str) -> Rootfs:
        """An OCI image by reference. Reserved: backends that cannot unpack one raise UnsupportedError."""
        return cls(kind="image", ref=ref)

    @classmethod
    def parse(cls, value: Rootfs | str | os.PathLike[str]) -> Rootfs:
        """ "host", a path with a "/" in it, or a Rootfs. Other names are images."""
        if isinstance(value, Rootfs):
            return value
        if not isinstance(value, str | os.PathLike):
            raise InvalidArgumentError(f"rootfs must be a Rootfs, 'host' or a path, got {value!r}")
        text = kernel_text(os.fspath(value), "rootfs")
        if value == "host":
            return cls.host()
        if not text:
            raise InvalidArgumentError("rootfs is empty", hint="Use 'host' or a path with a '/' in it.")
        if "/" in text or not isinstance(value, str):
            return cls.dir(text)
        return cls.image(text)


def _mount_size(value: int | str | None) -> int | None:
    return None if value is None else parse_size(value, "size of a mount")


def _target(value: str) -> str:
    parts = [part for part in kernel_text(value, "mount target").split("/") if part not in {"", "."}]
    if not value.startswith("/") or ".." in parts:
        raise InvalidArgumentError(f"mount target must be an absolute path without '..', got {value!r}")
    if not parts:
        raise InvalidArgumentError("nothing can be mounted on '/'", hint="That is what `rootfs` is for.")
    if parts[0] in {"proc", "sys", "dev"}:
        raise InvalidArgumentError(
            f"nothing can be mounted on or below '/{parts[0]}', got {value!r}", hint="The runtime mounts its own there."
        )
    return "/" + "/".join(parts)


@attrs.frozen
@by_fields
class Mount:
    """A directory or file of the host, or a private tmpfs, inside. Always nosuid and nodev.

    Attributes:
        target: absolute path inside.
        source: absolute path on the host; empty for a tmpfs. Opened once, when the sandbox is made.
        readonly: cannot be written, nor anything mounted below it.
        size: bytes of a tmpfs.
        idmap: files of the host's root belong to the sandbox's root, and so on for all ids (one mount, not the disk).
    """

    target: str = attrs.field(converter=_target)
    source: str = ""
    readonly: bool = attrs.field(default=True, validator=is_of(bool))
    size: int | None = attrs.field(default=None, converter=_mount_size)
    idmap: bool = attrs.field(default=True, validator=is_of(bool))

    def __attrs_post_init__(self) -> None:
        kernel_text(self.source, "mount source")
        if self.source and not os.path.isabs(self.source):
            raise InvalidArgumentError(f"mount source must be absolute, got {self.source!r}")
        if self.source and self.size is not None:
            raise InvalidArgumentError(f"mount {self.target!r}: only a tmpfs (no source) has a size")

    @classmethod
    def bind(cls, source: str | os.PathLike[str], target: str, *, readonly: bool = True, idmap: bool = True) -> Mount:
        """A directory or file of the host."""
        absolute = os.path.abspath(kernel_text(os.fspath(source), "mount source"))
        return cls(target=target, source=absolute, readonly=readonly, idmap=idmap)

    @classmethod
    def tmpfs(cls, target: str, *, size: int | str = 64 * MIB) -> Mount:
        """A private file system in memory."""
        return cls(target=target, readonly=False, size=parse_size(size))


def mounts_of(values: Iterable[Mount]) -> tuple[Mount, ...]:
    """A field of mounts, checked."""
    mounts = several(values, "mounts")
    for mount in mounts:
        if not isinstance(mount, Mount):
            raise InvalidArgumentError(
                f"mounts are Mount objects, got {mount!r}", hint="For example Mount.bind('/data', '/data')."
            )
    return mounts


def parents_first(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """By how deep their targets are, so that no mount hides another one below it; those equally deep as they were."""
    return tuple(sorted(mounts, key=lambda mount: mount.target.count("/")))
