"""Enters a sandbox, says which process it is there, waits for a word, and becomes the program.

The keeper starts it (`python -I -S launcher.py`), so it is the standard library only. Descriptors: 0-2 are the
program's, 3 is a socket to the engine, 4 the request as JSON, from 5 on what has to be entered.

It forks: the one that stays outside ends at once, so that the other one becomes the keeper's child, in the sandbox's
pid namespace. The engine looks at it, writes down who it is and says "go"; the end of the socket tells that the program
runs.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Source: include/uapi/linux/sched.h, mount.h, prctl.h.
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Call the C library, and raise OSError where it fails."""
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source: bytes | None, target: str, kind: bytes | None, flags: int) -> None:
    """mount(2)."""
    call("mount", source, target.encode(), kind, ctypes.c_ulong(flags), None)


def build(root: str) -> None:
    """As the first process of a sandbox: make `root` the root, with a /proc of its own."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    # Mounts that came from another user namespace are locked; a copy can be moved. Source: mount_namespaces(7).
    mount(root.encode(), root, None, MS_BIND | MS_REC)
    mount(b"proc", f"{root}/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    call("syscall", ctypes.c_long(SYS_PIVOT_ROOT[os.uname().machine]), b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def become(request: "dict[str, Any]", peer: socket.socket) -> None:
    """Become the program; returns never, or raises."""
    os.setsid()
    peer.sendall(json.dumps({"step": "ready"}).encode())
    if peer.recv(16) != b"go":
        os._exit(1)  # nobody wants it any more
    os.umask(0o022)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by CPython
        signal.signal(ignored, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if request.get("reap"):
        # Who ignores SIGCHLD leaves no zombies, and stays so in the program. Source: sigaction(2), SIG_IGN.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name, limit in request["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for number in set(range(last + 1)) - set(request["capabilities"]):
        call("prctl", PR_CAPBSET_DROP, *map(ctypes.c_ulong, (number, 0, 0, 0)))
    os.setgroups([])
    os.setresgid(*[request["gid"]] * 3)
    os.setresuid(*[request["uid"]] * 3)
    if request["no_new_privileges"]:
        call("prctl", PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    try:
        os.chdir(request["cwd"])
    except OSError as error:
        fail(peer, "cwd", error)
    fail(peer, "exec", execute(request["argv"], request["env"]))


def execute(argv: "list[str]", env: "dict[str, str]") -> OSError:
    """Become the program, which is searched for as a shell does; returns why not.

    Not `os.execvpe`: it imports a module, and in here there may be none.
    """
    places = [""] if "/" in argv[0] else [f"{place}/" for place in env["PATH"].split(":")]
    failure: OSError = FileNotFoundError(errno.ENOENT, "no such program")
    for place in places:
        try:
            os.execve(place + argv[0], argv, env)  # noqa: S606 (it is what a sandbox is for)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            failure = error if isinstance(failure, FileNotFoundError) else failure
    return failure


def fail(peer: socket.socket, step: str, error: Exception) -> None:
    """Say what failed, and end."""
    number = getattr(error, "errno", None) or errno.EIO
    peer.sendall(json.dumps({"step": step, "errno": number, "text": str(error)}).encode())
    os._exit(1)


def main() -> None:
    """Enter, fork, become."""
    names = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    for fd in names:
        if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}"):
            os.set_inheritable(fd, False)
    peer = socket.socket(fileno=3)
    try:
        with open(4, "rb") as file:
            file.seek(0)
            request = json.load(file)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(request["oom_score_adj"]))
        flags = NEW_USER | NEW_NS | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
        if request["root"]:
            for fd in range(5, 5 + request["namespaces"]):
                call("setns", fd, 0)
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            call("unshare", NEW_PID | NEW_NS)
        else:
            call("setns", 5, flags)  # all that the first process is in. Source: setns(2), pidfds since Linux 5.8.
        pid = os.fork()
        if pid:
            peer.sendall(json.dumps({"step": "forked", "pid": pid}).encode())
            os._exit(0)
        if request["root"]:
            build(request["root"])
        become(request, peer)
    except Exception as error:
        fail(peer, "enter", error)


if __name__ == "__main__":
    try:
        main()
    finally:
        os._exit(1)  # whatever went wrong, nothing that is ours goes on in a sandbox
