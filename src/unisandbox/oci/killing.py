"""Signals to the processes of a container; that a SIGKILL is ours is written down before it is sent."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable

from unisandbox.host.boundary import reached
from unisandbox.host.cgroups import Cgroup
from unisandbox.host.pidfd import has_ended
from unisandbox.oci.ledger import Ledger
from unisandbox.oci.processes import Container, Process, awaits_start, end_descendants, end_init, end_tree, members


def send(container: Container, process: Process, number: int, ledger: Ledger, *, all: bool) -> None:
    """Send a signal to a process, or to all that is in its cgroup; who has ended takes it without a word."""
    if number == signal.SIGKILL:
        _note(container, process, ledger)
    reached("before process.signal", process.exec_id)
    with contextlib.suppress(ProcessLookupError):
        if all and process.cgroup is not None:
            for pid in members(process.cgroup, process.pid or 0):
                _send_to_member(process, process.cgroup, pid, number)
        elif process.pidfd >= 0:
            signal.pidfd_send_signal(process.pidfd, number)
            if number == signal.SIGKILL and process.pid is not None and process.cgroup is not None:
                process.cgroup.let_die(process.pid)
        elif (waiting := awaits_start(container, process)) is not None:
            signal.pidfd_send_signal(waiting.pidfd, number)
    reached("after process.signal", process.exec_id)


def end(container: Container, processes: Iterable[Process], ledger: Ledger) -> None:
    """End these with all that they have started, at once. Init stays, to tell how everybody ended."""
    for process in processes:
        if process.cgroup is not None and process.exit is None:
            if process.pidfd < 0 or not has_ended(process.pidfd):
                _note(container, process, ledger)
            process.swept = True
            end_tree(process.cgroup, process.pid or 0, process.pidfd)


def end_all(container: Container, ledger: Ledger) -> None:
    """The same for all processes of a container, and for what those have left that ended before.

    A later container of its name is left alone: its processes and cgroups are others.
    """
    created = container.created
    for cgroup in container.lingering:
        cgroup.kill()
    by_descent = container.with_init and not container.plan.cgroup.holds_processes
    if by_descent and created is not None and not has_ended(created.pidfd):
        end_descendants(created.pid)
    end(container, container.processes.values(), ledger)
    if (main := container.processes.get("")) is not None:
        end_rest(container, main)


def end_rest(container: Container, main: Process) -> None:
    """End what the main process of a container has left, if it has ended.

    In a pid namespace that is shared the end of its first process ends nobody else, who would hold its streams open and
    go on unseen.
    """
    if main.exit is None:
        return
    if not container.with_init:
        end_init(container.plan.cgroup, container.created)
    elif main.cgroup is not None:
        main.cgroup.kill()


def _note(container: Container, process: Process, ledger: Ledger) -> None:
    """It is about to get a SIGKILL from us, which is no end for want of memory; whoever asks later shall know."""
    if not process.killed_by_us and process.pid is not None:
        process.killed_by_us = True
        ledger.killed_now(ledger.facts(container, process, process.pid, started=True))
    process.killed_by_us = True


def _send_to_member(process: Process, cgroup: Cgroup, pid: int, number: int) -> None:
    """Signal a process if it still is in the cgroup: its number may be another's by now.

    Where there is none, if it still descends from the one that it was found by.
    """
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if cgroup.holds(pid) if cgroup.holds_processes else pid in members(cgroup, process.pid or 0):
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)
