"""The state directory of a keeper that is dead: who has it alone may touch what is left there, and nobody else.

That is records, and all that is found by its name. Another engine may have opened the directory since, and then it is
all that one's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

import anyio

from unisandbox.api import UnavailableError
from unisandbox.engine.cleaning import CLEANING_SECONDS
from unisandbox.engine.state import StateDirectory
from unisandbox.host import small_files
from unisandbox.host.keeper import starting
from unisandbox.host.keeper.protocol import LOCK_NAME

if TYPE_CHECKING:
    from unisandbox.engine.core import EngineCore

_POLL: Final = 0.01


class Regaining:
    """The directory of one engine."""

    def __init__(self, core: EngineCore, state: StateDirectory) -> None:
        self._core = core
        self._state = state
        # While this process has it, and how many calls need it.
        self._regained: Regained | None = None
        self._users = 0

    @property
    def is_ours(self) -> bool:
        """Whether this process has it now."""
        return self._regained is not None

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Nobody can open the directory meanwhile, and nobody has since the keeper died.

        Raises:
            UnavailableError: somebody has; it is another engine's now.
        """
        deadline = anyio.current_time() + CLEANING_SECONDS
        while self._regained is None:
            self._regained = self.try_now()
            if self._regained is None:
                if anyio.current_time() > deadline:
                    self._core.check_keeper()
                await anyio.sleep(_POLL)  # a lock has no event with a deadline
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._regained.close()
                self._regained = None

    def try_now(self) -> Regained | None:
        """The directory, if nobody else has opened it since the death of the keeper.

        None while its lock is not free: others of the keeper's clients may have it for a moment, or a child of the
        keeper that goes on undoing something. While it is had nobody can open the directory.

        Raises:
            UnavailableError: somebody else has opened it since.
        """
        path = os.path.join(self._state.path, LOCK_NAME)
        try:
            fd = small_files.opened(path)
        except (FileNotFoundError, small_files.NotARegularFileError):
            return Regained(-1)  # somebody has removed it, and no keeper has begun since: it could not, or made a file
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
            except BlockingIOError:
                is_locked = False
            self._check_same(starting.read_lock(fd))
        except BaseException:
            os.close(fd)
            raise
        if not is_locked:
            os.close(fd)
            return None
        return Regained(fd)

    def _check_same(self, holder: starting.LockHolder) -> None:
        keeper = self._core.host.keeper.hello
        if (holder.keeper, holder.keeper_start_time) != (keeper.pid, keeper.start_time):
            raise UnavailableError(
                f"the keeper of engine {self._state.engine_id} (process {keeper.pid}) has ended, and process"
                f" {holder.owner or holder.keeper} has opened its state directory {self._state.path} since: what is"
                " there now is that engine's",
                hint="Close this engine.",
            )


class Regained:
    """A state directory whose keeper is dead, and that nobody can open until `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Let others have it. Repeating is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
