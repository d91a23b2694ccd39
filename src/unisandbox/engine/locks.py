"""Having a lock of the keeper's, with words for whoever has waited for it too long."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Final

from unisandbox.api import DeadlineExceededError
from unisandbox.host.keeper import Keeper, LockTimeoutError

LOCK_SECONDS: Final = 20.0
"""Making a sandbox takes its lock for longest: well below one second, more on a machine that is starved."""


@contextlib.asynccontextmanager
async def locked(keeper: Keeper, lock: str, what: str, *, timeout: float = LOCK_SECONDS) -> AsyncIterator[int]:
    """Have a lock; what comes is its turn, see `Turnstile.lock`.

    Args:
        keeper: who gives it.
        lock: its name.
        what: that it speaks of, for messages.
        timeout: seconds.

    Raises:
        DeadlineExceededError: another process has it for long; it is named.
    """
    try:
        turn = await keeper.locks.lock(lock, timeout=timeout)
    except LockTimeoutError as error:
        if error.pid in {0, os.getpid()}:
            raise DeadlineExceededError(f"{what} has been in use for {timeout:g} s", hint="Try again.") from None
        raise DeadlineExceededError(
            f"{what} has been in use by process {error.pid} for {timeout:g} s",
            hint=f"See what holds process {error.pid} up: it may be suspended (kill -CONT {error.pid}).",
        ) from None
    try:
        yield turn
    finally:
        keeper.locks.unlock(lock)
