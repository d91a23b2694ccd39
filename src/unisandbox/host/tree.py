"""A directory tree built from mounts, step by step, with the power to undo what was done. Standard library only.

Targets are looked up below the tree's root by openat2: what lies there may be a stranger's directory, full of symbolic
links that lead elsewhere. A mount is attached as the last act, when it has all its attributes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from unisandbox.host import loop, mounts, syscalls
from unisandbox.host.boundary import reached
from unisandbox.host.power import standing

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

_ATTACH: Final = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
_LOWERDIR_APPEND: Final = (6, 7)  # the Linux that lets layers of an overlay be named one by one


PROPAGATION: Final = {"private": syscalls.MS_PRIVATE, "slave": syscalls.MS_SLAVE, "shared": 0}
"""Of a copy of a mount, by word. It begins as its source's peer, and stays so with "shared"."""


class _Layers:
    """What an overlay is made of: descriptors of directories."""

    def __init__(self, lower: list[int], upper: int | None, work: int | None, volatile: bool) -> None:
        self.lower = lower
        self.upper = upper
        self.work = work
        self.volatile = volatile

    def options(self) -> list[tuple[str, str | None]]:
        """All options but the lower directories."""
        # A layer is a stranger's: what its extended attributes say about other files is not believed.
        options: list[tuple[str, str | None]] = [("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off")]
        if self.upper is not None:
            options += [("upperdir", f"/proc/self/fd/{self.upper}"), ("workdir", f"/proc/self/fd/{self.work}")]
            if self.volatile:
                options.append(("volatile", None))
        if standing.is_inside():
            # Nobody may write what is "trusted." there. Source: Documentation/filesystems/overlayfs.rst.
            options.append(("userxattr", None))
        return options


class Tree:
    """Builds below one directory. Paths are absolute as seen from there; "/" is the directory itself.

    Every method raises OSError with a message that names what it did not do. After a failure call `undo()`: it unmounts
    what this object has mounted, in reverse. `close()` keeps the mounts and gives up that possibility.
    """

    def __init__(self, root: str | int) -> None:
        """Open `root`: a path without a symbolic link in it, or a descriptor of a directory (which stays the caller's).

        Below the root of a detached mount more can be mounted since Linux 6.15. Source: do_move_mount, fs/namespace.c.
        """
        self._path = root if isinstance(root, str) else f"descriptor {root}"
        flags = os.O_PATH | os.O_DIRECTORY
        if isinstance(root, str):
            self._root_fd = syscalls.openat2(syscalls.AT_FDCWD, root, flags, resolve=mounts.NO_LINKS)
        else:
            self._root_fd = mounts.open_below(root, "/", flags)
        self._mounted: list[int] = []

    def undo(self) -> None:
        """Unmount what was mounted through this object, the last first, and close."""
        for fd in reversed(self._mounted):
            mounts.detach(fd)
        self.close()

    def close(self) -> None:
        """Close all descriptors; the mounts stay."""
        for fd in self._mounted:
            os.close(fd)
        if self._root_fd >= 0 and self._root_fd not in self._mounted:
            os.close(self._root_fd)
        self._mounted = []
        self._root_fd = -1

    def open(self, path: str, flags: int = os.O_PATH, *, follow: bool = False) -> int:
        """A descriptor of what lies at `path` in the tree."""
        return mounts.open_below(self._root_fd, path, flags, follow=follow)

    @contextlib.contextmanager
    def _parent(self, path: str, follow: bool) -> Iterator[tuple[int, str]]:
        """The directory that holds (or will hold) `path`, open while this context is, and the name in it."""
        parent_path, name = _split(path)
        if parent_path == "/":
            yield self._root_fd, name
            return
        parent = self.open(parent_path, os.O_PATH | os.O_DIRECTORY, follow=follow)
        try:
            yield parent, name
        finally:
            os.close(parent)

    def mkdir(
        self, path: str, mode: int = 0o755, uid: int = 0, gid: int = 0, *, parents: bool = False, follow: bool = False
    ) -> None:
        """Make a directory; one that exists stays as it is. `parents`: also what is missing above it, alike."""
        try:
            with self._parent(path, follow) as (parent, name):
                os.mkdir(name, 0o700, dir_fd=parent)
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except FileExistsError:
            os.close(self.open(path, os.O_PATH | os.O_DIRECTORY, follow=follow))  # ENOTDIR, ELOOP: no directory
            return
        except FileNotFoundError:
            parent_path, _ = _split(path)
            if not parents or parent_path == "/":
                raise
            self.mkdir(parent_path, mode, uid, gid, parents=True, follow=follow)
            self.mkdir(path, mode, uid, gid, follow=follow)
            return
        _own(fd, mode, uid, gid)

    def file(
        self,
        path: str,
        content: bytes | None = None,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        *,
        follow: bool = False,
    ) -> None:
        """Make a regular file with `content`. With None an empty one, and one that exists stays as it is.

        Raises:
            FileExistsError: something is there already (with content), or no regular file is (without).
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._parent(path, follow) as (parent, name):
            try:
                fd = os.open(name, flags, 0o600, dir_fd=parent)
            except FileExistsError:
                if content is None and stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                    return
                raise
        try:
            view = memoryview(content or b"")
            while view:
                view = view[os.write(fd, view) :]
        except BaseException:
            os.close(fd)
            raise
        _own(fd, mode, uid, gid)

    def symlink(self, target: str, path: str, uid: int = 0, gid: int = 0, *, follow: bool = False) -> None:
        """Make a symbolic link at `path` whose text is `target` (not looked at)."""
        with self._parent(path, follow) as (parent, name):
            os.symlink(target, name, dir_fd=parent)
            if uid or gid:
                os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)

    def tmpfs(
        self,
        path: str,
        *,
        size: int,
        inodes: int,
        mode: int = 0o755,
        uid: int = 0,
        gid: int = 0,
        attributes: int = 0,
        follow: bool = False,
    ) -> None:
        """Mount a tmpfs of at most `size` bytes and `inodes` files. Its pages are charged to their first writer."""
        options = [("source", "tmpfs"), ("size", str(size)), ("nr_inodes", str(inodes)), ("mode", f"{mode:o}")]
        options += [("uid", str(uid)), ("gid", str(gid))]
        self._attach(mounts.new_mount("tmpfs", options, attributes), path, follow)

    def image(
        self,
        path: str,
        image: str,
        *,
        size: int | None = None,
        uid: int = 0,
        gid: int = 0,
        attributes: int = 0,
        unlink: bool = False,
        follow: bool = False,
    ) -> None:
        """Mount the disk image at the path `image` (of this machine), always nosuid and nodev.

        With `size` it is made first (and removed if it cannot be mounted); without, it must exist. With `unlink` its
        name is removed once it is mounted: the loop device keeps the file, and the unmount frees it.
        """
        if size is not None:
            loop.make_image(image, size, uid, gid)
        try:
            device_fd, device = loop.attach(image)
            try:
                # noinit_itable: no kernel thread that fills the inode tables, hence the sparse file, in the background.
                options = [("source", device), ("discard", None), ("noinit_itable", None)]
                attributes |= syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
                mount_fd = mounts.new_mount("ext4", options, attributes)
            finally:
                os.close(device_fd)
            self._attach(mount_fd, path, follow)
        except BaseException:
            if size is not None:
                os.unlink(image)
            raise
        if unlink:
            reached("before image.unlink", image)
            os.unlink(image)
            reached("after image.unlink", image)

    def bind(
        self,
        source_fd: int,
        path: str,
        *,
        recursive: bool = True,
        attributes: int = 0,
        userns_fd: int | None = None,
        require_idmap: bool = True,
        idmap_below: bool = True,
        create: bool = False,
        uid: int = 0,
        gid: int = 0,
        detached: bool = False,
        propagation: str = "private",
        follow: bool = False,
    ) -> bool:
        """Mount what `source_fd` is open on (directory or file) at `path`.

        Args:
            source_fd: stays the caller's.
            path: the mount point.
            recursive: with everything mounted below; attributes then hold for all of it (a read-only mount that is
                not recursive leaves its submounts writable: mount(8) has the same trap in "rbind,ro").
            attributes: MOUNT_ATTR_* to set.
            userns_fd: map the ids of files by this user namespace.
            require_idmap: False: mount it unmapped where its file system cannot (overlayfs, FUSE, ...).
            idmap_below: with everything mounted below.
            create: make the mount point if it is missing, with what is missing above it.
            uid, gid: whom that belongs to.
            detached: `source_fd` is a detached tree already (`detached_tree`), and is used up.
            propagation: "private"; or what is mounted later on its source appears here ("slave"), and the other way
                round ("shared"), if the source passes that on.
            follow: see `mounts.open_below`.

        Returns:
            Whether ids are mapped.
        """
        tree = os.dup(source_fd) if detached else mounts.clone_source(source_fd, recursive)
        try:
            syscalls.mount_setattr(
                tree, "", set=attributes, propagation=PROPAGATION[propagation], recursive=recursive or detached
            )
            below = idmap_below and (recursive or detached)
            mapped = userns_fd is not None and mounts.idmap(tree, userns_fd, below, require_idmap)
            if create:
                self._make_mount_point(path, stat.S_ISDIR(os.fstat(tree).st_mode), (uid, gid), follow)
        except BaseException:
            os.close(tree)
            raise
        self._attach(tree, path, follow)
        return mapped

    def overlay(
        self,
        path: str,
        *,
        lower: list[int],
        upper: int | None = None,
        work: int | None = None,
        front: list[int] | None = None,
        userns_fd: int | None = None,
        require_idmap: bool = True,
        attributes: int = 0,
        volatile: bool = False,
        follow: bool = False,
    ) -> bool:
        """Mount an overlay of the `lower` directories (the uppermost first) with the writable `upper` at `path`.

        Args:
            path: the mount point.
            lower: descriptors of directories, at most 500.
            upper: where changes go; None: the overlay is read-only. With `work`, an empty directory beside it.
            work: see upper.
            front: lower directories above the others, whose ids are as they shall be and are not mapped.
            userns_fd: map the ids of the lower directories by this user namespace; `upper` has mapped ids as they are.
            require_idmap: False: leave those unmapped whose file system cannot.
            attributes: MOUNT_ATTR_* to set.
            volatile: never sync the upper directory (it is useless after a crash of the machine).
            follow: see `mounts.open_below`.

        Returns:
            Whether the ids of all lower directories are mapped.
        """
        if not lower or (upper is None) != (work is None):
            raise OSError(
                errno.EINVAL, "an overlay needs lower directories, and a work directory with its upper one", path
            )
        if upper is None:
            attributes |= syscalls.MOUNT_ATTR_RDONLY
        if userns_fd is None:
            mount_fd = _overlay_as_it_is(_Layers([*(front or []), *lower], upper, work, volatile), attributes)
            if mount_fd >= 0:
                self._attach(mount_fd, path, follow)
                return False
        staged: list[int] = []
        layered: list[int] = []
        mapped = userns_fd is not None
        target = self.open(path, follow=follow)
        try:
            for fd in lower:
                if userns_fd is None and mounts.can_be_cloned(fd):
                    layered.append(fd)
                    continue
                tree = mounts.clone_source(fd, False)
                staged.append(tree)
                layered.append(tree)
                syscalls.mount_setattr(tree, "", propagation=syscalls.MS_PRIVATE)
                if userns_fd is not None:
                    mapped = mounts.idmap(tree, userns_fd, False, require_idmap) and mapped
                # Before Linux 6.15 a layer must be mounted in our namespace: for a moment, where the overlay will be.
                syscalls.move_mount(tree, "", target, "", _ATTACH)
            layers = _Layers([*(front or []), *layered], upper, work, volatile)
            try:
                mount_fd = _overlay_mount(layers, attributes)
            except OSError as error:
                if error.errno != errno.EINVAL or standing.kernel() >= _LOWERDIR_APPEND:
                    raise
                mount_fd = self._overlay_old(layers, attributes, path, target, follow)
        finally:
            os.close(target)
            for fd in reversed(staged):
                mounts.detach(fd)  # the overlay has private copies
                os.close(fd)
        self._attach(mount_fd, path, follow)
        return mapped

    def fuse(self, path: str, *, attributes: int = 0, follow: bool = False) -> int:
        """Mount a file system at `path` that a program serves, which gets the descriptor that this returns.

        Everybody in this user namespace and those below may use it, as far as modes and owners let him; nobody outside.
        Until a program serves it, whoever looks at it waits; with the last copy of the descriptor it is dead
        (ENOTCONN).
        Source: fuse(4); fuse_allow_current_process, fs/fuse/dir.c.
        """
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            options: list[tuple[str, str | None]] = [("source", "fuse"), ("fd", str(device)), ("rootmode", "40000")]
            options += [("user_id", "0"), ("group_id", "0"), ("default_permissions", None), ("allow_other", None)]
            self._attach(mounts.new_mount("fuse", options, attributes), path, follow)
        except BaseException:
            os.close(device)
            raise
        return device

    def _overlay_old(self, layers: _Layers, attributes: int, path: str, target: int, follow: bool) -> int:
        """Mount by mount(2) on top of what is staged, and take a detached copy in its place."""
        _overlay_mount_old(layers, attributes, target)
        covers_root = not path.strip("/")
        top = mounts.open_source(self._path) if covers_root else self.open(path, follow=follow)
        try:
            return mounts.clone(top, False)
        finally:
            mounts.detach(top)
            os.close(top)

    def restrict(self, path: str, attributes: int, *, recursive: bool = True, follow: bool = False) -> None:
        """Give the mount at `path`, and all below it, these attributes (MOUNT_ATTR_*)."""
        fd = self.open(path, follow=follow)
        try:
            syscalls.mount_setattr(fd, "", set=attributes, recursive=recursive)
        except OSError as error:
            raise OSError(error.errno, f"restricting {path}: {error.strerror}", path) from None
        finally:
            os.close(fd)

    def _make_mount_point(self, path: str, directory: bool, owner: tuple[int, int], follow: bool) -> None:
        uid, gid = owner
        if directory:
            self.mkdir(path, uid=uid, gid=gid, parents=True, follow=follow)
            return
        try:
            self.file(path, uid=uid, gid=gid, follow=follow)
        except FileNotFoundError:
            self.mkdir(_split(path)[0], uid=uid, gid=gid, parents=True, follow=follow)
            self.file(path, uid=uid, gid=gid, follow=follow)
        except FileExistsError:  # a device, a socket, a link: whether it can be mounted on, the kernel says
            pass

    def _attach(self, mount_fd: int, path: str, follow: bool) -> None:
        """Move the detached mount to `path` and remember it; takes over `mount_fd`."""
        try:
            target = self.open(path, follow=follow)
            try:
                syscalls.move_mount(mount_fd, "", target, "", _ATTACH)
            finally:
                os.close(target)
        except OSError as error:
            os.close(mount_fd)
            raise OSError(error.errno, f"mounting on {self._path}:{path}: {error.strerror}", path) from None
        self._mounted.append(mount_fd)
        if not path.strip("/"):  # the root is covered: what comes next goes on top
            if self._root_fd not in self._mounted:
                os.close(self._root_fd)
            self._root_fd = mount_fd


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rstrip("/").rpartition("/")
    if name in {"", ".", ".."}:
        raise OSError(errno.EINVAL, f"{path!r} names nothing below the root", path)
    return parent or "/", name


def _own(fd: int, mode: int, uid: int, gid: int) -> None:
    """Set owner and mode of a new file, and close it. Modes do not depend on our umask."""
    try:
        if uid or gid:
            os.fchown(fd, uid, gid)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _overlay_mount(layers: _Layers, attributes: int) -> int:
    """A detached overlay. Layers are named through /proc/self/fd: short, and no part of a path can be an option."""
    options: list[tuple[str, str | None]] = [("lowerdir+", f"/proc/self/fd/{fd}") for fd in layers.lower]
    return mounts.new_mount("overlay", [("source", "overlay"), *options, *layers.options()], attributes)


def _overlay_as_it_is(layers: _Layers, attributes: int) -> int:
    """The same, if all layers are mounted in our namespace, or -1; asking by a clone takes longer.

    When a clone ends, as when anything is unmounted, the kernel waits until all processors have noticed: 0.1 ms, and
    several where they are busy. Source: namespace_unlock, fs/namespace.c.
    """
    if standing.kernel() < _LOWERDIR_APPEND:
        return -1
    try:
        return _overlay_mount(layers, attributes)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1


def _overlay_mount_old(layers: _Layers, attributes: int, target: int) -> None:
    """The same by mount(2) on top of `target`, for Linux before 6.7, where fsconfig takes 255 bytes for all layers.

    Source: fs/overlayfs/params.c ("lowerdir+" came with 6.7); strndup_user(_value, 256) in fs/fsopen.c. mount(2) takes
    a page of options: more than 200 layers.
    """
    lower = ":".join(f"/proc/self/fd/{fd}" for fd in layers.lower)
    data = ",".join(
        key if value is None else f"{key}={value}" for key, value in [("lowerdir", lower), *layers.options()]
    )
    if len(data) >= os.sysconf("SC_PAGE_SIZE"):
        raise OSError(errno.E2BIG, f"this kernel takes no overlay of {len(layers.lower)} layers (Linux 6.7 does)")
    syscalls.mount("overlay", f"/proc/self/fd/{target}", "overlay", _legacy_flags(attributes), data)


def _legacy_flags(attributes: int) -> int:
    # The first four MOUNT_ATTR_* have the values of MS_RDONLY, MS_NOSUID, MS_NODEV and MS_NOEXEC.
    return attributes & 0xF
