"""What the backends of both modes can be told."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import attrs

from unisandbox.api import InvalidArgumentError

if TYPE_CHECKING:  # naming a backend loads nothing
    from unisandbox.backends.wasm.compiling import CompileLimits


@attrs.frozen(eq=False, repr=False)
class Settings:
    """See `WasmBackend`.

    Attributes:
        fuel: instructions that each guest may execute.
        cache: directory for compiled modules.
        compile_memory: bytes that the compilation of one module may take.
        compile_seconds: seconds that it may take.
    """

    fuel: int | None
    cache: str | os.PathLike[str] | None
    compile_memory: int | None
    compile_seconds: float | None

    def __attrs_post_init__(self) -> None:
        """Raises InvalidArgumentError."""
        for what in ("fuel", "compile_memory", "compile_seconds"):
            number = getattr(self, what)
            if number is not None and not number > 0:
                raise InvalidArgumentError(f"{what} must be > 0, got {number!r}")

    @property
    def compile_limits(self) -> CompileLimits:
        """With the usual ones for what is not said."""
        from unisandbox.backends.wasm.compiling import CompileLimits

        usual = CompileLimits()
        return CompileLimits(memory=self.compile_memory or usual.memory, seconds=self.compile_seconds or usual.seconds)
