"""Starts the bare tools: a small process with a mount namespace of its own, so that crun works on a hybrid host too.

It takes one JSON request per packet from the socket that is its standard input, and answers with one. Times are taken
here, around posix_spawn and waitid, so that the tools pay for nothing of the benchmark's own Python.

Run as a script: `python spawner.py HIDDEN...`, with the directories that an empty tmpfs shall hide from the tools.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence

from unisandbox.host import jobs, syscalls
from unisandbox.host.null import open_null

PACKET = 1 << 17
_CHUNK = 1 << 16
_TAIL = 2000
_END_SECONDS = 5.0

Request = dict[str, object]


class Spawner:
    """Answers requests until the socket is closed."""

    def __init__(self, scratch: str) -> None:
        self._null = open_null()  # crun gives it away
        self._errors = os.open(f"{scratch}/stderr", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._living: set[int] = set()

    def answer(self, request: Request) -> Request:
        """Do what one request asks for."""
        action = request.pop("do")
        if action == "mounts":
            jobs.run([{"do": "mounts", **request}], [])
            return {}
        if action == "run":
            return self._run(request)
        if action == "keep":
            return {"pid": self._keep(request)}
        if action == "end":
            self._end(int(str(request["pid"])))
            return {}
        raise ValueError(f"unknown request {action!r}")

    def end_all(self) -> None:
        """Kill what was kept."""
        for pid in tuple(self._living):
            self._end(pid)

    def _run(self, request: Request) -> Request:
        """Run all at once to their ends; seconds from the first start to the last end, and how much they wrote."""
        argvs = request["argvs"]
        assert isinstance(argvs, list)
        reader, writer = os.openpty() if request.get("tty") else os.pipe()
        for fd in (reader, writer):
            os.set_inheritable(fd, False)
        before = os.fstat(self._errors).st_size
        begun = time.perf_counter()
        pids = [self._spawn(argv, request, writer) for argv in argvs]
        os.close(writer)
        size = 0
        while piece := _read(reader):
            size += len(piece)
        codes = []
        for pid in pids:
            ended = os.waitid(os.P_PID, pid, os.WEXITED)
            assert ended is not None
            codes.append(ended.si_status)
        seconds = time.perf_counter() - begun
        os.close(reader)
        said = os.pread(self._errors, _TAIL, max(before, os.fstat(self._errors).st_size - _TAIL))
        return {"seconds": seconds, "codes": codes, "bytes": size, "said": said.decode("utf-8", "replace")}

    def _keep(self, request: Request) -> int:
        argv = request["argv"]
        assert isinstance(argv, list)
        pid = self._spawn(argv, request, self._null)
        self._living.add(pid)
        return pid

    def _end(self, pid: int) -> None:
        """Wait for its end. It is expected to come: a runtime whose container was killed cleans up first."""
        self._living.discard(pid)
        pidfd = os.pidfd_open(pid)
        try:
            if not select.select([pidfd], [], [], _END_SECONDS)[0]:
                os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED)
        finally:
            os.close(pidfd)

    def _spawn(self, argv: list[str], request: Request, output: int) -> int:
        terminal = bool(request.get("tty"))
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
            (os.POSIX_SPAWN_DUP2, output if terminal else self._null, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output if terminal else self._errors, 2),
        ]
        opened = request.get("open")
        if isinstance(opened, str):
            actions.append((os.POSIX_SPAWN_OPEN, 3, opened, os.O_RDONLY, 0))
        return os.posix_spawn(
            argv[0],
            argv,
            {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "TERM": "xterm"},
            file_actions=actions,
            setsigmask=(),
        )


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except OSError:  # EIO: the last holder of the terminal's other end has closed it
        return b""


def main(scratch: str, hidden: Sequence[str]) -> None:
    """Serve until the end of the socket."""
    sock = socket.socket(fileno=0)
    os.set_inheritable(0, False)
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_SLAVE)
    for path in hidden:
        # Writable, and with room: crun's own cgroup manager makes a directory in each tree that it sees, which here
        # nobody removes. They end with this process.
        syscalls.mount("none", path, "tmpfs", 0, "size=256m")
    syscalls.mount("none", scratch, "tmpfs", 0, "mode=0711")
    spawner = Spawner(scratch)
    try:
        while packet := sock.recv(PACKET):
            try:
                answer = spawner.answer(json.loads(packet))
            except Exception as error:  # whatever it is, the one who asked reports it
                answer = {"error": f"{type(error).__name__}: {error}"}
            sock.send(json.dumps(answer).encode())
    finally:
        spawner.end_all()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
