"""The client of the keeper: anyio, on any loop; no thread, no background task.

Whoever waits for an answer or an exit reads the socket for all that wait (`host.turns`). One client belongs to one
event loop, but to no task: it may be opened in one and closed in another.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import select
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import anyio
import attrs

from unisandbox.api.errors import BackendError, FailedPreconditionError, InvalidArgumentError, UnavailableError
from unisandbox.host.keeper import protocol, starting
from unisandbox.host.keeper.link import Link, error_of
from unisandbox.host.keeper.protocol import Message
from unisandbox.host.keeper.records import (
    CloseReport,
    EventPage,
    ExitRecord,
    Guard,
    Hello,
    JobFailed,
    JobResult,
    Policy,
    Reclaimed,
    RingData,
    Spawned,
    SpawnFailed,
    SpawnStage,
)
from unisandbox.host.keeper.turnstile import Turnstile
from unisandbox.host.readiness import readable

# How many exits the client remembers; the keeper is asked for older ones.
_EXITS_KEPT = 16384
# How many of the prefixes that have expired it remembers; names are not used again.
_EXPIRATIONS_KEPT = 16384
_START_TIME = 30.0
_CLOSE_TIME = 20.0


class Keeper:
    """A connection to a keeper. Open it with `start` or `attach`; end it with `close` (owner) or `abandon`.

    Every method raises `UnavailableError` once the keeper has ended (also while it waits), `FailedPreconditionError`
    after `close` or `abandon`, and `InvalidArgumentError` for a request that is too large (200 KiB, 64 fds). Fds that
    are passed stay the caller's; fds that come back are the caller's to close, and close-on-exec.
    """

    def __init__(self, state_dir: str, identity: tuple[int, int], sock: socket.socket) -> None:
        """Not for callers: see `start` and `attach`."""
        self.state_dir = state_dir
        self._identity = identity
        self.hello: Hello
        #: The keeper's process id; `/proc/PID/fd/N` reaches what it holds, `/proc/PID/root` its mounts.
        self.pid: int = 0
        #: Readable when the keeper has ended.
        self.pidfd: int = -1
        self._link = Link(sock, state_dir, self._pushed)
        self._exits: dict[tuple[int, int], ExitRecord] = {}
        self._last_seq = 0
        #: How often the keeper had forgotten exits before it could tell us.
        self._gaps = 0
        self._expired: dict[str, None] = {}
        self._turnstile = Turnstile(self._link)
        self._ours: set[tuple[int, int]] = set()
        self._owns = False
        self._ended = False

    # --- opening ---

    @classmethod
    async def start(cls, state_dir: str, *, workdir: str, hide: Sequence[str] = (), policy: Policy = "stop") -> Keeper:
        """Start a keeper for this state directory and become its owner.

        Args:
            state_dir: made if missing; holds `keeper.sock`, `lock`, `exits`, `keeper.log`. Locked as long as the
                keeper lives.
            workdir: in the keeper's mount namespace a private tmpfs lies here (mode 0711); made if missing.
            hide: existing directories that an empty read-only tmpfs covers in the keeper's mount namespace.
            policy: what happens when the owner is gone: "stop" undoes everything and ends, "keep" waits for another.

        Raises:
            FailedPreconditionError: another engine is open on this directory (it is named), or it is not ours alone.
            UnavailableError: the keeper could not begin; says why.
        """
        state_dir, workdir = starting.absolute(state_dir), starting.absolute(workdir)
        dirfd = starting.open_state_dir(state_dir)
        try:
            identity = starting.identity_of(dirfd)
            lock = await starting.lock_state_dir(dirfd, state_dir, policy)
            try:
                # Not before the lock: a former keeper of this directory may be about to remove it.
                os.makedirs(workdir, 0o711, exist_ok=True)
                started = starting.spawn_keeper(state_dir, dirfd, lock, workdir=workdir, hide=hide, policy=policy)
            except BaseException:
                starting.forget_owned(identity)
                raise
            finally:
                os.close(lock)
        finally:
            os.close(dirfd)
        keeper = cls(state_dir, identity, started.sock)
        keeper._owns = True
        try:
            with anyio.fail_after(_START_TIME):
                await keeper._greet(after=0)
        except TimeoutError:
            keeper.abandon()
            raise UnavailableError(f"the keeper of {state_dir} did not begin within {_START_TIME:g} s") from None
        except BaseException:
            keeper.abandon()
            raise
        finally:
            starting.finish_child(started, kill=keeper.pid == 0)
        return keeper

    @classmethod
    async def attach(cls, state_dir: str, *, own: bool = False, after: int = 0) -> Keeper:
        """Connect to the keeper that runs for this state directory.

        Args:
            state_dir: as it was given to `start`.
            own: become its owner, whose end its policy speaks of.
            after: exits up to this number are known already; `wait_exit` asks for them when it needs one.

        Raises:
            UnavailableError: none runs, or it speaks another version of the protocol.
            FailedPreconditionError: `own` was asked for and it has an owner, whose pid is named.
        """
        state_dir = starting.absolute(state_dir)
        try:
            dirfd = os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnavailableError(f"cannot reach the keeper of {state_dir}: there is no such directory") from None
        try:
            keeper = cls(state_dir, starting.identity_of(dirfd), await starting.connect(dirfd, state_dir))
        finally:
            os.close(dirfd)
        try:
            await keeper._greet(after)
            if own:
                await keeper._own()
        except BaseException:
            keeper.abandon()
            raise
        return keeper

    async def _greet(self, after: int) -> None:
        self._last_seq = after
        packet = await self._link.ask("hello", after=after)
        message = packet.message
        if message.get("version") != protocol.VERSION:
            packet.close()
            raise UnavailableError(
                f"the keeper of {self.state_dir} speaks version {message.get('version')} of its protocol, "
                f"this library version {protocol.VERSION}",
                hint="Close it with the version of unisandbox that started it.",
            )
        self.pidfd = packet.claim()
        self.pid = cast("int", message["pid"])
        self._link.pid = self.pid
        self.hello = Hello(
            pid=self.pid,
            boot_id=cast("str", message["boot_id"]),
            version=protocol.VERSION,
            policy=cast("Policy", message["policy"]),
            owner=cast("bool", message["owner"]),
            private_mounts=cast("bool", message["private_mounts"]),
            client=cast("int", message["client"]),
            owner_pid=cast("int", message["owner_pid"]),
        )

    async def _own(self) -> None:
        pidfd = os.pidfd_open(os.getpid())
        try:
            await self._link.ask("own", [pidfd])
        except OSError as error:
            if error.errno in {errno.EBUSY, errno.ESHUTDOWN}:
                raise FailedPreconditionError(f"cannot own the keeper of {self.state_dir}: {error.strerror}") from None
            raise
        finally:
            os.close(pidfd)
        starting.note_owned(self._identity)
        self._owns = True
        self.hello = attrs.evolve(self.hello, owner=True, owner_pid=os.getpid())

    # --- programs and jobs ---

    async def spawn(
        self,
        key: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str = "/",
        cgroup_procs: Sequence[str] = (),
        mounts: str = "",
        fds: Sequence[int] = (),
    ) -> Spawned:
        """Start a program as a child of the keeper, as leader of a session of its own.

        Args:
            key: names this request. Asked again (after a lost answer, by another client) with the same key, the keeper
                answers as the first time and starts nothing.
            argv: `argv[0]` is a path; PATH is not searched.
            env: its whole environment.
            cwd: absolute.
            cgroup_procs: paths of `tasks` and `cgroup.procs` files, entered before the exec, as the host sees them,
                also below what is hidden. In a cgroup2 directory it is born: that is the quick way.
            mounts: name of the held mount namespace that it enters; empty: the keeper's own.
            fds: become its 0..n-1; of 0-2 the missing ones are /dev/null. Nothing else is open in it.

        Cancelled, it kills what it has started.

        Raises:
            SpawnFailed: nothing was started; see `stage` and `errno`.
        """
        request: Message = {"key": key, "argv": list(argv), "env": dict(env), "cwd": cwd}
        request["cgroup_procs"] = list(cgroup_procs)
        if mounts:
            request["mounts"] = mounts
        try:
            packet = await self._link.request("spawn", fds, request)
        except anyio.get_cancelled_exc_class():
            self._link.say({"op": "cancel_spawn", "key": key})
            raise
        error = error_of(packet)
        if error is not None:
            stage = cast("SpawnStage", packet.message.get("stage", "fork"))
            raise SpawnFailed(error.errno or errno.EIO, f"cannot start a program: {error.strerror}", stage)
        pid, start_time = cast("int", packet.message["pid"]), cast("int", packet.message["start_time"])
        if packet.lost:
            self._link.say({"op": "cancel_spawn", "key": key})
            raise SpawnFailed(errno.EMFILE, f"cannot start {argv[0]}: no file descriptor left here for it", "pidfd")
        if (pid, start_time) not in self._exits:
            self._ours.add((pid, start_time))
        return Spawned(pid, start_time, packet.claim() if packet.fds else -1)

    async def job(
        self,
        steps: Sequence[Mapping[str, object]],
        *,
        hold: Mapping[str, str] | None = None,
        timeout: float = 30.0,
        fds: Sequence[int] = (),
    ) -> JobResult:
        """Run `unisandbox.host.jobs` steps in a fork of the keeper, in its mount namespace.

        Args:
            steps: see `host.jobs`; they name the `fds` by index.
            hold: name of a result fd -> name under which the keeper holds it; other result fds are closed.
            timeout: seconds; then it is killed.
            fds: given to the steps.

        Cancelled, it is killed, and no later job of this keeper begins before it is dead.

        Raises:
            JobFailed: a step failed, or the time is over.
        """
        hold = dict(hold or {})
        number = self._link.number()
        request: Message = {"steps": [dict(step) for step in steps], "hold": hold, "timeout": timeout}
        try:
            packet = await self._link.request("job", fds, request, number)
        except anyio.get_cancelled_exc_class():
            self._link.say({"op": "cancel_job", "job": number, "names": list(hold.values())})
            raise
        error = error_of(packet)
        if error is not None:
            index, do = cast("int | None", packet.message.get("index")), cast("str | None", packet.message.get("do"))
            raise JobFailed(error.errno or errno.EIO, str(error.strerror), index, do)
        return JobResult(
            cast("Mapping[str, object]", packet.message["result"]), cast("Mapping[str, int]", packet.message["held"])
        )

    # --- exits ---

    async def wait_exit(self, pid: int, start_time: int) -> ExitRecord:
        """Wait for the end of a child (or orphan) of the keeper; also if it ended before, or while nobody was attached.

        Safe from several tasks, and answers the same each time.

        Raises:
            ProcessLookupError: it is gone and how it ended is not known: the keeper never was its parent, or it is so
                long ago that it is forgotten.
        """
        process = (pid, start_time)
        gaps = self._gaps
        if process not in self._exits and process not in self._ours:
            record = await self._exit_of(process)
            if record is not None:
                return record
        while True:
            await self._link.until(lambda seen=gaps: process in self._exits or self._gaps != seen)  # type: ignore[misc]
            if process in self._exits:
                return self._exits[process]
            # We did not read for so long that the keeper has forgotten exits that we were not told; perhaps this one.
            gaps = self._gaps
            record = await self._exit_of(process)
            if record is not None:
                return record

    async def _exit_of(self, process: tuple[int, int]) -> ExitRecord | None:
        try:
            packet = await self._link.ask("exit_of", pid=process[0], start_time=process[1])
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, str(error.strerror)) from None
        told = cast("tuple[int, int, int, int, float] | None", packet.message["exit"])
        return None if told is None else ExitRecord(*told)

    async def exits_after(self, seq: int) -> tuple[list[ExitRecord], int]:
        """Exits after number `seq`, oldest first (at most 1000), and the oldest number that the keeper still knows.

        A first record later than `seq + 1` means that those between are forgotten.
        """
        packet = await self._link.ask("exits_after", after=seq)
        records = cast("list[tuple[int, int, int, int, float]]", packet.message["exits"])
        return [ExitRecord(*record) for record in records], cast("int", packet.message["first"])

    async def ack(self, seq: int) -> None:
        """All exits up to `seq` are in safety: the journal may be cut there. Owner only."""
        await self._link.ask("ack", seq=seq)

    @property
    def last_seq(self) -> int:
        """The number of the last exit that this client was told."""
        return self._last_seq

    # --- holding ---

    async def hold(self, name: str, fd: int) -> int:
        """Let the keeper hold a copy of `fd`: the number N for `/proc/KEEPER/fd/N`.

        Raises:
            FileExistsError: the name is taken.
        """
        return cast("int", (await self._link.ask("hold", [fd], name=name)).message["number"])

    async def hold_now(
        self, fds: Mapping[str, int], *, spool: Mapping[str, int] | None = None, stamp: Collection[str] = ()
    ) -> None:
        """Let the keeper hold copies of several fds (at most 64), which it gets even if this process dies right after.

        A message without an answer: waits only while the keeper's queue is full. What was held or ringed under one of
        these names before is closed. Should the keeper have no room for the fds it holds none of them, and its log says
        so.

        Args:
            fds: fds by the names under which they are held.
            spool: of those that others write to (pipes, terminals, sockets), how many bytes to keep: when the
                connection that held them ends and the keeper lives on, it begins to drain them, and keeps the last so
                many bytes of each. If all of them together would be over 256 MiB, each gets its share of that.
                See `reclaim`.
            stamp: of those that can be waited for: the keeper notes when they first become readable. See `stamps`.

        Raises:
            InvalidArgumentError: more than 64 fds, or `spool` or `stamp` name one that is not among them.
        """
        spool = dict(spool or {})
        for name in fds:
            _checked(name)
        strangers = ({*spool} | {*stamp}) - {*fds}
        if strangers:
            raise InvalidArgumentError(f"to be spooled or stamped, but not among the fds: {sorted(strangers)}")
        message: Message = {"op": "hold_now", "names": list(fds), "spool": spool, "stamp": list(stamp)}
        await self._link.tell(message, list(fds.values()))

    async def stamps(self, prefix: str = "") -> dict[str, float]:
        """When (Unix time in seconds) what `hold_now` was to stamp became readable, by name.

        Those that have not are missing. A stamp stays until its name is dropped or held anew.
        """
        return cast("dict[str, float]", await self._pages("stamps", prefix))

    async def reclaim(self, name: str) -> Reclaimed:
        """Take an fd back from its spool (or ring), with what was kept meanwhile.

        The keeper stops draining it, gives us a copy, and will drain it again, with the same limit, when this
        connection has ended. An fd that was not drained has no `data`. What comes back is not kept any more; if the
        answer is lost (we die, or are cancelled) it is kept for whoever asks next. An fd that was drained is
        non-blocking from then on.

        Raises:
            FileNotFoundError: nothing is held under this name.
        """
        packet = await self._link.ask("reclaim", name=name)
        message = packet.message
        if packet.lost:
            packet.close()
            raise OSError(errno.EMFILE, f"no file descriptor left here for {name!r}")
        has_fd = cast("bool", message["has_fd"])
        try:
            data = _data_of(message, packet, int(has_fd))
            self._link.say({"op": "reclaimed", "name": name, "spool": message["spool"], "end": message["end"]})
            fd = packet.claim() if has_fd else -1
        finally:
            packet.close()
        return Reclaimed(fd, data, cast("int", message["lost"]), cast("bool", message["eof"]))

    async def take(self, name: str) -> int:
        """A copy of what is held as `name`; it is held on until `drop`.

        Raises:
            FileNotFoundError: nothing is held under this name.
        """
        packet = await self._link.ask("take", name=name)
        if packet.lost:
            raise OSError(errno.EMFILE, f"no file descriptor left here for {name!r}")
        return packet.claim()

    def drop_now(self, names: Sequence[str] = (), *, prefix: str = "") -> None:
        """As `drop`, without an await and without an answer; nothing happens once the keeper has ended."""
        self._link.say({"op": "drop", "names": list(names), "prefix": prefix})

    async def drop(self, names: Sequence[str] = (), *, prefix: str = "") -> None:
        """Close what is held (or ringed) under these names, and under all that begin with `prefix` unless it is empty.

        Notes of these names are forgotten, and leases given back. Names that are not there are no error.
        """
        await self._link.ask("drop", names=list(names), prefix=prefix)

    async def held(self, prefix: str = "") -> dict[str, int]:
        """Names that begin with `prefix`, with their numbers in the keeper; rings too (-1 when theirs has ended)."""
        return cast("dict[str, int]", await self._pages("held", prefix))

    async def _pages(self, op: str, prefix: str) -> dict[str, object]:
        """All pages of what is kept by name."""
        found: dict[str, object] = {}
        more = True
        after = ""
        while more:
            message = (await self._link.ask(op, prefix=prefix, after=after)).message
            page = cast("dict[str, object]", message[op])
            found.update(page)
            more = cast("bool", message["more"])
            after = max(page, default="")
        return found

    async def ring(self, name: str, fd: int, *, limit: int = 1 << 20) -> None:
        """Let the keeper read from a copy of `fd` (pipe, terminal, socket) and keep the last `limit` bytes.

        Raises:
            FileExistsError: the name is taken.
            OSError: ENOSPC when all rings together would be over 256 MiB; EPERM for a regular file.
        """
        await self._link.ask("ring", [fd], name=name, limit=limit)

    async def ring_read(self, name: str, offset: int = 0, *, limit: int = 1 << 20, wait: float = 0.0) -> RingData:
        """Up to `limit` bytes of a ring from `offset` on; if there are none yet, wait for some up to `wait` seconds.

        Raises:
            FileNotFoundError: there is no such ring.
        """
        packet = await self._link.wait("ring_read", name=name, offset=offset, limit=limit, wait=wait)
        message = packet.message
        if packet.lost:
            raise OSError(errno.EMFILE, f"no file descriptor left here to read ring {name!r}")
        data = _data_of(message, packet, 0)
        begin, end, first = (cast("int", message[part]) for part in ("begin", "next", "first"))
        return RingData(data, begin, end, first, cast("bool", message["eof"]))

    # --- notes, events and locks ---

    async def note(self, name: str, value: str) -> None:
        """Let the keeper keep a small text under a name, in place of what it kept there before.

        A message without an answer, which the keeper reads even if this process dies right after; waits only while the
        keeper's queue is full. A note and an fd may have the same name. All notes together are bounded by 64 MiB: a
        note beyond is not kept (its former text is), and the keeper's log says so.

        Raises:
            InvalidArgumentError: `value` has more than 64 KiB, or NUL.
        """
        _checked(name)
        size = len(value.encode("utf-8", "surrogatepass"))
        if size > protocol.NOTE_LIMIT:
            raise InvalidArgumentError(f"note {name!r} has {size} bytes; at most {protocol.NOTE_LIMIT}")
        if "\0" in value:
            raise InvalidArgumentError(f"note {name!r} has a NUL")
        await self._link.tell({"op": "note", "name": name, "value": value})

    def note_now(self, name: str, value: str) -> None:
        """As `note`, without an await; nothing happens once the keeper has ended."""
        self._link.say({"op": "note", "name": _checked(name), "value": value})

    async def notes(self, prefix: str = "") -> dict[str, str]:
        """The notes whose names begin with `prefix`."""
        return cast("dict[str, str]", await self._pages("notes", prefix))

    async def publish(self, event: Mapping[str, object]) -> None:
        """Add an event to the log of this keeper, which gives it a number. A message without an answer, like `note`.

        Raises:
            InvalidArgumentError: as JSON it has more than 16 KiB.
        """
        text = json.dumps(dict(event), separators=(",", ":"))
        if len(text) > protocol.EVENT_LIMIT:
            raise InvalidArgumentError(f"an event of {len(text)} bytes; at most {protocol.EVENT_LIMIT}")
        await self._link.tell({"op": "publish", "event": text})

    def publish_now(self, event: Mapping[str, object]) -> None:
        """As `publish`, without an await; nothing happens once the keeper has ended."""
        self._link.say({"op": "publish", "event": json.dumps(dict(event), separators=(",", ":"))})

    async def clients(self) -> frozenset[int]:
        """The numbers (see `Hello.client`) of all that are connected now."""
        return frozenset(cast("list[int]", (await self._link.ask("clients")).message["clients"]))

    async def events_after(self, seq: int, *, wait: float = 0.0, limit: int = 500) -> EventPage:
        """Events after number `seq`; if there are none yet, wait for one up to `wait` seconds.

        The last 4096 are kept. Numbers rise by one, and are never given again, also not by a later keeper of the same
        state directory: after a keeper was killed they go on behind a gap.

        Args:
            seq: 0 for all that are there.
            wait: at most 3600.
            limit: of events; a page may have fewer also because it is full of large ones.
        """
        message = (await self._link.wait("events_after", after=seq, wait=wait, limit=limit)).message
        told = cast("list[tuple[int, str]]", message["events"])
        events = [(number, cast("Mapping[str, object]", json.loads(text))) for number, text in told]
        return EventPage(events, cast("int", message["first"]), cast("int", message["last"]))

    async def lock(self, name: str) -> int:
        """Wait until the lock of this name is ours; those who wait for it get it in the order in which they asked.

        It is ours until `unlock`, or the end of this connection. It is no lock of the task: another one that asks for
        it over the same connection waits too. Cancelled, it leaves no lock behind.

        Returns:
            A number that rises by one whenever anybody locks this name: who had it with n and now has it with n + 1
            knows that nobody had it in between. (It may rise by more when the name was not used for very long.)

        Raises:
            OSError: ENOSPC when this client waits for too many locks (1024).
        """
        return await self._turnstile.lock(_checked(name))

    def unlock(self, name: str) -> None:
        """Give a lock to the next one, without an await and without an answer.

        Does nothing once the connection is closed: its end has freed what it had.

        Raises:
            FailedPreconditionError: this client has not locked it.
        """
        self._turnstile.unlock(name)

    # --- guards, expirations and leases ---

    async def guard(self, guards: Sequence[Guard]) -> None:
        """Register how to undo what will be done next; run in reverse order of registration when the owner is gone.

        Cheap: a message without an answer, which the keeper reads even if this process dies right after. Waits only
        while the keeper's queue is full. A name that is registered already keeps its place and gets the new meaning.

        Raises:
            InvalidArgumentError: a path is not absolute, is "/" or has "..": nothing was registered.
        """
        entries: list[Message] = []
        for guard in guards:
            if guard.kind not in protocol.GUARD_KINDS:
                raise InvalidArgumentError(f"guard {guard.name!r}: {guard.kind!r} is none of {protocol.GUARD_KINDS}")
            for path in guard.paths:
                try:
                    protocol.path(path, f"guard {guard.name!r}: path")
                except OSError as error:
                    raise InvalidArgumentError(str(error.strerror)) from None
            entries.append({"name": guard.name, "kind": guard.kind, "paths": list(guard.paths)})
        await self._link.tell({"op": "guard", "guards": entries})

    async def unguard(self, names: Sequence[str]) -> None:
        """Forget guards: what they would undo is undone. As cheap as `guard`; names that are not there are no error."""
        await self._link.tell({"op": "unguard", "names": list(names)})

    async def expire(self, prefix: str, seconds: float | None) -> None:
        """Let the keeper undo, in so many seconds, all that has a name with this prefix, whoever is there then.

        It runs the guards with the prefix (kills first, then the rest in reverse), drops fds, rings, notes and leases,
        and tells all clients: see `expirations`. A guard that failed three times stays for the keeper's end, and so do
        the leases. The time goes on while the machine sleeps (CLOCK_BOOTTIME). A message without an answer.

        Args:
            prefix: not empty.
            seconds: from now on, in place of what was said for this prefix before; None: never.
        """
        _checked(prefix)
        if seconds is not None and not 0 <= seconds <= protocol.EXPIRE_LIMIT:
            raise InvalidArgumentError(f"seconds must be from 0 to {protocol.EXPIRE_LIMIT}, got {seconds}")
        await self._link.tell({"op": "expire", "prefix": prefix, "seconds": seconds})

    @property
    def expirations(self) -> frozenset[str]:
        """The prefixes that have expired, as far as this client was told: at its greeting, and with every answer since.

        The keeper tells the last 4096 of before the greeting, too.
        """
        return frozenset(self._expired)

    async def lease(self, directory: str, first: int, count: int, *, name: str = "") -> int:
        """Lease a number from [first, first + count) that nobody else on this host has leased in this directory.

        It is ours until `release` or the keeper's end, however that comes.

        Args:
            directory: where all who share the numbers look.
            first: the lowest.
            count: how many there are.
            name: also ours no more when this name is dropped (`drop`, `expire`). A lease that has the name already is
                answered again.

        Raises:
            BlockingIOError: all are taken.
            FileExistsError: the name is that of a lease in another directory or range.
            OSError: the directory is missing or cannot be used.
        """
        packet = await self._link.ask("lease", directory=directory, first=first, count=count, name=name)
        return cast("int", packet.message["number"])

    async def release(self, directory: str, number: int) -> None:
        """Give a leased number back.

        Raises:
            FileNotFoundError: it is not leased here.
        """
        await self._link.ask("release", directory=directory, number=number)

    # --- the end ---

    @property
    def alive(self) -> bool:
        """Whether the keeper's process lives and this connection is open; a look, without waiting."""
        if self.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    async def set_policy(self, policy: Policy) -> None:
        """What happens when the owner is gone from now on; owner only.

        Raises:
            PermissionError: this client does not own the keeper.
        """
        await self._link.ask("set_policy", policy=policy)
        self.hello = attrs.evolve(self.hello, policy=policy)

    async def retire(self) -> bool:
        """End the keeper as `close` does, if nobody else is connected and nobody else owns it; else nothing happens.

        Returns:
            Whether the keeper has ended; then this connection is closed. Who connects while it ends is turned away.
        """
        try:
            with anyio.fail_after(_CLOSE_TIME):
                message = (await self._link.ask("retire")).message
                if not message["retired"]:
                    return False
                await readable(self.pidfd)
        except TimeoutError:
            log = starting.log_tail(self.state_dir)
            self.abandon()
            raise BackendError(f"keeper {self.pid} did not end within {_CLOSE_TIME:g} s", log=log) from None
        self.abandon()
        return True

    async def close(self, run_guards: bool = True) -> CloseReport:
        """End the keeper and everything that it is the parent of; owner only. Again: nothing happens.

        Args:
            run_guards: undo what is registered. False when there is nothing left to undo.

        Raises:
            FailedPreconditionError: this client does not own the keeper.
            UnavailableError: the keeper was dead before; nothing was undone.
        """
        if self._link.closed:
            return CloseReport()
        if not self.hello.owner:
            raise FailedPreconditionError(f"this client does not own keeper {self.pid}; only its owner may close it")
        try:
            with anyio.fail_after(_CLOSE_TIME):
                message = (await self._link.ask("close", run_guards=run_guards)).message
                await readable(self.pidfd)
        except TimeoutError:
            log = starting.log_tail(self.state_dir)
            raise BackendError(f"keeper {self.pid} did not end within {_CLOSE_TIME:g} s", log=log) from None
        finally:
            # Also when cancelled: the keeper goes on with what it was told, or acts by its policy.
            self.abandon()
        failed = cast("dict[str, str]", message["failed"])
        return CloseReport(cast("int", message["done"]), cast("int", message["failures"]), failed)

    def abandon(self, wait: float = 0.0) -> bool:
        """Close the connection now; if it was the owner's, the keeper's policy acts. May be called again.

        Whoever waits gets `FailedPreconditionError`.

        Args:
            wait: block up to so many seconds for the keeper's end.

        Returns:
            Whether the keeper is known to have ended.
        """
        self._link.close()
        if self._owns:
            self._owns = False
            starting.forget_owned(self._identity)
        if self.pidfd >= 0:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            self._ended = bool(poll.poll(wait * 1000))
            if self._ended:
                _reap(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        return self._ended

    def _pushed(self, message: Message) -> None:
        kind = message.get("push")
        if kind == "locked":
            self._turnstile.called(message)
        elif kind == "expired":
            self._expired |= dict.fromkeys(cast("list[str]", message["prefixes"]))
            while len(self._expired) > _EXPIRATIONS_KEPT:
                del self._expired[next(iter(self._expired))]
        elif kind == "exits":
            self._told_exits(message)

    def _told_exits(self, message: Message) -> None:
        if message["gap"]:
            self._gaps += 1
        for told in cast("list[tuple[int, int, int, int, float]]", message["exits"]):
            record = ExitRecord(*told)
            process = (record.pid, record.start_time)
            self._last_seq = record.seq
            self._ours.discard(process)
            self._exits[process] = record
        while len(self._exits) > _EXITS_KEPT:
            del self._exits[next(iter(self._exits))]


def _checked(name: str) -> str:
    """A name, for requests without an answer: the keeper could tell nobody what is wrong with it."""
    if not 0 < len(name) <= protocol.NAME_LIMIT or "\0" in name:
        raise InvalidArgumentError(f"a name has 1 to {protocol.NAME_LIMIT} characters and no NUL, got {name[:200]!r}")
    return name


def _data_of(message: Message, packet: protocol.Packet, index: int) -> bytes:
    """Bytes that came in a message, or in a memfd when they are many."""
    if "data" in message:
        return base64.b64decode(cast("str", message["data"]))
    with open(packet.claim(index), "rb") as file:
        file.seek(0)
        return file.read()


def _reap(pidfd: int) -> None:
    """If the keeper became our child (we are PID 1, or a subreaper), nobody else reaps it."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
