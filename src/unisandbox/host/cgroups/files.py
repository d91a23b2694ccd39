"""Reading and writing the kernel's cgroup files: one system call each way, and errors that say which file and value."""

from __future__ import annotations

import errno
import os

from unisandbox.host.boundary import reached


def write(directory: str, name: str, value: str) -> None:
    """Write a cgroup file in one write(2).

    Raises:
        OSError: with the kernel's errno; the message has the file and the value.
    """
    path = f"{directory}/{name}"
    reached("before cgroup.write", path)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {value!r} to {path}: {error.strerror}") from None
    reached("after cgroup.write", path)


def read(directory: str, name: str) -> str:
    """The text of a cgroup file, without the newline at its end.

    Raises:
        OSError: FileNotFoundError when the cgroup or the file does not exist.
    """
    path = f"{directory}/{name}"
    try:
        with open(path, "rb", buffering=0, opener=_opener) as file:
            return file.read().decode().rstrip("\n")
    except OSError as error:
        raise OSError(error.errno, f"cannot read {path}: {error.strerror}") from None


def read_optional(directory: str, name: str) -> str | None:
    """The same, None when there is no such file (an older kernel, a controller that is not on)."""
    try:
        return read(directory, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EOPNOTSUPP):
            return None
        raise


def read_int(directory: str, name: str) -> int | None:
    """A number; None for "max", a v1 "unlimited", and a file that does not exist."""
    text = read_optional(directory, name)
    return None if text is None else parse(text)


def parse(text: str) -> int | None:
    """A limit as the kernel prints it: "max" (v2), -1 or about 2**63 rounded to pages (v1) are none."""
    if text == "max":
        return None
    value = int(text)
    return None if value < 0 or value >= 1 << 62 else value


def read_table(directory: str, name: str) -> dict[str, int]:
    """A file of `key number` lines; empty when it does not exist."""
    text = read_optional(directory, name)
    if not text:
        return {}
    return {key: int(value) for key, value in (line.split(maxsplit=1) for line in text.splitlines())}


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
