"""The client of the keeper: anyio, on any loop; no thread, no background task.

Whoever waits for an answer or an exit reads the socket for all that wait (`host.turns`). One client belongs to one
event loop, but to no task: it may be opened in one and closed in another.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import anyio

from unisandbox.api.errors import BackendError, FailedPreconditionError, UnavailableError
from unisandbox.host.cgroups import service
from unisandbox.host.keeper import parting, programs, starting
from unisandbox.host.keeper.eventlog import KeeperEvents
from unisandbox.host.keeper.expirations import Expirations
from unisandbox.host.keeper.heard import HeardExits
from unisandbox.host.keeper.link import Link
from unisandbox.host.keeper.messages import guard_request, hello_in
from unisandbox.host.keeper.notebook import Notebook
from unisandbox.host.keeper.process import Process
from unisandbox.host.keeper.protocol import Message
from unisandbox.host.keeper.records import (
    CloseReport,
    ExitRecord,
    Guard,
    Hello,
    JobResult,
    KeeperVersionError,
    Policy,
    Spawned,
)
from unisandbox.host.keeper.spools import Spools
from unisandbox.host.keeper.turnstile import Turnstile
from unisandbox.host.subordinate import Rows

_START_TIME = 30.0


class Keeper:
    """A connection to a keeper. Open it with `start` or `attach`; end it with `close` (owner) or `abandon`.

    Every method raises `UnavailableError` once the keeper has ended (also while it waits), `DeadlineExceededError` when
    it answers nothing for 30 s, `FailedPreconditionError` after `close` or `abandon`, and `InvalidArgumentError` for a
    request that is too large (200 KiB, 64 fds). Fds that are passed stay the caller's; fds that come back are the
    caller's to close, and close-on-exec.
    """

    def __init__(self, state_dir: str, identity: tuple[int, int], sock: socket.socket) -> None:
        """Not for callers: see `start` and `attach`."""
        self.state_dir = state_dir
        self.hello: Hello
        #: The keeper's process id; see `open_held` and `outside` for what is reached by it.
        self.pid: int = 0
        #: Device and inode of the state directory, which the keeper holds open: no other one has them.
        self.directory: tuple[int, int] = identity
        self._link = Link(sock, state_dir, self._pushed)
        self._process = Process(state_dir)
        self._exits = HeardExits(self._link)
        self._owns = False
        #: What outlives a client with what is written to it meanwhile.
        self.spools: Spools = Spools(self._link)
        #: Small texts that it keeps.
        self.notes: Notebook = Notebook(self._link, self.spools)
        #: What happened, in one order for all clients.
        self.events: KeeperEvents = KeeperEvents(self._link)
        #: What the keeper undoes at a set time.
        self.expirations: Expirations = Expirations(self._link)
        #: Who may do something now, of all clients.
        self.locks: Turnstile = Turnstile(self._link)

    # --- opening ---

    @classmethod
    async def start(
        cls,
        state_dir: str,
        *,
        workdir: str,
        hide: Sequence[str] = (),
        policy: Policy = "stop",
        guards: Sequence[Guard] = (),
    ) -> Keeper:
        """Start a keeper for this state directory and become its owner.

        Args:
            state_dir: made if missing; holds `keeper.sock`, `lock`, `events`, `keeper.log`. Locked as long as the
                keeper lives.
            workdir: in the keeper's mount namespace a private tmpfs lies here (mode 0711); made if missing.
            hide: existing directories that an empty read-only tmpfs covers in the keeper's mount namespace.
            policy: what happens when the owner is gone: "stop" undoes everything and ends, "keep" waits for another,
                in no service of systemd's, with which it would end.
            guards: see `guard`. It knows them when it begins, also when this process is killed meanwhile.

        Raises:
            FailedPreconditionError: another engine is open on this directory (it is named), or it is not ours alone; or
                a keeper that is to "keep" cannot leave the service that we are in.
            UnavailableError: the keeper could not begin; says why.
        """
        state_dir, workdir = starting.absolute(state_dir), starting.absolute(workdir)
        identity, started = await starting.begin(
            state_dir, workdir=workdir, hide=hide, policy=policy, guards=guard_request(guards)
        )
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
        if policy == "keep":
            await keeper._check_outlives()
        return keeper

    @classmethod
    async def attach(cls, state_dir: str, *, own: bool = False, after: int = 0) -> Keeper:
        """Connect to the keeper that runs for this state directory.

        Args:
            state_dir: as it was given to `start`.
            own: become its owner; see `own`.
            after: exits up to this number are known already; `wait_exit` asks for them when it needs one.

        Raises:
            UnavailableError: none runs.
            KeeperVersionError: it speaks another version of the protocol.
            FailedPreconditionError: `own` was asked for and it has an owner, whose pid is named.
        """
        state_dir = starting.absolute(state_dir)
        keeper = cls(state_dir, *await starting.reach(state_dir))
        try:
            await keeper._greet(after)
            if own:
                await keeper.own()
        except BaseException as error:
            refused = keeper._link.refused
            keeper.abandon()
            if refused and isinstance(error, UnavailableError):
                raise FailedPreconditionError(
                    f"cannot attach to the keeper of {state_dir}: {refused}", hint="Close some that are attached."
                ) from None
            raise
        return keeper

    async def _greet(self, after: int) -> None:
        self._exits.last_seq = after
        packet = await self._link.ask("hello", after=after)
        try:
            self.hello = hello_in(packet.message, self.state_dir)
        except KeeperVersionError:
            packet.close()
            raise
        self.pid = self._link.pid = self.hello.pid
        self._process.meet(self.pid, packet.claim())

    async def own(self) -> None:
        """Become its owner, whose end its policy speaks of.

        Raises:
            FailedPreconditionError: it has an owner, whose pid is named, or is ending.
        """
        pidfd = os.pidfd_open(os.getpid())
        try:
            message = (await self._link.ask("own", [pidfd])).message
        except OSError as error:
            if error.errno in {errno.EBUSY, errno.ESHUTDOWN}:
                raise FailedPreconditionError(f"cannot own the keeper of {self.state_dir}: {error.strerror}") from None
            raise
        finally:
            os.close(pidfd)
        starting.note_owned(self.directory)
        self._owns = True
        # A former owner may have changed it since we came. A keeper of a former version does not say it.
        policy = cast("Policy", message.get("policy", self.hello.policy))
        self.hello = self.hello._replace(owner=True, owner_pid=os.getpid(), policy=policy)

    async def _check_outlives(self) -> None:
        """End a keeper that would not go on when the service stops that it is in."""
        try:
            service.check_outlives(self.pid, "the keeper")
        except ProcessLookupError:
            self.abandon()
            raise UnavailableError(f"the keeper of {self.state_dir} has ended as it began") from None
        except FailedPreconditionError:
            await self.close()
            raise

    async def clients(self) -> frozenset[int]:
        """The numbers (see `Hello.client`) of all that are connected now."""
        return frozenset(cast("list[int]", (await self._link.ask("clients")).message["clients"]))

    @functools.cached_property
    def ids(self) -> tuple[Rows, Rows] | None:
        """The user ids and group ids that it has as root of a user namespace of its own, as the kernel maps them.

        Rows of (first id there, first id here, count). None: it is not in one. As an ordinary user's it is, unless this
        host forbids that; then it has no mounts of its own (`Hello.private_mounts`) and can make no namespaces.
        """
        if not self.hello.private_mounts or not self._process.is_in_another_user_namespace():
            return None
        return self._process.ids()

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
        request |= {"cgroup_procs": list(cgroup_procs)} | ({"mounts": mounts} if mounts else {})
        return await programs.spawn(self._link, self._exits, request, fds)

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
        return await programs.job(self._link, steps, hold or {}, timeout, fds)

    # --- exits ---

    async def wait_exit(self, pid: int, start_time: int) -> ExitRecord:
        """Wait for the end of a child (or orphan) of the keeper; also if it ended before, or while nobody was attached.

        Safe from several tasks, and answers the same each time.

        Raises:
            ProcessLookupError: it is gone and how it ended is not known: the keeper never was its parent, or it is so
                long ago that it is forgotten.
        """
        return await self._exits.wait(pid, start_time)

    def expect(self, pid: int, start_time: int) -> None:
        """This process lives, and is the keeper's child: its end will be told, and `wait_exit` need not ask for it."""
        self._exits.expect(pid, start_time)

    async def exits_after(self, seq: int) -> tuple[list[ExitRecord], int]:
        """Exits after number `seq`, oldest first (at most 1000), and the oldest number that the keeper still knows.

        A first record later than `seq + 1` means that those between are forgotten.
        """
        return await self._exits.after(seq)

    @property
    def last_seq(self) -> int:
        """The number of the last exit that this client was told."""
        return self._exits.last_seq

    # --- holding ---

    async def hold(self, name: str, fd: int) -> int:
        """Let the keeper hold a copy of `fd`: the number N for `/proc/KEEPER/fd/N`.

        Raises:
            FileExistsError: the name is taken.
        """
        return cast("int", (await self._link.ask("hold", [fd], name=name)).message["number"])

    async def take(self, name: str) -> int:
        """A copy of what is held as `name`; it is held on until `drop`.

        Raises:
            FileNotFoundError: nothing is held under this name.
        """
        packet = await self._link.ask("take", name=name)
        if packet.lost:
            raise OSError(errno.EMFILE, f"no file descriptor left here for {name!r}")
        return packet.claim()

    def open_held(self, number: int, flags: int = os.O_PATH) -> int:
        """A descriptor of our own of what the keeper holds as `number`; close-on-exec.

        Never of another process, which may have got the keeper's id since it ended. Costs no request.

        Raises:
            FileNotFoundError: it holds nothing there.
        """
        return self._process.opened(f"fd/{number}", flags)

    def outside(self, path: str) -> str:
        """`path` of the keeper's mount namespace as this process reaches it, as long as this connection is open.

        Source: proc(5), /proc/PID/root is the process's view of the file system, mount namespace included.
        """
        return self._process.outside(path, self.hello.workdir)

    def drop_now(self, names: Sequence[str] = (), *, prefix: str = "") -> None:
        """As `drop`, without an await and without an answer; nothing happens once the keeper has ended."""
        self._link.say({"op": "drop", "names": list(names), "prefix": prefix, "guards": False})

    async def drop(self, names: Sequence[str] = (), *, prefix: str = "", guards: bool = False) -> None:
        """Close what is held (or ringed) under these names, and under all that begin with `prefix` unless it is empty.

        Notes of these names are forgotten, and leases given back; with `guards` guards are forgotten too, as by
        `unguard`. Names that are not there are no error.
        """
        await self._link.ask("drop", names=list(names), prefix=prefix, guards=guards)

    async def held(self, prefix: str = "") -> dict[str, int]:
        """Names that begin with `prefix`, with their numbers in the keeper; rings too (-1 when theirs has ended)."""
        return cast("dict[str, int]", await self._link.pages("held", prefix))

    # --- guards and leases ---

    async def guard(self, guards: Sequence[Guard]) -> None:
        """Register how to undo what will be done next; run in reverse order of registration when the owner is gone.

        Cheap: a message without an answer, which the keeper reads even if this process dies right after. Waits only
        while the keeper's queue is full. A name that is registered already keeps its place and gets the new meaning.

        Raises:
            InvalidArgumentError: a path is not absolute, is "/" or has "..": nothing was registered.
        """
        await self._link.tell(guard_request(guards))

    async def unguard(self, names: Sequence[str]) -> None:
        """Forget guards: what they would undo is undone. As cheap as `guard`; names that are not there are no error."""
        await self._link.tell({"op": "unguard", "names": list(names)})

    async def lease(self, directory: str, first: int, count: int, *, name: str = "") -> int:
        """Lease a number from [first, first + count) that nobody else on this host has leased in this directory.

        It is ours until its name is dropped (`drop`, `expirations`) or the keeper's end, however that comes.

        Args:
            directory: where all who share the numbers look.
            first: the lowest.
            count: how many there are.
            name: of the lease. One that has the name already is answered again. Empty: it is ours to the keeper's end.

        Raises:
            BlockingIOError: all are taken.
            FileExistsError: the name is that of a lease in another directory or range.
            OSError: the directory is missing or cannot be used.
        """
        packet = await self._link.ask("lease", directory=directory, first=first, count=count, name=name)
        return cast("int", packet.message["number"])

    # --- the end ---

    @property
    def alive(self) -> bool:
        """Whether the keeper's process lives and this connection is open; a look, without waiting."""
        return self._process.alive

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait for what happens in this process, and for nothing without a keeper; see `look_again`.

        Args:
            happened: cheap, and called often.

        Raises:
            UnavailableError: the keeper has ended.
            DeadlineExceededError: it is suspended or stuck.
        """
        await self._link.until(happened)

    def look_again(self) -> None:
        """What somebody waits for by `until` may have happened."""
        self._link.look_again()

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended, or does so while this call blocks: a killed one's socket closes before that."""
        return self._process.ends_within(seconds)

    async def set_policy(self, policy: Policy) -> None:
        """What happens when the owner is gone from now on; owner only. On any failure it is what it was.

        Raises:
            FailedPreconditionError: "keep", and it is in a service of systemd's, with which it would end.
            PermissionError: this client does not own the keeper.
        """
        if policy == "keep":
            self._process.check()
            service.check_outlives(self.pid, "the keeper")
        try:
            await self._link.ask("set_policy", policy=policy)
        except BaseException:
            # It may have heard that, and will hear this before it hears of our end.
            self._link.say({"op": "set_policy", "policy": self.hello.policy})
            raise
        self.hello = self.hello._replace(policy=policy)

    async def retire(self) -> bool:
        """End the keeper as `close` does, if nobody needs it; else nothing happens.

        Somebody does who is connected or owns it, or for whom it holds anything under a name outside of "engine/".

        Returns:
            Whether the keeper has ended; then this connection is closed. Who connects while it ends is turned away.
        """
        try:
            retired = await parting.retire(self._link, self._process, self.state_dir)
        except BackendError:
            self.abandon()
            raise
        if retired:
            self.abandon()
        return retired

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
            return await parting.close(self._link, self._process, self.state_dir, run_guards=run_guards)
        finally:
            # Also when cancelled: the keeper goes on with what it was told, or acts by its policy.
            self.abandon()

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
            starting.forget_owned(self.directory)
        return self._process.leave(wait)

    def _pushed(self, message: Message) -> None:
        kind = message.get("push")
        if kind == "locked":
            self.locks.called(message)
        elif kind == "expired":
            self.expirations.told(message)
        elif kind == "exits":
            self._exits.told(message)
