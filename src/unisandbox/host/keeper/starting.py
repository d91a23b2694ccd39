"""Starting a keeper, or finding one: the state directory and its lock, the process, the socket. Client side."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import stat
import struct
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

import anyio

import unisandbox.host
from unisandbox.api.errors import FailedPreconditionError, UnavailableError
from unisandbox.host import bytecode, small_files
from unisandbox.host import pidfd as pidfds
from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import service
from unisandbox.host.keeper import protocol
from unisandbox.host.keeper.protocol import Message
from unisandbox.host.keeper.records import KeeperElsewhereError, KeeperWaitsError, Policy
from unisandbox.host.power import standing
from unisandbox.host.subordinate import Rows

# A former keeper of the same directory may be running guards (10 s) and waiting for deaths (2 s).
_LOCK_WAIT: Final = 15.0
_LOCK_POLL: Final = 0.01
_CONNECT_WAIT: Final = 5.0
_OPEN_FIRST: Final = "Open an engine on this directory first."
LOCK_BYTES: Final = 4096
"""More than a keeper writes into the lock file."""

# Leaves the process that started it (and its session) before it loads anything: what it forks then is small. The path
# comes last, so that the standard library wins.
_PROGRAM: Final = """\
import os, sys
os.setsid()
if os.fork(): os._exit(0)
sys.path.append(sys.argv[1])
from unisandbox.host.keeper.server import main
main(sys.argv[2])
"""


# State directories (device, inode) whose keeper this process owns; so it can tell an open one from one that it has just
# left. Bookkeeping of what the process has locked, as the kernel's own table is.
_owned: Final[set[tuple[int, int]]] = set()


class LockHolder(NamedTuple):
    """What the lock file of a state directory says about who holds it.

    `owner` is 0 when the keeper has none any more; all is empty while it is being written.
    """

    owner: int = 0
    start_time: int = 0
    keeper: int = 0
    keeper_start_time: int = 0
    policy: str = ""
    #: This very process has it open.
    is_ours: bool = False
    #: The keeper is on its way out, whatever its policy.
    is_ending: bool = False

    @property
    def is_leaving(self) -> bool:
        """The keeper is undoing what was done, since its owner is dead or has told it: the lock will be free soon.

        Or it had not yet begun when its owner died; then it ends at once, or will wait for another one. Or it was
        killed, and a child of it that undoes something goes on.
        """
        if self.is_ending:
            return True
        if self.policy == "keep" and pidfds.lives(self.keeper, self.keeper_start_time):
            return False
        return not self.has_owner

    @property
    def has_owner(self) -> bool:
        """The owner lives and has not left, also if the keeper has not heard of its end."""
        if self.owner == os.getpid():
            return self.is_ours
        return pidfds.lives(self.owner, self.start_time)


class Started(NamedTuple):
    """A process that is becoming a keeper: our end of its socket, and the child that leaves it behind."""

    sock: socket.socket
    child: int
    child_pidfd: int


def absolute(path: str) -> str:
    """An absolute path: the keeper has another working directory."""
    return os.path.abspath(path)


def open_state_dir(path: str) -> int:
    """Make the state directory if it is missing (0700); an fd of it.

    Raises:
        FailedPreconditionError: it belongs to somebody else, or is not a directory.
        OSError: it cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        os.makedirs(path, 0o700)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        raise FailedPreconditionError(f"state directory {path} is not a directory") from None
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(fd)
        raise FailedPreconditionError(
            f"state directory {path} is not ours alone (owner {status.st_uid}, mode {status.st_mode & 0o7777:04o})",
            hint="Choose another one, or give it to this user and take write permission from others.",
        )
    return fd


def _lock_file(state_dir: int, path: str) -> int:
    try:
        return small_files.opened(protocol.LOCK_NAME, os.O_RDWR, dir_fd=state_dir)
    except FileNotFoundError:
        if is_answered(state_dir):
            raise FailedPreconditionError(
                f"state directory {path} is in use by a keeper that answers, though its file {protocol.LOCK_NAME!r} was"
                " removed",
                hint="Close the engine there.",
            ) from None
    return small_files.opened(protocol.LOCK_NAME, os.O_RDWR | os.O_CREAT, dir_fd=state_dir)


def _try_state_lock(state_dir: int, path: str, policy: Policy) -> int | LockHolder:
    """Try to lock the state directory: the locked fd, or who holds it.

    Raises:
        FailedPreconditionError: the lock file was removed while a keeper has it.
    """
    reached("before state.lock")
    try:
        fd = _lock_file(state_dir, path)
    except small_files.NotARegularFileError as error:
        raise OSError(errno.EINVAL, "it is not a regular file", protocol.LOCK_NAME) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            return read_lock(fd)._replace(is_ours=identity_of(state_dir) in _owned)
        finally:
            os.close(fd)
    except BaseException:
        os.close(fd)
        raise
    me = os.getpid()
    content = json.dumps(
        {"owner": me, "start_time": pidfds.start_time(me), "keeper": 0, "keeper_start_time": 0, "policy": policy}
    )
    try:
        # Over what is there, and cut after that: on a full disk there is no room for what was given back before.
        data = content.encode()
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
    except BaseException:
        os.close(fd)  # or nobody could open the directory any more as long as this process lives
        raise
    reached("after state.lock")
    return fd


def read_lock(fd: int) -> LockHolder:
    """What an open lock file says."""
    return holder_in(os.pread(fd, LOCK_BYTES, 0))


def holder_in(content: bytes) -> LockHolder:
    """What this content of a lock file says; all is empty while it is being written, or when it is damaged."""
    try:
        said = json.loads(content)
        return LockHolder(
            owner=int(said["owner"]),
            start_time=int(said["start_time"]),
            keeper=int(said["keeper"]),
            keeper_start_time=int(said["keeper_start_time"]),
            policy=str(said["policy"]),
            is_ending=bool(said.get("ending", False)),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return LockHolder()


def identity_of(state_dir: int) -> tuple[int, int]:
    """Which directory it is, whatever its path."""
    status = os.fstat(state_dir)
    return status.st_dev, status.st_ino


def note_owned(identity: tuple[int, int]) -> None:
    """This process owns the keeper of this directory from now on."""
    _owned.add(identity)


def forget_owned(identity: tuple[int, int]) -> None:
    """This process has closed its connection to the keeper of this directory."""
    _owned.discard(identity)


async def lock_state_dir(dirfd: int, state_dir: str, policy: Policy) -> int:
    """Lock the state directory, waiting for a former keeper that is about to end: the locked fd.

    Raises:
        FailedPreconditionError: somebody else has it; says who.
    """
    deadline = anyio.current_time() + _LOCK_WAIT
    while True:
        got = _try_state_lock(dirfd, state_dir, policy)
        if isinstance(got, int):
            note_owned(identity_of(dirfd))
            return got
        if not got.is_leaving or anyio.current_time() > deadline:
            raise _locked(state_dir, got)
        # There is no event for it: a flock would have to be waited for in a thread.
        await anyio.sleep(_LOCK_POLL)


def _locked(state_dir: str, holder: LockHolder) -> FailedPreconditionError:
    if holder.policy == "keep" and not holder.has_owner and not holder.is_ending:
        return KeeperWaitsError(
            f"state directory {state_dir} is held by keeper {holder.keeper}, which waits for an owner",
            hint="Attach to it instead of starting another.",
        )
    if holder.is_leaving:
        return FailedPreconditionError(
            f"state directory {state_dir} is still locked; its keeper {holder.keeper} is ending (its owner was process "
            f"{holder.owner}), and has not finished within {_LOCK_WAIT:g} s",
            hint=f"See {protocol.LOG_NAME} there.",
        )
    return FailedPreconditionError(
        f"state directory {state_dir} is in use by process {holder.owner} (its keeper is {holder.keeper})",
        hint="Use another directory, or close the engine there.",
    )


async def begin(
    path: str, *, workdir: str, hide: Sequence[str], policy: Policy, guards: Message
) -> tuple[tuple[int, int], Started]:
    """Lock the state directory and start a keeper for it; see `Keeper.start`. `guards` is its first request.

    Returns:
        Which directory it is (until `forget_owned` it counts as ours), and the process.
    """
    dirfd = open_state_dir(path)
    try:
        identity = identity_of(dirfd)
        lock = await lock_state_dir(dirfd, path, policy)
        try:
            # Not before the lock: a former keeper of this directory may be about to remove it.
            reached("before work.mkdir", workdir)
            os.makedirs(workdir, 0o711, exist_ok=True)
            enter = service.ways_out() if policy == "keep" and service.service_of() else ()
            reached("before keeper process", path)
            started = _spawn_keeper(
                path, dirfd, lock, workdir=workdir, hide=hide, policy=policy, enter=enter, guards=guards
            )
            reached("after keeper process", path)
        except BaseException:
            forget_owned(identity)
            raise
        finally:
            os.close(lock)
    finally:
        os.close(dirfd)
    return identity, started


def _spawn_keeper(
    path: str,
    state_dir: int,
    lock: int,
    *,
    workdir: str,
    hide: Sequence[str],
    policy: Policy,
    enter: Sequence[str],
    guards: Message,
) -> Started:
    """Start the process. The caller waits for `child` (it exits at once) and says hello.

    Args:
        path, state_dir, lock: of the state directory.
        workdir, hide, policy: see `Keeper.start`.
        enter: `cgroup.procs` files of cgroups to which it moves first, where it can.
        guards: its first request, which it finds when it begins.

    Raises:
        UnavailableError: there is no Python interpreter to start.
    """
    executable = str(getattr(sys, "_base_executable", "") or sys.executable or "")
    if not executable:
        raise UnavailableError(
            "cannot start the keeper: this program does not know its Python interpreter (sys.executable is empty)",
            hint="Set sys.executable to a Python 3.11 or newer.",
        )
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pidfd = log = -1
    try:
        near.setblocking(False)
        near.send(protocol.encode(guards))
        pidfd = os.pidfd_open(os.getpid())
        log = _new_log(path)
        sources = [far.fileno(), lock, pidfd, state_dir, log]
        # Numbers above all of them, so that no dup2 hits another one's source, also where 0-2 are among these.
        base = max(3, *sources) + 1
        numbers = list(range(base, base + len(sources)))
        argument = json.dumps(
            {
                "fds": numbers[:-1],
                "enter": list(enter),
                "hide": list(hide),
                "workdir": workdir,
                "policy": policy,
                "ids": _ids(),
            }
        )
        source_root = os.path.dirname(os.path.dirname(unisandbox.host.__path__[0]))
        argv = [executable, "-I", "-S", "-X", "utf8", *bytecode.options(), "-c", _PROGRAM, source_root, argument]
        # Nothing of the caller's environment: it may hold secrets. A Python outside of the system's directories may
        # need this one to find its own library.
        env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        actions: list[tuple[object, ...]] = [
            *((os.POSIX_SPAWN_DUP2, source, number) for source, number in zip(sources, numbers, strict=True)),
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, numbers[-1], 1),
            (os.POSIX_SPAWN_DUP2, numbers[-1], 2),
        ]
        child = os.posix_spawn(
            executable,
            argv,
            env,
            file_actions=actions,
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    except FileNotFoundError as error:
        near.close()
        raise UnavailableError(f"cannot start the keeper with {executable}: {error.strerror}") from error
    except BaseException:
        near.close()
        raise
    finally:
        far.close()
        for fd in (pidfd, log):
            if fd >= 0:
                os.close(fd)
    try:
        child_pidfd = os.pidfd_open(child)
    except ProcessLookupError:
        child_pidfd = -1  # the host program reaps everything itself, and was quick
    return Started(near, child, child_pidfd)


def _ids() -> tuple[Rows, Rows] | None:
    """What it maps in a user namespace of its own. Root needs none; who cannot have one does without mounts."""
    if not standing.lacking():
        return None
    from unisandbox.host.power import ids, obstacles  # root has no use for them

    return None if obstacles.of_user_namespaces() else ids.maps()


def _new_log(path: str) -> int:
    """The keeper's log, empty, to be written to.

    Raises:
        OSError: it cannot be made, or something else is in its place.
    """
    log = os.path.join(path, protocol.LOG_NAME)
    try:
        return small_files.opened(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    except small_files.NotARegularFileError as error:
        raise OSError(errno.EINVAL, "it is not a regular file", log) from error


def finish_child(started: Started, *, kill: bool) -> None:
    """Reap the child that left the keeper behind; it has exited, or is killed now, or ends within microseconds."""
    if started.child_pidfd < 0:
        return
    try:
        if kill:
            signal.pidfd_send_signal(started.child_pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, started.child_pidfd, os.WEXITED)
    except (ChildProcessError, ProcessLookupError):
        pass  # the host program reaps everything itself
    finally:
        os.close(started.child_pidfd)


async def reach(path: str) -> tuple[tuple[int, int], socket.socket]:
    """Connect to the keeper of a state directory: which directory it is, and the socket.

    Raises:
        UnavailableError: none listens there.
    """
    try:
        dirfd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UnavailableError(
            f"cannot reach the keeper of {path}: there is no such directory", hint=_OPEN_FIRST
        ) from None
    try:
        return identity_of(dirfd), await connect(dirfd, path)
    finally:
        os.close(dirfd)


def is_answered(state_dir: int) -> bool:
    """Whether a keeper listens at the socket of a state directory, with or without its lock file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        try:
            sock.connect(f"/proc/self/fd/{state_dir}/{protocol.SOCKET_NAME}")
        except BlockingIOError:
            return True  # it has many to answer
        except OSError:
            return False
        return True


def _is_elsewhere(sock: socket.socket) -> bool:
    """Whether who listens at the other end is in another pid namespace, above ours or below it.

    Source: SO_PEERCRED, unix(7), as of listen(2); its pid is 0 where we have no number for it.
    """
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid == 0 or not pidfds.shares_namespace(pid)


async def connect(state_dir: int, path: str) -> socket.socket:
    """Connect to the keeper of a state directory; waits a while when many others do so at this moment.

    Raises:
        UnavailableError: none listens there.
        KeeperElsewhereError: it is in another pid namespace.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    deadline = anyio.current_time() + _CONNECT_WAIT
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(f"/proc/self/fd/{state_dir}/{protocol.SOCKET_NAME}")
                break
            except BlockingIOError:
                # The listener's queue is full. There is no event for a place in it. Source: unix(7), connect(2).
                if anyio.current_time() > deadline:
                    raise
                await anyio.sleep(_LOCK_POLL)
    except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
        sock.close()
        if error.errno == errno.EAGAIN:
            why, hint = (
                f"it has not taken a connection for {_CONNECT_WAIT:g} s",
                "See whether its process is suspended.",
            )
        else:
            why, hint = "there is none", _OPEN_FIRST
        raise UnavailableError(f"cannot reach the keeper of {path}: {why}", hint=hint) from error
    except BaseException:
        sock.close()
        raise
    # It would close the connection without a word, as it does to programs of its sandboxes.
    if _is_elsewhere(sock):
        sock.close()
        raise KeeperElsewhereError(
            f"the keeper of {path} runs in another pid namespace, and takes no requests from this one",
            hint="Use the directory there, or share that pid namespace (docker run --pid=host, hostPID: true).",
        )
    return sock


def log_tail(path: str) -> str:
    """The end of the keeper's log."""
    try:
        with open(small_files.opened(os.path.join(path, protocol.LOG_NAME)), "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            return file.read().decode(errors="replace")
    except (OSError, small_files.NotARegularFileError):
        return ""
