"""Trees of mounts that a job builds in a user namespace of its own: operations, and what builds them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from unisandbox.host import jobs

ROOT = 1_000_000
USERNS: dict[str, object] = {
    "do": "namespaces",
    "kinds": ["user"],
    "uid_map": [[0, ROOT, 65_536]],
    "gid_map": [[0, ROOT, 65_536]],
}


def build_tree(root: Path, *ops: dict[str, object], fds: list[int] | None = None) -> dict[str, Any]:
    """Run one job that makes a user namespace and then these operations; the result of the latter."""
    root.mkdir(exist_ok=True)
    steps: list[dict[str, object]] = [USERNS, {"do": "mounts", "root": str(root), "ops": list(ops)}]
    result, named = jobs.run(steps, fds or [])
    for fd in named.values():
        os.close(fd)
    steps_done: Any = result["steps"]
    answer: dict[str, Any] = steps_done[1]
    return answer


def tmpfs_op(path: str = "/", **fields: object) -> dict[str, object]:
    return {"op": "tmpfs", "path": path, "size": 1 << 20, "inodes": 100, **fields}


def mkdir_op(path: str, **fields: object) -> dict[str, object]:
    return {"op": "mkdir", "path": path, **fields}


def bind_op(source: object, path: str, **fields: object) -> dict[str, object]:
    return {"op": "bind", "source": source, "path": path, "create": True, **fields}


def fill(file: io.RawIOBase) -> None:
    for _ in range(100):
        file.write(bytes(1 << 20))
