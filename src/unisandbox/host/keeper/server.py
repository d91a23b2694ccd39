"""The keeper's process: its owner, what its clients may ask, and its end.

One thread, one loop, no wait for any other process. It is the parent and reaper of everything that an engine starts,
and holds what must outlive the engine's process. It knows nothing of sandboxes. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import socket
import sys

from unisandbox.host import pidfd as pidfds
from unisandbox.host.boundary import reached
from unisandbox.host.keeper import birth, protocol
from unisandbox.host.keeper.connections import Connections, Reply
from unisandbox.host.keeper.ends import Ends
from unisandbox.host.keeper.events import Events
from unisandbox.host.keeper.exits import Exits
from unisandbox.host.keeper.expiry import Expiry
from unisandbox.host.keeper.family import Family
from unisandbox.host.keeper.guards import Guards, Run
from unisandbox.host.keeper.holdings import Holdings
from unisandbox.host.keeper.leases import Leases
from unisandbox.host.keeper.locks import Locks
from unisandbox.host.keeper.loop import Loop, note, note_exception
from unisandbox.host.keeper.notes import Notes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from unisandbox.host.keeper.connections import Client
    from unisandbox.host.keeper.protocol import Message, Packet

# How long the deaths of children that were killed may take, after the guards (seconds).
_DEATHS_TIME = 2.0
# Seconds that a keeper waits for somebody to come when there is nothing that it would be needed for.
_IDLE_TIME = 5.0
# What the names of guards and of what is held begin with that belong to the engine itself: no reason to stay.
_ENGINE = "engine/"
_EXITS_PER_MESSAGE = 1000
_REPORTED_LIMIT = 200


class Server:
    """The keeper.

    Args:
        state_dir: an open directory for the socket and the numbers of events.
        lock: the open lock file of the state directory, locked; held for the keeper's life.
        policy: "stop" or "keep": what to do when the owner is gone.
        view: of the mounts.
        workdir: where our own file system is mounted, if we have a mount namespace.
    """

    def __init__(self, state_dir: int, lock: int, policy: str, view: birth.View, workdir: str) -> None:
        self._state_dir = state_dir
        self._lock = lock
        self._policy = policy
        self._view = view
        self._workdir = workdir
        self._boot = protocol.boot_id()
        self._start_time = pidfds.start_time(os.getpid())
        self._loop = Loop()
        self._exits = Exits()
        self._events = Events(self._loop, state_dir, protocol.EVENTS_NAME)
        self._connections = Connections(self._loop, self._exits, self._handle, self._gone)
        self._holdings = Holdings(self._loop)
        self._family = Family(self._loop, self._exits, self._holdings, self._connections.tell_exits)
        self._leases = Leases()
        self._notes = Notes()
        self._ends = Ends(self._loop, self._holdings, self._notes, self._events)
        self._locks = Locks(self._connections)
        self._guards = Guards(self._loop, view, [lock], self._family.adopt)
        self._expiry = Expiry(
            self._loop,
            self._guards,
            drop_held=lambda prefix: self._holdings.drop([], prefix),
            drop_rest=self._drop_expired,
            tell=self._connections.tell_expiration,
            publish=self._ends.tell_last,
        )
        self._owner: Client | None = None
        self._owner_pidfd = -1
        self._owner_start_time = 0
        self._ending: _Ending | None = None
        self._ended = False
        self._requests: dict[str, Callable[[Packet, Reply], None]] = {
            "hello": self._hello,
            "clients": self._clients,
            "spawn": self._family.spawn,
            "cancel_spawn": self._family.cancel_spawn,
            "job": self._family.job,
            "cancel_job": self._family.cancel_job,
            "exits_after": self._exits_after,
            "exit_of": self._exit_of,
            "hold": self._holdings.hold,
            "hold_now": self._holdings.hold_now,
            "reclaim": self._holdings.reclaim,
            "reclaimed": self._holdings.reclaimed,
            "take": self._holdings.take,
            "held": self._holdings.held,
            "ring": self._holdings.ring,
            "ring_read": self._holdings.ring_read,
            "drop": self._drop,
            "note": self._notes.note,
            "notes": self._notes.notes,
            "publish": self._ends.publish,
            "events_after": self._events.events_after,
            "cancel_wait": self._cancel_wait,
            "lock": self._locks.lock,
            "lock_holder": self._locks.holder,
            "unlock": self._locks.leave,
            "cancel_lock": self._locks.leave,
            "guard": self._guards.guard,
            "unguard": self._guards.unguard,
            "expire": self._expiry.expire,
            "lease": self._leases.grant,
            "own": self._own,
            "set_policy": self._set_policy,
            "retire": self._retire,
            "close": self._close,
        }

    def serve(self, listener: socket.socket, owner: socket.socket, owner_pidfd: int) -> None:
        """Work until the end. `listener`: see `listen`."""
        self._loop.on_signal(signal.SIGCHLD, self._family.reap)
        # Whoever manages this machine wants everything of ours gone.
        self._loop.on_signal(signal.SIGTERM, lambda: self._begin_end(run_guards=True, reply=None))
        self._connections.listen(listener)
        client = self._connections.add(owner)
        try:
            self._set_owner(client, owner_pidfd)
        except OSError:  # it was killed since it started us, and all that it has said is what to undo
            os.close(owner_pidfd)
            self._connections.drain(client)
            self._connections.drop(client)
            if self._policy == "stop":
                self._begin_end(run_guards=True, reply=None)
        gc.collect()
        gc.freeze()  # a collection in a forked child would touch, and so copy, every page
        while not self._ended:
            self._loop.turn()

    def listen(self) -> socket.socket:
        """Where clients connect.

        Raises:
            OSError: it cannot be made: the disk is full, say.
        """
        # By the open directory: a path may be longer than the 107 bytes that an address has room for.
        address = f"/proc/self/fd/{self._state_dir}/{protocol.SOCKET_NAME}"
        reached("before socket.bind", address)
        with contextlib.suppress(FileNotFoundError):  # there only if a former keeper was killed
            os.unlink(address)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen(64)
        reached("after socket.bind", address)
        return listener

    # --- requests ---

    def _handle(self, client: Client, packet: Packet) -> None:
        message = packet.message
        request = message.get("id")
        reply = Reply(self._connections, client, request if type(request) is int else None)
        try:
            if packet.lost:
                raise OSError(errno.EMFILE, f"keeper {os.getpid()} has no room for {packet.lost} more file descriptors")
            action = self._requests.get(protocol.text(message, "op"))
            if action is None:
                raise OSError(errno.ENOSYS, f"unknown request {message['op']!r:.80}")
            action(packet, reply)
        except OSError as error:
            reply.fail(error)
        except Exception as error:
            note_exception()
            reply.fail(
                OSError(errno.EIO, f"the keeper failed at this request: {error!r:.500}; see {protocol.LOG_NAME}")
            )

    def _hello(self, packet: Packet, reply: Reply) -> None:
        """Who we are; from `after` on the client is told every exit."""
        client = reply.client
        client.cursor = protocol.integer(packet.message, "after", 0, 1 << 62)
        answer: Message = {
            "version": protocol.VERSION,
            "pid": os.getpid(),
            "start_time": self._start_time,
            "boot_id": self._boot,
            "policy": self._policy,
            "owner": client is self._owner,
            "private_mounts": self._view.is_private,
            "workdir": self._workdir,
            "client": client.number,
            "owner_pid": self._owner.pid if self._owner is not None else 0,
        }
        pidfd = os.pidfd_open(os.getpid())
        self._connections.greet(client)
        reply(answer, [pidfd])

    def _clients(self, packet: Packet, reply: Reply) -> None:
        """The numbers of all who are connected."""
        reply({"clients": self._connections.numbers()})

    def _own(self, packet: Packet, reply: Reply) -> None:
        """Become the owner, when there is none that lives; comes with the client's own pidfd."""
        client = reply.client
        if self._owner is not client and self._owner_pidfd >= 0 and pidfds.has_ended(self._owner_pidfd):
            self._owner_died()  # its end is about to be heard
        if self._owner is not None and self._owner is not client:
            raise OSError(errno.EBUSY, f"keeper {os.getpid()} is owned by process {self._owner.pid}")
        if self._ending is not None:
            raise OSError(errno.ESHUTDOWN, f"keeper {os.getpid()} is ending")
        pidfd = packet.claim()
        try:
            self._set_owner(client, pidfd)
        except BaseException:
            os.close(pidfd)
            raise
        reply({"policy": self._policy})

    def _exits_after(self, packet: Packet, reply: Reply) -> None:
        """A page of exits."""
        after = protocol.integer(packet.message, "after", 0, 1 << 62)
        reply(
            {
                "exits": self._exits.after(after, _EXITS_PER_MESSAGE),
                "first": self._exits.first,
                "last": self._exits.last,
            }
        )

    def _exit_of(self, packet: Packet, reply: Reply) -> None:
        """How one process ended; null while it lives; ENOENT when that cannot be learned here."""
        pid = protocol.integer(packet.message, "pid", 1, 1 << 31)
        start_time = protocol.integer(packet.message, "start_time", 0, 1 << 62)
        self._family.reap()
        record = self._exits.find(pid, start_time)
        if record is None:
            try:
                lives = self._loop.with_spare(lambda: pidfds.start_time(pid)) == start_time
            except ProcessLookupError:
                lives = False
            if not lives:
                raise OSError(
                    errno.ENOENT, f"process {pid} (start time {start_time}) is gone, and no exit of it is known"
                )
        reply({"exit": record})

    def _drop(self, packet: Packet, reply: Reply) -> None:
        """Forget what has these names, and all with this prefix; those that are not there are no error."""
        wanted = protocol.texts(packet.message, "names")
        prefix = protocol.text(packet.message, "prefix")
        for kept in (self._holdings, self._notes, self._leases):
            kept.drop(wanted, prefix)
        if protocol.flag(packet.message, "guards"):
            self._guards.drop(wanted, prefix)
            if prefix:
                self._ends.finish(prefix)  # whatever it was, it is gone: its end comes before what is told of that
        reply({})

    def _drop_expired(self, prefix: str, is_clean: bool) -> None:
        """What nobody needs any more; numbers only when all that had them is gone."""
        self._notes.drop([], prefix)
        if is_clean:
            self._leases.drop([], prefix)
        self._loop.later(_IDLE_TIME, self._end_if_idle)

    def _cancel_wait(self, packet: Packet, reply: Reply) -> None:
        """The same client does not want this late answer any more."""
        request = protocol.integer(packet.message, "request", 0, 1 << 62)
        self._holdings.cancel(reply.client, request)
        self._events.cancel(reply.client, request)
        reply({})

    def _close(self, packet: Packet, reply: Reply) -> None:
        """End, and say how it went."""
        self._must_own(reply.client)
        if self._ending is not None:
            raise OSError(errno.ESHUTDOWN, f"keeper {os.getpid()} is ending already")
        self._begin_end(protocol.flag(packet.message, "run_guards"), reply)

    def _retire(self, packet: Packet, reply: Reply) -> None:
        """End, if nobody else is connected and nobody else owns us, and we hold nothing that somebody may come for."""
        client = reply.client
        # In this order: who is found dead there may be the owner, and then the policy acts.
        is_alone = self._connections.is_alone(client)
        is_ours = self._owner in {None, client} and self._ending is None
        if not is_alone or not is_ours or not self._holdings.all_under(_ENGINE):
            reply({"retired": False})
            return
        self._begin_end(run_guards=True, reply=reply)

    def _set_policy(self, packet: Packet, reply: Reply) -> None:
        """What happens when the owner is gone."""
        self._must_own(reply.client)
        self._policy = protocol.policy(packet.message)
        self._write_lock()
        reply({})

    def _must_own(self, client: Client) -> None:
        if client is not self._owner:
            raise OSError(errno.EPERM, f"only the owner of keeper {os.getpid()} may do this")

    # --- the owner ---

    def _set_owner(self, client: Client, pidfd: int) -> None:
        if pidfds.host_pid(pidfd) != client.pid:
            raise OSError(errno.EINVAL, f"the pidfd that came is not of process {client.pid}")
        former = self._owner, self._owner_start_time
        self._owner, self._owner_start_time = client, pidfds.start_time(client.pid)
        try:
            self._write_lock()
            self._loop.watch(pidfd, lambda _events: self._owner_died())
        except BaseException:
            self._owner, self._owner_start_time = former  # the caller closes the pidfd
            raise
        if self._owner_pidfd >= 0:
            self._loop.unwatch(self._owner_pidfd)
            os.close(self._owner_pidfd)
        self._owner_pidfd = pidfd

    def _write_lock(self) -> None:
        """For people, and for whoever finds the lock taken. Source of its reader: client side, `state_lock`."""
        owner = self._owner
        content = json.dumps(
            {
                "owner": owner.pid if owner is not None else 0,
                "start_time": self._owner_start_time if owner is not None else 0,
                "keeper": os.getpid(),
                "keeper_start_time": self._start_time,
                "policy": self._policy,
                "ending": self._ending is not None,
            }
        )
        reached("before lock.write")
        os.pwrite(self._lock, content.encode().ljust(200) + b"\n", 0)
        reached("after lock.write")

    def _gone(self, client: Client) -> None:
        """A connection ended."""
        if client is self._owner:
            self._lose_owner()
        self._locks.gone(client)
        self._events.gone(client)
        if self._ending is None:
            self._family.gone(client)
            self._holdings.gone(client)
            self._loop.later(_IDLE_TIME, self._end_if_idle)

    def _owner_died(self) -> None:
        """The owner's process is dead, though a child of it may hold its socket open."""
        owner = self._owner
        if owner is not None:
            # Its last words count: guards that it registered before what they undo.
            self._connections.drain(owner)
            self._connections.drop(owner)  # leads to `_gone`, if draining has not

    def _lose_owner(self) -> None:
        self._loop.unwatch(self._owner_pidfd)
        os.close(self._owner_pidfd)
        self._owner_pidfd = -1
        self._owner = None
        if self._ending is None:
            with contextlib.suppress(OSError):  # a full disk; then whoever finds the lock taken does not know why
                self._write_lock()
        if self._policy == "stop":
            self._begin_end(run_guards=True, reply=None)

    def _end_if_idle(self) -> None:
        """A keeper that nobody uses, and that has nothing for anybody, need not wait for an owner.

        Nor one that nobody can come to: its state directory was removed. Called some time after each event that may be
        the last one.
        """
        if self._ending is not None or self._owner is not None or not self._connections.is_empty():
            return
        if os.fstat(self._state_dir).st_nlink and not self._has_nothing():
            return
        self._expiry.unlink()
        self._begin_end(run_guards=True, reply=None)

    def _has_nothing(self) -> bool:
        if not (self._family.is_idle and self._holdings.all_under(_ENGINE) and self._expiry.is_idle):
            return False
        return all(guard[0].startswith(_ENGINE) for guard in self._guards.all())

    # --- the end ---

    def _begin_end(self, run_guards: bool, reply: Reply | None) -> None:
        """Kill what we are the parent of, run the guards, and leave when they are done."""
        if self._ending is not None:
            return
        self._ending = _Ending(reply)
        reached("before ending.kill")
        self._family.kill_all()
        self._expiry.stop()
        self._connections.refuse()
        with contextlib.suppress(OSError):  # a full disk; then whoever finds the lock taken does not know why
            self._write_lock()
        reached("before ending.guards")
        guards = self._guards.all() if run_guards else []
        if not guards:
            self._finish_end()
            return
        try:
            self._guards.start(guards, self._guards_done)
        except Exception as error:  # whatever it is: a keeper that could not end would stay for ever
            note(f"cannot start a process for the guards, running them here: {error!r}")
            self._guards_done(self._guards.run_here(guards))

    def _guards_done(self, run: Run) -> None:
        if self._ending is not None:
            self._ending.run = run
        self._finish_end()

    def _finish_end(self) -> None:
        self._loop.later(_DEATHS_TIME, self._leave)
        self._await_deaths()

    def _await_deaths(self) -> None:
        """Leave once nobody is left whose parent we are: an orphan comes to us only when its parent has died."""
        self._family.reap()
        if not self._family.kill_all():
            self._leave()
            return
        self._loop.later(0.005, self._await_deaths)

    def _leave(self) -> None:
        ending = self._ending
        assert ending is not None  # noqa: S101 - called by what began it
        if self._ended:
            return
        self._ended = True
        reached("before ending.leave")
        self._leases.release_all()
        self._guards.retry_rmdir(ending.run)  # the file of the leases was in one, perhaps
        self._events.end()
        with contextlib.suppress(FileNotFoundError):  # a guard may have removed the state directory
            os.unlink(protocol.SOCKET_NAME, dir_fd=self._state_dir)
        reached("after ending.leave")
        if ending.reply is None:
            return
        run = ending.run
        shown = dict(list(run.failed.items())[:_REPORTED_LIMIT])
        ending.reply(
            {
                "retired": True,
                "done": len(run.done),
                "failed": {name[:200]: error[:500] for name, error in shown.items()},
                "failures": len(run.failed),
            }
        )


class _Ending:
    """What is known about the end while it goes on."""

    def __init__(self, reply: Reply | None) -> None:
        self.reply = reply
        self.run = Run([])


def main(argument: str) -> None:
    """Run the keeper. `argument` is a JSON object that the client's `start` has written."""
    arguments = json.loads(argument)
    owner_fd, lock, pidfd, state_dir = arguments["fds"]
    birth.leave_inheritance([owner_fd, lock, pidfd, state_dir])
    owner = socket.socket(fileno=owner_fd)
    birth.enter(arguments["enter"])
    try:
        is_user = birth.own_user_namespace(arguments["ids"])
        view = birth.own_mount_namespace(arguments["hide"], arguments["workdir"], is_user=is_user)
        server = Server(state_dir, lock, arguments["policy"], view, arguments["workdir"])
        listener = server.listen()
    except OSError as error:
        text = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        # It may be the owner's to reap us.
        fds = [os.pidfd_open(os.getpid())]
        failed = {"push": "failed", "error": text, "errno": error.errno or errno.EIO}
        protocol.send(owner, protocol.encode(failed, fds), fds)
        sys.exit(1)
    server.serve(listener, owner, pidfd)
