"""Start a process through init, and learn how it ended.

anyio only, no task of its own. Whatever interrupts a start (an error, a deadline, a cancelled await) closes `go` and
kills what had come up, by system calls, before it is raised.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final, NamedTuple

import anyio

from unisandbox.api.errors import (
    BackendError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from unisandbox.host import pidfd as pidfds
from unisandbox.host import stamps
from unisandbox.host.boundary import reached
from unisandbox.host.init import protocol
from unisandbox.host.init.protocol import ExecFailed, SpawnRequest
from unisandbox.host.readiness import readable, writable

_TIOCGPTN: Final = 0x80045430  # include/uapi/asm-generic/ioctls.h: the number of a terminal, asked of its master only
_PTMX: Final = os.makedev(5, 2)  # Documentation/admin-guide/devices.txt; every master is an open of this device
_MAX_FDS: Final = 253  # SCM_MAX_FD
_FDS_SPACE: Final = socket.CMSG_SPACE(_MAX_FDS * 4)
_END_BYTES: Final = protocol.ANSWER.size + 1
# Numbers, since each operation on Python's enumerations of flags costs more than the system call.
_SEND: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE: Final = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_CUT: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


class Started(NamedTuple):
    """A process that runs. The three descriptors are the receiver's to close.

    `pid` is the host's. `life` says how the process ended (`ended`), to whoever holds a copy of it. `master` is that of
    its terminal, if it asked for one.
    """

    pid: int
    pidfd: int
    life: socket.socket
    master: int | None


class Ended(NamedTuple):
    """How a process ended: the raw wait status (os.waitstatus_to_exitcode, os.WCOREDUMP), and the time.

    `at` is when init told it, in seconds since the epoch: stamped by the kernel, whenever one asks.
    """

    status: int
    at: float


async def spawn(
    control: socket.socket,
    request: SpawnRequest,
    stdio: tuple[int, int, int] | None,
    *,
    before_exec: Callable[[int, int], None],
    timeout: float,
    hold_life: Callable[[int, int, int], Awaitable[None]] | None = None,
    pid_namespace: int | None = None,
    cgroup: Sequence[int] = (),
) -> Started:
    """Start `request` through the init behind `control`; return when its exec has worked.

    Args:
        control: the host's end of init's socket. Several spawns may use it at once.
        request: what to start.
        stdio: the descriptors of its stdin, stdout and stderr; None with `request.tty`.
        before_exec: called with pid and pidfd while the process waits for its exec: here it is put into its cgroup.
            What it raises ends the process and is passed on.
        timeout: seconds for all of it.
        hold_life: called with the number of `life`, the pid and the number of its pidfd before exec, so that somebody
            else can keep copies. When the start fails after it, these are the caller's to drop.
        cgroup: a descriptor of the cgroup2 directory in which the process is born (init must have been admitted there,
            `Cgroup.admit`), then open `tasks` files of v1 cgroups that it enters itself. Empty: it is born in init's
            cgroups, and `before_exec` moves it.
        pid_namespace: the inode of the pid namespace that the process must be in; None: only not our own.

    Raises:
        ExecFailed: the process could not be started: which step, and its errno.
        DeadlineExceededError: `timeout` has passed (init is stopped, or a file system hangs).
        UnavailableError: init is gone.
        BackendError: init refused the request, or said what no init of ours says.
    """
    if (stdio is None) != (request.tty is not None):
        raise InvalidArgumentError("a process has either a terminal or three descriptors")
    spec = protocol.encode_spec(request)
    started: Started | None = None
    with anyio.move_on_after(timeout):
        started = await _spawn(control, request, spec, stdio, before_exec, hold_life, pid_namespace, cgroup)
    if started is None:
        raise DeadlineExceededError(f"{_name(request)} was not started within {timeout:g} s and was ended")
    return started


async def _spawn(
    control: socket.socket,
    request: SpawnRequest,
    spec: bytes,
    stdio: tuple[int, int, int] | None,
    before_exec: Callable[[int, int], None],
    hold_life: Callable[[int, int, int], Awaitable[None]] | None,
    pid_namespace: int | None,
    cgroup: Sequence[int],
) -> Started:
    with contextlib.ExitStack() as kept:
        with _typed(request):
            life, go = await _ask(kept, control, request, spec, stdio, cgroup)
            pid, pidfd = await _started(kept, life, control, request, pid_namespace)
        reached("after init.started")
        if request.oom_score_adj is not None:
            _set_oom_score_adj(pid, pidfd, request.oom_score_adj)
        if hold_life is not None:
            await hold_life(life.fileno(), pid, pidfd)
        if len(cgroup) > 1:
            with _typed(request):
                await _placed(go, request)
        before_exec(pid, pidfd)
        reached("before init.go")
        with contextlib.suppress(BrokenPipeError):  # it was killed while it waited: `ended` will say by what
            go.send(b"g", _SEND)
        reached("after init.go")
        with _typed(request):
            master = await _executed(kept, go, request)
        reached("after init.exec")
        go.close()
        kept.pop_all()
        return Started(pid, pidfd, life, master)


@contextlib.contextmanager
def _typed(request: SpawnRequest) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of this process: no descriptors or memory left, too many of them in flight
        raise BackendError(
            f"{_name(request)} could not be started: {error.strerror or error}",
            hint="Too many open files are cured by a higher limit (ulimit -n) of this process."
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)
            else "",
        ) from error


async def _ask(
    kept: contextlib.ExitStack,
    control: socket.socket,
    request: SpawnRequest,
    spec: bytes,
    stdio: tuple[int, int, int] | None,
    cgroup: Sequence[int],
) -> tuple[socket.socket, socket.socket]:
    with contextlib.ExitStack() as theirs:
        life, their_life = _pair(kept, theirs)
        stamps.stamp(life)
        go, their_go = _pair(kept, theirs)
        memory = _memory(spec)
        try:
            fds = [their_life.fileno(), their_go.fileno(), memory, *(stdio or ()), *cgroup]
            packet = protocol.encode_request(request, len(spec), len(cgroup) - 1 if cgroup else None)
            reached("before init.spawn")
            await _send(control, packet, fds)
            reached("after init.spawn")
        finally:
            os.close(memory)
    return life, go


def _pair(kept: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept.callback(ours.close)
    theirs.callback(other.close)
    # A process-wide socket.setdefaulttimeout() would make Python wait by itself where MSG_DONTWAIT says no.
    ours.setblocking(False)
    return ours, other


def _memory(content: bytes) -> int:
    memory = os.memfd_create("unisandbox-spec", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(memory, view) :]
        fcntl.fcntl(
            memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
    except BaseException:
        os.close(memory)
        raise
    return memory


async def _send(control: socket.socket, packet: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    while True:
        try:
            control.sendmsg([packet], rights, _SEND)
        except BlockingIOError:
            await writable(control.fileno())
        except (BrokenPipeError, ConnectionResetError) as error:
            raise UnavailableError("the container's init is gone, so nothing can be started in it") from error
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            raise FailedPreconditionError("a descriptor for the process, or init's socket, is closed") from error
        else:
            return


async def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, from a socket that nobody else reads. Empty: the other end is closed."""
    while True:
        try:
            packet, ancillary, flags, _ = sock.recvmsg(protocol.ANSWER.size + 1, _FDS_SPACE, _RECEIVE)
            if not packet and not ancillary:  # again: see `stamps.peek`
                packet, ancillary, flags, _ = sock.recvmsg(protocol.ANSWER.size + 1, _FDS_SPACE, _RECEIVE)
        except BlockingIOError:
            await anyio.wait_readable(sock)
            continue
        except ConnectionResetError:  # closed by the other end before it had read all that we sent
            return b"", []
        fds = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if flags & _CUT:
            _close(fds)
            raise BackendError(
                "an answer of the container's init was cut",
                hint="This process may have too many open files (ulimit -n), or the sandbox is hostile.",
            )
        return packet, list(fds)


def _close(fds: array.array[int] | list[int]) -> None:
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def _judged(what: str, fds: list[int]) -> Iterator[None]:
    """Close `fds` unless all checks pass; say for whom a check failed."""
    try:
        yield
    except ValueError as error:
        _close(fds)
        raise BackendError(
            f"the container's init gave an answer that is none, for {what}: {error}",
            hint="Remove the sandbox: something inside may have taken it over.",
        ) from error
    except BaseException:
        _close(fds)
        raise


async def _started(
    kept: contextlib.ExitStack,
    life: socket.socket,
    control: socket.socket,
    request: SpawnRequest,
    pid_namespace: int | None,
) -> tuple[int, int]:
    packet, fds = await _receive(life)
    with _judged(_name(request), fds):
        if not packet and not fds:
            raise _no_answer(control, request)
        kind, a, b = protocol.decode_answer(packet)
        if kind == protocol.FAILED and not fds:
            raise protocol.decode_failure(a, b)
        if kind != protocol.STARTED or b or len(fds) != 1:
            raise ValueError(f"kind {kind} with {len(fds)} descriptors where a process was expected")
        pid = _pid_of(fds[0], a, pid_namespace)
        if pid is None:
            raise BackendError(f"{_name(request)} was killed before it was started")
    kept.callback(os.close, fds[0])
    kept.callback(_kill, fds[0])
    return pid, fds[0]


_LAST_BREATH_MS: Final = 200


def _no_answer(control: socket.socket, request: SpawnRequest) -> Exception:
    poll = select.poll()
    poll.register(control, 0)
    # One that is being killed loses its descriptors one after the other.
    if poll.poll(_LAST_BREATH_MS):
        return UnavailableError(f"the container's init has ended, so {_name(request)} was not started")
    return BackendError(f"the container's init refused to start {_name(request)}")


def _pid_of(pidfd: int, inside: int, pid_namespace: int | None) -> int | None:
    """The host's pid behind `pidfd`, which must be a process of another pid namespace; None when it has ended."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return None
    except OSError as error:
        raise ValueError("what came with it is no process") from error
    fields = dict(line.split(":\t", 1) for line in _read(f"/proc/self/fdinfo/{pidfd}").splitlines() if ":\t" in line)
    numbers = [int(word) for word in fields.get("NSpid", "").split()]
    if fields.get("Pid") == "-1":
        return None
    # One number would be a process of our own pid namespace: of the host, or (by SO_PEERPIDFD) this very one.
    if len(numbers) < 2 or numbers[-1] != inside or numbers[0] != int(fields.get("Pid", "0")):
        raise ValueError(f"process {inside} is not where it should be")
    if pid_namespace is not None:
        try:
            found = os.stat(f"/proc/{numbers[0]}/ns/pid").st_ino
        except OSError:  # it has ended, or is a zombie
            return None
        if found != pid_namespace:
            raise ValueError(f"process {inside} is in pid namespace {found} and not {pid_namespace}")
    return numbers[0]


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _set_oom_score_adj(pid: int, pidfd: int, value: int) -> None:
    # Done from here, since a process that runs init's program does not own its files in /proc.
    try:
        with open(f"/proc/{pid}/oom_score_adj", "wb", buffering=0) as file:
            signal.pidfd_send_signal(pidfd, 0)  # it lives, so the file that is open now is its own
            file.write(str(value).encode())
    except (FileNotFoundError, ProcessLookupError):
        pass  # it was killed meanwhile: `ended` will say by what
    except OSError as error:
        # The files of one that is ending are root's. Source: task_dump_owner(), fs/proc/base.c.
        if not pidfds.has_ended(pidfd, _LAST_BREATH_MS / 1000):
            raise ExecFailed("oom_score_adj", error.errno or errno.EIO) from error


async def _placed(go: socket.socket, request: SpawnRequest) -> None:
    """Wait until the process has written itself into its v1 cgroups: before that somebody would have to move it."""
    packet, fds = await _receive(go)
    with _judged(_name(request), fds):
        if not packet and not fds:
            return  # it was killed: `ended` will say by what
        kind, a, b = protocol.decode_answer(packet)
        if kind == protocol.FAILED and not fds:
            raise protocol.decode_failure(a, b)
        if kind != protocol.PLACED or a or b or fds:
            raise ValueError(f"kind {kind} with {len(fds)} descriptors where it should say that it is in its cgroups")


async def _executed(kept: contextlib.ExitStack, go: socket.socket, request: SpawnRequest) -> int | None:
    master: int | None = None
    while True:
        packet, fds = await _receive(go)
        with _judged(_name(request), fds):
            if not packet and not fds:
                break
            kind, a, b = protocol.decode_answer(packet)
            if kind == protocol.FAILED and not fds:
                raise protocol.decode_failure(a, b)
            if kind != protocol.TTY or request.tty is None or master is not None or len(fds) != 1:
                raise ValueError(f"kind {kind} with {len(fds)} descriptors before exec")
            _check_master(fds[0])
        master = fds[0]
        kept.callback(os.close, master)
    if request.tty is not None and master is None:
        raise BackendError(f"{_name(request)} was killed before it had its terminal")
    return master


def _check_master(fd: int) -> None:
    found = os.fstat(fd)
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != _PTMX:
        raise ValueError("what came is no terminal")
    try:
        fcntl.ioctl(fd, _TIOCGPTN, struct.pack("I", 0))
    except OSError as error:
        raise ValueError("what came is not the master of a terminal") from error


def _name(request: SpawnRequest) -> str:
    return repr(os.fsdecode(request.argv[0]))


def ended_now(life: socket.socket) -> Ended | None:
    """How the process behind `life` ended, if it has and init has told; otherwise None."""
    try:
        return _end_of(life)
    except (BlockingIOError, ConnectionResetError):
        return None


def _end_of(life: socket.socket) -> Ended | None:
    packet, at = stamps.peek(life, _END_BYTES)
    return Ended(status_of(packet), at) if packet else None


def status_of(packet: bytes) -> int:
    """The raw wait status in init's packet about an end. Raises BackendError: it is none of init's."""
    with _judged("the end of a process", []):
        kind, a, b = protocol.decode_answer(packet)
        if kind != protocol.ENDED:
            raise ValueError(f"kind {kind} where an end was expected")
        return protocol.decode_status(a, b)
    raise AssertionError("the block returns or raises")


def has_told(life: socket.socket) -> bool:
    """Whether there is something to be read about the end of the process behind `life`, or init is gone."""
    try:
        stamps.peek(life, _END_BYTES)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


async def began(life: socket.socket) -> bool:
    """Wait until the process behind `life` has ended; whether it had executed its program before.

    For whoever was not there when it was started. One that was not let go, or whose exec has failed, says so itself;
    init's word about its end comes behind that. True also when init died without telling.

    Raises:
        BackendError: init said what no init of ours says.
    """
    while True:
        try:
            packet, _ = stamps.peek(life, _END_BYTES)
        except BlockingIOError:
            await readable(life.fileno())
        except ConnectionResetError:
            return True
        else:
            return not (packet and _is_failure(packet))


def _is_failure(packet: bytes) -> bool:
    with _judged("a process that nobody let go", []):
        kind, a, b = protocol.decode_answer(packet)
        if kind == protocol.FAILED:
            protocol.decode_failure(a, b)
        elif kind == protocol.ENDED:
            protocol.decode_status(a, b)
        else:
            raise ValueError(f"kind {kind} where an end was expected")
        return kind == protocol.FAILED
    raise AssertionError("the block returns or raises")


async def ended(life: socket.socket) -> Ended | None:
    """Wait until the process behind `life` has ended.

    It only looks: every holder of a copy of `life` can ask, again and again and from several tasks.

    Returns:
        None when init died without telling.

    Raises:
        BackendError: init said what no init of ours says.
    """
    while True:
        try:
            return _end_of(life)
        except BlockingIOError:
            await readable(life.fileno())
        except ConnectionResetError:
            return None
