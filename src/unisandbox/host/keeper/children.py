"""Children of the keeper that are forks of it: workers, which run jobs, and those that run guards.

The keeper reads what they say from its loop and never waits for one. Programs are started without a fork (`launches`).
Standard library only, and light: the keeper forks this code.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
import sys

from unisandbox.host import jobs, syscalls
from unisandbox.host.keeper import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisandbox.host.keeper.protocol import Message, Packet

# Those that mean something to the keeper: a child must not catch one of them in its stead. Few, since Python turns
# every number of a mask into an enum member.
_OURS = (signal.SIGCHLD, signal.SIGTERM)
_UMASK = 0o022
_READY = protocol.encode({"ready": True})
_LOST = 120  # exit code of a child that could not even report


def start_worker() -> tuple[int, socket.socket]:
    """Fork a child that runs jobs, one after the other, until its socket ends: its pid, and our end of the socket.

    It takes packets with `steps` and the fds that they name, and for each sends `result` with named fds, or `error`. It
    ends after an error, since a step may have failed anywhere; otherwise it sends `ready` once nothing of the job is
    left, and takes the next. What it knows of the keeper is what the keeper knew when it was forked: nothing in a job
    may depend on that.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keeper = os.getpid()
    try:
        pid = _fork(lambda: _work(far, keeper))
    except BaseException:
        near.close()
        raise
    finally:
        far.close()
    return pid, near


def _work(sock: socket.socket, keeper: int) -> None:
    _die_with(keeper)
    os.setpgid(0, 0)  # what a job starts (mkfs, the child of new namespaces) is ended with it: see `Family.reap`
    os.umask(_UMASK)
    _reset_signals()
    # Copies of what the keeper holds would keep it alive: namespaces, mounts, the ends of its clients' sockets.
    _close_all_but([sock.fileno()])
    gc.freeze()  # objects whose descriptors are closed now must not be collected: the numbers will be others'
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    buffer = protocol.new_buffer()
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        poll.poll()
        packet = protocol.receive(sock, buffer)
        if packet is None:
            os._exit(0)
        # Again: the kernel forgets it when a process changes its ids, as jobs do. Source: PR_SET_PDEATHSIG(2const).
        _die_with(keeper)
        done = _job(packet, sock)
        packet.close()
        # After the answer: what the job has killed takes a while to end.
        _reap_all()
        if not done:
            os._exit(0)
        syscalls.setns(home, syscalls.CLONE_NEWNS)
        sock.send(_READY)


def _job(packet: Packet, answer: socket.socket) -> bool:
    """Run the job and answer; whether it succeeded."""
    message: Message
    made: list[int] = []
    done = False
    try:
        if packet.lost:
            raise OSError(errno.EMFILE, "no file descriptors are left for what came with the job")
        result, named = jobs.run(packet.message["steps"], packet.fds, leave_children=True)  # type: ignore[arg-type]
        made = list(named.values())
        message = {"result": result, "names": list(named)}
        data = protocol.encode(message, made)
        done = True
    except jobs.StepError as error:
        message = {"errno": error.errno, "error": error.message, "index": error.index, "do": error.do}
        data = protocol.encode(message)
    except (OSError, ValueError, TypeError, KeyError, protocol.MessageTooLargeError) as error:
        made = []
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
        data = protocol.encode({"errno": number, "error": f"{type(error).__name__}: {error}"[:4000]})
    answer.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _packed(made))] if made else [])
    protocol.close_all(made)
    return done


def _reap_all() -> None:
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def start_guards(action: Callable[[int], None], keep: Sequence[int]) -> tuple[int, int]:
    """Fork a child that runs `action(writing end of a pipe)` with no other fd of ours than `keep`.

    It goes on when the keeper is killed. Returns its pid and the reading end.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)

    def child() -> None:
        _reset_signals()
        _close_all_but([*keep, writing])
        action(writing)
        os._exit(0)

    try:
        pid = _fork(child)
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    os.set_blocking(reading, False)
    return pid, reading


def _close_all_but(keep: Sequence[int]) -> None:
    """Close every descriptor but 0-2 and `keep`."""
    low = 3
    for fd in sorted(keep):
        if fd > low:
            syscalls.close_range(low, fd - 1)
        low = fd + 1
    syscalls.close_range(low)


def _packed(fds: list[int]) -> bytes:
    return b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)


def _fork(child: Callable[[], None]) -> int:
    """Fork; `child` never returns, and has its signals blocked until it says `_reset_signals`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    pid = -1
    try:
        pid = os.fork()
        if pid == 0:
            child()
    finally:
        if pid == 0:
            # An exception that nobody expected: its traceback goes to the keeper's log.
            sys.excepthook(*sys.exc_info())
            os._exit(_LOST)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
    return pid


def _reset_signals() -> None:
    """For a child that stays Python: the keeper's signals are not its own."""
    signal.set_wakeup_fd(-1)
    for number in _OURS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)


def _die_with(keeper: int) -> None:
    """A worker must not outlive the keeper: nobody waits for the result of its job."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(_LOST)
