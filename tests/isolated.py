"""Run a function in a forked child with a mount namespace of its own, as the keeper runs jobs."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unisandbox.host import syscalls


def isolated(function: Callable[[Path], object], where: Path) -> Any:
    """Call `function(where)` in a child, `where` being a fresh tmpfs that nobody else sees; its JSON-able result.

    An exception in the child is an AssertionError here, with its traceback.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read_end)
            syscalls.unshare(syscalls.CLONE_NEWNS)
            syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
            syscalls.mount("tmpfs", str(where), "tmpfs", 0, "mode=0711")
            answer = {"result": function(where)}
            status = 0
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(write_end, "w") as file:
            json.dump(answer, file)
        os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        text = file.read()
    os.waitpid(pid, 0)
    answer = json.loads(text)
    assert "error" not in answer, answer["error"]
    return answer["result"]


def open_fds() -> list[str]:
    """What this process has open, but for the directory that is read to know it."""
    links = []
    for name in sorted(os.listdir("/proc/self/fd")):
        try:
            links.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return links
