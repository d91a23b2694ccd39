"""The keeper as a parent: spawns by key, jobs, and the reaping of every child and orphan. Standard library only."""

from __future__ import annotations

import errno
import os
import signal
import time

from unisandbox.host import pidfd as pidfds
from unisandbox.host.keeper import launches, protocol
from unisandbox.host.keeper.loop import note
from unisandbox.host.keeper.workers import PATIENCE, Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from unisandbox.host.keeper.connections import Client, Reply
    from unisandbox.host.keeper.exits import Exits
    from unisandbox.host.keeper.holdings import Holdings
    from unisandbox.host.keeper.loop import Loop, Timer
    from unisandbox.host.keeper.protocol import Message, Packet

# So many answers to spawns can be asked for again.
_KEYS_KEPT = 4096
_JOB_TIME_LIMIT = 3600.0


class _Spawn:
    """A spawn by its key, from the request on."""

    __slots__ = ("answer", "cancelled", "living", "pid", "pidfd", "start_time", "waiting")

    def __init__(self) -> None:
        self.pid = 0
        self.start_time = 0
        self.pidfd = -1
        #: None while the program is on its way to exec.
        self.answer: Message | None = None
        self.cancelled = False
        self.living = True
        self.waiting: list[Reply] = []


class _Job:
    """A job, from its request to its answer."""

    __slots__ = ("cancelled", "ended", "hold", "reply", "timer")

    def __init__(self, reply: Reply, hold: dict[str, str]) -> None:
        self.reply = reply
        self.hold = hold
        self.timer: Timer | None = None
        self.cancelled = False
        self.ended = False


class _Delayed:
    """A job that waits: for the death of a cancelled one, or a moment for a worker."""

    __slots__ = ("fds", "reply", "start")

    def __init__(self, reply: Reply, fds: list[int], start: Callable[[], None]) -> None:
        self.reply = reply
        self.fds = fds
        self.start = start


class Family:
    """Everything that the keeper is the parent of."""

    def __init__(self, loop: Loop, exits: Exits, holdings: Holdings, tell_exits: Callable[[], None]) -> None:
        self._loop = loop
        self._exits = exits
        self._holdings = holdings
        self._tell_exits = tell_exits
        self._spawns: dict[str, _Spawn] = {}
        self._launcher = launches.Launcher()
        #: Launches that are not over. Only they know the pid of the program.
        self._launching: dict[_Spawn, launches.Launch] = {}
        #: Programs that run or are not yet reaped, by pid.
        self._living: dict[int, _Spawn] = {}
        #: Launchers, forks of the keeper itself, and what never became a program; their exits are nobody's business.
        self._own: set[int] = set()
        self._workers = Workers(loop, self._start_delayed)
        #: The last job of each worker, by its pid.
        self._jobs: dict[int, _Job] = {}
        #: Jobs that could not begin at once, in order.
        self._delayed: list[_Delayed] = []
        self._patience: Timer | None = None

    # --- programs ---

    def spawn(self, packet: Packet, reply: Reply) -> None:
        """Start a program, or answer as before when the key was used before."""
        message = packet.message
        key = protocol.text(message, "key")
        known = self._spawns.get(key)
        if known is not None:
            if known.answer is None:
                known.waiting.append(reply)
            else:
                self._answer(known, reply)
            return
        program = launches.Program(
            protocol.texts(message, "argv"),
            protocol.mapping(message, "env"),
            protocol.text(message, "cwd"),
            protocol.texts(message, "cgroup_procs"),
            self._holdings.number(protocol.text(message, "mounts")) if "mounts" in message else -1,
        )
        launch = launches.Launch(program)
        spawn = _Spawn()
        try:
            launch.prepare()
            self._loop.watch(launch.ends, lambda _events: self._begun(spawn))
            try:
                launch.start(self._launcher, packet.fds)
            except BaseException:
                self._loop.unwatch(launch.ends)
                raise
        except BaseException:
            launch.close()
            raise
        self._own.add(launch.launcher)
        self._launching[spawn] = launch
        spawn.waiting.append(reply)
        self._remember(key, spawn)

    def cancel_spawn(self, packet: Packet, reply: Reply) -> None:
        """Whoever asked for this spawn does not want it any more: kill what it started."""
        spawn = self._spawns.get(protocol.text(packet.message, "key"))
        if spawn is not None and spawn.living:
            spawn.cancelled = True
            launch = self._launching.get(spawn)
            pid = spawn.pid if launch is None else launch.pid()
            if pid:
                os.kill(pid, signal.SIGKILL)  # our child and not reaped: the pid is its own
        reply({})

    def _begun(self, spawn: _Spawn, *, is_dead: bool = False) -> None:
        """The program runs, or it is known why not, or its process has died on the way."""
        launch = self._launching[spawn]
        # The pipe of one that is dead may be open yet in its launcher.
        if not launch.has_ended() and not is_dead:
            return
        pid, failure = launch.outcome()
        del self._launching[spawn]
        self._loop.unwatch(launch.ends)
        launch.close()
        if failure is None and pid == 0:
            failure = ("fork", errno.ECHILD, self._launcher.silent())
        if failure is None:
            failure = self._know(spawn, pid)
        if failure is None:
            spawn.answer = {"pid": pid, "start_time": spawn.start_time}
        else:
            stage, number, text = failure
            spawn.answer = {"error": text, "errno": number, "stage": stage}
            spawn.living = False
            if pid:
                self._own.add(pid)  # it ends by itself, at once, and is nobody's exit
        for reply in spawn.waiting:
            self._answer(spawn, reply)
        spawn.waiting = []
        if spawn.pidfd >= 0:
            os.close(spawn.pidfd)
            spawn.pidfd = -1

    def _know(self, spawn: _Spawn, pid: int) -> tuple[str, int, str] | None:
        """From now on it is known by its pid, and its exit is somebody's; or why that cannot be: then it is killed."""
        try:
            spawn.start_time = pidfds.start_time(pid)
            spawn.pidfd = os.pidfd_open(pid)
        except OSError as error:  # no fd left: it must not run without anybody knowing
            os.kill(pid, signal.SIGKILL)
            return "pidfd", error.errno or errno.EMFILE, f"process {pid}: {error.strerror}"
        if spawn.cancelled:
            os.kill(pid, signal.SIGKILL)
        spawn.pid = pid
        self._own.discard(pid)  # it may have been the launcher
        self._living[pid] = spawn
        return None

    def _launched(self, pid: int) -> _Spawn | None:
        """The spawn whose process `pid` (dead, not reaped) is, if its launch was not over."""
        for spawn, launch in self._launching.items():
            if launch.pid() == pid:
                self._begun(spawn, is_dead=True)
                return self._living.pop(pid, None)
        return None

    def _answer(self, spawn: _Spawn, reply: Reply) -> None:
        assert spawn.answer is not None  # noqa: S101 - callers have looked
        answer = dict(spawn.answer)
        if "error" in answer or not spawn.living:
            reply(answer)
            return
        pidfd, spawn.pidfd = spawn.pidfd, -1
        if pidfd < 0:
            try:
                pidfd = os.pidfd_open(spawn.pid)  # not reaped: the pid is still its own
            except OSError as error:
                reply.fail(error, stage="pidfd")
                return
        reply(answer, [pidfd])

    def _remember(self, key: str, spawn: _Spawn) -> None:
        self._spawns[key] = spawn
        if len(self._spawns) > _KEYS_KEPT:
            oldest = next((known for known, spawn in self._spawns.items() if not spawn.living), key)
            del self._spawns[oldest]

    # --- jobs ---

    def job(self, packet: Packet, reply: Reply) -> None:
        """Let a worker run steps, and hold the fds that they make."""
        message = packet.message
        steps = message.get("steps")
        if type(steps) is not list or not all(type(step) is dict for step in steps):
            raise OSError(errno.EINVAL, "steps must be a list of objects")
        hold = protocol.mapping(message, "hold")
        if len(set(hold.values())) != len(hold):
            raise OSError(errno.EINVAL, "hold gives one name to two results")
        for name in hold.values():
            self._holdings.free(name)
        timeout = protocol.seconds(message, "timeout", _JOB_TIME_LIMIT)
        if self._cancelling() or self._delayed or self._workers.are_busy:
            fds = [packet.claim(index) for index in range(len(packet.fds))]
            self._delayed.append(_Delayed(reply, fds, lambda: self._start_job(steps, fds, hold, timeout, reply)))
            self._start_delayed()
            return
        self._start_job(steps, packet.fds, hold, timeout, reply)

    def _cancelling(self) -> bool:
        """What a cancelled job did must be over before another (that cleans up after it, perhaps) begins."""
        return any(job.cancelled for job in self._jobs.values())

    def _start_delayed(self) -> None:
        """Start those that need not wait any more."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        while self._delayed and not self._cancelling():
            if self._workers.are_busy:
                self._patience = self._loop.later(PATIENCE, self._start_delayed)
                return
            delayed = self._delayed.pop(0)
            try:
                delayed.start()
            except OSError as error:
                delayed.reply.fail(error)
            finally:
                protocol.close_all(delayed.fds)

    def cancel_job(self, packet: Packet, reply: Reply) -> None:
        """Kill the job that the same client asked for as request `job`; what it made is not held."""
        number = protocol.integer(packet.message, "job", 0, 1 << 62)
        for pid, job in self._jobs.items():
            if job.reply.client is reply.client and job.reply.id == number and not job.ended:
                job.cancelled = True
                self._workers.kill(pid)
                reply({})
                return
        for delayed in self._delayed:
            if delayed.reply.client is reply.client and delayed.reply.id == number:
                self._delayed.remove(delayed)
                protocol.close_all(delayed.fds)
                delayed.reply.fail(OSError(errno.ECANCELED, "the job was cancelled"))
                reply({})
                return
        # Ended before: its answer is on its way to somebody who does not look any more.
        for name in protocol.texts(packet.message, "names"):
            self._holdings.forget(name)
        reply({})

    def gone(self, client: Client) -> None:
        """Nobody would use what the jobs of this client make, and whoever cleans up after it would not know of it."""
        for pid, job in self._jobs.items():
            if job.reply.client is client and not job.ended:
                job.cancelled = True
                self._workers.kill(pid)
        for delayed in [delayed for delayed in self._delayed if delayed.reply.client is client]:
            self._delayed.remove(delayed)
            protocol.close_all(delayed.fds)

    def _start_job(
        self, steps: list[dict[str, object]], fds: list[int], hold: dict[str, str], timeout: float, reply: Reply
    ) -> None:
        job = _Job(reply, hold)
        pid = self._workers.begin(steps, fds, lambda packet: self._job_said(job, packet))
        self._jobs[pid] = job

        def too_late() -> None:
            job.cancelled = True  # whoever cleans up after it waits for its death
            self._workers.kill(pid)
            self._end_job(job, {"error": f"the job took more than {timeout:g} s", "errno": errno.ETIMEDOUT})

        job.timer = self._loop.later(timeout, too_late)

    def _job_said(self, job: _Job, packet: Packet) -> None:
        if not job.ended:  # it may have been too late
            self._end_job(job, self._job_answer(job, packet))

    def _job_answer(self, job: _Job, packet: Packet) -> Message:
        message = packet.message
        if "error" in message or job.cancelled:
            return message
        if packet.lost:
            return {"error": "the keeper has no file descriptors left for the job's results", "errno": errno.EMFILE}
        names = protocol.texts(message, "names")
        missing = sorted(set(job.hold) - set(names))
        if missing:
            return {"error": f"the job made no {', '.join(missing)}", "errno": errno.EINVAL}
        numbers: dict[str, int] = {}
        try:
            for index, name in enumerate(names):
                if name in job.hold:
                    held = self._holdings.free(job.hold[name])
                    numbers[held] = self._holdings.put(held, packet.claim(index))
        except OSError as error:  # another took the name meanwhile
            for held in numbers:
                self._holdings.forget(held)
            return {"error": str(error.strerror), "errno": error.errno}
        return {"result": message["result"], "held": numbers}

    def _end_job(self, job: _Job, answer: Message) -> None:
        """Answer. Its worker takes the next one, or is reaped when it is dead."""
        if job.ended:
            return
        job.ended = True
        if job.timer is not None:
            job.timer.cancel()
        job.reply(answer)

    # --- the dead ---

    def adopt(self, pid: int) -> None:
        """A fork of the keeper that somebody else looks after: only to be reaped."""
        self._own.add(pid)

    def reap(self) -> None:
        """Reap all who are dead, and write down how they ended."""
        found = False
        while True:
            try:
                # Look first, reap after: the start time can be read as long as the pid is not free.
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if dead is None:
                break
            pid = dead.si_pid
            spawn = self._living.pop(pid, None)
            if spawn is None and self._launching:
                spawn = self._launched(pid)
            worked = pid in self._workers
            start_time = 0
            if spawn is not None:
                spawn.living = False
                start_time = spawn.start_time
            elif not worked and pid not in self._own:
                start_time = self._start_time(pid)
            if worked:
                _end_group(pid)  # before `waitpid`: then the number is free
            _, status = os.waitpid(pid, 0)
            if worked:
                self._workers.reaped(pid)
                self._jobs.pop(pid, None)
            elif pid in self._own:
                self._own.discard(pid)
            else:
                self._exits.add(pid, start_time, status, time.time())
                found = True
        if found:
            self._tell_exits()
        self._start_delayed()

    @property
    def is_idle(self) -> bool:
        """Whether no program and no job of a client runs."""
        return not (self._living or self._delayed or self._workers.are_busy)

    def kill_all(self, spare: int = 0) -> bool:
        """Send SIGKILL to every child but `spare`; whether there was any. Their orphans become our children in turn."""
        found = False
        try:
            children = self._loop.with_spare(_children)
        except OSError as error:  # whatever it is: a keeper that could not end would stay for ever
            note(f"cannot list the children, ending those that were started: {error}")
            # Not reaped: the pids are their own.
            children = [*self._living, *self._own, *(launch.pid() for launch in self._launching.values())]
        for pid in children:
            if pid not in {0, spare}:
                found = True
                os.kill(pid, signal.SIGKILL)
        return found

    def _start_time(self, pid: int) -> int:
        try:
            return self._loop.with_spare(lambda: pidfds.start_time(pid))
        except OSError as error:
            note(f"start time of process {pid} is lost: {error}")
            return 0


def _children() -> list[int]:
    """The pids of our children, zombies included."""
    me = os.getpid()
    try:
        with open(f"/proc/{me}/task/{me}/children", "rb") as file:
            return [int(pid) for pid in file.read().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        pass
    found = []
    names = os.listdir("/proc")
    if str(me) not in names:
        raise FileNotFoundError(errno.ENOENT, "/proc is not mounted")
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == me:
                found.append(int(name))
    return found


def _end_group(pid: int) -> None:
    """Kill what the dead leader of a group has left: a job that was killed in the middle has children."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing is left, or it was killed before it had a group
