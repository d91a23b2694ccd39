"""Mounts: made detached, found without following links, taken away at once. Standard library only.

Every mount is made detached (fsmount, open_tree) and gets its attributes while nobody can see it. All are private, but
for those that are asked to be otherwise: what is mounted on the host later does not appear in them (a submount that
came by propagation would be writable inside a read-only tree). Source: mount_setattr(2), open_tree(2), fsopen(2),
openat2(2), Documentation/filesystems/overlayfs.rst, sharedsubtree.rst, idmappings.rst.
"""

from __future__ import annotations

import errno
import os

from unisandbox.host import syscalls

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Final

ATTRIBUTES: Final = {
    "readonly": syscalls.MOUNT_ATTR_RDONLY,
    "nosuid": syscalls.MOUNT_ATTR_NOSUID,
    "nodev": syscalls.MOUNT_ATTR_NODEV,
    "noexec": syscalls.MOUNT_ATTR_NOEXEC,
    "nosymfollow": syscalls.MOUNT_ATTR_NOSYMFOLLOW,
}
"""Mount attributes by name."""

_INSIDE: Final = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
NO_LINKS: Final = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_ON_RENAME_RACE: Final = 32  # openat2 answers EAGAIN when a rename crossed a lookup that must stay below its root


def attribute_bits(names: list[str]) -> int:
    """The kernel's bits for these attribute names; ValueError for an unknown one."""
    bits = 0
    for name in names:
        if name not in ATTRIBUTES:
            raise ValueError(f"unknown mount attribute {name!r} (known: {', '.join(ATTRIBUTES)})")
        bits |= ATTRIBUTES[name]
    return bits


def open_below(root_fd: int, path: str, flags: int, *, follow: bool = False, mode: int = 0) -> int:
    """Open `path` as a process with its root directory at `root_fd` would, without ever leaving it.

    Args:
        root_fd: the root directory.
        path: absolute paths and ".." are meant relative to that root.
        flags: as for open(2).
        follow: whether symbolic links on the way may be followed (inside the root); never those of /proc.
        mode: for O_CREAT.

    Raises:
        OSError: ELOOP: a symbolic link lies on the way and may not be followed.
    """
    resolve = _INSIDE if follow else _INSIDE | syscalls.RESOLVE_NO_SYMLINKS
    for attempt in range(_ON_RENAME_RACE):
        try:
            return syscalls.openat2(root_fd, path, flags, mode=mode, resolve=resolve)
        except BlockingIOError:
            if attempt == _ON_RENAME_RACE - 1:
                raise
    raise AssertionError


def open_source(path: str) -> int:
    """An O_PATH descriptor of a path of this machine that must not contain a symbolic link.

    Raises:
        OSError: ELOOP: there is one; the caller resolves paths first (os.path.realpath) and so decides what is meant.
    """
    if not path.startswith("/"):
        raise OSError(errno.EINVAL, f"the path of a mount source must be absolute, got {path!r}", path)
    return syscalls.openat2(syscalls.AT_FDCWD, path, os.O_PATH, resolve=NO_LINKS)


def detached_tree(path: str, *, recursive: bool = True) -> int:
    """A detached copy of the mount at `path`, as a descriptor that may travel to a process in another mount namespace.

    For sources that a caller opens once (in his mount namespace) and the keeper mounts (in its own).
    """
    fd = open_source(path)
    try:
        return clone(fd, recursive)
    finally:
        os.close(fd)


def clone(fd: int, recursive: bool) -> int:
    """A detached copy of the mount that `fd` is open on, from there downwards. EINVAL: it is not in our namespace."""
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if recursive else 0)
    return syscalls.open_tree(fd, "", flags)


def can_be_cloned(fd: int) -> bool:
    """Whether the kernel lets us clone the mount that `fd` is open on: it is not one of another mount namespace."""
    try:
        os.close(clone(fd, False))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def clone_source(fd: int, recursive: bool) -> int:
    """A detached copy of what `fd` is open on, wherever it was opened.

    The kernel clones only what is mounted in the caller's own mount namespace. A descriptor that comes from another one
    (the host's; the keeper has its own) is found again by its path, and must be the very same file.

    Raises:
        OSError: ESTALE: another file has its path by now, or it is hidden here.
    """
    try:
        return clone(fd, recursive)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path = os.readlink(f"/proc/self/fd/{fd}")
    wanted = os.fstat(fd)
    stale = OSError(
        errno.ESTALE, f"mount source {path} is not the file that was opened (moved, replaced or hidden)", path
    )
    try:
        here = open_source(path)
    except OSError:
        raise stale from None
    try:
        found = os.fstat(here)
        if (found.st_dev, found.st_ino) != (wanted.st_dev, wanted.st_ino):
            raise stale
        return clone(here, recursive)
    finally:
        os.close(here)


def new_mount(fstype: str, options: Sequence[tuple[str, str | None]], attributes: int) -> int:
    """A detached mount of a new file system; options without a value are flags, attributes are MOUNT_ATTR_*."""
    fs = syscalls.fsopen(fstype)
    try:
        for key, value in options:
            command = syscalls.FSCONFIG_SET_FLAG if value is None else syscalls.FSCONFIG_SET_STRING
            syscalls.fsconfig(fs, command, key, value)
        syscalls.fsconfig(fs, syscalls.FSCONFIG_CMD_CREATE)
        return syscalls.fsmount(fs, attributes)
    except OSError as error:
        raise OSError(error.errno, f"cannot make a {fstype} mount: {error.strerror}") from None
    finally:
        os.close(fs)


def idmap(tree: int, userns_fd: int, recursive: bool, required: bool) -> bool:
    """Map the ids of a detached tree; False where a file system in it cannot and that is not required."""
    try:
        syscalls.mount_setattr(tree, "", set=syscalls.MOUNT_ATTR_IDMAP, recursive=recursive, userns_fd=userns_fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EPERM}:
            raise
        if not required:
            return False
        message = f"mapping the ids of a mount: {error.strerror} (its file system cannot, or it is mapped already)"
        raise OSError(error.errno, message) from None
    return True


def passes_on(path: str, propagation: str) -> bool:
    """Whether what is mounted later below a path without symbolic links is passed on so: "shared", or "slave"."""
    fd = open_source(path)
    try:
        number = mount_of(fd)
    finally:
        os.close(fd)
    tags = [b"shared:"] if propagation == "shared" else [b"shared:", b"master:"]
    with open("/proc/self/mountinfo", "rb") as table:
        line = next((line for line in table if line.startswith(number + b" ")), b"")
    # Source: proc_pid_mountinfo(5), the optional fields.
    return any(word.startswith(tuple(tags)) for word in line.partition(b" - ")[0].split()[6:])


def mount_of(fd: int) -> bytes:
    """The number of the mount that a descriptor is open on. Source: proc_pid_fdinfo(5)."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return next(line.split()[1] for line in file if line.startswith(b"mnt_id:"))


def detach(mount_fd: int) -> None:
    """Unmount what was attached as `mount_fd`, with all that is mounted on it, here and nowhere else."""
    try:
        # With its peers it would take away what is mounted on them, too. Source: propagate_umount, fs/pnode.c.
        syscalls.mount_setattr(mount_fd, "", propagation=syscalls.MS_PRIVATE, recursive=True)
        syscalls.umount(f"/proc/self/fd/{mount_fd}", syscalls.MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: it is mounted nowhere (any more), which is what was wanted
            raise


def unmount_below(path: str) -> int:
    """Unmount everything at and below `path` at once, whatever uses it; a path without mounts, or none at all, is fine.

    Only the uppermost mounts are named: what is mounted on them goes with them (MNT_DETACH), and no path that leads
    through a stranger's directories is ever looked up.

    Returns:
        How many mounts were named.

    Raises:
        OSError: the kernel refuses, or a symbolic link lies on the way to a mount point.
    """
    path = os.path.normpath(path)
    done = 0
    while found := mount_points(path):
        uppermost = [point for point in found if not any(point.startswith(other + "/") for other in found)]
        for point in uppermost:  # stacked ones are there several times
            try:
                fd = syscalls.openat2(syscalls.AT_FDCWD, point, os.O_PATH, resolve=NO_LINKS)
            except FileNotFoundError:
                # Another one may have unmounted it meanwhile, and removed what it was mounted on.
                if point in mount_points(point):
                    raise
                continue
            try:
                detach(fd)
                done += 1
            finally:
                os.close(fd)
    return done


def mount_points(below: str = "/") -> list[str]:
    """The mount points at and below a path in this mount namespace, stacked ones several times."""
    return [point for _, point, _ in _mounts(below)]


def seen_below(path: str) -> list[tuple[str, list[str]]]:
    """What is mounted below a path without symbolic links, where one sees it.

    Mount points, and of each mount its options and optional fields (proc_pid_mountinfo(5)). Those above come first.
    What other mounts hide, or what cannot be bound elsewhere, is left out.
    """
    seen = []
    for number, point, (options, *others) in sorted(_mounts(path), key=lambda mount: mount[1]):
        if point == path or b"unbindable" in others:
            continue
        try:
            fd = open_source(point)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                raise
            continue  # hidden, or gone
        try:
            if mount_of(fd) == number:
                seen.append((point, [*options.decode().split(","), *map(bytes.decode, others)]))
        finally:
            os.close(fd)
    return seen


def _mounts(below: str) -> Iterator[tuple[bytes, str, list[bytes]]]:
    """The mounts at and below a path in this mount namespace: number, mount point, options and optional fields.

    Source: proc_pid_mountinfo(5); spaces and the like are written in octal.
    """
    below = below.rstrip("/")
    with open("/proc/self/mountinfo", "rb", buffering=0) as file:
        text = file.readall()
    start = os.fsencode(below)
    plain = not any(byte in b" \t\n\\" for byte in start)
    for line in text.splitlines():
        if plain and start not in line:  # cheap: there may be thousands
            continue
        number, _, _, _, raw, *words = line.partition(b" - ")[0].split(b" ")
        if b"\\" in raw:
            raw = raw.replace(b"\\040", b" ").replace(b"\\011", b"\t").replace(b"\\012", b"\n").replace(b"\\134", b"\\")
        point = os.fsdecode(raw)
        if point == below or point.startswith(below + "/"):
            yield number, point, words
