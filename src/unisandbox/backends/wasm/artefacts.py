"""OCI layouts on disk as root directories: Wasm artefacts, and ordinary images for os wasip1 or wasi.

A layout is a stranger's: sizes and digests are checked before anything is used, layers are unpacked within a directory
of the engine's, bounded, without devices, owners or set-uid bits, and no name in them leads out of it (openat2).
Source: OCI image-spec (image-layout.md, manifest.md, layer.md); the Wasm OCI artefact of CNCF's TAG Runtime.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import tarfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import IO, Any, Final, Literal

import anyio
import anyio.lowlevel
import attrs

from unisandbox.api import InvalidArgumentError, UnsupportedError
from unisandbox.api.units import GIB, KIB, MIB
from unisandbox.backends.wasm.capabilities import NAME
from unisandbox.backends.wasm.layers import LayerFile
from unisandbox.backends.wasm.places import Turns
from unisandbox.host import syscalls
from unisandbox.host.keeper import Guard
from unisandbox.host.removal import remove_tree, removing
from unisandbox.host.services import Host

LARGEST_ROOT: Final = 2 * GIB
"""Bytes of all files of one image."""

MOST_UNUSED: Final = 8
LARGEST_UNUSED: Final = GIB
"""Images that nobody uses: how many stay, and bytes of them together."""

_MOST_FILES: Final = 100_000
_LARGEST_DOCUMENT: Final = 4 * MIB
_LARGEST_BLOB: Final = GIB
_PIECE: Final = MIB
_LARGEST_HEADERS: Final = 32 * KIB
"""Of one file in a layer: two names of PATH_MAX and some attributes."""
_MOST_COMMON_HEADERS: Final = 64
"""That one layer has for all files to come: each file gets a copy."""
_WASM_CONFIG: Final = "application/vnd.wasm.config.v0+json"
_INDEXES: Final = frozenset(
    {"application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"}
)
_MODULES: Final = frozenset(
    {
        "application/wasm",
        # What runwasi used before the artefact was agreed on.
        "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
        "application/vnd.wasm.content.layer.v1+wasm",
    }
)
_TARS: Final[Mapping[str, bool]] = {  # and whether gzip has packed it
    "application/vnd.oci.image.layer.v1.tar": False,
    "application/vnd.oci.image.layer.v1.tar+gzip": True,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": True,
}
_SYSTEMS: Final = frozenset({"wasip1", "wasi"})
_WHITEOUT: Final = ".wh."
_OPAQUE: Final = ".wh..wh..opq"
_TITLE: Final = "org.opencontainers.image.title"
_DEPTH: Final = 4
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_INSIDE: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS


@attrs.frozen
class Root:
    """A root directory, and what its image says about processes in it.

    Attributes:
        path: of the directory.
        env: settings of the image, below the user's.
        cwd: the image's working directory.
        image: digest of its manifest; empty: the directory is the user's own.
    """

    path: str
    env: Mapping[str, str] = attrs.field(factory=dict)
    cwd: str = "/"
    image: str = ""


@attrs.define(eq=False)
class _Unpacked:
    """An image on disk, and how many use it."""

    root: Root
    size: int
    guard: str
    users: int = 0


class Images:
    """The unpacked layouts of one engine.

    What somebody uses is there once. Of those that nobody uses the last ones stay for whoever comes next, `MOST_UNUSED`
    of them and `LARGEST_UNUSED` bytes; the keeper removes the rest at the engine's end.
    """

    def __init__(self, host: Host, *, components: bool = False) -> None:
        """Args: components: those of WASI 0.2 can be run."""
        self._host = host
        self._components = components
        self._unpacking = Turns()
        #: By digest, those that were used last at the end.
        self._made: OrderedDict[str, _Unpacked] = OrderedDict()

    async def take(self, path: str) -> Root:
        """The root directory that a path means: itself, or the files of the layout in it; `free` it after use.

        Raises:
            InvalidArgumentError: the layout is damaged, or has no image for Wasm.
            UnsupportedError: it holds a component.
        """
        if not _is_layout(path):
            return Root(path)
        layout = _Layout(path, components=self._components)
        manifest, digest = await layout.manifest()
        async with self._unpacking.of(digest):
            made = self._made.get(digest)
            if made is None:
                made = self._made[digest] = await self._unpack(layout, manifest, digest)
            made.users += 1
        return made.root

    async def free(self, *roots: Root) -> None:
        """Nobody looks at these any more, nor at what is mounted from them; once for each `take`."""
        for root in roots:
            made = self._made.get(root.image)
            if made is not None:
                made.users -= 1
                self._made.move_to_end(root.image)
        unused = [made for made in self._made.values() if not made.users]
        while len(unused) > MOST_UNUSED or sum(made.size for made in unused) > LARGEST_UNUSED:
            oldest = unused.pop(0)
            del self._made[oldest.root.image]
            await self._remove(oldest.root.path, oldest.guard)

    async def _remove(self, path: str, guard: str) -> None:
        """Remove an image; where that is cut or fails, the keeper does it at the engine's end."""
        above = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.closing(removing(above, os.path.basename(path), path)) as steps:
                for _ in steps:
                    await anyio.lowlevel.checkpoint()
        except OSError:
            return
        finally:
            os.close(above)
        if self._host.keeper.alive:
            await self._host.keeper.unguard([guard])

    async def _unpack(self, layout: _Layout, manifest: Mapping[str, Any], digest: str) -> _Unpacked:
        name = f"unisandbox-{self._host.engine_id}-wasm-{digest[:16]}-{secrets.token_hex(4)}"
        place, guard = os.path.join(self._host.disk_dir, name), f"engine/{name}"
        await self._host.keeper.guard([Guard(guard, "remove_tree", (place,))])
        os.mkdir(place, 0o700)
        try:
            root = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                config = await layout.unpack(manifest, root)
            finally:
                os.close(root)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._remove(place, guard)
            raise
        env = dict(text.partition("=")[::2] for text in _texts(config.get("Env")) if "=" in text)
        cwd = config.get("WorkingDir")
        cwd = cwd if isinstance(cwd, str) and cwd.startswith("/") else "/"
        return _Unpacked(Root(place, env, cwd, digest), layout.size, guard)


class _Layout:
    """One OCI image layout."""

    def __init__(self, path: str, *, components: bool) -> None:
        self._path = path
        self._systems = _SYSTEMS | {"wasip2"} if components else _SYSTEMS
        self._bytes = 0
        self._files = 0

    @property
    def size(self) -> int:
        """Bytes of the files that were unpacked of it."""
        return self._bytes

    async def manifest(self) -> tuple[Mapping[str, Any], str]:
        """The manifest of its image for Wasm, and its digest in hexadecimal."""
        index = self._json(os.path.join(self._path, "index.json"))
        for _ in range(_DEPTH):
            entry = self._chosen(index)
            document = await self._document(entry)
            if entry.get("mediaType") not in _INDEXES and "manifests" not in document:
                return document, self._digest(entry)
            index = document
        raise self._bad("its indexes are nested too deeply")

    def _chosen(self, index: Mapping[str, Any]) -> Mapping[str, Any]:
        entries = [entry for entry in index.get("manifests") or () if isinstance(entry, dict)]
        wanted = [entry for entry in entries if (entry.get("platform") or {}).get("architecture") == "wasm"]
        found = wanted or (entries if len(entries) == 1 else [])
        if len(found) != 1:
            raise self._bad(f"it has {len(entries)} images, and not exactly one for architecture wasm")
        return found[0]

    async def unpack(self, manifest: Mapping[str, Any], root: int) -> Mapping[str, Any]:
        """Make its files below `root`; what its configuration says about processes."""
        about, layers = manifest.get("config"), manifest.get("layers")
        if not isinstance(about, dict) or not isinstance(layers, list) or not layers:
            raise self._bad("its manifest has no configuration or no layers")
        config = await self._document(about)
        is_artefact = about.get("mediaType") == _WASM_CONFIG
        system = config.get("os")
        if system == "wasip2" and system not in self._systems:
            raise UnsupportedError(
                "a component (WASI 0.2)",
                NAME,
                alternatives=("wasm+process",),
                reason="its calls cannot be ended from outside",
            )
        if config.get("architecture") != "wasm" or system not in self._systems:
            raise self._bad(f"it is for {system}/{config.get('architecture')}, and not for wasip1/wasm")
        for number, layer in enumerate(layers):
            kind = layer.get("mediaType") if isinstance(layer, dict) else None
            if kind in _MODULES:
                await self._copy_module(layer, number, root)
            elif kind in _TARS and not is_artefact:
                await self._unpack_tar(layer, _TARS[str(kind)], root)
            else:
                raise UnsupportedError(f"a layer of type {kind!r}", NAME, hint="Unpack it and give the directory.")
        process = config.get("config")
        return process if isinstance(process, dict) else {}

    # --- blobs ---

    async def _document(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        async with self._blob(entry, _LARGEST_DOCUMENT) as file:
            return self._parsed(file.read(), self._digest(entry))

    @contextlib.asynccontextmanager
    async def _blob(self, entry: Mapping[str, Any], most: int) -> AsyncIterator[IO[bytes]]:
        """A blob, opened once and to the byte what the entry says."""
        wanted = self._digest(entry)
        size = entry.get("size")
        path = os.path.join(self._path, "blobs", "sha256", wanted)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._bad(f"blob sha256:{wanted} cannot be read: {error.strerror}") from error
        with _buffered(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                raise self._bad(f"blob sha256:{wanted} has {status.st_size} bytes, {size!r} were promised")
            if status.st_size > most:
                raise self._bad(f"blob sha256:{wanted} has {status.st_size} bytes; at most {most} are read")
            digest = hashlib.sha256()
            while piece := file.read(_PIECE):
                digest.update(piece)
                await anyio.lowlevel.checkpoint()
            if digest.hexdigest() != wanted:
                raise self._bad(f"blob sha256:{wanted} has digest sha256:{digest.hexdigest()}")
            file.seek(0)
            yield file

    def _digest(self, entry: Mapping[str, Any]) -> str:
        match = _DIGEST.fullmatch(str(entry.get("digest")))
        if match is None:
            raise self._bad(f"{entry.get('digest')!r:.80} is no SHA-256 digest")
        return match[1]

    def _json(self, path: str) -> Mapping[str, Any]:
        try:
            with open(path, "rb") as file:
                return self._parsed(file.read(_LARGEST_DOCUMENT + 1), os.path.basename(path))
        except OSError as error:
            raise self._bad(f"{os.path.basename(path)}: {error.strerror}") from error

    def _parsed(self, data: bytes, what: str) -> Mapping[str, Any]:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"{what} is no JSON") from error
        if not isinstance(document, dict):
            raise self._bad(f"{what} is no JSON object")
        return document

    def _bad(self, why: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"the OCI layout {self._path} cannot be used: {why}")

    # --- files ---

    async def _copy_module(self, layer: Mapping[str, Any], number: int, root: int) -> None:
        """A module that is a layer: a file in the root directory, named as its title says."""
        title = str((layer.get("annotations") or {}).get(_TITLE) or "")
        name = os.path.basename(title) if title else ("main.wasm" if number == 0 else f"main{number}.wasm")
        if name in {"", ".", ".."} or "\0" in name or len(os.fsencode(name)) > 255:
            raise self._bad(f"a layer has the title {title!r:.80}")
        async with self._blob(layer, _LARGEST_BLOB) as file:
            await self._write(file, root, name if name.endswith(".wasm") else f"{name}.wasm", 0o755)

    async def _unpack_tar(self, layer: Mapping[str, Any], zipped: bool, root: int) -> None:
        made: set[str] = set()
        async with self._blob(layer, _LARGEST_BLOB) as blob:
            file = LayerFile(blob, zipped=zipped)
            file.allow(_LARGEST_HEADERS, headers=True)
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
                    while (member := archive.next()) is not None:
                        archive.members = []  # it would keep them all
                        if len(archive.pax_headers) > _MOST_COMMON_HEADERS:
                            raise self._bad(f"a layer has more than {_MOST_COMMON_HEADERS} headers for all its files")
                        self._count(1, 0)
                        await self._unpack_member(archive, file, member, root, made)
                        await anyio.lowlevel.checkpoint()
                        file.allow(_LARGEST_HEADERS, headers=True)
            except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError) as error:
                raise self._bad(f"layer {self._digest(layer)[:12]}: {error}") from error

    async def _unpack_member(
        self, archive: tarfile.TarFile, file: LayerFile, member: tarfile.TarInfo, root: int, made: set[str]
    ) -> None:
        parts = [part for part in member.name.split("/") if part not in {"", "."}]
        if ".." in parts:
            raise self._bad(f"a layer has a file {member.name!r:.80}")
        if not parts:
            return
        *above, name = parts
        with self._directory(root, above) as parent:
            if name == _OPAQUE:
                for other in os.listdir(parent):
                    if "/".join([*above, other]) not in made:
                        _remove(parent, other)
                return
            if name.startswith(_WHITEOUT):
                _remove(parent, name.removeprefix(_WHITEOUT))
                return
            made.update("/".join(parts[: n + 1]) for n in range(len(parts)))
            if member.isdir():
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=parent)
                return
            _remove(parent, name)
            if member.isreg():
                content = archive.extractfile(member)
                assert content is not None  # noqa: S101 (a regular file has one)
                await self._write(content, parent, name, 0o755 if member.mode & 0o111 else 0o644, file)
            elif member.issym():
                os.symlink(member.linkname, name, dir_fd=parent)
            elif member.islnk():
                self._link(root, member.linkname, parent, name)
            else:
                raise self._bad(f"a layer has {member.name!r:.80}, which is neither file, directory nor link")

    @staticmethod
    @contextlib.contextmanager
    def _directory(root: int, parts: list[str]) -> Iterator[int]:
        """The directory of these names below the root, made where it is missing; links in it stay inside."""
        path = "/"
        for part in parts:
            parent = syscalls.openat2(root, path, os.O_PATH | os.O_DIRECTORY, resolve=_INSIDE)
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=parent)
            finally:
                os.close(parent)
            path = f"{path}{part}/"
        fd = syscalls.openat2(root, path, os.O_RDONLY | os.O_DIRECTORY, resolve=_INSIDE)
        try:
            yield fd
        finally:
            os.close(fd)

    def _link(self, root: int, target: str, parent: int, name: str) -> None:
        source = syscalls.openat2(root, target or ".", os.O_PATH | os.O_NOFOLLOW, resolve=_INSIDE)
        try:
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise self._bad(f"a layer has a hard link to {target!r:.80}, which is no regular file")
            os.link(f"/proc/self/fd/{source}", name, dst_dir_fd=parent, follow_symlinks=True)
        finally:
            os.close(source)

    async def _write(
        self, source: IO[bytes], parent: int, name: str, mode: int, layer: LayerFile | None = None
    ) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with _buffered(os.open(name, flags, mode, dir_fd=parent), "wb") as file:
            while True:
                if layer is not None:
                    layer.allow(2 * _PIECE)  # the source has a buffer besides
                piece = source.read(_PIECE)
                if not piece:
                    break
                self._count(0, len(piece))
                file.write(piece)
                await anyio.lowlevel.checkpoint()

    def _count(self, files: int, size: int) -> None:
        self._files += files
        self._bytes += size
        if self._files > _MOST_FILES or self._bytes > LARGEST_ROOT:
            raise self._bad(f"it has more than {_MOST_FILES} files or {LARGEST_ROOT} bytes")


def _is_layout(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "oci-layout"))


def _buffered(fd: int, mode: Literal["rb", "wb"]) -> IO[bytes]:
    return open(fd, mode)


def _remove(parent: int, name: str) -> None:
    """Remove whatever has this name, if anything has."""
    if name in {"", ".", ".."} or "/" in name:
        return
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        remove_tree(f"{os.readlink(f'/proc/self/fd/{parent}')}/{name}")


def _texts(values: object) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
