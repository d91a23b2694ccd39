"""Where the product changes what outlives its process, by its source; and whether a named point stands beside that.

Looked at is what an engine's own process, its keeper and the forks of that do to files, mounts, cgroups and processes
on the way of create, start, exec, stop and remove. What is asked of the keeper or of an init goes by few functions,
which are among those looked at.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from typing import Final

from tests.crash.points import SOURCE

ROOMS: Final = (
    *(
        "engine",
        "backends/runc",
        "oci",
        "network",
        "host/cgroups",
        "host/init",
        "host/keeper",
        "host/helper.py",
        "host/removal.py",
        "host/jobs.py",
    ),
    *("host/job.py", "host/mount_operations.py", "host/mounts.py", "host/namespaces.py", "host/tree.py"),
)

_IN_OS: Final = frozenset(
    {
        *("mkdir", "makedirs", "rename", "replace", "renames", "unlink", "remove", "rmdir", "removedirs", "symlink"),
        *("link", "mkfifo", "mknod", "chown", "fchown", "lchown", "chmod", "fchmod", "truncate", "ftruncate", "write"),
        *("pwrite", "writev", "sendfile", "kill", "killpg", "fork", "posix_spawn", "posix_spawnp", "setxattr"),
    }
)
_CALLS: Final = frozenset(
    {
        *("shutil.rmtree", "shutil.move", "shutil.copytree", "signal.pidfd_send_signal", "pidfds.send_signal"),
        *(
            "subprocess.run",
            "subprocess.Popen",
            "syscalls.mount",
            "syscalls.umount",
            "syscalls.move_mount",
            "syscalls.mount_setattr",
            "syscalls.fsmount",
            "syscalls.clone_paused",
            "protocol.send",
            "socket.send_fds",
        ),
    }
)
# Of a Path, a Tree or a socket, whatever the name of the variable.
_METHODS: Final = frozenset(
    {"write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "sendmsg"}
    | {"mkdir", "rmdir", "unlink", "rename"}
)
_MAKING: Final = ("O_CREAT", "O_TRUNC")


@functools.cache
def without_point() -> dict[str, list[str]]:
    """Functions (`room: name`) in which something is done and no point stands, with what they do.

    A function that nobody but its own module calls, and there only functions with points, needs none of its own.
    """
    found: dict[str, list[str]] = {}
    for room in ROOMS:
        path = SOURCE / room
        for module in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            tree = ast.parse(module.read_text(encoding="utf-8"))
            found |= {f"{room}: {name}": does for name, does in _bare(tree).items()}
    return found


def _bare(tree: ast.Module) -> dict[str, list[str]]:
    calls = {name: [(_name(call.func), call) for call in _calls(node)] for name, node in _functions(tree)}
    pointed = {name for name, made in calls.items() if any(called == "reached" for called, _ in made)}
    called_by: dict[str, set[str]] = {}
    for name, made in calls.items():
        for called, _ in made:
            called_by.setdefault(called.rpartition(".")[2], set()).add(name)

    def is_covered(name: str) -> bool:
        last = name.rpartition(".")[2]
        return last.startswith("_") and last in called_by and called_by[last] <= pointed

    bare = {name: made for name, made in calls.items() if name not in pointed and not is_covered(name)}
    does = {name: sorted({called for called, call in made if _is_effect(called, call)}) for name, made in bare.items()}
    return {name: effects for name, effects in does.items() if effects}


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Functions and methods; what is defined within one is a part of it."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.{member.name}", member


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    return (call for call in ast.walk(node) if isinstance(call, ast.Call))


def _name(function: ast.expr) -> str:
    """With dots; what is no name (a call's result) is left out."""
    if isinstance(function, ast.Attribute):
        return f"{_name(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def _is_effect(called: str, call: ast.Call) -> bool:
    room, _, name = called.rpartition(".")
    if room == "os":
        return name in _IN_OS or (name == "open" and any(flag in ast.unparse(call) for flag in _MAKING))
    if called == "open":
        mode = call.args[1] if len(call.args) > 1 else None
        return isinstance(mode, ast.Constant) and not set(str(mode.value)).isdisjoint("wax+")
    return called in _CALLS or (bool(room) and name in _METHODS)
