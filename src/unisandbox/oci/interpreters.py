"""What a script wants to be run by, read from outside, for the words of an error."""

from __future__ import annotations

import os
import posixpath
from typing import Final

from unisandbox.oci.users import Inside, beginning

_LINE: Final = 256  # so much of a file the kernel looks at; source: BINPRM_BUF_SIZE, include/uapi/linux/binfmts.h


def interpreter_of(root: Inside, program: str, path: str, cwd: str) -> str:
    """The interpreter that a script names in its first line; "" for what is no script, or is not there.

    Args:
        root: the container's.
        program: the first word of a command.
        path: the directories in which it is looked for, unless it has a "/".
        cwd: where a relative one begins.
    """
    where = [""] if "/" in program else path.split(":")
    for directory in where:
        line = beginning(root, posixpath.join(cwd, directory, program), _LINE)
        if line is not None:
            words = line[2:].partition(b"\n")[0].split() if line.startswith(b"#!") else []
            return os.fsdecode(words[0]) if words else ""
    return ""
