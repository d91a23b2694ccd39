"""Which OCI runtimes this host has, their versions, and what each can do.

A program is believed to be a runtime only after its `--version` said so. What it can do comes from its `features`
command where it has one, and from a table of tested versions for everything that no command tells.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, cast

import anyio

from unisandbox.api.errors import UnavailableError
from unisandbox.host.power import standing

RuntimeName = Literal["crun", "runc", "youki"]
FifoKind = Literal["write", "read", ""]

RUNTIMES: Final[tuple[RuntimeName, ...]] = ("crun", "runc", "youki")
# Where distributions put runtimes; a service's PATH often lacks the sbin directories.
_USUAL_PLACES: Final = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_QUERY_SECONDS: Final = 5.0
_QUERY_BYTES: Final = 65536
_VERSION: Final = re.compile(r"\A(crun|runc|youki) version:? (\d+(?:\.\d+){1,3})(\S*)")
_SPEC: Final = re.compile(r"^spec: (\d+\.\d+\.\d+)", re.MULTILINE)
# Every runtime since 2017 accepts it. crun before 1.9 refuses whatever does not begin with "1.0".
_OLDEST_SPEC: Final = "1.0.2"
# The newest version of the specification that this library was written by.
_NEWEST_SPEC: Final = (1, 2, 1)
_HINT: Final = "Install one: apt install crun."


class Features(NamedTuple):
    """What a runtime can do. False where it is not known.

    Attributes:
        cgroup_disabled: it can be told to leave cgroups alone.
        seccomp: it can set seccomp filters.
        seccomp_bpf_annotation: it takes a compiled filter in the annotation `run.oci.seccomp_bpf_data` (base64).
        fifo: how its created containers are started without it: "write" a byte to exec.fifo, "read" one from it, or
            "" when only its `start` can.
        removable_state: a stopped container is deleted by removing its state directory (no cgroup, no hooks).
        sealed: run from a sealed memory file it spares itself a copy and a second exec.
        foreign_netns: with a user namespace joined, it can also join a network namespace that this user namespace
            does not own.
        held_userns: it can join a user namespace together with other namespaces by paths into /proc/PID/fd of a
            process outside. (youki opens those paths only when it is inside, where they are closed to it; but for a
            pid namespace it can be made to enter them first.)
        recursive_readonly: it knows the mount option `rro`.
        idmapped_mounts: it can map the ids of bind mounts.
        whole_binds: in a user namespace, too, `rbind` shows what is mounted below the source. (crun 1.8.1 opens it
            without that.)
        preserve_fds: it passes fds 3, 4 ... on to the container.
        own_keyring: it makes a session keyring for the container, if it is not told otherwise.
    """

    cgroup_disabled: bool = False
    seccomp: bool = False
    seccomp_bpf_annotation: bool = False
    fifo: FifoKind = ""
    removable_state: bool = False
    sealed: bool = False
    foreign_netns: bool = False
    held_userns: bool = False
    recursive_readonly: bool = False
    idmapped_mounts: bool = False
    whole_binds: bool = False
    preserve_fds: bool = False
    own_keyring: bool = False


class RuntimeProgram(NamedTuple):
    """A runtime that is installed here.

    Attributes:
        name: which one it is, by its own word.
        path: absolute.
        version: for comparisons, such as (1, 8, 1).
        version_text: as it says it, such as "1.1.5+ds1".
        oci_version: the `ociVersion` to write into its bundles: the newest that it is known to accept.
        features: what it can do.
        identity: device, inode, size and time of change (ns) of the file that was asked.
    """

    name: RuntimeName
    path: str
    version: tuple[int, ...]
    version_text: str
    oci_version: str
    features: Features
    identity: tuple[int, int, int, int]


# What is lost with a runtime that lacks a feature; what is not here only takes longer, or is done in another way.
_LOSSES: Final = {
    "seccomp": "seccomp='default'",
    "held_userns": "share_pid=True in a user namespace of its own",
    "recursive_readonly": "mounts of bundles that are read-only with all below them (rro)",
}


def losses(program: RuntimeProgram) -> list[str]:
    """What cannot be had with this runtime, in the words of who asks for it."""
    return [words for name, words in _LOSSES.items() if not getattr(program.features, name)]


class Rejected(NamedTuple):
    """A file with a runtime's name that is none, and why."""

    path: str
    reason: str


# Verdicts by path and identity: a query costs a process of 3-6 ms. Content of a file decides, so it may be shared.
_known: dict[tuple[str, tuple[int, int, int, int]], RuntimeProgram | Rejected] = {}


def keyring_arguments(program: RuntimeProgram) -> list[str]:
    """What lets `create` do without a keyring where a filter of system calls forbids it, as Docker's own does.

    What runs in the container is under the same filter then, and has no use for ours.
    """
    return ["--no-new-keyring"] if program.features.own_keyring and standing.denies_keyrings() else []


async def find_runtimes(path: str | None = None) -> list[RuntimeProgram]:
    """The runtimes that are installed, the one to prefer first; at most one of each name, by the order of `path`.

    Args:
        path: directories separated by ":"; by default PATH and then the usual places. A broken program in an earlier
            directory does not hide a good one in a later.
    """
    return [verdict for verdict in await _verdicts(path) if isinstance(verdict, RuntimeProgram)]


async def pick_runtime(prefer: str | None = None, path: str | None = None) -> RuntimeProgram:
    """The runtime to use: `prefer` (a name or an absolute path), or the first of crun, runc, youki that is there.

    Raises:
        UnavailableError: none, or not the one asked for; says what was looked at and how to get one.
    """
    if prefer is not None and "/" in prefer:
        verdict = await _examine(os.path.abspath(prefer))  # noqa: ASYNC240 (of a short string)
        if isinstance(verdict, RuntimeProgram):
            return verdict
        raise UnavailableError(f"{prefer} cannot be used as an OCI runtime: {verdict.reason}", hint=_HINT)
    names: Sequence[str] = RUNTIMES if prefer is None else (prefer,)
    rejected: list[Rejected] = []
    for verdict in await _verdicts(path, names):
        if isinstance(verdict, RuntimeProgram):
            return verdict
        rejected.append(verdict)
    place = "PATH" if path is None else path
    message = f"no OCI runtime found (looked for {', '.join(names)} in {place})"
    if rejected:
        message += ": " + "; ".join(f"{entry.path}: {entry.reason}" for entry in rejected[:4])
    raise UnavailableError(message, hint="Install it: apt install runc." if prefer == "runc" else _HINT)


async def _verdicts(path: str | None, names: Sequence[str] = RUNTIMES) -> list[RuntimeProgram | Rejected]:
    """One program of each name (after the files that were rejected on the way to it), in order of preference."""
    verdicts: list[RuntimeProgram | Rejected] = []
    for name in names:
        for candidate in _candidates(name, path):
            verdict = await _examine(candidate)
            if isinstance(verdict, RuntimeProgram) and verdict.name != name:
                verdict = Rejected(candidate, f"says that it is {verdict.name}")
            verdicts.append(verdict)
            if isinstance(verdict, RuntimeProgram):
                break
    return verdicts


def _candidates(name: str, path: str | None) -> list[str]:
    """The files of a name, in the order in which they are looked at."""
    if path is None:
        directories = [*os.environ.get("PATH", "").split(os.pathsep), *_USUAL_PLACES]
    else:
        directories = path.split(os.pathsep)
    # An empty or relative entry means the current directory: whoever may write there must not choose what root runs.
    absolute = dict.fromkeys(os.path.normpath(each) for each in directories if os.path.isabs(each))
    candidates = [os.path.join(directory, name) for directory in absolute]
    return list(filter(os.path.lexists, candidates))


async def _examine(path: str) -> RuntimeProgram | Rejected:
    try:
        status = os.stat(path)
    except OSError as error:
        return Rejected(path, error.strerror or str(error))
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    known = _known.get((path, identity))
    if known is None:
        known = await _ask(path, identity)
        _known[path, identity] = known
    return known


async def _ask(path: str, identity: tuple[int, int, int, int]) -> RuntimeProgram | Rejected:
    try:
        text = (await _query([path, "--version"])).decode("utf-8", "replace")
    except OSError as error:
        return Rejected(path, error.strerror or str(error))
    match = _VERSION.match(text)
    if match is None:
        return Rejected(path, f"its --version is not that of a known runtime: {text[:60]!r}")
    name, numbers, suffix = match.groups()
    version = tuple(int(number) for number in numbers.split("."))
    told: dict[str, object] = {}
    if name == "youki" or (name == "runc" and version >= (1, 1)):
        # crun has the command in some versions; what we need of it the table knows better.
        told = await _told(path)
    runtime = cast("RuntimeName", name)
    return RuntimeProgram(
        name=runtime,
        path=path,
        version=version,
        version_text=numbers + suffix,
        oci_version=_spec_version(runtime, version, text, told),
        features=_features(runtime, version, text, told),
        identity=identity,
    )


async def _told(path: str) -> dict[str, object]:
    """What the `features` command says; empty when it says nothing useful. Source: runtime-spec features.md."""
    try:
        told = json.loads(await _query([path, "features"]))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _spec_version(name: RuntimeName, version: tuple[int, ...], text: str, told: dict[str, object]) -> str:
    newest = str(told.get("ociVersionMax", ""))
    if not newest and name == "crun" and version >= (1, 9):
        match = _SPEC.search(text)
        newest = match.group(1) if match else ""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", newest)
    if match is None or newest.partition("-")[2]:
        # "1.0.2-dev" is a version before 1.0.2.
        return _OLDEST_SPEC
    numbers = cast("tuple[int, int, int]", tuple(int(part) for part in match.groups()))
    if numbers <= (1, 0, 2):
        return _OLDEST_SPEC
    return ".".join(str(number) for number in min(numbers, _NEWEST_SPEC))


def _features(name: RuntimeName, version: tuple[int, ...], text: str, told: dict[str, object]) -> Features:
    """The table. Tested: crun 1.8.1 and 1.28, runc 1.1.5, 1.3.6 and 1.5.3, youki 0.7.0."""
    # A new major version may change every private thing.
    tested = (1, 0) <= version < (2,)
    if name == "crun":
        # Source: crun.1.md, and src/libcrun/{status,container,seccomp,cloned_binary}.c of 1.8.1.
        seccomp = "+SECCOMP" in text
        return Features(
            cgroup_disabled=True,
            seccomp=seccomp,
            seccomp_bpf_annotation=seccomp and tested,
            fifo="write" if tested else "",
            removable_state=tested,
            sealed=tested,
            foreign_netns=True,
            held_userns=True,
            recursive_readonly=version >= (1, 4),
            idmapped_mounts=version >= (1, 5),
            preserve_fds=True,
            own_keyring=True,
        )
    linux = told.get("linux")
    linux = linux if isinstance(linux, dict) else {}
    extensions = linux.get("mountExtensions")
    idmap = extensions.get("idmap") if isinstance(extensions, dict) else None
    idmapped_mounts = isinstance(idmap, dict) and bool(idmap.get("enabled"))
    options = told.get("mountOptions")
    recursive_readonly = isinstance(options, list) and "rro" in options
    if name == "runc":
        seccomp_told = linux.get("seccomp")
        return Features(
            seccomp=bool(seccomp_told.get("enabled")) if isinstance(seccomp_told, dict) else "libseccomp" in text,
            fifo="read" if tested else "",
            held_userns=True,
            recursive_readonly=recursive_readonly,
            idmapped_mounts=idmapped_mounts,
            whole_binds=True,
            preserve_fds=True,
            own_keyring=True,
        )
    # Its `features` is silent on seccomp, its --version is not. Source: youki 0.7.0, commands/features.rs and info.rs.
    return Features(
        seccomp="libseccomp: " in text,
        recursive_readonly=recursive_readonly,
        idmapped_mounts=idmapped_mounts,
        preserve_fds=True,
    )


async def _query(argv: list[str]) -> bytes:
    """The output (at most 64 KiB) of a program that is expected to end at once.

    Raises:
        OSError: it cannot be executed, failed, took longer than 5 s or wrote too much; nothing of it runs any more.
    """
    reader, writer = os.pipe()
    try:
        with open("/dev/null", "r+b", buffering=0) as null:  # noqa: ASYNC230 (it does not block)
            actions = [
                (os.POSIX_SPAWN_DUP2, null.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, writer, 1),
                (os.POSIX_SPAWN_DUP2, null.fileno(), 2),
            ]
            try:
                pid = os.posix_spawn(  # noqa: ASYNC221 (it does not block: vfork until the exec)
                    argv[0],
                    argv,
                    {"PATH": os.pathsep.join(_USUAL_PLACES), "LC_ALL": "C"},
                    file_actions=actions,
                    setpgroup=0,
                    setsigmask=(),
                    setsigdef=[signal.SIGPIPE],
                )
            finally:
                os.close(writer)
        return await _collect(argv, pid, reader)
    finally:
        os.close(reader)


async def _collect(argv: Sequence[str], pid: int, reader: int) -> bytes:
    said = bytearray()
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        # Somebody in this process reaps all children, and was quicker: what it wrote is in the pipe all the same.
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            said += os.read(reader, _QUERY_BYTES)
        return bytes(said)
    failure: OSError | None = OSError(errno.ETIMEDOUT, f"gave no answer to {argv[1]} within {_QUERY_SECONDS:g} s")
    try:
        with select.epoll(flags=select.EPOLL_CLOEXEC) as poll, anyio.move_on_after(_QUERY_SECONDS):
            poll.register(reader, select.EPOLLIN)
            poll.register(pidfd, select.EPOLLIN)
            ended = False
            while not ended:
                await anyio.wait_readable(poll.fileno())
                ready = dict(poll.poll(0))
                if ready.get(reader, 0) & select.EPOLLIN:
                    said += os.read(reader, _QUERY_BYTES)
                    if len(said) > _QUERY_BYTES:
                        failure = OSError(errno.EFBIG, f"answered {argv[1]} with more than {_QUERY_BYTES} bytes")
                        break
                elif reader in ready:
                    poll.unregister(reader)
                # All that it wrote is read before its end is believed.
                ended = pidfd in ready and not ready.get(reader, 0) & select.EPOLLIN
            else:
                failure = None
    finally:
        status = _end(pid, pidfd)
        os.close(pidfd)
    if failure is None and status not in {None, 0}:
        failure = OSError(errno.EIO, f"{argv[1]} failed with {_how(status)}")
    if failure is not None:
        raise failure
    return bytes(said)


def _end(pid: int, pidfd: int) -> int | None:
    """Kill the group (the unreaped leader keeps its number from being used again), reap the leader: its code."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        # This process has a reaper of its own, which took it.
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _how(status: int | None) -> str:
    return f"signal {-status}" if status is not None and status < 0 else f"code {status}"
