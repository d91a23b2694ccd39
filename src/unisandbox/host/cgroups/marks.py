"""A mark on the cgroups that engines have made, by which they can be told from others that only have such a name.

Source: xattr(7); cgroup file systems keep user.* attributes since Linux 5.7 (KERNFS_ROOT_SUPPORT_USER_XATTR).
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

_ATTRIBUTE: Final = "user.unisandbox"


def mark(directory: str) -> None:
    """Mark the cgroup that this process has made, or another one of its engine; repeating is harmless."""
    with contextlib.suppress(OSError):  # then it has its name only
        os.setxattr(directory, _ATTRIBUTE, _value(directory))


def is_marked(directory: str) -> bool:
    """Whether an engine has made it, under the name that it has."""
    try:
        return os.getxattr(directory, _ATTRIBUTE) == _value(directory)
    except OSError:  # it has none, or is gone
        return False


def _value(directory: str) -> bytes:
    return os.fsencode(os.path.basename(directory))
