"""Disks in files: a sparse ext4 image, and the loop device that lets it be mounted. Standard library only.

An image bounds what a sandbox writes without charging it to anybody's memory. It is disposable: no journal, nothing
reserved for root, its inode tables are zeroed when they are first used. Source: mke2fs(8), loop(4), linux/loop.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

TYPE_CHECKING = False  # the real one costs a process that starts 3 ms and 700 kB
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CLR_FD: Final = 0x4C01
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LO_FLAGS_AUTOCLEAR: Final = 4
_LO_FLAGS_DIRECT_IO: Final = 16
_LOOP_MAJOR: Final = 7
_LOOP_INFO64: Final = "=5QIIII64s64s32s2Q"
_ATTEMPTS: Final = 64
_MKFS: Final = ("/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4", "/usr/bin/mkfs.ext4", "/bin/mkfs.ext4")

_FEATURES: Final = (
    "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,sparse_super2,uninit_bg"
)
# Named in full, so that an image does not depend on the host's /etc/mke2fs.conf. Left out: the journal, checksums of
# metadata, room for growth.

LEAST_SIZE: Final = 1 << 20
"""Bytes; below this mkfs.ext4 finds no room for its own tables."""
MOST_SIZE: Final = ((1 << 32) - 1) * 4096
"""Bytes; its blocks have numbers of 32 bits without the feature "64bit". Source: ext4(5)."""


def make_image(path: str, size: int, uid: int = 0, gid: int = 0) -> None:
    """Make the sparse file `path` of `size` bytes with an empty ext4 in it, whose root belongs to `uid` and `gid`.

    Raises:
        FileExistsError: `path` exists already.
        OSError: EFBIG: such a file system, or the file in which it is, cannot be that large.
        FileNotFoundError: mkfs.ext4 is not installed.
        OSError: EIO: mkfs.ext4 failed; the message has its last words. The file is removed again.
    """
    if size < LEAST_SIZE:
        raise OSError(errno.EINVAL, f"a disk image needs at least {LEAST_SIZE} bytes, got {size}", path)
    if size > MOST_SIZE:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    mkfs = next((program for program in _MKFS if os.access(program, os.X_OK)), None)
    if mkfs is None:
        raise FileNotFoundError(errno.ENOENT, "mkfs.ext4 is not installed (apt install e2fsprogs)", "mkfs.ext4")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        _run_mkfs(mkfs, fd, path, uid, gid)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def _run_mkfs(mkfs: str, image_fd: int, path: str, uid: int, gid: int) -> None:
    out_fd = os.memfd_create("mkfs", os.MFD_CLOEXEC)
    try:
        argv = [
            "mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-I", "256", "-i", "8192", "-O", _FEATURES,
            "-E", f"nodiscard,lazy_itable_init=1,packed_meta_blocks=1,root_owner={uid}:{gid}",
            "/proc/self/fd/3",
        ]  # fmt: skip
        actions = [(os.POSIX_SPAWN_DUP2, out_fd, 1), (os.POSIX_SPAWN_DUP2, out_fd, 2)]
        # 3 may be image_fd itself, and dup2 onto itself would leave it close-on-exec: so by way of a high number.
        high = fcntl.fcntl(image_fd, fcntl.F_DUPFD_CLOEXEC, 100)
        actions.append((os.POSIX_SPAWN_DUP2, high, 3))
        try:
            # MKE2FS_CONFIG: the administrator's defaults for real disks are none of ours.
            environment = {"MKE2FS_CONFIG": "/dev/null", "LC_ALL": "C"}
            pid = os.posix_spawn(mkfs, argv, environment, file_actions=actions)
        finally:
            os.close(high)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != 0:
            said = os.pread(out_fd, 2048, 0).decode(errors="replace").strip()
            raise OSError(errno.EIO, f"mkfs.ext4 of {path} ended with {status}: {said}", path)
    finally:
        os.close(out_fd)


def attach(path: str) -> tuple[int, str]:
    """Attach the image at `path` to a free loop device, which frees itself when nothing uses it any more.

    Returns:
        A file descriptor that keeps the device until the image is mounted, and the device's path to mount.

    Raises:
        OSError: no loop device could be had (the loop module is missing, or /dev has no nodes for it).
    """
    image = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            message = f"no loop devices here: /dev/loop-control: {error.strerror} (modprobe loop)"
            raise OSError(error.errno, message, "/dev/loop-control") from None
        try:
            return _configure(control, image, path)
        finally:
            os.close(control)
    finally:
        os.close(image)


def _configure(control: int, image: int, path: str) -> tuple[int, str]:
    name = os.fsencode(path)[-63:]
    for direct in (_LO_FLAGS_DIRECT_IO, 0):  # direct I/O caches once and not twice; not every file system has it
        flags = _LO_FLAGS_AUTOCLEAR | direct
        config = struct.pack("=2I", image, 4096 if direct else 0)
        config += struct.pack(_LOOP_INFO64, 0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0) + bytes(64)
        for _ in range(_ATTEMPTS):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = _open_device(number, path)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno == errno.EBUSY:  # another took it between the two calls
                    continue
                if error.errno == errno.EINVAL and direct:
                    break
                raise OSError(error.errno, f"attaching {path} to loop{number}: {error.strerror}", path) from None
            return device, f"/proc/self/fd/{device}"
    raise OSError(errno.EBUSY, f"no free loop device for {path} after {_ATTEMPTS} attempts", path)


def _open_device(number: int, image: str) -> int:
    """Open /dev/loopN, or a node of our own where /dev is not the kernel's (inside a container)."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(f"/dev/loop{number}", flags)
    except FileNotFoundError:
        node = f"{image}.loop{number}"
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
    try:
        return os.open(node, flags)
    finally:
        os.unlink(node)


def attached() -> Iterator[tuple[int, str]]:
    """The loop devices of this machine that have a file: number, and the file's path, also when that was removed.

    Source: Documentation/ABI/testing/sysfs-block-loop; a removed file's path has " (deleted)" behind it.
    """
    try:
        names = os.listdir("/sys/block")
    except FileNotFoundError:  # no sysfs here
        return
    for name in names:
        number = name.removeprefix("loop")
        if number == name or not number.isdecimal():
            continue
        try:
            with open(f"/sys/block/{name}/loop/backing_file", "rb", buffering=0) as file:
                path = os.fsdecode(file.read(4096)).removesuffix("\n")
        except OSError:  # not attached (any more)
            continue
        yield int(number), path.removesuffix(" (deleted)")


def detach(number: int, path: str) -> None:
    """Take the file `path` from loop device `number`; at once, or when its last user is gone. Fine when it is off.

    Raises:
        OSError: the device cannot be opened, or does not let go.
    """
    device = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(device)
        if not stat.S_ISBLK(status.st_mode) or status.st_rdev != os.makedev(_LOOP_MAJOR, number):
            raise OSError(errno.ENODEV, f"/dev/loop{number} is not that loop device", f"/dev/loop{number}")
        # While it is open it is not given to another file; so this is still the one that was meant, or none.
        if (number, path) in set(attached()):
            fcntl.ioctl(device, _LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.close(device)
