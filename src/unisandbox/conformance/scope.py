"""A cgroup of its own for a test run, so that whatever the run starts can be told from the rest of the machine.

On cgroup v1 and hybrid hosts engines put their directories below the caller's own cgroup: so everything that a test
makes is below the run's, also what has forked itself away, and two runs on one machine do not see each other's things.
On v2 engines of root use a slice of their own at the top, and the run stays where the service manager has put it.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from unisandbox.conformance.inventory import RUN_PREFIX, own_cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def run_cgroup() -> Iterator[tuple[str, ...]]:
    """Move this process into a new cgroup in every v1 hierarchy and the hybrid host's v2 tree, and back at the end.

    Without root, on pure v2, or where the hierarchies are read-only, nothing is moved and nothing is yielded. The
    cpuset hierarchy is left alone: a new directory there has no CPUs until somebody copies them.

    Yields:
        The directories that were made.
    """
    own = own_cgroups()
    v1 = [where for where in own if not os.path.exists(f"{where}/cgroup.controllers")]
    if os.geteuid() != 0 or not v1:
        yield ()
        return
    made: list[tuple[str, str]] = []
    for where, parent in own.items():
        # In a container whose view of a hierarchy begins elsewhere, our own cgroup is not where its name says.
        if os.path.exists(f"{where}/cpuset.cpus") or not os.path.isdir(parent):
            continue
        _remove_of_dead_runs(parent)
        path = f"{parent}/{RUN_PREFIX}{os.getpid()}"
        try:
            os.mkdir(path, 0o755)
            made.append((path, parent))
            _enter(path)
        except OSError as error:
            if error.errno not in {errno.EROFS, errno.EACCES, errno.EPERM}:
                raise
    try:
        yield tuple(path for path, _ in made)
    finally:
        for path, parent in made:
            _enter(parent)
            _remove(path, timeout=2.0)


def _enter(path: str) -> None:
    with open(f"{path}/cgroup.procs", "w", encoding="ascii") as file:
        file.write(str(os.getpid()))


def _remove(path: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            # EBUSY: the kernel counts ended processes a moment longer, or a test has left something (and has failed)
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                return
            time.sleep(0.005)
        else:
            return


def _remove_of_dead_runs(parent: str) -> None:
    """Remove what runs that were killed have left, as far as it is empty."""
    for name in os.listdir(parent):
        if name.startswith(RUN_PREFIX) and not os.path.exists(f"/proc/{name.removeprefix(RUN_PREFIX)}"):
            for path, _, _ in os.walk(f"{parent}/{name}", topdown=False):
                _remove(path, timeout=0)
