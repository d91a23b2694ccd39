"""A user who is not root, with subordinate ids or without, for programs of tests.

Where root runs the tests he is known in a mount namespace of the program's own only: nothing on this machine is
changed. Where an ordinary user does, it is he.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import unisandbox
from unisandbox.host.cgroups import Cgroups
from unisandbox.host.power.ids import maps, scarcity
from unisandbox.host.power.obstacles import of_user_namespaces

KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
# What root changes for a program, or what only those have whom root makes up: they have no cgroup to write.
by_root = pytest.mark.root
# Of the one whom root makes up.
_UID = 23456
_FIRST_SUBORDINATE = 200_000
# A further group of the one who has no subordinate ids.
_FURTHER = 34567
_FILES = {
    "passwd": f"plain:x:{_UID}:{_UID}::/nonexistent:/bin/sh",
    "group": f"plain:x:{_UID}:",
    "subuid": f"plain:{_FIRST_SUBORDINATE}:65536",
    "subgid": f"plain:{_FIRST_SUBORDINATE}:65536",
}
_PRELUDE = """\
import json, os, signal, subprocess, sys, time
from pathlib import Path
import anyio
import unisandbox
from unisandbox import *
from unisandbox import Engine, Exit, Mount, Resources, Rootfs, Sandbox, SandboxError, Security, UnsupportedError

HOME = os.environ["TMPDIR"]
FREE = Resources(memory=None, pids=None)

def tell(**words):
    print(json.dumps(words), flush=True)

"""


class PlainUser:
    """Runs programs as him. `home` is a directory of his own, where his engines are too.

    Attributes:
        uid: his user id.
        gid: the id of his group.
        subordinate: the first user id that is subordinate to him; -1 where none is.
        groups: those that he has beside his own.
        loop: on which his programs run: "asyncio", or "trio".
    """

    def __init__(self, home: Path, files: Path | None, python: str, *, single: bool = False) -> None:
        """With the files that make him known; None where he runs these tests himself."""
        self.home = home
        self.uid, self.gid = (_UID, _UID) if files else (os.geteuid(), os.getegid())
        self.subordinate = -1 if single else _FIRST_SUBORDINATE if files else maps()[0][1][1]
        self.groups = sorted({*os.getgroups()} - {self.gid}) if files is None else [_FURTHER] * single
        self.loop = "asyncio"
        self._files = files
        self._python = python

    def command(self, argv: Sequence[str], *, setup: str = "", more: Sequence[str] = ()) -> list[str]:
        """A command that becomes `argv`, as him.

        Args:
            argv: of the program.
            setup: a script for root in the program's mount namespace, after all else.
            more: options for setpriv. Both can be had only where root runs the tests.
        """
        if self._files is None:
            assert not setup, "such a test is marked for root"
            assert not more, "such a test is marked for root"
            return [*argv]
        known = "".join(f"mount --bind {self._files}/{name} /etc/{name}\n" for name in _FILES)
        groups = f"--groups={','.join(map(str, self.groups))}" if self.groups else "--clear-groups"
        become = ["setpriv", f"--reuid={_UID}", f"--regid={_UID}", groups, *more, "--", "env", *argv]
        script = f"set -e\n{known}{setup}\ncd /\nexec {shlex.join(become)}"
        return ["unshare", "--mount", "sh", "-c", script]

    def environment(self) -> dict[str, str]:
        """Of his programs: they find this library, and keep what they make in his directory."""
        source = Path(unisandbox.__file__).parents[1]
        packages = Path(pytest.__file__).parents[1]
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "PYTHONPATH": f"{source}:{packages}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def start(self, work: str, *, setup: str = "", more: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start a program whose main function has this body; see `run`."""
        body = "".join(f"    {line}\n" for line in work.strip("\n").splitlines())
        program = self.home / f"program-{os.urandom(4).hex()}.py"
        program.write_text(f"{_PRELUDE}async def main():\n{body}\nanyio.run(main, backend={self.loop!r})\n")
        os.chown(program, self.uid, self.gid)
        return subprocess.Popen(
            self.command([self._python, "-W", "error", str(program)], setup=setup, more=more),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    def run(self, work: str, *, setup: str = "", more: Sequence[str] = (), timeout: float = 300.0) -> dict[str, Any]:
        """Run the body of an async function; what it has told with `tell(...)`, all in one."""
        with self.start(work, setup=setup, more=more) as process:
            try:
                said, _ = process.communicate(timeout=timeout)
            finally:
                process.kill()
        assert process.returncode == 0, f"it ended with {process.returncode}; its errors are above"
        told: dict[str, Any] = {}
        for line in said.splitlines():
            told |= json.loads(line)
        return told

    def pytest(self, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run tests as him; none of this project's own settings hold there."""
        argv = [self._python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "unisandbox.conformance.plugin"]
        return subprocess.run(
            self.command([*argv, "-W", "error", "-c", os.devnull, "--rootdir", str(self.home), *arguments]),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def left(self) -> list[str]:
        """What his engines have left in his directory."""
        return sorted(str(path.relative_to(self.home)) for path in self.home.glob("unisandbox*/**/*"))


@contextmanager
def plain_user(*, single: bool = False) -> Iterator[PlainUser]:
    """Such a user, while the block lasts; `single`: without subordinate ids, and with a further group.

    Skips the test where he could not run anything.
    """
    for name in ("setpriv", "unshare", *(() if single else ("newuidmap", "newgidmap"))):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed (apt install util-linux uidmap)")
    if os.geteuid() != 0:
        if why_not := of_user_namespaces() or (None if single else scarcity()):
            pytest.skip(why_not.reason)
        if single and not scarcity():
            pytest.skip("this user has subordinate ids")
        with tempfile.TemporaryDirectory(prefix="plain-", dir="/tmp") as directory:
            yield PlainUser(Path(directory), None, sys.executable, single=single)
        return
    with tempfile.TemporaryDirectory(prefix="plain-", dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        home, files = Path(directory, "home"), Path(directory, "etc")
        home.mkdir()
        files.mkdir(mode=0o755)
        os.chown(home, _UID, _UID)
        for name, line in _FILES.items():
            former = Path("/etc", name)
            before = former.read_text() if former.exists() else ""
            former.touch()
            if not name.startswith("sub"):
                (files / name).write_text(f"{before}{line}\n")
            else:
                (files / name).write_text("" if single else f"{line}\n")
        yield PlainUser(home, files, _python(), single=single)


@functools.cache
def _python() -> str:
    """An interpreter that he may execute, with the same packages as this one."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        done = subprocess.run(
            # By a program of its own: what setpriv itself executes, it executes as root.
            ["setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups", "--", "env", python, "-c", ""],
            cwd="/",
            check=False,
            capture_output=True,
        )
        if done.returncode == 0:
            return python
    pytest.skip(f"no Python 3.{sys.version_info.minor} here may be executed by an ordinary user")


def has_subtree() -> bool:
    """Whether these tests are an ordinary user's who may limit memory and processes."""
    return os.geteuid() != 0 and {"memory", "pids"} <= Cgroups.detect("unisandbox-x").controllers
