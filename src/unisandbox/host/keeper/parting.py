"""Asking the keeper to end, and waiting until it has. Client side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import anyio

from unisandbox.api.errors import BackendError
from unisandbox.host.keeper import starting
from unisandbox.host.keeper.link import Link
from unisandbox.host.keeper.messages import close_report_in
from unisandbox.host.keeper.process import Process
from unisandbox.host.keeper.records import CloseReport
from unisandbox.host.readiness import readable

_END_SECONDS: Final = 20.0


async def close(link: Link, process: Process, state_dir: str, *, run_guards: bool) -> CloseReport:
    """See `Keeper.close`.

    Raises:
        BackendError: it has not ended in time.
    """
    with _in_time(process, state_dir):
        message = (await link.ask("close", run_guards=run_guards)).message
        await readable(process.pidfd)
    return close_report_in(message)


async def retire(link: Link, process: Process, state_dir: str) -> bool:
    """See `Keeper.retire`; the connection stays open.

    Raises:
        BackendError: it has not ended in time.
    """
    with _in_time(process, state_dir):
        if not (await link.ask("retire")).message["retired"]:
            return False
        await readable(process.pidfd)
    return True


@contextlib.contextmanager
def _in_time(process: Process, state_dir: str) -> Iterator[None]:
    try:
        with anyio.fail_after(_END_SECONDS):
            yield
    except TimeoutError:
        raise BackendError(
            f"keeper {process.pid} did not end within {_END_SECONDS:g} s", log=starting.log_tail(state_dir)
        ) from None
