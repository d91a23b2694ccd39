"""Places of its own for each worker of a run that is shared out (`pytest -n 2`), so that none sees another's files.

What engines leave in well-known places (/run/unisandbox, disk images in /var/tmp, ...) cannot be told from what another
worker has there at this moment: so each has those places for itself, in a mount namespace of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unisandbox.host.syscalls import CLONE_NEWNS, MNT_DETACH, MS_BIND, MS_PRIVATE, MS_REC, mount, umount, unshare

_OWN = {"/tmp": "1777", "/dev/shm": "1777", "/var/lib/unisandbox": "755"}
# Not in memory: what is large is to be on a disk there, as it is for everybody.
_ON_DISK = "/var/tmp"


@contextmanager
def own_places(basetemp: str | None) -> Iterator[None]:
    """Leave the host's mount namespace, and have something empty at each place.

    Args:
        basetemp: a directory that is to be there: what pytest would have made.
    """
    Path("/var/lib/unisandbox").mkdir(exist_ok=True)
    disk = tempfile.mkdtemp(prefix="tests-", dir=_ON_DISK)
    os.chmod(disk, 0o1777)  # as /var/tmp is
    unshare(CLONE_NEWNS)
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    _take_run()
    for place, mode in _OWN.items():
        mount("tmpfs", place, "tmpfs", data=f"mode={mode}")
    mount(disk, _ON_DISK, flags=MS_BIND)
    if basetemp:
        Path(basetemp).parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        umount(_ON_DISK, MNT_DETACH)
        shutil.rmtree(disk, ignore_errors=True)


def _take_run() -> None:
    """/run has the service manager's sockets, too: all of it stays but for what is ours."""
    theirs = os.open("/run", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mount("tmpfs", "/run", "tmpfs", data="mode=755")
        for name in os.listdir(f"/proc/self/fd/{theirs}"):
            former = Path(f"/proc/self/fd/{theirs}/{name}")
            if name.startswith("unisandbox"):
                continue
            if former.is_symlink():
                os.symlink(former.readlink(), f"/run/{name}")
                continue
            if former.is_dir():
                os.mkdir(f"/run/{name}")
            else:
                Path(f"/run/{name}").touch()
            mount(str(former), f"/run/{name}", flags=MS_BIND | MS_REC)
    finally:
        os.close(theirs)
