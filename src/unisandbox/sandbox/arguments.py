"""What the calls of `Files` are given: checked at the door, before anything is done."""

from __future__ import annotations

import os

from unisandbox.api import InvalidArgumentError
from unisandbox.sandbox import inside
from unisandbox.sandbox.streams import bytes_of


def content_of(path: str, data: bytes | str) -> memoryview:
    """What is to be written to `path`, as bytes; raises InvalidArgumentError for anything else."""
    try:
        return bytes_of(data.encode() if isinstance(data, str) else data, "the content")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"the text for {path!r} cannot be written as UTF-8: {error.reason}", hint="Give bytes."
        ) from error


def local_path(path: str | os.PathLike[str]) -> str:
    """A path on the host, as text."""
    return inside.checked(os.fspath(path) if isinstance(path, os.PathLike) else path)


def check_limit(limit: int) -> None:
    """Raises InvalidArgumentError when it is no count."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise InvalidArgumentError(f"limit must be >= 0, got {limit!r}")


def check_mode(mode: int | None) -> None:
    """Raises InvalidArgumentError when it is neither permission bits nor None."""
    if mode is None:
        return
    if isinstance(mode, bool) or not isinstance(mode, int):
        raise InvalidArgumentError(f"mode must be permission bits as a number, got {mode!r}", hint="For example 0o644.")
    if not 0 <= mode <= 0o7777:
        raise InvalidArgumentError(f"mode must be permission bits, 0o0 to 0o7777, got {mode:#o}")


def check_kind(path: str, *, is_directory: bool) -> None:
    """Raises InvalidArgumentError when a path with "/" at its end is that of something else than a directory."""
    if inside.checked(path).endswith("/") and not is_directory:
        raise InvalidArgumentError(f"{path!r} is the path of a directory, and this is none")
