"""Compiled modules and components as sealed memory files, which workers map: nothing is loaded in this process."""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from typing import Final

import anyio.lowlevel
import attrs

from unisandbox.api.units import MIB
from unisandbox.backends.wasm.compiled import Compiled
from unisandbox.backends.wasm.programs import Program

_KEPT_BYTES: Final = 256 * MIB
_PIECE: Final = 4 * MIB
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@attrs.frozen
class Image:
    """What a worker runs.

    Attributes:
        fd: of the sealed memory file.
        size: bytes.
    """

    fd: int
    size: int


class Images:
    """Those of one engine: the last ones that were used, at most 256 MiB of them."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._kept: OrderedDict[str, Image] = OrderedDict()

    async def get(self, program: Program, owner: str) -> Image:
        """The image of a program, for the sandbox `owner`; its descriptor is a copy, the caller's to close.

        Raises:
            InvalidArgumentError: it is no valid module or component; exit code 126.
            DeadlineExceededError: it takes too long to compile.
            FailedPreconditionError: the store can be written by others.
        """

        async def load(fd: int) -> Image:
            image = self._kept[program.digest] = await _sealed(fd)
            return image

        image = await self._compiled.get(program, owner, lambda: self._kept.get(program.digest), load)
        self._kept.move_to_end(program.digest)
        image = attrs.evolve(image, fd=fcntl.fcntl(image.fd, fcntl.F_DUPFD_CLOEXEC, 3))
        while len(self._kept) > 1 and sum(kept.size for kept in self._kept.values()) > _KEPT_BYTES:
            os.close(self._kept.popitem(last=False)[1].fd)
        return image

    def close(self) -> None:
        """Forget them; guests that run have theirs."""
        while self._kept:
            os.close(self._kept.popitem()[1].fd)


async def _sealed(source: int) -> Image:
    """A copy that nobody can change: what was checked is what is run."""
    fd = os.memfd_create("unisandbox-wasm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = 0
        while piece := os.pread(source, _PIECE, size):
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view) :]
            size += len(piece)
            await anyio.lowlevel.checkpoint()
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return Image(fd, size)
    except BaseException:
        os.close(fd)
        raise
