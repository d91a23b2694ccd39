"""Starting a process in a sandbox's main container: for `run`, which waits for it, and `exec`, which hands it out."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from unisandbox.api import ExecTask, NotFoundError, ProcessSpec, SandboxError, StartedTask, UnavailableError
from unisandbox.engine.entry import Entry
from unisandbox.sandbox.pipes import Pipes

# What cleaning after a cancellation may take before it is left to the engine.
CLEANING_SECONDS: Final = 5.0


async def start(
    entry: Entry, spec: ProcessSpec, pipes: Pipes, *, exec_id: str = "", operation_id: str = ""
) -> tuple[str, int | None]:
    """Start a process in the sandbox's main container: its exec id, and its pid on the host if any.

    On any failure or cancellation nothing is left of it. The inner ends of `pipes` are closed in every case.
    """
    exec_id = exec_id or entry.programs.next_exec_id()
    try:
        async with entry.programs.beginning(exec_id):
            try:
                started = await _start(entry, exec_id, spec, pipes, operation_id)
            except (NotFoundError, UnavailableError):
                # The main container ended between the look at it and the start; once more, in a new one.
                started = await _start(entry, exec_id, spec, pipes, operation_id)
    except BaseException:
        pipes.close()
        raise
    finally:
        pipes.close_inside()
    if started.terminal is not None:
        pipes.own("terminal", started.terminal)
    entry.programs.started(exec_id)
    return exec_id, started.pid


async def _start(entry: Entry, exec_id: str, spec: ProcessSpec, pipes: Pipes, operation_id: str) -> StartedTask:
    task = await entry.programs.ready()
    is_ours = True
    try:
        with entry.in_our_words():
            try:
                await task.exec(ExecTask(entry.main, exec_id, spec, pipes.inside))
            except SandboxError:
                is_ours = False  # nothing was made, or it is another one's
                raise
            await entry.held.hold(exec_id, spec, pipes.fds(), operation_id)
            pipes.tell(lambda stream: entry.held.drop_stream(exec_id, stream))
            started = await task.start(entry.main, exec_id)
            if started.terminal is not None:
                try:
                    await entry.held.hold_streams(exec_id, {"terminal": started.terminal})
                except BaseException:
                    os.close(started.terminal)
                    raise
            return started
    except BaseException:
        if not is_ours or entry.in_fork:
            raise

        async def finish() -> None:
            task.kill_now(entry.main, exec_id)
            await task.delete(entry.main, exec_id)

        with contextlib.suppress(OSError):  # no file descriptor is left, say: `finish` does it
            task.kill_now(entry.main, exec_id)
        await entry.cleaning.run(finish, seconds=CLEANING_SECONDS)
        entry.held.forget(exec_id)
        raise
