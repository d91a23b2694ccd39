"""What is killed with the call of a runtime: all of its descendants, also one that is forking at that moment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.keepers import until

from unisandbox.oci import calls

pytestmark = pytest.mark.slow

# Its first children make the list long; the last one is in a fork nearly always, since it has much memory to copy.
FORKING = """
import os, signal, sys
for _ in range(60):
    if not os.fork():
        signal.pause()
if os.fork():
    signal.pause()
os.setsid()
memory = bytearray(b"x") * (60 << 20)
os.write(1, b"r")
while True:
    if not os.fork():
        signal.pause()
"""


def of_mark(mark: str) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in words:
            found.append(int(name))
    return found


def test_a_descendant_that_is_forking_leaves_nothing(tmp_path: Path) -> None:
    mark = str(tmp_path)
    for number in range(12):
        command = [sys.executable, "-I", "-S", "-c", FORKING, mark]
        with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            pidfd = os.pidfd_open(process.pid)
            try:
                assert process.stdout.read(1) == b"r"
                time.sleep(number / 2000)  # another moment each time
                calls.kill_tree(process.pid, pidfd)
                process.wait()
                until(lambda: not of_mark(mark), "all have ended")
            finally:
                os.close(pidfd)
                for pid in of_mark(mark):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, 9)
